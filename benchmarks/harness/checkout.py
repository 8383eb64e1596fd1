"""Which code is measured: this checkout's root, its commit, a digest of its sources."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class NoCommit(ValueError):
    """Which code was measured is not known, or two answers differ."""


def code() -> dict[str, Any]:
    """commit, dirty and source of the tree this file is in.

    commit: of git, or of the variable COMMIT where the tree was copied without its history. dirty: None
    there, since nobody knows; `source`, a digest of the code itself, is then what can be compared with the
    commit (`source_digest`).
    """
    head, given = _git("rev-parse", "HEAD"), os.environ.get("COMMIT", "").strip().lower()
    if given and (len(given) != 40 or set(given) - set("0123456789abcdef")):
        raise NoCommit(f"COMMIT: expected the 40 hexadecimal digits of a commit, got {given!r}")
    if head and given and head != given:
        raise NoCommit(
            f"COMMIT is {given}, but this checkout is at {head}; leave COMMIT out, or check that commit out"
        )
    if not head and not given:
        raise NoCommit(
            "no git history here and no COMMIT: set COMMIT (or --commit) to the commit that was copied"
        )
    dirty = bool(_git("status", "--porcelain", "--untracked-files=no")) if head else None
    return {"commit": head or given, "dirty": dirty, "source": source_digest()}


def source_digest(root: Path = ROOT) -> str:
    """16 hexadecimal digits over the names and contents of the Python files that a measurement runs."""
    digest = hashlib.blake2b(digest_size=8)
    for folder in ("benchmarks", "csrc_triton", "repsft_fast"):
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(
                f"{path.relative_to(root).as_posix()}\0{path.stat().st_size}\0".encode() + path.read_bytes()
            )
    return digest.hexdigest()


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""  # a copy of the tree without its history
    return done.stdout.strip()
