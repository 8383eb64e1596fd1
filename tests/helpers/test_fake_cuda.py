"""The fake GPU sees what it is there to see: every kind of fault, put into an update or a launch, is
found."""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from csrc_triton.cross_entropy import cross_entropy_rows_kernel
from repsft_fast.ops.row_pass import padded_logits
from repsft_fast.training import step
from tests.helpers.fake_cuda import GPU, fake_cuda
from tests.helpers.fake_runs import MODELS, ROW_KERNEL, fake_run, sound, updates


def keep(found):
    return lambda loss: found.append(loss)


def cycle(loss):
    box = [loss * 1.0]
    box.append(box)


def product(loss):
    made = torch.empty(3, 8, 8, dtype=torch.bfloat16, device=loss.device)
    torch.addmm(made[0].double(), made[1], made[2], out_dtype=torch.float32, out=made[0].float())


def attention(loss, head_dim=64, dtype=torch.bfloat16, borders=torch.int32):
    q = torch.empty(16, 4, head_dim, dtype=dtype, device=loss.device)
    ends = torch.empty(3, dtype=borders, device=loss.device)
    torch.ops.aten._flash_attention_forward(q, q, q, ends, ends, 16, 16, 0.0, True, False)


def unknown(loss):
    """An operator that only a CPU has, and that finds shapes anywhere."""
    with torch.library._scoped_library("repsft_test", "FRAGMENT") as library:
        library.define("only_on_a_cpu(Tensor x) -> Tensor")
        library.impl("only_on_a_cpu", torch.neg, "CPU")
        library.impl("only_on_a_cpu", torch.empty_like, "Meta")
        torch.ops.repsft_test.only_on_a_cpu(loss.detach())


GROWN = r"\[\(\d+, \d+\), \("  # unequal counts and bytes of what is live
FAULTS = {
    "a number read": (lambda loss: loss.item(), DataDependentOutputException, "_local_scalar_dense"),
    "a size that depends on numbers": (
        lambda loss: loss.reshape(1).nonzero(),
        DynamicOutputShapeException,
        "nonzero",
    ),
    "a mask": (
        lambda loss: loss.reshape(1)[loss.reshape(1) > 0],
        DynamicOutputShapeException,
        "nonzero|index",
    ),
    "a copy to the host": (lambda loss: loss.detach().cpu(), AssertionError, "to the host, blocking"),
    "a list on the GPU": (
        lambda loss: torch.tensor([1, 2], device=loss.device),
        AssertionError,
        "to the GPU, blocking",
    ),
    "pageable memory": (
        lambda loss: torch.ones(2).to(loss.device, non_blocking=True),
        AssertionError,
        "of pageable memory",
    ),
    "a stream waited for": (
        lambda loss: torch.cuda.current_stream().synchronize(),
        AssertionError,
        "Stream.synchronize",
    ),
    "an event waited for": (
        lambda loss: torch.cuda.Event().synchronize(),
        AssertionError,
        "Event.synchronize",
    ),
    "the device waited for": (lambda loss: torch.cuda.synchronize(), AssertionError, "cuda.synchronize"),
    "free memory asked for": (lambda loss: torch.cuda.mem_get_info(), AssertionError, "mem_get_info"),
    "an index on the host": (
        lambda loss: loss.reshape(1)[torch.zeros(3).long()],
        AssertionError,
        "operand on the host|index of host numbers",
    ),
    "operands on both": (lambda loss: loss + torch.ones(3), RuntimeError, "device"),
    "losses that are kept": (keep([]), AssertionError, GROWN),
    "a reference cycle": (cycle, AssertionError, GROWN),
    "a product onto a third type": (product, AssertionError, "added to torch.float64"),
    "attention in fp32": (
        lambda loss: attention(loss, dtype=torch.float32),
        AssertionError,
        "forward: torch.float32",
    ),
    "heads of 60": (
        lambda loss: attention(loss, head_dim=60),
        AssertionError,
        r"forward: torch.bfloat16 \[16, 4, 60\]",
    ),
    "borders in int64": (lambda loss: attention(loss, borders=torch.int64), AssertionError, "its borders"),
    **({"an operator of the CPU": (unknown, AssertionError, "no CUDA kernel")} if torch.version.cuda else {}),
}


def test_every_fault_is_seen(monkeypatch, tmp_path):
    small = {**MODELS["qwen3"], "num_hidden_layers": 1}
    changes = {"tokens": 51, "batch__samples": 1, "batch__row_tokens": 128}
    with fake_run(monkeypatch, tmp_path, small, **changes) as (gpu, parts):
        plain = parts.model.loss
        sound(*updates(gpu, parts))
        for fault, (act, error, words) in FAULTS.items():

            def loss(row, act=act):
                found = plain(row)
                act(found[0])
                return found

            parts.model.loss = loss
            with pytest.raises(error, match=words) as raised:
                _judged(gpu, parts, fault)
            del raised
            parts.model.loss = plain
            step.abandon_update(parts, step._rng_states(parts))


def _judged(gpu, parts, fault):
    sound(*updates(gpu, parts, 2))
    raise LookupError(f"{fault} went unseen")


def test_a_launch_that_would_fail_is_seen(monkeypatch):
    with fake_cuda(monkeypatch) as gpu:
        made = padded_logits(6, 1003, torch.bfloat16, GPU)
        targets = torch.empty(6, dtype=torch.int64, device=GPU)
        weights, table = torch.empty(6, device=GPU), torch.empty(5, 6, device=GPU)
        flags = torch.empty(2, 6, dtype=torch.uint8, device=GPU)

        def launch(grid=(6,), **changes):
            given = {
                "logits_ptr": made, "targets_ptr": targets, "weights_ptr": weights, "table_ptr": table, "flags_ptr": flags,
                "row_stride": 1008, "table_stride": 6, "vocabulary": 1003, "padded": 1008, "softcap": 1.0, "skip_below": 0.0,
                "HAS_SOFTCAP": False, "GRADIENT": True, "STATISTICS": True, "BLOCK_V": 1024,
            }  # fmt: skip
            cross_entropy_rows_kernel[grid](**given | changes, num_warps=2)

        launch()
        assert gpu.launches == {ROW_KERNEL: 1}
        for fault in (
            {"grid": (0,)}, {"grid": (7,)}, {"grid": (6, 70000)}, {"weights_ptr": weights.double()}, {"row_stride": 2**31},
            {"targets_ptr": torch.zeros(6, dtype=torch.int64)}, {"table_stride": 7}, {"table_ptr": table[0, 1:]},
            {"padded": 1024}, {"softcap": 1}, {"logits_ptr": made.to(torch.float64)},
        ):  # fmt: skip
            with pytest.raises(AssertionError, match=f"{ROW_KERNEL}|tensors on the GPU"):
                launch(**fault)
