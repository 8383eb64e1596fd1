"""Lengths at which a model computes something else: read from configurations, kept by rows, checked at the
start."""

import pytest
import torch

from repsft_fast.errors import DataError, ModelError
from repsft_fast.evaluate.generate import generate
from repsft_fast.models import Lengths, check_no_leak, learned_positions, load_model
from repsft_fast.models.loss import backbone_of
from tests.helpers import tiny
from tests.helpers.architectures import KINDS, tiny_config


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("llama", Lengths(made_for=512)),
        ("llama, linear RoPE", Lengths(made_for=512)),
        ("llama, YaRN", Lengths(made_for=512)),
        ("llama, dynamic RoPE", Lengths(alone_above=8, made_for=8)),
        ("gemma3_text, dynamic RoPE", Lengths(alone_above=8, windows=(6,), made_for=8)),
        ("phi3, longrope", Lengths(apart=(8,), windows=(6,), made_for=512)),
        ("llama4_text, chunks of 8", Lengths(windows=(8,), made_for=512)),
    ],
)
def test_what_configurations_say(name, found):
    assert Lengths.of(tiny_config(name)) == found


def test_every_length_is_one_the_check_looks_at():
    assert Lengths((8, 40), 30, (6, 8), 64).borders == (6, 8, 30, 40)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("llama", None), ("bloom", None), ("mamba", None), ("qwen3_next", None), ("gpt2", "n_positions"),
        ("opt", "max_position_embeddings"), ("biogpt", "max_position_embeddings"), ("gpt_neo", "max_position_embeddings"),
        ("whisper", "max_target_positions"), ("openai-gpt", "n_positions"), ("git", "max_position_embeddings"),
        ("gptj", "n_positions"), ("codegen", "n_positions"), ("ctrl", "n_positions"), ("mpt", "max_seq_len"),
        ("reformer", "max_position_embeddings"),
    ],
)  # fmt: skip
def test_positions_that_end(name, key):
    """Learned ones, tables of angles and masks: the limit is the last length that transformers' own forward
    takes."""
    limit = None if key is None else 12
    config = tiny_config(name, **({key: 12, "n_ctx": 12} if name == "codegen" else {key: 12} if key else {}))
    model = load_model(config, packed=False)
    assert learned_positions(backbone_of(model)) == limit
    with torch.no_grad():
        model.eval()(input_ids=torch.full((1, 12), 5), use_cache=False)
        if limit is not None:
            with pytest.raises((IndexError, RuntimeError, ValueError)):
                model(input_ids=torch.full((1, 13), 5), use_cache=False)


def of_this_transformers(name):
    if name not in KINDS:
        pytest.skip(f"this transformers has no {name}")


TUNED = {"attn_temperature_tuning": True, "no_rope_layers": [1, 0]}


def test_rows_in_which_attention_is_scaled_by_the_place_in_the_row():
    """Llama 4: right up to `floor_scale`, and past it a document would hang on the length of those before
    it."""
    model = load_model(tiny_config("llama4_text", floor_scale=20, **TUNED))
    check_no_leak(model)
    two = tiny.documents((10, 9))
    model.loss(tiny.row(two, length=32))  # padding is nobody's
    model.loss(tiny.row(tiny.documents((30,))))  # a document alone begins at 0
    with pytest.raises(
        ModelError, match=r"scales attention by the place in the row past 19 .*set batch.row_tokens: 19, or"
    ):
        model.loss(tiny.row(tiny.documents((10, 10))))
    free = load_model(tiny_config("llama4_text", floor_scale=20, **{**TUNED, "no_rope_layers": [1, 1]}))
    free.loss(tiny.row(tiny.documents((10, 10))))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("falcon_h1", {"lm_head_multiplier": 0.3}),
        ("hyperclovax", {"logits_scaling": 0.25}),
        ("granite", {"logits_scaling": 4.0}),
        ("cohere", {"logit_scale": 0.3}),
        ("recurrent_gemma", {"logits_soft_cap": 3.0}),
        ("xlstm", {"output_logit_soft_cap": 3.0}),
        ("inkling_text", {"logits_mup_width_multiplier": 3.0}),
        ("gemma2", {"final_logit_softcapping": 3.0}),
    ],
)
def test_what_stands_between_head_and_logits(name, changes):
    """`check_head`, at loading, compares them with the model's own."""
    of_this_transformers(name)
    load_model(tiny_config(name, **changes), packed=False)


