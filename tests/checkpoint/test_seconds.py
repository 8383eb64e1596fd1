"""Where the seconds of a save are booked: every kind by itself, and the wait for an earlier save apart from
the copy."""

from types import SimpleNamespace

import pytest
import torch

from repsft_fast.checkpoint import BackgroundWriter, background, files, seconds, shards, writer
from repsft_fast.checkpoint.seconds import SaveSeconds
from repsft_fast.training import saver as saving
from repsft_fast.training.saver import Saver
from repsft_fast.training.snapshots import Snapshots
from repsft_fast.training.trainer import train
from tests.helpers import runs

KINDS = ("copy", "hash", "look", "write", "fsync", "model", "wait")
STEP = 1.0


@pytest.fixture
def clock(monkeypatch):
    """The writer's clock, which moves where a test moves it: [seconds]."""
    now = [0.0]
    for module in (seconds, background):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    return now


def test_seconds_add_up_and_an_error_loses_none(clock):
    def fail():
        with spent.of("write"):
            clock[0] += STEP
            raise OSError("full")

    spent = SaveSeconds()
    for _ in range(2):
        with pytest.raises(OSError, match="full"):
            fail()
    assert spent.named() == {f"{kind}_seconds": 2 * STEP if kind == "write" else 0.0 for kind in KINDS}


def saved(tmp_path, **more):
    thread = BackgroundWriter(tmp_path)
    thread.submit(0, {"w": torch.randn(40, 6).t(), "n": torch.zeros(3)}, {"update": 1}, **more)
    (outcome,) = thread.close()
    return outcome


@pytest.mark.parametrize(
    ("holder", "name", "kind"),
    [
        (shards, "_raw", "copy"),
        (writer, "host_checksums", "hash"),
        (writer, "hash_file", "hash"),
        (writer, "_nonfinite", "look"),
        (files.os, "write", "write"),
        (files.os, "fsync", "fsync"),
        (writer, "sync_tree", "fsync"),
        (writer, "_publish", "fsync"),
        (writer, "_parts", "wait"),
    ],
)
def test_each_part_of_a_save_is_booked_where_it_belongs(tmp_path, monkeypatch, clock, holder, name, kind):
    real, calls = getattr(holder, name), []

    def takes_a_step(*args, **more):
        calls.append(name)
        clock[0] += STEP
        return real(*args, **more)

    monkeypatch.setattr(holder, name, takes_a_step)
    outcome = saved(tmp_path, write_model=lambda folder, tensors: (folder / "config.json").write_text("{}"))
    assert outcome.error is None
    spent = outcome.spent.named()
    booked = spent.pop(f"{kind}_seconds")
    unbooked = len(calls) * STEP - booked
    # What writes and syncs LATEST is inside the publishing of it, which is fsync's.
    assert unbooked == 0 or (name == "write" and unbooked == spent.pop("fsync_seconds") > 0 < booked)
    assert not any(spent.values())
    assert outcome.seconds == len(calls) * STEP > 0, "no second twice"


def test_the_model_is_booked_by_itself(tmp_path, clock):
    def write_model(folder, tensors):
        clock[0] += STEP

    outcome = saved(tmp_path, write_model=write_model)
    assert outcome.spent == SaveSeconds(model=STEP)


def test_a_save_that_fails_says_what_it_took(tmp_path, monkeypatch, clock):
    def full(*_):
        clock[0] += STEP
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "write", full)
    outcome = saved(tmp_path)
    assert outcome.error is not None
    assert outcome.spent == SaveSeconds(write=STEP)


class TestInARun:
    """A clock that moves only in the wait for the writer and in the copy."""

    WAIT, COPY, LEDGER = 7.0, 2.0, 100.0

    @pytest.fixture
    def lines(self, tmp_path, monkeypatch):
        now = [0.0]

        def moving(holder, name, by):
            real = getattr(holder, name)

            def moved(*args, **more):
                now[0] += by
                return real(*args, **more)

            monkeypatch.setattr(holder, name, moved)

        moving(Saver, "wait", self.WAIT)
        moving(Snapshots, "freeze", self.COPY)
        moving(saving.Conductor, "read_ledger", self.LEDGER)
        monkeypatch.setattr(
            saving, "time", SimpleNamespace(perf_counter=lambda: now[0], monotonic=lambda: now[0])
        )

        def run(**changes):
            train(
                runs.settings(
                    tmp_path, budget__updates=4, budget__epochs=None, stop__token_accuracy=None, **changes
                )
            )
            return runs.metrics(tmp_path)

        return run

    def test_the_stall_is_the_copy_and_the_wait_is_apart(self, lines):
        found = lines(checkpoint__every_updates=1)
        saves = [line for line in found if line["kind"] == "checkpoint" and line["why"] == "due"]
        assert len(saves) == 3
        assert {line["stall_seconds"] for line in saves} == {self.COPY}
        assert {line["waited_seconds"] for line in saves} == {self.WAIT}

    def test_a_save_without_room_for_a_copy_waits_for_its_own_writer_too(self, lines, monkeypatch):
        monkeypatch.setattr(Snapshots, "freezes", False)
        saves = [line for line in lines(checkpoint__every_updates=2) if line.get("why") == "due"]
        assert [(line["stall_seconds"], line["waited_seconds"]) for line in saves] == [
            (self.COPY, 2 * self.WAIT)
        ]

    def test_what_the_writer_did_is_written_down(self, lines):
        written = [
            line for line in lines(checkpoint__every_updates=2) if line["kind"] == "checkpoint_written"
        ]
        assert written
        for line in written:
            assert all(line[f"{kind}_seconds"] >= 0 for kind in KINDS)
            assert 0 < line["write_seconds"] + line["fsync_seconds"] + line["hash_seconds"] <= line["seconds"]
