"""Whole updates on a GPU that is not there: nothing waits, nothing is unknown to CUDA, nothing grows."""

import contextlib
import gc
import importlib
import logging
import sys
from collections import Counter

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

from csrc_triton.state_hash import checksum
from repsft_fast.metrics import SampleStats
from repsft_fast.ops.linear_cross_entropy import linear_cross_entropy
from repsft_fast.snapshot import SnapshotPool
from repsft_fast.state import local
from repsft_fast.training import step
from repsft_fast.training.snapshots import closed_list
from tests.helpers.fake_cuda import GPU, FakeCuda, fake_cuda
from tests.helpers.fake_runs import (
    BACKWARD,
    FORWARD,
    GEMMA2,
    MODELS,
    QWEN3_06B,
    ROW_KERNEL,
    SIZES,
    before,
    fake_run,
    sound,
    updates,
)


@pytest.fixture
def started(monkeypatch, tmp_path):
    with contextlib.ExitStack() as stack:
        yield lambda model, **options: stack.enter_context(fake_run(monkeypatch, tmp_path, model, **options))


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("name", MODELS)
def test_an_update(name, optimizer, started):
    gpu, parts = started(MODELS[name], optim__name=optimizer)
    state = gpu.live()[1]
    found, left = updates(gpu, parts)
    sound(found, left)
    assert 0 <= left[1] - state < 2**16, "an update leaves factors and tables, and no gradient"
    rows = len(parts.plan.epoch(0, 0)[0].ranks[0])
    assert rows > 1
    assert found[0].launches[ROW_KERNEL] == rows
    assert found[0].operators[FORWARD] == found[0].operators[BACKWARD] == rows * SIZES["num_hidden_layers"]
    assert found[0].launches["token_sums_kernel"] == rows
    assert found[0].launches["squares_kernel"] == found[0].launches["judge_kernel"] == 1
    assert not found[0].operators["aten::_fused_adamw_"]
    assert found[0].launches["adamw_kernel"] == found[0].launches["adamw_count_kernel"]
    assert bool(found[0].launches["adamw_kernel"]) == (optimizer == "adamw")
    assert bool(found[0].launches["adamw_8bit_kernel"]) == (optimizer == "adamw8bit")


