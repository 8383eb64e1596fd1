"""A file is written whole or not at all, whatever fails on the way and whoever else writes it."""

import errno
import os
import threading

import pytest

from repsft_fast import files


@pytest.fixture
def calls(monkeypatch):
    """Names of the calls that decide what a power cut leaves, in their order."""
    made = []
    for name in ("open", "write", "fsync", "replace"):
        real = getattr(os, name)

        def seen(*args, name=name, real=real, **more):
            made.append(name)
            return real(*args, **more)

        monkeypatch.setattr(os, name, seen)
    return made


@pytest.fixture
def points():
    seen = []
    files.set_crash_hook(seen.append)
    yield seen
    files.set_crash_hook(None)


@pytest.mark.parametrize("durable", [True, False])
def test_contents_are_on_the_disk_before_the_name_points_at_them(durable, tmp_path, calls):
    files.replace_file(tmp_path / "a", b"new", "a", durable=durable)
    assert calls == ["open", "write", "fsync", "replace", *(["open", "fsync"] if durable else [])]
    assert (tmp_path / "a").read_bytes() == b"new"


def test_every_moment_has_a_name(tmp_path, points):
    files.replace_file(tmp_path / "a", b"new", "it")
    assert points == [
        f"it: {moment}"
        for moment in ("before open", "mid-write", "before fsync", "after fsync", "after rename")
    ]


@pytest.mark.parametrize("kill", range(4))
def test_an_error_before_the_rename_leaves_the_old_contents_alone(kill, tmp_path):
    (tmp_path / "a").write_bytes(b"old")
    seen = []

    def hook(point):
        seen.append(point)
        if len(seen) == kill + 1:
            raise KeyboardInterrupt

    files.set_crash_hook(hook)
    try:
        with pytest.raises(KeyboardInterrupt):
            files.replace_file(tmp_path / "a", b"new", "a")
    finally:
        files.set_crash_hook(None)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"a": b"old"}


def test_without_durability_an_error_means_the_old_contents(tmp_path, monkeypatch):
    """Of result.json: nothing that can fail comes after the rename."""
    (tmp_path / "a").write_bytes(b"old")
    for name in ("open", "write", "fsync", "replace"):
        with monkeypatch.context() as patch:

            def fail(*args, **more):
                raise OSError(errno.ENOSPC, "full")

            patch.setattr(os, name, fail)
            with pytest.raises(OSError, match="full"):
                files.replace_file(tmp_path / "a", b"new", "a", durable=False)
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"a": b"old"}, name


def test_nothing_is_written_over_or_through_a_link(tmp_path):
    (tmp_path / "there").write_bytes(b"theirs")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("there", "link"):
        with pytest.raises(FileExistsError):
            files.write_file(tmp_path / name, [b"ours"], "a")
    assert (tmp_path / "there").read_bytes() == b"theirs"
    assert not (tmp_path / "nowhere").exists()


def test_a_replaced_link_is_replaced_itself(tmp_path):
    (tmp_path / "theirs").write_bytes(b"theirs")
    (tmp_path / "a").symlink_to("theirs")
    files.replace_file(tmp_path / "a", b"ours", "a")
    assert ((tmp_path / "theirs").read_bytes(), (tmp_path / "a").is_symlink()) == (b"theirs", False)


def test_partial_writes_are_completed(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:3]))
    assert files.write_file(tmp_path / "a", [b"0123456789", memoryview(b"abcd")], "a") == 14
    assert (tmp_path / "a").read_bytes() == b"0123456789abcd"


def test_two_writers_at_once_are_in_nobodys_way(tmp_path):
    both = threading.Barrier(2)
    temporary, errors = set(), []

    def write(content):
        try:
            with files.replacing(tmp_path / "a") as new:
                temporary.add(new.name)
                both.wait(10)
                files.write_file(new, [content], "a")
                both.wait(10)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(c * 1000,)) for c in (b"x", b"y")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert (len(temporary), errors) == (2, [])
    assert (tmp_path / "a").read_bytes() in (b"x" * 1000, b"y" * 1000)
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("name", ["n" * 255, "ä" * 127, "😀" * 63, ".made.json"])
def test_a_name_of_any_length_and_the_masks_mode(name, tmp_path):
    before = os.umask(0o027)
    try:
        files.replace_file(tmp_path / name, b"x", "a")
    finally:
        os.umask(before)
    assert (tmp_path / name).stat().st_mode & 0o777 == 0o640


def test_what_a_kill_leaves_is_known_by_its_name(tmp_path):
    """`rundir.folder` takes it for the run's own."""
    with files.replacing(tmp_path / ".made.json") as new:
        new.write_bytes(b"")
        stem, _, digits = new.name.rpartition(".")
        assert (stem, len(digits), int(digits, 16) >= 0) == (".made.json", 32, True)


def test_sync_tree_syncs_every_file_and_folder(tmp_path, monkeypatch):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "deep" / "a").write_bytes(b"")
    (tmp_path / "b").write_bytes(b"")
    synced, real = set(), os.fsync

    def fsync(fd):
        synced.add(os.readlink(f"/proc/self/fd/{fd}"))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    files.sync_tree(tmp_path)
    assert synced == {str(tmp_path / name) for name in (".", "in", "in/deep", "in/deep/a", "b")}
