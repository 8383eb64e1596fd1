"""The sample: token ids and which of them are trained. Everything that is read becomes this one type."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Sample:
    """One training example, cut after its last trained token (what follows cannot matter: attention is
    causal)."""

    ids: list[int]  # token ids
    trained: list[bool]  # same length; trained[0] is always False, nothing predicts the first token
    task: str = "default"
    weight: float = 1.0
    source: str = ""  # "file.jsonl:17", for errors

    @property
    def positions(self) -> int:
        """Length in positions: inputs are ids[:-1], targets ids[1:] where trained, else IGNORE_INDEX."""
        return len(self.ids) - 1

    @property
    def num_trained(self) -> int:
        return sum(self.trained)


@dataclass
class Loaded:
    """What loading gives: the samples, and an account of everything that is not among them."""

    samples: list[Sample]
    dropped: dict[str, int] = field(default_factory=Counter)  # reason → rows
    warnings: list[str] = field(default_factory=list)
    # column → rows that had it (null is absent)
    columns_used: dict[str, int] = field(default_factory=Counter)
    columns_unused: dict[str, int] = field(default_factory=Counter)  # the same of columns that decide nothing
    files: dict[str, int] = field(default_factory=dict)  # what was read, in order → its rows
