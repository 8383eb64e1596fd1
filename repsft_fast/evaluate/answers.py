"""The answer of a reply, found by the extractor of its task, and compared with the reference."""

from __future__ import annotations

from collections.abc import Callable

from repsft_fast.errors import ConfigError, describe, did_you_mean
from repsft_fast.evaluate.choices import choice
from repsft_fast.evaluate.equality import same_by_text, same_in_process
from repsft_fast.evaluate.extraction import boxed, final_answer, hashes, last_number, number, whole
from repsft_fast.evaluate.own_extractor import Own, own_function

Extractor = Callable[[str], str | None]

EXTRACTORS: dict[str, Extractor] = {
    "final": final_answer,
    "boxed": boxed,
    "hashes": hashes,
    "last_number": last_number,
    "number": number,
    "choice": choice,
    "whole": whole,
}


def find_extractor(name: str, *, trusted: bool = False, where: str = "mixture.extractor") -> Extractor:
    """By name, or a function of the user's own as package.module:function (text → the answer, or None where
    there is none).

    trusted: code that the settings name may run here (model.trust_remote_code). where: the setting's name, in
    errors.
    Raises ConfigError when there is none of that name, or it is no such function. No module is imported
    unless it may be.
    """
    if name in EXTRACTORS:
        return EXTRACTORS[name]
    if ":" not in name:
        near = did_you_mean(name, EXTRACTORS)
        todo = f"did you mean {near}?" if near else None
        expected = f"{', '.join(sorted(EXTRACTORS))} or package.module:function"
        raise ConfigError(describe(where, "is not known", expected=expected, got=name, todo=todo))
    if not trusted:
        todo = "read it, and set model.trust_remote_code to true if it may run here"
        raise ConfigError(describe(where, "names code, which is not run unasked", got=name, todo=todo))
    return Own(name, own_function(name, where), where)


def answer_in(extract: Extractor, reply: str, *, prompt: str = "", choices: int = 0) -> str | None:
    """The answer of a reply, None where there is none or it is empty.

    prompt: what the model read, as text: where a template's `<think>` ends it, the reply begins inside that
    thought. choices: how many a multiple choice has, for the extractor of that name; 0: not known.
    """
    if prompt.rstrip().endswith("<think>"):
        reply = "<think>" + reply
    return (choice(reply, choices) if extract is choice and choices else extract(reply)) or None


def same_answer(got: str | None, reference: str) -> bool:
    """Equal as text, as numbers (1,000 = 1000.0 = 2000/2; 50% = 0.5, and = 50), or, where `math-verify` is
    installed, as mathematical expressions that are cheap to evaluate: a reply must not be able to stop the
    run. `judging.Judge` compares all."""
    known = same_by_text(got, reference)
    return same_in_process(got or "", reference) if known is None else known
