"""The counter sees every kind of wait, or the tests that assert zero prove nothing."""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from repsft_fast.selftest.syncs import SyncCounter

# Of fake tensors: it need not be here. A torch without CUDA has no guard for its devices, but one for those
# of lazy tensors.
GPU = "cuda:0" if torch.version.cuda else "lazy:0"


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: torch.nonzero(x),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: x.unique(),
        lambda x: torch.equal(x, x),
        lambda x: x.index_put_((x > 0,), torch.tensor(0.0)),
        lambda x: torch.repeat_interleave(x.long()),
    ],
)
def test_a_wait_is_counted(wait):
    with SyncCounter() as syncs:
        wait(torch.ones(3))
    assert syncs.total > 0


def test_work_on_the_device_is_not_counted():
    x = torch.ones(4, requires_grad=True)
    with SyncCounter() as syncs:
        (x * 2).index_select(0, torch.tensor([0, 1])).sum().backward()
        x.detach().index_add_(0, torch.tensor([0]), torch.ones(1))
    assert syncs.found == {}


def counted(call):
    """What is found in `call(x, host)`, x [4] fp32 on a GPU and host [4] fp32 beside it."""
    with FakeTensorMode(), torch.no_grad():
        x, host = torch.zeros(4, device=GPU), torch.zeros(4)
        there = torch.zeros(2, dtype=torch.int64, device=GPU)
        with SyncCounter() as syncs:
            call(x, host, there)
    return dict(syncs.found)


@pytest.mark.parametrize(
    ("copy", "found"),
    [
        (lambda x, host, there: x.cpu(), "aten::_to_copy to the host"),
        (lambda x, host, there: host.copy_(x), "aten::copy_ to the host"),
        (lambda x, host, there: host.to(GPU), "aten::_to_copy to the device, blocking"),
        (lambda x, host, there: host.to(GPU, torch.float64), "aten::_to_copy to the device, blocking"),
        (lambda x, host, there: x.copy_(host), "aten::copy_ to the device, blocking"),
        (lambda x, host, there: torch._foreach_copy_([x], [host]), "aten::_foreach_copy_ to the device, blocking"),
        (lambda x, host, there: torch._foreach_copy_([host], [x]), "aten::_foreach_copy_ to the host"),
        (lambda x, host, there: torch.tensor([0, 2], device=GPU), "tensor on the device"),
        (lambda x, host, there: torch.tensor(data=1.5, device=GPU), "tensor on the device"),
        (lambda x, host, there: torch.as_tensor(np.arange(3), device=GPU), "as_tensor on the device"),
        (lambda x, host, there: torch.asarray([1], device=GPU), "asarray on the device"),
        (lambda x, host, there: x.new_tensor([1.0]), "new_tensor on the device"),
        (lambda x, host, there: x[torch.tensor([0, 2])], "aten::index of host numbers"),
        (lambda x, host, there: x.index_put_((there,), torch.tensor(0.0)), "aten::index_put_ of host numbers"),
        (lambda x, host, there: x.masked_fill(x > 0, x.sum()), "aten::masked_fill by a number on the device"),
    ],
)  # fmt: skip
def test_a_copy_that_blocks_is_counted_once(copy, found):
    assert counted(copy) == {found: 1}


@pytest.mark.parametrize("place", [[0, 2], np.array([0, 2])], ids=["list", "numpy"])
def test_a_subscript_by_host_numbers_is_counted(place):
    assert "subscripts of host numbers" in counted(lambda x, host, there: x[place])
    assert "subscripts of host numbers" in counted(lambda x, host, there: x[None, place])
    assert "subscripts of host numbers" not in counted(lambda x, host, there: host[place]), "no device in it"


@pytest.mark.parametrize(
    "work",
    [
        lambda x, host, there: host.to(GPU, non_blocking=True),
        lambda x, host, there: x.copy_(host, non_blocking=True),
        lambda x, host, there: x.copy_(host, True),
        lambda x, host, there: torch._foreach_copy_([x, x], [host, host], non_blocking=True),
        lambda x, host, there: x.to("cpu", non_blocking=True),
        lambda x, host, there: torch.tensor([0, 2]),
        lambda x, host, there: torch.as_tensor(x, device=GPU),
        lambda x, host, there: x[1:3] + x[there] + x[None, 0] * torch.tensor(2.0),
        lambda x, host, there: (
            torch.zeros(3, device=GPU) + torch.full((3,), 2.0, device=GPU) + torch.arange(3, device=GPU)
        ),
        lambda x, host, there: x.masked_fill_(x > 0, 1.0),
        lambda x, host, there: x.index_put_((there,), x[:2]),
        lambda x, host, there: torch.repeat_interleave(x, 2),
    ],
)
def test_what_waits_for_nothing_is_not(work):
    assert counted(work) == {}


@pytest.mark.parametrize("pinned", [True, False])
def test_memory_that_is_not_pinned_is_counted_where_it_could_be(monkeypatch, pinned):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: pinned)
    found = counted(lambda x, host, there: x.copy_(host, non_blocking=True))
    assert found == ({} if pinned else {"aten::copy_ to the device, of pageable memory": 1})


def test_it_counts_no_more_once_it_is_left():
    with FakeTensorMode():
        with SyncCounter() as syncs:
            pass
        torch.tensor([1], device=GPU)
        torch.zeros(1).to(GPU)
    assert syncs.total == 0
