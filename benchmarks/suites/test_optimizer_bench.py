"""One update of 8 matrices of 512 × 512 and as many vectors, by optimizer. `pytest benchmarks
--benchmark-enable`."""

import importlib.util

import pytest
import torch

from benchmarks.harness import cases

INSTALLED = [
    "adamw", "sgd", "adamw8bit",
    *(["bnb_adamw8bit"] if importlib.util.find_spec("bitsandbytes") else []),
    *(["torchao_adamw8bit"] if importlib.util.find_spec("torchao") else []),
]  # fmt: skip


@pytest.mark.parametrize("name", INSTALLED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_update(benchmark, name, dtype):
    call = cases.optimizer_step(name, dtype, tensors=8, side=512)
    benchmark.pedantic(call, rounds=20, iterations=1, warmup_rounds=3)
