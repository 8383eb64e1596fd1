"""What a model is asked: templates that turn a question into a prompt, and prompts into token ids as training
would write them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from repsft_fast.data.bounded import bounded_map
from repsft_fast.data.encode import Encoder
from repsft_fast.data.kept import check_context
from repsft_fast.data.placeholders import Piece, special_pattern
from repsft_fast.data.template import ChatTemplate, find_template
from repsft_fast.errors import ConfigError, DataError, describe, did_you_mean
from repsft_fast.evaluate.asked import Problem
from repsft_fast.evaluate.layouts import LETTERS

PLACES = ("question", "choices")
# Keys of layouts.Layout.style: what is asked of a model that answers in words.
STYLES = {
    "plain": "{question}",
    "math": "{question}\n\nWork it out step by step, and write the final answer alone into \\boxed{}.",
    "number": "{question}\n\nWork it out step by step. The last line is #### and the answer as a number.",
    "choice": "{question}\n\n{choices}\n\nWrite the letter of the right choice into \\boxed{}.",
    "reasoned choice": (
        "{question}\n\n{choices}\n\nThink it through step by step, and write the letter of the right choice"
        " into \\boxed{}."
    ),
}
# What letters are compared behind, as lm-eval asks MMLU (its task mmlu, version 1).
LETTERED = "{question}\n{choices}\nAnswer:"
NOTE_SPECIAL = (
    "prompts hold special-token strings, kept as text (tokenizer.special_tokens: parse makes them tokens)"
)

_PLACE = re.compile(r"\{(question|choices)\}")
# A word in braces that LaTeX or mathematics would not write: no argument (\text{…}, }{…}), index or power.
_LIKE_A_PLACE = re.compile(r"(?:(?<![\\\w}^\]])|(?<=\n))\{([A-Za-z_]\w{2,})\}")


def check_template(template: str, where: str, *, choices: bool, shown: bool = False) -> None:
    """ConfigError for a template without {question}, one that names what is not there, and one that shows
    {choices} where the problems have none (choices) or does not where it must (shown). Every other brace is a
    brace."""
    if doubled := re.search(r"\{\{\s*(\w+)\s*\}\}", template):
        todo = f"write {{{doubled[1]}}}, in single braces"
        raise ConfigError(describe(where, "has a place in double braces", got=doubled[0], todo=todo))
    for name in _LIKE_A_PLACE.findall(_PLACE.sub(" ", template)):
        near = did_you_mean(name, PLACES)
        todo = f"did you mean {{{near}}}?" if near else f"a brace of the text's own: {{ {name} }}"
        wrong, expected = "names what a problem does not have", "{question}, {choices}"
        raise ConfigError(describe(where, wrong, expected=expected, got=f"{{{name}}}", todo=todo))
    found = set(_PLACE.findall(template))
    if "question" not in found:
        todo = "write {question} where the question goes"
        raise ConfigError(describe(where, "has no place for the question", got=template, todo=todo))
    if "choices" in found and not choices:
        todo = "remove {choices} from it"
        raise ConfigError(describe(where, "shows choices, and the problems have none", todo=todo))
    if shown and "choices" not in found:
        todo = "write {choices} into the template"
        raise ConfigError(describe(where, "does not show the choices", got=template, todo=todo))


def fill(template: str, question: str, choices: Sequence[str] = (), *, mark: str = ")") -> str:
    """The template with its places filled in, in one pass: a question may hold braces too. Choices stand one
    a line, as "A) text"; mark: what stands behind the letter."""
    lines = "\n".join(f"{letter}{mark} {text}" for letter, text in zip(LETTERS, choices))
    values = {"question": question, "choices": lines}
    return _PLACE.sub(lambda match: values[match[1]], template)


def prompt_ids(
    problems: Sequence[Problem],
    tokenizer: Any,
    *,
    chat_template: str | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    parse_special: bool = False,
) -> tuple[list[list[int]], list[str]]:
    """(token ids of every problem's prompt, up to where the reply begins; what is to be said of them).

    Chats go through the chat template with its generation prompt, exactly as the data path renders what
    comes before a trained reply. Where the tokenizer has none, and for problems with a `text` of their own,
    the text stands alone, behind the BOS that the tokenizer writes. Special tokens inside a text stay text
    unless parse_special. DataError for a chat that a text cannot say, a template that loses a turn, and an
    empty prompt.
    """
    text = find_template(tokenizer, chat_template)
    template = (
        ChatTemplate(text, tokenizer, parse_special=parse_special, template_kwargs=template_kwargs)
        if text
        else None
    )
    chats = [problem for problem in problems if problem.text is None and template is not None]

    def work(problem: Problem) -> list[list[Any]]:
        assert template is not None
        return _rendered(template, list(problem.messages), problem.where)

    answers = bounded_map(work, chats, lambda problem: problem.where, "the chat template")
    pieces: list[list[Piece]] = []
    specials = None if parse_special else special_pattern(tokenizer)
    for problem in problems:
        if problem.text is None and template is not None:
            answer = next(answers)
            if isinstance(answer, DataError):
                raise answer
            pieces.append([Piece(*piece) for piece in answer])
        else:
            pieces.append(_plain(_alone(problem), specials))
    next(answers, None)  # ends the child
    encoder = Encoder(tokenizer)
    ids = [row for row, _ in encoder(pieces)]
    for number, problem in enumerate(problems):
        if not ids[number]:
            raise DataError(describe(problem.where, "is an empty prompt", todo="remove the row"))
        if problem.text is not None or template is None:
            ids[number] = _begun(ids[number], encoder)
    return ids, _notes(problems, pieces, template is None)


def text_ids(texts: Sequence[str], tokenizer: Any, *, parse_special: bool = False) -> list[list[int]]:
    """Token ids of texts without a chat template, behind the BOS that the tokenizer writes. Special tokens
    inside a text stay text unless parse_special."""
    encoder, specials = Encoder(tokenizer), None if parse_special else special_pattern(tokenizer)
    return [_begun(ids, encoder) for ids, _ in encoder([_plain(text, specials) for text in texts])]


def _plain(text: str, specials: re.Pattern[str] | None) -> list[Piece]:
    return [Piece(text, False, raw=specials is not None and specials.search(text) is not None)]


def _begun(ids: list[int], encoder: Encoder) -> list[int]:
    return ids if ids[: len(encoder.head)] == encoder.head else encoder.head + ids


def _rendered(template: ChatTemplate, messages: list[dict[str, Any]], where: str) -> list[list[Any]]:
    """The chat and the generation prompt as [text, trained, raw] of its pieces; as JSON, for the child."""
    hidden, _, marks = template.placeholders.hide(messages, None, where)
    text, _ = template.render(hidden, None, prompt=True)
    check_context(hidden, text, where)
    return [[p.text, p.trained, p.raw] for p in template.placeholders.pieces(text, (), marks, where)]


def _alone(problem: Problem) -> str:
    """What is asked without a chat template."""
    if problem.text is not None:
        return problem.text
    if len(problem.messages) > 1:
        wrong = "is a chat of several turns, and the tokenizer has no chat template"
        todo = "set tokenizer.chat_template, or take an instruction model's tokenizer"
        raise DataError(describe(problem.where, wrong, todo=todo))
    return str(problem.messages[0]["content"])


def _notes(problems: Sequence[Problem], pieces: Sequence[Sequence[Piece]], plain: bool) -> list[str]:
    notes = []
    if plain and any(problem.text is None for problem in problems):
        count = sum(problem.text is None for problem in problems)
        notes.append(f"the tokenizer has no chat template: {count} prompts are asked as plain text")
    if count := sum(any(piece.raw for piece in row) for row in pieces):
        notes.append(f"{count} {NOTE_SPECIAL}")
    return notes
