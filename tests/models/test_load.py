"""Loading, the loss method, the checks at start, LoRA, checkpointing, compilation."""

import dataclasses
import sys
from collections import Counter
from types import ModuleType

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    MixtralConfig,
    PhiConfig,
    T5Config,
)

from repsft_fast.errors import ModelError
from repsft_fast.evaluate.generate import generate
from repsft_fast.models import LoraSettings, check_no_leak, config_of, hidden_states, load_model
from repsft_fast.models import layers as layers_module
from repsft_fast.models import load as load_module
from repsft_fast.models.checks import check_head
from repsft_fast.models.load import load_tokenizer
from repsft_fast.models.loss import Head
from repsft_fast.ops import attention
from repsft_fast.ops.attention import Packed
from tests.helpers import tiny

DOCUMENTS = tiny.documents((7, 12, 5))
SMALL = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip


def build(name="llama", **options):
    torch.manual_seed(1)
    given = tiny.config(name) if isinstance(name, str) else name
    return load_model(given, **options)


def full_logits_losses(model, row):
    """What the loss must be, from transformers' own forward over each document and full logits."""
    found = []
    with torch.no_grad():
        for segment in torch.split(row.tokens[0], row.segment_lengths):
            found.append(model(input_ids=segment[None], use_cache=False).logits[0])
        return torch.nn.functional.cross_entropy(
            torch.cat(found), row.targets, reduction="none", ignore_index=-100
        )


