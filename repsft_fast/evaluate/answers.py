"""Take the final answer out of a generated text and compare it with the reference."""

from __future__ import annotations

import functools
import importlib
import logging
import re
import sys
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from typing import Any

from repsft_fast.errors import ConfigError, TrainingError, describe, did_you_mean

Extractor = Callable[[str], str | None]

_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:[eE][-+]?\d+)?%?")


def boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{…}`, braces balanced; None without one or when it never closes."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 0, start + len("\\boxed{")
    for i in range(begin - 1, len(text)):
        if text[i] == "{":
            depth += 1
        elif text[i] == "}":
            depth -= 1
            if depth == 0:
                return text[begin:i].strip()
    return None


def hashes(text: str) -> str | None:
    """What follows the last `####` on its line (GSM8K's way)."""
    _, found, rest = text.rpartition("####")
    return rest.split("\n", 1)[0].strip() if found else None


def last_number(text: str) -> str | None:
    """The last number in the text, as written."""
    numbers = [m.group() for m in _NUMBER.finditer(text) if any(c.isdigit() for c in m.group())]
    return numbers[-1] if numbers else None


def whole(text: str) -> str | None:
    """The whole reply, stripped."""
    return text.strip() or None


def final_answer(text: str) -> str | None:
    r"""The answer a reader would take: `\boxed{}`, else `####`, else the whole reply."""
    return boxed(text) or hashes(text) or whole(text)


EXTRACTORS: dict[str, Extractor] = {
    "final": final_answer,
    "boxed": boxed,
    "hashes": hashes,
    "last_number": last_number,
    "whole": whole,
}


# What an own function is tried on at start: answers as people write them, and the reply of a model that said
# nothing.
_PROBES = ("Twice two is four. The answer is \\boxed{4}.", "2 + 2 = 4\n#### 4", "")


def find_extractor(name: str, *, trusted: bool = False) -> Extractor:
    """By name, or a function of the user's own as package.module:function (text → the answer, or None where
    there is none).

    trusted: code that the settings name may run here (model.trust_remote_code).
    Raises ConfigError when there is none of that name, or it is no such function. No module is imported
    unless it may be.
    """
    if name in EXTRACTORS:
        return EXTRACTORS[name]
    if ":" not in name:
        near = did_you_mean(name, EXTRACTORS)
        todo = f"did you mean {near}?" if near else None
        expected = f"{', '.join(sorted(EXTRACTORS))} or package.module:function"
        raise ConfigError(
            describe("mixture.extractor", "is not known", expected=expected, got=name, todo=todo)
        )
    if not trusted:
        todo = "read it, and set model.trust_remote_code to true if it may run here"
        raise ConfigError(
            describe("mixture.extractor", "names code, which is not run unasked", got=name, todo=todo)
        )
    return _Own(name, _own_function(name))


def _own_function(name: str) -> Callable[[str], Any]:
    """The function, imported: not one of Python's own library, whose functions do more with a reply than read
    it."""
    module, _, function = name.partition(":")
    if not all(step.isidentifier() for step in (*module.split("."), function)):
        raise ConfigError(
            describe("mixture.extractor", "names no function", expected="package.module:function", got=name)
        )
    if _is_of_python(module):
        raise ConfigError(_refusal(name, module))
    try:
        found = getattr(importlib.import_module(module), function)
    except (Exception, SystemExit) as error:  # whatever the module's own lines raise
        cause = f"{type(error).__name__}: {(str(error) or 'no words').splitlines()[0]}"
        todo = (
            "its folder must be on PYTHONPATH, or its package installed"
            if isinstance(error, ModuleNotFoundError)
            else None
        )
        raise ConfigError(
            describe("mixture.extractor", f"cannot be imported ({cause})", got=name, todo=todo)
        ) from error
    if not callable(found):
        raise ConfigError(describe("mixture.extractor", "is not a function", got=name))
    for home in _homes(found):
        if _is_of_python(home):
            raise ConfigError(_refusal(name, home))
    return found


def _is_of_python(module: str) -> bool:
    return module.partition(".")[0] in sys.stdlib_module_names


def _refusal(name: str, module: str) -> str:
    wrong = f"is of {module}, a module of Python's own library, which reads no answers"
    return describe(
        "mixture.extractor",
        wrong,
        got=name,
        todo="write a function in a module of your own, under another name",
    )


def _homes(function: Any) -> list[str]:
    """The modules that it was really written in, however it is called where it was found."""
    found: list[str] = []
    while function is not None and len(found) < 10:
        bound = getattr(function, "__self__", None)
        written = (
            function if hasattr(function, "__module__") and hasattr(function, "__name__") else type(function)
        )
        found.append(
            str(
                getattr(written, "__module__", None)
                or getattr(bound, "__name__", None)
                or type(bound).__module__
            )
        )
        is_partial = isinstance(function, functools.partial)
        if is_partial:
            found.pop()  # it says nothing; what it calls does
        function = function.func if is_partial else getattr(function, "__wrapped__", None)
    return found


