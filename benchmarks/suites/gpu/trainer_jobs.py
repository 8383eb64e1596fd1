"""Part E, what a process does: one trainer on one model, with the samples that all of them get.

Samples: lengths log-uniform from 128 to 2,048 (mean 680), ids log-uniform over the vocabulary, the second
half trained.
"""

from __future__ import annotations

import gc
import importlib.metadata
import importlib.util
import math
import random
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.suites.gpu.loops import SEED, Given, Window, run_ours, run_paper_style, run_trl
from benchmarks.suites.gpu.session import first_line

SHORTEST, LONGEST, SAMPLES = 128, 2048, 360  # 14 updates of ours, no sample twice
ROW, PER_UPDATE = 8192, 16384
TOY_CUT = 64  # lengths and rows of a rehearsal are this much shorter
LEAK = 1e-3  # of what a document's own change moves: above it, packed documents see each other


@dataclass(frozen=True)
class Job:
    """One trainer on one model. needs_s: from "go" to its answer on an H100, building and compiling among it,
    pessimistic."""

    implementation: str
    model: str
    needs_s: float

    @property
    def kind(self) -> str:
        return self.implementation.split(",")[0]

    @property
    def what(self) -> str:
        return f"{self.implementation} on {self.model}"

    @property
    def one_sample(self) -> bool:
        return self.implementation in ("paper", "ours, one sample")


