"""Law 4: a run with snapshots equals one without, bit for bit. Here: pool and state, on a small model with
dropout."""

import pytest

from repsft_fast.snapshot import SnapshotPool
from tests.helpers.toy_state import Toy

GIB = 1 << 30


@pytest.mark.parametrize("tier", ["device", "disk"])
@pytest.mark.parametrize("every", [1, 3])
def test_a_run_with_snapshots_equals_one_without(tier, every, tmp_path):
    plain = Toy()
    plain.step(12)
    toy = Toy()
    budgets = {
        "device_bytes": GIB if tier == "device" else 0,
        "pinned_bytes": 0,
        "disk_bytes": GIB,
        "disk_folder": tmp_path,
    }
    pool = SnapshotPool(toy.state.tensors(), keep=3, **budgets)
    for update in range(12):
        if update % every == 0:
            name = f"update {update}"
            pool.take(name, toy.state.values())
            assert pool.tier(name) == tier
            pool.hold(name)
            pool.unhold(name)
            for old in pool.names()[:-2]:
                pool.release(old)
        toy.step()
    assert toy.losses == plain.losses
    assert toy.state.hash() == plain.state.hash()
    toy.state.check()
    pool.close()
