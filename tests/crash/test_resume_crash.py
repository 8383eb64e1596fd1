"""Kills over every kind of --resume: of runs that had ended or not, were moved, lost their model, got a
larger budget.

A story is drawn from a seed: a run with a small budget, ended or killed, then some steps, each killed at a
random moment or at a named point of a save and made again; at last it ends undisturbed. The oracle is the run
that had the last budget from the start. A kill that did not land is not counted.
"""

import json
import random
import time
from pathlib import Path

import pytest

from tests.crash.test_run_crash import POINTS
from tests.helpers import run_jobs, runs

KINDS = {
    "wsd": {},
    "constant": {"schedule__name": "constant"},
    "adapters": {"model__lora": {"rank": 4, "dropout": 0.2}},
}
EPOCHS = (2, 3, 5)  # the budgets of a story
STEPS = ("raise", "move", "lose the model", "lose the result", "again")


def settings_of(kind, folder, epochs):
    common = {"stop__token_accuracy": None, "optim__warmup_updates": 1, "checkpoint__every_updates": 2}
    return runs.settings(folder, **common, **KINDS[kind], budget__epochs=epochs)


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory):
    """By kind and budget: what the run that had it all along gives. And seconds of the longest."""
    found, seconds = {}, 0.0
    for kind in KINDS:
        for epochs in EPOCHS:
            folder = tmp_path_factory.mktemp("whole")
            began = time.monotonic()
            outcome = server.run(
                "tests.helpers.run_jobs:train", {"settings": settings_of(kind, folder, epochs)}
            )
            assert outcome.exit_code == 0, outcome.output
            found[kind, epochs] = outcome.result, computed(folder / "run"), model(folder / "run")
            seconds = max(seconds, time.monotonic() - began)
    return found, seconds


def computed(folder):
    """Without ends that were taken back, and without when counters were read."""
    lines = run_jobs.lines(folder)
    kept = [line for n, line in enumerate(lines) if line.get("decision") != "stop" or n == len(lines) - 1]
    return [{k: v for k, v in line.items() if k != "epoch"} for line in kept]


def model(folder):
    name = (
        "adapter_model.safetensors"
        if (folder / "adapter_model.safetensors").exists()
        else "model.safetensors"
    )
    return (folder / name).read_bytes()


def story(seed, server, whole, tmp_path):
    """Live through one. Returns the kills that landed."""
    expected, seconds = whole
    draw = random.Random(seed)
    kind, at = draw.choice(list(KINDS)), 0
    tmp_path.mkdir()
    settings = settings_of(kind, tmp_path, EPOCHS[at])
    folder, landed = tmp_path / "run", attempt(server, settings, draw, seconds)
    for number, step in enumerate(draw.choices(STEPS, k=4)):
        if (
            step == "raise"
            and at + 1 < len(EPOCHS)
            and (folder / "run.yaml").exists()
            and has_checkpoint(folder)
        ):
            at += 1
            settings["budget"] = {"epochs": EPOCHS[at]}
        elif step == "move" and folder.exists():
            moved = tmp_path / f"moved{number}"
            folder.rename(moved)
            folder, settings["run"]["folder"] = moved, str(moved)
        elif step == "lose the model":
            (folder / "model.safetensors").unlink(missing_ok=True)
        elif step == "lose the result" and has_checkpoint(folder):
            (folder / "result.json").unlink(missing_ok=True)
        landed += attempt(server, settings, draw, seconds)
    outcome = server.run(
        "tests.helpers.run_jobs:train", {"settings": settings, "resume": (folder / "run.yaml").exists()}
    )
    assert outcome.exit_code == 0, outcome.output
    result, lines, weights = expected[kind, EPOCHS[at]]
    assert computed(folder) == lines
    assert model(folder) == weights
    for name in outcome.result:  # of a run that had ended nothing but its result is told
        assert outcome.result[name] == result[name], name
    written = json.loads((folder / "result.json").read_text())
    assert written["success"]
    assert written["updates"] == result["updates"]
    return landed


def has_checkpoint(folder):
    return (folder / "checkpoints" / "LATEST").exists()


def attempt(server, settings, draw, seconds):
    """One process, killed at a random moment, at a named point, or left to end. Whether a kill landed."""
    folder = Path(settings["run"]["folder"])
    arguments = {"settings": settings, "resume": (folder / "run.yaml").exists()}
    how = draw.choice(("moment", "moment", "point", "end"))
    if how == "point":
        arguments |= {"kill_at": draw.choice(POINTS), "kill_time": draw.randint(1, 3)}
    child = server.spawn("tests.helpers.run_jobs:train", arguments)
    if how == "moment":
        time.sleep(draw.uniform(0.05, seconds))
        child.kill()
    outcome = child.wait(60)
    assert outcome.killed or outcome.exit_code == 0, outcome.output
    return bool(outcome.killed and folder.exists())


def live(server, whole, tmp_path, kills, first):
    landed = seed = 0
    while landed < kills:
        landed += story(first + seed, server, whole, tmp_path / str(seed))
        seed += 1
        assert seed < 10 * kills, f"{landed} kills landed in {seed} stories"


@pytest.mark.timeout(300)
def test_killed_over_every_kind_of_resume(server, whole, tmp_path):
    live(server, whole, tmp_path, 6, first=0)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_hundred_kills_over_every_kind_of_resume(server, whole, tmp_path):
    live(server, whole, tmp_path, 100, first=1000)
