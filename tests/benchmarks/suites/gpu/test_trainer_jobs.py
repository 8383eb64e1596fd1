"""One trainer's work: what it is given, which attention counts, what is not timed."""

import importlib.util
import math
import statistics
from types import SimpleNamespace

import pytest

from benchmarks.suites.gpu import loops, trainer_jobs, trainers
from benchmarks.suites.gpu.loops import Given, Window
from benchmarks.suites.gpu.trainer_jobs import Job
from repsft_fast.sizing.known_models import MODELS

TRL = importlib.util.find_spec("trl") is not None


needs_trl = pytest.mark.skipif(not TRL, reason="trl is not installed")


class TestGiven:
    def test_samples_are_mixed_alike_everywhere_and_half_trained(self):
        rows = trainer_jobs.samples(1000, 128, 2048, 400)
        assert rows == trainer_jobs.samples(1000, 128, 2048, 400)
        lengths = [len(row["input_ids"]) for row in rows]
        assert 128 <= min(lengths) < 160
        assert 1800 < max(lengths) <= 2048
        assert statistics.median(lengths) == pytest.approx(512, rel=0.15), (
            "log-uniform: half of them below the geometric mean"
        )
        for row in rows:
            half = len(row["labels"]) // 2
            assert row["labels"] == [-100] * half + row["input_ids"][half:]
        ids = [token for row in rows for token in row["input_ids"]]
        assert (min(ids), max(ids)) == (3, 999)

    def test_the_models_are_the_true_ones(self):
        for model in trainers.SIZES:
            task = trainer_jobs.given(model, "cuda", toy=False)
            assert {name: task.config[name] for name in MODELS[model]} == MODELS[model]
            assert task.config["max_position_embeddings"] >= trainer_jobs.LONGEST
            assert max(max(row["input_ids"]) for row in task.rows) < task.config["vocab_size"]
            assert (task.row_tokens, len(task.rows)) == (8192, 360)

    def test_our_updates_fill_two_rows_as_often_as_they_are_timed(self):
        import numpy as np

        from repsft_fast.data.plan import Plan, SampleIndex

        task = trainer_jobs.given("SmolLM2-135M", "cpu", toy=False)
        lengths = np.array([len(row["input_ids"]) - 1 for row in task.rows])
        index = SampleIndex(
            lengths, lengths, np.zeros(len(lengths), np.int32), np.ones(len(lengths)), ("all",)
        )
        plan = Plan(
            index, seed=loops.SEED, row_tokens=task.row_tokens, bucket_tokens=128, ranks=1, batch_tokens=16384
        )
        updates = [plan.epoch(0, 0)[i] for i in range(12)]
        assert {len(update.ranks[0]) for update in updates} == {2}
        assert statistics.mean(update.real_tokens for update in updates) > 0.95 * 16384


class TestTrlAttention:
    """The first attention that runs and keeps documents apart is the one that counts."""

    def do(self, monkeypatch, leaks):
        def run(task, window, *, arguments, model):
            if leaks[model["attn_implementation"]] is None:
                raise RuntimeError("no such kernel")
            for _ in range(window.warmup + window.updates):
                window.update(samples=1, tokens=10)
            name = model["attn_implementation"]
            return [2.0, 1.0], SimpleNamespace(
                name=name, args=SimpleNamespace(optim=SimpleNamespace(value="adamw"))
            )

        def leak(trainer, rows):
            if leaks[trainer.name] == "broken":
                raise TypeError("no such argument")
            return leaks[trainer.name]

        monkeypatch.setattr(trainer_jobs, "run_trl", run)
        monkeypatch.setattr(trainer_jobs, "leak_between_documents", leak)
        monkeypatch.setattr(trainer_jobs, "said", lambda arguments: "as given")
        one = {"per_device_train_batch_size": 1}
        monkeypatch.setattr(trainer_jobs, "attentions", lambda task: [(name, one) for name in leaks])
        task = Given({}, [], 8)
        return trainer_jobs.do_trl(Job("trl", "m", 1), task, lambda: Window("cpu", 1, 3))

    def test_what_fails_or_leaks_is_passed_over_and_said(self, monkeypatch):
        answer = self.do(
            monkeypatch, {"fails": None, "leaks": (0.5, 1.0), "good": (1e-4, 1.0), "later": (0.0, 1.0)}
        )
        assert (answer["attention"], answer["leak"], answer["updates"], answer["tokens"]) == (
            "good",
            1e-4,
            3,
            30,
        )
        assert answer["tried"][0] == "fails: RuntimeError: no such kernel"
        assert answer["tried"][1].startswith(
            "leaks: RuntimeError: packed documents see each other: 0.5 beside 1"
        )

    @pytest.mark.parametrize("seen", [(0.0, 0.0), (math.nan, 1.0), (0.1, math.nan)])
    def test_a_look_that_sees_nothing_proves_nothing(self, seen, monkeypatch):
        with pytest.raises(
            RuntimeError, match="TRL ran with no attention: blind: RuntimeError: packed documents"
        ):
            self.do(monkeypatch, {"blind": seen})

    def test_a_look_that_cannot_be_taken_loses_no_time_that_was_measured(self, monkeypatch):
        answer = self.do(monkeypatch, {"fast": "broken", "slow": (0.0, 1.0)})
        assert (answer["attention"], answer["unchecked"]) == ("fast", "TypeError: no such argument")
        assert "leak" not in answer

    def test_on_a_gpu_flex_attention_comes_before_the_whole_square_and_flash_before_both(self, monkeypatch):
        from transformers import utils

        for number in (2, 3, 4):
            monkeypatch.setattr(utils, f"is_flash_attn_{number}_available", lambda: False, raising=False)
        task = Given({}, [], 8192, "cuda")
        (flex, padded), (last, apart) = trainer_jobs.attentions(task)
        assert (flex, last) == ("flex_attention", "sdpa")
        assert padded["pad_to_multiple_of"] == padded["per_device_train_batch_size"] * 8192
        for arguments in (padded, apart):
            assert arguments["per_device_train_batch_size"] * arguments["gradient_accumulation_steps"] == 2
        monkeypatch.setattr(utils, "is_flash_attn_3_available", lambda: True, raising=False)
        assert [name for name, _ in trainer_jobs.attentions(task)] == [
            "flash_attention_3",
            "flex_attention",
            "sdpa",
        ]


def test_a_trainer_whose_loss_is_not_finite_is_not_timed(monkeypatch):
    monkeypatch.setattr(trainer_jobs, "do_paper", lambda *_: {"losses": [1.0, math.nan]})
    with pytest.raises(RuntimeError, match="not finite"):
        trainer_jobs.do(Job("paper", "Qwen3-0.6B", 1), "cpu", toy=True, ends=math.inf)
