"""Law 9 in the trainer: what was really trained, recorded at the model's door, is every sample once per
epoch."""

import collections

import pytest

from repsft_fast import train
from repsft_fast.training import parts as parts_module
from tests.helpers import runs


@pytest.fixture
def seen(monkeypatch):
    """Samples of every row that was trained, in order."""
    trained: list[tuple[int, ...]] = []
    plain = parts_module.Parts.rows

    def rows(self, update):
        for row in plain(self, update):
            trained.append(row.samples)
            yield row

    monkeypatch.setattr(parts_module.Parts, "rows", rows)
    return trained


@pytest.mark.parametrize(
    "changes", [{}, {"batch__samples": 1}, {"batch__row_tokens": 21}, {"batch__samples": 5}]
)
def test_every_sample_once_per_epoch(tmp_path, seen, changes):
    train(runs.settings(tmp_path, samples=23, budget__epochs=2, stop__token_accuracy=None, **changes))
    counts = collections.Counter(sample for samples in seen for sample in samples)
    assert counts == dict.fromkeys(range(23), 2)


def test_one_sample_many_epochs(tmp_path, seen):
    train(runs.settings(tmp_path, samples=1, budget__epochs=40, stop__token_accuracy=None, batch__samples=1))
    assert seen == [(0,)] * 40
