"""What the roles, fields and parts of a turn are called, and what to do about a field that nothing reads.

The patterns are wide: a field that looks as if it said something about the text or its training is refused,
unless it says nothing or the user lets it be passed over.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from repsft_fast.data.tool_calls import is_empty, shown, text_of
from repsft_fast.errors import DataError, describe

# the assistant's turns whose content is calls
CALL_ROLES = ("function_call", "function_calls", "tool_call", "tool_calls")
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot", "chatbot", "ai"), "assistant"),
    **dict.fromkeys(CALL_ROLES, "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython"), "tool"),
    **dict.fromkeys(("tool_response", "tool_result", "tool_results", "tool_output", "tool_outputs"), "tool"),
    **dict.fromkeys(("function_response", "function_result", "function_output"), "tool"),
}
ROLE_KEYS = ("role", "from")
CONTENT_KEYS = ("content", "value")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking", "thought", "thoughts", "reasoning_text")
# Mark → what 1 (or true) means: is the turn trained?
MARKS = {
    **dict.fromkeys(("weight", "loss_weight", "loss_mask", "loss", "learn"), True),
    **dict.fromkeys(("train", "training", "trainable", "trained", "train_on"), True),
    "masked": False,
}
UNCLEAR_MARKS = ("mask", "ignore")  # trainers use each for both meanings
TEXT_PARTS = ("text", "input_text", "output_text")
THINKING_PARTS = ("thinking", "reasoning")
# Names of unused fields that may say what is trained, or how the turn is to be rendered; and names that may
# hold its text.
STEERING = re.compile(
    "weight|train|loss|learn|mask|label|target|ignore|supervis|kwargs|enable|eos|end_of|think|thought|reason|rationale"
    "|skip|exclude|include|discard|backprop|gradient|scratchpad|^cot$|_cot$|^cot_",
    re.IGNORECASE,
)
DENYING = re.compile("(is_)?(end_?turn|eot|sft|keep|use|used|selected)", re.IGNORECASE)  # … where they say no
HOLDING = re.compile(
    "tool|function|call|param|argument|image|audio|video|file|document|context|attach|channel|recipient|prefix|suffix|partial"
    "|continue|text|value|content|message|prompt|instruct|query|input|output|result|response|answer|completion|solution|refus"
    "|role|system|prefill|frozen|observation|^(parts|code|body)$",
    re.IGNORECASE,
)
# … unless they only count or point, or tell how a generation ended.
POINTING = re.compile(
    r"_(ids?|index|time|date|at|hash|counts?|tokens|length|lang|language|score)$", re.IGNORECASE
)
SILENT = frozenset(("finish_reason", "stop_reason"))
CALLING = frozenset(("tool_calls", "function_call"))
THINKING = frozenset(REASONING_KEYS)
MARKING = frozenset((*MARKS, *UNCLEAR_MARKS))
KNOWN = CALLING | THINKING | MARKING | {"tool_call_id", "name"}


@dataclass(frozen=True)
class Names:
    """What the row's turns may call things, the usual name first, and which of their fields are let be."""

    field: str
    role: tuple[str, ...]
    content: tuple[str, ...]
    ignored: frozenset[str]


def agreed(values: Mapping[str, Any], place: str) -> Any:
    """The one value that several names of one field have; None where there is none."""
    found = list(values.values())
    if len(found) > 1 and any(value != found[0] for value in found):
        todo = "keep the one that is meant"
        raise DataError(describe(f"{place}'", f"says two things in {' and '.join(values)}", todo=todo))
    return found[0] if found else None


def refuse_role(where: str, wrong: str, role: str) -> NoReturn:
    todo = "remove it, or correct the role"
    raise DataError(
        describe(where, f"{wrong}, but the turn's role is {role}", expected="assistant", todo=todo)
    )


def note_unused(
    key: object, value: object, path: str, place: str, names: Names, unknown: dict[str, None]
) -> None:
    """Notes a field that nothing reads, or refuses it where its name says that something should."""
    key = text_of(key, f"{place}'")
    name = f"{path}{key}"
    if name in names.ignored:
        return
    # end_turn: true says nothing; end_turn: false says that the turn goes on, so is no whole one.
    denies = isinstance(value, bool | int) and value in (False, 0) and DENYING.fullmatch(key)
    steers = denies or (STEERING.search(key) and key not in SILENT)
    holds = HOLDING.search(key) and not POINTING.search(key) and value is not False
    if (steers or holds) and not is_empty(value):
        wrong = "may say what the text is or what is trained, and is not a field we read"
        todo = f'rename it, remove it, or pass it over by data.ignore_columns: ["{names.field}[].{name}"]'
        raise DataError(describe(f"{place}.{key}'", wrong, got=shown(value), todo=todo))
    unknown[name] = None
