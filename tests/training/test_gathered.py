"""Whether gathered weights stay: by what fits, on the rank with least room, for all ranks alike."""

import pytest
import torch

from repsft_fast.config import Config
from repsft_fast.distributed import gathered_stay
from repsft_fast.training import gathered
from repsft_fast.training.build import build, model_on_meta
from repsft_fast.training.sizes import fullest, sizes_of
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
