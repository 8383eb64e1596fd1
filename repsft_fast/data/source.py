"""One place that rows come from: a file, a folder of save_to_disk, or a data set of the hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Source:
    name: str  # as the user wrote it, in errors and in the list of what was read
    kind: str  # jsonl | json | csv | tsv | parquet | arrow file | arrow (a folder of save_to_disk) | hub
    path: Path | None  # None for the hub
    task: str | None  # the key of {task: path}
    held_out: bool = False  # validation and test: a single split is the one, whatever it is called
    notes: tuple[str, ...] = ()  # what was not read beside it, to be said once

    @property
    def merged(self) -> bool:
        """True when rows come through one schema for all, so that a key that a row lacks appears as a
        null."""
        return self.kind not in ("jsonl", "json")
