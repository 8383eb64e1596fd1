"""Law 2 in the trainer: row length, buckets and order inside the update change weights after SGD by less than
1e-6 relative."""

import pytest
import torch

from repsft_fast.config import Config
from repsft_fast.training.build import build
from repsft_fast.training.step import train_step
from tests.helpers import runs


def weights_after(folder, updates=3, **changes):
    parts = build(Config.of(runs.settings(folder, optim__name="sgd", optim__lr=0.1, **changes)))
    epoch = parts.plan.epoch(0, 0)
    for n in range(updates):
        train_step(parts, epoch[n])
        parts.step_done(epoch[n], len(epoch))
    return {name: p.detach().clone() for name, p in parts.model.named_parameters()}, parts


@pytest.mark.parametrize("average", ["sample", "token"])
@pytest.mark.parametrize(
    "changes",
    [
        {"batch__row_tokens": 20},
        {"batch__row_tokens": 33},
        {"batch__row_tokens": 128, "batch__bucket_tokens": 64},
        {"batch__row_lengths": [23, 31, 64]},
    ],
)
def test_rows_do_not_change_the_weights(tmp_path, average, changes):
    one, _ = weights_after(tmp_path, loss__average=average)
    other, _ = weights_after(tmp_path, loss__average=average, **changes)
    for name, value in one.items():
        assert torch.linalg.norm(value - other[name]) <= 1e-6 * torch.linalg.norm(value), name


def test_the_law_can_fail(tmp_path):
    one, _ = weights_after(tmp_path, loss__average="sample")
    other, _ = weights_after(tmp_path, loss__average="token")
    assert any(torch.linalg.norm(v - other[n]) > 1e-5 * torch.linalg.norm(v) for n, v in one.items())


def test_the_last_smaller_update_has_its_own_denominator(tmp_path):
    _, parts = weights_after(tmp_path, samples=22)
    last = parts.plan.epoch(0, 0)[5]
    assert len(last.samples) == 2
    assert last.denominator == 2.0
    total = sum(float(row.weights.double().sum()) for row in parts.rows(last))
    assert total == pytest.approx(1.0, rel=1e-6)
