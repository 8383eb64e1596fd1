"""Page-locked buffers that go round, on a GPU whose copies happen when the test says so."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from repsft_fast.data import staging
from repsft_fast.data.sample import Sample
from repsft_fast.data.staging import LEAST_BYTES, MOST, Staged, Staging
from repsft_fast.data.store import TokenStore
from tests.data.test_store import SAMPLES, planned


class Gpu:
    """Copies are queued, and read their buffer when they are run: in order, one by one."""

    def __init__(self):
        self.queue, self.waits = [], 0

    def run_one(self):
        self.queue.pop(0)()

    def run_until(self, done):
        while not done():
            self.run_one()

    def Event(self):
        return Event(self)


class Event:
    def __init__(self, gpu):
        self.gpu, self.recorded, self.reached = gpu, 0, 0

    def record(self, stream):
        self.recorded += 1
        mine = self.recorded

        def reach():
            self.reached = mine

        self.gpu.queue.append(reach)

    def query(self):
        return self.reached == self.recorded

    def synchronize(self):
        self.gpu.waits += 1
        self.gpu.run_until(self.query)


@pytest.fixture
def gpu(monkeypatch):
    return on_a_gpu(monkeypatch)


def on_a_gpu(monkeypatch):
    gpu, empty = Gpu(), torch.empty
    monkeypatch.setattr(torch.cuda, "Event", gpu.Event)
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **options: empty(*size, **options))
    return gpu


def send(ring, gpu, value, nbytes=10):
    """One row's way: taken, written, copied some time later, given back. Returns (expected, got)."""
    staged = ring.take(nbytes)
    staged.memory[:nbytes] = value
    got = torch.zeros(nbytes, dtype=torch.uint8)
    gpu.queue.append(lambda: got.copy_(staged.memory[:nbytes]))
    ring.give_back(staged, None)
    return torch.full((nbytes,), value, dtype=torch.uint8), got


@given(st.lists(st.sampled_from(["send", "send large", "copy"]), max_size=60))
def test_no_buffer_is_written_before_its_copy_is_done(steps):
    with pytest.MonkeyPatch.context() as patch:
        gpu, ring = on_a_gpu(patch), Staging()
        patch.setattr(staging, "MOST", 3)
        sent = []
        for number, step in enumerate(steps):
            if step == "copy":
                if gpu.queue:
                    gpu.run_one()
            else:
                sent.append(send(ring, gpu, number % 251, LEAST_BYTES + 1 if "large" in step else 10))
        while gpu.queue:
            gpu.run_one()
        assert all(torch.equal(expected, got) for expected, got in sent)


def test_two_buffers_go_round_where_one_copy_is_on_its_way(gpu):
    ring = Staging()
    for number in range(50):
        send(ring, gpu, number)
        while len(gpu.queue) > 2:
            gpu.run_one()
    assert (ring.made, gpu.waits) == (2, 0)


def test_the_host_waits_for_none_until_most_are_on_their_way(gpu):
    ring = Staging()
    for number in range(MOST):
        send(ring, gpu, number)
    assert (ring.made, gpu.waits) == (MOST, 0)
    send(ring, gpu, 7)
    assert (ring.made, gpu.waits) == (MOST, 1)


def test_sizes_are_few_and_what_is_too_small_is_replaced(gpu):
    ring = Staging()
    sizes = []
    for nbytes in (1, LEAST_BYTES, LEAST_BYTES + 1, 3 * LEAST_BYTES, 1):
        staged = ring.take(nbytes)
        sizes.append(staged.memory.numel())
        ring.give_back(staged, None)
        gpu.run_one()
    assert sizes == [LEAST_BYTES, LEAST_BYTES, 2 * LEAST_BYTES, 4 * LEAST_BYTES, 4 * LEAST_BYTES]
    assert ring.made == 3


@pytest.mark.parametrize("resident", [False, True])
def test_rows_out_of_used_buffers_are_those_out_of_new_ones(resident, gpu, monkeypatch):
    """Whatever an earlier, longer row has left in the buffer."""
    rows = [([0, 1, 2, 3], 16), ([3], 4), ([1], 1), ([], 2), ([2, 0], 5), ([3, 3], 8)]
    plain, used = TokenStore(SAMPLES, "cpu"), TokenStore(SAMPLES, "cpu")
    if resident:
        plain._resident, used._resident = plain._upload(), used._upload()
    used._staging = ring = Staging()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    for ids, slots in rows:
        made = plain.row(planned(ids, plain, slots), denominator=3.0, average="token")
        ring.take(1).memory.fill_(255) if not ring._given_back else ring._given_back[0].memory.fill_(255)
        row = used.row(planned(ids, used, slots), denominator=3.0, average="token")
        for name, value in vars(made).items():
            other = getattr(row, name)
            assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, name
        while gpu.queue:
            gpu.run_one()
    assert ring.made == 2, "the test must see buffers used again"


def test_a_row_gives_its_buffer_back_behind_its_copy(gpu, monkeypatch):
    store = TokenStore([Sample([1, 2, 3], [False, True, True])], "cpu")
    store.device, store._staging = torch.device("meta"), Staging()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the stream of the copy")
    seen = []
    give_back = store._staging.give_back
    store._staging.give_back = lambda staged, stream: (seen.append(stream), give_back(staged, stream))
    row = store.row(planned([0], store), denominator=1.0, average="token")
    assert row.tokens.device.type == "meta"
    assert seen == ["the stream of the copy"]
    assert len(store._staging._given_back) == 1
    assert np.array_equal(store.index.lengths, [2])


def test_nobody_gets_a_buffer_whose_event_is_not_there_yet(gpu):
    """Threads share the buffers: another one may take while this one gives back."""
    ring = Staging()
    staged, met = ring.take(100), []

    class Recording:
        def record(self, stream):
            met.append(ring.take(100))

        def query(self):
            return True

    ring.give_back(Staged(staged.memory, Recording()), None)
    assert met[0].memory is not staged.memory
