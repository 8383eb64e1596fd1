"""Rows of token ids → samples.

input_ids                    one sample, or several packed into one row
labels                       unshifted; -100 is not trained, anything else is the token itself
completion_mask, …           (MASKS) 1 is trained; several masks and labels hold together: trained is what all
                             of them train
attention_mask               0 is padding and goes
seq_lengths, cu_seqlens, position_ids
                             where the samples of a packed row begin; several of them must agree

The first token of a sample has nothing that predicts it, so it matters where samples begin: a packed row read
as one would train every sample's first token on the end of another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from repsft_fast.data.columns import MASKS
from repsft_fast.errors import DataError, describe
from repsft_fast.row import IGNORE_INDEX


@dataclass(frozen=True)
class Pretokenised:
    ids: list[int]
    trained: list[bool]


def read_pretokenised(row: Mapping[str, Any], where: str) -> list[Pretokenised]:
    """The samples of one row. Raises DataError naming row and field."""
    ids = _integers(row["input_ids"], f"{where}, field 'input_ids'")
    if ids and min(ids) < 0:
        number = next(number for number, token in enumerate(ids) if token < 0)
        todo = "tokenise the row again"
        place = f"{where}, field 'input_ids[{number}]'"
        raise DataError(describe(place, "is negative", expected="a token id", got=ids[number], todo=todo))
    # All that speaks of training has to allow a token: a mask beside labels narrows them.
    trained = _labels(row, ids, where)
    for name in MASKS:
        if row.get(name) is not None:
            trained = [a and b for a, b in zip(trained, _mask(row, name, len(ids), where))]
    # What attention_mask hides is padding, which no sample has.
    lengths = _lengths(row, len(ids), where)
    if row.get("attention_mask") is None:
        shown = [True] * len(ids)
    else:
        shown = _mask(row, "attention_mask", len(ids), where)
        if row.get("labels") is not None and any(flag and not seen for flag, seen in zip(trained, shown)):
            place, todo = f"{where}, field 'labels'", "mend one of the two"
            raise DataError(describe(place, "trains positions that attention_mask hides", todo=todo))
    # Borders of packed samples, said in up to three ways, which have to agree.
    positions = _positions(row, ids, shown, where)
    if lengths is None and positions is None:
        return [_sample(ids, trained, shown, range(len(ids)))]
    if lengths is not None and positions is not None and [n for n in lengths if n] != positions:
        place, todo = f"{where}, field 'position_ids'", "keep the one that is right"
        raise DataError(
            describe(place, "begins samples elsewhere than the row's lengths", got=positions, todo=todo)
        )
    if lengths is None:  # position_ids speak of what is shown
        order, lengths = [number for number, seen in enumerate(shown) if seen], positions or []
    else:
        order = list(range(len(ids)))
    borders = [0, *accumulate(lengths)]
    return [_sample(ids, trained, shown, order[start:end]) for start, end in pairwise(borders) if end > start]


def _sample(ids: list[int], trained: list[bool], shown: list[bool], numbers: Any) -> Pretokenised:
    kept = [number for number in numbers if shown[number]]
    return Pretokenised([ids[number] for number in kept], [trained[number] for number in kept])


def _labels(row: Mapping[str, Any], ids: list[int], where: str) -> list[bool]:
    if row.get("labels") is None:
        return [True] * len(ids)
    labels = _integers(row["labels"], f"{where}, field 'labels'")
    _same_length(labels, len(ids), "labels", where)
    for number, (token, label) in enumerate(zip(ids, labels)):
        if label not in (IGNORE_INDEX, token):
            expected = f"{IGNORE_INDEX} or the token {token} itself (labels are not shifted)"
            place, todo = f"{where}, field 'labels[{number}]'", "write the labels again"
            raise DataError(describe(place, "is not a target", expected=expected, got=label, todo=todo))
    return [label != IGNORE_INDEX for label in labels]


def _mask(row: Mapping[str, Any], name: str, length: int, where: str) -> list[bool]:
    """0 and 1, or false and true, one per token."""
    place = f"{where}, field {name!r}"
    values = _list(row[name], place)
    _same_length(values, length, name, where)
    for number, value in enumerate(values):
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            what = "document" if name == "attention_mask" and isinstance(value, int) and value > 1 else None
            todo = "write seq_lengths for packed rows" if what else "round it, or leave the token out"
            raise DataError(
                describe(f"{place}[{number}]", "is no mask", expected="0 or 1", got=repr(value), todo=todo)
            )
    return [bool(value) for value in values]


def _lengths(row: Mapping[str, Any], length: int, where: str) -> list[int] | None:
    """The samples' lengths by seq_lengths or cu_seqlens; None where the row has neither."""
    found: dict[str, list[int]] = {}
    if row.get("seq_lengths") is not None:
        found["seq_lengths"] = _integers(row["seq_lengths"], f"{where}, field 'seq_lengths'")
    if row.get("cu_seqlens") is not None:
        ends = _integers(row["cu_seqlens"], f"{where}, field 'cu_seqlens'")
        found["cu_seqlens"] = [b - a for a, b in pairwise(ends if ends[:1] == [0] else [0, *ends])]
    for name, lengths in found.items():
        if sum(lengths) != length or min(lengths, default=0) < 0:
            todo = "they count every token of input_ids, padding too: mend them"
            place = f"{where}, field {name!r}"
            raise DataError(
                describe(
                    place, "does not divide input_ids", expected=f"a sum of {length}", got=lengths, todo=todo
                )
            )
    if len(found) == 2 and found["seq_lengths"] != found["cu_seqlens"]:
        todo = "keep the one that is right"
        raise DataError(
            describe(f"{where}, fields 'seq_lengths' and 'cu_seqlens'", "do not agree", todo=todo)
        )
    return next(iter(found.values()), None)


