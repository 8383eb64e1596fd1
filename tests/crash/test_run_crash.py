"""The crash matrix of whole runs: killed at named points and random moments, resumed until it ends, equal to
the whole run.

Named points are those of a save, and those of run_points: inside evaluations, snapshots, reverts and the end
of a run.

The oracle is the uninterrupted run: every figure of metrics.jsonl, every decision and the state hash. A kill
that did not land proves nothing, so it is counted as a failure. `pytest -m slow` makes 200 random kills, the
default run a couple of dozen beside 180 amid saves (test_checkpoint_crash).
"""

import json
import random
import time
from pathlib import Path

import pytest

from tests.helpers import run_jobs, run_points, runs

MIXTURE = {
    "samples": 36, "tasks": 3, "data__validation_fraction": 0.25, "budget__epochs": 6, "stop__token_accuracy": None,
    "optim__lr": 3e-2, "mixture__metric": "nll", "mixture__policy": "msft", "mixture__max_stages": 3,
    "mixture__rule": "paper",
}  # fmt: skip
# No memory for snapshots: they lie on disk, and the run computes what it computes with them in memory.
ON_DISK = {"snapshot__device_bytes": 0, "snapshot__pinned_bytes": 0, "snapshot__disk_bytes": "64 MiB"}
KINDS = {"plain": {"budget__epochs": 4}, "msft": MIXTURE}
POINTS = (
    "shard: before open", "shard: mid-write", "shard: before fsync", "values: after fsync", "model: before fsync",
    "manifest: before open", "manifest: after fsync", "generation: before rename", "generation: after rename",
    "generation: after fsync", "LATEST.backup: after rename", "LATEST: before open", "LATEST: after rename",
    "deletion: before rename", "deletion: after rename", "deletion: after",
)  # fmt: skip


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory):
    """Of each kind: what the uninterrupted run gives, and how many seconds it takes."""
    found = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp(kind)
        began = time.monotonic()
        outcome = server.run("tests.helpers.run_jobs:train", {"settings": settings_of(kind, folder)})
        assert outcome.exit_code == 0, outcome.output
        found[kind] = ((outcome.result, run_jobs.lines(folder / "run")), time.monotonic() - began)
    return found


def settings_of(kind, folder, **more):
    return runs.settings(folder, checkpoint__every_updates=2, **KINDS[kind], **more)


def on_disk(expected):
    """The same with snapshots on disk, which their reverts name."""
    result, lines = expected
    return result, [{**line, "tier": "disk"} if line["kind"] == "revert" else line for line in lines]


def ends_as(expected, server, settings):
    folder = settings["run"]["folder"]
    begun = Path(folder, "run.yaml").exists()
    outcome = server.run("tests.helpers.run_jobs:train", {"settings": settings, "resume": begun})
    assert outcome.exit_code == 0, outcome.output
    assert (outcome.result, run_jobs.lines(folder)) == expected
    left = [
        p.name for p in Path(folder, "checkpoints").iterdir() if p.name.startswith((".writing", ".trash"))
    ]
    assert left == [], "what the crash left behind was not cleaned up"


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_a_named_point_of_a_save(point, server, whole, tmp_path):
    settings = settings_of("plain", tmp_path)
    outcome = server.run(
        "tests.helpers.run_jobs:train", {"settings": settings, "kill_at": point, "kill_time": 3}
    )
    assert outcome.killed, f"{point} was not passed: {outcome.output}"
    ends_as(whole["plain"][0], server, settings)


@pytest.fixture(scope="module")
def passings(server, whole, tmp_path_factory):
    """How often a mixture's run passes each of run_points. Counting changes nothing, and none of them is
    without a passing."""
    folder = tmp_path_factory.mktemp("passings")
    arguments = {"settings": settings_of("msft", folder), "passings": str(folder / "passings.json")}
    outcome = server.run("tests.helpers.run_jobs:train", arguments)
    assert (outcome.result, run_jobs.lines(folder / "run")) == whole["msft"][0], outcome.output
    found = json.loads((folder / "passings.json").read_text())
    assert min(found.values()) > 0, found
    return found


def killed_at(point, time, server, expected, tmp_path, **more):
    """Kill a mixture's run at the time-th passing of the point, then let it end. more: settings."""
    settings = settings_of("msft", tmp_path, **more)
    outcome = server.run(
        "tests.helpers.run_jobs:train", {"settings": settings, "kill_at": point, "kill_time": time}
    )
    assert outcome.killed, f"{point} was not passed {time} times: {outcome.output}"
    if not Path(settings["run"]["folder"], "result.json").exists():
        ends_as(expected, server, settings)
        return
    ended = server.run("tests.helpers.run_jobs:train", {"settings": settings, "resume": True}).result
    of_the_result = {
        name: value for name, value in expected[0].items() if "hash" not in name and name != "history"
    }
    assert (ended, run_jobs.lines(settings["run"]["folder"])) == (of_the_result, expected[1])
    assert all(
        Path(settings["run"]["folder"], name).exists()
        for name in ("run.png", "timeline.json", "model.safetensors")
    )


