"""Which files of a folder hold the split that is asked for. As the hub reads folders, but for what it would guess at.

    folder/train.jsonl  test.jsonl              a split's name in the file's name
    folder/data/train-00000-of-00002.parquet    one folder down; shards, all of them
    folder/train/part-1.jsonl                   a split's name in the folder's name
    folder/anything.jsonl                       no split's name anywhere: all of it is the training split
    folder/README.md                            `configs` in its head say it themselves (`card`)

The hub's rules: huggingface.co/docs/hub/datasets-file-names-and-splits. Stricter than the hub, because it would train on
something else than was meant, and nobody would see it: one split in several places (subsets side by side), a file whose
path names two splits, the same rows twice, a missing shard. All of these are refused, and what is not read is said.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from repsft_fast.data.card import Card, matcher, read_card
from repsft_fast.data.columns import FORMATS
from repsft_fast.data.filetypes import SUFFIXES, check_regular, holds_data, kind_of, known_unread, refusal, stem_of
from repsft_fast.errors import DataError, describe, open_plain

MAX_ENTRIES = 100_000  # of a folder and all below it; more is no folder of data
WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation", "heldout", "held-out", "held_out", "holdout", "hold-out", "hold_out"),
}
_SPLIT_OF = {word: split for split, words in WORDS.items() for word in words}
# A word between anything but letters, as the hub has it, and glued to what says no more (testset, trainData).
_GLUED = r"(?:sets?|data|datasets?|files?|splits?|rows|samples|examples)?"
_WORD = re.compile(rf"(?<![^\W\d_])({'|'.join(sorted(_SPLIT_OF, key=len, reverse=True))}){_GLUED}(?![^\W\d_])", re.IGNORECASE)
_SHARD = re.compile(r"(?P<family>.+?)-(?P<number>\d{5})-of-(?P<total>\d{5})")
_PART = re.compile(r"(?P<family>.*?)[-_.]?(?<!\d)(?P<number>\d+)[-_.]of[-_.](?P<total>\d+)(?:[-_.].*)?", re.IGNORECASE)
_METADATA = {"config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "croissant.json"}
_METADATA |= {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "vocab.json"}
_METADATA |= {"trainer_state.json", "adapter_config.json", "model.safetensors.index.json", "all_results.json"}
_NAMED_AT_MOST = 5


@dataclass(frozen=True)
class DataFile:
    path: Path
    dirs: tuple[str, ...]  # the folders between the one named and the file
    kind: str  # filetypes.KINDS, or arrow: a folder of save_to_disk
    split: str | None = None  # what its path says: a split's name, "train or test" when it says two, None

    @property
    def inside(self) -> str:
        """Its place in the folder, as people write it."""
        return "/".join((*self.dirs, self.path.name)) if self.kind != "arrow" else "/".join(self.dirs)


def choose_files(folder: Path, name: str, split: str, held_out: bool) -> tuple[list[DataFile], list[str]]:
    """(files of the split in order, what is to be said). held_out: the only split is the one, whatever it is called.

    Raises DataError where it cannot be known which files are meant, naming the splits or places there are.
    """
    found, others = _walk(folder, name)
    card = read_card(folder, name, [file.inside for file in found])
    notes, splits = list(card.notes), card.splits
    if splits is not None:
        chosen_split = choose_split(split, list(splits), held_out)
        if chosen_split is None:
            raise _no_split(name, split, list(splits))
        chosen = [file for file in found if file.inside in splits[chosen_split]]
        _check_card(splits, card, chosen_split, name, {other.relative_to(folder).as_posix(): other for other in others})
        found = [_with_split(file, next((s for s in splits if file.inside in splits[s]), None)) for file in found]
    else:
        elsewhere = [file for file in found if not file.inside.startswith(card.folder)]
        found = [file for file in found if file.inside.startswith(card.folder)]
        if not found:
            raise _no_data(f"{name.rstrip('/')}/{card.folder}" if card.folder else name, others)
        found = _with_glued_splits(_with_family_splits([_with_split(file, _split_in(file)) for file in found]))
        names = sorted({file.split for file in found if file.split is not None})
        if names:
            chosen_split = choose_split(split, names, held_out)
            if chosen_split is None:
                raise _no_split(name, split, names)
        elif not held_out and split_called(split) != "train":
            raise _no_split(name, split, [])
        else:
            chosen_split = None
        chosen = [file for file in found if file.split == chosen_split]
        _one_place(chosen, name)
        found += elsewhere
    _whole(chosen, others, name, chosen_split, one_set=splits is None)
    chosen_inside = {file.inside for file in chosen}
    unread = [f"{file.inside} ({file.split or 'no split'})" for file in found if file.inside not in chosen_inside]
    _apart(chosen, [file for file in found if file.inside not in chosen_inside and file.split is not None], name)
    unread += [other.relative_to(folder).as_posix() for other in others if known_unread(other)]
    if unread:
        more = f" and {len(unread) - _NAMED_AT_MOST} more" if len(unread) > _NAMED_AT_MOST else ""
        called = f"split {chosen_split} of " if chosen_split else ""
        notes.append(f"{called}{name}: not read: {', '.join(unread[:_NAMED_AT_MOST])}{more}")
    return sorted(chosen, key=lambda file: (file.dirs, file.path.name)), notes


def split_called(text: str) -> str | None:
    """The one split (train, validation, test) that a name speaks of; None when none or several."""
    splits = _splits_in(text)
    return splits[0] if len(splits) == 1 else None


def choose_split(asked: str, names: Sequence[str], held_out: bool) -> str | None:
    """Which of the splits there are is asked for: the very name, else the only one that means it; None when none is."""
    if asked in names:
        return asked
    meant = [name for name in names if split_called(asked) is not None and split_called(name) == split_called(asked)]
    if len(meant) == 1:
        return meant[0]
    return names[0] if held_out and len(names) == 1 else None


def _splits_in(text: str) -> list[str]:
    return sorted({_SPLIT_OF[match.group(1).lower()] for match in _WORD.finditer(text)})


def _split_in(file: DataFile) -> str | None:
    """What folders and file name say together."""
    texts = [*file.dirs, *([stem_of(file.path)] if file.kind != "arrow" else [])]
    return " or ".join(sorted({split for text in texts for split in _splits_in(text)})) or None


def _with_split(file: DataFile, split: str | None) -> DataFile:
    return DataFile(file.path, file.dirs, file.kind, split)


def _with_family_splits(files: list[DataFile]) -> list[DataFile]:
    """data/NAME-00000-of-00002.parquet is the split NAME, as on the hub; a single NAME that is no split's word is none."""
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
            file = _with_split(file, _SPLIT_OF.get(family.lower(), family))
        renamed.append(file)
    return renamed