class TestLoss:
    @pytest.mark.parametrize("average", ["sample", "token"])
    @pytest.mark.parametrize("prompt", [0, 3])
    def test_it_is_the_weighted_sum_of_the_trained_tokens(self, prompt, average):
        model = build(param_dtype=torch.float64)
        row = tiny.row(DOCUMENTS, prompt=prompt, average=average, denominator=3, length=40)
        loss, stats = model.loss(row)
        expected = full_logits_losses(model, row)
        torch.testing.assert_close(loss, (expected * row.weights).sum(), rtol=1e-12, atol=0)
        torch.testing.assert_close(stats.loss, expected[row.trained_positions], rtol=1e-12, atol=0)
        assert stats.sum_by(row.position_segments, 3).total.tolist() == [n - prompt for n in (7, 12, 5)]

    def test_under_no_grad_it_is_the_same_number(self):
        model = build()
        row = tiny.row(DOCUMENTS)
        loss, _ = model.loss(row)
        with torch.no_grad():
            evaluated, _ = model.loss(row)
        assert loss.requires_grad
        assert not evaluated.requires_grad
        torch.testing.assert_close(evaluated, loss.detach(), rtol=1e-6, atol=0)

    def test_a_row_with_nothing_to_train_contributes_exactly_zero(self):
        model = build()
        loss, stats = model.loss(tiny.row([], length=16))
        loss.backward()
        assert loss.item() == 0.0
        assert stats.loss.numel() == 0
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert not parameter.grad.any(), name

    def test_memorised_rows_can_be_left_out(self):
        model, row = build(), tiny.row(DOCUMENTS)
        missed = -torch.expm1(-model.loss(row)[1].loss)
        threshold = missed.sort().values[11:13].mean().item()  # between two rows, not on one
        fewer = dataclasses.replace(row, weights=torch.where(missed >= threshold, row.weights, 0.0))
        model.loss(fewer)[0].backward()
        skipping = build(skip_below=threshold)
        skipping.loss(row)[0].backward()
        for (name, got), expected in zip(skipping.named_parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(got.grad, expected.grad, rtol=1e-5, atol=1e-7, msg=name)

    def test_no_number_is_read_back_and_no_mask_is_built(self):
        """Law 8 at the model: `.item()`, `nonzero` and boolean tests are the ways to a host sync."""

        class Count(TorchDispatchMode):
            def __init__(self):
                super().__init__()
                self.calls = Counter()

            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                self.calls[function.overloadpacket.__name__] += 1
                return function(*args, **(kwargs or {}))

        for name in tiny.NAMES:
            model, row = build(name), tiny.row(DOCUMENTS, length=40)
            with Count() as count:
                model.loss(row)[0].backward()
            for sync in ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select"):
                assert count.calls[sync] == 0, (name, sync)
            with Count() as count:
                hidden_states(model, row)
            for mask in () if name == "olmo3" else ("diff", "cumsum", "where", "tril", "le", "bitwise_and"):
                assert count.calls[mask] == 0, (name, mask)

    def test_no_cache_is_kept(self):
        model = build()
        seen = []
        model.model.register_forward_hook(lambda module, args, output: seen.append(output.past_key_values))
        model.loss(tiny.row(DOCUMENTS))
        assert seen == [None]


class TestHead:
    @pytest.mark.parametrize(
        ("config", "head"),
        [
            (GraniteConfig(**SMALL, logits_scaling=8.0), Head(scale=0.125)),
            (CohereConfig(**SMALL, logit_scale=0.25), Head(scale=0.25)),
            (
                Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=2.0, sliding_window=4),
                Head(softcap=2.0),
            ),
        ],
        ids=["granite", "cohere", "gemma2"],
    )
    def test_scaled_and_capped_heads(self, config, head):
        model = build(config, param_dtype=torch.float64)
        assert model.loss_settings.head == head
        row = tiny.row(tiny.documents((7, 12, 5), vocabulary=61), length=30)
        # large logits, so that the head's form shows
        torch.nn.init.normal_(model.get_output_embeddings().weight, std=1.0)
        loss, _ = model.loss(row)
        # Gemma 2's own sdpa ignores its attention soft-cap; its eager attention takes the softmax in fp32
        model.set_attn_implementation("eager")
        torch.testing.assert_close(
            loss, (full_logits_losses(model, row) * row.weights).sum(), rtol=1e-6, atol=0
        )

    def test_a_bias_is_added(self):
        model = build(PhiConfig(**SMALL), param_dtype=torch.float64)
        with torch.no_grad():
            model.lm_head.bias.copy_(torch.randn(61))
        row = tiny.row(tiny.documents((7, 12, 5), vocabulary=61), length=32)
        loss, stats = model.loss(row)
        expected = full_logits_losses(model, row)
        torch.testing.assert_close(stats.loss, expected[row.trained_positions], rtol=1e-12, atol=0)
        loss.backward()
        found = model.lm_head.bias.grad
        model.zero_grad()
        parts = torch.split(row.tokens[0], row.segment_lengths)
        logits = torch.cat([model(input_ids=part[None], use_cache=False).logits[0] for part in parts])
        losses = torch.nn.functional.cross_entropy(logits, row.targets, reduction="none", ignore_index=-100)
        (losses * row.weights).sum().backward()
        torch.testing.assert_close(found, model.lm_head.bias.grad, rtol=1e-9, atol=1e-12)

    def test_a_transform_nobody_named_is_refused(self):
        model = build()
        model.lm_head.register_forward_hook(lambda module, arguments, output: output * 1.5)
        with pytest.raises(ModelError, match="LlamaForCausalLM transforms its logits"):
            check_head(model, Head())

    def test_no_causal_lm(self):
        with pytest.raises(ModelError):
            build(T5Config(vocab_size=61, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2))

    def test_an_auxiliary_loss_is_refused(self):
        with pytest.raises(ModelError, match="set output_router_logits to false"):
            build(MixtralConfig(**SMALL, num_local_experts=2, output_router_logits=True))


