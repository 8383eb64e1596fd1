"""The run's row shapes: where they are chosen, that they are kept by a resumption, and what is said of them."""

import json

import pytest
import torch
import yaml

from repsft_fast import dry_run
from repsft_fast.config import Config
from repsft_fast.data.row_lengths import RowLengths
from repsft_fast.errors import ConfigError
from repsft_fast.state import state_hash
from repsft_fast.training import row_lengths, trainer
from repsft_fast.training.build import build
from repsft_fast.training.recovery import use_row_tokens
from repsft_fast.training.step import OutOfMemory
from repsft_fast.training.trainer import train
from tests.helpers import runs

NAMED = [24, 40, 64]
LONG = {
    "batch__samples": 12,
    "checkpoint__every_updates": 3,
    "stop__token_accuracy": None,
    "budget__epochs": 6,
}


@pytest.fixture
def few(monkeypatch):
    """Rows take few lengths on this CPU as they do on a GPU."""
    plain = row_lengths.are_few
    monkeypatch.setattr(row_lengths, "are_few", lambda config, device: plain(config, torch.device("cuda")))


@pytest.fixture
def weights(monkeypatch):
    """Of every run that ended, in their order."""
    found = []
    finish = trainer.finish

    def finished(run):
        found.append(state_hash(dict(run.parts.model.named_parameters()), {}))
        return finish(run)

    monkeypatch.setattr(trainer, "finish", finished)
    monkeypatch.setattr("repsft_fast.report.pictures.draw", lambda folder, **more: None)
    return found


def killed_after(folder, updates, **changes):
    def after_update(work):
        if work.updates == updates:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        train(runs.settings(folder, **{**LONG, **changes}), on_update=after_update)


def written(folder):
    return yaml.safe_load((folder / "run" / "run.yaml").read_text())["batch"]["row_lengths"]


def saved(folder):
    run = folder / "run" / "checkpoints"
    generation = json.loads((run / "LATEST").read_text())["generation"]
    values = json.loads((run / f"gen-{generation:08d}" / "values-00000-of-00001.json").read_text())
    return values["decided"]["choices"]["row_lengths"]


def notes(folder, words):
    return [line["text"] for line in runs.metrics(folder, "note") if words in line["text"]]


@pytest.mark.parametrize(
    ("changes", "cpu", "cuda"),
    [
        ({}, False, True),
        ({"model__compile": True}, True, True),
        ({"batch__row_lengths": "off", "model__compile": True}, False, False),
        ({"batch__row_lengths": NAMED}, True, True),
        ({"batch__bucket_tokens": 32}, False, False),
        ({"batch__pack": False}, False, False),
    ],
)
def test_where_rows_take_few_lengths(changes, cpu, cuda, tmp_path):
    config = Config.of(runs.settings(tmp_path, **changes))
    assert row_lengths.are_few(config, torch.device("cpu")) is cpu
    assert row_lengths.are_few(config, torch.device("cuda")) is cuda


def test_on_a_cpu_nothing_is_padded(tmp_path):
    parts = build(Config.of(runs.settings(tmp_path)))
    assert parts.row_lengths is None
    assert row_lengths.said(parts.plan) is None
    assert row_lengths.now(parts) is None


def test_every_row_of_a_run_is_of_the_shapes_it_began_with(few, tmp_path):
    """Training rows and evaluations' rows, through epochs, one task alone and skipped samples."""
    settings = runs.settings(tmp_path, samples=60, tasks=3, data__validation_fraction=0.3)
    parts = build(Config.of(settings))
    shapes, found = parts.row_lengths, set()
    assert shapes.longest == row_lengths.longest_of(parts.data)
    for number, more in enumerate(
        [{}, {"active": [1]}, {"skip": [0, 3]}, {"task_weights": {0: 1, 1: 5, 2: 1}}]
    ):
        for update in parts.plan.epoch(number, number, **more):
            for row in parts.rows(update):
                found.add((row.tokens.shape[1], len(row.cu_seqlens), row.max_seqlen))
                assert row.cu_seqlens[-1] == row.tokens.shape[1]
                assert max(row.segment_lengths) <= row.max_seqlen
    assert {length for length, _, _ in found} <= set(shapes.lengths)
    assert len(found) == len({length for length, _, _ in found}) <= 6
    assert {borders for _, borders, _ in found} == {shapes.documents + 2}
    evaluated = parts.validation._rows
    assert {row.padded_tokens for row in evaluated} <= set(shapes.lengths)
    assert len({row.segments for row in evaluated}) == 1
    assert all(len(row.samples) < row.segments for row in evaluated)


