"""Lengths at which a model computes something else: read from configurations, kept by rows, checked at the start."""

import pytest
import torch

from repsft_fast.errors import DataError, ModelError
from repsft_fast.evaluate.generate import generate
from repsft_fast.models import Lengths, check_no_leak, learned_positions, load_model
from repsft_fast.models.loss import backbone_of
from tests import tiny
from tests.models.architectures import tiny_config


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


@pytest.mark.parametrize(("name", "positions"), [("llama", None), ("gpt2", 512), ("opt", 512), ("biogpt", 512), ("gptj", None)])
def test_learned_positions(name, positions):
    assert learned_positions(backbone_of(load_model(tiny_config(name), device="meta", packed=False))) == positions


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
    from tests import runs

    folder.mkdir(exist_ok=True)
    runs.write_samples(folder / "train.jsonl", 24, longest=longest)
    config = {key: value for key, value in tiny_config(name).to_dict().items() if key != "transformers_version"}
    settings = runs.settings(folder, model__config={**config, **changes}, stop__token_accuracy=None, budget__epochs=1)
    assert train(settings).success
    return [line["text"] for line in runs.metrics(folder, "note")]


def test_samples_longer_than_learned_positions_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"samples are longer than the 12 positions .* got \d+; set data.max_tokens: 12"):
        run(tmp_path, "gpt2", 30, n_positions=12)


def test_longer_than_a_rotary_model_was_made_for_is_said(tmp_path):
    (said,) = [text for text in run(tmp_path, "llama", 30, max_position_embeddings=12) if "made for" in text]
    assert "samples are longer than the 12 positions the model was made for (the longest: " in said
    assert not [text for text in run(tmp_path / "short", "llama", 30) if "made for" in text]


def test_replies_end_where_learned_positions_do():
    model = load_model(tiny_config("gpt2", n_positions=12))
    replies = generate(model, [[5] * 3, [6] * 12], end_ids=[], max_new_tokens=30, batch_size=1)
    assert [len(reply.ids) for reply in replies] == [9, 0]
