"""batch.row_tokens: auto, from the memory that is free, once for a run."""

import json

import pytest
import torch
import yaml

from repsft_fast import dry_run
from repsft_fast.config import Config
from repsft_fast.distributed import World
from repsft_fast.errors import ConfigError
from repsft_fast.training import recovery, row_tokens
from repsft_fast.training.build import build, model_on_meta
from repsft_fast.training.samples import load_data
from repsft_fast.training.trainer import train
from tests.helpers import runs

GB = 10**9


def settings(folder, **changes):
    return runs.settings(folder, **{"batch__samples": 24, "batch__row_tokens": "auto", **changes})


@pytest.fixture
def free(monkeypatch):
    """Say how many bytes a GPU has free."""
    return lambda given: monkeypatch.setattr(row_tokens, "free_bytes", lambda device: given)


def decided(given, longest=None):
    config = Config.of(given)
    world = World(0, 1, 0, torch.device("cpu"))
    data = load_data(config, None, world.device, runs.VOCABULARY)
    if longest is not None:
        data.train.index.lengths[0] = longest
    return row_tokens.decide(config, world, data, lambda: model_on_meta(config, None))


def test_a_number_is_that_number(tmp_path, free):
    free(80 * GB)
    assert decided(settings(tmp_path, batch__row_tokens=64)) == row_tokens.Choice(64)


def test_no_gpu_is_the_default(tmp_path):
    choice = decided(settings(tmp_path))
    assert (choice.tokens, "no GPU" in choice.why) == (4096, True)


def test_no_longer_than_an_update_needs(tmp_path, free):
    free(80 * GB)
    choice = decided(settings(tmp_path))
    lengths = [
        len(json.loads(line)["input_ids"]) - 1 for line in (tmp_path / "train.jsonl").read_text().splitlines()
    ]
    assert choice.tokens == -(-sum(lengths) // 128) * 128
    assert choice.why == "all that a rank has of an update"


def test_what_fits_and_no_more(tmp_path, free):
    """Half the memory beside the state is about half the row; both are multiples of 128."""
    runs.write_samples(tmp_path / "train.jsonl", 4000)
    given = settings(tmp_path, batch__samples=4000)
    found = []
    for memory in (40_000_000, 80_000_000, 10 * GB):
        free(memory)
        found.append(decided(given))
    assert [choice.tokens % 128 for choice in found] == [0, 0, 0]
    assert found[0].tokens < 0.6 * found[1].tokens < found[1].tokens < found[2].tokens
    assert found[2].tokens == row_tokens.LONGEST
    assert "0.0 GB of free memory" in found[0].why


def test_never_shorter_than_the_longest_sample(tmp_path, free):
    free(1_000_000)
    choice = decided(settings(tmp_path), longest=300)
    assert choice.tokens == 384
    assert "the longest sample needs it" in choice.why
    assert "memory may run out" in choice.why


def test_whole_buckets(tmp_path, free):
    free(10 * GB)
    assert decided(settings(tmp_path, batch__bucket_tokens=96), longest=3000).tokens % (128 * 3) == 0


def test_samples_do_not_follow_the_memory(tmp_path):
    """What is too long is the same whatever is free, and stays so when run.yaml names a number."""
    config = Config.of(settings(tmp_path))
    assert config.data.max_tokens == 4097
    assert Config.of(settings(tmp_path, data__max_tokens=100)).data.max_tokens == 100
    assert Config.of(settings(tmp_path, batch__row_tokens=64)).data.max_tokens is None


def test_layers_that_cannot_be_counted_take_the_default(tmp_path, free, monkeypatch):
    free(80 * GB)

    def raises(*_, **__):
        raise NotImplementedError("layers that read numbers")

    monkeypatch.setattr("repsft_fast.training.sizes.saved_per_token", raises)
    choice = decided(settings(tmp_path))
    assert choice.tokens == 4096
    assert "cannot be counted (NotImplementedError layers that read numbers" in choice.why


def test_a_sample_a_row_needs_no_decision(tmp_path, free):
    free(80 * GB)
    choice = decided(settings(tmp_path, batch__pack=False))
    assert choice.tokens == 4096
    assert "row of its own" in choice.why


def test_written_down_said_and_kept(tmp_path, free):
    """run.yaml names the number; a resumption takes it whatever is free then; one that asks for another gets
    it and is told."""
    given = settings(tmp_path, batch__samples=4, budget__updates=3, checkpoint__every_updates=1)
    given["stop"] = {}
    free(80 * GB)
    train(given)
    written = yaml.safe_load((tmp_path / "run" / "run.yaml").read_text())
    began = written["batch"]["row_tokens"]
    assert began == 128
    notes = [line["text"] for line in runs.metrics(tmp_path, "note")]
    assert any("batch.row_tokens: auto is 128" in text for text in notes)

    free(None)  # 4096 by itself
    train(given, {"budget.updates": 6}, resume=True)
    notes = [line["text"] for line in runs.metrics(tmp_path, "note")]
    assert any("batch.row_tokens stays 128 tokens, as the run began" in text for text in notes)

    train(given, {"budget.updates": 9, "batch.row_tokens": 256}, resume=True)
    notes = [line["text"] for line in runs.metrics(tmp_path, "note")]
    assert any("batch.row_tokens is 256 tokens as asked, and was 128" in text for text in notes)


def test_taken_rows_are_packed_evaluated_and_halved(tmp_path, free):
    free(80 * GB)
    runs.write_samples(tmp_path / "val.jsonl", 8, seed=1)
    parts = build(Config.of(settings(tmp_path, data__validation=str(tmp_path / "val.jsonl"))))
    assert parts.row_tokens == parts.plan.row_tokens == recovery.row_tokens(parts) > 200
    row_tokens.use(parts, 64)
    assert parts.row_tokens == parts.plan.row_tokens == recovery.row_tokens(parts) == 64
    assert max(row.padded_tokens for row in parts.validation._rows) <= 64
    assert recovery.smaller_rows(parts) == 32
    with pytest.raises(ConfigError, match="a sample is longer"):
        row_tokens.use(parts, 3)


def test_a_dry_run_says_it(tmp_path, capsys):
    dry_run(settings(tmp_path))
    printed = capsys.readouterr().out
    assert "batch.row_tokens: auto is 4,096: there is no GPU" in printed
    assert "rows of at most" not in printed or "of at most 4096 tokens" in printed