class TestLeaks:
    @pytest.mark.parametrize("name", tiny.NAMES)
    @pytest.mark.parametrize("backend", ["auto", "sdpa", "mask"])
    def test_our_attention_passes(self, name, backend):
        check_no_leak(build(name, attention=backend))

    def test_bf16_storage_passes(self):
        check_no_leak(build("qwen3", param_dtype="bfloat16"))

    def test_one_long_document_in_place_of_three_is_caught(self, monkeypatch):
        whole = staticmethod(
            lambda row, backend="auto": Packed(row.cu_seqlens[[0, -1]], (row.tokens.numel(),), 99, backend)
        )
        monkeypatch.setattr(Packed, "of", whole)
        with pytest.raises(
            ModelError, match=r"does not take packed rows \(a document of 9 positions changes.*repsft/sdpa"
        ):
            check_no_leak(build(attention="sdpa"))

    @pytest.mark.parametrize("implementation", ["sdpa", "eager"])
    def test_transformers_own_attention_cannot_run_without_its_mask(self, implementation):
        model = build()
        model.set_attn_implementation(implementation)
        # no mask fits
        with pytest.raises(ModelError, match=r"does not take packed rows \(.*must match.*batch.pack: false"):
            check_no_leak(model)

    def test_positions_that_go_on_are_caught(self):
        """A model that counts positions through the row sees no other document, yet computes something
        else."""
        model = build()
        backbone = model.model.forward
        model.model.forward = lambda **keywords: backbone(**{**keywords, "position_ids": torch.arange(keywords["input_ids"].shape[1])[None] ** 2})  # fmt: skip
        with pytest.raises(ModelError, match="differs from the document alone"):
            check_no_leak(model)

    def test_the_default_cache_of_transformers_leaks(self):
        """The trap that makes `use_cache=False` a must: kept here to notice when it goes away."""
        model = AutoModelForCausalLM.from_config(tiny.config("llama"), attn_implementation="sdpa")
        row = tiny.row(DOCUMENTS)
        ids = {"input_ids": row.tokens, "position_ids": row.positions}
        with torch.no_grad():
            alone = model(input_ids=row.tokens[:, 7:19], use_cache=False).logits
            errors = [
                (model(**ids, use_cache=cache).logits[:, 7:19] - alone).abs().max() for cache in (True, False)
            ]
        assert errors[0] > 0.1
        assert errors[1] < 1e-4

    def test_training_mode_is_kept(self):
        model = build()
        check_no_leak(model)
        assert model.training
        model.eval()
        check_no_leak(model)
        assert not model.training


@pytest.mark.parametrize("name", ["llama", "olmo3"])
def test_the_same_model_generates(name):
    """A left-padded batch with cache: what transformers' own sdpa gives, token for token."""
    model = build(name).eval()
    plain = AutoModelForCausalLM.from_config(tiny.config(name), attn_implementation="sdpa").eval()
    plain.load_state_dict(model.state_dict())
    ids = torch.tensor([[0, 0, 0, 5, 6], [9, 8, 7, 6, 5]])
    options = {"attention_mask": (ids != 0).long(), "max_new_tokens": 12, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), plain.generate(ids, **options))


class TestLora:
    def test_only_fp32_adapters_train_and_the_first_loss_is_the_base_models(self):
        row = tiny.row(DOCUMENTS)
        base = build(param_dtype="bfloat16")
        model = build(compute_dtype="bfloat16", lora=LoraSettings(rank=4))
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        assert trained
        assert all("lora_" in n and p.dtype == torch.float32 for n, p in trained.items())
        assert model.lm_head.weight.dtype == torch.bfloat16
        assert torch.equal(model.loss(row)[0], base.loss(row)[0]), "B starts at zero"
        model.loss(row)[0].backward()
        assert all(p.grad is not None for p in trained.values())
        assert model.lm_head.weight.grad is None

    def test_settings(self):
        class Section:  # like the configuration's: attributes, one of them not ours
            rank, alpha, dropout, target_modules, merge = 2, 6.0, 0.1, ["q_proj"], True

        model = build(lora=Section())
        layer = model.model.layers[0].self_attn.q_proj
        assert layer.scaling["default"] == 3.0
        assert layer.lora_dropout["default"].p == 0.1
        with pytest.raises(ModelError, match=r"model.lora: has unknown settings.* got ranck"):
            build(lora={"ranck": 2})


class TestCheckpointing:
    @pytest.mark.parametrize(("mode", "recomputed"), [("none", 0), ("selective", 2), ("full", 4)])
    def test_layers_are_recomputed(self, mode, recomputed):
        model = build(tiny.config("llama", num_hidden_layers=4), activation_checkpointing=mode)
        runs = Counter()
        for number, layer in enumerate(model.model.layers):
            layer.mlp.register_forward_pre_hook(lambda *_, number=number: runs.update([number]))
        model.loss(tiny.row(DOCUMENTS))[0].backward()
        assert sum(count == 2 for count in runs.values()) == recomputed

    @pytest.mark.parametrize("lora", [None, {"rank": 2, "dropout": 0.5}])
    def test_dropout_is_drawn_once(self, lora):
        gradients = []
        for mode in ("none", "full"):
            model = build(activation_checkpointing=mode, lora=lora)
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.constant_(parameter, 0.1)
            torch.manual_seed(5)
            model.loss(tiny.row(DOCUMENTS))[0].backward()
            gradients.append([p.grad for p in model.parameters() if p.requires_grad])
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)

    def test_unknown(self):
        with pytest.raises(ModelError, match=r"model.activation_checkpointing: .* got some"):
            build(activation_checkpointing="some")


