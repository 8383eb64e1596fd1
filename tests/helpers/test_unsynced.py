"""Nothing is waited for, in this process and in those it forks, and what cannot be synced is refused as ever."""

import os
from contextlib import closing

import pytest

from tests.helpers import unsynced
from tests.helpers.ranks import run_ranks


def syncs_nothing(world=None):
    return os.fsync is unsynced.fsync


def test_here_and_in_whatever_is_forked(server):
    assert syncs_nothing()
    assert run_ranks(syncs_nothing) == [True, True]
    outcome = server.run("tests.helpers.test_unsynced:syncs_nothing", {})
    assert outcome.result, outcome.output


def test_files_and_folders_are_not_synced(tmp_path, monkeypatch):
    monkeypatch.setattr(unsynced, "_REAL", lambda fd: pytest.fail("it waits for the disk"))
    with (tmp_path / "file").open("w") as file:
        unsynced.fsync(file.fileno())
    folder = os.open(tmp_path, os.O_RDONLY)
    unsynced.fsync(folder)
    os.close(folder)


def test_the_real_one_comes_back():
    unsynced.install(real=True)
    assert os.fsync is unsynced._REAL
    unsynced.install()
    assert syncs_nothing()


@pytest.mark.parametrize("sync", [os.fsync, unsynced._REAL])
def test_what_a_sync_refuses_is_refused(sync):
    reader, writer = os.pipe()
    with closing(os.fdopen(reader)), closing(os.fdopen(writer, "w")), pytest.raises(OSError, match="Invalid"):
        sync(writer)
    with pytest.raises(OSError, match="Bad file descriptor"):
        sync(writer)
