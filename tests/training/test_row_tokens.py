"""batch.row_tokens: auto, from the memory that is free, once for a run."""

import json
from pathlib import Path

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
from tests.helpers.ranks import run_ranks

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


@pytest.mark.parametrize(
    "why", ["no GPU", "row of its own", "cannot be counted", "the longest this architecture"]
)
def test_run_yaml_can_be_read_again_whatever_decides(tmp_path, free, monkeypatch, why):
    """A number beside batch.bucket_tokens has to be a multiple of it, so the one that is written down is."""
    free(None if why == "no GPU" else 80 * GB)
    if why == "cannot be counted":
        raises = lambda *_, **__: (_ for _ in ()).throw(NotImplementedError("layers that read numbers"))  # noqa: E731
        monkeypatch.setattr("repsft_fast.training.sizes.saved_per_token", raises)
    if why == "the longest this architecture":
        monkeypatch.setattr(row_tokens, "row_limit", lambda config: 8191)
    given = settings(tmp_path, samples=2000, batch__samples=2000, batch__bucket_tokens=96)
    given["batch"]["pack"] = why != "row of its own"
    choice = decided(given)
    assert why in choice.why
    assert choice.tokens == (8191 // 96 * 96 if why.startswith("the longest") else 4224)
    given["batch"]["row_tokens"] = choice.tokens
    assert Config.of(given).batch.row_tokens == choice.tokens


def test_what_fits_is_not_rounded_up(tmp_path, free):
    runs.write_samples(tmp_path / "train.jsonl", 1000)
    uneven = 0
    for memory in (10_000_000, 12_000_000, 14_000_000):
        free(memory)
        plain = decided(settings(tmp_path, batch__samples=1000))
        assert "free memory" in plain.why
        buckets = decided(settings(tmp_path, batch__samples=1000, batch__bucket_tokens=96))
        assert buckets.tokens == plain.tokens // 384 * 384 > 0
        uneven += plain.tokens % 384 > 0
    assert uneven


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


def test_what_is_written_down_can_be_read_again(tmp_path, free):
    """Shorter rows than samples could have been: run.yaml is still settings, so a run that is killed before its
    first checkpoint begins anew with the rows it had (law 12), and one that has ended is told as such."""
    given = settings(tmp_path, batch__samples=4, budget__updates=3)
    given["stop"] = {}
    free(80 * GB)

    def killed(work):
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        train(given, on_update=killed)
    written = Config.of(tmp_path / "run" / "run.yaml")
    assert (written.batch.row_tokens, written.data.max_tokens) == (128, 129)
    free(None)
    train(given, resume=True)
    notes = [line["text"] for line in runs.metrics(tmp_path, "note")]
    assert any("batch.row_tokens stays 128 tokens, as the run began" in text for text in notes)
    assert Config.of(tmp_path / "run" / "run.yaml").batch.row_tokens == 128


def test_an_ended_run_is_one_however_its_longest_sample_is_named(tmp_path, free, capsys):
    given = settings(tmp_path, batch__samples=4, budget__updates=3)
    given["stop"] = {}
    free(80 * GB)
    train(given)
    capsys.readouterr()
    train(given, resume=True)
    told = capsys.readouterr().out
    assert "Nothing is trained" in told
    assert "without effect" not in told


def test_rows_hold_the_longest_sample_of_every_split(tmp_path, free):
    runs.write_samples(tmp_path / "val.jsonl", 3, seed=1)
    ids = [1 + n % 7 for n in range(250)]
    with (tmp_path / "val.jsonl").open("a") as file:
        file.write(json.dumps({"input_ids": ids, "labels": ids, "task": "a"}) + "\n")
    free(80 * GB)
    given = settings(tmp_path, batch__samples=2, data__validation=str(tmp_path / "val.jsonl"))
    assert decided(given) == row_tokens.Choice(
        256, "the longest sample needs it, and all that a rank has of an update is 128"
    )
    parts = build(Config.of(given))
    with pytest.raises(ConfigError, match="a sample is longer"):
        row_tokens.use(parts, 128)


def test_snapshots_on_the_device_have_room(tmp_path, free, monkeypatch):
    """What is left beside them is what rows may take."""
    runs.write_samples(tmp_path / "train.jsonl", 4000)
    given = settings(tmp_path, batch__samples=4000)
    free(30_000_000)
    plain = decided(given)
    free(40_000_000)
    more = decided(given)
    asked = {}

    def taken(config, model, **of):
        asked.update(of)
        return 10_000_000

    monkeypatch.setattr(row_tokens, "device_snapshot_bytes", taken)
    beside = decided(given)
    assert asked == {"tasks": 1, "shards": 1, "room": 40_000_000}
    assert beside.tokens == plain.tokens < more.tokens
    assert "0.0 GB of free memory hold beside 0.0 GB of snapshots" in beside.why
    assert "snapshots" not in plain.why


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


def test_what_is_free_is_the_pools_too_and_not_what_is_held(monkeypatch):
    """Of the driver's 5 GB and a pool of 7, in which 3 are taken, 9 are free."""
    answers = {"is_available": True, "mem_get_info": (5 * GB, 80 * GB)}
    answers |= {"memory_reserved": 7 * GB, "memory_allocated": 3 * GB}
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    assert row_tokens.free_bytes(torch.device("cuda")) == 9 * GB
    assert row_tokens.free_bytes(torch.device("cpu")) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert row_tokens.free_bytes(torch.device("cuda")) is None, "a plan of a GPU that is not here"


def of_a_rank(world, folder, rooms):
    """For the free bytes of each rank, what it decides; and the tokens of all samples and of the longest."""
    config = Config.of(settings(Path(folder, str(world.rank)), samples=400, batch__samples=400))
    data = load_data(config, None, world.device, runs.VOCABULARY)
    model = model_on_meta(config, None)
    sizes = row_tokens.sizes_of(config, model)
    row_tokens.sizes_of = lambda *_: sizes  # counted once
    found = []
    for room in rooms:
        row_tokens.free_bytes = lambda device, room=room: room[world.rank]
        choice = row_tokens.decide(config, world, data, lambda: model)
        found.append((choice.tokens, choice.why))
    lengths = data.train.index.lengths
    return found, int(lengths.sum()), int(lengths.max())


def test_ranks_decide_alike_by_the_one_with_least(tmp_path):
    """A rank has half of an update at most, and a sample that does not split evenly."""
    rooms = [(10 * GB, 10 * GB), (10 * GB, 3_000_000), (3_000_000, 10 * GB), (10 * GB, None)]
    left, right = run_ranks(of_a_rank, str(tmp_path), rooms)
    (much, little, as_little, none), whole, longest = left
    assert left[0] == right[0]
    assert much == (-(-(whole // 2 + longest) // 128) * 128, "all that a rank has of an update")
    assert much[0] < whole
    assert little == as_little
    assert little[0] < much[0]
    assert "0.0 GB" in little[1]
    assert "no GPU" in none[1]


def test_a_dry_run_says_it(tmp_path, capsys):
    dry_run(settings(tmp_path))
    printed = capsys.readouterr().out
    assert "batch.row_tokens: auto is 4,096: there is no GPU" in printed
    assert "rows of at most" not in printed or "of at most 4096 tokens" in printed
