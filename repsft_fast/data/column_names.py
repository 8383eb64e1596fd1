"""What the name of a column promises: that it steers training, is a template's variable, denies the row, or
holds text.

Sets of rows name such columns in many ways, and a column that is passed over in silence would train something
else than the row says: the patterns are wide, and `columns` lets pass what turns out to say nothing.
"""

from __future__ import annotations

import re

# Words of a name that says what is trained or how.
_STEERING = re.compile(
    r"\w*weights?|\w*weighting|train|training|trained|trainable|loss(es)?|loss\w*mask|\w*mask(s|ed)?|\w*labels?|\w*kwargs"
    r"|seq_?lens?|seqlens?|ignore"
)
_STEERING_NAMES = re.compile(
    r"(seq|sequence)_?(lengths?|lens?|idx|ids?)|cu_?seqlens?\w*|position_?ids?|pos_?ids?|(segment|document|doc)_ids"
    r"|chat_?template|add_(eos|bos)(_token)?|add_generation_prompt|continue_final_message|last_turn_only|target_turns?|kto_tag|(is_)?(un)?(desirable|preferred)"
)
# Variables of chat templates.
_VARIABLES = re.compile(
    r"reasoning_effort|model_identity|thinking_(mode|effort|budget|enabled)"
    r"|(enable|disable|keep|preserve|force|use|no)_(\w+_)?thinking"
)
# These may say yes or no to the row as a whole.
_LEAVING_OUT = re.compile(r"(is_|to_)?(exclude|skip|discard|drop|delete|remove|reject)(e?d|ped)?")
_KEEPING = re.compile(r"(is_|to_)?(keep|include|included|use|used|valid|sft)")
# Beside token ids these say where the prompt ends.
_PART = (
    r"(prompt|source|src|input|context|question|target|tgt|response|completion|answer|assistant|label|loss)s?"
)
_BORDER = re.compile(
    rf"((n|num)_)?{_PART}"
    r"(_?(lens?|lengths?|starts?|ends?|offsets?|pos|positions?|begin|idx|index|spans?|tokens?|token_ids|ids|count|size))+"
    rf"|(n|num|len)_{_PART}"
)
# … and these how many of them there are.
_COUNT = re.compile(
    r"((n|num|input|total|token|seq|sequence)_)?(len|length|tokens|input_len|input_length|input_tokens)"
)
# Words of a name that holds a part of the text, unless it only counts or points.
_HOLDING = re.compile(
    r"history|histories|systems?|sys|tools?|functions?|images?|audios?|videos?|prefix|prefill|suffix"
)
_HOLDING_NAMES = re.compile(
    r"reasoning(_content|_text)?|thinking|thoughts?|rationale|developer(_prompt|_message)?|pixel_values|documents"
)
_POINTING = re.compile(
    r"^(has|is|num|n)_|_(id|ids|index|idx|time|date|at|hash|counts?|tokens|lengths?|len|lang|language|score|source|type|name)$"
)
HARMLESS = frozenset(("parallel_tool_calls", "tool_choice", "special_tokens_mask", "token_type_ids"))


def kind_of(name: str, form: str = "") -> str | None:
    """steering | variable | denying | holding | None: what the name of a column promises."""
    if name in HARMLESS:
        return None
    lower = _spelled(name)
    words = lower.split("_")
    if form == "input_ids" and _BORDER.fullmatch(lower):
        return "steering"
    if _STEERING_NAMES.fullmatch(lower) or any(_STEERING.fullmatch(word) for word in words):
        return "steering"
    if _VARIABLES.fullmatch(lower):
        return "variable"
    if _LEAVING_OUT.fullmatch(lower) or _KEEPING.fullmatch(lower):
        return "denying"
    if _HOLDING_NAMES.fullmatch(lower):
        return "holding"
    holds = any(_HOLDING.fullmatch(word) for word in words)
    return "holding" if holds and not _POINTING.search(lower) else None


def _spelled(name: str) -> str:
    """sampleWeight, Sample-Weight → sample_weight"""
    return re.sub(r"[^a-z0-9]+", "_", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()).strip("_")


def denies(name: str, value: object) -> bool:
    """Whether a column that `kind_of` calls denying says no: exclude: true (or 1), keep: false (or 0)."""
    leaves_out = _LEAVING_OUT.fullmatch(_spelled(name)) is not None
    return isinstance(value, bool | int) and value == int(leaves_out)


def is_count(name: str, value: object, ids: object) -> bool:
    """Whether a column of this name and value counts tokens; with ids, whether it counts these ids."""
    counts = (
        isinstance(value, int)
        and not isinstance(value, bool)
        and _COUNT.fullmatch(_spelled(name)) is not None
    )
    return counts and (ids is None or (hasattr(ids, "__len__") and len(ids) == value))
