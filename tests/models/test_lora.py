"""Where adapters go, what is said of it, what a folder of them says, and going on from one."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from repsft_fast.config import Config
from repsft_fast.errors import ConfigError, ModelError, TrainingError
from repsft_fast.models import load_model, save_pretrained
from repsft_fast.models import lora as lora_module
from repsft_fast.models.load import _forget_quantisation
from repsft_fast.models.lora import LoraSettings, add_lora, lora_said
from repsft_fast.models.merge import adapted_layers
from repsft_fast.models.targets import all_linear, routers, shortest
from repsft_fast.training import finish as finish_module
from repsft_fast.training.trainer import train
from tests.helpers import runs, tiny
from tests.helpers.architectures import KINDS, VOCABULARY, tiny_config
from tests.helpers.sources import named_stacks

WHERE = r"model\.lora\.target_modules"


def build(kind="llama", **options):
    torch.manual_seed(1)
    return load_model(tiny_config(kind), packed=False, **options)


def made(kind, targets="all-linear", **changes):
    torch.manual_seed(0)
    try:
        model = AutoModelForCausalLM.from_config(tiny_config(kind, **changes))
    except (ValueError, AttributeError) as error:
        pytest.skip(f"transformers {transformers.__version__} makes no {kind}: {str(error)[:60]}")
    add_lora(model, LoraSettings(rank=2, target_modules=targets))
    return model


def said_of_layers(model):
    return [one for one in lora_said(model) if "random weights" not in one]  # of which these models are


def adapted(model):
    """Ends of the names of what is adapted."""
    return {
        ".".join(part for part in name.split(".")[-2:] if not part.isdigit())
        for name in adapted_layers(model)
    }


class TestAllLinear:
    @pytest.mark.parametrize(
        ("kind", "router"),
        [
            ("llama4_text", "feed_forward.router"),  # a linear layer of its own class
            ("phimoe", "mlp.router"),
            ("hunyuan_v1_moe", "gate.wg"),  # a linear layer inside the router
            ("jetmoe", "router.layer"),
            ("longcat_flash", "router.classifier"),
            ("afmoe", "router.gate"),
            ("qwen2_moe", "mlp.shared_expert_gate"),
            ("deepseek_v32", "indexer.wq_b"),  # what sparse attention looks at
        ],
    )
    def test_what_feeds_a_top_k_stays_out(self, kind, router):
        model = made(kind)
        assert not any(
            name.endswith(router) or ".router." in f".{name}." or "indexer" in name
            for name in adapted_layers(model)
        )
        assert router in " ".join(lora_said(model))

    @pytest.mark.parametrize(
        "kind", ["qwen3_moe", "mixtral", "olmoe", "deepseek_v3", "glm4_moe", "dots1", "minimax"]
    )
    def test_nothing_is_adapted_by_names_of_another_time(self, kind):
        """peft takes gate_proj, gate and the like for parts of the experts, and puts adapters on the
        router."""
        model = made(kind)
        assert all("attn" in name for name in adapted_layers(model)), "attention alone"
        assert not model.peft_config["default"].target_parameters

    def test_a_router_that_is_a_linear_layer_beside_its_experts(self):
        from torch import nn

        class Block(nn.Module):
            def __init__(self):
                super().__init__()
                self.chooser = nn.Linear(8, 4)
                self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
                self.shared_experts = nn.Linear(8, 4 + 1)

        model = nn.Module()
        model.block = Block()
        assert list(routers(model)) == ["block.chooser"]

    def test_layers_that_are_read_and_not_called_stay_out(self):
        for kind, layer in (("mamba2", "out_proj"), ("mamba", "dt_proj"), ("bamba", "out_proj")):
            model = made(kind)
            assert not any(
                name.endswith(f"mixer.{layer}") or name.endswith(f"mamba.{layer}")
                for name in adapted_layers(model)
            )
            assert "would be passed over" in " ".join(lora_said(model))
        assert "mlp.dense_4h_to_h" in adapted(made("bloom"))

    def test_layers_that_compute_more_stay_out(self):
        model = made("deepseek_v4")
        assert not any("o_a_proj" in name for name in adapted_layers(model))
        assert "compute more than W x" in " ".join(lora_said(model))
        assert "mlp.dense_h_to_4h" in adapted(made("falcon")), "a product written out is one"

    def test_a_router_of_a_variant(self):
        model = made("doge", is_moe=True, num_experts=16, num_experts_per_tok=4)
        assert "mlp.router_gate" in " ".join(lora_said(model))
        assert not any("router_gate" in name for name in adapted_layers(model))

    def test_the_head_and_the_embedding_stay_out_and_transposed_layers_are_in(self):
        assert adapted(made("gpt2")) == {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}

    def test_plain_models_are_told_nothing(self):
        model = made("llama")
        assert said_of_layers(model) == []
        names = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
        assert model.peft_config["default"].target_modules == names

    def test_what_is_named_beside_it_is_not_left_out(self):
        model = made("gpt_oss", ["all-linear", "experts.down_proj"])
        (said,) = said_of_layers(model)
        assert "leaves out experts.gate_up_proj (2): experts" in said
        assert (
            said_of_layers(made("gpt_oss", ["all-linear", "experts.down_proj", "experts.gate_up_proj"])) == []
        )

    def test_stacked_experts_are_told(self):
        (said,) = said_of_layers(made("gpt_oss"))
        assert "experts.gate_up_proj" in said
        assert "only where they are named" in said

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", KINDS)
    def test_every_architecture(self, kind):
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(tiny_config(kind))
            chosen, left = all_linear(model, lambda _: False)
        except Exception as error:
            pytest.skip(f"no tiny model: {type(error).__name__}")
        words = ("router", "indexer", "lm_head", "embed_tokens", "gate.wg", "pooler", "encoder_attn")
        found = [name for name in chosen if any(word in name for word in words)]
        assert [name for name in found if "modality_router" not in name] == [], (
            "Gemma 3n's mixes, it chooses nothing"
        )
        assert chosen or left

    def test_names_are_as_short_as_they_can_be(self):
        names = ["a.0.gate", "a.1.q", "b.0.gate"]
        assert shortest(["a.1.q", "a.2.q"], names[::2]) == ["q"]
        assert shortest(["a.0.gate"], ["b.0.gate", "a.1.gate"]) == ["a.0.gate"]
        assert shortest(["m.a.gate"], ["m.b.gate"]) == ["a.gate"]
        assert shortest(["m.experts.down"], [], parts=2) == ["experts.down"]


class TestNames:
    def test_experts_by_the_name_of_their_parameter(self):
        model = made("qwen3_moe", ["q_proj", "experts.down_proj"])
        assert adapted(model) == {"self_attn.q_proj", "mlp.experts"}
        assert list(model.peft_config["default"].target_parameters) == ["experts.down_proj"]

    def test_experts_alone(self):
        assert adapted(made("gpt_oss", ["experts.gate_up_proj"])) == {"mlp.experts"}

    def test_a_regular_expression(self):
        model = made("llama", r".*layers\.1\..*(q|v)_proj")
        assert sorted(adapted_layers(model)) == [f"model.layers.1.self_attn.{x}_proj" for x in "qv"]

    @pytest.mark.parametrize(
        ("kind", "targets", "words"),
        [
            ("llama", ["q_prog"], "q_prog.*did you mean q_proj"),
            ("llama", ["q_proj", "nothing"], "names no layer, expected one of q_proj.* got nothing"),
            ("llama", "(", "matches no layer"),
            ("llama", [], "there is nothing to adapt"),
            ("llama", ["lm_head"], "stay frozen"),
            ("llama", ["q_proj", "embed_tokens"], "stay frozen"),
            ("llama", ["all-linear", "lm_head"], "stay frozen"),
            ("llama", "q_proj, v_proj", r"give a list: \[q_proj, v_proj\]"),
            ("qwen3_moe", ["q_proj", "gate_proj"], "name experts.gate_up_proj and experts.down_proj"),
            ("mixtral", ["w1"], "name experts.gate_up_proj and experts.down_proj"),
            ("llama", ["mlp"], "is a LlamaMLP"),
            ("llama", ["input_layernorm"], "is a LlamaRMSNorm"),
            ("qwen2_moe", ["shared_expert_gate"], "is a router"),
            ("llama4_text", ["router"], "router"),
            ("deepseek_v3", ["down_proj"], "peft takes these names"),
            ("qwen3_moe", ["gate"], "peft takes these names|is a Qwen3MoeTopKRouter"),
            ("mamba2", ["out_proj"], "passed over"),
        ],
    )
    def test_what_cannot_be(self, kind, targets, words):
        with pytest.raises(ModelError, match=rf"{WHERE}: .*({words})"):
            made(kind, targets)

    def test_dropout_with_adapters_of_experts(self):
        with pytest.raises(
            ModelError, match=r"model\.lora\.dropout: adapters of parameters .*expected 0, got 0\.1"
        ):
            build("gpt_oss", lora={"dropout": 0.1, "target_modules": ["experts.down_proj"]})
        build("gpt_oss", lora={"dropout": 0.1})


class TestSettings:
    """A library's call is not checked by the settings' own rules."""

    @pytest.mark.parametrize(
        "setting",
        [
            {"rank": 0}, {"rank": -1}, {"rank": 2.5}, {"rank": True}, {"rank": "2"}, {"alpha": 0}, {"alpha": -3.0},
            {"alpha": float("nan")}, {"alpha": float("inf")}, {"alpha": None}, {"dropout": 1.0}, {"dropout": -0.1},
            {"dropout": float("nan")}, {"target_modules": None}, {"target_modules": [1]}, {"target_modules": 3},
        ],
    )  # fmt: skip
    def test_numbers_that_no_adapter_has(self, setting):
        with pytest.raises(ModelError, match=rf"model\.lora\.{next(iter(setting))}: cannot be, expected"):
            build(lora=setting)

    def test_a_rank_above_the_layers_own_is_told(self):
        assert "20 is more than 4 of the layers have" in " ".join(lora_said(build(lora={"rank": 20})))
        assert said_of_layers(build(lora={"rank": 16})) == []

    @pytest.mark.parametrize("rank", [33, 10**6, 10**18])
    def test_a_rank_above_every_layers_own_is_refused_before_memory_is_taken(self, rank):
        with pytest.raises(
            ModelError, match=rf"model\.lora\.rank: is more than any .* at most 32, .* got {rank};"
        ):
            build(lora={"rank": rank})

    @pytest.mark.parametrize("pattern", [r"(([a-z_.0-9])+.)+[A-Z]([a-z])+$", ".*.*.*.*.*.*x", "(a+)+b"])
    def test_an_expression_that_may_never_end(self, pattern):
        with pytest.raises(ModelError, match=r"model\.lora\.target_modules: repeats too much to be matched"):
            build(lora={"rank": 2, "target_modules": pattern})

    @pytest.mark.parametrize("lora", [True, False, 8, "all-linear", "peft"])
    def test_what_are_no_settings(self, lora):
        """peft's own have other names for most of these, which would be passed over."""
        import peft

        lora = peft.LoraConfig(r=2, lora_alpha=3, target_modules="all-linear") if lora == "peft" else lora
        with pytest.raises(
            ModelError, match=r"model\.lora: are no settings of adapters, expected a mapping of rank, alpha, "
        ):
            build(lora=lora)

    def test_reversible_layers_give_adapters_no_gradient(self):
        with pytest.raises(
            ModelError, match=r"model\.lora: ReformerModelWithLMHead has reversible layers.*drop model\.lora"
        ):
            made("reformer")

    @pytest.mark.parametrize(
        ("error", "words"),
        [
            (ImportError("cannot import name is_thing"), "cannot import name is_thing"),
            (RuntimeError("built for another torch"), "built for another torch"),
            (AttributeError("no attribute"), "AttributeError no attribute"),
        ],
    )
    def test_a_peft_that_cannot_be_imported(self, error, words, monkeypatch):
        right = lora_module.importlib.import_module

        def broken(name, *more):
            if name == "peft":
                raise error
            return right(name, *more)

        monkeypatch.setattr(lora_module.importlib, "import_module", broken)
        with pytest.raises(ModelError, match=rf"model\.lora: import peft: {words}.*--force-reinstall peft"):
            build(lora={"rank": 2})

    def test_no_peft(self, monkeypatch):
        monkeypatch.setattr(lora_module.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(
            ModelError, match=r"model\.lora: needs peft, which is not installed; pip install peft"
        ):
            build(lora={"rank": 2})


RESULTS = json.loads(Path(__file__).with_name("results.json").read_text())
TRAINED = [kind for kind, found in RESULTS.items() if found.get("LoRA") == "exact"]


def without_gradient(kind, targets):
    """Adapted layers whose B gets none from three documents, of a model none of whose own parameters is
    zero."""
    torch.manual_seed(0)
    model = load_model(
        tiny_config(kind),
        packed=RESULTS[kind]["packed"] == "exact",
        lora={"rank": 2, "target_modules": targets},
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.requires_grad and not parameter.any():  # a gate that begins closed
                parameter.copy_(torch.randn(parameter.shape) * 0.1)
    for document in tiny.documents((30, 21, 25), vocabulary=VOCABULARY):
        model.loss(tiny.row([document], denominator=3.0))[0].backward()
    found = [
        name
        for name, p in model.named_parameters()
        if "lora_B" in name and (p.grad is None or not p.grad.any())
    ]
    assert any("lora_B" in name for name, _ in model.named_parameters())
    return found


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_oss", pytest.param("mamba2", id="one a row")])
def test_every_adapter_is_trained(kind):
    assert without_gradient(kind, "all-linear") == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", TRAINED)
def test_every_adapter_of_every_architecture_is_trained(kind):
    """One that the model passes over would be saved as it began, in silence."""
    names = named_stacks(kind)
    assert without_gradient(kind, "all-linear") == []
    if names:
        assert without_gradient(kind, ["all-linear", *names]) == []


class TestTheFolder:
    def test_it_names_its_base_by_the_whole_path(self, tmp_path, monkeypatch):
        build().save_pretrained(tmp_path / "base")
        monkeypatch.chdir(tmp_path)
        model = load_model("./base", lora={"rank": 2})
        save_pretrained(model, None, tmp_path / "adapters")
        monkeypatch.chdir("/")
        saved = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
        assert saved["base_model_name_or_path"] == str(tmp_path / "base")
        from peft import AutoPeftModelForCausalLM

        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapters")

    def test_a_hub_id_stays_one(self, tmp_path):
        build().save_pretrained(tmp_path)
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
        model.name_or_path = "owner/model"
        add_lora(model, LoraSettings(rank=2))
        assert model.peft_config["default"].base_model_name_or_path == "owner/model"
        assert lora_said(model) == []

    @pytest.mark.parametrize("merge", [False, True])
    def test_it_names_no_base_whose_weights_are_others(self, tmp_path, merge):
        """Of random weights nothing is saved but the adapters: the folder that gave the configuration holds
        other ones."""
        build().save_pretrained(tmp_path)
        model = load_model(tmp_path, random_weights=True, lora={"rank": 2, "merge": merge})
        assert model.peft_config["default"].base_model_name_or_path is None
        said = ["model.lora: the adapters are saved without the random weights beside which they learn; "
                "set model.lora.merge: true to save the whole model"]  # fmt: skip
        assert lora_said(model) == ([] if merge else said)

    @pytest.mark.parametrize("merge", [False, True])
    def test_a_base_in_gguf_is_told(self, tmp_path, merge):
        build().save_pretrained(tmp_path)
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
        _forget_quantisation(model)  # which is what tells them apart
        add_lora(model, LoraSettings(rank=2, merge=merge))
        assert ["gguf_file" in one for one in lora_said(model)] == ([] if merge else [True])

    @pytest.mark.parametrize("kind", ["gpt2", "qwen3_moe", "gpt_oss", "qwen2_moe", "deepseek_v3"])
    def test_peft_reads_the_same_adapters(self, kind, tmp_path):
        from peft import PeftModel

        targets = (
            ["all-linear", "experts.down_proj", "experts.gate_up_proj"] if kind != "gpt2" else "all-linear"
        )
        model = tiny.filled(build(kind, lora={"rank": 2, "target_modules": targets})).eval()
        save_pretrained(model, None, tmp_path)
        loaded = PeftModel.from_pretrained(build(kind), tmp_path).eval()
        ids = torch.tensor([[5, 6, 7, 8, 9]])
        with torch.no_grad():
            ours, theirs = (m(input_ids=ids, use_cache=False).logits for m in (model, loaded))
            base = build(kind).eval()(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(theirs, ours, rtol=0, atol=0)
        assert (ours - base).abs().max() > 1e-2


def run_of(folder, **changes):
    return runs.settings(folder, budget__epochs=1, **changes)


class TestRuns:
    def test_the_setting(self):
        assert (
            Config.of(
                {
                    "run.folder": "x",
                    "data.train": "y",
                    "model.path": "z",
                    "budget.epochs": 1,
                    "model.lora.from": "a",
                }
            ).to_dict()["model"]["lora"]["from"]
            == "a"
        )
        with pytest.raises(ConfigError, match=r"model\.lora\.from.*random"):
            Config.of(
                {"run.folder": "x", "data.train": "y", "model.config": {"model_type": "llama"}, "budget.epochs": 1,
                 "model.lora.from": "a"}
            )  # fmt: skip

    def test_adapters_are_saved_first_and_stay_when_merging_fails(self, tmp_path, monkeypatch):
        saved = []
        right = finish_module.save_pretrained

        def save(model, tokenizer, folder, *, merge_lora=False, **more):
            saved.append(merge_lora)
            if merge_lora:
                raise RuntimeError("no room")
            return right(model, tokenizer, folder, **more)

        monkeypatch.setattr(finish_module, "save_pretrained", save)
        monkeypatch.setattr(finish_module, "evaluate_test", lambda parts: saved.append("test"))
        words = (
            r"RuntimeError: no room; the end .* is saved in gen-.* adapters are saved, whole, in"
            rf" {tmp_path}/run/adapter"
        )
        with pytest.raises(TrainingError, match=words):
            train(run_of(tmp_path, model__lora={"rank": 2, "merge": True}))
        assert saved == [
            False,
            True,
        ], "adapters, then the merged model, and what only tells of them after both"
        assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()

    def test_merged_and_adapters_beside(self, tmp_path):
        train(run_of(tmp_path, model__lora={"rank": 2, "merge": True}))
        folder = tmp_path / "run"
        assert (folder / "model.safetensors").is_file()
        assert not (folder / "adapter_config.json").exists(), (
            "transformers would load them over the merged weights"
        )
        assert (folder / "adapter" / "adapter_config.json").is_file()
