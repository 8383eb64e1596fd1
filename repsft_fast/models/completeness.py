"""A model is loaded whole or refused: its weights are in the file, of their shapes and in numbers; nothing is
left there.

What the file's names become in a model is transformers' business (renamed, merged, split, by architecture and
version), so it is asked for it: given tensors without data, of the shapes in the files' headers, its loader
reports the same as it would of the weights, before one is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from repsft_fast.errors import ModelError, describe
from repsft_fast.models.folder import UNQUANTISED, Stored
from repsft_fast.models.guards import first_words, library
from repsft_fast.models.likely_cause import NUMBERED, RANDOM, first_names, likely_cause, uneven_experts

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
_FLOATING = ("F64", "F32", "F16", "BF16")
_ROWS = 4096  # of a tied matrix compared at once
# Positions and masks that files of older versions hold and models compute anew.
_TABLES = re.compile(
    r"((^|[._])inv_freq|masked_bias|(^|\.)(attn|attention|self_attn|self_attention)\.(bias|causal_mask)|position_ids"
    r"|(cos|sin)_cached|(^|\.)version)$"
)
_MULTI_TOKEN = re.compile(r"(^|\.)(mtp|mtp_\w+|nextn\w*)\.")


def check_header(
    model: Any, stored: Mapping[str, Stored], where: str, got: str, options: Mapping[str, Any]
) -> list[str]:
    """`check_whole` by the headers alone. model: on meta, as its configuration makes it; options: those of
    from_pretrained.

    Weights in integers or eight-bit floats are refused too: transformers would cast them as if they were
    numbers of the model. Returns what is to be said.
    """
    _check_once(model, stored, where, got)
    _check_dtypes(model, stored, where, got)
    empty = {
        name: torch.empty(entry.shape, dtype=_DTYPES.get(entry.dtype, torch.uint8), device="meta")
        for name, entry in stored.items()
    }

    def instead(error: BaseException) -> ModelError:
        wrong = uneven_experts(stored) if "conversion" in str(error) else None
        todo = (
            f"fetch them again; {RANDOM}" if wrong else "give the folder of a model that transformers loads"
        )
        return ModelError(describe(where, wrong or first_words(error), got=got, todo=todo))

    # No weight is read: what transformers would make of these names and shapes is all that is asked.
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
    """ModelError unless `info`, of from_pretrained(output_loading_info=True), says that all was loaded and
    all was used.

    Excepted: weights tied to another, what the class itself expects to be missing or unused (tables of
    positions among it), and a head that predicts several tokens, which is returned as words to be said.
    """
    # Tied weights stand in the file once, and what is no number of the model is computed anew.
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    buffers = {name for name, value in model.named_buffers() if not value.is_floating_point()}
    missing = sorted(set(info["missing_keys"]) - tied - buffers)
    unexpected = sorted(info["unexpected_keys"])
    unexpected = [name for name in unexpected if not _TABLES.search(name)]
    unused = [name for name in unexpected if not _of_multi_token_head(name, model.config)]
    mismatched = sorted((name, tuple(file), tuple(held)) for name, file, held in info["mismatched_keys"])
    if not (missing or unused or mismatched):
        return _left_out(model, unexpected, where, got)
    # All that is wrong in one message, with the cause that the kinds of names point to.
    total = sum(1 for _ in model.parameters())
    wrong = []
    if missing:
        wrong.append(
            f"{len(missing)} of the model's {total} weights are missing in it ({first_names(missing)})"
        )
    if unused:
        wrong.append(f"{len(unused)} weights of it are not the model's ({first_names(unused)})")
    if mismatched:
        shapes = [
            f"{name}: {list(file)} in the file, {list(held)} by the configuration"
            for name, file, held in mismatched
        ]
        wrong.append(f"{len(mismatched)} weights have another shape ({first_names(shapes, '; ')})")
    raise ModelError(
        describe(
            where, "; ".join(wrong), got=got, todo=likely_cause(model, missing, unused, bool(mismatched))
        )
    )


def count_non_finite(model: nn.Module) -> dict[str, int]:
    """{parameter: how many of its numbers are NaN or infinite}, where there are any. On meta there are
    none."""
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
    """ModelError when weights are not finite, in the type they are held in. Returns what is to be said of
    those that are zero.

    A download that reserves its room first leaves zeros where it was cut; some models begin added layers with
    zeros on purpose.
    """
    if found := count_non_finite(model):
        dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        named = first_names([f"{name}: {count}" for name, count in found.items()])
        wrong = (
            f"{sum(found.values())} numbers in {len(found)} of its weights are not finite, held in {dtype}"
            f" ({named})"
        )
        todo = (
            "fetch it again, or take a checkpoint from before they were lost; model.init: random uses the"
            " architecture alone"
        )
        raise ModelError(describe(where, wrong, got=got, todo=todo))
    # A matrix of zeros is most likely a hole; the first number tells nearly all others at no cost.
    held = [
        (name, p.detach())
        for name, p in model.named_parameters()
        if p.ndim > 1 and p.numel() and not p.is_meta
    ]
    # experts have theirs in one matrix
    matrices = [(name, value) for name, value in held if not name.endswith("bias")]
    zero = [name for name, value in matrices if not value[(0,) * value.ndim] and not value.any()]
    if not zero:
        return []
    return [
        f"{where}: {len(zero)} of its {len(matrices)} matrices are zero throughout ({first_names(zero)}), got"
        f" {got}"
    ]


def _ignored(model: Any, stored: Mapping[str, Stored]) -> list[str]:
    """What the class itself leaves out of a file in silence, tables that it computes anew excepted."""
    patterns = [
        re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    ]
    held = set(model.state_dict())
    return [
        name
        for name, entry in sorted(stored.items())
        if entry.dtype in _FLOATING
        and not _TABLES.search(name)
        and any(pattern.search(name) for pattern in patterns)
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
        kind = type(model).__name__
        words.append(
            f"{len(rest)} weights ({first_names(rest)}) that transformers leaves out of {kind}: they are"
        )
    return [f"{where}: {got} holds {text} not loaded, not trained and not saved" for text in words]


def _check_once(model: Any, stored: Mapping[str, Stored], where: str, got: str) -> None:
    """transformers puts the backbone's prefix in front of a name or takes it away: of two such names it would
    keep one."""
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
    # Tables of integers are known by their shapes: their names vary.
    integers = {tuple(value.shape) for value in model.state_dict().values() if not value.is_floating_point()}
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    wrong = [
        f"{name}: {entry.dtype}"
        for name, entry in sorted(stored.items())
        if entry.dtype not in _FLOATING and entry.shape not in integers
        if not any(pattern.search(name) for pattern in (_TABLES, *ignored))
    ]
    if wrong:
        text = (
            f"{len(wrong)} of its {len(stored)} weights are no floating-point numbers of 16 bits or more"
            f" ({first_names(wrong)})"
        )
        raise ModelError(describe(where, f"{text}: it is quantised, or no model", got=got, todo=UNQUANTISED))


def _check_ties(model: Any, stored: Mapping[str, Stored], where: str, got: str) -> None:
    """A file that holds a tied weight twice must hold the same twice: else transformers unties the two,
    against the config."""
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
            todo = (
                "set tie_word_embeddings to false in its config.json if both are meant, or take one out of"
                " the file"
            )
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
    numbered = NUMBERED.match(name)
    if numbered is None or not isinstance(further, int) or not isinstance(layers, int):
        return False
    return layers <= int(numbered[2]) < layers + further
