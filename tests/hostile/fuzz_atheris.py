"""Fuzz a door by flag: coverage-guided with atheris where it is installed, by a seeded mutator where it is
not.

    python -m tests.hostile.fuzz_atheris rows|settings|manifest --seconds 60

Exit code 0: nothing but the project's own errors came out. Otherwise the traceback is printed and the bytes
are kept in a file.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

NO_ATHERIS = "atheris is not installed (pip install atheris): a seeded mutator without coverage runs instead"
_TOKENS = (
    b"{", b"}", b"[", b"]", b":", b",", b'"', b"'", b"\\", b"\n", b"\r", b"\t", b" ", b"\0", b"\xff", b"\xef\xbb\xbf", b"\x80",
    b"PK", b"null", b"true", b"NaN", b"Infinity", b"-Infinity", b"-1", b"0", b"1e999", b"9" * 30, b"9" * 5000, b"0x7f",
    b"\\ud800", b"\\u0000", b"../", b"/", b"&a ", b"*a", b"<<: ", b"!!int ", b"- ", b"? ", b"--- ", b"#", b"|\n", b"[" * 2000,
    b'{"a":' * 900, b'"role"', b'"content"', b'"messages"', b'"input_ids"', b'"labels"', b'"shape"', b'"rows"', b'"file"',
    b'"generation"', b'"branch"', b'"parent"', b'"hash"', b'"format"',
)  # fmt: skip


def mutated(draw: random.Random, corpus: Sequence[bytes]) -> bytes:
    """One of the corpus after one to six changes: bits, bytes, cuts, repeats, tokens, a piece of another, a
    repeated token."""
    data = bytearray(draw.choice(corpus))
    for _ in range(draw.randint(1, 6)):
        at = draw.choice((0, len(data), draw.randint(0, len(data))))
        end = min(len(data), at + draw.choice((1, 1, 2, 4, 16, 64)))
        kind = draw.randrange(8)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            data[at:end] = draw.randbytes(draw.randint(0, 4))
        elif kind == 2:
            del data[at:end]
        elif kind == 3:
            data[at:at] = data[at:end] * draw.choice((1, 2, 50))
        elif kind == 4:
            data[at:end] = draw.choice(_TOKENS)
        elif kind == 5:
            data[at:at] = draw.choice(_TOKENS)
        elif kind == 6:
            data[at:] = draw.choice(_TOKENS) * draw.choice((1, 3, 1500))
            del data[1 << 16 :]
        else:
            other = draw.choice(corpus)
            start = draw.randint(0, len(other))
            data[at:end] = other[start : start + draw.randint(1, 40)]
    return bytes(data)


def search(
    door: Callable[[bytes], object],
    corpus: Sequence[bytes],
    *,
    seed: int,
    seconds: float = float("inf"),
    runs: int = 10**12,
) -> tuple[int, bytes | None]:
    """(inputs tried, the first that let anything escape or None), until `seconds` or `runs` are spent. The
    same for a seed."""
    draw, began = random.Random(seed), time.monotonic()
    for tried in range(runs):
        if time.monotonic() - began > seconds:
            return tried, None
        data = mutated(draw, corpus) if tried >= len(corpus) else corpus[tried]
        try:
            door(data)
        except Exception:
            traceback.print_exc()
            return tried + 1, data
    return runs, None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.hostile.fuzz_atheris", description=__doc__.splitlines()[0]
    )
    parser.add_argument("door", choices=("rows", "settings", "manifest"))
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--findings", type=Path, default=Path("."), help="folder for bytes that let something escape"
    )
    given = parser.parse_args(arguments)
    guided = importlib.util.find_spec("atheris") is not None
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        if guided:
            return _guided(given, Path(name))
        print(NO_ATHERIS, flush=True)
        from tests.hostile import byte_doors

        folder = Path(name, "door")
        folder.mkdir()
        corpus = byte_doors.corpus(given.door, Path(name))
        tried, found = search(
            byte_doors.DOORS[given.door](folder), corpus, seed=given.seed, seconds=given.seconds
        )
    if found is None:
        print(f"{given.door}: {tried} inputs, nothing but the project's own errors")
        return 0
    kept = given.findings / f"{given.door}-{hashlib.sha256(found).hexdigest()[:16]}"
    kept.write_bytes(found)
    print(f"{given.door}: input {tried} let something escape; its bytes are in {kept}")
    return 1


def _guided(given: argparse.Namespace, folder: Path) -> int:
    """libFuzzer's loop; it ends the process itself, with another code than 0 after a finding."""
    import atheris

    with atheris.instrument_imports(
        include=["repsft_fast.config", "repsft_fast.data", "repsft_fast.checkpoint", "yaml"]
    ):
        from tests.hostile import byte_doors
    seeds, files = folder / "seeds", folder / "door"
    seeds.mkdir()
    files.mkdir()
    for number, data in enumerate(byte_doors.corpus(given.door, folder)):
        (seeds / str(number)).write_bytes(data)
    door = byte_doors.DOORS[given.door](files)
    flags = [
        f"-max_total_time={int(given.seconds)}",
        f"-seed={given.seed}",
        "-rss_limit_mb=0",
        "-max_len=8192",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], *flags, f"-artifact_prefix={given.findings}/{given.door}-", str(seeds)], door)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
