"""Goals and predictions: what a session is read for. Stated beside the part that measures them, read from
records alone.

A prediction is made before measuring, from counted bytes and operations and the ceilings measured in the same
session, or from a table per kind of card. A measurement far from it, in either direction, is to be explained.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

KINDS = ("H100", "H200")  # cards that predictions were made for


@dataclass(frozen=True)
class Card:
    """The card of a session: its kind where we know it, and what it reached today."""

    name: str
    ceilings: Mapping[str, float]  # bytes_per_s, flops_per_s, …; see `facts`

    @property
    def kind(self) -> str | None:
        return next((kind for kind in KINDS if kind in self.name), None)

    def bytes_ms(self, moved: float) -> float | None:
        """Milliseconds to move these bytes (read and written counted both) at today's copy rate."""
        rate = self.ceilings.get("bytes_per_s")
        return None if rate is None else 1e3 * moved / rate

    def flops_ms(self, operations: float, dtype: str | None = None) -> float | None:
        """Milliseconds of matrix products at today's rate; dtype: None = the one that is trained in."""
        rate = self.ceilings.get("flops_per_s" if dtype is None else f"flops_per_s_{dtype}")
        return None if rate is None else 1e3 * operations / rate

    def of_kind(self, **by_kind: float) -> float | None:
        return by_kind.get(self.kind or "")


class Found:
    """Records of a session, asked by operation, implementation, and entries of the shape or of the record
    itself."""

    def __init__(self, records: Sequence[Mapping[str, Any]]):
        self.records = list(records)

    def one(self, op: str, implementation: str, **shape: Any) -> Mapping[str, Any] | None:
        """The newest record of this operation and implementation that has these entries."""
        return self.all(op, **shape).get(implementation)

    def all(self, op: str, **shape: Any) -> dict[str, Mapping[str, Any]]:
        """The newest record of every implementation of an operation that has these entries."""
        found = {}
        for record in self.records:
            entries = {**record, **record["shape"]}
            if record["op"] == op and all(entries.get(name) == value for name, value in shape.items()):
                found[record["implementation"]] = record
        return found

    def p50(self, op: str, implementation: str, **shape: Any) -> float | None:
        record = self.one(op, implementation, **shape)
        return None if record is None else float(record["p50_ms"])

    def ratio(self, op: str, over: str, under: str, **shape: Any) -> float | None:
        """Time of one implementation over another's at the same shape."""
        a, b = self.p50(op, over, **shape), self.p50(op, under, **shape)
        return None if a is None or b is None else a / b

    def value(self, op: str, implementation: str, name: str, **shape: Any) -> float | None:
        """A further field of a record, such as mfu or tokens_per_s."""
        record = self.one(op, implementation, **shape)
        return None if record is None or record.get(name) is None else float(record[name])


Read = Callable[[Found], float | None]
Predict = Callable[[Card], float | None]


@dataclass(frozen=True)
class Goal:
    """One line of the table. most, least: what is aimed at; neither: a figure to be known. strict: met beyond
    them alone, not by them. predicted: in the same unit."""

    name: str
    read: Read  # None = not measured
    most: float | None = None
    least: float | None = None
    strict: bool = False
    predicted: Predict | None = None

    @property
    def aim(self) -> str:
        at_most, at_least = ("<", ">") if self.strict else ("≤", "≥")
        parts = [
            f"{at_most} {self.most:g}" if self.most is not None else "",
            f"{at_least} {self.least:g}" if self.least is not None else "",
        ]
        return " ".join(part for part in parts if part) or "to be known"

    def verdict(self, measured: float | None) -> str:
        if measured is None:
            return "open"
        if self.most is None and self.least is None:
            return "measured"
        within = operator.lt if self.strict else operator.le
        met = (self.most is None or within(measured, self.most)) and (
            self.least is None or within(self.least, measured)
        )
        return "met" if met else "MISSED"


def table(goals: Sequence[tuple[str, Goal]], found: Found, card: Card) -> list[str]:
    """The lines of the summary: (part, goal) in order. Missed and open ones keep their lines."""
    width = max((len(goal.name) for _, goal in goals), default=0)
    lines = [f"  {'':1s} {'goal':{width}s} {'aim':>14s} {'measured':>11s} {'predicted':>11s}  verdict"]
    for part, goal in goals:
        measured = goal.read(found)
        predicted = goal.predicted(card) if goal.predicted is not None else None
        lines.append(
            f"  {part:1s} {goal.name:{width}s} {goal.aim:>14s} {_number(measured):>11s}"
            f" {_number(predicted):>11s}  {goal.verdict(measured)}"
        )
    return lines


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
