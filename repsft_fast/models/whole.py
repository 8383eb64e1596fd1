"""A model is loaded whole or refused: its weights are in the file, of their shapes and in numbers; nothing is left there.

What the file's names become in a model is transformers' business (renamed, merged, split, by architecture and version), so it
is asked for it: given tensors without data, of the shapes in the files' headers, its loader reports the same as it would of the
weights, before one is read.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from repsft_fast.errors import ModelError, describe
from repsft_fast.models.door import first_words, library
from repsft_fast.models.folder import UNQUANTISED, Stored

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_FLOATING = ("F64", "F32", "F16", "BF16")
_RANDOM = "model.init: random trains the architecture from nothing"
_SHOWN = 3
_ROWS = 4096  # of a tied matrix compared at once
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
# Positions and masks that files of older versions hold and models compute anew.
_TABLES = re.compile(
    r"((^|[._])inv_freq|masked_bias|(^|\.)(attn|attention|self_attn|self_attention)\.(bias|causal_mask)|position_ids"
    r"|(cos|sin)_cached|(^|\.)version)$"
)
_MULTI_TOKEN = re.compile(r"(^|\.)(mtp|mtp_\w+|nextn\w*)\.")
_OTHER_HEADS = re.compile(r"((\w+\.)?(score|classifier|qa_outputs)|v_head|value_head|reward_head|regression_head)\.")
_NUMBER = re.compile(r"\.(\d+)\.")
_NUMBERED = re.compile(r"^(.*?\.)(\d+)\.")


def check_header(model: Any, stored: Mapping[str, Stored], where: str, got: str, options: Mapping[str, Any]) -> list[str]:
    """`check_whole` by the headers alone. model: on meta, as its configuration makes it; options: those of from_pretrained.

    Weights in integers or eight-bit floats are refused too: transformers would cast them as if they were numbers of the model.
    Returns what is to be said.
    """
    _check_once(model, stored, where, got)
    _check_dtypes(model, stored, where, got)
    empty = {
        name: torch.empty(entry.shape, dtype=_DTYPES.get(entry.dtype, torch.uint8), device="meta")
        for name, entry in stored.items()
    }

    def instead(error: BaseException) -> ModelError:
        wrong = _uneven(stored) if "conversion" in str(error) else None
        todo = f"fetch them again; {_RANDOM}" if wrong else "give the folder of a model that transformers loads"
        return ModelError(describe(where, wrong or first_words(error), got=got, todo=todo))

    with library(where, got, instead=instead):
        _, info = type(model).from_pretrained(
            None,
            config=model.config,
            state_dict=empty,
            device_map={"": "meta"},
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        )
    said = check_whole(model, info, where, got)
    _check_ties(model, stored, where, got)
    return [*said, *_left_out(model, _ignored(model, stored), where, got)]


def check_whole(model: Any, info: Mapping[str, Any], where: str, got: str) -> list[str]:
    """ModelError unless `info`, of from_pretrained(output_loading_info=True), says that all was loaded and all was used.

    Excepted: weights tied to another, what the class itself expects to be missing or unused (tables of positions among it), and
    a head that predicts several tokens, which is returned as words to be said.
    """
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    buffers = {name for name, value in model.named_buffers() if not value.is_floating_point()}  # positions, masks
    missing = sorted(set(info["missing_keys"]) - tied - buffers)
    unexpected = sorted(info["unexpected_keys"])
    unexpected = [name for name in unexpected if not _TABLES.search(name)]
    unused = [name for name in unexpected if not _of_multi_token_head(name, model.config)]
    mismatched = sorted((name, tuple(file), tuple(held)) for name, file, held in info["mismatched_keys"])
    if not (missing or unused or mismatched):
        return _left_out(model, unexpected, where, got)
    total = sum(1 for _ in model.parameters())
    wrong = []
    if missing:
        wrong.append(f"{len(missing)} of the model's {total} weights are missing in it ({_first(missing)})")
    if unused:
        wrong.append(f"{len(unused)} weights of it are not the model's ({_first(unused)})")
    if mismatched:
        shapes = [f"{name}: {list(file)} in the file, {list(held)} by the configuration" for name, file, held in mismatched]
        wrong.append(f"{len(mismatched)} weights have another shape ({_first(shapes, '; ')})")
    raise ModelError(describe(where, "; ".join(wrong), got=got, todo=_way_out(model, missing, unused, bool(mismatched))))


def count_non_finite(model: nn.Module) -> dict[str, int]:
    """{parameter: how many of its numbers are NaN or infinite}, where there are any. On meta there are none."""
    found = {}
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        if value.is_meta or not value.is_floating_point() or value.numel() == 0:
            continue
        low, high = torch.aminmax(value)  # NaN if there is one; needs no memory, which isfinite does
        if not (low.isfinite() and high.isfinite()):
            found[name] = int((~value.isfinite()).sum())
    return found


def check_finite(model: nn.Module, where: str, got: str) -> list[str]:
    """ModelError when weights are not finite, in the type they are held in. Returns what is to be said of those that are zero.

    A download that reserves its room first leaves zeros where it was cut; some models begin added layers with zeros on purpose.
    """
    if found := count_non_finite(model):
        dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        named = _first([f"{name}: {count}" for name, count in found.items()])
        wrong = f"{sum(found.values())} numbers in {len(found)} of its weights are not finite, held in {dtype} ({named})"
        todo = "fetch it again, or take a checkpoint from before they were lost; model.init: random uses the architecture alone"
        raise ModelError(describe(where, wrong, got=got, todo=todo))
    held = [(name, p.detach()) for name, p in model.named_parameters() if p.ndim > 1 and p.numel() and not p.is_meta]
    matrices = [(name, value) for name, value in held if not name.endswith("bias")]  # experts have theirs in one matrix
    zero = [name for name, value in matrices if not value[(0,) * value.ndim] and not value.any()]
    if not zero:
        return []
    return [f"{where}: {len(zero)} of its {len(matrices)} matrices are zero throughout ({_first(zero)}), got {got}"]


def _ignored(model: Any, stored: Mapping[str, Stored]) -> list[str]:
    """What the class itself leaves out of a file in silence, tables that it computes anew excepted."""
    patterns = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    held = set(model.state_dict())
    return [
        name
        for name, entry in sorted(stored.items())
        if entry.dtype in _FLOATING and not _TABLES.search(name) and any(pattern.search(name) for pattern in patterns)
        if not _names_in(model, name) & held
    ]


def _left_out(model: Any, names: Iterable[str], where: str, got: str) -> list[str]:
    """The words for weights of the file that are no part of the model."""
    names = list(names)
    several = [name for name in names if _of_multi_token_head(name, model.config)]
    rest = [name for name in names if name not in several]
    words = []
    if several:
        words.append(f"{len(several)} weights whose head that predicts several tokens is")
    if rest:
        words.append(f"{len(rest)} weights ({_first(rest)}) that transformers leaves out of {type(model).__name__}: they are")
    return [f"{where}: {got} holds {text} not loaded, not trained and not saved" for text in words]


def _check_once(model: Any, stored: Mapping[str, Stored], where: str, got: str) -> None:
    """transformers puts the backbone's prefix in front of a name or takes it away: of two such names it would keep one."""
    prefix, seen = f"{model.base_model_prefix}.", dict[str, str]()
    for name in sorted(stored):
        plain = name
        while plain.startswith(prefix):
            plain = plain.removeprefix(prefix)
        if plain in seen:
            wrong = f"{seen[plain]} and {name} are the same weight of the model"
            raise ModelError(describe(where, wrong, got=got, todo="take one of them out of the file"))
        seen[plain] = name