@pytest.mark.parametrize(
    ("name", "changes", "why"),
    [
        ("qwen3_next", {}, "a convolution carries tokens"),
        ("mamba2", {}, "a convolution carries tokens"),
        ("bart", {}, "its code takes no positions"),
        (
            "stablelm",
            {"pad_token_id": 0},
            r"its own code stops at a row without a mask of its own: .*must match",
        ),
        ("gptj", {}, "its layers do not call transformers' attention interface"),
        (
            # whose sparse layers leave their selection out under any attention but their own
            "minimax_m3_vl_text",
            {"layer_types": ["full_attention", "minimax_m3_sparse"], "index_n_heads": 2, "index_head_dim": 8},
            "passes block_indices",
        ),
    ],
)
def test_one_wording_for_what_takes_no_packed_rows(name, changes, why):
    of_this_transformers(name)
    with pytest.raises(
        ModelError, match=rf"^model: \w+ does not take packed rows \(.*{why}.*\); set batch.pack: false"
    ):
        check_no_leak(load_model(tiny_config(name, **changes)))


def test_what_could_not_be_read_again_is_refused():
    with pytest.raises(
        ModelError, match="saved as mllama_text_model, which AutoModelForCausalLM cannot read again"
    ):
        load_model(tiny_config("mllama"))


def losses(model, *lengths):
    """Of the last document, computed after the others in rows of their own."""
    documents = tiny.documents(lengths)
    with torch.no_grad():
        return [model.loss(tiny.row([document]))[1].loss for document in documents][-1]


def test_dynamic_frequencies_do_not_hang_on_earlier_rows():
    torch.manual_seed(0)
    model = load_model(tiny_config("llama, dynamic RoPE"), param_dtype=torch.float64)
    after_longer = losses(model, 5, 20, 8)
    torch.manual_seed(0)
    fresh = load_model(tiny_config("llama, dynamic RoPE"), param_dtype=torch.float64)
    with torch.no_grad():
        expected = fresh.loss(tiny.row([tiny.documents((5, 20, 8))[-1]]))[1].loss
    torch.testing.assert_close(after_longer, expected, rtol=0, atol=0)


def test_documents_on_both_sides_of_a_window_are_checked():
    """An attention that forgets the window is right up to its length: only longer documents show it."""
    chunked = load_model(tiny_config("llama4_text", attention_chunk_size=12))
    check_no_leak(chunked)
    check_no_leak(chunked, longest=12)  # no sample is longer: nothing to refuse
    with pytest.raises(ModelError, match=r"a document of 13 positions differs .* set batch.pack: false"):
        check_no_leak(chunked, longest=13)
    for name in ("olmo3", "phi3, longrope", "llama, dynamic RoPE", "gemma3_text, dynamic RoPE"):
        check_no_leak(load_model(tiny_config(name)), longest=20)


def run(folder, name, longest, **changes):
    from repsft_fast.training.trainer import train
    from tests.helpers import runs

    folder.mkdir(exist_ok=True)
    runs.write_samples(folder / "train.jsonl", 24, longest=longest)
    config = {
        key: value for key, value in tiny_config(name).to_dict().items() if key != "transformers_version"
    }
    settings = runs.settings(
        folder, model__config={**config, **changes}, stop__token_accuracy=None, budget__epochs=1
    )
    assert train(settings).success
    return [line["text"] for line in runs.metrics(folder, "note")]


def test_samples_longer_than_learned_positions_are_refused(tmp_path):
    with pytest.raises(
        DataError, match=r"samples are longer than the 12 positions .* got \d+; set data.max_tokens: 12"
    ):
        run(tmp_path, "gpt2", 30, n_positions=12)


def test_longer_than_a_rotary_model_was_made_for_is_said(tmp_path):
    (said,) = [text for text in run(tmp_path, "llama", 30, max_position_embeddings=12) if "made for" in text]
    assert "samples are longer than the 12 positions the model was made for (the longest: " in said
    assert not [text for text in run(tmp_path / "short", "llama", 30) if "made for" in text]


def test_replies_end_where_learned_positions_do():
    model = load_model(tiny_config("gpt2", n_positions=12))
    replies = generate(model, [[5] * 3, [6] * 12], end_ids=[], max_new_tokens=30, batch_size=1)
    assert [len(reply.ids) for reply in replies] == [9, 0]
