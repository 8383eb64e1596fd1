"""The table of what is decided once: a value of the run before wins over what this process would decide, a setting
that names one wins over both, and what cannot be had is refused before anything is changed."""

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from repsft_fast.config import Config
from repsft_fast.distributed import alone
from repsft_fast.errors import ConfigError, describe
from repsft_fast.rundir import identity
from repsft_fast.rundir.folder import is_open, settings_before, write_settings
from repsft_fast.training import chunks, decided, trainer
from repsft_fast.training.trainer import train
from tests.helpers import ranks, runs


class Lot:
    """An item as a module is one, that answers batch.bucket_tokens and is drawn anew by every process."""

    NAME, SETTING = "lot", "batch.bucket_tokens"
    drawn = 1
    had: tuple[int, ...] = (1, 2, 3)
    old = None

    def __init__(self):
        self.in_use = {}

    def now(self, parts):
        asked = parts.config.batch.bucket_tokens
        return self.in_use.get(id(parts), self.drawn if asked == "auto" else asked)

    def use(self, parts, value):
        if value not in self.had:
            raise ConfigError(describe("lot", f"{value} cannot be had here", todo="draw again"))
        self.in_use[id(parts)] = value

    def words(self, value):
        return f"No. {value}"

    def before(self, parts):
        return self.old

    def written(self, value):
        return None if value == 3 else value


@pytest.fixture
def lot(monkeypatch):
    item = Lot()
    monkeypatch.setattr(decided, "ITEMS", (chunks, item))
    monkeypatch.setattr("repsft_fast.report.pictures.draw", lambda folder, **more: None)
    return item


class Parts:
    def __init__(self, tmp_path, world=None, **changes):
        self.config = Config.of(runs.settings(tmp_path, **changes))
        self.world = world if world is not None else alone("cpu")
        settings = type("S", (), {"chunk_bytes": None})()
        self.model = type("M", (), {"loss_settings": settings, "compute_dtype": torch.float32})()


def test_every_item_is_whole():
    assert len({item.NAME for item in decided.ITEMS}) == len(decided.ITEMS)
    for item in decided.ITEMS:
        assert all(callable(getattr(item, name)) for name in ("now", "use", "words", "before", "written"))


def test_every_setting_of_an_item_is_one(tmp_path):
    config = Config.of(runs.settings(tmp_path))
    for name in decided.settings_decided():
        is_open(config, name)


def test_the_runs_folder_knows_the_same_settings():
    """They are neither another run's nor told twice, and an ended run's may be left open again."""
    assert set(identity.DECIDED_ONCE) == set(decided.settings_decided())


def test_what_a_checkpoint_keeps(lot, tmp_path):
    kept = decided.record(Parts(tmp_path))
    assert kept["chunk_bytes"] is None
    assert kept["choices"]["lot"] == 1
    assert "chunk_bytes" not in kept["choices"]
    assert json.loads(json.dumps(kept)) == kept


def test_what_was_used_wins_over_what_is_drawn(lot, tmp_path):
    parts = Parts(tmp_path)
    (said,) = decided.resume(parts, {**decided.record(parts), "choices": {"lot": 2}})
    assert said == "batch.bucket_tokens stays No. 2, as the run began; begun now it would be No. 1"
    assert (lot.now(parts), decided.record(parts)["choices"]["lot"]) == (2, 2)


def test_the_same_is_no_news(lot, tmp_path):
    parts = Parts(tmp_path)
    assert decided.resume(parts, decided.record(parts)) == []


def test_one_that_is_asked_for_wins_and_is_said(lot, tmp_path):
    parts = Parts(tmp_path, batch__bucket_tokens=4)
    (said,) = decided.resume(parts, {"chunk_bytes": None, "choices": {"lot": 2}})
    assert said.startswith("batch.bucket_tokens is No. 4 as asked, and was No. 2 before")
    assert said.endswith("the run will not equal one that was not interrupted bit for bit")
    assert lot.now(parts) == 4


@pytest.mark.parametrize(("old", "used", "said"), [(None, 1, 1), (1, 1, 0), (2, 2, 1)])
def test_a_version_that_did_not_keep_it(old, used, said, lot, tmp_path):
    parts, lot.old = Parts(tmp_path), old
    notes = decided.resume(parts, {"chunk_bytes": None})
    assert (lot.now(parts), len(notes)) == (used, said)
    if old is None:
        assert notes[0].endswith("which names no batch.bucket_tokens: No. 1 from here on")


def test_what_cannot_be_had_is_refused(lot, tmp_path):
    with pytest.raises(ConfigError, match="7 cannot be had here"):
        decided.resume(Parts(tmp_path), {"chunk_bytes": None, "choices": {"lot": 7}})


def test_what_is_not_decided_yet_is_not_compared_with(lot, tmp_path, monkeypatch):
    """A trial that comes later would have to be made to say what it would come to."""
    parts = Parts(tmp_path)
    monkeypatch.setattr(lot, "words", lambda value: "" if value == 1 else f"No. {value}", raising=False)
    assert decided.resume(parts, {"chunk_bytes": None, "choices": {"lot": 2}}) == []
    assert lot.now(parts) == 2


