"""Bytes, operations and waits are counted exactly."""

import gc

import torch

from benchmarks.harness import counting


def test_peak_bytes_is_exact():
    x, y = torch.ones(1000, 1000), torch.ones(1000, 1000)
    assert counting.peak_bytes(lambda: x + y) == 4_000_000
    assert counting.peak_bytes(lambda: (x + y).mul_(y)) == 4_000_000
    assert counting.peak_bytes(lambda: (x + y) + (x * y)) == 12_000_000
    assert counting.peak_bytes(lambda: x.mul_(y)) == 0
    # freed before the next
    assert counting.peak_bytes(lambda: [(x + y).sum() for _ in range(5)]) == 4_000_000 + 5 * 4


def test_operations_and_syncs_are_counted():
    x = torch.ones(10)
    assert counting.count(lambda: (x + 1).view(2, 5).t()).operations == 1
    assert counting.count(lambda: x.sum().item()).syncs == 1
    assert counting.count(lambda: x.nonzero()).syncs == 1
    assert counting.count(lambda: x[x > 0]).syncs == 1
    assert counting.count(lambda: torch.where(x > 0, x, 0)).syncs == 0
    assert counting.count(lambda: x.mul_(2).add_(1)).by_name == {"mul_": 1, "add_": 1}


def test_allocations_are_results_in_memory_of_their_own():
    x, out = torch.ones(10), torch.empty(10)
    assert counting.count(lambda: (x + 1, x[1:], x.view(2, 5), x.mul_(2))).allocations == 1
    assert counting.count(lambda: torch.add(x, 1, out=out)).allocations == 0
    assert counting.count(lambda: torch._foreach_add([x, out], 1)).allocations == 2
    assert counting.count(lambda: torch.empty(0)).allocations == 0


def test_garbage_of_others_is_no_room_that_the_call_gives_back():
    class Loop:
        pass

    def leave():
        loop = Loop()
        loop.self, loop.held = loop, torch.ones(1 << 18)

    gc.disable()
    counting.peak_bytes(leave)  # the profiler knows the size of what it saw being made

    def call():
        first = torch.ones(1 << 18)
        gc.collect()
        return first, torch.ones(1 << 18)

    try:
        assert counting.peak_bytes(call) >= 2 * 4 * (1 << 18)
    finally:
        gc.enable()
