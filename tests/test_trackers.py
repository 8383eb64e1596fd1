"""Trackers: none unless asked for, missing ones told before the run, broken ones switched off during it."""

import sys
import threading
import time
import types
from functools import partial

import pytest

from repsft_fast import trackers
from repsft_fast.config.reference import settings
from repsft_fast.errors import ConfigError
from repsft_fast.trackers import Trackers, flat_numbers

RECORD = {
    "kind": "update",
    "update": 7,
    "loss": 0.5,
    "tasks": {"a": {"loss": 0.25}},
    "lr": None,
    "note": "x",
    "nan": float("nan"),
}


@pytest.fixture
def fake(monkeypatch):
    """A package `wandb` and one `trackio` that note what they are given."""
    told = []

    def run(name):
        return types.SimpleNamespace(
            log=lambda numbers: told.append((name, numbers)),
            finish=lambda: told.append((name, "finished")),
            summary=types.SimpleNamespace(update=lambda values: told.append((name, values))),
        )

    for name in ("wandb", "trackio"):
        module = types.ModuleType(name)
        module.init = partial(
            lambda package, /, **settings: (told.append((package, settings)), run(package))[1], name
        )
        monkeypatch.setitem(sys.modules, name, module)
    return told


def test_none_asked_for_none_imported(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers.importlib, "import_module", pytest.fail)
    none = Trackers([], tmp_path, {})
    none.log(RECORD)
    none.finish({})


def test_the_settings_name_those_that_there_are():
    for name in trackers.PACKAGES:
        assert f"`{name}`" in settings()["log.trackers"].kind
    assert settings()["log.trackers"].kind.count("`") == 2 * len(trackers.PACKAGES)
    assert set(trackers._MAKERS) == set(trackers.PACKAGES)


def test_every_missing_package_is_told_with_what_to_install(tmp_path, monkeypatch):
    for name in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError) as caught:
        Trackers(["wandb", "trackio", "mlflow"], tmp_path, {})
    first, second, third = caught.value.problems
    assert "pip install wandb" in first
    assert "pip install trackio" in second
    assert "mlflow" in third


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_they_get_the_numbers_and_the_settings(tmp_path, fake, name):
    one = Trackers([name], tmp_path / "myrun", {"optim": {"lr": 1}})
    one.log(RECORD)
    one.log({"kind": "note", "text": "no numbers"})
    one.finish({"code": "budget"})
    (_, settings), (_, numbers), *rest = fake
    assert (settings["name"], settings["config"]) == ("myrun", {"optim": {"lr": 1}})
    assert numbers == {"update/loss": 0.5, "update/tasks/a/loss": 0.25, "update": 7}
    assert rest[-1] == (name, "finished")


