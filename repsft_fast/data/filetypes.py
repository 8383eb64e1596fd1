"""Which files hold rows, by their names; and what to do about those that we do not read."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import stat
import zlib
from pathlib import Path
from typing import IO, Any

from repsft_fast.errors import DataError, describe, kind_of_file, open_plain

KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".jsonlines": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow file",
}
COMPRESSED = (".gz", ".bz2", ".xz")
READ_COMPRESSED = ("jsonl", "json", "csv", "tsv")  # parquet and arrow are compressed inside
SUFFIXES = (*KINDS, *(f".jsonl{packed}" for packed in COMPRESSED))
TORN = (EOFError, OSError, zlib.error, lzma.LZMAError)  # what a damaged or unreadable stream raises

_PACKED_ELSEWHERE = (".zst", ".zstd", ".lz4", ".br", ".sz", ".lzma", ".z", *COMPRESSED)
_ARCHIVES = (".zip", ".tar", ".tgz", ".7z", ".rar")
_OTHERS = {
    ".txt": 'write one JSON object per line, {"text": …}: where a text ends cannot be seen in a .txt file',
    ".xlsx": "save it as .csv (UTF-8) or .jsonl",
    ".xls": "save it as .csv (UTF-8) or .jsonl",
    ".ods": "save it as .csv (UTF-8) or .jsonl",
    ".feather": "write it as .parquet or .jsonl",
    ".orc": "write it as .parquet or .jsonl",
    ".avro": "write it as .parquet or .jsonl",
    ".h5": "write it as .parquet or .jsonl",
    ".npz": "write it as .parquet or .jsonl",
    ".npy": "write it as .parquet or .jsonl",
    ".pkl": "a pickle runs code when it is read: write it as .parquet or .jsonl",
    ".pickle": "a pickle runs code when it is read: write it as .parquet or .jsonl",
    ".pt": "a pickle runs code when it is read: write it as .parquet or .jsonl",
    ".yaml": "write it as .json or .jsonl",
    ".yml": "write it as .json or .jsonl",
    ".xml": "write it as .json or .jsonl",
    ".db": "write its rows as .jsonl",
    ".sqlite": "write its rows as .jsonl",
}
# How a file begins that is something else than its name says.
_MAGIC = {
    b"\x1f\x8b": ("is gzip", "name it .jsonl.gz or unpack it"),
    b"BZh": ("is bzip2", "name it .jsonl.bz2 or unpack it"),
    b"\xfd7zXZ\0": ("is xz", "name it .jsonl.xz or unpack it"),
    b"\x28\xb5\x2f\xfd": ("is zstd", "unpack it: zstd -d"),
    b"PK\x03\x04": ("is a zip archive", "unpack it"),
    b"PAR1": ("is parquet", "name it .parquet"),
    b"ARROW1": ("is arrow", "name it .arrow"),
    b"version https://git-lfs": ("is a Git LFS pointer, not the data", "fetch the data: git lfs pull"),
}


def kind_of(path: Path) -> str | None:
    """jsonl | json | csv | tsv | parquet | arrow file, or None for a name that says nothing we read. Case
    does not matter."""
    name = path.name.lower()
    packed = next((end for end in COMPRESSED if name.endswith(end)), "")
    kind = KINDS.get(Path(name.removesuffix(packed)).suffix)
    return None if packed and kind not in READ_COMPRESSED else kind


def stem_of(path: Path) -> str:
    """The name without what says its kind."""
    name = path.name
    while Path(name).suffix.lower() in (*KINDS, *_PACKED_ELSEWHERE):
        name = Path(name).stem
    return name


def holds_data(path: Path) -> bool:
    """True for rows in a form that we do not read, such as .jsonl.zst: they must not be passed over without a
    word."""
    name = path.name.lower()
    packed = next((end for end in _PACKED_ELSEWHERE if name.endswith(end)), None)
    return kind_of(path) is None and packed is not None and Path(name.removesuffix(packed)).suffix in KINDS


def known_unread(path: Path) -> bool:
    """True for a file that may well be meant as data, though we do not read its kind."""
    return holds_data(path) or path.suffix.lower() in (*_OTHERS, *_ARCHIVES)


def refusal(path: Path, name: str) -> DataError:
    """The error for a file whose kind we do not read."""
    suffix = path.suffix.lower()
    if suffix in _ARCHIVES:
        todo = "unpack it and name the folder"
    elif holds_data(path) and kind_of(Path(path.stem)) in ("parquet", "arrow file"):
        todo = "unpack it: parquet and arrow are compressed inside"
    elif suffix in _PACKED_ELSEWHERE:
        todo = f"unpack it, or pack rows as {' '.join(f'.jsonl{end}' for end in COMPRESSED)}"
    else:
        todo = _OTHERS.get(suffix, "write its rows as .jsonl, one JSON object per line")
    return DataError(
        describe(name, "is a kind of file we do not read", expected=" ".join(SUFFIXES), got=suffix, todo=todo)
    )


def check_regular(path: Path, name: str) -> os.stat_result:
    """What stat says of a file with bytes; DataError for a pipe, a device, a broken link, a loop of links."""
    try:
        found = path.stat()
    except OSError as error:
        wrong = "is a broken link" if path.is_symlink() else "cannot be read"
        raise DataError(describe(name, f"{wrong} ({error.strerror})", todo="repair or remove it")) from None
    if not stat.S_ISREG(found.st_mode):
        wrong = f"is {kind_of_file(found.st_mode)}"
        todo = "save it to a file first: it is read more than once"
        raise DataError(describe(name, wrong, expected="a file", todo=todo))
    return found


def open_bytes(path: Path) -> IO[bytes]:
    """The file's content, unpacked as it is read."""
    suffix = path.suffix.lower()
    unpack = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(suffix)
    packed = open_plain(path)
    return packed if unpack is None else _Unpacked(unpack(packed, "rb"), packed)  # type: ignore[operator]


