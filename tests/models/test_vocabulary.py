"""Rows for tokens that the model has none for: embedding, head, bias, saved sizes; what cannot be grown is
refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from repsft_fast import train
from repsft_fast.config import Config
from repsft_fast.errors import ConfigError, DataError, ModelError
from repsft_fast.models import load_model, save_pretrained
from repsft_fast.models.vocabulary import grow_vocabulary, tokens_of
from tests.helpers import ranks, runs
from tests.helpers.architectures import KINDS, VOCABULARY, tiny_config
from tests.helpers.sources import write_source

SIZE = VOCABULARY + 5


def made(kind="llama", **changes):
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(tiny_config(kind, **changes)).eval()


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3", "gemma2", "gptj", "mixtral"])
def test_old_tokens_stay_and_new_ones_are_their_mean(kind, tied):
    if kind == "gptj" and tied:
        pytest.skip("a head with a bias is not tied")
    model = made(kind, tie_word_embeddings=tied)
    before = logits(model, [5, 6, 7])
    said = grow_vocabulary(model, SIZE)
    assert (
        said == f"5 tokens more than the model had ({VOCABULARY}): their rows begin as the mean of the others"
    )
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert (embedding.weight is head.weight) == tied
    assert embedding.weight.shape[0] == head.weight.shape[0] == model.config.vocab_size == SIZE
    for weight in (embedding.weight, head.weight, *([head.bias] if head.bias is not None else [])):
        assert weight.requires_grad
        torch.testing.assert_close(
            weight[VOCABULARY:], weight[:VOCABULARY].mean(0).expand_as(weight[VOCABULARY:])
        )
    after = logits(model, [5, 6, 7])
    torch.testing.assert_close(after[:, :VOCABULARY], before)
    if kind != "gemma2":  # whose logits are capped after the head
        torch.testing.assert_close(after[:, VOCABULARY], before.mean(1))
    assert logits(model, [5, SIZE - 1]).isfinite().all()


@pytest.mark.parametrize("size", [1, VOCABULARY - 1, VOCABULARY])
def test_a_model_with_room_is_left_alone(size):
    model = made()
    weight = model.get_input_embeddings().weight
    assert grow_vocabulary(model, size) is None
    assert model.get_input_embeddings().weight is weight


def test_every_time_the_same():
    one, other = made(), made()
    torch.manual_seed(5)
    grow_vocabulary(one, SIZE)
    torch.manual_seed(6)
    grow_vocabulary(other, SIZE)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


def test_without_memory_it_has_the_shapes():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    grow_vocabulary(model, SIZE)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert model.get_output_embeddings().weight.shape[0] == SIZE


def test_what_is_saved_has_them(tmp_path):
    source = write_source(tmp_path / "source", vocab_size=VOCABULARY)
    words = AutoTokenizer.from_pretrained(source)
    words.add_tokens(["<a>", "<b>"])
    model = load_model(source)
    grow_vocabulary(model, tokens_of(words))
    save_pretrained(model, words, tmp_path / "result")
    assert json.loads((tmp_path / "result" / "config.json").read_text())["vocab_size"] == VOCABULARY + 2
    again, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "result", output_loading_info=True, dtype=torch.float32
    )
    assert not any(report.values())
    ids = AutoTokenizer.from_pretrained(tmp_path / "result")("w5 <a> <b>")["input_ids"]
    assert ids == [5, VOCABULARY, VOCABULARY + 1]
    for parameter in model.parameters():
        # the source's type, in which the new rows too are saved
        parameter.data = parameter.data.bfloat16().float()
    torch.testing.assert_close(logits(again, ids), logits(model.eval(), ids), rtol=0, atol=1e-6)


def test_ids_with_gaps():
    class Words(dict):
        def get_vocab(self):
            return self

    assert tokens_of(Words(a=0, b=11)) == 12
    assert tokens_of(Words()) == 0


def test_tokens_kept_elsewhere_are_refused():
    model = made()
    model.register_buffer("token_bias", torch.zeros(1, VOCABULARY))
    with pytest.raises(
        ModelError, match=r"^model\.resize_vocabulary: LlamaForCausalLM keeps 97 tokens in token_bias too"
    ):
        grow_vocabulary(model, SIZE)


def test_what_transformers_cannot_resize_is_refused(monkeypatch):
    model = made()

    def fails(*_, **__):
        raise NotImplementedError("not here")

    monkeypatch.setattr(type(model), "resize_token_embeddings", fails)
    with pytest.raises(
        ModelError,
        match=r"cannot be given more tokens \(NotImplementedError: not here\); use the model's own",
    ):
        grow_vocabulary(model, SIZE)
    monkeypatch.setattr(type(model), "resize_token_embeddings", lambda *_, **__: None)
    with pytest.raises(ModelError, match=r"cannot be given more tokens \(it has 97 and 97 rows after it\)"):
        grow_vocabulary(model, SIZE)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("mllama", "its embedding and head have 105 and 97 rows, of which some are no tokens of text"),
        (
            "marian",
            (
                "its configuration would not give model.decoder.embed_tokens.weight their new sizes when it"
                " is loaded"
            ),
        ),
        (
            "deepseek_v4",
            r"its configuration would not give model\.layers\.0\.mlp\.gate\.tid2eid their new sizes",
        ),
    ],
)
def test_what_could_not_be_loaded_again_is_refused(kind, why):
    """Rows of images beside those of tokens, sizes by other names, experts chosen by a table over tokens."""
    if kind not in KINDS:
        pytest.skip("an older transformers does not know it")
    with pytest.raises(
        ModelError, match=rf"^model\.resize_vocabulary: \w+ cannot be given more tokens \({why}"
    ):
        grow_vocabulary(made(kind), SIZE)


def test_weights_that_come_apart_are_refused(monkeypatch):
    model = made(tie_word_embeddings=True)
    resize = type(model).resize_token_embeddings

    def untied(self, *arguments, **options):
        resize(self, *arguments, **options)
        self.lm_head.weight = torch.nn.Parameter(self.lm_head.weight.detach().clone())

    monkeypatch.setattr(type(model), "resize_token_embeddings", untied)
    with pytest.raises(ModelError, match=r"\(model\.embed_tokens\.weight and lm_head\.weight come apart"):
        grow_vocabulary(model, SIZE)


def test_with_adapters_they_would_not_be_learned(tmp_path):
    with pytest.raises(
        ModelError,
        match=r"adapters leave the embedding frozen.*expected 97 tokens, got 102; drop model\.lora",
    ):
        grow_vocabulary(made(), SIZE, frozen=True)
    assert grow_vocabulary(made(), VOCABULARY, frozen=True) is None
    settings = runs.settings(tmp_path, model__resize_vocabulary=True, model__lora={"rank": 2})
    with pytest.raises(ConfigError, match=r"model\.resize_vocabulary: adapters leave the embedding frozen"):
        Config.of(settings)


def larger_tokenizer(folder, model):
    """A model folder whose tokenizer has two tokens more than the model has rows; rows of text that use
    them."""
    source = write_source(folder / "source", vocab_size=VOCABULARY)
    words = AutoTokenizer.from_pretrained(source)
    words.add_tokens(["<a>", "<b>"])
    words.save_pretrained(source)
    data = folder / "train.jsonl"
    data.write_text(
        "\n".join(json.dumps({"prompt": f"w{i} w7", "completion": "<a> w3 <b>"}) for i in range(5, 17))
    )
    settings = runs.settings(folder, data__format="prompt", stop__token_accuracy=None)
    settings["data"]["train"] = str(data)
    return settings | {"model": {"path": str(source), **model}, "budget": {"updates": 3}}


def test_a_run_learns_them(tmp_path):
    result = train(Config.of(larger_tokenizer(tmp_path, {"resize_vocabulary": True})))
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert result.success
    assert config["vocab_size"] == VOCABULARY + 2
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run", dtype=torch.float32)
    rows = model.get_output_embeddings().weight[VOCABULARY:]
    assert not torch.allclose(rows[0], rows[1], atol=1e-3), "each went its own way"
    assert "2 tokens more than the model had" in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_a_run_that_goes_on_has_the_same_bits(tmp_path):
    settings = larger_tokenizer(tmp_path, {"resize_vocabulary": True, "save_dtype": "float32"})
    settings |= {"checkpoint": {"every_updates": 1, "keep_last": 9}, "budget": {"updates": 4}}
    train(Config.of(settings))
    whole = load_file(tmp_path / "run" / "model.safetensors")
    (tmp_path / "run" / "result.json").unlink()
    (tmp_path / "run" / "model.safetensors").unlink()
    for later in sorted((tmp_path / "run" / "checkpoints").glob("gen-*"))[1:]:
        shutil.rmtree(later)
    train(Config.of(settings), resume=True)
    again = load_file(tmp_path / "run" / "model.safetensors")
    assert whole.keys() == again.keys()
    assert all(torch.equal(again[name], value) for name, value in whole.items())
    assert "goes on after update 1" in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_without_it_the_line_to_type_is_named(tmp_path):
    with pytest.raises(
        DataError, match=r"past the vocabulary, expected below 97.*model\.resize_vocabulary: true"
    ):
        train(Config.of(larger_tokenizer(tmp_path, {})))


def run_of(world, settings):
    return train(Config.of(settings)).success


def test_two_ranks_learn_them_as_one_does(tmp_path):
    settings = larger_tokenizer(tmp_path, {"resize_vocabulary": True, "save_dtype": "float32"})
    assert ranks.run_ranks(run_of, settings) == [True, True]
    settings["run"]["folder"] = str(tmp_path / "one")
    train(Config.of(settings))
    one, two = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32) for name in ("one", "run")
    )
    assert one.config.vocab_size == two.config.vocab_size == VOCABULARY + 2
    for name, value in one.state_dict().items():
        torch.testing.assert_close(two.state_dict()[name], value, rtol=0, atol=1e-5)
