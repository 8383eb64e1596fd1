"""Random weights are drawn where they will lie; tables, ties and a CPU's bits are what they always were."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, Phi3Config, PreTrainedModel

from repsft_fast.models import load, load_model
from tests.helpers import tiny
from tests.helpers.fake_cuda import fake_cuda

LARGE = 1 << 20  # bytes
WIDE = {
    "vocab_size": 3000, "hidden_size": 256, "intermediate_size": 2304, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 512,
}  # fmt: skip
ROPES = {
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 128},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
}


def gemma3(**sizes):
    return Gemma3TextConfig(**{**WIDE, "head_dim": 64, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"], **sizes})  # fmt: skip


def roped(kind):
    return LlamaConfig(**{**WIDE, "rope_parameters": {"rope_type": kind, "rope_theta": 5e5, **ROPES[kind]}})


def longroped():
    short, long = ([1.0 + 0.01 * n for n in range(64)], [2.0 + 0.1 * n for n in range(64)])
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": short, "long_factor": long}
    return Phi3Config(**{**WIDE, "original_max_position_embeddings": 64, "rope_parameters": rope})


TABLES = {
    **{name: lambda name=name: tiny.config(name) for name in tiny.NAMES},
    **{kind: lambda kind=kind: roped(kind) for kind in ROPES},
    "gemma3": gemma3,
    "longrope": longroped,
}


class OnTheHost(TorchDispatchMode):
    """Sizes of the large CPU tensors that come into being."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            if isinstance(made, torch.Tensor) and made.device.type == "cpu" and made.nbytes > LARGE:
                self.found.append(tuple(made.shape))
        return result


def loaded_on_a_gpu(config, monkeypatch, **options):
    """The model as it is made for a GPU that is not there, and what was large on the host on the way."""
    monkeypatch.setattr(load, "check_head", lambda model, head: None)  # reads numbers
    # nothing is moved: what is drawn there is there
    monkeypatch.setattr(PreTrainedModel, "to", lambda model, place: model)
    with fake_cuda(monkeypatch), OnTheHost() as host:
        model = load_model(config, device="cuda", layer_kernels="none", **options)
    return model, host.found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("make", "tied"), [(lambda **s: LlamaConfig(**WIDE, **s), True), (lambda **s: LlamaConfig(**WIDE, **s), False), (gemma3, True)])  # fmt: skip
def test_nothing_large_is_made_on_the_host_for_a_gpu(make, tied, dtype, monkeypatch):
    config = make(tie_word_embeddings=tied)
    model, large = loaded_on_a_gpu(config, monkeypatch, param_dtype=dtype)
    assert large == []
    tensors = [*model.parameters(), *model.buffers()]
    assert {t.device.type for t in tensors} == {"cuda"}
    assert sum(p.nbytes > LARGE for p in model.parameters()) >= (7 if tied else 8)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}


def test_by_path_too(tmp_path, monkeypatch):
    LlamaConfig(**WIDE).save_pretrained(tmp_path)
    _, large = loaded_on_a_gpu(tmp_path, monkeypatch, random_weights=True)
    assert large == []


def test_under_adapters_and_on_a_rank_that_sends_they_are_drawn_by_the_cpu(monkeypatch):
    """Frozen weights are in no checkpoint, so a resumption must draw the same ones wherever it runs."""
    for options in ({"lora": {"rank": 2}}, {"weights_on": "cpu"}):
        _, large = loaded_on_a_gpu(LlamaConfig(**WIDE), monkeypatch, **options)
        assert large, options


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", TABLES)
def test_tables_are_those_of_the_host(name, dtype):
    """Whatever another device made of them; weights and the random stream stay."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(TABLES[name](), dtype=dtype)
    expected = {name: tensor.clone() for name, tensor in (*model.named_buffers(), *model.named_parameters())}
    tables = [tensor for name, tensor in model.named_buffers() if "inv_freq" in name]
    assert tables
    for tensor in tables:
        tensor.fill_(torch.nan)
    stream = torch.get_rng_state()
    load._compute_tables_on_the_host(model, model)
    assert torch.equal(torch.get_rng_state(), stream)
    for name, tensor in (*model.named_buffers(), *model.named_parameters()):
        assert torch.equal(tensor, expected[name]), name


def test_they_are_computed_after_a_gpu_has_made_its_own(monkeypatch):
    """In the load itself, and outside of the device's context, in which they would be its own again."""
    seen = []
    plain = load._compute_tables_on_the_host

    def recorded(module, owner):
        if module is owner:
            seen.append((torch.empty(0).device.type, [b.device.type for b in module.buffers()]))
        plain(module, owner)

    monkeypatch.setattr(load, "_compute_tables_on_the_host", recorded)
    loaded_on_a_gpu(LlamaConfig(**WIDE), monkeypatch)
    assert seen[0] == ("cpu", ["cuda", "cuda"])


@pytest.mark.parametrize("name", tiny.NAMES)
def test_a_cpu_draws_what_transformers_draws(name, tmp_path):
    tiny.config(name).save_pretrained(tmp_path)
    torch.manual_seed(3)
    expected = AutoModelForCausalLM.from_config(tiny.config(name), dtype=torch.float32)
    for source, options in ((tiny.config(name), {}), (tmp_path, {"random_weights": True})):
        torch.manual_seed(3)
        model = load_model(source, **options)
        for (key, ours), (_, theirs) in zip(
            model.state_dict().items(), expected.state_dict().items(), strict=True
        ):
            assert torch.equal(ours, theirs), key
