"""Three trainers that are given the same model and samples: ours, TRL's SFTTrainer, and a loop in the style
of paper A's code.

Used by `benchmarks.suites.end_to_end` on a CPU and by part E (`benchmarks.suites.gpu.trainers`) on a GPU.
`ours` computes every statistic of the ledger; `trl` its own token accuracy and entropy; `paper` loss,
accuracy, entropy, top-1 probability and margin on full logits, `.item()` every update.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import resource
import tempfile
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SEED, LR, LOG_EVERY = 7, 1e-4, 10
LEAST_UPDATES = 3  # in a window that is closed early


@dataclass(frozen=True)
class Given:
    """What every trainer of a comparison is given."""

    config: Mapping[str, Any]  # architecture with its model_type; the weights are drawn at random
    rows: Sequence[Mapping[str, list[int]]]  # samples: input_ids, and labels (-100 = not trained)
    row_tokens: int  # of a packed row
    device: str = "cpu"


@dataclass
class Window:
    """The updates that are measured: the warm-up is left out, the device is waited for at both ends, work is
    counted exactly.

    ends: `time.monotonic()` from which on the window closes early, once LEAST_UPDATES are in it.
    """

    device: str
    warmup: int  # at least 1
    updates: int
    ends: float = float("inf")
    closed: bool = field(default=False, init=False)
    began: float = field(default_factory=time.perf_counter, init=False)
    # from here to the end of the first update: building, loading and compiling
    first_s: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self._seen, self._work = 0, Counter[str]()
        self._marks: list[Any] = []
        self._from = self._to = 0.0
        self._used_from = self._used_to = 0.0  # processor time of the process
        self._memory: dict[str, int] = {}

    def update(self, **work: int) -> bool:
        """One more update is queued, with samples, tokens, trained tokens and slots of it. True: that was the
        last one."""
        self._seen += 1
        if self._seen == 1:
            self._wait()
            self.first_s = time.perf_counter() - self.began
        if self._seen <= self.warmup:
            if self._seen == self.warmup:
                self._wait()
                self._from, self._used_from = time.perf_counter(), time.process_time()
                self._mark()
            return False
        if not self.closed:
            self._work.update(work)
            self._mark()
            measured = self._seen - self.warmup
            if measured == self.updates or (measured >= LEAST_UPDATES and time.monotonic() > self.ends):
                self._wait()
                self._to, self._used_to = time.perf_counter(), time.process_time()
                self.closed = True
                self._memory = memory(self.device)
        return self.closed

    def figures(self) -> dict[str, Any]:
        """seconds, processor_seconds of all threads, updates, their work, milliseconds of each (on a GPU
        between events on its stream), peaks of memory."""
        if not self.closed:
            raise RuntimeError(
                f"{self._seen} updates were made, expected {self.warmup + self.updates}: nothing is measured"
            )
        marks = self._marks
        if self.device == "cuda":
            times = [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]
        else:
            times = [1e3 * (b - a) for a, b in itertools.pairwise(marks)]
        made = {
            "seconds": self._to - self._from,
            "processor_seconds": self._used_to - self._used_from,
            "updates": len(times),
            "update_ms": times,
            "first_s": self.first_s,
        }
        return (
            made
            | {"samples_per_update": self._work["samples"] / len(times)}
            | dict(self._work)
            | self._memory
        )

    def _mark(self) -> None:
        if self.device != "cuda":
            self._marks.append(time.perf_counter())
            return
        import torch

        self._marks.append(torch.cuda.Event(enable_timing=True))
        self._marks[-1].record()

    def _wait(self) -> None:
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()


def memory(device: str) -> dict[str, int]:
    """peak_bytes: most that torch held on the device, on a CPU the process's largest resident size;
    reserved_bytes: for it."""
    if device == "cuda":
        import torch

        return {
            "peak_bytes": torch.cuda.max_memory_allocated(),
            "reserved_bytes": torch.cuda.max_memory_reserved(),
        }
    return {"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


# Each of the three trains until its window is closed and returns the loss of every update it knows.


def build_model(given: Given, **options: Any) -> Any:
    """A Hugging Face model with random weights, drawn on the device. options: dtype, attn_implementation."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(SEED)
    settings = dict(given.config)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.device(given.device):
        return AutoModelForCausalLM.from_config(config, **options)


class Enough(Exception):
    """Not an error: what was wanted is measured, and the run is left before it saves a model."""


def run_ours(
    given: Given,
    window: Window,
    batch: Mapping[str, Any],
    *,
    model: Mapping[str, Any] | None = None,
    leave: bool = False,
) -> list[float]:
    """batch, model: settings of those sections. leave: end the run with the window; else with its budget,
    weights saved."""
    from repsft_fast import train
    from repsft_fast.throughput import Work

    before = Work()

    def on_update(work: Work) -> None:
        nonlocal before
        made, before = work.minus(before), work.copy()
        if (
            window.update(samples=made.samples, tokens=made.tokens, trained=made.trained, slots=made.slots)
            and leave
        ):
            raise Enough("what was wanted is measured, the run is left")

    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "train.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in given.rows))
        settings: dict[str, Any] = {
            "run": {"folder": f"{folder}/run", "seed": SEED},
            "model": {"config": dict(given.config), **(model or {})},
            "data": {"train": str(data), "cache_folder": f"{folder}/cache"},
            "batch": {"row_tokens": given.row_tokens, **batch},
            "optim": {"lr": LR},
            # Where the run is left, its decay must not begin before: one more reading of the ledger.
            "budget": {"updates": (window.updates + window.warmup) * (10 if leave else 1)},
            "stop": {"token_accuracy": None},
            "log": {"every_updates": LOG_EVERY},
        }
        with contextlib.suppress(Enough):
            train(settings, on_update=on_update)
        lines = [
            json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
        ]
    return [line["loss"] for line in lines if line["kind"] == "update"]


