"""The token that ends a trained turn is one that the model stops at, in the run and in every folder it is
saved to."""

import json
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from repsft_fast.data.ends import Ends, ends_in_words, find_ends, problems, trained_runs
from repsft_fast.data.sample import Sample
from repsft_fast.models import load_model, save_pretrained, stop_at, stops_of, write_state
from tests.helpers import tiny
from tests.helpers.chat_tokenizers import CHATML, byte_level, metaspace

# a base model's tokenizer: its eos is not what ends a turn
BASE = byte_level(CHATML, eos="<|begin|>", bos=None)
END, OLD, OTHER = (BASE.convert_tokens_to_ids(text) for text in ("<|im_end|>", "<|begin|>", "<|eot_id|>"))
A, B, NEW_LINE = (BASE(text, add_special_tokens=False)["input_ids"][0] for text in ("a", "b", "\n"))


def sample(*tokens):
    """Of ids; those in a list are trained."""
    ids, flags = [], []
    for token in tokens:
        many = token if isinstance(token, list) else [token]
        ids += many
        flags += [isinstance(token, list)] * len(many)
    return Sample(ids, flags)


class TestFinding:
    def test_the_last_token_of_every_trained_run(self):
        found = find_ends([sample(A, [B, END], A, [B, END], A, [OTHER]), sample(A, [B, END])], BASE)
        assert (found.tokens, found.endless, found.samples, found.known) == ({END: 3, OTHER: 1}, 0, 2, True)
        assert ends_in_words(found, BASE) == ["trained turns end with <|im_end|> (3×), <|eot_id|> (1×)"]

    def test_ordinary_tokens_are_no_ends_and_samples_without_one_are_counted(self):
        think = BASE.convert_tokens_to_ids("</think>")
        found = find_ends([sample(A, [B]), sample(A, [B, think]), sample(A, [B, END])], BASE)
        assert (found.tokens, found.endless) == ({END: 1}, 2)
        (said,) = problems(found, BASE)
        assert said.startswith(
            "2 of 3 samples end without an end-of-turn token: the model will not learn to stop"
        )

    def test_white_space_behind_an_end_belongs_to_it(self):
        blank = BASE.convert_tokens_to_ids("ĊĊ")
        assert find_ends([sample(A, [B, END, NEW_LINE]), sample(A, [END, blank])], BASE).tokens == {END: 2}
        words = metaspace()
        space, end = words.convert_tokens_to_ids("▁"), words.convert_tokens_to_ids("<|im_end|>")
        assert find_ends([sample(5, [6, end, space])], words).tokens == {end: 1}
        assert find_ends([sample(5, [6, space])], words).endless == 1

    def test_what_ends_only_samples_that_were_cut_is_no_end(self):
        cut, whole = sample(A, A, [B, OTHER]), sample(A, [B, END])
        assert find_ends([cut, whole], BASE, cut_at=3).tokens == {END: 1}
        assert find_ends([sample(A, A, [B, B]), whole], BASE, cut_at=3).endless == 0
        assert find_ends([cut, whole], BASE).tokens == {OTHER: 1, END: 1}
        assert find_ends([sample(A, [B, END], A, [B])], BASE, cut_at=4).tokens == {END: 1}, (
            "its first turn was whole"
        )

    def test_an_end_that_stands_inside_trained_turns_does_not_join(self):
        found = find_ends([sample(A, [B, END, A, B, OTHER]), sample(A, [B, END], A, [B, OTHER])], BASE)
        assert (found.tokens, found.doubtful) == ({OTHER: 2}, {END: 1})
        assert problems(found, BASE)[0].startswith("<|im_end|> ends 1 trained turns and stands inside others")

    def test_the_tokenizers_own_end_is_never_doubtful(self):
        assert find_ends([sample(A, [B, OLD, A, OLD])], BASE).tokens == {OLD: 1}

    def test_an_unknown_word_is_no_end(self):
        words = metaspace()
        assert find_ends([sample(5, [6, words.convert_tokens_to_ids("<unk>")])], words) == Ends(1, {}, {}, 1)

    def test_without_a_tokenizer_it_cannot_be_known(self):
        found = find_ends([sample(A, [B, END])], None)
        assert (found.tokens, found.known) == ({}, False)
        assert "cannot be known without a tokenizer" in ends_in_words(found, None)[0]

    def test_runs(self):
        flags = [False, True, True, False, True]
        assert list(trained_runs(flags)) == [(1, 3), (4, 5)]
        assert list(trained_runs([False])) == list(trained_runs([])) == []

    def test_many_samples_cost_little(self):
        samples = [Sample([A] * 999 + [END], [False] * 500 + [True] * 500) for _ in range(2000)]
        best = min(_seconds(lambda: find_ends(samples, BASE)) for _ in range(3))
        assert best < 0.1, "a fifth of 10,000 samples of 1,000 tokens"


def _seconds(work):
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def model(eos=OLD, **options):
    torch.manual_seed(0)
    config = tiny.config("llama")
    config.vocab_size = len(BASE)
    config.eos_token_id = eos
    return load_model(config, **options)


