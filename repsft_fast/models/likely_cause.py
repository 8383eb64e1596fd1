"""Why the weights of a file may not be those of a model, by their names, and what to do about it.

For `completeness`, which finds what names are missing, left over or of another shape: such a list alone says
little to who wrote down a path.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from repsft_fast.models.folder import UNQUANTISED, Stored

RANDOM = "model.init: random trains the architecture from nothing"
_SHOWN = 3
_WRAPPERS = {
    "module.": "DataParallel",
    "_orig_mod.": "torch.compile",
    "_checkpoint_wrapped_module.": "activation checkpointing",
    "_fsdp_wrapped_module.": "FSDP",
    "base_model.model.": "peft",
    "base_layer.": "peft",
}
_QUANTISED = re.compile(
    r"(weight_scale\w*|qweight|qzeros|g_idx|absmax|quant_map|quant_state\S*|SCB|weight_packed|_blocks|_scales)$"
)
_ADAPTERS = re.compile(r"\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector)\b")
_OTHER_HEADS = re.compile(
    r"((\w+\.)?(score|classifier|qa_outputs)|v_head|value_head|reward_head|regression_head)\."
)
_NUMBER = re.compile(r"\.(\d+)\.")
NUMBERED = re.compile(r"^(.*?\.)(\d+)\.")


def likely_cause(model: Any, missing: list[str], unused: list[str], mismatched: bool) -> str:
    """The likely cause, by the kinds of names, and what to do."""
    # From the surest sign to the vaguest: names that only one kind of file has come first.
    if any(_ADAPTERS.search(name) for name in unused):
        return "it holds adapters: set model.path to their base and model.lora.from to their folder"
    if any(_QUANTISED.search(name) for name in unused):
        return f"it is quantised: {UNQUANTISED}"
    for fragment, whose in _WRAPPERS.items():
        if sum(f".{fragment}" in f".{name}" for name in unused) > len(unused) / 2:
            return (
                f"its names carry {fragment} of {whose}: take that out of them (safetensors.torch.load_file,"
                " save_file)"
            )
    if (prefix := _foreign_prefix(set(missing), unused)) is not None:
        return f"its names {prefix}: rename them (safetensors.torch.load_file, save_file)"
    if heads := [name for name in unused if _OTHER_HEADS.match(name)]:
        return (
            f"it holds a model with another head ({first_names(heads)}): give the causal language model that"
            " it was made of"
        )
    if missing == ["lm_head.weight"]:
        return (
            "it has no head of its own: set tie_word_embeddings to true in its config.json if the embeddings"
            " are the head"
        )
    # Whole layers on one side alone: the configuration counts others than the file.
    held = set(model.state_dict())
    if not mismatched and not (missing and unused):
        for names, others, which in (
            (missing, held - set(missing), "more layers than the file"),
            (unused, held, "fewer layers than the file"),
        ):
            if names and (layers := _whole_layers(names, others)):
                return f"the configuration has {which} ({_layers(layers)}): correct its config.json; {RANDOM}"
    return f"is its config.json that of these weights? {RANDOM}"


def uneven_experts(stored: Mapping[str, Stored]) -> str | None:
    """Which of the weights that are there for every expert of every layer are missing, or of another shape
    than the others'."""
    alike: dict[str, dict[tuple[str, ...], str]] = {}
    beside: dict[str, set[tuple[str, ...]]] = {}  # the numbers of all that are kept in the same place
    for name in stored:
        pattern, numbers = _NUMBER.sub(".*.", name), tuple(_NUMBER.findall(name))
        if len(numbers) == 2:
            alike.setdefault(pattern, {})[numbers] = name
            beside.setdefault(pattern.rpartition("*")[0], set()).add(numbers)
    missing, other = [], []
    for pattern, entries in alike.items():
        layers, experts = (
            {numbers[place] for numbers in beside[pattern.rpartition("*")[0]]} for place in (0, 1)
        )
        if len(entries) > len(layers) * len(experts) / 2:  # else the name is misspelt
            wanted = {(layer, expert) for layer in layers for expert in experts} - entries.keys()
            missing += [pattern.replace("*", layer, 1).replace("*", expert, 1) for layer, expert in wanted]
        shapes = Counter(stored[name].shape for name in entries.values())
        usual = shapes.most_common(1)[0][0]
        other += [
            f"{name}: {list(stored[name].shape)}" for name in entries.values() if stored[name].shape != usual
        ]
    if not missing and not other:
        return None
    words = []
    if missing:
        names = first_names(sorted(missing))
        words.append(f"{len(missing)} weights of single experts are missing in it ({names})")
    if other:
        names = first_names(sorted(other))
        words.append(f"{len(other)} are of another shape than those of the other experts ({names})")
    return "; ".join(words)


def _whole_layers(names: Iterable[str], others: Iterable[str]) -> set[int]:
    """The numbers of the layers that `names` belong to, when all of them do and none of the others; else
    empty."""
    numbered = [NUMBERED.match(name) for name in names]
    layers = {(match[1], int(match[2])) for match in numbered if match}
    beside = {(match[1], int(match[2])) for name in others if (match := NUMBERED.match(name))}
    further = (
        all(numbered)
        and not layers & beside
        and {place for place, _ in layers} <= {place for place, _ in beside}
    )
    return {number for _, number in layers} if further else set()


def _foreign_prefix(wanted: set[str], unused: list[str]) -> str | None:
    """How the beginnings of most unused names differ from those of missing ones, where one rule makes one of
    the other."""
    if not unused:
        return None
    parts = sorted(unused)[len(unused) // 2].split(".")
    tried = set()
    for length in range(len(parts), 1, -1):  # the longest end that a missing name has too
        end = ".".join(parts[-length:])
        theirs = ".".join(parts[:-length]) + "." * (length < len(parts))
        for known in sorted(wanted):
            ours = known[: -len(end)]
            if (known == end or known.endswith(f".{end}")) and (ours, theirs) not in tried:
                tried.add((ours, theirs))
                made = {ours + name.removeprefix(theirs) for name in unused if name.startswith(theirs)}
                if len(made & wanted) > len(unused) / 2:
                    if ours and theirs:
                        return f"say {theirs} where the model says {ours}"
                    return f"carry {theirs} in front" if theirs else f"lack {ours} in front"
    return None


def _layers(layers: set[int]) -> str:
    first, last = min(layers), max(layers)
    return f"layer {first}" if first == last else f"layers {first} to {last}"


def first_names(names: list[str], between: str = ", ") -> str:
    """The first few of them, as a message has room for."""
    more = f"{between}…" if len(names) > _SHOWN else ""
    return between.join(names[:_SHOWN]) + more
