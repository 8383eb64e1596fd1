"""Where a run's rows come from: those made ahead are used, and are those that would be made as they are asked for."""

import dataclasses

import pytest
import torch

from repsft_fast.config import Config
from repsft_fast.data.rows_ahead import RowsAhead
from repsft_fast.data.store import TokenStore
from repsft_fast.training.build import build
from repsft_fast.training.trainer import train
from tests.helpers import runs


def built(tmp_path, **changes):
    return build(Config.of(runs.settings(tmp_path, batch__samples=8, batch__row_tokens=32, **changes)))


def same(row, other):
    return all(
        torch.equal(value, getattr(other, name))
        if isinstance(value, torch.Tensor)
        else value == getattr(other, name)
        for name, value in vars(row).items()
    )


def test_rows_made_ahead_are_those_of_the_update_with_the_guess_of_now(tmp_path):
    parts = built(tmp_path)
    epoch, seen = parts.plan.epoch(0, 0), 0
    with parts.rows_ahead(epoch, 0) as ahead:
        for update in ahead:
            parts.progress.kept_guess = 0.5  # after the rows were made
            rows = list(parts.rows(update))
            inline = [parts.row(update, planned) for planned in update.ranks[0]]
            assert all(map(same, rows, [dataclasses.replace(row, kept_share=0.5) for row in inline]))
            assert len(list(parts.rows(update))) == len(rows), "asked for again they are made again"
            assert len(list(parts.rows(epoch[0]))) == len(epoch[0].ranks[0]), "and so are any others"
            seen += len(rows)
        assert parts.ahead is ahead
    assert parts.ahead is None
    assert seen > len(epoch)


def test_what_was_made_for_a_plan_is_gone_with_it(tmp_path):
    parts = built(tmp_path)
    epoch = parts.plan.epoch(0, 0)
    taken = []

    def leave():
        with parts.rows_ahead(epoch, 0) as ahead:
            taken.append(next(iter(ahead)))
            raise KeyError

    with pytest.raises(KeyError):
        leave()
    (update,) = taken
    assert parts.ahead is None
    assert len(list(parts.rows(update))) == len(update.ranks[0])


@pytest.mark.parametrize("retries", [False, True])
def test_a_run_computes_on_rows_made_ahead_and_smaller_ones_after_want_of_memory(
    tmp_path, retries, monkeypatch
):
    """The thread's want of memory is met as the loop's own."""
    changes = {
        "batch__samples": 8,
        "batch__row_tokens": 128,
        "budget__epochs": 2,
        "stop__token_accuracy": None,
    }
    plain, made, inline = TokenStore.row, [], []
    assemble = RowsAhead._one

    def counted(ahead, update, planned):
        made.append(planned)
        if retries and len(made) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return assemble(ahead, update, planned)

    monkeypatch.setattr(RowsAhead, "_one", counted)
    monkeypatch.setattr(TokenStore, "row", lambda *a, **k: inline.append(1) or plain(*a, **k))
    result = train(runs.settings(tmp_path, numbers__on_out_of_memory="retry", **changes))
    assert result.updates == 6
    assert max(row.padded_tokens for row in made[-3:]) <= (64 if retries else 128)
    notes = [line["text"] for line in runs.metrics(tmp_path, "note")]
    assert sum("out of memory in rows of 128" in text for text in notes) == retries
    assert len(inline) >= len(made) - retries
