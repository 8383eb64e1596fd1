"""Run folders damaged at random, then resumed: bit-equal, refused or harmless, never a silent other result,
never a hang.

`-m slow` makes 200 damages of runs that had ended, were cut off, or were cut off in the last minute; the
default run two dozen.
"""

import json
import os
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest

from repsft_fast.errors import RepsftError
from repsft_fast.training import finish, trainer
from tests.helpers import runs

SETTINGS = {
    "stop__token_accuracy": None, "optim__warmup_updates": 1, "budget__epochs": None, "budget__updates": 12,
    "checkpoint__every_updates": 3,
}  # fmt: skip


class PowerCut(BaseException):
    """Nothing of ours catches it, as nothing catches a power cut."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Settings, the whole run's weights, and folders of the three ways to leave a run."""
    root = tmp_path_factory.mktemp("damage")
    given = runs.settings(root, **SETTINGS)

    def cut(work):
        if work.updates == 8:
            raise PowerCut

    def cut_late(*_, **__):
        raise PowerCut

    for name in ("ended", "cut off", "last minute"):
        run = json.loads(json.dumps(given)) | {"run": {**given["run"], "folder": str(root / name)}}
        if name == "ended":
            trainer.train(run)
            continue
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer, "result_of_error", lambda *_: None)
            if name == "last minute":
                patch.setattr(finish.results, "write", cut_late)
            with pytest.raises(PowerCut):
                trainer.train(run, on_update=cut if name == "cut off" else None)
    return given, (root / "ended" / "model.safetensors").read_bytes(), root


def damage(folder: Path, draw: random.Random) -> str:
    """One thing that happens to files. Returns what it was."""
    everything = sorted(p for p in folder.rglob("*") if not p.is_symlink())
    files = [p for p in everything if p.is_file()]
    path, how = draw.choice(files), draw.choice(HOWS)
    name = path.relative_to(folder)
    data = bytearray(path.read_bytes()) if path.is_file() else bytearray()
    if how == "flip" and data:
        for _ in range(draw.choice((1, 1, 9))):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(bytes(data))
    elif how == "cut":
        path.write_bytes(bytes(data[: draw.randrange(len(data) + 1)]))
    elif how == "zeros":
        path.write_bytes(bytes(len(data)))
    elif how == "grown":
        path.write_bytes(bytes(data) + draw.randbytes(50))
    elif how == "delete":
        path.unlink()
    elif how == "another":
        shutil.copyfile(draw.choice([p for p in files if p != path]), path)
    elif how == "delete a folder":
        path = draw.choice([p for p in everything if p.is_dir()])
        name = path.relative_to(folder)
        shutil.rmtree(path)
    elif how == "link":
        path.unlink()
        path.symlink_to(draw.choice(["nowhere", "/dev/zero", "run.yaml", "..", "/dev/null"]))
    elif how == "folder":
        path.unlink()
        path.mkdir()
    elif how == "pipe":
        path.unlink()
        os.mkfifo(path)
    elif how == "rename":
        path.rename(path.with_name(draw.choice(["old", f"{path.name}.bak", f"{path.name}~"])))
    elif how == "json":
        path.write_text(
            draw.choice(["{}", "[]", "null", '{"a": NaN}', "[" * 5000, '{"success": true, "code": "budget"}'])
        )
    return f"{how} {name}"


HOWS = (
    "flip", "flip", "flip", "cut", "cut", "zeros", "grown", "delete", "delete", "another", "delete a folder", "link", "folder",
    "pipe", "rename", "json",
)  # fmt: skip


def damaged(seed, folders, tmp_path):
    """Returns how it went: equal or refused. Fails on anything else."""
    given, expected, root = folders
    draw = random.Random(seed)
    left = draw.choice(["ended", "cut off", "last minute"])
    folder = tmp_path / "run"
    shutil.copytree(root / left, folder, symlinks=True)
    what = [damage(folder, draw) for _ in range(draw.choice((1, 1, 1, 2)))]
    settings = given | {"run": {**given["run"], "folder": str(folder)}}
    try:
        result = trainer.train(settings, resume=True)
    except RepsftError as error:
        return f"refused: {type(error).__name__}"
    assert (result.success, result.updates) == (True, 12), (left, what)
    assert (folder / "model.safetensors").read_bytes() == expected, (left, what)
    written = json.loads((folder / "result.json").read_text())
    assert (written["success"], written["updates"]) == (True, 12), (left, what)
    return "equal"


def ends(seeds, folders, tmp_path):
    went = Counter(damaged(seed, folders, tmp_path / str(seed)) for seed in seeds)
    assert went["equal"] > 0.4 * len(seeds), went  # refusing everything would be easy
    return went


@pytest.mark.timeout(300)
def test_some_damages(folders, tmp_path):
    ends(range(16), folders, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_hundred_damages(folders, tmp_path):
    print(ends(range(1000, 1200), folders, tmp_path))
