"""Law 8: no host sync in an update that does not log, decide or save; no new shape after warm-up where rows
are bucketed."""

import torch

from repsft_fast.config import Config
from repsft_fast.selftest.syncs import SyncCounter
from repsft_fast.training.build import build
from repsft_fast.training.step import train_step
from tests.helpers import runs


def steps(parts, count):
    epoch = parts.plan.epoch(0, 0)
    for n in range(count):
        train_step(parts, epoch[n])
        parts.step_done(epoch[n], len(epoch))


def test_an_update_reads_nothing_back(tmp_path):
    parts = build(Config.of(runs.settings(tmp_path, tasks=3)))
    steps(parts, 2)
    with SyncCounter() as syncs:
        steps(parts, 3)
    assert syncs.total == 0, syncs.found


def test_an_evaluation_reads_nothing_row_by_row(tmp_path):
    """On a GPU it waits once, for its table (tests/training/test_step_fake_cuda.py)."""
    parts = build(Config.of(runs.settings(tmp_path, data__validation_fraction=0.5)))
    assert len(parts.validation._rows) > 1
    with SyncCounter() as syncs:
        parts.validation(parts.model)
    assert syncs.total == 0, syncs.found


def test_reading_the_ledger_is_what_waits(tmp_path):
    parts = build(Config.of(runs.settings(tmp_path)))
    steps(parts, 1)
    with SyncCounter() as syncs:
        float(parts.ledger.open_loss())
    assert syncs.total == 1


def test_a_veto_leaves_weights_moments_and_step_untouched_without_a_read(tmp_path, monkeypatch):
    parts = build(Config.of(runs.settings(tmp_path)))
    steps(parts, 1)
    before = {n: t.clone() for n, t in parts.optimizer.names.items()}
    from repsft_fast.optim import state_tensors

    moments = {n: t.clone() for n, t in state_tensors(parts.optimizer).items()}
    plain = parts.model.loss
    monkeypatch.setattr(
        parts.model, "loss", lambda row: (lambda loss, stats: (loss * float("nan"), stats))(*plain(row))
    )
    with SyncCounter() as syncs:
        steps(parts, 1)
    assert syncs.total == 0, syncs.found
    assert all(torch.equal(t, before[n]) for n, t in parts.optimizer.names.items())
    assert all(torch.equal(t, moments[n]) for n, t in state_tensors(parts.optimizer).items())
    records = parts.ledger.read()
    assert [r.vetoed for r in records] == [False, True]
    assert int(parts.ledger.epoch_totals().total.sum()) == int(records[0].tasks.total.sum()), (
        "a vetoed update counts no tokens"
    )


def test_a_loss_that_is_not_finite_is_vetoed_though_its_gradients_are(tmp_path, monkeypatch):
    parts = build(Config.of(runs.settings(tmp_path)))
    plain = parts.model.loss
    nan = torch.tensor(float("nan"))
    monkeypatch.setattr(
        parts.model, "loss", lambda row: (lambda loss, stats: (loss + nan, stats))(*plain(row))
    )
    before = {n: t.detach().clone() for n, t in parts.optimizer.names.items()}
    steps(parts, 1)
    record = parts.ledger.read()[0]
    assert record.vetoed
    assert record.grad_norm == record.grad_norm, "the test needs finite gradients"
    assert all(torch.equal(t, before[n]) for n, t in parts.optimizer.names.items())


def test_no_shape_is_new_after_the_first_of_each_length(tmp_path):
    """Three lengths, chosen as on a GPU: tasks leave, samples are skipped, drawn by weight, evaluated."""
    settings = runs.settings(tmp_path, samples=200, tasks=4, batch__samples=16, data__validation_fraction=0.2)
    parts = build(Config.of(settings | {"batch": settings["batch"] | {"row_lengths": [32, 48, 64]}}))
    ways = (
        {},
        {"active": [3]},
        {"active": [0, 2]},
        {"skip": range(60)},
        {"task_weights": dict.fromkeys(range(4), 2)},
    )
    shapes, evaluated = set(), set()
    for number, more in enumerate(ways):
        for update in parts.plan.epoch(number, number, **more):
            for row in parts.rows(update):
                shapes.add((row.tokens.shape[1], row.cu_seqlens.numel(), row.max_seqlen))
        samples = range(number, len(parts.data.train.index), number + 1)
        scorers = (parts.validation, parts.scorer(parts.data.train, samples))
        for row in (row for scorer in scorers for row in scorer._rows):
            evaluated.add((row.padded_tokens, row.segments, row.max_seqlen))
    for found in (shapes, evaluated):
        assert len(found) == len({length for length, _, _ in found}) <= 3
        assert len({borders for _, borders, _ in found}) == 1


def test_rows_take_few_shapes(tmp_path):
    parts = build(Config.of(runs.settings(tmp_path, samples=200, batch__bucket_tokens=32)))
    shapes = set()
    for number in range(3):
        for update in parts.plan.epoch(0, number):
            for row in parts.rows(update):
                shapes.add((row.tokens.shape[1], row.max_seqlen))
    assert {length for length, _ in shapes} <= {32, 64}
    assert len({bound for _, bound in shapes}) == 1