class TestCompile:
    @pytest.mark.parametrize("backend", ["sdpa", "mask"])
    def test_one_graph_per_shape_whatever_the_documents(self, monkeypatch, backend):
        from torch._dynamo.testing import CompileCounter

        counter = CompileCounter()
        compiled = torch.compile
        monkeypatch.setattr(
            torch, "compile", lambda function, options=None, **o: compiled(function, backend=counter, **o)
        )
        torch._dynamo.reset()
        model = build(compile=True, attention=backend)
        plain = build(attention=backend)
        assert model.state_dict().keys() == plain.state_dict().keys()
        frames = []
        for lengths in ((7, 12, 5), (3, 20, 9), (16, 8, 8), (2, 2, 20)):
            row = tiny.row(tiny.documents(lengths), length=48)
            loss = model.loss(row)[0]
            torch.testing.assert_close(loss, plain.loss(row)[0], rtol=1e-6, atol=0)
            loss.backward()
            frames.append(counter.frame_count)
        assert frames[0] > 0
        assert frames[1:] == frames[:1] * 3
        torch._dynamo.reset()

    def test_more_shapes_than_torchs_limit_are_compiled_and_generation_is_not(self, monkeypatch):
        from torch._dynamo.testing import CompileCounter

        counter, frames = CompileCounter(), []
        compiled = torch.compile
        monkeypatch.setattr(
            torch, "compile", lambda function, options=None, **o: compiled(function, backend=counter, **o)
        )
        torch._dynamo.reset()
        model = build(tiny.config("llama", num_hidden_layers=1), compile=True, attention="mask")
        with torch.no_grad():
            for documents in range(2, 12):  # the length is no shape of a graph's own
                model.loss(tiny.row(tiny.documents((5,) * documents), length=64))
                frames.append(counter.frame_count)
        assert np.diff(frames).tolist() == [frames[0]] * 9, "past the limit layers would run uncompiled"
        generate(model, [[5, 6, 7]], end_ids=[2], max_new_tokens=4)
        assert counter.frame_count == frames[-1], "every new token would be compiled for"
        torch._dynamo.reset()


class TestKernels:
    def test_liger_on_a_cpu(self):
        with pytest.raises(ModelError, match=r"model.layer_kernels: liger needs a CUDA device"):
            build(layer_kernels="liger")
        with pytest.raises(ModelError, match=r"expected auto, liger or none, got fast"):
            build(layer_kernels="fast")

    @pytest.fixture
    def liger(self, monkeypatch):
        """What liger is asked to do to a model; the package need not be there."""
        calls = []
        package, patches = (
            ModuleType("liger_kernel.transformers"),
            ModuleType("liger_kernel.transformers.monkey_patch"),
        )
        package._apply_liger_kernel_to_instance = lambda model, **options: calls.append(options)
        patches.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": None}
        for module in (ModuleType("liger_kernel"), package, patches):
            monkeypatch.setitem(sys.modules, module.__name__, module)
        return calls

    def test_auto_leaves_a_cpu_model_alone_and_liger_takes_everything_but_the_loss(self, liger):
        model = build()
        assert liger == []
        layers_module.apply_layer_kernels(model, "auto", torch.device("cuda"))
        assert liger == [{"cross_entropy": False, "fused_linear_cross_entropy": False}]

    def test_an_architecture_it_does_not_know(self, liger):
        layers_module.apply_layer_kernels(build("olmo2"), "auto", torch.device("cuda"))
        assert liger == []
        with pytest.raises(ModelError, match=r"no kernels for this architecture, got olmo2"):
            layers_module.apply_layer_kernels(build("olmo2"), "liger", torch.device("cuda"))

    @pytest.mark.parametrize(
        ("which", "compile", "applied"),
        [("auto", False, 1), ("auto", True, 0), ("none", True, 0), ("liger", False, 1)],
    )
    def test_compiled_layers_have_no_liger(self, which, compile, applied, liger, monkeypatch):
        """Through load_model, which says that the device is a GPU; nothing here needs one."""
        plain = layers_module.apply_layer_kernels
        monkeypatch.setattr(load_module, "apply_layer_kernels", lambda model, which, device, **o: plain(model, which, torch.device("cuda"), **o))  # fmt: skip
        build(layer_kernels=which, compile=compile)
        assert len(liger) == applied

    def test_both_by_name_are_refused_before_anything_is_read(self, liger):
        wrong = (
            r"model\.layer_kernels: .*wrong numbers.*; set model.layer_kernels to auto or none to compile, or"
        )
        with pytest.raises(ModelError, match=wrong):
            load_model("no/such/folder", layer_kernels="liger", compile=True, device="cuda")
        with pytest.raises(ModelError, match=wrong):
            layers_module.apply_layer_kernels(build(), "liger", torch.device("cuda"), compile=True)
        assert liger == []


