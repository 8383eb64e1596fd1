"""How sources become samples: the settings of `load`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from repsft_fast.data.formats import FORMATS, check_kwargs
from repsft_fast.errors import DataError, describe


@dataclass(frozen=True)
class DataSettings:
    """How sources become samples. `samples`, `seed` and `cache_folder` do not change what is tokenised."""

    format: str = "auto"  # auto = by the keys of each source's first row; else a key of formats.FORMATS
    split: str = "train"  # which split of a hub data set or of a saved DatasetDict
    train_on: str = "all"  # all | last: which assistant turns are trained
    chat_template: str | None = None  # template text or file in place of the tokenizer's own
    # auto: turns, alpaca, query/response | always: + prompt/completion | never: turns only
    apply_template: str = "auto"
    # text: special-token strings in the data stay text | parse: they become the tokens
    special_tokens: str = "text"
    # variables of the chat template; a row's own go over them
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    # raise: all rows are looked at, then one error | drop: bad rows are dropped, counted and named
    on_bad_row: str = "raise"
    # columns (or "messages[].field") that are not used though they look like instructions
    ignore_columns: tuple[str, ...] = ()
    task_column: str | None = None  # column with the row's task; else {task: path} or "default"
    weight_column: str | None = None  # column with the row's weight, ≥ 0
    max_tokens: int | None = None  # longest sample, in positions
    overlong: str = "drop"  # drop | truncate | raise
    samples: int | None = None  # nested subset: the first n of a seeded permutation of what was loaded
    seed: int = 42
    cache_folder: str | Path | None = None  # None = no cache

    def __post_init__(self) -> None:
        choices = {
            "format": ("auto", *FORMATS),
            "train_on": ("all", "last"),
            "apply_template": ("auto", "always", "never"),
            "special_tokens": ("text", "parse"),
            "overlong": ("drop", "truncate", "raise"),
            "on_bad_row": ("raise", "drop"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                got = getattr(self, name)
                raise DataError(
                    describe(f"data.{name}", "is not a choice", expected=" | ".join(allowed), got=got)
                )
        for name in ("max_tokens", "samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise DataError(describe(f"data.{name}", "is too small", expected="at least 1", got=value))
        check_kwargs(self.template_kwargs, "tokenizer.template_kwargs")
        for name in ("task_column", "weight_column"):
            if getattr(self, name) is not None and getattr(self, name) in self.ignore_columns:
                raise DataError(
                    describe(
                        "data.ignore_columns", f"names data.{name} too", todo="drop it from one of the two"
                    )
                )
