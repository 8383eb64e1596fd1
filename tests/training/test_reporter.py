"""Whatever happens to what only reports, the run ends well, its model is the same bit for bit, and
result.json tells of it."""

import errno
import io
import json
import os
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest

from repsft_fast import metrics, trackers
from repsft_fast.errors import ConfigError
from repsft_fast.report import live, mixture_picture, picture, result, timeline
from repsft_fast.training import reporter, trainer
from tests.helpers import runs
from tests.helpers.ranks import run_ranks

ROOT = Path(__file__).parents[2]
WORST = [
    OSError(errno.EIO, "Input/output error"),
    KeyError("x"),
    MemoryError(),
    RecursionError("deep"),
    AssertionError(),
]


class Os:
    """The module `os` for one module of ours, in which some functions fail."""

    def __init__(self, **functions):
        self.__dict__.update(functions)

    def __getattr__(self, name):
        return getattr(os, name)


def failing(error):
    def fails(*_, **__):
        raise error

    return fails


def of_metrics(**functions):
    return lambda patch, folder: patch.setattr(metrics, "os", Os(**functions))


def now_and_then(error, short=None):
    """os.write that fails at every other call, and else takes only so many bytes."""
    calls = []

    def write(file, data):
        calls.append(file)
        if len(calls) % 2:
            raise error
        return os.write(file, data[:short])

    return write


def refused(name, how, error, *more):
    """What metrics.jsonl asks of the system under this name fails, and its words are told."""
    return of_metrics(**{name: how(error, *more)}), error.strerror


def before(updates, act):
    """act(folder) before that update, in the middle of the run."""

    def inject(patch, folder):
        train_step, done = trainer.train_step, []

        def step(*arguments):
            done.append(1)
            if len(done) == updates:
                act(folder)
            train_step(*arguments)

        patch.setattr(trainer, "train_step", step)

    return inject


def tracker(**functions):
    """A package `wandb` of which these functions are as given."""

    def inject(patch, folder):
        run = types.SimpleNamespace(
            log=functions.get("log", lambda numbers: None),
            finish=functions.get("finish", lambda: None),
            summary=types.SimpleNamespace(update=lambda values: None),
        )
        module = types.ModuleType("wandb")
        module.init = functions.get("init", lambda **_: run)
        patch.setitem(sys.modules, "wandb", module)
        patch.setattr(trackers, "START_S", 0.2)
        patch.setattr(reporter, "FINISH_S", 0.2)

    return inject


def for_ever(*_, **__):
    threading.Event().wait(60)


def stream(**functions):
    """Standard output, not a terminal, of which these functions are as given."""

    def inject(patch, folder):
        out = types.SimpleNamespace(
            **{"write": len, "flush": lambda: None, "isatty": lambda: False, "encoding": "utf-8", **functions}
        )
        patch.setattr(sys, "stdout", out)

    return inject


def terminal(**functions):
    """A terminal whose screen is as given: rich's methods."""

    def inject(patch, folder):
        from rich.live import Live as Screen

        real = live.Live
        patch.setattr(reporter, "Live", lambda enabled: real(enabled, stream=io.StringIO(), terminal=True))
        for name, function in functions.items():
            patch.setattr(Screen, name, function)

    return inject


def attribute(where, name, value):
    return lambda patch, folder: patch.setattr(where, name, value)


def in_its_place(make):
    """Something else has the picture's name before the run ends."""
    return before(2, lambda folder: make(folder / "run.png"))


def add_garbage(folder):
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(
            b'\xff\xfe{\n[1, 2]\n{"kind": "update", "update": NaN}\n'
            + b"\0" * 50
            + b"\n"
            + b"[" * 9999
            + b"\n"
        )


