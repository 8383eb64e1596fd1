"""Which files of a folder hold the split that is asked for. As the hub reads folders, but for what it would
guess at.

    folder/train.jsonl  test.jsonl              a split's name in the file's name
    folder/data/train-00000-of-00002.parquet    one folder down; shards, all of them
    folder/train/part-1.jsonl                   a split's name in the folder's name
    folder/anything.jsonl                       no split's name anywhere: all of it is the training split
    folder/README.md                            `configs` in its head say it themselves (`card`)

The hub's rules: huggingface.co/docs/hub/datasets-file-names-and-splits. Stricter than the hub, because it
would train on something else than was meant, and nobody would see it: one split in several places (subsets
side by side), a file whose path names two splits, the same rows twice, a missing shard. All of these are
refused, and what is not read is said.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from repsft_fast.data.card import read_card
from repsft_fast.data.columns import FORMATS
from repsft_fast.data.filetypes import SUFFIXES, kind_of, known_unread, refusal, stem_of
from repsft_fast.data.folder_checks import (
    NAMED_AT_MOST,
    check_card_files,
    check_complete,
    check_held_apart,
    check_one_place,
)
from repsft_fast.data.folder_walk import MAX_ENTRIES, DataFile, passed_over, walk
from repsft_fast.data.split_names import (
    SPLIT_OF,
    SPLIT_WORD,
    choose_split,
    no_split,
    split_called,
    splits_in,
)
from repsft_fast.errors import DataError, describe, open_plain

_SHARD = re.compile(r"(?P<family>.+?)-(?P<number>\d{5})-of-(?P<total>\d{5})")


def choose_files(folder: Path, name: str, split: str, held_out: bool) -> tuple[list[DataFile], list[str]]:
    """(files of the split in order, what is to be said). held_out: the only split is the one, whatever it is
    called.

    Raises DataError where it cannot be known which files are meant, naming the splits or places there are.
    """
    found, others = walk(folder, name)
    card = read_card(folder, name, [file.inside for file in found])
    # What the card says of files goes before what their names say, as on the hub.
    chosen_split: str | None
    if card.splits is not None:
        chosen_split = _chosen_split(split, list(card.splits), held_out, name)
        chosen = [file for file in found if file.inside in card.splits[chosen_split]]
        inside = {other.relative_to(folder).as_posix(): other for other in others}
        check_card_files(card.splits, card, chosen_split, name, inside)
        found = _with_card_splits(found, card.splits)
    else:
        elsewhere = [file for file in found if not file.inside.startswith(card.folder)]
        found = [file for file in found if file.inside.startswith(card.folder)]
        if not found:
            raise _no_data(f"{name.rstrip('/')}/{card.folder}" if card.folder else name, others)
        found, chosen_split = _by_names(found, name, split, held_out)
        chosen = [file for file in found if file.split == chosen_split]
        check_one_place(chosen, name)
        found += elsewhere
    check_complete(chosen, others, name, chosen_split, one_set=card.splits is None)

    # What is left is said, so that a file read by nobody is seen; by a link it may be one that is read.
    chosen_inside = {file.inside for file in chosen}
    left = [file for file in found if file.inside not in chosen_inside]
    check_held_apart(chosen, [file for file in left if file.split is not None], name)
    unread = [f"{file.inside} ({file.split or 'no split'})" for file in left]
    unread += [other.relative_to(folder).as_posix() for other in others if known_unread(other)]
    notes = [*card.notes, *_not_read(unread, chosen_split, name)]
    return sorted(chosen, key=lambda file: (file.dirs, file.path.name)), notes


def _by_names(
    files: list[DataFile], name: str, split: str, held_out: bool
) -> tuple[list[DataFile], str | None]:
    """(the files with the splits that their paths say, the one of these splits that is asked for). None:
    nothing names a split, and all of it is meant."""
    found = _with_glued_splits(_with_family_splits([_with_split(file, _split_in(file)) for file in files]))
    names = sorted({file.split for file in found if file.split is not None})
    if names:
        return found, _chosen_split(split, names, held_out, name)
    # Rows of no split are trained on; held out they are only where the user named them for that.
    if not held_out and split_called(split) != "train":
        raise no_split(name, split, [])
    return found, None


def _chosen_split(asked: str, names: list[str], held_out: bool, name: str) -> str:
    """`choose_split`, and DataError where it finds none."""
    chosen = choose_split(asked, names, held_out)
    if chosen is None:
        raise no_split(name, asked, names)
    return chosen


def _not_read(unread: list[str], split: str | None, name: str) -> tuple[str, ...]:
    """The note that names what lies beside the rows that are read; none where there is nothing."""
    if not unread:
        return ()
    more = f" and {len(unread) - NAMED_AT_MOST} more" if len(unread) > NAMED_AT_MOST else ""
    called = f"split {split} of " if split else ""
    return (f"{called}{name}: not read: {', '.join(unread[:NAMED_AT_MOST])}{more}",)


def _split_in(file: DataFile) -> str | None:
    """What folders and file name say together."""
    texts = [*file.dirs, *([stem_of(file.path)] if file.kind != "arrow" else [])]
    return " or ".join(sorted({split for text in texts for split in splits_in(text)})) or None


def _with_split(file: DataFile, split: str | None) -> DataFile:
    return replace(file, split=split)


def _with_card_splits(files: list[DataFile], splits: Mapping[str, set[str]]) -> list[DataFile]:
    """Every file with the first of the card's splits that has it."""
    return [
        _with_split(file, next((split for split, inside in splits.items() if file.inside in inside), None))
        for file in files
    ]