class TestLoading:
    def test_from_a_mapping(self):
        mapping = tiny.config("qwen3").to_dict()
        assert type(build(mapping)).__name__ == "Qwen3ForCausalLM"
        with pytest.raises(ModelError, match=r"model.config: has no model_type, expected for example llama"):
            build({"hidden_size": 8})
        with pytest.raises(ModelError, match=r"model.config: .*got no_such_thing"):
            build({"model_type": "no_such_thing"})

    def test_from_a_folder(self, tmp_path):
        plain = AutoModelForCausalLM.from_config(tiny.config("olmo2"))
        plain.save_pretrained(tmp_path)
        model = load_model(tmp_path)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
        assert config_of(tmp_path).model_type == "olmo2"
        random = load_model(tmp_path, random_weights=True)
        assert type(random) is type(model)
        assert not torch.equal(random.lm_head.weight, model.lm_head.weight)

    @pytest.mark.parametrize(
        "path", ["no/such/folder", "package:no_such_package/model.gguf", "package:../model.gguf"]
    )
    def test_a_path_that_leads_nowhere(self, path):
        with pytest.raises(ModelError, match=r"^model\.path: "):
            load_model(path)
        with pytest.raises(ModelError, match=r"^model\.path: "):
            config_of(path)

    def test_a_folder_that_is_not_there_is_called_that(self):
        with pytest.raises(
            ModelError, match=r"^model\.path: no such folder, got a/b/c; give a folder or hub id of a causal"
        ):
            load_model("a/b/c")
        with pytest.raises(
            ModelError, match=r"^tokenizer\.path: no such folder, got a/b/c; give a folder or hub id of a tok"
        ):
            load_tokenizer("a/b/c")

    def test_a_slip_in_a_config_is_refused_and_a_key_of_its_own_is_not(self):
        mapping = {"model_type": "llama", "hiden_size": 32, "vocab_sise": 61, "my_own_key": 3}
        wrong = (
            "model.config.hiden_size is not a key of llama; did you mean hidden_size[?];"
            " model.config.vocab_sise is"
        )
        with pytest.raises(ModelError, match=wrong):
            config_of(mapping)
        assert (
            config_of(
                {"model_type": "llama", "hidden_size": 32, "rope_theta": 5e5, "my_own_key": 3}
            ).my_own_key
            == 3
        )

    def test_the_setting_that_gave_the_path_is_named(self, tmp_path):
        wrong = (
            "model.path: the folder holds neither a model nor a tokenizer, got .*; give a folder or hub id of"
            " a model with"
        )
        with pytest.raises(ModelError, match=wrong):
            load_tokenizer(tmp_path, setting="model.path")

    def test_a_folder_without_a_model(self, tmp_path):
        with pytest.raises(ModelError, match=r"^model\.path: "):
            load_model(tmp_path)
        with pytest.raises(ModelError, match=r"model.gguf_file: does not exist"):
            load_model(tmp_path, gguf_file="model.gguf")

    def test_precision(self):
        assert build().compute_dtype == torch.float32
        model = build(param_dtype="float32", compute_dtype="bfloat16")
        assert (model.dtype, model.compute_dtype) == (torch.float32, torch.bfloat16)
        with pytest.raises(ModelError, match=r"model.param_dtype: .* got int8"):
            build(param_dtype="int8")

    def test_the_hidden_states_are_the_backbones(self):
        model = build()
        row = tiny.row(DOCUMENTS[:1])
        expected = model(input_ids=row.tokens, use_cache=False, output_hidden_states=True).hidden_states[-1][
            0
        ]
        torch.testing.assert_close(hidden_states(model, row), expected, rtol=1e-5, atol=1e-5)

    def test_registration_can_be_repeated(self):
        assert attention.register() == attention.register() == "repsft"
