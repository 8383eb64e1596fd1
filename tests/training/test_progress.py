"""loss.skip_below pays by a guess from the epoch before: it falls as rows are memorised, is never late, and
is only a guess."""

import itertools
import json

import pytest
import torch

from repsft_fast.models import loss as model_loss
from repsft_fast.ops import products
from repsft_fast.selftest.syncs import SyncCounter
from repsft_fast.training import trainer
from repsft_fast.training.progress import Progress, load_values, values_of
from tests.helpers import runs
from tests.helpers.interpreter import interpret

MEMORISING = {
    "batch__samples": 2, "loss__skip_below": 0.3, "optim__lr": 1e-2, "budget__epochs": 12, "stop__token_accuracy": None,
    "log__every_updates": 100,
}  # fmt: skip


@pytest.fixture
def asked(monkeypatch):
    """(whether gradients were wanted, kept_share) of every call of the head."""
    found, head = [], model_loss.linear_cross_entropy

    def noting(hidden, *arguments, kept_share, **settings):
        found.append((torch.is_grad_enabled(), kept_share))
        return head(hidden, *arguments, kept_share=kept_share, **settings)

    monkeypatch.setattr(model_loss, "linear_cross_entropy", noting)
    return found


def trained(folder, count=6, **changes):
    """The epochs' lines of a run over samples that repeat one token each, and so are learnt one after the
    other."""
    folder.mkdir(parents=True, exist_ok=True)
    samples = [{"input_ids": [9 + n] * (4 + 2 * n), "labels": [9 + n] * (4 + 2 * n)} for n in range(count)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, samples)) + "\n")
    trainer.train(runs.settings(folder, **{**MEMORISING, **changes}))
    return runs.metrics(folder, "epoch")


def test_the_guess_follows_what_the_last_epoch_kept(tmp_path, asked, monkeypatch):
    monkeypatch.setattr(products, "CAPACITY_STEP", 1)
    lines = trained(tmp_path)
    in_training = [share for gradient, share in asked if gradient]
    assert in_training == [line["kept_guess"] for line in lines for _ in range(3)], (
        "one value from an epoch's end to the next"
    )
    assert lines[0]["kept_guess"] == lines[0]["kept_share"] == 1.0
    assert lines[-1]["kept_guess"] < 0.5
    for before, line in itertools.pairwise(lines):
        assert before["kept_share"] <= line["kept_guess"] <= before["kept_share"] * 1.125 + 1 / 16
        assert line["kept_guess"] * 16 % 1 == 0


def test_how_often_the_counters_are_read_does_not_matter(tmp_path):
    """Neither logging nor saving: sizes of products decide the rounding, and a run must depend on neither."""
    rarely = trained(tmp_path / "rarely", budget__epochs=6)
    often = trained(tmp_path / "often", budget__epochs=6, log__every_updates=1, checkpoint__every_updates=2)
    assert [(a["kept_share"], a["kept_guess"]) for a in rarely] == [
        (b["kept_share"], b["kept_guess"]) for b in often
    ]


def test_evaluation_and_an_exact_loss_guess_nothing(tmp_path, asked):
    lines = trained(tmp_path / "evaluated", data__validation_fraction=0.3, budget__epochs=9)
    assert {share for gradient, share in asked if not gradient} == {1.0}
    assert lines[-1]["kept_guess"] < 1.0
    asked.clear()
    lines = trained(tmp_path / "exact", loss__skip_below=0.0, budget__epochs=9)
    assert {share for _, share in asked} == {1.0}
    assert "kept_share" not in lines[0]


def test_the_kernels_train_alike_whatever_the_guess(tmp_path, monkeypatch):
    """In the interpreter, as on a GPU. A quarter is too small a guess here in most updates, and too large in
    none."""
    from csrc_triton import kept_rows

    interpret(monkeypatch, "csrc_triton.cross_entropy", "csrc_triton.kept_rows")
    monkeypatch.setattr(products, "CAPACITY_STEP", 1)
    rooms, product = [], kept_rows.kept_head

    def noting(gradient, hidden, order, count, room, out):
        rooms.append((gradient.shape[0], room, int(count)))
        product(gradient, hidden, order, count, room, out)

    def trained_with(guess):
        monkeypatch.setattr(Progress, "_guess_kept", lambda self, _: setattr(self, "kept_guess", guess))
        return trained(tmp_path / str(guess), count=3, budget__epochs=2)

    monkeypatch.setattr(kept_rows, "kept_head", noting)
    guessed = trained_with(0.25)
    assert any(room < min(count, rows) for rows, room, count in rooms)
    rooms.clear()
    full = trained_with(1.0)
    assert not rooms
    for one, other in zip(guessed, full, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["correct"] == other["correct"]


def test_counting_reads_nothing_back():
    misses = torch.tensor([-3.0, -0.5, float("nan"), -4.0])
    with SyncCounter() as syncs:
        needed = products.needed_share(misses, 10.0**-2)
    assert syncs.total == 0, syncs.found
    assert needed.dtype == torch.float64
    assert float(needed) == 2 / products.CAPACITY_STEP, "few rows: a step of capacity holds them"


def test_what_was_needed_would_have_sufficed():
    for rows, kept in ((1000, 700), (256, 255), (3000, 1), (40, 40), (0, 0)):
        misses = torch.full((rows,), -5.0)
        misses[:kept] = -1.0
        assert products.capacity(rows, float(products.needed_share(misses, 1e-2))) >= kept


class TestTheGuess:
    def epoch(self, progress, *shares, updates=3):
        progress.record_kept_share(shares)
        progress.update = progress.updates_in_epoch = updates
        progress.next_epoch()

    def test_is_the_largest_share_of_the_epoch_with_room_in_sixteenths(self):
        progress = Progress()
        self.epoch(progress, 0.2, 0.4, 0.3)
        assert progress.kept_guess == 8 / 16  # 0.4 · 9/8 = 7.2 / 16
        self.epoch(progress, 0.1)
        assert progress.kept_guess == 2 / 16, "the epoch before is forgotten"
        self.epoch(progress, 0.0)
        assert progress.kept_guess == 1 / 16, "all memorised"
        self.epoch(progress)
        assert progress.kept_guess == 1.0, "nothing counted"
        self.epoch(progress, 0.97)
        assert progress.kept_guess == 1.0

    @pytest.mark.parametrize(
        "change",
        [
            # other rates: the plan that was to come is closed unfinished
            lambda progress: progress.next_epoch(),
            lambda progress: progress.next_stage(1, 0),
            lambda progress: progress.leave_out([3]),
        ],
    )
    def test_begins_anew_where_other_samples_come(self, change):
        progress = Progress()
        self.epoch(progress, 0.2)
        assert progress.kept_guess == 4 / 16
        progress.record_kept_share([0.1])
        change(progress)
        assert (progress.kept_guess, progress.kept_most) == (1.0, None)

    def test_is_put_back_with_a_moment(self):
        progress = Progress(kept_guess=0.25, kept_most=0.2)
        other = Progress()
        load_values(values_of(progress), other)
        assert (other.kept_guess, other.kept_most) == (0.25, 0.2)