class _Unpacked(io.BufferedReader):
    """Closes the packed file too, which gzip and its like leave open where they did not open it."""

    def __init__(self, unpacked: io.BufferedIOBase, packed: IO[bytes]):
        super().__init__(unpacked)  # type: ignore[arg-type]
        self._packed = packed

    def close(self) -> None:
        super().close()
        self._packed.close()


def torn(where: str, path: Path, error: Exception) -> DataError:
    """The error for bytes that stop or cannot be read."""
    cause = getattr(error, "strerror", None) or str(error) or type(error).__name__
    if path.suffix.lower() in COMPRESSED:
        return DataError(
            describe(
                where,
                f"is not whole {path.suffix[1:].lower()} ({cause})",
                todo="fetch or pack the file again",
            )
        )
    return DataError(describe(where, f"cannot be read ({cause})", todo="check the file and its permissions"))


class Twice(ValueError):
    """A name to which one JSON object gives two values."""

    def __init__(self, name: str, values: list[Any]):
        self.name, self.values = name, values
        super().__init__(f"{name!r} is there twice")


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For json's object_pairs_hook: json itself would take the last of two values in silence. Raises
    Twice."""
    made: dict[str, Any] = dict(pairs)
    if len(made) < len(pairs):
        first: dict[str, Any] = {}
        texts: dict[str, str] = {}  # of the names that come again: a name may come 30,000 times
        for name, value in pairs:
            if name not in first:
                first[name] = value
                continue
            if name not in texts:
                texts[name] = repr(first[name])
            if repr(value) != texts[name]:  # by repr, in which true is not 1
                raise Twice(name, [first[name], value])
    return made


def check_beginning(data: bytes, where: str) -> None:
    """DataError for a file that begins as another kind than its name says."""
    for magic, (wrong, todo) in _MAGIC.items():
        if data.startswith(magic):
            raise DataError(describe(where, f"{wrong}, not what its name says", todo=todo))
