"""The collector stands still in the loop, and is as it was afterwards."""

import gc

import pytest

from repsft_fast.config import Config
from repsft_fast.training import garbage
from repsft_fast.training.build import build
from repsft_fast.training.step import train_step
from repsft_fast.training.trainer import train
from tests.helpers import runs


@pytest.fixture(autouse=True)
def as_it_was():
    was, threshold, frozen = gc.isenabled(), gc.get_threshold(), gc.get_freeze_count() > 0
    yield
    gc.unfreeze()
    if frozen:  # as tests/conftest.py left it: every later run of this process would walk all there is
        gc.freeze()
    (gc.enable if was else gc.disable)()
    gc.set_threshold(*threshold)


def state():
    return gc.isenabled(), gc.get_threshold(), gc.get_freeze_count() > 0


class Circle:
    made = 0

    def __init__(self):
        self.me = self
        Circle.made += 1

    def __del__(self):
        Circle.made -= 1


@pytest.mark.parametrize("on", [True, False])
def test_inside_nothing_is_collected_by_itself_and_afterwards_all_is_as_it_was(on):
    gc.unfreeze()
    (gc.enable if on else gc.disable)()
    before = state()
    with garbage.kept_out():
        assert state() == (False, gc.get_threshold(), True)
        Circle()
        _ = [[] for _ in range(2000)]
        assert Circle.made == 1
        garbage.collect()
        assert Circle.made == 0
    assert state() == before


def test_what_was_left_before_is_gone_and_not_frozen():
    gc.unfreeze()
    gc.disable()
    Circle()
    with garbage.kept_out():
        assert Circle.made == 0


def frozen(thing):
    """By the object: how many are frozen changes by itself, for those that die are counted no longer."""
    return all(each is not thing for each in gc.get_objects())


def test_one_inside_another():
    gc.unfreeze()
    gc.enable()
    before = []
    with garbage.kept_out():
        assert frozen(before)
        between = []
        with garbage.kept_out():
            assert not frozen(between)
        assert frozen(before)
        assert state() == (False, gc.get_threshold(), True)
        Circle()
        garbage.collect()
        assert Circle.made == 0
    assert not frozen(before)
    assert state() == (True, gc.get_threshold(), False)


def test_what_the_process_had_frozen_stays_frozen():
    gc.unfreeze()
    before = []
    gc.freeze()
    between = []
    with garbage.kept_out():
        assert frozen(before)
        assert not frozen(between)
    assert frozen(before)


def test_outside_nothing_is_done():
    gc.disable()
    Circle()
    garbage.collect()
    garbage.collect_when_many()
    assert Circle.made == 1
    gc.collect()


def test_many_are_collected_between_updates(monkeypatch):
    monkeypatch.setattr(garbage, "MOST_YOUNG", 1000)
    with garbage.kept_out():
        Circle()
        garbage.collect_when_many()
        assert Circle.made == 1
        kept = [[] for _ in range(1500)]
        garbage.collect_when_many()
        assert Circle.made == 0
        assert len(kept) == 1500


@pytest.mark.parametrize("ends", ["well", "badly", "interrupted"])
def test_a_run_gives_the_collector_back(ends, tmp_path):
    gc.unfreeze()
    gc.enable()
    before, seen = state(), []

    def on_update(work):
        seen.append(state())
        Circle()
        if len(seen) == 3 and ends != "well":
            raise {"badly": ValueError, "interrupted": KeyboardInterrupt}[ends]("here")

    settings = runs.settings(tmp_path, budget__epochs=2, stop__token_accuracy=None)
    if ends == "well":
        train(settings, on_update=on_update)
    else:
        with pytest.raises((ValueError, KeyboardInterrupt)):
            train(settings, on_update=on_update)
    assert set(seen) == {(False, before[1], True)}
    assert state() == before
    gc.collect()
    assert Circle.made == 0


def test_an_epoch_ends_with_a_collection(tmp_path):
    left = []

    def on_update(work):
        left.append(Circle.made)
        Circle()

    settings = runs.settings(tmp_path, budget__epochs=3, stop__token_accuracy=None)
    train(settings, on_update=on_update)
    each = len(left) // 3
    assert left == list(range(each)) * 3


def test_200_updates_leave_no_objects(tmp_path):
    """With the collector off whatever an update leaves in a circle would stay."""
    parts = build(Config.of(runs.settings(tmp_path, batch__samples=1, samples=24)))
    epoch = parts.plan.epoch(0, 0)

    def updates(count):
        with parts.rows_ahead([epoch[n % len(epoch)] for n in range(count)], 0) as ahead:
            for update in ahead:
                train_step(parts, update)
                parts.step_done(update, len(epoch))
        parts.ledger.read()

    updates(30)
    with garbage.kept_out():
        updates(5)
        gc.collect()
        before, young = len(gc.get_objects()), gc.get_count()[0]
        updates(200)
        grown, circles = len(gc.get_objects()) - before, gc.collect()
        assert young < 100
    assert circles < 20, "an update leaves objects in circles"
    assert grown < 50, "an update leaves objects"
