"""One update: its clipping leaves what torch's clip_grad_norm_ would; its settings reach the head."""

import pytest
import torch

from repsft_fast.config import Config
from repsft_fast.ops import row_pass
from repsft_fast.training.build import build
from repsft_fast.training.step import clip_and_veto, forward_backward
from tests.helpers import runs


@pytest.mark.parametrize("max_norm", [None, 1e-3, 1e9])
def test_clipping_is_torchs(tmp_path, max_norm):
    parts = build(Config.of(runs.settings(tmp_path, optim__max_norm=max_norm)))
    forward_backward(parts, parts.plan.epoch(0, 0)[0])
    norm, clip, veto, *_ = clip_and_veto(parts)
    parameters = list(parts.optimizer.names.values())
    scaled = [p.grad * (1.0 if clip is None else clip) for p in parameters]
    assert (clip is None) == (max_norm is None)
    assert clip is None or (clip < 1.0) == (max_norm == 1e-3)  # one case clips, the other does not
    assert all(p.grad.norm() > 0 for p in parameters)
    expected = torch.nn.utils.clip_grad_norm_(parameters, max_norm or float("inf"))
    torch.testing.assert_close(norm.float(), expected, rtol=1e-6, atol=0)
    for ours, parameter in zip(scaled, parameters, strict=True):
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-6, atol=0)
    assert veto.item() == 0.0


def test_the_head_is_given_the_chunk_of_the_settings(tmp_path, monkeypatch):
    budgets, chunk_ranges = [], row_pass.chunk_ranges

    def watched(rows, vocabulary, itemsize, budget):
        budgets.append(budget)
        return chunk_ranges(rows, vocabulary, itemsize, budget)

    monkeypatch.setattr(row_pass, "chunk_ranges", watched)
    parts = build(Config.of(runs.settings(tmp_path, loss__chunk_bytes="4KiB")))
    budgets.clear()
    forward_backward(parts, parts.plan.epoch(0, 0)[0])
    assert set(budgets) == {4096}
