"""Random kills of whole runs on two ranks: one rank or both, at a random moment, resumed until the run ends
as the whole one.

A kill counts only when it landed: the process died of SIGKILL while the run's folder held a run and no
result. `pytest -m slow` makes 100 of them; with the 200 of test_run_crash that is the soak of issue 5.
"""

import json
import random
import re
import time
from pathlib import Path

import pytest

from tests.helpers import run_jobs, runs
from tests.helpers.ranks import _free_port

MEETING_S = 15.0  # they are started together: a rank that has not come by then was killed before it could
ENDS_S = 30.0  # the survivor of a kill at any moment
CHANGES = {"budget__epochs": 4, "checkpoint__every_updates": 2, "stop__token_accuracy": None}


def start(server, settings, resume):
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    arguments = {"settings": settings, "resume": resume, "meeting_s": MEETING_S}
    ranks = [{**place, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    return [server.spawn("tests.helpers.rank_jobs:train", arguments, environment) for environment in ranks]


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory):
    """What the uninterrupted run computed, and how many seconds it took."""
    folder = tmp_path_factory.mktemp("whole")
    began = time.monotonic()
    outcomes = [child.wait(90) for child in start(server, runs.settings(folder, **CHANGES), False)]
    assert [o.exit_code for o in outcomes] == [0, 0], outcomes[0].output + outcomes[1].output
    return (outcomes[0].result, run_jobs.lines(folder / "run")), time.monotonic() - began


def ended(folder):
    """Whether the run is over; a survivor of a lost rank leaves a result too, which says that it failed."""
    result = folder / "result.json"
    return result.exists() and json.loads(result.read_text())["success"]


def left_alone(child, dead, folder):
    """The survivor ends by itself, and where the run has not ended it says whose end was the reason."""
    outcome = child.wait(ENDS_S)
    if not ended(folder):
        assert outcome.exit_code == 1, outcome.output
        assert re.search(rf"rank {dead} (is gone|had come and is gone|has not come)", outcome.output), (
            outcome.output
        )


class Reach:
    """How late kills are drawn: a run is as long as the machine is busy, and that changes while a hundred are
    killed."""

    def __init__(self, seconds):
        self.seconds = seconds

    def learn(self, late):
        """One kill in six comes late when this is in balance: the end of a run is reached too."""
        self.seconds *= 0.8 if late else 1.05


def killed_and_resumed(server, expected, reach, draw, tmp_path):
    """Up to three kills of one run, then its end. Returns how many landed."""
    settings = runs.settings(tmp_path, **CHANGES)
    folder = Path(settings["run"]["folder"])
    landed = 0
    for _ in range(3):
        children = start(server, settings, (folder / "run.yaml").exists())
        time.sleep(draw.uniform(0.05, max(0.5, 0.9 * reach.seconds)))
        reach.learn(late=ended(folder))
        alive = (folder / "run.yaml").exists() and not ended(folder)
        victims = draw.choice(([0], [1], [0, 1]))
        for rank in victims:
            children[rank].kill()
        landed += alive and all(children[rank].wait(30).killed for rank in victims)
        for rank in {0, 1} - set(victims):
            left_alone(children[rank], victims[0], folder)
        if ended(folder):  # before the kill, or rank 0 had written its result when the other was killed
            assert run_jobs.lines(folder) == expected[1]
            return landed
    outcomes = [child.wait(90) for child in start(server, settings, (folder / "run.yaml").exists())]
    assert [o.exit_code for o in outcomes] == [0, 0], outcomes[0].output + outcomes[1].output
    assert (outcomes[0].result, run_jobs.lines(folder)) == expected
    left = [
        p.name for p in Path(folder, "checkpoints").iterdir() if p.name.startswith((".writing", ".trash"))
    ]
    assert left == []
    return landed


def kill_until(server, whole, kills, seed, tmp_path):
    (expected, seconds), draw = whole, random.Random(seed)
    reach, landed, tries = Reach(seconds), 0, 0
    while landed < kills:
        landed += killed_and_resumed(server, expected, reach, draw, tmp_path / str(tries))
        tries += 1
        assert tries < 10 * kills, f"{landed} kills landed in {tries} tries"
    print(f"{landed} kills landed in {tries} runs")
    return landed


def test_killed_at_random_moments_on_two_ranks(server, whole, tmp_path):
    assert kill_until(server, whole, 3, 1, tmp_path) >= 3


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_hundred_random_kills_on_two_ranks(server, whole, tmp_path):
    assert kill_until(server, whole, 100, 2, tmp_path) >= 100