def given(model: str, device: str, *, toy: bool) -> Given:
    """The model and its samples. toy: the architecture with small numbers, everything TOY_CUT times
    shorter."""
    from benchmarks.suites.gpu.training import TOY, TRUE
    from repsft_fast.sizing.known_models import MODELS

    config = {
        **MODELS[model],
        **TRUE[MODELS[model]["model_type"]],
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    cut = TOY_CUT if toy else 1
    config |= TOY if toy else {}
    return Given(
        config, samples(config["vocab_size"], SHORTEST // cut, LONGEST // cut, SAMPLES), ROW // cut, device
    )


def samples(vocabulary: int, shortest: int, longest: int, count: int) -> list[dict[str, list[int]]]:
    """input_ids and labels, drawn alike on every machine. Few ids are frequent, so that there is something to
    learn at once."""
    draw, rows = random.Random(SEED), []
    for _ in range(count):
        length = round(shortest * (longest / shortest) ** draw.random())
        ids = [2 + int((vocabulary - 2) ** draw.random()) for _ in range(length)]
        rows.append({"input_ids": ids, "labels": [-100] * (length // 2) + ids[length // 2 :]})
    return rows


def order_of_ours(task: Given) -> list[int]:
    """Samples in the order in which our first epoch visits them."""
    import numpy as np

    from repsft_fast.data.plan import Plan, SampleIndex

    lengths = np.array([len(row["input_ids"]) - 1 for row in task.rows])
    index = SampleIndex(
        lengths, lengths, np.zeros(len(lengths), dtype=np.int32), np.ones(len(lengths)), ("all",)
    )
    plan = Plan(index, seed=SEED, row_tokens=task.row_tokens, bucket_tokens=1, ranks=1, batch_samples=1)
    return [int(sample) for sample in plan.epoch(0, 0).order]


def do(job: Job, device: str, *, toy: bool, ends: float) -> dict[str, Any]:
    """Train until the window is full, or until `ends` (time.monotonic()): the window's figures, `losses`, and
    what was used."""
    warmup, updates = (8, 24) if job.one_sample and not toy else (3, 9)
    task = given(job.model, device, toy=toy)
    with_trainer = {"ours": do_ours, "trl": do_trl, "paper": do_paper}[job.kind]
    answer = with_trainer(job, task, lambda: Window(device, warmup, updates, ends))
    if not all(math.isfinite(loss) for loss in answer["losses"]):
        raise RuntimeError(
            f"{job.what}: a loss is not finite, got {answer['losses']}; what does not train is not timed"
        )
    return answer


def do_ours(job: Job, task: Given, opened: Callable[[], Window]) -> dict[str, Any]:
    batch: dict[str, Any] = (
        {"samples": 1} if job.one_sample else {"tokens": PER_UPDATE * task.row_tokens // ROW}
    )
    model: dict[str, Any] = {"compile": False}
    setting = "defaults but model.compile false"
    # one shape, part C's: each is compiled for before the first update
    if job.implementation == "ours, compiled":
        batch["row_lengths"] = [task.row_tokens]
        model["compile"] = task.device == "cuda"
        setting = "model.compile true; batch.row_lengths as row_tokens"
    window = opened()
    losses = run_ours(task, window, batch, model=model, leave=True)
    return window.figures() | {
        "losses": losses, "setting": setting, "weights": "float32", "compiled_graphs": compiled_graphs(),
    }  # fmt: skip


def do_paper(job: Job, task: Given, opened: Callable[[], Window]) -> dict[str, Any]:
    dtype = torch.bfloat16 if task.device == "cuda" else torch.float32
    window = opened()
    losses = run_paper_style(task, window, dtype=dtype, order=order_of_ours(task))
    setting = "sdpa; AdamW of torch, fused on CUDA; no autocast; samples in the order of ours"
    return window.figures() | {"losses": losses, "setting": setting, "weights": _name(dtype)}


def do_trl(job: Job, task: Given, opened: Callable[[], Window]) -> dict[str, Any]:
    """With the first attention that runs and keeps documents apart; what the ones before it said is in
    `tried`."""
    dtype = torch.bfloat16 if job.implementation == "trl, bf16 weights" else torch.float32
    tried: list[str] = []
    for name, arguments in attentions(task):
        try:
            return trl_with(name, arguments, dtype, task, opened()) | {"tried": tried}
        except Exception as error:
            traceback.print_exc()
            tried.append(f"{name}: {first_line(error)}")
        gc.collect()  # the trainer refers to itself
        if task.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    raise RuntimeError("TRL ran with no attention: " + "; ".join(tried))


def trl_with(
    name: str, arguments: dict[str, Any], dtype: torch.dtype, task: Given, window: Window
) -> dict[str, Any]:
    """RuntimeError where packed documents see each other with this attention; where that could not be seen,
    `unchecked`."""
    losses, trainer = run_trl(
        task, window, arguments=arguments, model={"attn_implementation": name, "dtype": dtype}
    )
    answer = window.figures() | {
        "losses": losses, "attention": name, "weights": _name(dtype), "compiled_graphs": compiled_graphs(),
        "setting": said(trainer.args), "versions": versions(),
    }  # fmt: skip
    try:
        leak, moved = leak_between_documents(trainer, int(arguments["per_device_train_batch_size"]))
    except Exception as error:
        traceback.print_exc()
        return answer | {"unchecked": first_line(error)}
    if not (moved > 0 and leak <= LEAK * moved):
        raise RuntimeError(
            f"packed documents see each other: {leak:.2g} beside {moved:.2g} in the changed one"
        )
    return answer | {"leak": leak, "moved": moved}


def attentions(task: Given) -> list[tuple[str, dict[str, Any]]]:
    """TRL's attentions that may run here, the fastest first, and the arguments of SFTConfig that suit each.

    The flash-attn packages take packed rows as they are, two at once. Flex attention (compiled; leaves out
    blocks between documents) takes them padded to one length, else every length would be compiled. sdpa
    computes the whole square under a mask, so its rows come one by one. `kernels-community/…` needs the hub.
    """
    together = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
    apart = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    if task.device != "cuda":
        return [("sdpa", apart)]
    from transformers import utils

    flash = [
        (f"flash_attention_{number}", together)
        for number in (4, 3, 2)
        if getattr(utils, f"is_flash_attn_{number}_available", lambda: False)()
    ]
    return [
        *flash,
        ("flex_attention", {**together, "pad_to_multiple_of": 2 * task.row_tokens}),
        ("sdpa", apart),
    ]


def leak_between_documents(trainer: Any, rows: int) -> tuple[float, float]:
    """Largest change of log-probabilities (in other documents, in its own) when a packed row's first document
    is reversed.

    The forward pass is the training's: its collator, its autocast, its attention, at the shape that was
    compiled.
    """
    examples = [dict(trainer.train_dataset[i]) for i in range(rows)]
    first = examples[0]["seq_lengths"][0]
    ids = examples[0]["input_ids"]
    changed = [{**examples[0], "input_ids": ids[:first][::-1] + ids[first:]}, *examples[1:]]

    def log_probabilities(of: list[dict[str, Any]]) -> torch.Tensor:  # [T - 1] fp32; at i: of token i + 1
        batch = trainer._prepare_inputs(trainer.data_collator.collator(of))
        return trainer.model(**batch, use_cache=False, fused_lm_head=True).log_probs.detach().float().cpu()[0]

    moved = (log_probabilities(examples) - log_probabilities(changed)).abs()
    return float(moved[first:].max()), float(moved[: first - 1].max())


def compiled_graphs() -> int:
    """Of torch.compile in this process. For TRL, flex attention and its mask are two; more were compiled
    while it was timed."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def said(arguments: Any) -> str:
    names = (
        "packing_strategy", "max_length", "per_device_train_batch_size", "gradient_accumulation_steps",
        "pad_to_multiple_of", "bf16", "use_liger_kernel", "gradient_checkpointing", "optim", "logging_steps",
        "dataloader_num_workers",
    )  # fmt: skip
    values = {name: getattr(arguments, name) for name in names}
    return "; ".join(f"{name} {getattr(value, 'value', value)}" for name, value in values.items())


def versions() -> str:
    found = [
        name
        for name in ("trl", "transformers", "accelerate", "liger_kernel")
        if importlib.util.find_spec(name)
    ]
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in found)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).rsplit(".", 1)[-1]
