"""A file cut into pieces for a machine that takes little at a time, and put together there with every byte
accounted for.

    python -m benchmarks.suites.gpu.pieces split FILE FOLDER [--limit BYTES]
    python -m benchmarks.suites.gpu.pieces join FOLDER FILE

`split` writes FOLDER/NAME.1of3 … in nearly equal sizes and FOLDER/NAME.pieces.json, with bytes and SHA-256 of
every piece and of the whole. The pieces may arrive one by one: `join` names all that are missing or torn, and
writes nothing until none is. A piece with other bytes (swapped, damaged) is named too; FILE appears only when
the whole has its hash.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from repsft_fast.errors import RepsftError, describe

LIMIT = 48_000_000  # bytes: a piece, the wheels and the checkout fit one transfer of 64 MiB
BLOCK = 1 << 20
LIST = ".pieces.json"


class PiecesError(RepsftError, ValueError):
    """Pieces that do not make the file they were cut from."""


def split(
    file: Path,
    folder: Path,  # made where it is missing; earlier pieces of a file of this name are removed from it
    limit: int = LIMIT,  # bytes of the largest piece, at least 1
) -> Path:
    """Cuts `file` into as few pieces of at most `limit` bytes as there can be; returns the path of their
    list, written last."""
    if limit < 1:
        raise PiecesError(describe("limit", "leaves no room for a byte", expected="at least 1", got=limit))
    size = file.stat().st_size
    count = max(1, -(-size // limit))
    bounds = [size * number // count for number in range(count + 1)]
    folder.mkdir(parents=True, exist_ok=True)
    for old in _earlier(folder, file.name):
        old.unlink()
    whole, pieces = hashlib.sha256(), []
    with file.open("rb") as source:
        for number, (start, end) in enumerate(itertools.pairwise(bounds), 1):
            name, own = f"{file.name}.{number}of{count}", hashlib.sha256()
            with (folder / name).open("wb") as piece:
                for block in _blocks(source, end - start):
                    own.update(block)
                    whole.update(block)
                    piece.write(block)
            pieces.append({"name": name, "bytes": end - start, "sha256": own.hexdigest()})
    made = {"name": file.name, "bytes": size, "sha256": whole.hexdigest(), "pieces": pieces}
    listed = folder / f"{file.name}{LIST}"
    listed.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    return listed


def join(
    folder: Path,  # holds one list and the pieces it names
    file: Path,  # what to write; its folder is made where it is missing, an older file is replaced at the end
) -> str:
    """Puts the pieces together and returns the SHA-256 of the whole.

    Raises PiecesError naming the list that is absent or damaged, every piece that is missing or torn, or the
    piece whose bytes are not those that were cut; `file` is then what it was before.
    """
    listed = _the_list(folder)
    made = _read(listed)
    _all_there(folder, made["pieces"])
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.partial")
    whole = hashlib.sha256()
    try:
        with partial.open("wb") as target:
            for entry in made["pieces"]:
                _append(target, folder / entry["name"], entry, made["pieces"], whole)
        # every piece is right and yet the whole is not: the list itself is wrong
        if whole.hexdigest() != made["sha256"]:
            raise PiecesError(
                describe(
                    str(listed),
                    "its pieces do not make its whole",
                    expected=made["sha256"],
                    got=whole.hexdigest(),
                    todo="cut the file again and bring the list and all pieces",
                )
            )
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)
    return whole.hexdigest()


def _append(target: Any, path: Path, entry: dict[str, Any], pieces: list[dict[str, Any]], whole: Any) -> None:
    own = hashlib.sha256()
    with path.open("rb") as piece:
        for block in _blocks(piece, entry["bytes"]):
            own.update(block)
            whole.update(block)
            target.write(block)
    if own.hexdigest() != entry["sha256"]:
        other = next((p["name"] for p in pieces if p["sha256"] == own.hexdigest()), None)
        wrong = f"holds the bytes of {other}" if other else "is damaged"
        raise PiecesError(
            describe(
                str(path),
                wrong,
                expected=f"SHA-256 {entry['sha256']}",
                got=own.hexdigest(),
                todo="bring this piece again",
            )
        )


def _the_list(folder: Path) -> Path:
    lists = sorted(folder.glob(f"*{LIST}"))
    if len(lists) != 1:
        raise PiecesError(
            describe(
                str(folder),
                "does not say what its pieces make",
                expected=f"one *{LIST}",
                got=[p.name for p in lists],
                todo="bring the list that `split` wrote beside the pieces",
            )
        )
    return lists[0]


def _read(listed: Path) -> dict[str, Any]:
    try:
        made = json.loads(listed.read_text(encoding="utf-8"))
        whole = made["bytes"], str(made["sha256"])
        pieces = [
            {"name": str(p["name"]), "bytes": int(p["bytes"]), "sha256": str(p["sha256"])}
            for p in made["pieces"]
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise PiecesError(describe(str(listed), f"is damaged ({error!r})", todo="bring it again")) from error
    outside = [p["name"] for p in pieces if Path(p["name"]).name != p["name"]]
    if outside or sum(p["bytes"] for p in pieces) != whole[0]:
        raise PiecesError(
            describe(
                str(listed),
                "is damaged",
                expected=f"pieces in its own folder, {whole[0]} bytes together",
                got=outside or [p["bytes"] for p in pieces],
                todo="bring it again",
            )
        )
    return {"bytes": whole[0], "sha256": whole[1], "pieces": pieces}


def _all_there(folder: Path, pieces: list[dict[str, Any]]) -> None:
    wrong = []
    for entry in pieces:
        path = folder / entry["name"]
        if not path.is_file():
            wrong.append(f"{entry['name']} is missing")
        elif path.stat().st_size != entry["bytes"]:
            wrong.append(f"{entry['name']} is torn ({path.stat().st_size} of {entry['bytes']} bytes)")
    if wrong:
        raise PiecesError(
            describe(str(folder), ", ".join(wrong), todo="bring what is named; the other pieces may stay")
        )


def _earlier(folder: Path, name: str) -> list[Path]:
    ours = re.compile(re.escape(name) + rf"(\.\d+of\d+|{re.escape(LIST)})")
    return [path for path in folder.iterdir() if ours.fullmatch(path.name)]


def _blocks(source: Any, count: int) -> Iterator[bytes]:
    """`count` bytes of an open file, or fewer where it ends early, a block at a time."""
    while count > 0 and (block := source.read(min(count, BLOCK))):
        count -= len(block)
        yield block


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.suites.gpu.pieces", description="cuts a file, puts it together"
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    cut = verbs.add_parser("split", help="FILE into pieces and their list in FOLDER")
    cut.add_argument("file", type=Path)
    cut.add_argument("folder", type=Path)
    cut.add_argument("--limit", type=int, default=LIMIT, help=f"bytes of the largest piece ({LIMIT})")
    put = verbs.add_parser("join", help="the pieces in FOLDER into FILE")
    put.add_argument("folder", type=Path)
    put.add_argument("file", type=Path)
    given = parser.parse_args(arguments)
    try:
        if given.verb == "split":
            listed = split(given.file, given.folder, given.limit)
            pieces = _read(listed)["pieces"]
            print(f"{listed}: {len(pieces)} pieces of at most {max(p['bytes'] for p in pieces)} bytes")
        else:
            print(f"{given.file}: whole, SHA-256 {join(given.folder, given.file)}")
    except PiecesError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
