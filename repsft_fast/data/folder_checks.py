"""What a folder's files must be, so that no row is read twice, missed, or trained on and held out: checked of
the files chosen for a split.

Raises DataError, naming the places, and a way to name what is meant.
"""

from __future__ import annotations

import re
from pathlib import Path

from repsft_fast.data.card import Card, matcher
from repsft_fast.data.filetypes import holds_data, known_unread, refusal, stem_of
from repsft_fast.data.folder_walk import DataFile
from repsft_fast.data.split_names import split_called, splits_in
from repsft_fast.errors import DataError, describe

NAMED_AT_MOST = 5  # files or folders in one message
# part-3-of-8, part_3_of_8.old: shards as people name them, more loosely than the hub does
_SHARD_OF = re.compile(
    r"(?P<family>.*?)[-_.]?(?<!\d)(?P<number>\d+)[-_.]of[-_.](?P<total>\d+)(?:[-_.].*)?", re.IGNORECASE
)


def check_card_files(
    splits: dict[str, set[str]], card: Card, split: str, name: str, others: dict[str, Path]
) -> None:
    """The card's files of the split are all here, and none of them is in a split that is held apart from
    it."""
    where = f"{name.rstrip('/')}/README.md"
    for pattern in card.missing[split]:
        for inside, path in others.items():
            if matcher(pattern, where).fullmatch(inside) and known_unread(path):
                raise refusal(path, f"{name.rstrip('/')}/{inside}")
        todo = "fetch the files, or name files in place of the folder"
        raise DataError(
            describe(where, f"names files of split {split} that are not here", got=pattern, todo=todo)
        )
    for other, files in splits.items():
        if split_called(other) not in (None, split_called(split)) and (both := sorted(files & splits[split])):
            wrong = f"says that {both[0]} is {split} and {other}"
            raise DataError(describe(where, wrong, todo="name the files in place of the folder"))


def check_one_place(files: list[DataFile], name: str) -> None:
    """A split lies in one folder: with several, it cannot be known whether they are subsets, copies or
    parts."""
    base = name.rstrip("/")
    places = sorted({tuple("{split}" if splits_in(part) else part for part in file.dirs) for file in files})
    folders = sorted({"/".join((base, *file.dirs)) for file in files})
    named = ", ".join(folders[:NAMED_AT_MOST]) + (" …" if len(folders) > NAMED_AT_MOST else "")
    if len(places) > 1:
        first = sorted(
            {"/".join((base, *(part for part in file.dirs if not splits_in(part)))) for file in files}
        )
        todo = f"name one ({first[-1]}), or all as tasks {{name: folder}}, or the files ({base}/**/*.jsonl)"
        raise DataError(
            describe(name, f"holds data in several places: {named}", expected="one subset", todo=todo)
        )
    if places and len([part for part in places[0] if part != "{split}"]) > 1:
        parts = [part for part in files[0].dirs if not splits_in(part)]
        raise DataError(
            describe(name, f"holds its data deeper: {named}", todo=f"name {'/'.join((base, *parts))}")
        )


def check_complete(
    files: list[DataFile], others: list[Path], name: str, split: str | None, *, one_set: bool
) -> None:
    """No shard is missing or there twice, no rows lie twice in two forms or in a form that we do not read.

    others: files whose kind we do not read. one_set: the files are one data set, so of one family of shards.
    """
    base = name.rstrip("/")
    # Part of the rows may have been packed in a form that we do not read.
    for other in others:
        if holds_data(other) and (
            split is None or split in splits_in("/".join((*other.parts[-2:-1], stem_of(other))))
        ):
            raise refusal(other, f"{base}/{other.name}")

    # Two files of one stem (a.jsonl, a.parquet) are most likely one set saved twice.
    stems: dict[tuple[tuple[str, ...], str], DataFile] = {}
    families: dict[tuple[tuple[str, ...], str], list[tuple[int, int]]] = {}
    for file in files:
        if file.kind == "arrow":
            continue
        key = (file.dirs, stem_of(file.path).lower())
        if key in stems:
            todo = f"remove one, or name the one to read ({base}/{file.inside})"
            wrong = f"holds {stems[key].inside} and {file.inside}: the same rows in two forms?"
            raise DataError(describe(name, wrong, todo=todo))
        stems[key] = file
        if shard := _SHARD_OF.fullmatch(stem_of(file.path)):
            families.setdefault((file.dirs, shard["family"]), []).append(
                (int(shard["number"]), int(shard["total"]))
            )
    for (dirs, family), shards in families.items():
        _check_shards("/".join((*dirs, family)), shards, stems.get((dirs, family.lower())), name)

    # Shards of two families are two sets, of which one may be a copy or a subset of the other.
    if one_set and len(families) > 1:
        sets = ", ".join("/".join((*dirs, family)) for dirs, family in sorted(families))
        todo = f"name one: {base}/{'/'.join((*min(families)[0], min(families)[1]))}-*"
        raise DataError(describe(name, f"holds several sets of shards: {sets}", expected="one", todo=todo))


def _check_shards(called: str, shards: list[tuple[int, int]], whole: DataFile | None, name: str) -> None:
    """Of the family `called` every (number, total) is there once, and no file that is all of them."""
    base = name.rstrip("/")
    if whole is not None:
        wrong = f"holds {whole.inside} and its shards: the same rows in two forms?"
        raise DataError(
            describe(name, wrong, todo=f"remove one, or name the one to read ({base}/{called}-*)")
        )
    numbers = sorted(number for number, _ in shards)
    totals = sorted({total for _, total in shards})
    # Some count from 0, as the hub does, some from 1.
    from_0, from_1 = list(range(len(shards))), list(range(1, len(shards) + 1))
    if totals != [len(shards)] or numbers not in (from_0, from_1):
        wrong = f"does not hold the shards of {called} once each"
        todo = f"fetch what is missing and remove what is old, or name the files ({base}/{called}-*)"
        got = f"{len(shards)} of {' and '.join(map(str, totals))}"
        raise DataError(describe(name, wrong, got=got, todo=todo))


def check_held_apart(chosen: list[DataFile], others: list[DataFile], name: str) -> None:
    """No file that is read is, by a link, a file of another split."""
    seen = {(status.st_dev, status.st_ino): other for other in others for status in [other.path.stat()]}
    for file in chosen:
        status = file.path.stat()
        if (other := seen.get((status.st_dev, status.st_ino))) is not None:
            wrong = f"{file.inside} is the same file as {other.inside} ({other.split})"
            raise DataError(describe(name, wrong, todo="remove the link, or name the files"))