class TestJoining:
    def test_it_joins_behind_the_old_one_and_is_said(self):
        taught = model()
        said = stop_at(taught, [END], BASE)
        assert stops_of(taught) == [OLD, END]
        assert (
            said
            == "trained turns end with <|im_end|>, which joins the saved model's eos_token_id (was <|begin|>)"
        )
        assert stop_at(taught, [END], BASE) is None, "what is known needs no saying"
        assert stops_of(taught) == [OLD, END]

    def test_a_list_is_kept_in_its_order(self):
        taught = model()
        taught.generation_config.eos_token_id = [OTHER, OLD]
        stop_at(taught, [OLD, END], BASE)
        assert stops_of(taught) == [OTHER, OLD, END]

    def test_nothing_trained_to_an_end_changes_nothing(self):
        taught = model()
        assert stop_at(taught, [], BASE) is None
        assert stop_at(taught, [END], None) is None
        assert stops_of(taught) == [OLD]

    def test_an_ordinary_token_in_its_place_leaves(self):
        taught = model(eos=A)
        said = stop_at(taught, [END], BASE)
        assert stops_of(taught) == [END]
        assert "leaves the saved model's eos_token_id" in said
        assert "(was a)" in said

    def test_a_model_that_names_none(self):
        taught = model(eos=None)
        assert "(was none)" in stop_at(taught, [END], BASE)
        assert taught.generation_config.eos_token_id == END


class TestSaving:
    @pytest.mark.parametrize("way", ["whole", "state"])
    def test_every_folder_of_a_whole_model_says_so(self, way, tmp_path):
        taught = model()
        stop_at(taught, [END], BASE)
        if way == "whole":
            save_pretrained(taught, BASE, tmp_path)
        else:
            write_state(taught, BASE, taught.state_dict(), tmp_path)
        assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == [OLD, END]
        assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == OLD
        assert AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.eos_token_id == [OLD, END]

    @pytest.mark.parametrize("merge", [True, False])
    def test_adapters(self, merge, tmp_path):
        taught = model(lora={"rank": 2})
        said = stop_at(taught, [END], BASE)
        assert "beside the adapter" in said
        save_pretrained(taught, BASE, tmp_path, merge_lora=merge)
        assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == [OLD, END]


def taught_to_stop(tmp_path, *, resume=False, on_update=None, **changes):
    """A run on ChatML rows from a base model whose eos is another token."""
    from repsft_fast.training.trainer import train
    from tests.helpers import runs

    rows = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": "b"}]} for q in "ace"
    ]
    tmp_path.mkdir(parents=True, exist_ok=True)
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    BASE.save_pretrained(tmp_path / "tokenizer")
    settings = runs.settings(
        tmp_path,
        model__config=runs.MODEL | {"vocab_size": len(BASE), "eos_token_id": OLD},
        tokenizer__path=str(tmp_path / "tokenizer"),
        budget__epochs=60,
        stop__token_accuracy=1.0,
        evaluate__generate_samples=3,
        evaluate__generate_tokens=8,
        checkpoint__every_updates=5,
        **changes,
    )
    return train(settings, resume=resume, on_update=on_update)


def test_a_trained_saved_and_loaded_model_stops(tmp_path, capsys):
    result = taught_to_stop(tmp_path)
    said = "trained turns end with <|im_end|>, which joins the saved model's eos_token_id (was <|begin|>)"
    out = capsys.readouterr().out
    assert out.count(said) == 1
    assert "read: " in out
    assert list(result.more["read"].values()) == [
        len(Path(file).read_text().splitlines()) for file in result.more["read"]
    ]
    assert all(answer["finished"] for answer in result.more["answers"])
    assert [answer["answer"] for answer in result.more["answers"]] == ["b"] * 3
    folders = [tmp_path / "run", *sorted((tmp_path / "run" / "checkpoints").glob("gen-*/hf"))]
    assert len(folders) > 1
    for folder in folders:
        assert GenerationConfig.from_pretrained(folder).eos_token_id == [OLD, END], folder
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    prompt = BASE.apply_chat_template(
        [{"role": "user", "content": "a"}], add_generation_prompt=True, return_tensors="pt"
    )
    ids = prompt["input_ids"]
    out = loaded.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, do_sample=False, pad_token_id=0
    )
    assert BASE.decode(out[0, ids.shape[1] :]) == "b<|im_end|>"


def test_a_run_that_was_killed_and_goes_on_says_so_too(tmp_path):
    def killed(work):
        if work.updates == 7:  # of 14, after a checkpoint
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        taught_to_stop(tmp_path, on_update=killed)
    run = tmp_path / "run"
    assert not (run / "generation_config.json").exists()
    first = {path.name for path in (run / "checkpoints").glob("gen-*")}
    assert taught_to_stop(tmp_path, resume=True).success
    later = {path.name for path in (run / "checkpoints").glob("gen-*")} - first
    assert first, "it went on from a checkpoint"
    folders = [run, *(run / "checkpoints" / name / "hf" for name in later)]
    assert len(folders) > 1
    for folder in folders:
        assert GenerationConfig.from_pretrained(folder).eos_token_id == [OLD, END], folder
