"""What lies below a folder: the files that hold rows, and every other file. Bounded, and no link is followed
round."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from repsft_fast.data.filetypes import check_regular, kind_of
from repsft_fast.errors import DataError, describe

MAX_ENTRIES = 100_000  # of a folder and all below it; more is no folder of data
_METADATA = {
    "config.json",
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
    "croissant.json",
}
_METADATA |= {
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "vocab.json",
}
_METADATA |= {"trainer_state.json", "adapter_config.json", "model.safetensors.index.json", "all_results.json"}


@dataclass(frozen=True)
class DataFile:
    """A file that holds rows, or a folder of save_to_disk."""

    path: Path
    dirs: tuple[str, ...]  # the folders between the one named and the file
    kind: str  # filetypes.KINDS, or arrow: a folder of save_to_disk
    split: str | None = None  # what its path says: a split's name, "train or test" when it says two, None

    @property
    def inside(self) -> str:
        """Its place in the folder, as people write it."""
        return "/".join((*self.dirs, self.path.name)) if self.kind != "arrow" else "/".join(self.dirs)


def walk(top: Path, name: str) -> tuple[list[DataFile], list[Path]]:
    """(files that hold rows and folders of save_to_disk, every other file), hidden ones and metadata left
    out.

    Raises DataError for what cannot be read, a link to a folder above it, and more than MAX_ENTRIES entries.
    """
    found: list[DataFile] = []
    others: list[Path] = []
    entries = 0
    # Folders to look into, each with the names below `top` and the identities of the folders above it.
    waiting: list[tuple[Path, tuple[str, ...], tuple[tuple[int, int], ...]]] = [(top, (), ())]
    while waiting:
        folder, dirs, above = waiting.pop()
        place = "/".join((name.rstrip("/") or "/", *dirs))
        identity, inside = _entries(folder, place)
        # A link to a folder above it would be walked for ever.
        if identity in above:
            raise DataError(
                describe(place, "is a link to a folder above it", todo="remove the link or name the files")
            )
        # A whole disk named by a slip must not take minutes and the memory.
        entries += len(inside)
        if entries > MAX_ENTRIES:
            todo = "name the files: folder/*.jsonl"
            raise DataError(describe(name, f"holds more than {MAX_ENTRIES} files and folders", todo=todo))
        # A folder of save_to_disk is one source: its files are not rows by themselves.
        if dirs and any(entry.name in ("state.json", "dataset_dict.json") for entry in inside):
            found.append(DataFile(folder, dirs, "arrow"))
            continue
        for entry in inside:
            path = folder / entry.name
            if passed_over(entry.name) or entry.name == "lost+found":
                continue
            if os.path.isdir(path):
                waiting.append((path, (*dirs, entry.name), (*above, identity)))
            elif (kind := kind_of(path)) is not None:
                check_regular(path, f"{place}/{entry.name}")
                found.append(DataFile(path, dirs, kind))
            else:
                others.append(path)
    return sorted(found, key=lambda file: file.inside), sorted(others)


def passed_over(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or is about data or a model and holds no rows."""
    return name.startswith((".", "_")) or name.lower() in _METADATA


def files_below(top: Path, name: str) -> Iterator[DataFile]:
    """Every file of rows below a folder, in order."""
    yield from (file for file in walk(top, name)[0] if file.kind != "arrow")


def _entries(folder: Path, place: str) -> tuple[tuple[int, int], list[os.DirEntry[str]]]:
    """(device and inode of a folder, what lies in it by name)."""
    try:
        status = folder.stat()
        inside = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(
            describe(place, f"cannot be read ({error.strerror})", todo="check its permissions")
        ) from None
    return (status.st_dev, status.st_ino), inside
