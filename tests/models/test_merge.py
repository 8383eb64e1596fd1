"""Merged weights compute what peft computes, for every kind of layer that takes adapters, whole and
sharded."""

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from repsft_fast.distributed import full_state, full_tensor, shard
from repsft_fast.errors import ModelError
from repsft_fast.models import load_model, save_pretrained
from repsft_fast.models import merge as merge_module
from repsft_fast.models.lora import LoraSettings, add_lora
from repsft_fast.models.merge import adapted_layers, check_merge, merged_state
from repsft_fast.models.targets import Targets
from tests.helpers import ranks, tiny
from tests.helpers.architectures import KINDS, tiny_config
from tests.helpers.sources import named_stacks

STACKED = ["all-linear", "experts.gate_up_proj", "experts.down_proj"]
# kinds of layers: plain, transposed, a bias, shared experts, experts in one parameter (both ways round)
FAMILIES = {
    "llama": "all-linear", "gpt2": "all-linear", "phi": "all-linear", "qwen2_moe": "all-linear", "qwen3_moe": STACKED,
    "gpt_oss": STACKED, "llama4_text": STACKED, "deepseek_v3": "all-linear", "jamba": STACKED, "olmo3": "all-linear",
}  # fmt: skip


def adapted(kind, targets="all-linear", **changes):
    torch.manual_seed(0)
    try:
        model = AutoModelForCausalLM.from_config(tiny_config(kind, **changes)).eval()
    except AttributeError as error:
        pytest.skip(f"transformers {transformers.__version__} makes no {kind} of its own defaults: {error}")
    add_lora(model, LoraSettings(rank=2, target_modules=targets))
    return tiny.filled(model)


def logits(model):
    ids = torch.randint(3, 90, (2, 20), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def compared(model, kind, **changes):
    """(merged, adapted, base) logits, in fp64 so that nothing but the merge can differ."""
    config = tiny_config(kind, **changes)
    plain = AutoModelForCausalLM.from_config(config).double().eval()
    before = model.state_dict()
    plain.load_state_dict(merged_state(model, before))
    merged = logits(plain)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config).double().eval()
    return merged, logits(model), logits(base)


def assert_merges(model, kind, **changes):
    merged, expected, base = compared(model, kind, **changes)
    torch.testing.assert_close(merged, expected, rtol=0, atol=3e-14)
    assert (base - expected).abs().max() > 1e-2, "the adapters do nothing"


