"""The trainers that part E and the CPU form share: their window, TRL's counts and leaks, what a CPU worker
says."""

import dataclasses
import importlib.util
import statistics
import time

import pytest
import torch

from benchmarks.suites.gpu import loops, trainer_jobs
from benchmarks.suites.gpu.loops import Given, Window
from tests.helpers.fake_cuda import fake_cuda


class TestWindow:
    def test_warm_up_is_left_out_and_work_counted_from_there(self):
        window = Window("cpu", 2, 3)
        with pytest.raises(RuntimeError, match="expected 5"):
            window.figures()
        assert [window.update(tokens=10**n, samples=1) for n in range(6)] == [False] * 4 + [True] * 2
        figures = window.figures()
        assert (figures["tokens"], figures["samples"], figures["updates"]) == (11100, 3, 3)
        assert sum(figures["update_ms"]) / 1e3 == pytest.approx(figures["seconds"], abs=1e-3)

    def test_processor_time_is_of_what_is_measured_and_not_of_waiting(self, monkeypatch):
        used = iter([5.0, 7.0])
        monkeypatch.setattr(loops.time, "process_time", lambda: next(used))
        window = Window("cpu", 2, 3)
        for _ in range(6):
            window.update(samples=1)
        assert window.figures()["processor_seconds"] == 2.0

    def test_it_closes_early_with_a_few_updates_in_it(self):
        window = Window("cpu", 1, 100, ends=time.monotonic())
        assert [window.update(samples=1) for _ in range(4)] == [False, False, False, True]
        assert window.figures()["updates"] == loops.LEAST_UPDATES

    def test_a_gpu_is_waited_for_at_both_ends_and_timed_by_its_events(self, monkeypatch):
        said = []

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                said.append("event")

            def elapsed_time(self, other):
                return 7.0

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: said.append("wait"))
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 11)
        monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 12)
        window = Window("cuda", 2, 2)
        for _ in range(4):
            window.update(samples=1)
        assert said == ["wait", "wait", "event", "event", "event", "wait"], (
            "the first update, the beginning, its end"
        )
        figures = window.figures()
        assert (figures["update_ms"], figures["peak_bytes"], figures["reserved_bytes"]) == (
            [7.0, 7.0],
            11,
            12,
        )


class TestModel:
    def test_weights_are_drawn_on_the_gpu(self, monkeypatch):
        task = trainer_jobs.given("Qwen3-0.6B", "cuda", toy=True)
        # what is imported on the way asks for a real GPU
        loops.build_model(dataclasses.replace(task, device="cpu"))
        with fake_cuda(monkeypatch) as gpu:
            model = loops.build_model(task, dtype=torch.bfloat16, attn_implementation="sdpa")
            tensors = [*model.named_parameters(), *model.named_buffers()]
            assert {str(tensor.device) for _, tensor in tensors} == {"cuda:0"}
            assert {tensor.dtype for name, tensor in tensors if name.endswith("weight")} == {torch.bfloat16}
            assert not gpu.strangers
            assert gpu.operators["aten::normal_"] > 0


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed")
class TestTrl:
    """TRL itself, where it is installed."""

    def trained(self, attention="sdpa", window=None, **arguments):
        task = trainer_jobs.given("Qwen3-0.6B", "cpu", toy=True)
        window = window or Window("cpu", 1, 3)
        return window, *loops.run_trl(
            task, window, arguments=arguments, model={"attn_implementation": attention}
        )

    def test_work_is_counted_from_the_rows_that_were_trained(self):
        class Seen(Window):
            def update(self, **work):
                made.append(work)
                return super().update(**work)

        made = []
        window, losses, trainer = self.trained(window=Seen("cpu", 1, 3), gradient_accumulation_steps=2)
        assert len(made) == len(losses) == trainer.state.global_step == 4
        assert sum(work["slots"] for work in made) == trainer.state.log_history[-1]["num_tokens"], (
            "TRL's own count"
        )
        assert all(work["tokens"] == work["slots"] for work in made), "nothing is padded here"
        assert window.figures()["tokens"] == sum(work["tokens"] for work in made[1:])
        for work in made:  # labels of the second half of each sample, rounded up
            assert 0 <= work["trained"] - work["tokens"] / 2 <= work["samples"] / 2
        assert statistics.mean(losses) == pytest.approx(trainer.state.log_history[-1]["train_loss"], rel=1e-5)

    def test_padding_is_no_token(self):
        window, _, _ = self.trained(per_device_train_batch_size=2, pad_to_multiple_of=256)
        figures = window.figures()
        assert figures["slots"] == 3 * 256
        assert 0.9 * 3 * 256 < figures["tokens"] < 3 * 256

    def test_documents_that_see_each_other_are_seen(self):
        _, _, trainer = self.trained()
        leak, moved = trainer_jobs.leak_between_documents(trainer, 1)
        assert leak == 0.0 < moved
        inner = trainer.data_collator.collator

        def one_document(examples):
            batch = inner(examples)
            return {**batch, "position_ids": torch.arange(batch["input_ids"].shape[1])[None]}

        trainer.data_collator.collator = one_document
        leak, moved = trainer_jobs.leak_between_documents(trainer, 1)
        assert leak > trainer_jobs.LEAK * moved

    def test_flex_attention_is_compiled_once_for_all_packed_rows(self, monkeypatch):
        """Through the same calls as on a GPU; graphs are run as they were traced, which takes no compiler."""
        import torch._dynamo
        from torch._dynamo.utils import counters
        from torch.nn.attention import flex_attention

        compiled = torch.compile
        monkeypatch.setattr(
            torch, "compile", lambda function=None, **_: compiled(function, backend="aot_eager")
        )
        # it refuses gradients on a CPU
        monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
        counters.clear()
        torch._dynamo.reset()
        _, arguments = trainer_jobs.attentions(Given({}, [], 128, "cuda"))[-2]
        task = trainer_jobs.given("Qwen3-0.6B", "cpu", toy=True)
        answer = trainer_jobs.trl_with("flex_attention", arguments, torch.float32, task, Window("cpu", 1, 4))
        assert answer["compiled_graphs"] == 2, "attention and its mask"
        assert answer["slots"] == 4 * 256
        assert answer["leak"] == 0.0 < answer["moved"]

    def test_arguments_for_a_gpu_are_arguments_that_trl_has(self, monkeypatch, tmp_path):
        from trl import SFTConfig

        task = trainer_jobs.given("Qwen3-0.6B", "cuda", toy=True)
        common = loops.trl_arguments(task, Window("cpu", 1, 3))
        assert (common["bf16"], common["use_cpu"], common["gradient_checkpointing"]) == (True, False, False)
        for _, arguments in trainer_jobs.attentions(task):
            made = SFTConfig(
                output_dir=str(tmp_path), **{**common, **arguments, "use_cpu": True, "bf16": False}
            )
            assert made.packing
            assert made.per_device_train_batch_size * made.gradient_accumulation_steps == 2
            assert "gradient_checkpointing False" in trainer_jobs.said(made)