def _positions(row: Mapping[str, Any], ids: list[int], shown: list[bool], where: str) -> list[int] | None:
    """The samples' lengths by position_ids, padding left out; None where the row has none."""
    if row.get("position_ids") is None:
        return None
    place = f"{where}, field 'position_ids'"
    values = _integers(row["position_ids"], place)
    _same_length(values, len(ids), "position_ids", where)
    starts: list[int] = []
    expected = 0
    # Padding has positions of its own that mean nothing.
    kept = [(number, value) for number, (value, seen) in enumerate(zip(values, shown)) if seen]
    for order, (number, value) in enumerate(kept):
        if value == 0:
            starts.append(order)
        elif value != expected or order == 0:
            want = "0" if order == 0 else f"0 or {expected}"
            todo = (
                "positions count from 0 within every sample: mend them, or data.ignore_columns:"
                " [position_ids]"
            )
            raise DataError(
                describe(f"{place}[{number}]", "is out of order", expected=want, got=value, todo=todo)
            )
        expected = value + 1
    return [end - start for start, end in pairwise([*starts, len(kept)])]


def _same_length(values: list[Any], length: int, name: str, where: str) -> None:
    if len(values) != length:
        place, todo = f"{where}, field {name!r}", "write it again"
        raise DataError(
            describe(place, "has another length than input_ids", expected=length, got=len(values), todo=todo)
        )


def _list(values: object, where: str) -> list[Any]:
    if hasattr(values, "tolist"):
        values = values.tolist()
    if not isinstance(values, list | tuple):
        got, todo = type(values).__name__, "write it as a list"
        raise DataError(describe(where, "is not a list of integers", got=got, todo=todo))
    return list(values)


def _integers(values: object, where: str) -> list[int]:
    found = _list(values, where)
    if set(map(type, found)) <= {int} and (not found or (min(found) >= -(2**31) and max(found) < 2**31)):
        return found
    for number, value in enumerate(found):
        if isinstance(value, list | tuple):
            todo = "write every sample as a row of its own"
            raise DataError(
                describe(f"{where}[{number}]", "is a list in a list", expected="an integer", todo=todo)
            )
        if type(value) is not int or not -(2**31) <= value < 2**31:
            expected, todo = "a 32-bit integer", "tokenise the row again"
            raise DataError(
                describe(
                    f"{where}[{number}]", "is not a token id", expected=expected, got=repr(value), todo=todo
                )
            )
    return found
