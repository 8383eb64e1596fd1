"""How a slot's bytes are shared out: nothing lost, nothing twice, little wasted where pinned memory is
rounded up."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from repsft_fast.errors import SnapshotError
from repsft_fast.snapshot import SnapshotPool, plan_slots, slots, tiers
from repsft_fast.snapshot.buffers import SLACK, rounded, share_out
from repsft_fast.snapshot.slots import ALIGN_BYTES, Layout

GIB = 1 << 30
# hidden, intermediate, layers, heads, key and value heads, head dim, vocabulary, own output head
MODELS = {
    "SmolLM2-135M": (576, 1536, 30, 9, 3, 64, 49152, False),
    "Qwen3-0.6B": (1024, 3072, 28, 16, 8, 128, 151936, False),
    "SmolLM2-1.7B": (2048, 8192, 24, 32, 32, 64, 49152, False),
    "Qwen3-4B": (2560, 9728, 36, 32, 8, 128, 151936, False),  # its embedding alone is 1.56 GB in fp32
    "Llama-3-8B": (4096, 14336, 32, 32, 8, 128, 128256, True),
}
STATES = {  # bytes an element of the parameter's size takes in each of the list's tensors
    "weights": (4,),
    "AdamW": (4, 4, 4),
    "bf16 beside masters": (2, 4, 4, 4),
    "8-bit AdamW": (4, 1, 1, 4 / 256, 4 / 256),
}


def elements(hidden, intermediate, layers, heads, kv_heads, dim, vocabulary, own_head):
    layer = [heads * dim * hidden, kv_heads * dim * hidden, kv_heads * dim * hidden, heads * dim * hidden]
    layer += [intermediate * hidden] * 3 + [hidden] * 2 + [dim] * 2
    return [vocabulary * hidden] * (2 if own_head else 1) + [hidden] + layer * layers


def sizes_of(model, state):
    each = [n for width in STATES[state] for n in (int(count * width) for count in elements(*MODELS[model]))]
    return [-(-n // ALIGN_BYTES) * ALIGN_BYTES for n in each]


def held(sizes, buffers):
    return [sum(sizes[i] for i in inside) for inside in buffers]


@pytest.mark.parametrize(
    ("size", "taken"), [(0, 0), (1, 1), (3, 4), (GIB, GIB), (GIB + 1, 2 * GIB), (7_200_000_000, 8 * GIB)]
)
def test_pinned_memory_is_taken_in_powers_of_two(size, taken):
    assert rounded(size) == taken


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("model", MODELS)
def test_the_states_of_models_waste_little(model, state):
    sizes = sizes_of(model, state)
    buffers = share_out(sizes)
    assert sorted(i for inside in buffers for i in inside) == list(range(len(sizes)))
    assert sum(map(rounded, held(sizes, buffers))) <= 1.02 * sum(sizes)
    assert len(buffers) <= 8, "every buffer is a copy of its own when a snapshot moves"


@given(st.lists(st.integers(0, 1 << 20), min_size=1, max_size=60))
@settings(max_examples=200, deadline=None)
def test_any_list(sizes):
    buffers, whole = share_out(sizes), sum(sizes)
    assert sorted(i for inside in buffers for i in inside) == list(range(len(sizes)))
    assert all(inside == sorted(inside) for inside in buffers)
    each = held(sizes, buffers)
    assert sum(map(rounded, each)) <= rounded(whole), "worse than one buffer for all"
    for n, size in enumerate(each[:-1]):  # a hole is smaller than each tensor that was still to be placed
        later = [sizes[i] for inside in buffers[n + 1 :] for i in inside]
        assert rounded(size) - size < min(later)


def test_many_small_tensors_waste_the_slack_alone():
    sizes = [ALIGN_BYTES] * 9_999
    taken = sum(map(rounded, held(sizes, share_out(sizes))))
    assert taken <= sum(sizes) * (1 + 1 / SLACK)


def test_a_tensor_beyond_any_bound_lies_whole_in_a_buffer_that_others_fill():
    sizes = [5 * GIB, *[GIB // 4] * 12, *[64] * 100]
    buffers = share_out(sizes)
    assert buffers[0][0] == 0
    assert held(sizes, buffers)[0] == 8 * GIB, "three GiB of the others beside it"


class TestLayout:
    def on_a_gpu(self, model):  # (layout of AdamW's state of a model on a GPU that is not here, its bytes)
        each = [n for _ in range(3) for n in elements(*MODELS[model])]
        with FakeTensorMode():
            layout = Layout([torch.empty(n, device="cuda:0") for n in each])
        return layout, sum(-(-4 * n // ALIGN_BYTES) * ALIGN_BYTES for n in each)

    @pytest.mark.parametrize("model", MODELS)
    def test_every_tensor_has_its_own_bytes_of_one_buffer(self, model):
        layout, whole = self.on_a_gpu(model)
        assert layout.bytes_each == whole == sum(n for _, n in layout._buffers)
        assert whole <= layout.pinned_each <= 1.02 * whole
        ends = [0] * len(layout._buffers)
        for part in sorted(layout._parts, key=lambda part: (part.buffer, part.start)):
            assert part.start % ALIGN_BYTES == 0
            assert part.start == ends[part.buffer]
            ends[part.buffer] = -(-part.stop // ALIGN_BYTES) * ALIGN_BYTES
        assert ends == [n for _, n in layout._buffers]

    def test_the_pinned_budget_counts_what_the_allocator_takes(self):
        with FakeTensorMode():
            # 3 GiB in one tensor: 4 of pinned memory
            layout = Layout([torch.empty(3 * GIB // 4, device="cuda:0")])
        assert (layout.bytes_each, layout.pinned_each) == (3 * GIB, 4 * GIB)
        room = {"device_bytes": 0, "pinned_bytes": 7 * GIB, "pinned_each": layout.pinned_each}
        assert plan_slots(layout.bytes_each, 1, **room).pinned == 1
        with pytest.raises(
            SnapshotError, match=r"hold 1 of 2 .* 3,221,225,472 bytes \(4,294,967,296 of pinned memory\)"
        ):
            plan_slots(layout.bytes_each, 2, **room)

    def test_memory_of_the_host_is_not_rounded(self):
        layout = Layout([torch.zeros(200)])
        assert layout.pinned_each == layout.bytes_each == 832

    def test_slots_of_every_tier_ask_for_the_bytes_they_use(self, monkeypatch):
        asked, real = [], torch.zeros

        def zeros(n, **more):
            asked.append((n, more["pin_memory"], torch.device(more["device"]).type))
            return real(n, dtype=torch.uint8)

        with FakeTensorMode():
            layout = Layout([torch.empty(n, device="cuda:0") for n in (4096, 2048, 4096, 3, 5)])
        monkeypatch.setattr(torch, "zeros", zeros)
        layout.in_memory(slots.DEVICE)
        layout.in_memory(slots.PINNED, pin=True)
        layout.in_memory(slots.PINNED)
        sizes = [n for _, n in layout._buffers]
        assert sizes == [2 * 4 * 4096, 4 * 2048, 2 * 64]
        assert asked == [
            (n, pin, where)
            for pin, where in ((False, "cuda"), (True, "cpu"), (False, "cpu"))
            for n in sizes
        ]  # fmt: skip


def state():
    draw = torch.Generator().manual_seed(0)
    tensors = {f"w{n}": torch.randn(n, generator=draw) for n in (70, 3, 900, 500, 33, 1, 300, 3500, 200)}
    tensors["half"] = torch.randn(40, 6, generator=draw).bfloat16().t()
    tensors["count"] = torch.tensor(7)
    return tensors


class TestRoundTrip:
    """Slots of several buffers: every tier gives back what was put in, and moves keep it."""

    def pool(self, tensors, folder, **budgets):
        return SnapshotPool(tensors, pinned_bytes=0, disk_bytes=1 << 24, disk_folder=folder, **budgets)

    @pytest.mark.parametrize("device", [0, 1, 3])
    def test_every_tier(self, tmp_path, device):
        tensors = state()
        one = Layout(list(tensors.values())).bytes_each
        pool = self.pool(tensors, tmp_path, keep=3, device_bytes=device * one)
        assert len(pool._tiers.layout._buffers) > 2
        kept = {}
        for name in "abc":
            kept[name] = {n: t.clone() for n, t in tensors.items()}
            pool.take(name, {})
            for t in tensors.values():
                t.add_(1)
        for stored in pool._tiers.stored:
            pool._tiers.finish(stored)
        assert [pool.tier(name) for name in "abc"].count("device") == device
        for name in "cab":
            for t in tensors.values():
                t.fill_(9)
            pool.restore(name)
            assert all(torch.equal(t, kept[name][n]) for n, t in tensors.items()), name
            frozen = pool.hold(name)
            assert all(
                torch.equal(t, kept[name][n]) and t.stride() == tensors[n].stride() for n, t in frozen.items()
            )
            pool.unhold(name)
        pool.close()

    def test_a_flipped_bit_in_the_last_buffer_is_damage(self, tmp_path):
        pool = self.pool(state(), tmp_path, keep=1, device_bytes=0)
        pool.take("a", {})
        fd, last = pool._tiers.stored[0].slot.fd, pool.bytes_each - 1
        os.pwrite(fd, bytes([os.pread(fd, 1, last)[0] ^ 1]), last)
        with pytest.raises(SnapshotError, match="is damaged on disk"):
            pool.restore("a")


class TestPinnedTier:
    """192 numbers take 768 bytes, of pinned memory 1,024: 2,816 bytes hold two."""

    def tiers(self, monkeypatch, tmp_path, most):
        layout = Layout([torch.zeros(192)])
        layout.pinned_each, given = 1024, []
        on_cpu = layout.in_memory

        def in_memory(level, *, pin=False):
            if level == slots.PINNED and len(given) == most:
                raise RuntimeError("CUDA error: out of memory")
            given.extend([level] * (level == slots.PINNED))
            return on_cpu(level)

        monkeypatch.setattr(layout, "in_memory", in_memory)
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
        monkeypatch.setattr(tiers.Tiers, "_device", lambda self: torch.device("cuda"))
        plan = tiers.Tiers(layout, 4, (768, 2816, 10 * 768), tmp_path).plan
        return plan.device, plan.pinned, plan.disk

    def test_it_is_planned_by_what_its_allocator_takes(self, monkeypatch, tmp_path):
        assert self.tiers(monkeypatch, tmp_path, most=9) == (1, 2, 1)

    def test_one_that_refuses_is_cut_to_what_it_gave(self, monkeypatch, tmp_path):
        assert self.tiers(monkeypatch, tmp_path, most=1) == (1, 1, 2)
