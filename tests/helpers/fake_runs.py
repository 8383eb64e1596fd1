"""Runs on the GPU that is not there (`fake_cuda`): the models of the promise, small, and what is watched of
their updates."""

from __future__ import annotations

import dataclasses
import gc
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from repsft_fast.config import Config
from repsft_fast.memory.activations import materialise
from repsft_fast.models import load
from repsft_fast.ops import attention
from repsft_fast.selftest.syncs import SyncCounter
from repsft_fast.training import build as building
from repsft_fast.training import step
from repsft_fast.training.parts import Parts
from tests.helpers import runs
from tests.helpers.fake_cuda import GPU, FakeCuda, fake_cuda

SIZES = {"vocab_size": 1003, "num_hidden_layers": 2, "max_position_embeddings": 8192, "pad_token_id": 0}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {
        **SIZES, "model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8,
        "num_key_value_heads": 2, "tie_word_embeddings": False,
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 4096,
        },
    },
    "qwen3": {
        **SIZES, "model_type": "qwen3", "hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64, "tie_word_embeddings": True,
    },
    "smollm2": {
        **SIZES, "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
        "num_key_value_heads": 3, "tie_word_embeddings": True,
    },
    "gemma3": {
        **SIZES, "model_type": "gemma3_text", "hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4,
        "num_key_value_heads": 1, "head_dim": 256, "tie_word_embeddings": True, "sliding_window": 64,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}  # fmt: skip
GEMMA2 = {
    **MODELS["gemma3"],
    "model_type": "gemma2",
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
QWEN3_06B = {
    "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
}  # fmt: skip
SAMPLE_TOKENS = 201  # 200 positions, of which a half is trained
ROW_KERNEL = "cross_entropy_rows_kernel"
FORWARD, BACKWARD = "aten::_flash_attention_forward", "aten::_flash_attention_backward"


@contextmanager
def fake_run(
    monkeypatch: Any,
    folder: Path,
    model: dict[str, Any],
    *,
    every: int = 8,
    meta: bool = False,
    tokens: int = SAMPLE_TOKENS,
    **changes: Any,
) -> Iterator[tuple[FakeCuda, Parts]]:
    """The fake GPU and the parts of a run that is ready to train on it, built as `training.parts.build`
    builds them.

    meta: a large model, which is not drawn on the host first. tokens: of every sample. changes: as of
    `runs.settings`.
    """
    plain = building.build_model

    def build_model(config: Config, world: Any, *more: Any) -> Any:
        if not meta:
            built = plain(config, world, *more)
            built.tie_weights()  # the way to a GPU keeps what is tied; the way to a fake one does not
            return built
        built = plain(config, dataclasses.replace(world, device=torch.device("meta")), *more)
        with GPU:
            materialise(built)
        return built

    gc.collect()
    standing = gc.get_freeze_count() > 0  # tests/conftest.py has, and its freeze is to outlive this run
    if not standing:
        gc.freeze()  # else every collection in here walks all of torch
    try:
        with fake_cuda(monkeypatch, every=every) as gpu:
            dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
            monkeypatch.setattr(building, "build_model", build_model)
            for module in (building, load):  # checks that look at numbers, once, before anything is trained
                monkeypatch.setattr(module, "check_head", lambda *_: None)
            monkeypatch.setattr(building, "check_no_leak", lambda *_, **__: None)
            monkeypatch.setitem(attention._grouped, 0, True)  # what a real GPU would have answered by now
            made = runs.settings(
                folder, **{"batch__row_tokens": 512, "model__layer_kernels": "none", **changes}
            )
            made["model"] |= {"config": model, **({"compute_dtype": "bfloat16"} if meta else {})}
            made["run"]["deterministic"] = False
            _write_samples(folder / "train.jsonl", tokens)
            parts = building.build(Config.of(made))
            assert (parts.world.device, parts.model.compute_dtype) == (GPU, torch.bfloat16)
            assert parts.data.train.tier in ("device", "pinned")
            gpu.forget()
            yield gpu, parts
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        if not standing:
            gc.unfreeze()


def _write_samples(path: Path, tokens: int, count: int = 16) -> None:
    """Samples of one length, half of it trained, so that all updates are of one shape."""
    prompt = tokens - tokens // 2
    lines = []
    for number in range(count):
        ids = [3 + (number + n) % 50 for n in range(tokens)]
        lines.append(json.dumps({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]}))
    path.write_text("\n".join(lines))


@dataclasses.dataclass
class Seen:
    """What one update did."""

    waits: Counter[str]
    strangers: Counter[str]
    operators: Counter[str]
    launches: Counter[str]
    live: tuple[int, int]  # after it
    peak: int


def updates(gpu: FakeCuda, parts: Parts, count: int = 3) -> tuple[list[Seen], tuple[int, int]]:
    """`count` updates without the garbage collector, and what is left on the GPU when it has run."""
    epoch, found = parts.plan.epoch(0, 0), []
    gc.collect()
    gc.disable()
    try:
        for number in range(count):
            gpu.forget()
            with SyncCounter() as syncs:
                step.train_step(parts, epoch[number])
            parts.step_done(epoch[number], len(epoch))
            counted = map(Counter, (gpu.strangers, gpu.operators, gpu.launches))
            found.append(Seen(gpu.waits + syncs.found, *counted, gpu.live(), gpu.peak))
    finally:
        gc.enable()
    gc.collect()
    return found, gpu.live()


def sound(found: list[Seen], left: tuple[int, int]) -> None:
    """Nothing waited, nothing was unknown to CUDA, nothing grew, and no reference cycle held anything."""
    for number, seen in enumerate(found):
        assert not seen.waits, (number, seen.waits)
        assert not seen.strangers, (number, seen.strangers)
    assert len({seen.live for seen in found}) == 1, [seen.live for seen in found]
    assert len({seen.peak for seen in found[1:]}) < 2, [seen.peak for seen in found]
    assert left == found[-1].live, "reference cycles held tensors"
    assert found[-1].peak > found[-1].live[1] > 0


@contextmanager
def before(gpu: FakeCuda, act: Callable[[str], None]) -> Iterator[None]:
    """`act` is called with the name of every operator and kernel that is to run, and may raise in its
    place."""
    gpu.before = act
    try:
        yield
    finally:
        gpu.before = lambda name: None