@pytest.mark.parametrize("point", run_points.SOME)
def test_killed_inside_an_evaluation_a_snapshot_a_revert_or_the_end(point, server, whole, passings, tmp_path):
    killed_at(point, passings[point] // 2 + 1, server, whole["msft"][0], tmp_path)


@pytest.mark.parametrize("point", ["snapshot: half copied", "revert: half copied"])
def test_killed_inside_a_snapshot_on_disk(point, server, whole, passings, tmp_path):
    killed_at(point, passings[point] // 2 + 1, server, on_disk(whole["msft"][0]), tmp_path, **ON_DISK)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("point", run_points.POINTS)
def test_killed_at_every_passing_of_a_point(point, server, whole, passings, tmp_path):
    for time_ in range(1, passings[point] + 1):
        killed_at(point, time_, server, whole["msft"][0], tmp_path / str(time_))


def stopped_at(point, time, server, expected, tmp_path, **more):
    """SIGTERM at the time-th passing of the point: the run saves itself, says so, and goes on as if it had
    not come. more: settings."""
    settings = settings_of("msft", tmp_path, **more)
    outcome = server.run(
        "tests.helpers.run_jobs:train", {"settings": settings, "signal_at": point, "kill_time": time}
    )
    assert (outcome.result["code"], outcome.result["exit_code"]) == ("terminated", 143), outcome.output
    written = json.loads(Path(settings["run"]["folder"], "result.json").read_text())
    assert "SIGTERM" in written["reason"]
    assert "saved; --resume goes on from gen-" in written["reason"]
    ends_as(expected, server, settings)


def test_sigterm_inside_a_snapshot_on_disk(server, whole, passings, tmp_path):
    point = "snapshot: half copied"
    stopped_at(point, passings[point] // 2 + 1, server, on_disk(whole["msft"][0]), tmp_path, **ON_DISK)


@pytest.mark.parametrize("point", ["evaluation: between its rows", "revert: half copied"])
def test_sigterm_inside_an_evaluation_or_a_revert(point, server, whole, passings, tmp_path):
    stopped_at(point, passings[point] // 2 + 1, server, whole["msft"][0], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "point", [*run_points.EVALUATION, *run_points.SNAPSHOT, *run_points.SAVE, *run_points.REVERT]
)
def test_sigterm_at_any_point_before_the_end(point, server, whole, passings, tmp_path):
    stopped_at(point, passings[point] // 2 + 1, server, whole["msft"][0], tmp_path)


def test_sigterm_while_the_model_is_saved_lets_the_run_end(server, whole, tmp_path):
    settings = settings_of("msft", tmp_path)
    outcome = server.run(
        "tests.helpers.run_jobs:train", {"settings": settings, "signal_at": "finish: before the model"}
    )
    assert (outcome.result, run_jobs.lines(tmp_path / "run")) == whole["msft"][0], outcome.output


def killed_at_random(kind, seed, server, expected, seconds, tmp_path):
    """Kill after a random time, up to three times while it is resumed, then let it end. Returns the kills
    that landed."""
    draw = random.Random(seed)
    settings = settings_of(kind, tmp_path)
    folder = Path(settings["run"]["folder"])
    landed = 0
    for _ in range(3):
        begun = (folder / "run.yaml").exists()  # before that --resume has nothing to go on from
        child = server.spawn("tests.helpers.run_jobs:train", {"settings": settings, "resume": begun})
        time.sleep(draw.uniform(0.05, 0.9 * seconds))
        child.kill()
        outcome = child.wait(60)
        assert outcome.killed or outcome.exit_code == 0, outcome.output
        landed += outcome.killed and (folder / "run.yaml").exists()
        if (folder / "result.json").exists():
            assert run_jobs.lines(folder) == expected[1]
            return landed
    ends_as(expected, server, settings)
    return landed


@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_random_moments(kind, server, whole, tmp_path):
    expected, seconds = whole[kind]
    landed = seed = 0
    while landed < 8:
        landed += killed_at_random(kind, seed, server, expected, seconds, tmp_path / str(seed))
        seed += 1
        assert seed < 60, f"{landed} kills landed in {seed} tries"


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", KINDS)
def test_two_hundred_random_kills(kind, server, whole, tmp_path):
    expected, seconds = whole[kind]
    landed = seed = 0
    while landed < 100:
        landed += killed_at_random(kind, 1000 + seed, server, expected, seconds, tmp_path / str(seed))
        seed += 1
        assert seed < 400, f"{landed} kills landed in {seed} tries"
