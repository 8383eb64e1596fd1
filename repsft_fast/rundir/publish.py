"""How a finished model gets into the run's folder: written aside in it, then moved in file by file.

The record (`made`) says at every moment which files are the run's, so that a kill is completed by the next
one. Only the main rank calls these functions.
"""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from pathlib import Path

from repsft_fast.errors import TrainingError, describe
from repsft_fast.files import crash_point, sync_folder, sync_tree
from repsft_fast.rundir.fingerprints import Fingerprint
from repsft_fast.rundir.made import STAGED, Made, kind_of, known, listed

_READ_FIRST = ("config.json", "adapter_config.json")  # without which nobody takes the folder for a model
_AGAIN = "move them away, then `repsft export {folder}` writes the model from the last checkpoint"


def stage(folder: Path) -> Path:
    """A new hidden folder inside the run's to write a model into, for `publish`; those that a kill left
    behind are gone."""
    made = known(folder) or Made(folder)
    try:
        for name in sorted(n for n in made.names if n.startswith(STAGED)):
            if kind_of(folder / name) == "folder":
                shutil.rmtree(folder / name)
            made.names.discard(name)
        staged = folder / f"{STAGED}{uuid.uuid4().hex}"
        made.names.add(staged.name)
        made.write()
        staged.mkdir()
    except OSError as error:
        raise TrainingError(
            describe(str(folder), "a model cannot be written into it", got=error.strerror)
        ) from error
    return staged


def publish(staged: Path, into: Path) -> None:
    """Move a finished model from a hidden folder of the run's folder into that one, or into a folder in it;
    durable.

    Its weights first, and last the file without which nobody takes the folder for a model: a kill on the way
    leaves no mixture that could be read, and the next publish completes it. Files of the model before that
    this one does not have are removed. Raises TrainingError, before the first move, where a name is taken by
    something that the run did not write; and when the disk fails, which leaves what a kill does.
    """
    folder = staged.parent
    todo = f"mend that, then `repsft export {folder}`: the last checkpoint has the weights"
    try:
        place = "." if into.resolve() == folder.resolve() else into.name
        if place != "." and into.parent.resolve() != folder.resolve():
            raise ValueError(f"{into} is not {folder}, nor a folder in it")
        _publish(known(folder) or Made(folder), staged, place)
    except OSError as error:
        wrong = "the model could not be moved into it"
        raise TrainingError(describe(str(into), wrong, got=error.strerror, todo=todo)) from error


def _publish(made: Made, staged: Path, place: str) -> None:
    new = sorted(_files_of(staged), key=lambda name: (name in _READ_FIRST, name.endswith(".json"), name))
    if found := made.not_our_model(place, {name.split("/")[0] for name in new}):
        wrong = f"holds files that the run did not make, where its model goes: {listed(found)}"
        raise TrainingError(describe(str(made.folder), wrong, todo=_AGAIN.format(folder=made.folder)))
    # The record holds the old and the new contents before the first file moves: what a kill leaves is then
    # known as the run's.
    sync_tree(staged)
    fingerprints = {name: Fingerprint.of(staged / name) for name in new}
    written = made.models.setdefault(place, {})
    for name, now in fingerprints.items():
        if now not in written.setdefault(name, []):
            written[name].append(now)
    made.moving.add(place)
    made.names |= {place} - {"."}
    made.write()
    crash_point("publish: recorded")
    _move(made, staged, place, new)
    # Only now is the model before it forgotten.
    made.models[place] = {name: [now] for name, now in fingerprints.items()}
    made.moving.discard(place)
    made.names.discard(staged.name)
    made.write()


def _move(made: Made, staged: Path, place: str, new: list[str]) -> None:
    """The files to their place, in this order; what a reader would look for first goes before and comes
    last."""
    into = made.folder / place
    into.mkdir(exist_ok=True)
    for name in [*_READ_FIRST, *(name for name in made.models[place] if name not in new)]:
        if made.ours(place, name):
            (into / name).unlink()
    sync_folder(into)
    for name in new:
        (into / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(staged / name, into / name)
        crash_point("publish: moved")
    for inside in {(into / name).parent for name in new} | {into, made.folder}:
        sync_folder(inside)
    shutil.rmtree(staged, ignore_errors=True)  # its empty folders


def _files_of(staged: Path) -> list[str]:
    found = []
    for root, _, names in os.walk(staged):
        found += [os.path.relpath(os.path.join(root, name), staged) for name in names]
    if not found or any(kind_of(staged / name) != "file" for name in found):
        raise OSError(errno.EINVAL, f"{staged.name} holds no finished model")
    return found