@pytest.mark.parametrize(
    ("dtype", "masters", "size", "words"),
    [
        (torch.bfloat16, True, 1, "weights of a row's tokens and the gradient of the head"),
        (torch.bfloat16, False, 1, None),  # held in bf16: no FSDP2 was asked then either
        (torch.bfloat16, False, 2, "weights of a row's tokens to bfloat16"),
        (torch.float32, False, 2, None),
        (torch.float32, True, 1, None),  # fp16 weights
    ],
)
def test_what_older_versions_rounded_is_said(dtype, masters, size, words, lot, tmp_path, monkeypatch):
    parts = Parts(tmp_path)
    parts.model.compute_dtype, parts.model.masters = dtype, object() if masters else None
    parts.world = replace(parts.world, size=size)
    monkeypatch.setattr(decided, "raise_together", lambda world: nullcontext())
    lot.old = 1
    said = decided.resume(parts, {"chunk_bytes": None})
    assert len(said) == (words is not None)
    assert words is None or words in said[0]
    assert decided.resume(parts, decided.record(parts)) == [], "of this version's own nothing is said"


def test_a_name_that_nobody_knows_is_left_alone(lot, tmp_path):
    parts = Parts(tmp_path)
    assert decided.resume(parts, {"chunk_bytes": None, "choices": {"lot": 1, "of a later version": 5}}) == []


def test_begun_anew_what_is_not_written_is_drawn(lot, tmp_path):
    parts = Parts(tmp_path)
    assert decided.begin_anew(parts, {}) == []
    assert len(decided.begin_anew(parts, {"batch.bucket_tokens": 2})) == 1
    assert lot.now(parts) == 2


def test_run_yaml_has_values_where_settings_can_say_them(lot, tmp_path):
    parts = Parts(tmp_path)
    (tmp_path / "run").mkdir()
    assert decided.as_settings(parts)["batch.bucket_tokens"] == 1
    write_settings(parts.config, {"batch.bucket_tokens": 2, "loss.chunk_bytes": 4096})
    there = yaml.safe_load((tmp_path / "run" / "run.yaml").read_text())
    assert (there["batch"]["bucket_tokens"], there["loss"]["chunk_bytes"]) == (2, 4096)
    assert settings_before(parts.config, ["batch.bucket_tokens", "model.attention", "loss.chunk_bytes"]) == {
        "batch.bucket_tokens": 2,
        "loss.chunk_bytes": 4096,
    }
    lot.drawn = 3
    assert "batch.bucket_tokens" not in decided.as_settings(parts), "left open"
    asked = Parts(tmp_path, batch__bucket_tokens=64)
    write_settings(asked.config, {"batch.bucket_tokens": 2})
    assert yaml.safe_load((tmp_path / "run" / "run.yaml").read_text())["batch"]["bucket_tokens"] == 64


FEW = {"checkpoint__every_updates": 2, "stop__token_accuracy": None, "budget__epochs": 2}


class TestWholeRuns:
    def killed(self, tmp_path, after, **more):
        def on_update(work):
            if work.updates == after:
                raise RuntimeError("killed")

        with pytest.raises(RuntimeError, match="killed"):
            train(runs.settings(tmp_path, **FEW), on_update=on_update, **more)

    def written(self, tmp_path):
        return yaml.safe_load((tmp_path / "run" / "run.yaml").read_text())["batch"]["bucket_tokens"]

    def test_kept_in_run_yaml_and_taken_from_the_checkpoint(self, lot, tmp_path):
        self.killed(tmp_path, 3)
        assert self.written(tmp_path) == 1
        lot.drawn = 2
        self.killed(tmp_path, 5, resume=True)
        assert self.written(tmp_path) == 1
        notes = [line["text"] for line in runs.metrics(tmp_path, "note") if "bucket_tokens" in line["text"]]
        assert notes == [
            "--resume: batch.bucket_tokens stays No. 1, as the run began; begun now it would be No. 2"
        ]

    def test_a_refusal_changes_nothing_in_the_folder(self, lot, tmp_path):
        self.killed(tmp_path, 3)
        before = {
            p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file() and p.name != ".lock"
        }
        lot.drawn, lot.had = 2, ()
        with pytest.raises(ConfigError, match="draw again"):
            train(runs.settings(tmp_path, **FEW), resume=True)
        after = {
            p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file() and p.name != ".lock"
        }
        assert after == before
        lot.had = (1, 2)
        assert train(runs.settings(tmp_path, **FEW), resume=True).success

    def test_the_same_of_a_run_that_was_killed_before_its_first_checkpoint(self, lot, tmp_path):
        self.killed(tmp_path, 1)
        lot.drawn, lot.had = 2, ()
        with pytest.raises(ConfigError, match="draw again"):
            train(runs.settings(tmp_path, **FEW), resume=True)
        assert self.written(tmp_path) == 1
        lot.had = (1,)
        self.killed(tmp_path, 1, resume=True)
        assert self.written(tmp_path) == 1

    def test_the_value_in_use_is_the_one_that_is_written_down(self, lot, tmp_path, monkeypatch):
        used = []
        loop = trainer.loop
        monkeypatch.setattr(trainer, "loop", lambda run: (used.append(lot.now(run.parts)), loop(run)))
        self.killed(tmp_path, 3)
        lot.drawn = 2
        train(runs.settings(tmp_path, **FEW), resume=True)
        assert used == [1, 1]


def test_one_rank_that_cannot_have_it_refuses_for_all(tmp_path):
    told = ranks.run_ranks(_refused, str(tmp_path))
    assert all("1 cannot be had here" in text for text in told)
    assert "rank 1" in told[0]


def _refused(world, folder):
    item = Lot()
    item.drawn, item.had = 2, (1,) if world.is_main else ()
    decided.ITEMS = (item,)
    parts = Parts(Path(folder, str(world.rank)), world)
    try:
        decided.resume(parts, {"choices": {"lot": 1}})
    except ConfigError as error:
        return str(error)
    return "not refused"
