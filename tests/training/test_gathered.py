"""Whether gathered weights stay: by what fits, on the rank with least room, for all ranks alike."""

from types import SimpleNamespace

import pytest
import torch

from repsft_fast.config import Config
from repsft_fast.distributed import World, gathered_stay
from repsft_fast.memory.model_size import RESERVED
from repsft_fast.training import chunks, gathered
from repsft_fast.training.build import build, model_on_meta
from repsft_fast.training.policy import device_snapshot_bytes
from repsft_fast.training.sizes import fullest, sizes_of
from repsft_fast.training.trainer import train
from tests.helpers import ranks, runs


def settings(folder, **changes):
    return runs.settings(folder, samples=40, **{"batch__samples": 8, **changes})


def of_a_rank(world, given, rooms):
    """For the room of each rank, what it decides and says."""
    found = []
    for room in rooms:
        config = Config.of(given)
        parts = build(config, world=world)
        assert not gathered_stay(parts.model), "on CPUs they are dropped"
        parts.sizes = sizes_of(config, model_on_meta(config, None))
        why = gathered.decide(parts, room[world.rank])
        found.append((gathered_stay(parts.model), why))
    return found


def test_the_rank_with_least_room_decides_for_all(tmp_path):
    given = settings(tmp_path)
    config = Config.of(given)
    sizes = sizes_of(config, model_on_meta(config, None))
    needed = fullest(config, sizes, 2, 64, kept=True).total
    fits, small = int(needed / 0.9), int(needed / 0.95)
    rooms = [(fits, fits), (fits, small), (small, fits), (None, None)]
    left, right = ranks.run_ranks(of_a_rank, given, rooms)
    assert left == right
    assert [stay for stay, _ in left] == [True, False, False, False]
    assert "stay from row to row" in left[0][1]
    assert "keeping them would take" in left[1][1]
    assert left[3][1] is None


def asked(world, cases):
    return [gathered_stay(build(Config.of(given), world=world).model) for given in cases]


def test_a_setting_is_obeyed(tmp_path):
    cases = [
        settings(tmp_path / str(want), distributed__keep_gathered=want) for want in (True, False, "auto")
    ]
    for found in ranks.run_ranks(asked, cases):
        assert found == [True, False, False]


@pytest.mark.parametrize("room", [None, 10**12])
def test_one_rank_has_nothing_to_gather(room, tmp_path):
    parts = build(Config.of(settings(tmp_path, distributed__keep_gathered=True)))
    assert gathered.decide(parts, room) is None
    assert not gathered_stay(parts.model)


def test_what_the_process_holds_already_is_room(monkeypatch):
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda *_: (5, 80))
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda *_: 7)
    assert gathered.room_bytes(torch.device("cuda")) == 12
    assert gathered.room_bytes(torch.device("cpu")) is None


POOLS = {
    "of the mixture": {"mixture__policy": "msft", "data__validation_fraction": 0.25, "tasks": 2},
    "the best one": {"evaluate__keep": "best", "data__validation_fraction": 0.25},
    "to go back to": {"snapshot__device_bytes": 10**8, "numbers__on_nonfinite": "revert"},
}


@pytest.mark.parametrize("kind", POOLS)
def test_snapshots_of_the_gpu_are_no_room(kind, tmp_path):
    """At exactly as much as update and snapshots take they stay, and at a byte less they are dropped."""
    config = Config.of(settings(tmp_path, **POOLS[kind]))
    sizes, tasks = sizes_of(config, model_on_meta(config, None)), POOLS[kind].get("tasks", 1)
    parts = SimpleNamespace(
        sizes=sizes, row_tokens=64, num_tasks=tasks,
        model=SimpleNamespace(loss_settings=SimpleNamespace(chunk_bytes=None)),
    )  # fmt: skip
    peak = fullest(config, sizes, 2, 64, kept=True).total

    def usable(room):
        taken = device_snapshot_bytes(config, sizes.model, tasks=tasks, shards=2, room=room)
        return taken, int((room - taken) * (1 - RESERVED))

    # what snapshots take grows with the room, in whole ones: the least from which on the update fits
    least = next(room for room in range(peak, 40 * peak, 64) if usable(room)[1] >= peak)
    while usable(least - 1)[1] >= peak:
        least -= 1
    taken, _ = usable(least)
    assert taken > 0
    world = World(0, 2, 0, torch.device("cpu"))
    stay, why = gathered._decided(parts, config, world, least)
    assert stay, why
    stay, why = gathered._decided(parts, config, world, least - 1)
    assert not stay
    assert "keeping them would take" in why


class TestAfterAResumption:
    """What a run took over may be longer rows or other chunks than this process would have decided for."""

    @pytest.fixture
    def asked(self, monkeypatch):
        """(tokens of a row, bytes of a chunk) at each decision. Two processes decide otherwise about both."""
        seen = []

        def decide(parts, room=None):
            seen.append((parts.row_tokens, parts.model.loss_settings.chunk_bytes))
            return f"weights decided {len(seen)}"

        monkeypatch.setattr("repsft_fast.report.pictures.draw", lambda folder, **more: None)
        monkeypatch.setattr(gathered, "decide", decide)
        return seen

    def killed(self, tmp_path, monkeypatch, chunk, after, **more):
        def on_update(work):
            if work.updates == after:
                raise RuntimeError("killed")

        monkeypatch.setattr(chunks, "decide", lambda *_: chunk)
        given = settings(tmp_path, checkpoint__every_updates=2, stop__token_accuracy=None)
        with pytest.raises(RuntimeError, match="killed"):
            train(given, on_update=on_update, **more)

    @pytest.mark.parametrize("after", [1, 3], ids=["begun anew", "from a checkpoint"])
    def test_it_is_decided_for_what_the_run_took_over(self, asked, after, tmp_path, monkeypatch):
        self.killed(tmp_path, monkeypatch, 1 << 20, after)
        assert asked == [(64, 1 << 20)]
        self.killed(tmp_path, monkeypatch, 1 << 16, 4, resume=True)
        assert asked[1:] == [(64, 1 << 16), (64, 1 << 20)]
        notes = [line["text"] for line in runs.metrics(tmp_path, "note")]
        assert "--resume: weights decided 3" in notes

    def test_where_nothing_was_taken_over_it_stands(self, asked, tmp_path, monkeypatch):
        self.killed(tmp_path, monkeypatch, 1 << 20, 3)
        self.killed(tmp_path, monkeypatch, 1 << 20, 4, resume=True)
        assert len(asked) == 2, "once for each process"
