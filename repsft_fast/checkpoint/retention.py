"""What is deleted, and when: only older than a whole newer generation, and never half."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from pathlib import Path

from repsft_fast.checkpoint.manifest import Manifest, folder_name, generations, read_latest, read_manifest
from repsft_fast.checkpoint.reader import verify
from repsft_fast.checkpoint.writer import leftovers
from repsft_fast.errors import CheckpointError
from repsft_fast.files import crash_point, sync_folder


def prune(
    folder: str | os.PathLike, *, keep_last: int, keep_best: int = 0, protect: Collection[int] = ()
) -> list[int]:
    """Deletes old generations; returns their numbers. Raises OSError when a deletion fails, with nothing half
    deleted visible.

    Kept: where LATEST points, the last `keep_last` of its branch, the `keep_best` highest scores, and
    `protect`. Nothing newer than LATEST's generation is touched, and nothing at all unless that one is whole
    (sizes and manifest).
    """
    # Where the newest is not whole an older one is what the run goes on from.
    folder = Path(folder)
    latest, _ = read_latest(folder)
    if latest is None or verify(folder / folder_name(latest.generation), deep=False):
        return []
    # By the branch and not by numbers: after a revert the highest numbers lie where nobody goes on.
    branch = [latest.generation, *latest.branch]
    whole = {
        n: m
        for n in generations(folder)
        if (m := _manifest(folder / folder_name(n))) is not None and not m.nonfinite
    }
    scored = sorted((m.score, n) for n, m in whole.items() if m.score is not None and m.score == m.score)
    kept = {latest.generation, *protect, *[n for n in branch if n in whole][: max(1, keep_last)]}
    kept |= {n for _, n in scored[len(scored) - keep_best :]} if keep_best else set()
    deleted = [n for n in generations(folder) if n not in kept and n < latest.generation]
    # A crash between the two leaves a name that `clean` knows, and no generation without its shards.
    for n in deleted:
        trash = folder / f".trash-{folder_name(n)}"
        shutil.rmtree(trash, ignore_errors=True)
        crash_point("deletion: before rename")
        os.rename(folder / folder_name(n), trash)
        sync_folder(folder)
        crash_point("deletion: after rename")
        shutil.rmtree(trash)
        crash_point("deletion: after")
    return deleted


def _manifest(path: Path) -> Manifest | None:
    try:
        return read_manifest(path)
    except CheckpointError:
        return None


def clean(folder: str | os.PathLike) -> list[str]:
    """Removes what crashes left behind; returns the names. Only under the run's lock: a save under way looks
    the same."""
    removed = []
    for path in leftovers(Path(folder)):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        removed.append(path.name)
    return sorted(removed)