INJECTED = {
    "no space for metrics": refused("write", failing, OSError(28, "No space left on device")),
    "quota now and then": refused("write", now_and_then, OSError(122, "Disk quota exceeded")),
    "short writes and EIO": refused("write", now_and_then, OSError(5, "Input/output error"), 7),
    "stale NFS": refused("write", now_and_then, OSError(errno.ESTALE, "Stale file handle"), 9),
    "metrics cannot be opened": refused("open", failing, PermissionError(13, "Permission denied")),
    "metrics cannot be closed": (
        of_metrics(close=failing(OSError(122, "Disk quota exceeded"))),
        "is not all there",
    ),
    "metrics removed": (
        before(2, lambda folder: (folder / "metrics.jsonl").unlink()),
        "metrics.jsonl: is not all there",
    ),
    "metrics spoilt": (before(2, add_garbage), ""),
    "a NaN for metrics": (
        attribute(reporter, "_finite", lambda value: float("nan")),
        "has no JSON of its own",
    ),
    "no summary": (
        attribute(reporter, "summarise", failing(ZeroDivisionError("x"))),
        "metrics.jsonl: ZeroDivisionError: x",
    ),
    "no memory figure": (
        attribute(reporter, "peak_memory_bytes", failing(RuntimeError("y"))),
        "throughput: RuntimeError: y",
    ),
    "a pipe without reader": (
        stream(write=failing(BrokenPipeError(32, "Broken pipe"))),
        "nothing any more (Broken pipe)",
    ),
    "a closed stream": (stream(write=failing(ValueError("I/O operation on closed file."))), "on closed file"),
    "a stream of nothing": (attribute(sys, "stdout", None), ""),
    "no answer whether a terminal": (stream(isatty=failing(ValueError("closed"))), ""),
    "a live line that breaks": (
        attribute(live.Live, "update", failing(KeyError("z"))),
        "the live line: KeyError: 'z'",
    ),
    "no last line": (attribute(live.Live, "end", failing(TypeError("w"))), "the live line: TypeError: w"),
    "a screen that does not open": (
        terminal(start=failing(OSError(5, "EIO"))),
        "the live line: OSError: [Errno 5] EIO",
    ),
    "a screen that does not close": (terminal(stop=failing(OSError(5, "EIO"))), ""),
    "a screen that does not show": (
        terminal(update=failing(ValueError("v"))),
        "the live line: ValueError: v",
    ),
    "tracker: no start": (
        tracker(init=failing(OSError("no network"))),
        "wandb is switched off (OSError: no network)",
    ),
    "tracker: starts for ever": (tracker(init=for_ever), "wandb has not started within 0.2 s"),
    "tracker: exits": (tracker(log=lambda numbers: sys.exit(3)), "wandb is switched off (SystemExit: 3)"),
    "tracker: logs for ever": (tracker(log=for_ever), "wandb has not ended within 0.2 s"),
    "tracker: no end": (
        tracker(finish=failing(ConnectionError("gone"))),
        "wandb is switched off (ConnectionError: gone)",
    ),
    "no matplotlib": (
        lambda patch, folder: patch.setitem(sys.modules, "matplotlib.figure", None),
        "the picture of the run",
    ),
    "no file for the picture": (
        attribute(picture, "write_whole", failing(OSError(28, "No space left"))),
        "No space left",
    ),
    "a folder at its place": (in_its_place(Path.mkdir), "run.png: is a link or no file"),
    "a link at its place": (
        in_its_place(lambda path: path.symlink_to("/etc/passwd")),
        "run.png: is a link or no file",
    ),
    **{
        f"drawing: {error!r}": (attribute(picture, "_figure", failing(error)), type(error).__name__)
        for error in WORST
    },
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return settle(tmp_path_factory.mktemp("undisturbed"))


def settle(folder, **changes):
    """(the model's bytes, result.json, the numbers of the updates in metrics.jsonl) of a run that ended
    well."""
    made = runs.settings(folder, samples=8, budget__epochs=2, log__every_updates=1, **changes)
    found = trainer.train(made)
    assert found.exit_code == 0
    told = json.loads((folder / "run" / "result.json").read_text())
    assert told["success"] is True
    assert result.read(folder / "run").updates == 4
    return (folder / "run" / "model.safetensors").read_bytes(), told


def updates(folder):
    lines = (folder / "run" / "metrics.jsonl").read_bytes().split(b"\n")
    assert lines.pop() == b""
    return [record["update"] for record in map(json.loads, filter(None, lines)) if record["kind"] == "update"]


@pytest.mark.parametrize("name", INJECTED)
def test_it_is_told_and_the_run_is_the_same(tmp_path, monkeypatch, undisturbed, name):
    inject, words = INJECTED[name]
    if not name.startswith(("no matplotlib", "no file", "a folder", "a link", "drawing", "metrics spoilt")):
        monkeypatch.setattr(picture, "draw", lambda folder: None)  # which is most of such a run
    inject(monkeypatch, tmp_path / "run")
    model, told = settle(tmp_path, **({"log__trackers": ["wandb"]} if name.startswith("tracker") else {}))
    monkeypatch.undo()
    assert model == undisturbed[0]
    troubles = told["more"]["troubles"]
    assert any(words in trouble for trouble in troubles) if words else troubles == [], troubles
    if name in ("quota now and then", "a pipe without reader", "tracker: logs for ever"):
        assert updates(tmp_path) == [1, 2, 3, 4]
    if name == "short writes and EIO":
        assert updates(tmp_path) == [1, 2, 3, 4], "no line is torn"
    if name == "no space for metrics":
        assert any("lines of metrics.jsonl could not be written" in trouble for trouble in troubles)
        assert updates(tmp_path) == []
    if name.startswith("a folder") or name.startswith("a link"):
        assert Path("/etc/passwd").read_bytes()[:4] != b"\x89PNG"
    else:
        assert not (tmp_path / "run" / "run.png").is_symlink()


def test_an_undisturbed_run_has_no_trouble(undisturbed):
    assert undisturbed[1]["more"]["troubles"] == []


@pytest.mark.parametrize(
    "inject",
    [
        attribute(timeline, "build", failing(KeyError("moment"))),
        attribute(mixture_picture, "draw", failing(ValueError("too large"))),
        attribute(live.Live, "mixture", failing(KeyError("metric"))),
    ],
)
def test_a_mixtures_reports_end_it_no_more_than_others(tmp_path, monkeypatch, inject):
    inject(monkeypatch, tmp_path)
    mixture = {"mixture__policy": "msft", "mixture__metric": "token_accuracy", "mixture__max_stages": 1}
    found = trainer.train(
        runs.settings(tmp_path, samples=24, tasks=2, data__validation_fraction=0.3, **mixture)
    )
    assert found.exit_code == 0
    assert (
        found.more["troubles"]
        or json.loads((tmp_path / "run" / "result.json").read_text())["more"]["troubles"]
    )


def test_what_goes_wrong_in_ever_new_words_is_bounded():
    one = reporter.Reporter.__new__(reporter.Reporter)
    one._troubles, one._telling, one.lines = reporter.Counter(), True, metrics.JsonLines(None)
    for number in range(10 * reporter.MOST_TROUBLES):
        one.trouble(f"trouble {number}")
    assert len(one.troubles) == reporter.MOST_TROUBLES + 1
    assert one.troubles[-1] == "and others (450 times)"


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_who_ends_the_program_is_obeyed(stop):
    one = reporter.Reporter.__new__(reporter.Reporter)
    with pytest.raises(stop), one.only_reports("a picture"):
        raise stop


def test_a_reader_that_leaves_does_not_end_the_run_nor_change_its_exit_code(tmp_path, undisturbed):
    made = runs.settings(tmp_path, samples=8, budget__epochs=2, log__every_updates=1)
    (tmp_path / "run.json").write_text(json.dumps(made))
    train = f"{sys.executable} -m repsft_fast train --config {tmp_path / 'run.json'}"
    shell = f"{train} 2>{tmp_path / 'err'} | head -n 1; exit ${{PIPESTATUS[0]}}"
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        ["bash", "-c", shell], cwd=ROOT, env=buffered, capture_output=True, text=True, timeout=240
    )
    assert (done.returncode, len(done.stdout.splitlines()), (tmp_path / "err").read_text()) == (0, 1, "")
    told = json.loads((tmp_path / "run" / "result.json").read_text())
    assert told["more"]["troubles"] == ["standard output takes nothing any more (Broken pipe)"]
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == undisturbed[0]


def start_reporter(world, folder):
    """What this rank is told when wandb is asked for and is not there."""
    sys.modules["wandb"] = None
    config = types.SimpleNamespace(log=types.SimpleNamespace(trackers=["wandb"]), to_dict=dict)
    try:
        reporter.Reporter(types.SimpleNamespace(world=world, folder=Path(folder), config=config))
    except ConfigError as error:
        return str(error)
    return "no error"


def test_a_tracker_that_is_missing_is_refused_on_every_rank(tmp_path):
    first, second = run_ranks(start_reporter, str(tmp_path))
    assert "pip install wandb" in first
    assert "pip install wandb" in second