def test_a_held_out_sample_longer_than_all_of_the_training(few, tmp_path):
    held_out = runs.write_samples(tmp_path / "held_out.jsonl", 8, longest=50)
    settings = runs.settings(tmp_path, batch__samples=1, data__validation=str(held_out))
    parts = build(Config.of(settings))
    longest = int(parts.data.validation.index.lengths.max())
    assert parts.row_lengths.longest == longest > parts.data.train.index.lengths.max()
    assert parts.row_lengths.capacity >= longest


def test_what_is_said(few, tmp_path, capsys, weights):
    train(runs.settings(tmp_path, **LONG))
    (note,) = notes(tmp_path, "rows take")
    lengths = written(tmp_path)
    assert note.startswith(f"rows take {len(lengths)} lengths ({', '.join(map(str, lengths))}) of at most ")
    assert note.endswith("% of their slots are padding")
    dry_run(runs.settings(tmp_path / "other"))
    assert "; rows take " in capsys.readouterr().out


@pytest.mark.parametrize("named", [[], [40, 24], [24, 24], [32, 65]], ids=str)
def test_lengths_that_are_none(named, tmp_path):
    with pytest.raises(ConfigError, match=r"batch\.row_lengths"):
        Config.of(runs.settings(tmp_path, batch__row_lengths=named))


def test_lengths_that_hold_no_sample_or_a_row_too_long(tmp_path):
    with pytest.raises(ConfigError, match=r"batch\.row_lengths: hold no sample that long.*at least 19"):
        build(Config.of(runs.settings(tmp_path, batch__row_lengths=[8, 16])))


@pytest.mark.parametrize("changes", [{"batch__bucket_tokens": 32}, {"batch__pack": False}])
def test_lengths_beside_what_says_otherwise(changes, tmp_path):
    with pytest.raises(ConfigError, match=r"batch\.row_lengths"):
        Config.of(runs.settings(tmp_path, batch__row_lengths=NAMED, **changes))


