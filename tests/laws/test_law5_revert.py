"""Law 5: snapshot, run on, revert, run again gives the same losses and the same state hash, bit for bit, from
every tier."""

import pytest

from repsft_fast.errors import SnapshotError
from repsft_fast.snapshot import SnapshotPool
from repsft_fast.state import RunState
from tests.helpers.toy_state import Toy

GIB = 1 << 30


def pool_for(toy, tier, folder):
    one = SnapshotPool(toy.state.tensors(), device_bytes=GIB, pinned_bytes=0, keep=1).bytes_each
    device = {"device": GIB, "moved to disk": one, "disk": 0}[tier]
    return SnapshotPool(
        toy.state.tensors(), device_bytes=device, pinned_bytes=0, disk_bytes=GIB, disk_folder=folder, keep=3
    )


@pytest.mark.parametrize("tier", ["device", "moved to disk", "disk"])
@pytest.mark.parametrize("at", [0, 5])
def test_a_revert_is_as_if_one_had_never_left(tier, at, tmp_path):
    toy = Toy()
    toy.step(at)
    pool = pool_for(toy, tier, tmp_path)
    start = toy.state.hash()
    pool.take("here", toy.state.values())
    first, end = toy.step(6), toy.state.hash()
    pool.take("end", toy.state.values())
    for stored in pool._tiers.stored:
        pool._tiers.finish(stored)
    assert (pool.tier("here") == "disk") == (tier != "device")
    for _ in range(2):  # twice to the same one
        toy.step(2)
        toy.restore(pool, "here")
        assert toy.state.hash() == start
        assert toy.step(6) == first
        assert toy.state.hash() == end
    toy.restore(pool, "here")
    toy.restore(pool, "end")
    assert toy.state.hash() == end
    toy.state.check()
    pool.close()


@pytest.mark.parametrize("drop", [*sorted(Toy().state.tensors()), "update", "losses", "rng/torch"])
def test_every_item_of_the_closed_list_is_needed(drop):
    """The mutation test: without any one item the run after a revert is another run, or its hash is."""
    toy = Toy()
    toy.step(3)
    reduced = RunState()
    for name, tensor in toy.state.tensors().items():
        if name != drop:
            reduced.add_tensor(name, tensor)
    for name, (get, put) in toy.state._values.items():
        if name != drop:
            reduced.add_value(name, get, put)
    pool = SnapshotPool(reduced.tensors(), device_bytes=GIB, pinned_bytes=0, keep=1)
    pool.take("here", reduced.values())
    first = (toy.step(4), toy.state.hash())
    reduced.load_values(pool.restore("here"))
    assert (toy.step(4), toy.state.hash()) != first


def test_in_the_middle_of_an_update_a_take_is_refused_and_a_revert_drops_the_gradients():
    toy = Toy()
    pool = pool_for(toy, "device", None)
    pool.take("here", toy.state.values())
    toy.step(2)
    toy.model(toy.model[0].weight).sum().backward()
    with pytest.raises(SnapshotError, match="in the middle of an update"):
        pool.take("there", toy.state.values())
    toy.restore(pool, "here")
    assert all(p.grad is None for p in toy.model.parameters())
    assert toy.step(3) == Toy().step(3)
