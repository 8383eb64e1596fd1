"""Two runs never share a folder, and a dead one blocks nobody."""

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from repsft_fast.errors import ConfigError
from repsft_fast.rundir import lock
from repsft_fast.rundir.lock import RunLock

HOLD = """
import sys
from repsft_fast.rundir.lock import RunLock
lock = RunLock(sys.argv[1])
print("held", flush=True)
sys.stdin.read()
"""


def hold(folder):
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=env,
    )
    assert other.stdout.readline() == "held\n"
    return other


def test_a_second_run_is_refused_by_name_and_a_killed_one_is_not_in_the_way(tmp_path):
    folder = tmp_path / "new" / "run"
    other = hold(folder)
    with pytest.raises(
        ConfigError,
        match=rf"is in use by another run, got process {other.pid} on .* since .*choose another folder",
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
    (tmp_path / "run" / lock.NAME).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="cannot be written"):
        RunLock(tmp_path / "run")


@pytest.mark.parametrize("text", ["", "{", '{"pid": 3}', "\x00" * 50])
def test_a_lock_file_with_odd_text(tmp_path, text):
    (tmp_path / ".lock").write_text(text)
    fd = os.open(tmp_path / ".lock", os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_EX)
    with pytest.raises(ConfigError, match="a process that left no name"):
        RunLock(tmp_path)
    os.close(fd)
    RunLock(tmp_path).close()


@pytest.mark.parametrize("text", ["[]", "somebody's", '{"pi', " ", "\x00x"])
def test_somebodys_lock_file_is_left_alone(text, tmp_path):
    """Other programs lock folders by a file of this name, too."""
    (tmp_path / ".lock").write_text(text)
    if text == '{"pi':  # what a power cut leaves of ours
        RunLock(tmp_path).close()
        return
    with pytest.raises(
        ConfigError, match=r"its .lock is no run's.*move that file away, or choose another folder"
    ):
        RunLock(tmp_path)
    assert (tmp_path / ".lock").read_text() == text


@pytest.mark.parametrize("kind", ["link", "dangling", "folder", "pipe", "socket"])
def test_what_is_no_lock_file_is_said_and_never_waited_for(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the name of a socket may not be long
    path = tmp_path / ".lock"
    (tmp_path / "theirs").write_text("theirs")
    match kind:
        case "link":
            path.symlink_to("theirs")
        case "dangling":
            path.symlink_to("not-there")
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "socket":
            socket.socket(socket.AF_UNIX).bind(".lock")
    words = {"dangling": "a link", "socket": "no file"}.get(kind, f"a {kind}")
    with pytest.raises(ConfigError, match=f"cannot be written, got .lock is {words}"):
        RunLock(tmp_path)
    assert (tmp_path / "theirs").read_text() == "theirs"
    assert not (tmp_path / "not-there").exists()


def test_a_lock_file_that_went_or_was_replaced_is_noticed(tmp_path):
    with RunLock(tmp_path) as lock:
        path = tmp_path / ".lock"
        assert lock.lost() is None
        path.rename(tmp_path / "aside")
        assert "was removed while this run held the folder" in lock.lost()
        path.write_text('{"pid": 1}')
        assert "was replaced" in lock.lost()
        path.unlink()
        path.mkdir()
        assert "was replaced" in lock.lost()
        path.rmdir()
        os.mkfifo(path)
        assert "was replaced" in lock.lost()
        path.unlink()
        # a file system that numbers its files anew looks so
        path.write_bytes((tmp_path / "aside").read_bytes())
        assert lock.lost() is None
        path.unlink()
        (tmp_path / "aside").rename(path)
        assert lock.lost() is None
    assert lock.lost() is None


def test_a_file_system_that_does_not_answer_says_nothing_of_the_lock(tmp_path, monkeypatch):
    with RunLock(tmp_path) as lock:

        def fail(*arguments, **how):
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(os, "stat", fail)
        assert lock.lost() is None
        monkeypatch.undo()


def test_a_lock_taken_away_between_opening_and_locking_it(tmp_path, monkeypatch):
    """As a start that fails does with its own: the name must lead to the file that is locked."""
    flock, took = fcntl.flock, []

    def slow(fd, how):
        if not took:
            took.append((tmp_path / ".lock").unlink())
        return flock(fd, how)

    monkeypatch.setattr(fcntl, "flock", slow)
    with RunLock(tmp_path), pytest.raises(ConfigError, match="in use by another run"):
        RunLock(tmp_path)


def test_a_copy_by_hard_links_has_a_lock_of_its_own(tmp_path):
    """After `cp -al run copy` one file would lock both folders, and its text change in both."""
    (tmp_path / "run").mkdir()
    (tmp_path / "copy").mkdir()
    RunLock(tmp_path / "run").close()
    os.link(tmp_path / "run" / ".lock", tmp_path / "copy" / ".lock")
    before = (tmp_path / "copy" / ".lock").read_bytes()
    with RunLock(tmp_path / "run") as lock:
        lock._text = b"other"
        assert (tmp_path / "copy" / ".lock").read_bytes() == before
        assert lock.lost() is None
        with pytest.raises(ConfigError, match="in use"):
            RunLock(tmp_path / "run")
        RunLock(tmp_path / "copy").close()
    assert sorted(os.listdir(tmp_path / "run")) == [".lock"]


@pytest.mark.parametrize("there", [False, True])
def test_a_lock_that_was_made_is_taken_away_on_request(there, tmp_path):
    if there:
        RunLock(tmp_path).close()
    lock = RunLock(tmp_path)
    assert lock.created is not there
    lock.close(remove=lock.created)
    assert (tmp_path / ".lock").exists() == there