class TestLaw12:
    def test_a_resumed_run_keeps_them(self, few, tmp_path, monkeypatch, weights):
        train(runs.settings(tmp_path / "whole", **LONG))
        first = written(tmp_path / "whole")
        killed_after(tmp_path, 5)
        assert (written(tmp_path), saved(tmp_path)["lengths"]) == (first, first)

        # a version that would choose others
        def others(plan, *, longest, lengths=None):
            return RowLengths(lengths or (50, 64), 2, longest)

        monkeypatch.setattr(row_lengths, "choose_lengths", others)
        train(runs.settings(tmp_path, **LONG), resume=True)
        assert weights[0] == weights[1]
        assert (written(tmp_path), saved(tmp_path)["lengths"]) == (first, first)
        (said,) = notes(tmp_path, "begun now")
        assert "batch.row_lengths stays" in said

    def test_the_lengths_can_be_seen_in_the_weights(self, few, tmp_path, weights):
        """Without this the test above would prove nothing."""
        train(runs.settings(tmp_path / "some", **LONG))
        train(runs.settings(tmp_path / "others", batch__row_lengths=[20, 24], **LONG))
        assert weights[0] != weights[1]

    def test_nothing_is_said_where_the_same_is_chosen(self, few, tmp_path, weights):
        killed_after(tmp_path, 5)
        train(runs.settings(tmp_path, **LONG), resume=True)
        assert notes(tmp_path, "row_lengths") == []

    def test_killed_before_its_first_checkpoint(self, few, tmp_path, monkeypatch, weights):
        train(runs.settings(tmp_path / "whole", **LONG))
        killed_after(tmp_path / "same", 2)
        train(runs.settings(tmp_path / "same", **LONG), resume=True)
        assert notes(tmp_path / "same", "row_lengths") == []
        killed_after(tmp_path, 2)
        plain = row_lengths.choose_lengths

        def others(plan, *, longest, lengths=None):
            return plain(plan, longest=longest, lengths=lengths or (20, 24))

        monkeypatch.setattr(row_lengths, "choose_lengths", others)
        train(runs.settings(tmp_path, **LONG), resume=True)
        assert weights[0] == weights[1] == weights[2]
        (said,) = notes(tmp_path, "row_lengths")
        assert "begun now it would be 2 lengths (20, 24)" in said

    def test_a_run_that_has_ended_is_asked_for_no_other(self, few, tmp_path, capsys, weights):
        train(runs.settings(tmp_path, **LONG))
        capsys.readouterr()
        train(runs.settings(tmp_path, **LONG), resume=True)
        told = capsys.readouterr().out
        assert "this run has ended" in told
        assert "without effect" not in told
        assert len(weights) == 1

    def test_another_value_is_taken_and_told(self, few, tmp_path, weights):
        killed_after(tmp_path, 5)
        train(runs.settings(tmp_path, batch__row_lengths=NAMED, **LONG), resume=True)
        assert written(tmp_path) == NAMED
        (said,) = notes(tmp_path, "as asked")
        assert "batch.row_lengths is 3 lengths (24, 40, 64)" in said

    def test_a_run_that_padded_to_a_bucket_goes_on_so(self, tmp_path, monkeypatch, weights):
        train(runs.settings(tmp_path / "whole", **LONG))
        killed_after(tmp_path, 5)
        assert (written(tmp_path), saved(tmp_path)) == ("auto", None)
        monkeypatch.setattr(row_lengths, "are_few", lambda config, device: True)
        train(runs.settings(tmp_path, **LONG), resume=True)
        assert weights[0] == weights[1]

    def test_and_one_with_lengths_where_none_would_be_chosen(self, tmp_path, monkeypatch, weights):
        with monkeypatch.context() as patch:
            patch.setattr(row_lengths, "are_few", lambda config, device: True)
            train(runs.settings(tmp_path / "whole", **LONG))
            killed_after(tmp_path, 5)
        train(runs.settings(tmp_path, **LONG), resume=True)
        assert weights[0] == weights[1]

    def test_evaluations_take_them_too(self, few, tmp_path):
        settings = runs.settings(tmp_path, data__validation_fraction=0.3, stop__probe_samples=5)
        parts = build(Config.of(settings))
        row_lengths.use(parts, [51, 63])
        for scorer in (parts.validation, parts.probe):
            assert {row.padded_tokens for row in scorer._rows} <= {51, 63}

    def test_a_value_that_is_none_is_refused(self, few, tmp_path):
        parts = build(Config.of(runs.settings(tmp_path)))
        with pytest.raises(ConfigError, match="row lengths: are none"):
            row_lengths.use(parts, {"lengths": [64, 64], "documents": 1, "longest": 3})
        with pytest.raises(ConfigError, match="hold no sample that long"):
            row_lengths.use(parts, {"lengths": [8], "documents": 1, "longest": 8})


class TestHalvedRows:
    """After memory ran out rows are shorter, and take few lengths of their own."""

    def test_they_are_chosen_anew_and_told(self, few, tmp_path, monkeypatch, weights):
        plain, calls = trainer.train_step, []

        def step(parts, update):
            calls.append(parts.plan.row_lengths)
            if len(calls) == 2:
                raise OutOfMemory(torch.OutOfMemoryError("no room"), torn=False)
            plain(parts, update)

        monkeypatch.setattr(trainer, "train_step", step)
        settings = {**LONG, "numbers__on_out_of_memory": "retry"}
        train(runs.settings(tmp_path, **settings))
        assert (calls[1].capacity, calls[2].capacity) == (64, 32)
        assert len(notes(tmp_path, "rows take")) == 2
        assert saved(tmp_path) == calls[0].to_json(), "what the run began with"

    @pytest.mark.parametrize("changes", [{}, {"batch__row_lengths": NAMED}], ids=["chosen", "named"])
    def test_a_resumption_finds_the_same(self, few, changes, tmp_path):
        parts = build(Config.of(runs.settings(tmp_path, **changes)))
        parts.lasting.row_tokens = 32
        began, used = parts.row_lengths, []
        for _ in range(2):
            row_lengths.use(parts, row_lengths.now(parts))
            assert parts.plan.row_lengths == began
            use_row_tokens(parts)
            used.append(parts.plan.row_lengths)
        assert used[0] == used[1]
        assert used[0].capacity == 32
        assert parts.row_lengths == began
