"""Which split a name speaks of, as the hub reads names, and which of the splits there are is asked for."""

from __future__ import annotations

import re
from collections.abc import Sequence

from repsft_fast.errors import DataError, describe

WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": (
        "test",
        "testing",
        "eval",
        "evaluation",
        "heldout",
        "held-out",
        "held_out",
        "holdout",
        "hold-out",
        "hold_out",
    ),
}
SPLIT_OF = {word: split for split, words in WORDS.items() for word in words}
# A word between anything but letters, as the hub has it, and glued to what says no more (testset, trainData).
_AFFIX = r"(?:sets?|data|datasets?|files?|splits?|rows|samples|examples)?"
SPLIT_WORD = re.compile(
    rf"(?<![^\W\d_])({'|'.join(sorted(SPLIT_OF, key=len, reverse=True))}){_AFFIX}(?![^\W\d_])", re.IGNORECASE
)


def split_called(text: str) -> str | None:
    """The one split (train, validation, test) that a name speaks of; None when none or several."""
    splits = splits_in(text)
    return splits[0] if len(splits) == 1 else None


def choose_split(asked: str, names: Sequence[str], held_out: bool) -> str | None:
    """Which of the splits there are is asked for: the very name, else the only one that means it; None when
    none is."""
    if asked in names:
        return asked
    meant = _meaning(asked, names)
    if len(meant) == 1:
        return meant[0]
    return names[0] if held_out and len(names) == 1 else None


def splits_in(text: str) -> list[str]:
    """The splits whose words stand in a name, each once, in the order of the alphabet."""
    return sorted({SPLIT_OF[match.group(1).lower()] for match in SPLIT_WORD.finditer(text)})


def no_split(name: str, split: str, names: Sequence[str]) -> DataError:
    """The error where `choose_split` finds none of `names` in the source `name`."""
    if not names:
        wrong = f"has no split {split}: no file of it names a split, so all of it is train"
        return DataError(describe(name, wrong, todo="set data.split: train, or name the files"))
    several = len(_meaning(split, names)) > 1
    # A file whose path names two splits has both as its split ("train or test"): no setting can choose it.
    doubtful = [other for other in names if " or " in other]
    wrong = f"has several splits that could be {split}" if several else f"has no split {split}"
    todo = "set data.split to one of them, or name the files"
    if doubtful:
        wrong, todo = f"{wrong} (the path of a file names two)", "name the files"
    return DataError(describe(name, wrong, expected=" | ".join(names), got=split, todo=todo))


def _meaning(asked: str, names: Sequence[str]) -> list[str]:
    """Those of the names that speak of the split that `asked` speaks of (dev and val: validation)."""
    called = split_called(asked)
    return [] if called is None else [name for name in names if split_called(name) == called]