VARIANTS = {
    "checkpointing": ("gemma3", {"model__activation_checkpointing": "full"}),
    "lora": ("qwen3", {"model__lora": {"rank": 4}, "model__activation_checkpointing": "selective"}),
    "tokens on the host": ("smollm2", {"data__device_limit_bytes": 1}),
    "bf16 weights": ("llama", {"model__param_dtype": "bfloat16", "optim__name": "adamw8bit"}),
    "chunks": ("llama", {"loss__chunk_bytes": 60 * 1008 * 2}),
    "no clipping, decay": ("qwen3", {"optim__max_norm": None, "optim__weight_decay": 0.1}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_of_it(variant, started):
    name, changes = VARIANTS[variant]
    gpu, parts = started(MODELS[name], **changes)
    sound(*updates(gpu, parts))


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_ligers_layers(name, started, monkeypatch):
    pytest.importorskip("liger_kernel")
    kind = MODELS[name]["model_type"]
    patched = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    for key, value in vars(patched).copy().items():  # liger replaces some of it for the whole process
        monkeypatch.setattr(patched, key, value)
    # It logs errors it caught; pytest keeps what was logged, and an error keeps every frame it came through.
    monkeypatch.setattr(logging.root.manager, "disable", logging.WARNING)
    gpu, parts = started(MODELS[name], model__layer_kernels="liger")
    found, left = updates(gpu, parts)
    sound(found, left)
    assert found[-1].launches["_rms_norm_forward_kernel"] > 0


def test_memorised_rows_left_out(started):
    gpu, parts = started(MODELS["qwen3"], tokens=1025, batch__row_tokens=2048, loss__skip_below=1e-3)
    parts.progress.kept_guess = 0.5
    found, left = updates(gpu, parts)
    sound(found, left)
    rows = len(parts.plan.epoch(0, 0)[0].ranks[0])
    assert found[0].launches["kept_hidden_kernel"] == found[0].launches["kept_head_kernel"] == rows


def test_scores_that_are_capped(started):
    """Gemma 2: attention that no varlen kernel computes, segment by segment, and a cap in the row kernel."""
    gpu, parts = started(GEMMA2)
    found, left = updates(gpu, parts)
    sound(found, left)
    assert not found[0].operators[FORWARD]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_head_of_any_type(dtype, monkeypatch):
    with fake_cuda(monkeypatch) as gpu:
        hidden = torch.empty(300, 64, dtype=dtype, device=GPU, requires_grad=True)
        head = torch.empty(1003, 64, dtype=dtype, device=GPU, requires_grad=True)
        targets, rows = torch.empty(300, dtype=torch.int64, device=GPU), torch.arange(200, device=GPU)
        for options in (
            {},
            {"softcap": 30.0, "chunk_bytes": 200_000},
            {"skip_below": 0.1, "chunk_bytes": 400_000},
        ):
            loss, stats = linear_cross_entropy(hidden, head, targets, None, rows, **options)
            (loss * 2).backward()
            stats.sum_by(torch.zeros_like(rows), 1)
        assert (hidden.grad.dtype, head.grad.dtype) == (dtype, dtype)
        assert bool(gpu.launches[ROW_KERNEL]) == (dtype != torch.float64)
        assert not gpu.waits
        assert not gpu.strangers


def test_statistics_of_samples(started):
    gpu, parts = started(MODELS["llama"])
    parts.sample_stats = SampleStats(len(parts.data.train.index), parts.world.device)
    sound(*updates(gpu, parts))


def test_an_evaluation_waits_once(started):
    gpu, parts = started(MODELS["gemma3"])
    scorer = parts.scorer(parts.data.train)
    gpu.forget()
    scores = scorer(parts.model)
    assert gpu.waits == {"aten::_to_copy to the host, blocking": 1}
    assert not gpu.strangers
    assert scores.stats.table.shape[0] == len(parts.data.train.index)
    assert gpu.launches[ROW_KERNEL] == len(scorer._rows) > 1
    live = gpu.live()
    scorer(parts.model)
    assert gpu.live() == live


def test_a_whole_model_in_rows_of_8192(started):
    changes = {"batch__samples": 4, "batch__row_tokens": 8192, "data__max_tokens": 4096}
    gpu, parts = started(QWEN3_06B, every=50, meta=True, tokens=2049, **changes)
    found, left = updates(gpu, parts, 2)
    sound(found, left)
    assert found[0].operators[FORWARD] == QWEN3_06B["num_hidden_layers"]
    assert parts.data.train.index.lengths.sum() == 16 * 2048


# (what runs out of memory, at which call of it): before, between and after layers, rows and gradients
POINTS = [
    *((FORWARD, time) for time in (1, 4)),
    (ROW_KERNEL, 2),
    *((BACKWARD, time) for time in (1, 4)),
    ("squares_kernel", 1),
    ("judge_kernel", 1),
]


def test_nothing_is_left_of_an_update_that_ran_out_of_memory(started):
    gpu, parts = started(MODELS["llama"])
    undisturbed = updates(gpu, parts, 2)[0][1]
    for name, time in POINTS:
        left = iter(range(time - 1, -1, -1))

        def fail(running, name=name, left=left):
            if running == name and next(left, 1) == 0:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

        with before(gpu, fail), pytest.raises(step.OutOfMemory) as raised:
            step.train_step(parts, parts.plan.epoch(0, 0)[2])
        assert not raised.value.torn, (name, time)
        assert next(left, None) is None, "it was reached"
        del raised
        gc.collect()
        assert gpu.live() == undisturbed.live, (name, time)
        found, kept = updates(gpu, parts, 1)
        sound(found, kept)
        assert found == [undisturbed], (name, time)


def test_snapshots_of_the_whole_state(started):
    gpu, parts = started(MODELS["llama"])
    live = updates(gpu, parts, 1)[1]
    state = closed_list(parts)
    each = sum(local(t).numel() * t.element_size() for t in state.tensors().values())
    pool = SnapshotPool(state.tensors(), device_bytes=each + 2**20, pinned_bytes=2 * each + 2**21, keep=3)
    gpu.forget()
    for name in "abc":
        pool.take(name, state.values())
    assert sorted(map(pool.tier, "abc")) == ["device", "pinned", "pinned"], pool.messages
    for name in "ab":
        pool.restore(name)
    assert not gpu.waits
    assert not gpu.strangers
    pool.close()
    del pool
    gc.collect()
    assert gpu.live() == live


def test_checksums_ask_the_gpu_for_nothing(started):
    gpu, parts = started(MODELS["smollm2"])
    for tensor in (local(p) for p in parts.model.parameters()):
        checksum(tensor.detach())
    assert gpu.launches["_sum_kernel"] == len(list(parts.model.parameters()))
    assert not gpu.waits
    assert not gpu.strangers


def allocated(monkeypatch):
    """Storages made on the GPU, by the innermost line of ours that made them, or "backward"."""
    made, see = Counter(), FakeCuda._see

    def watched(gpu, func, found):
        for leaf in tree_leaves(found):
            on_gpu = isinstance(leaf, FakeTensor) and leaf.fake_device.type == "cuda"
            if on_gpu and leaf.untyped_storage()._cdata not in gpu._storages:
                made[_ours()] += 1
        see(gpu, func, found)

    monkeypatch.setattr(FakeCuda, "_see", watched)
    return made


def _ours():
    frame = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        if path.endswith("torch/_tensor.py") and frame.f_code.co_name == "backward":
            break
        if ("/repsft_fast/" in path or "/csrc_triton/" in path) and not path.endswith("syncs.py"):
            return "/".join(path.split("/")[-2:])
        frame = frame.f_back
    return "backward"


# what the model's pass needs: rows, layers, head, and their backward
OF_THE_PASS = {
    "data/store.py", "models/loss.py", "models/compiled.py", "ops/attention.py", "ops/head_pass.py",
    "ops/products.py", "ops/row_pass.py", "ops/linear_cross_entropy.py", "backward",
}  # fmt: skip


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("samples", [False, True])
def test_nothing_is_allocated_around_the_pass(samples, optimizer, started, monkeypatch):
    """Statistics, ledger, norm, clip, judgement, optimizer, window: all in memory of the updates before."""
    gpu, parts = started(MODELS["qwen3"], optim__name=optimizer)
    if samples:
        parts.sample_stats = SampleStats(len(parts.data.train.index), parts.world.device)
    updates(gpu, parts, 2)
    made = allocated(monkeypatch)
    sound(*updates(gpu, parts, 2))
    assert set(made) <= OF_THE_PASS, made
    assert made["ops/head_pass.py"] > 0 < made["backward"], "the test sees what is made"