def _check_dtypes(model: Any, stored: Mapping[str, Stored], where: str, got: str) -> None:
    integers = {
        tuple(value.shape) for value in model.state_dict().values() if not value.is_floating_point()
    }  # tables, names vary
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    wrong = [
        f"{name}: {entry.dtype}"
        for name, entry in sorted(stored.items())
        if entry.dtype not in _FLOATING and entry.shape not in integers
        if not any(pattern.search(name) for pattern in (_TABLES, *ignored))
    ]
    if wrong:
        text = f"{len(wrong)} of its {len(stored)} weights are no floating-point numbers of 16 bits or more ({_first(wrong)})"
        raise ModelError(describe(where, f"{text}: it is quantised, or no model", got=got, todo=UNQUANTISED))


def _check_ties(model: Any, stored: Mapping[str, Stored], where: str, got: str) -> None:
    """A file that holds a tied weight twice must hold the same twice: else transformers unties the two, against the config."""
    held = model.state_dict()
    by_name = {known: name for name in stored for known in _names_in(model, name)}
    for name in held.keys() - by_name.keys():  # renamed as it is read: the one of that last name and shape
        end, shape = ".".join(name.split(".")[-2:]), tuple(held[name].shape)
        alike = [n for n, entry in stored.items() if f".{n}".endswith(f".{end}") and entry.shape == shape]
        if len(alike) == 1:
            by_name[name] = alike[0]
    for one, other in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if one in by_name and other in by_name and not _equal(stored, by_name[one], by_name[other]):
            wrong = f"its configuration ties {one} to {other}, and the file holds two different ones"
            todo = "set tie_word_embeddings to false in its config.json if both are meant, or take one out of the file"
            raise ModelError(describe(where, wrong, got=got, todo=todo))


def _equal(stored: Mapping[str, Stored], one: str, other: str) -> bool:
    first, second = stored[one], stored[other]
    if first.shape != second.shape:
        return False
    with safe_open(first.file, "pt") as file, safe_open(second.file, "pt") as another:
        a, b = file.get_slice(one), another.get_slice(other)
        if not first.shape:
            return torch.equal(file.get_tensor(one), another.get_tensor(other))
        rows = (slice(start, start + _ROWS) for start in range(0, first.shape[0], _ROWS))
        return all(torch.equal(a[part].float(), b[part].float()) for part in rows)