@pytest.mark.parametrize("kind", FAMILIES)
def test_merged_logits_are_pefts(kind):
    changes = {"use_mamba_kernels": False} if kind == "jamba" else {}
    model = adapted(kind, FAMILIES[kind], **changes).double()
    check_merge(model)
    assert_merges(model, kind, **changes)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_merged_logits_are_pefts_for_every_architecture(kind):
    """Also with adapters on every stack of experts."""
    config, names = tiny_config(kind), named_stacks(kind)
    for targets in ["all-linear", *([["all-linear", *names]] if names else [])]:
        try:
            model = adapted(kind, targets).double()
            base = logits(AutoModelForCausalLM.from_config(config).double().eval())
        except (ModelError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            pytest.skip(f"takes no LoRA, or no plain tokens: {error}")
        assert base.isfinite().all()
        check_merge(model)
        assert_merges(model, kind)


def test_the_sum_is_made_in_fp32_and_rounded_once():
    """B A in bf16 first, or added in bf16, gives other weights."""
    for kind, targets in (("llama", "all-linear"), ("qwen3_moe", STACKED)):
        torch.manual_seed(0)
        model = tiny.filled(
            load_model(tiny_config(kind), param_dtype="bfloat16", lora={"rank": 2, "target_modules": targets})
        )
        state = model.state_dict()
        merged = merged_state(model, state)
        wide = {name: value.double() for name, value in state.items()}
        exact = merged_state(model, wide)
        assert {value.dtype for value in merged.values()} == {torch.bfloat16}
        for name, value in exact.items():
            assert (merged[name] == value.bfloat16()).float().mean() > 0.995, name  # of fp32's own rounding


def test_embeddings_and_convolutions_merge():
    for kind, targets in (("gpt2", ["wpe", "c_attn"]), ("mamba", ["conv1d"])):
        if kind == "mamba":
            with pytest.raises(ModelError, match=r"model\.lora\.target_modules"):
                adapted(kind, targets)  # read by the kernels, not called
        else:
            model = adapted(kind, targets).double()
            check_merge(model)
            assert_merges(model, kind)


class TestCheck:
    def test_a_merge_that_computes_something_else_is_refused_before_training(self, monkeypatch):
        from peft.tuners.lora import Linear

        right = Linear.get_delta_weight
        monkeypatch.setattr(Linear, "get_delta_weight", lambda self, adapter: right(self, adapter) * 1.01)
        with pytest.raises(
            ModelError, match=r"model\.lora\.merge: .*k_proj \(Linear\) computes something else when merged"
        ):
            load_model(tiny_config("llama"), lora={"rank": 2, "merge": True})
        load_model(tiny_config("llama"), lora={"rank": 2})  # nothing is merged

    def test_experts_too(self, monkeypatch):
        from peft.tuners.lora.layer import ParamWrapper

        if not hasattr(ParamWrapper, "get_delta_factors"):
            pytest.skip("this peft's forward calls get_delta_weight too")
        right = ParamWrapper.get_delta_weight
        monkeypatch.setattr(
            ParamWrapper, "get_delta_weight", lambda self, adapter: right(self, adapter).flip(0)
        )
        model = adapted("qwen3_moe", STACKED)
        with pytest.raises(
            ModelError, match=r"model\.lora\.merge: .*experts .*computes something else when merged"
        ):
            check_merge(model)

    def test_every_kind_is_tried_once_and_nothing_is_drawn(self, monkeypatch):
        tried = []
        right = merge_module._merged_and_not
        monkeypatch.setattr(
            merge_module, "_merged_and_not", lambda layer: tried.append(layer) or right(layer)
        )
        model = adapted("qwen3_moe", STACKED)
        before, state = (
            torch.get_rng_state(),
            {name: value.clone() for name, value in model.state_dict().items()},
        )
        check_merge(model)
        assert len(tried) == 2, "linear layers, and experts in one parameter"
        assert torch.equal(torch.get_rng_state(), before)
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert not any(hasattr(module, "parametrizations") for module in model.modules())

    def test_on_meta(self):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(tiny_config("gpt_oss"))
            add_lora(model, LoraSettings(rank=2, target_modules=STACKED, merge=True))
        assert all(p.is_meta for p in model.parameters())

    def test_a_large_stack_of_experts_is_cut(self):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(tiny_config("qwen3_moe", num_experts=1 << 16))
            add_lora(model, LoraSettings(rank=2, target_modules=STACKED))
        ours, theirs = merge_module._merged_and_not(model.model.layers[0].mlp.experts)
        assert len(ours) == len(theirs) == 2


def test_a_layer_named_like_peft_names_its_own_keeps_its_name():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.base_layer = nn.Linear(2, 2)

    model = Model()
    assert merged_state(model, model.state_dict()).keys() == model.state_dict().keys()
    assert adapted_layers(model) == {}
    assert Targets(("a",)).said() == []


def merge_on_ranks(world, kind, targets, folder):
    torch.manual_seed(0)
    model = load_model(
        tiny_config(kind), packed=False, lora={"rank": 2, "target_modules": targets, "merge": True}
    )
    tiny.filled(model)
    shard(model, world)
    check_merge(model)
    state = full_state(model, world)
    save_pretrained(model, None, folder, merge_lora=True, world=world)
    return (
        {name: value.numpy() for name, value in merged_state(model, state).items()} if world.is_main else None
    )


@pytest.mark.parametrize("kind", ["gpt2", "qwen3_moe"])
def test_two_ranks_merge_as_one(kind, tmp_path):
    targets = FAMILIES[kind]
    sharded, _ = ranks.run_ranks(merge_on_ranks, kind, targets, tmp_path)
    torch.manual_seed(0)
    model = tiny.filled(
        load_model(tiny_config(kind), packed=False, lora={"rank": 2, "target_modules": targets})
    )
    whole = merged_state(model, model.state_dict())
    assert sharded.keys() == whole.keys()
    assert all(torch.equal(torch.from_numpy(sharded[name]), value) for name, value in whole.items())
    saved = load_file(tmp_path / "model.safetensors")
    assert not any("lora" in name or "base_layer" in name for name in saved)


def step_on_ranks(world, kind, targets):
    """Loss and adapters' gradients of one row on every rank."""
    torch.set_num_threads(1)  # how many there are decides how sums are rounded
    torch.manual_seed(0)
    model = load_model(tiny_config(kind), packed=False, lora={"rank": 2, "target_modules": targets})
    tiny.filled(model)
    shard(model, world)
    document = tiny.documents((12,))
    loss, _ = model.loss(tiny.row(document, denominator=world.size))
    loss.backward()
    gradients = {n: full_tensor(p.grad).numpy() for n, p in model.named_parameters() if p.requires_grad}
    return loss.item() * world.size, gradients


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("kind", ["gpt2", "qwen3_moe", "gpt_oss"])
def test_adapters_train_sharded_as_whole(kind):
    loss, gradients = ranks.run_ranks(step_on_ranks, kind, FAMILIES[kind])[0]
    torch.manual_seed(0)
    model = tiny.filled(
        load_model(tiny_config(kind), packed=False, lora={"rank": 2, "target_modules": FAMILIES[kind]})
    )
    expected, _ = model.loss(tiny.row(tiny.documents((12,))))
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(torch.from_numpy(gradients[name]), parameter.grad, rtol=0, atol=0)


def test_a_layer_in_several_places_is_added_to_once_and_everywhere():
    plain = load_model(tiny_config("llama"))
    plain.model.layers[1] = plain.model.layers[0]
    add_lora(plain, LoraSettings(rank=2, merge=True))
    tiny.filled(plain)
    state = plain.state_dict()
    merged = merged_state(plain, state)
    assert not [name for name in merged if "base_layer" in name or "lora_" in name]
    first, second = (f"model.layers.{n}.self_attn.q_proj.weight" for n in (0, 1))
    assert merged[first] is merged[second]
    assert not torch.equal(merged[first], state[first.replace(".weight", ".base_layer.weight")])


@pytest.mark.parametrize("place", ["cpu", "meta"])
def test_a_weight_that_two_layers_share_is_not_merged(place):
    """Zamba's shared block, each place with adapters of its own."""
    with pytest.raises(ModelError, match="shares its weight with another layer"):
        load_model(tiny_config("zamba"), lora={"rank": 2, "merge": True}, packed=False, device=place)
    load_model(tiny_config("zamba"), lora={"rank": 2}, packed=False, device=place)