def test_tensorboard_writes_what_its_reader_reads(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    one = Trackers(["tensorboard"], tmp_path, {})
    one.log(RECORD)
    one.log({**RECORD, "update": 8, "loss": 0.125})
    one.finish({})
    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert [(event.step, event.value) for event in read.Scalars("update/loss")] == [(7, 0.5), (8, 0.125)]
    assert [event.value for event in read.Scalars("update/tasks/a/loss")] == [0.25, 0.25]


def test_a_tracker_that_breaks_is_switched_off_and_said_once(tmp_path, fake, monkeypatch):
    notes = []
    one = Trackers(["wandb", "trackio"], tmp_path, {}, note=notes.append)

    def broken(*_):
        raise ConnectionError("server gone")

    monkeypatch.setattr(one._open["wandb"].tracker._run, "log", broken)
    for _ in range(3):
        one.log(RECORD)
    one.finish({})
    assert len(notes) == 1
    assert "wandb is switched off (ConnectionError: server gone)" in notes[0]
    assert sum(name == "trackio" and isinstance(what, dict) and "update" in what for name, what in fake) == 3
    assert ("wandb", "finished") not in fake


def test_a_tracker_that_cannot_start_does_not_end_the_run(tmp_path, fake, monkeypatch):
    def broken(**_):
        raise OSError("no network")

    monkeypatch.setattr(sys.modules["wandb"], "init", broken)
    notes = []
    Trackers(["wandb"], tmp_path, {}, note=notes.append).log(RECORD)
    assert len(notes) == 1


def test_flat_numbers():
    assert flat_numbers({"a": 1, "b": {"c": 2.5, "d": True}, "e": None, "f": "x", "g": float("inf")}) == [
        ("a", 1),
        ("b/c", 2.5),
    ]


class TestOneThatStandsStill:
    @pytest.fixture
    def stuck(self, fake, monkeypatch):
        """wandb whose `log` takes one record and then stands still until `stuck` is set."""
        go = threading.Event()
        monkeypatch.setattr(trackers, "START_S", 0.2)
        init = sys.modules["wandb"].init

        def slow(**settings):
            run = init(**settings)
            log = run.log
            run.log = lambda numbers: (log(numbers), go.wait(30))
            return run

        monkeypatch.setattr(sys.modules["wandb"], "init", slow)
        yield go
        go.set()

    def test_holds_no_update_up_and_the_others_get_all(self, tmp_path, fake, stuck, monkeypatch):
        monkeypatch.setattr(trackers, "MOST_WAITING", 3)
        notes, started = [], time.monotonic()
        one = Trackers(["wandb", "trackio"], tmp_path, {}, note=notes.append)
        for number in range(20):
            one.log({**RECORD, "loss": float(number)})
            time.sleep(0.002)  # trackio's thread has its turn
        one.finish({}, 0.2)
        assert time.monotonic() - started < 5
        assert [text.split(";")[0] for text in notes] == [
            "log.trackers: wandb does not keep up",
            "log.trackers: wandb has not ended within 0.2 s",
        ]
        kept = [
            what["update/loss"]
            for name, what in fake
            if name == "trackio" and isinstance(what, dict) and "update" in what
        ]
        assert kept == [float(number) for number in range(20)]

    def test_that_only_was_slow_gets_all_before_it_ends(self, tmp_path, fake, stuck):
        notes = []
        one = Trackers(["wandb"], tmp_path, {}, note=notes.append)
        for _ in range(5):
            one.log(RECORD)
        threading.Timer(0.2, stuck.set).start()
        one.finish({"code": "budget"}, 5.0)
        assert notes == []
        assert sum(isinstance(what, dict) and "update" in what for _, what in fake) == 5
        assert fake[-1] == ("wandb", "finished")

    def test_at_its_start_is_said_and_gets_all_once_it_starts(self, tmp_path, fake, monkeypatch):
        go, init = threading.Event(), sys.modules["wandb"].init
        monkeypatch.setattr(trackers, "START_S", 0.1)
        monkeypatch.setattr(
            sys.modules["wandb"], "init", lambda **settings: (go.wait(30), init(**settings))[1]
        )
        notes = []
        one = Trackers(["wandb"], tmp_path, {}, note=notes.append)
        one.log(RECORD)
        go.set()
        one.finish({}, 5.0)
        assert notes == [
            "log.trackers: wandb has not started within 0.1 s; the run goes on, and tells it when it does"
        ]
        assert sum(isinstance(what, dict) and "update" in what for _, what in fake) == 1


@pytest.mark.parametrize(
    "error", [SystemExit(3), KeyboardInterrupt(), MemoryError(), RuntimeError("x" * 10_000)]
)
def test_whatever_it_raises_is_a_note_of_some_words(tmp_path, fake, monkeypatch, error):
    def leaves(**_):
        raise error

    monkeypatch.setattr(sys.modules["wandb"], "init", leaves)
    notes = []
    one = Trackers(["wandb"], tmp_path, {}, note=notes.append)
    one.log(RECORD)
    one.finish({})
    assert len(notes) == 1
    assert f"wandb is switched off ({type(error).__name__}: " in notes[0]
    assert len(notes[0]) < 700


def test_a_package_that_is_there_and_broken_is_refused_as_one_that_is_not(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    (tmp_path / "trackio.py").write_text("raise TypeError('descriptors cannot be created directly')")
    with pytest.raises(
        ConfigError, match=r"trackio cannot be imported .descriptors cannot be created directly"
    ):
        Trackers(["trackio"], tmp_path, {})