def _names_in(model: Any, name: str) -> set[str]:
    """What a file's name may be in the model: with and without the backbone's prefix."""
    prefix = f"{model.base_model_prefix}."
    return {name, prefix + name, name.removeprefix(prefix)}


def _of_multi_token_head(name: str, config: Any) -> bool:
    """By its name, or a layer after the last of as many as the configuration says predict further tokens."""
    if _MULTI_TOKEN.search(name):
        return True
    text = config.get_text_config()
    layers, further = getattr(text, "num_hidden_layers", 0), getattr(text, "num_nextn_predict_layers", 0)
    numbered = _NUMBERED.match(name)
    if numbered is None or not isinstance(further, int) or not isinstance(layers, int):
        return False
    return layers <= int(numbered[2]) < layers + further


def _way_out(model: Any, missing: list[str], unused: list[str], mismatched: bool) -> str:
    """The likely cause, by the kinds of names, and what to do."""
    if any(_ADAPTERS.search(name) for name in unused):
        return "it holds adapters: set model.path to their base and model.lora.from to their folder"
    if any(_QUANTISED.search(name) for name in unused):
        return f"it is quantised: {UNQUANTISED}"
    for fragment, whose in _WRAPPERS.items():
        if sum(f".{fragment}" in f".{name}" for name in unused) > len(unused) / 2:
            return f"its names carry {fragment} of {whose}: take that out of them (safetensors.torch.load_file, save_file)"
    if (prefix := _foreign_prefix(set(missing), unused)) is not None:
        return f"its names {prefix}: rename them (safetensors.torch.load_file, save_file)"
    if heads := [name for name in unused if _OTHER_HEADS.match(name)]:
        return f"it holds a model with another head ({_first(heads)}): give the causal language model that it was made of"
    if missing == ["lm_head.weight"]:
        return "it has no head of its own: set tie_word_embeddings to true in its config.json if the embeddings are the head"
    held = set(model.state_dict())
    if not mismatched and not (missing and unused):
        for names, others, which in (
            (missing, held - set(missing), "more layers than the file"),
            (unused, held, "fewer layers than the file"),
        ):
            if names and (layers := _whole_layers(names, others)):
                return f"the configuration has {which} ({_layers(layers)}): correct its config.json; {_RANDOM}"
    return f"is its config.json that of these weights? {_RANDOM}"


def _uneven(stored: Mapping[str, Stored]) -> str | None:
    """Which of the weights that are there for every expert of every layer are missing, or of another shape than the others'."""
    alike: dict[str, dict[tuple[str, ...], str]] = {}
    beside: dict[str, set[tuple[str, ...]]] = {}  # the numbers of all that are kept in the same place
    for name in stored:
        pattern, numbers = _NUMBER.sub(".*.", name), tuple(_NUMBER.findall(name))
        if len(numbers) == 2:
            alike.setdefault(pattern, {})[numbers] = name
            beside.setdefault(pattern.rpartition("*")[0], set()).add(numbers)
    missing, other = [], []
    for pattern, names in alike.items():
        layers, experts = ({numbers[place] for numbers in beside[pattern.rpartition("*")[0]]} for place in (0, 1))
        if len(names) > len(layers) * len(experts) / 2:  # else the name is misspelt
            wanted = {(layer, expert) for layer in layers for expert in experts} - names.keys()
            missing += [pattern.replace("*", layer, 1).replace("*", expert, 1) for layer, expert in wanted]
        shapes = Counter(stored[name].shape for name in names.values())
        usual = shapes.most_common(1)[0][0]
        other += [f"{name}: {list(stored[name].shape)}" for name in names.values() if stored[name].shape != usual]
    if not missing and not other:
        return None
    words = [f"{len(missing)} weights of single experts are missing in it ({_first(sorted(missing))})"] if missing else []
    words += [f"{len(other)} are of another shape than those of the other experts ({_first(sorted(other))})"] if other else []
    return "; ".join(words)


def _whole_layers(names: Iterable[str], others: Iterable[str]) -> set[int]:
    """The numbers of the layers that `names` belong to, when all of them do and none of the others; else empty."""
    numbered = [_NUMBERED.match(name) for name in names]
    layers = {(match[1], int(match[2])) for match in numbered if match}
    beside = {(match[1], int(match[2])) for name in others if (match := _NUMBERED.match(name))}
    further = all(numbered) and not layers & beside and {place for place, _ in layers} <= {place for place, _ in beside}
    return {number for _, number in layers} if further else set()


def _foreign_prefix(wanted: set[str], unused: list[str]) -> str | None:
    """How the beginnings of most unused names differ from those of missing ones, where one rule makes one of the other."""
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


def _first(names: list[str], between: str = ", ") -> str:
    more = f"{between}…" if len(names) > _SHOWN else ""
    return between.join(names[:_SHOWN]) + more
