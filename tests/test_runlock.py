"""Two runs never share a folder, and a dead one blocks nobody."""

import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from repsft_fast import runlock
from repsft_fast.errors import ConfigError
from repsft_fast.runlock import RunLock

HOLD = """
import sys
from repsft_fast.runlock import RunLock
lock = RunLock(sys.argv[1])
print("held", flush=True)
sys.stdin.read()
"""


def hold(folder):
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    )
    assert other.stdout.readline() == "held\n"
    return other


def test_a_second_run_is_refused_by_name_and_a_killed_one_is_not_in_the_way(tmp_path):
    folder = tmp_path / "new" / "run"
    other = hold(folder)
    with pytest.raises(
        ConfigError, match=rf"is in use by another run, got process {other.pid} on .* since .*choose another folder"
    ):
        RunLock(folder)
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    other.stdout.close()
    other.stdin.close()
    with RunLock(folder):
        assert json.loads((folder / ".lock").read_text())["pid"] == os.getpid()
        with pytest.raises(ConfigError, match=f"process {os.getpid()}"):
            RunLock(folder)
    RunLock(folder).close()


def test_a_forked_child_does_not_keep_the_lock(tmp_path):
    """A data worker may outlive a killed run: the descriptor it inherited must not hold the folder."""
    lock = RunLock(tmp_path)
    to_parent, to_child = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(to_child[1])
        os.write(to_parent[1], b"x")
        os.read(to_child[0], 1)  # until the parent is done, or gone
        os._exit(0)
    try:
        os.read(to_parent[0], 1)
        os.close(lock._fd)  # as death does, without unlocking
        RunLock(tmp_path).close()
    finally:
        for fd in to_child + to_parent:
            os.close(fd)
        os.waitpid(pid, 0)


def test_closing_frees_the_folder_at_once(tmp_path):
    lock = RunLock(tmp_path)
    twin = os.dup(lock._fd)  # as a child that has not yet run
    lock.close()
    RunLock(tmp_path).close()
    os.close(twin)


def test_no_locks_on_this_file_system_is_said(tmp_path, monkeypatch):
    def refuse(fd, how):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with RunLock(tmp_path) as lock:
        assert "has no locks (Function not implemented)" in lock.message


def test_a_folder_that_cannot_be_used(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        RunLock(tmp_path / "file")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / runlock.NAME).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="cannot be written"):
        RunLock(tmp_path / "run")


@pytest.mark.parametrize("text", ["", "{", '{"pid": 3}', "[]", "\x00" * 50])
def test_a_lock_file_with_odd_text(tmp_path, text):
    (tmp_path / ".lock").write_text(text)
    fd = os.open(tmp_path / ".lock", os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_EX)
    with pytest.raises(ConfigError, match="a process that left no name"):
        RunLock(tmp_path)
    os.close(fd)
    RunLock(tmp_path).close()