class Counted:
    """TRL's collator, keeping what each batch holds. Batches are trained in the order they are made in."""

    def __init__(self, collator: Any):
        self.collator, self.waiting = collator, deque[Counter[str]]()

    def __call__(self, examples: list[dict]) -> dict:
        batch = self.collator(examples)
        lengths = [length for example in examples for length in example["seq_lengths"]]
        trained = int((batch["labels"] != -100).sum())
        slots = batch["input_ids"].numel()
        self.waiting.append(Counter(samples=len(lengths), tokens=sum(lengths), trained=trained, slots=slots))
        return batch


def run_trl(
    given: Given,
    window: Window,
    *,
    arguments: Mapping[str, Any] | None = None,
    model: Mapping[str, Any] | None = None,
) -> tuple[list[float], Any]:
    """arguments: of SFTConfig, beyond the common ones; model: options of `build_model`. Also returns the
    trainer."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            work: Counter[str] = sum((made for made, _ in pending), Counter())
            losses.append(sum(loss for _, loss in pending))
            pending.clear()
            if window.update(**work):
                control.should_training_stop = True

    losses: list[Any] = []  # of updates, on the device until the end
    pending: list[tuple[Counter[str], Any]] = []  # of the update that is being made
    # Labels, since a completion_mask alone is read only with completion_only_loss: else every token would be
    # trained.
    data = Dataset.from_list([{"input_ids": row["input_ids"], "labels": row["labels"]} for row in given.rows])
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=build_model(given, **(model or {})),
            args=SFTConfig(output_dir=folder, **{**trl_arguments(given, window), **(arguments or {})}),
            train_dataset=data,
            processing_class=_three_words(),
            callbacks=[Clock()],
        )

        # The collator knows what a row holds and the loss what came of it: together they are one update.
        trainer.data_collator = counted = Counted(trainer.data_collator)
        compute = trainer.compute_loss

        def compute_loss(*positional: Any, **named: Any) -> Any:
            loss = compute(*positional, **named)
            pending.append((counted.waiting.popleft(), loss.detach()))
            return loss

        trainer.compute_loss = compute_loss
        trainer.train()
    return [float(loss) for loss in losses], trainer


def trl_arguments(given: Given, window: Window) -> dict[str, Any]:
    """Of SFTConfig: packing, no checkpointing of activations (TRL's default is on), nothing saved, nothing
    sent anywhere.

    On CUDA bf16 autocast over the model's own weights, and liger's layers where it is installed (TRL keeps
    its own fused head).
    """
    cuda = given.device == "cuda"
    return {
        "max_steps": window.updates + window.warmup, "per_device_train_batch_size": 1, "packing": True,
        "max_length": given.row_tokens, "learning_rate": LR, "lr_scheduler_type": "constant",
        "logging_steps": LOG_EVERY,
        "save_strategy": "no", "report_to": "none", "use_cpu": not cuda, "bf16": cuda,
        "gradient_checkpointing": False, "seed": SEED, "disable_tqdm": True, "dataloader_pin_memory": cuda,
        "use_liger_kernel": cuda and importlib.util.find_spec("liger_kernel") is not None,
    }  # fmt: skip


def run_paper_style(
    given: Given, window: Window, *, dtype: Any = None, order: Sequence[int] | None = None
) -> list[float]:
    """One sample an update, full logits, fp32 copies for the metrics, a host read of every one of them.

    dtype: of the weights; None = fp32. order: of the samples; None = as they are given.
    """
    import torch

    model = build_model(given, dtype=dtype or torch.float32)
    fused = {"fused": True} if given.device == "cuda" else {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0, **fused)
    rows = given.rows if order is None else [given.rows[i] for i in order]
    losses: list[float] = []
    while not window.closed:
        row = rows[len(losses) % len(rows)]
        ids = torch.tensor([row["input_ids"]], device=given.device)
        labels = torch.tensor([row["labels"]], device=given.device)
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        shifted, targets = logits[:, :-1].float(), labels[:, 1:]
        mask = targets != -100
        token_loss = torch.nn.functional.cross_entropy(
            shifted.transpose(1, 2), targets, ignore_index=-100, reduction="none"
        )
        loss = token_loss.sum() / mask.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

        # As that code logs: full-size copies, and a wait for every figure.
        with torch.no_grad():
            logprobs = shifted.log_softmax(-1)
            probabilities = logprobs.exp()
            entropy = -(probabilities * logprobs).sum(-1)[mask]
            top2 = shifted.topk(2, dim=-1).values
            figures = [
                loss.item(), token_loss[mask].std().item(),
                (shifted.argmax(-1) == targets)[mask].float().mean().item(),
                entropy.mean().item(), probabilities.max(-1).values[mask].mean().item(),
                (top2[..., 0] - top2[..., 1])[mask].mean().item(),
            ]  # fmt: skip
        losses.append(figures[0])
        trained = sum(label != -100 for label in row["labels"][1:])
        window.update(samples=1, tokens=len(row["input_ids"]), trained=trained, slots=len(row["input_ids"]))
    return losses


def _three_words() -> Any:
    """Three words: TRL asks for a tokenizer, and the samples are tokenised."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"t0": 0, "t1": 1, "t2": 2}, unk_token="t0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0", eos_token="t2")
