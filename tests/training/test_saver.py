"""Which checkpoints a run makes when nothing is said of them, and what a short run does not pay."""

import pytest

from repsft_fast import checkpoint
from repsft_fast.config import Config
from repsft_fast.training import saver, trainer
from repsft_fast.training.snapshots import Snapshots
from tests.helpers import runs

SHORT = {"stop__token_accuracy": None, "budget__epochs": None, "budget__updates": 12}


def generations(folder):
    found = {}
    for line in runs.metrics(folder, "checkpoint"):
        found[line["generation"]] = (line["update"], line["why"])
    return found


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (None, 10.0)),
        ({"every_updates": 5}, (5, None)),
        ({"every_minutes": None}, (None, None)),
        ({"every_minutes": 3}, (None, 3.0)),
    ],
)
def test_every_ten_minutes_unless_something_else_is_said(given, expected):
    made = Config.of(
        {
            "run": {"folder": "r"},
            "model": {"path": "m"},
            "data": {"train": "d"},
            "budget": {"epochs": 1},
            "checkpoint": given,
        }
    )
    assert (made.checkpoint.every_updates, made.checkpoint.every_minutes) == expected


def test_a_short_run_copies_nothing_and_saves_before_its_decay_and_at_its_end(tmp_path, monkeypatch):
    def copied(*_):
        raise AssertionError("a place for a copy of the state was made")

    monkeypatch.setattr(Snapshots, "_room_for_whole", copied)
    trainer.train(runs.settings(tmp_path, **SHORT, checkpoint__keep_extendable=False))
    assert generations(tmp_path) == {0: (12, "the end")}
    monkeypatch.undo()
    trainer.train(runs.settings(tmp_path / "other", **SHORT))
    assert generations(tmp_path / "other") == {0: (10, "the decay is next"), 1: (12, "the end")}


def test_the_clock_asks_for_one_on_the_way(tmp_path, monkeypatch):
    class Clock:
        now = 0.0

        def monotonic(self):
            Clock.now += 100.0
            return Clock.now

        def __getattr__(self, name):
            import time

            return getattr(time, name)

    monkeypatch.setattr(saver, "time", Clock())
    trainer.train(runs.settings(tmp_path, **SHORT, checkpoint__keep_extendable=False))
    due = [update for update, why in generations(tmp_path).values() if why == "due"]
    assert due
    assert checkpoint.newest(tmp_path / "run" / "checkpoints").number == len(due)


def test_the_one_before_the_decay_is_kept(tmp_path):
    """However many come after it."""
    given = runs.settings(
        tmp_path,
        **{**SHORT, "budget__updates": 20},
        schedule__decay_fraction=0.9,
        checkpoint__every_updates=1,
    )
    trainer.train(given)
    kept = checkpoint.generations(tmp_path / "run" / "checkpoints")
    before = [number for number, (_, why) in generations(tmp_path).items() if why == "the decay is next"]
    starts = [
        checkpoint.values_of(tmp_path / "run" / "checkpoints" / checkpoint.folder_name(n))["state"][
            "schedule"
        ]
        for n in kept
    ]
    assert [start["decay_start"] is None for start in starts] == [True, False, False]
    assert not before, "one of every update is as good"
