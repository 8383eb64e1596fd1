"""What the compiler of layers is told: only where it was counted for, only what this torch knows, nothing that
captures or times, and each of it found again in what a cached graph is found by."""

import pytest
import torch
from torch._inductor import config as settings

from repsft_fast.models import compiled, compiler_options, load_model
from repsft_fast.models.compiler_options import TOGETHER, known
from tests.helpers import tiny


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    torch.use_deterministic_algorithms(False)  # a run that this process made before may have set it


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_on_a_gpu(gpu):
    assert compiler_options.compiler_options() == dict(TOGETHER)


def test_in_a_deterministic_run_the_compilers_own(gpu, deterministic):
    """Warps of a shared launch are chosen by timing, and decide the order of a sum."""
    assert compiler_options.compiler_options() is None


def test_without_a_gpu_the_compilers_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert compiler_options.compiler_options() is None


def test_a_torch_that_lacks_one_is_told_none(gpu, monkeypatch):
    there = [name for name in torch._inductor.list_options() if name != "combo_kernel_per_subkernel_blocks"]
    monkeypatch.setattr(torch._inductor, "list_options", lambda: there)
    assert known(TOGETHER) is None
    assert compiler_options.compiler_options() is None


def test_this_torch_knows_and_takes_them():
    assert known(TOGETHER) == dict(TOGETHER)
    assert torch.compile(lambda x: x + 1, dynamic=False, options=dict(TOGETHER)) is not None
    with pytest.raises(RuntimeError, match="combo_kernel_of_tomorrow"):
        torch.compile(lambda x: x, options={"combo_kernel_of_tomorrow": True})


def test_none_captures_and_none_times():
    with settings.patch(dict(TOGETHER)):
        assert not settings.triton.cudagraphs
        assert not settings.benchmark_combo_kernel
        assert not settings.max_autotune


def test_a_cached_graph_is_found_by_them():
    plain = settings.save_config_portable()
    with settings.patch(dict(TOGETHER)):
        together = settings.save_config_portable()
    asked = {name for name, value in TOGETHER.items() if plain[name] != value}
    assert {name for name in plain if plain[name] != together[name]} == asked
    assert {"combo_kernels", "triton.mix_order_reduction"} <= asked


def test_layers_are_compiled_with_them(gpu, monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: seen.append(options) or function)
    compiled.compile_layers(load_model(tiny.config("qwen3")), enabled=True)
    assert [options["options"] for options in seen] == [dict(TOGETHER)]


@pytest.mark.slow
def test_a_layer_on_a_cpu_has_the_same_bits_with_them():
    """Shared launches are a GPU's: a CPU's programs take none."""
    torch.manual_seed(0)
    x = torch.randn(64, 32, requires_grad=True)
    weights = [torch.randn(32, requires_grad=True) for _ in range(2)]

    def norms(x, a, b):
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        return (y * a).sin() + (y * b).cos()

    found = []
    for options in (None, dict(TOGETHER)):
        torch._dynamo.reset()
        output = torch.compile(norms, dynamic=False, options=options)(x, *weights)
        found.append([output.detach(), *torch.autograd.grad(output.sum(), [x, *weights])])
    torch._dynamo.reset()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