def _with_glued_splits(files: list[DataFile]) -> list[DataFile]:
    """mytrain.jsonl beside mytest.jsonl: a word in a word (contest) counts where it alone tells two names apart."""
    named: dict[tuple[tuple[str, ...], str], dict[str, list[DataFile]]] = {}
    for file in files:
        for word, split in _SPLIT_OF.items() if file.split is None and file.kind != "arrow" else ():
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
    """The rows of a .json file that is one object: itself, the array it holds, or of arrays named as splits the one asked for.

    Raises DataError where it could be several things.
    """
    arrays = {key: item for key, item in value.items() if isinstance(item, list) and item and isinstance(item[0], dict)}
    forms = _forms_of(value)
    own = {key for form in forms for key in FORMATS[form].names}  # turns and tools are arrays of objects too
    more = [
        key
        for key, item in arrays.items()
        if key not in own and _forms_of(item[0]) - (set() if forms == {"text"} else {"text"})
    ]
    todo = "write the rows that are meant as .jsonl, one a line"
    if forms and more:
        raise DataError(describe(name, f"is a row itself and holds rows in {more[0]!r}", todo=todo))
    if forms:
        return [value]
    splits = [key for key, item in value.items() if _WORD.fullmatch(key) and (key in arrays or item == [])]
    if splits and arrays.keys() <= set(splits):
        chosen = choose_split(split, splits, held_out)
        if chosen is None:
            raise _no_split(name, split, splits)
        return list(value[chosen])
    if len(arrays) > 1:
        raise DataError(describe(name, "holds several arrays", expected="one", got=", ".join(map(repr, arrays)), todo=todo))
    return next(iter(arrays.values())) if arrays else [value]


def _forms_of(row: dict[str, Any]) -> set[str]:
    return {form for form, shape in FORMATS.items() if shape.missing(row) is None}