class _Own:
    """A function of the user's own. Tried when it is made; what it does wrong later is said with the reply it
    was given."""

    def __init__(self, name: str, function: Callable[[str], Any]):
        self._name, self._function = name, function
        for text in _PROBES:
            if wrong := self._try(text)[1]:
                todo = "let it take one text and return the answer as text, or None where there is none"
                raise ConfigError(describe("mixture.extractor", f"{name} {wrong} on {text!r}", todo=todo))

    def __call__(self, text: str) -> str | None:
        answer, wrong = self._try(text)
        if wrong:
            todo = "let it return None where there is no answer, and continue with --resume"
            raise TrainingError(
                describe("mixture.extractor", f"{self._name} {wrong} on a reply", got=text[-200:], todo=todo)
            )
        return answer

    def _try(self, text: str) -> tuple[str | None, str | None]:
        """(the answer, what it did wrong)"""
        try:
            answer = self._function(text)
        except (Exception, SystemExit) as error:
            return None, f"failed ({type(error).__name__}: {(str(error) or 'no words').splitlines()[0]})"
        if answer is not None and not isinstance(answer, str):
            return None, f"returned {type(answer).__name__}"
        return answer, None


def same_answer(got: str | None, reference: str) -> bool:
    """Equal as text, as numbers (1,000 = 1000.0), or, where `math-verify` is installed, as mathematical
    expressions."""
    if got is None:
        return False
    got, reference = _normal(got), _normal(reference)
    if got == reference:
        return True
    a, b = _number(got), _number(reference)
    if a is not None and b is not None:
        return a == b
    return _math_equal(got, reference)


def _normal(text: str) -> str:
    return " ".join(text.strip().strip("$").rstrip(".").split())


def _number(text: str) -> Decimal | None:
    cleaned = text.replace(",", "").replace("$", "").strip()
    percent = cleaned.endswith("%")
    try:
        value = Decimal(cleaned.removesuffix("%"))
    except InvalidOperation:
        return None
    if not value.is_finite():
        return None
    return value / 100 if percent else value


def _math_equal(got: str, reference: str) -> bool:
    """By math-verify, for expressions that are cheap to evaluate; a reply must not be able to stop the run.

    Not by a time limit: verdicts would depend on the machine, and the package's own limit uses a signal.
    """
    if not any(c.isdigit() for c in reference) or not (_is_cheap(got) and _is_cheap(reference)):
        return False  # prose is compared as text
    try:
        from math_verify import parse, verify
    except ImportError:
        return False
    # it warns at every call that no time limit is set
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    try:
        parsed = [parse(f"${text}$", parsing_timeout=None) for text in (reference, got)]
        return bool(verify(*parsed, timeout_seconds=None))
    # whatever a parser of mathematics raises over a model's words: they are not the same expression
    except Exception:
        return False


LONGEST, LARGEST_POWER = 200, 1_000
_COMMAND = re.compile(r"\\([A-Za-z]+)")
_CHEAP = set(
    re.findall(
        r"\w+",
        "frac dfrac tfrac sqrt pi text textbf mathrm mathbf left right cdot times div pm mp le leq ge geq ne"
        " neq lt gt infty circ quad in cup cap emptyset sin cos tan log ln theta alpha beta",
    )
)
# After ^ or **: a short number, fraction or sum, in brackets or not, without another power inside.
_POWER = re.compile(r"(?:\^|\*\*)\s*(?:\{([^{}^*!]{1,16})\}|\(([^()^*!]{1,16})\)|(-?\w{1,4}|\\circ))")


def _is_cheap(text: str) -> bool:
    """No sums, integrals, factorials or unknown functions; all its powers together at most
    `LARGEST_POWER`."""
    if len(text) > LONGEST or "!" in text or not _CHEAP.issuperset(_COMMAND.findall(text)):
        return False
    if re.search(r"[A-Za-z]{2,}\s*\(", _COMMAND.sub(" ", text)) or re.search(
        r"(?:\^|\*\*)\s*-?\w+\s*(?:\^|\*\*)", text
    ):
        return False  # a function by its name, or a tower of powers
    powers = [next(part for part in match if part) for match in _POWER.findall(text)]
    if len(powers) != text.count("^") + text.count("**"):
        return False
    product = 1
    for power in powers:
        product *= max([int(digits) for digits in re.findall(r"\d+", power)] + [1])
    return product <= LARGEST_POWER
