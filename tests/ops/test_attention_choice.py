"""Which package auto takes: seen to work on this GPU, or not taken."""

import pytest
import torch

from repsft_fast.errors import ModelError
from repsft_fast.ops import attention, attention_choice, flash
from repsft_fast.ops.attention_choice import checked, why_better_not, why_not
from tests.helpers import fake_flash
from tests.ops.test_flash import in_any_order

__all__ = ["in_any_order"]  # a fixture

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def hopper(monkeypatch):
    """A GPU that says it is one; what is computed on it is computed here."""
    monkeypatch.setattr(flash, "major_of", lambda device: 9 if device.type == "cuda" else None)
    trial = attention_choice._wrong
    monkeypatch.setattr(attention_choice, "_wrong", lambda has, device, width: trial(has, CPU, width))
    monkeypatch.setattr(flash, "HALF", (torch.float16, torch.bfloat16, torch.float32))


def broken(output):
    changed = output.clone()
    changed[:, 0] *= 1.1
    return changed


@pytest.mark.parametrize("width", [64, 128, 256])
def test_what_works_is_taken(width, hopper, monkeypatch):
    fake_flash.install(monkeypatch, fake_flash.fa3())
    assert why_better_not("flash3", CUDA, width=width, softcap=False) is None
    assert checked("auto:flash3", CUDA, width) == "auto:flash3"
    assert why_better_not("flash4", CUDA, width=width, softcap=False) == "it cannot be imported"


def test_a_build_that_computes_something_else_is_seen(hopper, monkeypatch):
    fake_flash.install(monkeypatch, fake_flash.fa3(wrong=broken))
    assert why_not("flash3", CUDA) == "flash3 gives other results than SDPA (heads of 64, window None)"
    with pytest.raises(ModelError, match=r"gives other results .* got auto:flash3; choose auto"):
        checked("auto:flash3", CUDA)


def test_one_that_ignores_windows_is_seen(hopper, monkeypatch):
    module = fake_flash.fa3()
    plain = module.flash_attn_varlen_func

    def everything(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False,
                   window_size=(-1, -1)):  # fmt: skip
        return plain(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal)

    module.flash_attn_varlen_func = everything
    fake_flash.install(monkeypatch, module)
    assert why_not("flash3", CUDA) == "flash3 gives other results than SDPA (heads of 64, window 5)"


def test_one_without_a_backward_pass_is_seen(hopper, monkeypatch):
    fake_flash.install(monkeypatch, fake_flash.fa3(wrong=lambda output: output.detach()))
    assert "flash3 fails: " in why_not("flash3", CUDA)


def test_one_that_raises_is_seen_and_want_of_memory_is_no_answer(hopper, monkeypatch):
    def raises(output):
        raise error

    fake_flash.install(monkeypatch, fake_flash.fa3(wrong=raises))
    error = RuntimeError("undefined symbol\nand more")
    assert why_not("flash3", CUDA) == "flash3 fails: undefined symbol"
    error = torch.OutOfMemoryError("out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        why_not("flash3", CUDA)


def test_gpus(hopper, monkeypatch):
    fake_flash.install(monkeypatch, fake_flash.fa3(), fake_flash.fa4())
    assert why_not("flash4", CUDA) is None
    monkeypatch.setattr(flash, "major_of", lambda device: 8)
    assert why_not("flash3", CUDA) == "flash3 is not made for GPUs of compute capability 8.x"
    monkeypatch.setattr(flash, "major_of", lambda device: None)
    assert why_not("flash3", CPU) == "flash3 needs a CUDA device"


def test_a_soft_cap_and_wide_heads(hopper, monkeypatch):
    fake_flash.install(monkeypatch, fake_flash.fa3(), fake_flash.fa4())
    assert (
        why_better_not("flash4", CUDA, width=256, softcap=False)
        == "heads of 256 are not what it is relied on for"
    )
    assert why_better_not("flash4", CUDA, width=128, softcap=True) == "it is not relied on for a soft-cap"
    assert why_better_not("flash3", CUDA, width=128, softcap=True) is None


def test_fa2_is_taken_for_a_soft_cap_alone(hopper, monkeypatch):
    module = fake_flash.fa3()
    module.__name__ = "flash_attn"
    fake_flash.install(monkeypatch, module)
    assert why_better_not("flash2", CUDA, width=64, softcap=False) == "torch's varlen kernels are the same"
    assert why_better_not("flash2", CUDA, width=64, softcap=True) is None


def test_what_needs_no_package(hopper):
    assert why_not("sdpa", CPU) is None
    assert why_not("auto", CPU) is None
    assert why_not("auto:varlen", CUDA) is None
    assert why_not("auto:varlen", CPU) == "torch's varlen kernels need a CUDA device"
    assert "it is not known" in why_not("auto:xformers", CPU)


def test_the_trial_draws_nothing(hopper, monkeypatch):
    fake_flash.install(monkeypatch, fake_flash.fa3())
    before = torch.random.get_rng_state()
    assert why_not("flash3", CUDA) is None
    assert torch.equal(torch.random.get_rng_state(), before)


class On:
    """A tensor that says it lives on a GPU."""

    is_cuda, device = True, CUDA

    def __init__(self, width, dtype=torch.bfloat16):
        self.shape, self.dtype = torch.Size([1, 4, 9, width]), dtype


@pytest.mark.parametrize(("rule", "width", "goes_to"), [
    ({}, 64, "flash3"), ({"window": 5}, 128, "flash3"), ({"softcap": 30.0}, 128, "flash3"),
    ({"dropout": 0.1}, 64, "segments"), ({"sinks": torch.zeros(4)}, 64, "segments"), ({}, 320, "segments"),
    ({}, 20, "varlen"),
])  # fmt: skip
def test_a_call_that_it_does_not_serve_goes_elsewhere(rule, width, goes_to, hopper, monkeypatch):
    fake_flash.install(monkeypatch, fake_flash.fa3())
    has = flash.kernels("flash3", 9)
    made = attention.Rule(1.0, **rule)
    assert attention.choose(On(width), On(width), made, preferred=has) == goes_to
    assert attention.choose(On(width), On(width), made, only_sdpa=True, preferred=has) == "segments"


def test_on_another_device_it_is_not_taken(hopper, monkeypatch):
    fake_flash.install(monkeypatch, fake_flash.fa3())
    tensor = torch.empty(1, 2, 3, 64, dtype=torch.bfloat16)
    assert (
        attention.choose(tensor, tensor, attention.Rule(1.0), preferred=flash.kernels("flash3", 9))
        == "segments"
    )