def beside_saved(folder: Path, name: str, split: str, held_out: bool) -> tuple[str, ...]:
    """What is to be said of a folder of save_to_disk: which files and splits in it are not read."""
    unread = []
    for path in sorted(folder.iterdir()):
        hidden = path.name.startswith((".", "_")) or path.name.lower() in _METADATA or not path.is_file()
        if not hidden and (kind_of(path) not in (None, "arrow file") or known_unread(path)):
            unread.append(path.name)
    try:
        with open_plain(folder / "dataset_dict.json") as stream:
            splits = [str(other) for other in json.loads(stream.read(MAX_ENTRIES * 100))["splits"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        splits = []  # a Dataset, or damaged, which its reader says
    chosen = choose_split(split, splits, held_out)
    unread += [f"{other} (split)" for other in splits if chosen is not None and other != chosen]
    more = f" and {len(unread) - _NAMED_AT_MOST} more" if len(unread) > _NAMED_AT_MOST else ""
    called = f"split {chosen} of " if chosen else ""
    return (f"{called}{name}: not read: {', '.join(unread[:_NAMED_AT_MOST])}{more}",) if unread else ()


def _walk(top: Path, name: str) -> tuple[list[DataFile], list[Path]]:
    """(files that hold rows and folders of save_to_disk, every other file), hidden ones and metadata left out."""
    found: list[DataFile] = []
    others: list[Path] = []
    entries = 0
    waiting: list[tuple[Path, tuple[str, ...], tuple[tuple[int, int], ...]]] = [(top, (), ())]
    while waiting:
        folder, dirs, above = waiting.pop()
        place = "/".join((name.rstrip("/") or "/", *dirs))
        try:
            status = folder.stat()
            inside = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise DataError(describe(place, f"cannot be read ({error.strerror})", todo="check its permissions")) from None
        if (status.st_dev, status.st_ino) in above:
            raise DataError(describe(place, "is a link to a folder above it", todo="remove the link or name the files"))
        entries += len(inside)
        if entries > MAX_ENTRIES:
            todo = "name the files: folder/*.jsonl"
            raise DataError(describe(name, f"holds more than {MAX_ENTRIES} files and folders", todo=todo))
        if dirs and any(entry.name in ("state.json", "dataset_dict.json") for entry in inside):
            found.append(DataFile(folder, dirs, "arrow"))
            continue
        for entry in inside:
            path = folder / entry.name
            if entry.name.startswith((".", "_")) or entry.name.lower() in _METADATA or entry.name == "lost+found":
                continue
            if os.path.isdir(path):
                waiting.append((path, (*dirs, entry.name), (*above, (status.st_dev, status.st_ino))))
            elif (kind := kind_of(path)) is not None:
                check_regular(path, f"{place}/{entry.name}")
                found.append(DataFile(path, dirs, kind))
            else:
                others.append(path)
    return sorted(found, key=lambda file: file.inside), sorted(others)


def files_below(top: Path, name: str) -> Iterator[DataFile]:
    """Every file of rows below a folder, in order."""
    yield from (file for file in _walk(top, name)[0] if file.kind != "arrow")


def _check_card(splits: dict[str, set[str]], card: Card, split: str, name: str, others: dict[str, Path]) -> None:
    """The card's files of the split are all here, and none of them is in a split that is held apart from it."""
    where = f"{name.rstrip('/')}/README.md"
    for pattern in card.missing[split]:
        for inside, path in others.items():
            if matcher(pattern, where).fullmatch(inside) and known_unread(path):
                raise refusal(path, f"{name.rstrip('/')}/{inside}")
        todo = "fetch the files, or name files in place of the folder"
        raise DataError(describe(where, f"names files of split {split} that are not here", got=pattern, todo=todo))
    for other, files in splits.items():
        if split_called(other) not in (None, split_called(split)) and (both := sorted(files & splits[split])):
            wrong = f"says that {both[0]} is {split} and {other}"
            raise DataError(describe(where, wrong, todo="name the files in place of the folder"))


def _no_data(name: str, others: list[Path]) -> DataError:
    for other in others:
        if known_unread(other):
            return refusal(other, f"{name.rstrip('/')}/{other.name}")
    expected = f"a save_to_disk folder or files ending in {', '.join(SUFFIXES)}"
    return DataError(describe(name, "is a folder without data", expected=expected, todo="name the folder that holds the files"))


def _no_split(name: str, split: str, names: Sequence[str]) -> DataError:
    if not names:
        wrong = f"has no split {split}: no file of it names a split, so all of it is train"
        return DataError(describe(name, wrong, todo="set data.split: train, or name the files"))
    meant = [other for other in names if split_called(split) is not None and split_called(other) == split_called(split)]
    doubtful = [other for other in names if " or " in other]
    wrong = f"has several splits that could be {split}" if len(meant) > 1 else f"has no split {split}"
    todo = "set data.split to one of them, or name the files"
    if doubtful:
        wrong, todo = f"{wrong} (the path of a file names two)", "name the files"
    return DataError(describe(name, wrong, expected=" | ".join(names), got=split, todo=todo))


def _one_place(files: list[DataFile], name: str) -> None:
    """A split lies in one folder: with several, it cannot be known whether they are subsets, copies or parts."""
    base = name.rstrip("/")
    places = sorted({tuple("{split}" if _splits_in(part) else part for part in file.dirs) for file in files})
    folders = sorted({"/".join((base, *file.dirs)) for file in files})
    named = ", ".join(folders[:_NAMED_AT_MOST]) + (" …" if len(folders) > _NAMED_AT_MOST else "")
    if len(places) > 1:
        first = sorted({"/".join((base, *(part for part in file.dirs if not _splits_in(part)))) for file in files})
        todo = f"name one ({first[-1]}), or all as tasks {{name: folder}}, or the files ({base}/**/*.jsonl)"
        raise DataError(describe(name, f"holds data in several places: {named}", expected="one subset", todo=todo))
    if places and len([part for part in places[0] if part != "{split}"]) > 1:
        parts = [part for part in files[0].dirs if not _splits_in(part)]
        raise DataError(describe(name, f"holds its data deeper: {named}", todo=f"name {'/'.join((base, *parts))}"))


def _whole(files: list[DataFile], others: list[Path], name: str, split: str | None, one_set: bool) -> None:
    """No shard is missing or there twice, no rows lie twice in two forms or in a form that we do not read."""
    base = name.rstrip("/")
    for other in others:
        if holds_data(other) and (split is None or split in _splits_in("/".join((*other.parts[-2:-1], stem_of(other))))):
            raise refusal(other, f"{base}/{other.name}")
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
        if shard := _PART.fullmatch(stem_of(file.path)):
            families.setdefault((file.dirs, shard["family"]), []).append((int(shard["number"]), int(shard["total"])))
    for (dirs, family), shards in families.items():
        called = "/".join((*dirs, family))
        if (whole := stems.get((dirs, family.lower()))) is not None:
            wrong = f"holds {whole.inside} and its shards: the same rows in two forms?"
            raise DataError(describe(name, wrong, todo=f"remove one, or name the one to read ({base}/{called}-*)"))
        numbers = sorted(number for number, _ in shards)
        if {total for _, total in shards} != {len(shards)} or numbers not in (
            list(range(len(shards))),
            list(range(1, len(shards) + 1)),
        ):
            totals = sorted({total for _, total in shards})
            wrong = f"does not hold the shards of {called} once each"
            todo = f"fetch what is missing and remove what is old, or name the files ({base}/{called}-*)"
            got = f"{len(shards)} of {' and '.join(map(str, totals))}"
            raise DataError(describe(name, wrong, got=got, todo=todo))
    if one_set and len(families) > 1:
        sets = ", ".join("/".join((*dirs, family)) for dirs, family in sorted(families))
        todo = f"name one: {base}/{'/'.join((*min(families)[0], min(families)[1]))}-*"
        raise DataError(describe(name, f"holds several sets of shards: {sets}", expected="one", todo=todo))


def _apart(chosen: list[DataFile], others: list[DataFile], name: str) -> None:
    """No file that is read is, by a link, a file of another split."""
    seen = {(status.st_dev, status.st_ino): other for other in others for status in [other.path.stat()]}
    for file in chosen:
        status = file.path.stat()
        if (other := seen.get((status.st_dev, status.st_ino))) is not None:
            wrong = f"{file.inside} is the same file as {other.inside} ({other.split})"
            raise DataError(describe(name, wrong, todo="remove the link, or name the files"))
