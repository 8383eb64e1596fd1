"""The counter sees every kind of wait, or the tests that assert zero prove nothing."""

import pytest
import torch

from repsft_fast.training.syncs import SyncCounter


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
