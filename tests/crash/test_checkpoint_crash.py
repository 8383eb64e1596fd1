"""kill -9 at every named moment and at random ones: what resumes is a known state, and nothing whole is ever
lost."""

import random
import socket
import time

import pytest
import torch

from repsft_fast import checkpoint
from repsft_fast.checkpoint.writer import leftovers
from repsft_fast.errors import CheckpointError
from tests.helpers.checkpoint_jobs import save_next, state
from tests.helpers.forkserver import ForkServer

SAVES = 2


def loaded(folder, numel=3000):
    """The number of the state that resumes, after comparing it to the state of that number."""
    live = {name: torch.zeros_like(t) for name, t in state(0, numel).items()}
    n = checkpoint.resume(folder, live).values["n"]
    assert all(torch.equal(t, live[name]) for name, t in state(n, numel).items())
    assert not checkpoint.verify(checkpoint.newest(folder).path)
    return n


def expected(points):
    """The state that must resume after these crash points were passed: LATEST's rename is the moment of
    truth.

    Before there is any LATEST, a renamed generation serves already.
    """
    moved = points.count("LATEST: after rename")
    return moved - 1 if moved else 0 if "generation: after rename" in points else None


@pytest.fixture(scope="session")
def server():
    started = ForkServer(preload=["torch", "tests.helpers.checkpoint_jobs"])
    yield started
    started.close()


@pytest.fixture(scope="session")
def points(server, tmp_path_factory):
    outcome = server.run(
        "tests.helpers.checkpoint_jobs:save_some",
        {"folder": str(tmp_path_factory.mktemp("points")), "saves": SAVES},
    )
    assert outcome.exit_code == 0, outcome.output
    return outcome.result


def test_the_named_points_cover_every_kind_of_moment(points):
    for what in ("shard", "values", "part", "manifest", "LATEST", "LATEST.backup"):
        for moment in ("before open", "mid-write", "before fsync", "after fsync"):
            assert points.count(f"{what}: {moment}") >= SAVES, (what, moment)
    assert {"generation: before rename", "generation: after rename", "model: before fsync"} <= set(points)
    assert points.count("deletion: after") == SAVES - 1


def test_a_kill_at_every_named_point(server, points, tmp_path):
    for i in range(len(points)):
        folder = tmp_path / str(i)
        outcome = server.run(
            "tests.helpers.checkpoint_jobs:save_some", {"folder": str(folder), "saves": SAVES, "kill_at": i}
        )
        assert outcome.killed, (points[i], outcome)
        n = expected(points[: i + 1])
        if n is None:
            with pytest.raises(CheckpointError, match="holds no whole checkpoint"):
                checkpoint.newest(folder)
        else:
            assert loaded(folder) == n, points[i]
        assert save_next(folder) == (0 if n is None else n + 1)  # and the run goes on
        assert loaded(folder) == (0 if n is None else n + 1)
        assert list(leftovers(folder)) == []


def kill_at_random(server, folder, kills, seed):
    """Kills a run again and again; returns the last state. Only kills in the middle of a save are counted."""
    rng, numel, last, amid = random.Random(seed), 200_000, -1, 0
    while amid < kills:
        child = server.spawn(
            "tests.helpers.checkpoint_jobs:save_forever", {"folder": str(folder), "numel": numel}
        )
        time.sleep(rng.uniform(0.005, 0.15))
        child.kill()
        assert child.wait().killed
        amid += bool(list(leftovers(folder)))
        if checkpoint.generations(folder):
            n = loaded(folder, numel)
            assert n >= last, "a whole generation was lost"
            last = n
    return last


@pytest.mark.parametrize("seed", [11, 12])
def test_kills_at_random_moments(server, tmp_path, seed):
    assert kill_at_random(server, tmp_path / "run", kills=45, seed=seed) > 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_many_kills_at_random_moments(server, tmp_path, seed):
    assert kill_at_random(server, tmp_path / "run", kills=100, seed=seed) > 0


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_killed_mid_save_costs_nothing(server, tmp_path, rank):
    """Rank 0 waits a bounded time for a dead rank and fails cleanly; a dead rank 0 leaves only what `clean`
    removes."""
    passed = [
        server.spawn(
            "tests.helpers.checkpoint_jobs:save_as_rank",
            {"folder": str(tmp_path / "all"), "rank": r, "world_size": 2},
        )
        for r in (1, 0)
    ]
    whole = [child.wait() for child in passed]
    assert [o.exit_code for o in whole] == [0, 0], whole
    count = len(whole[1 - rank].result)
    assert count >= 12
    for kill_at in range(0, count, 3):
        folder = tmp_path / f"{rank}-{kill_at}"
        checkpoint.save(folder, 0, {"w": state(0)["w"]}, {"n": 0})
        job = {"folder": str(folder), "world_size": 2}
        children = [
            server.spawn(
                "tests.helpers.checkpoint_jobs:save_as_rank",
                {**job, "rank": r, "kill_at": kill_at if r == rank else None},
            )
            for r in (1, 0)
        ]
        outcomes = {r: child.wait() for r, child in zip((1, 0), children)}
        assert outcomes[rank].killed
        live = {"w": torch.zeros(3000)}
        n = checkpoint.resume(folder, live).values["n"]
        assert torch.equal(live["w"], state(n)["w"])
        done = whole[1 - rank].result[: kill_at + 1]
        assert n == int(
            "LATEST: after rename" in done or (rank == 1 and done[-1] == "part: after fsync" and n == 1)
        )
        if rank == 1 and n == 0:
            assert outcomes[0].exit_code == 1
            assert "waited 1 s for the parts of ranks [1]" in outcomes[0].output
            assert list(leftovers(folder)) == []
        checkpoint.clean(folder)
        assert list(leftovers(folder)) == []


def test_dtensors_of_two_ranks(server, tmp_path):
    """FSDP2 shards over gloo: frozen, saved, loaded and reverted by each rank without communication, then
    read by one rank."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    job = {"folder": str(tmp_path), "world_size": 2, "port": port}
    outcomes = [
        c.wait()
        for c in [
            server.spawn("tests.helpers.checkpoint_jobs:dtensor_rank", {**job, "rank": r}) for r in range(2)
        ]
    ]
    for rank, outcome in enumerate(outcomes):
        assert outcome.exit_code == 0, outcome.output
        assert outcome.result == {
            "restored": True,
            "reverted": True,
            "values": {"rank": rank},
            "resharded": False,
        }
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3))
    live = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    assert checkpoint.resume(tmp_path, live).resharded
    assert all(torch.equal(live[name], p) for name, p in model.named_parameters())