def _with_family_splits(files: list[DataFile]) -> list[DataFile]:
    """data/NAME-00000-of-00002.parquet is the split NAME, as on the hub; a single NAME that is no split's
    word is none."""
    families = {}
    for file in files:
        if file.dirs == ("data",) and (shard := _SHARD.match(file.path.name)):
            families[file.inside] = shard["family"]
    if len(set(families.values())) == 1 and all(file.split is None for file in files):
        return files
    renamed = []
    for file in files:
        family = families.get(file.inside)
        if family is not None:
            file = _with_split(file, SPLIT_OF.get(family.lower(), family))
        renamed.append(file)
    return renamed


def _with_glued_splits(files: list[DataFile]) -> list[DataFile]:
    """mytrain.jsonl beside mytest.jsonl: a word in a word (contest) counts where it alone tells two names
    apart."""
    named: dict[tuple[tuple[str, ...], str], dict[str, list[DataFile]]] = {}
    for file in files:
        for word, split in SPLIT_OF.items() if file.split is None and file.kind != "arrow" else ():
            before, found, behind = stem_of(file.path).lower().rpartition(word)
            if found:
                rest = re.sub(r"\d+", "0", f"{before}/{behind}")
                named.setdefault((file.dirs, rest), {}).setdefault(split, []).append(file)
    splits = {
        file.inside: split
        for by_split in named.values()
        if len(by_split) > 1
        for split, of_split in by_split.items()
        for file in of_split
    }
    return [_with_split(file, splits.get(file.inside, file.split)) for file in files]


def rows_of_object(value: dict[str, Any], name: str, split: str, held_out: bool) -> list[Any]:
    """The rows of a .json file that is one object: itself, the array it holds, or of arrays named as splits
    the one asked for.

    Raises DataError where it could be several things.
    """
    arrays = {
        key: item
        for key, item in value.items()
        if isinstance(item, list) and item and isinstance(item[0], dict)
    }
    forms = _forms_of(value)
    own = {key for form in forms for key in FORMATS[form].names}  # turns and tools are arrays of objects too
    more = [
        key
        for key, item in arrays.items()
        if key not in own and _forms_of(item[0]) - (set() if forms == {"text"} else {"text"})
    ]
    # One that is a row itself may hold turns or tools; rows beside them would be lost.
    todo = "write the rows that are meant as .jsonl, one a line"
    if forms and more:
        raise DataError(describe(name, f"is a row itself and holds rows in {more[0]!r}", todo=todo))
    if forms:
        return [value]
    # Arrays named as splits are a data set in one file; an empty split is one too.
    splits = [
        key for key, item in value.items() if SPLIT_WORD.fullmatch(key) and (key in arrays or item == [])
    ]
    if splits and arrays.keys() <= set(splits):
        return list(value[_chosen_split(split, splits, held_out, name)])
    # Of several arrays none is more likely meant than another.
    if len(arrays) > 1:
        raise DataError(
            describe(
                name, "holds several arrays", expected="one", got=", ".join(map(repr, arrays)), todo=todo
            )
        )
    return next(iter(arrays.values())) if arrays else [value]


def _forms_of(row: dict[str, Any]) -> set[str]:
    return {form for form, shape in FORMATS.items() if shape.missing(row) is None}


def beside_saved(folder: Path, name: str, split: str, held_out: bool) -> tuple[str, ...]:
    """What is to be said of a folder of save_to_disk: which files and splits in it are not read."""
    unread = []
    for path in sorted(folder.iterdir()):
        hidden = passed_over(path.name) or not path.is_file()
        if not hidden and (kind_of(path) not in (None, "arrow file") or known_unread(path)):
            unread.append(path.name)
    try:
        with open_plain(folder / "dataset_dict.json") as stream:
            splits = [str(other) for other in json.loads(stream.read(MAX_ENTRIES * 100))["splits"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        splits = []  # a Dataset, or damaged, which its reader says
    chosen = choose_split(split, splits, held_out)
    unread += [f"{other} (split)" for other in splits if chosen is not None and other != chosen]
    return _not_read(unread, chosen, name)


def _no_data(name: str, others: list[Path]) -> DataError:
    for other in others:
        if known_unread(other):
            return refusal(other, f"{name.rstrip('/')}/{other.name}")
    expected = f"a save_to_disk folder or files ending in {', '.join(SUFFIXES)}"
    return DataError(
        describe(
            name, "is a folder without data", expected=expected, todo="name the folder that holds the files"
        )
    )
