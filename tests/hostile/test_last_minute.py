"""The last minute of a run under a disk that fails: at every write, sync, rename and folder it makes after
its last update.

Each failure is one call that raises, or all from there on. The run then ends well with the same model, or
with one error that says where and what to do; nothing is torn, and --resume without the failure trains
nothing and ends as the undisturbed run did.
"""

import builtins
import errno
import json
import os
import random
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors.torch
import transformers.modeling_utils

from repsft_fast import cli
from repsft_fast.errors import RepsftError
from repsft_fast.training import trainer
from repsft_fast.training.saver import Saver
from tests.helpers import runs

SETTINGS = {
    "stop__token_accuracy": None,
    "budget__epochs": None,
    "budget__updates": 6,
    "optim__warmup_updates": 1,
}
KINDS = {"full": {}, "lora": {"model__lora": {"rank": 2}}}
WAYS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)
# What a process does to a disk, by where the call is looked up.
PLACES = (
    (os, "write"), (os, "fsync"), (os, "rename"), (os, "replace"), (os, "mkdir"), (os, "open"), (builtins, "open"),
    (safetensors.torch, "save_file"), (transformers.modeling_utils, "safe_save_file"),
)  # fmt: skip


class Disk:
    """Counts the calls that change the run's folder once `armed`; the n-th raises, and all later ones where
    `stays` says so."""

    def __init__(
        self, folder: Path, fail_at: int | None = None, number: int = errno.ENOSPC, stays: bool = False
    ):
        self.folder, self.fail_at, self.number, self.stays = str(folder), fail_at, number, stays
        self.armed, self.calls = False, []

    def wrap(self, name: str, original: Callable) -> Callable:
        def call(*args, **more):
            if self.armed and self._changes(name, args, more):
                self.calls.append(name)
                beyond = self.fail_at is not None and len(self.calls) - self.fail_at
                if beyond is not False and (beyond == 0 or (self.stays and beyond > 0)):
                    raise OSError(self.number, os.strerror(self.number))
            return original(*args, **more)

        return call

    def _changes(self, name: str, args: tuple, more: dict) -> bool:
        if name == "open":
            how = args[1] if len(args) > 1 else more.get("mode", more.get("flags", "r"))
            to_write = os.O_WRONLY | os.O_RDWR | os.O_CREAT
            writes = any(c in how for c in "wax+") if isinstance(how, str) else bool(how & to_write)
            return writes and self._inside(args[0])
        if name in ("write", "fsync"):
            try:
                return self._inside(os.readlink(f"/proc/self/fd/{args[0]}"))
            except OSError:
                return False
        return any(self._inside(a) for a in (*args, *more.values()) if isinstance(a, (str, Path)))

    def _inside(self, path: object) -> bool:
        return isinstance(path, (str, os.PathLike)) and os.path.abspath(os.fspath(path)).startswith(
            self.folder
        )


@contextmanager
def on(disk: Disk):
    with pytest.MonkeyPatch.context() as patch:
        for holder, name in PLACES:
            if hasattr(holder, name):
                patch.setattr(holder, name, disk.wrap(name.removeprefix("safe_"), getattr(holder, name)))
        end = Saver.save_end

        def save_end(self):
            disk.armed = True
            end(self)

        patch.setattr(Saver, "save_end", save_end)
        yield


def settings_of(kind: str, folder: Path):
    return runs.settings(folder, **SETTINGS, **KINDS[kind])


def model(folder: Path) -> dict[str, bytes]:
    names = (
        "model.safetensors",
        "adapter_model.safetensors",
        "config.json",
        "adapter_config.json",
        "generation_config.json",
    )
    return {name: (folder / name).read_bytes() for name in names if (folder / name).exists()}


@pytest.fixture(scope="module", params=KINDS)
def whole(request, tmp_path_factory):
    """Kind, the undisturbed model, how many calls the last minute makes."""
    folder = tmp_path_factory.mktemp("whole")
    disk = Disk(folder / "run")
    with on(disk):
        assert trainer.train(settings_of(request.param, folder)).success
    assert len(disk.calls) > 30, disk.calls
    return request.param, model(folder / "run"), disk.calls


def failing(at: int, draw: random.Random, whole, folder: Path, capsys) -> str:
    kind, expected, calls = whole
    run, given = folder / "run", settings_of(kind, folder)
    disk = Disk(run, at, draw.choice(WAYS), stays=draw.random() < 0.4)
    what = f"{calls[at - 1]} number {at}, {errno.errorcode[disk.number]}, stays: {disk.stays}"
    error = None
    with on(disk):
        try:
            trainer.train(given)
        except RepsftError as raised:
            error = raised
    if error is None:
        assert model(run) == expected, what
    else:
        assert error.exit_code == 1, (what, error)
        assert str(run) in str(error) or "gen-" in str(error), (what, error)
        assert "--resume" in str(error), (what, error)
    went = "ended well" if error is None else "an error"
    for name, data in model(run).items():
        assert data == expected[name], f"{what}: {name} is torn"
    if (run / "result.json").exists():
        assert json.loads((run / "result.json").read_text())["success"] == (went == "ended well"), what
    again = trainer.train(given, resume=True)
    assert (again.success, again.updates) == (True, 6), what
    assert model(run) == expected, what
    assert json.loads((run / "result.json").read_text())["success"], what
    assert not [p.name for p in run.iterdir() if p.name.startswith(".writing")], what
    capsys.readouterr()
    return went


@pytest.mark.timeout(300)
def test_failures_of_the_last_minute(whole, tmp_path, capsys):
    draw = random.Random(0)
    count = len(whole[2])
    went = [
        failing(at, draw, whole, tmp_path / str(at), capsys)
        for at in sorted(draw.sample(range(1, count + 1), 10))
    ]
    assert {"ended well", "an error"} == set(went)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_call_of_the_last_minute(whole, tmp_path, capsys):
    draw = random.Random(1)
    for at in range(1, len(whole[2]) + 1):
        failing(at, draw, whole, tmp_path / str(at), capsys)


def test_the_command_says_where_and_what_to_do(tmp_path, capsys):
    given = settings_of("full", tmp_path)
    (tmp_path / "settings.yaml").write_text(json.dumps(given))
    disk = Disk(tmp_path / "run", 1, errno.ENOSPC, stays=True)
    with on(disk):
        assert cli.main(["train", "--config", str(tmp_path / "settings.yaml")]) == 1
    said = capsys.readouterr().err
    assert "No space left on device" in said
    assert str(tmp_path / "run") in said
    assert "--resume" in said
    assert "Traceback" not in said
    assert cli.main(["train", "--config", str(tmp_path / "settings.yaml"), "--resume"]) == 0
