"""A run is told by content: what moved resumes, what was swapped or edited is refused, and what only decides
bits is said."""

import json
import shutil
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from repsft_fast import checkpoint
from repsft_fast.checkpoint import ForeignCheckpoint
from repsft_fast.errors import ConfigError
from repsft_fast.rundir import identity
from repsft_fast.training import trainer
from tests.helpers import runs
from tests.helpers.chat_tokenizers import CHATML, byte_level
from tests.rundir.test_ended import contents, with_changes


class PowerCut(Exception):
    pass


def base(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    values = {key: value for key, value in runs.MODEL.items() if key != "model_type"}
    AutoModelForCausalLM.from_config(LlamaConfig(**values)).save_pretrained(folder)
    return folder


def broken(folder: Path, after: int = 8, **model):
    """Settings of a run with a model from a folder, cut off after that many updates; a checkpoint every
    three."""
    given = runs.settings(folder, budget__epochs=3, stop__token_accuracy=None, checkpoint__every_updates=3)
    given["model"] = {"path": str(base(folder / "base")), **model}
    stop_after(given, after)
    return given


def stop_after(given, updates, **more):
    def cut(work):
        if work.updates == updates:
            raise PowerCut

    with pytest.raises(PowerCut):
        trainer.train(given, on_update=cut, **more)


LORA = {"lora": {"rank": 2, "dropout": 0.0}}


@pytest.fixture(scope="module", params=[{}, LORA], ids=["full", "lora"])
def cut_off(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cut")
    given = broken(folder, **request.param)
    whole = runs.settings(folder / "whole", budget__epochs=3, stop__token_accuracy=None)
    trainer.train({**whole, "model": given["model"]})
    return folder, given, weights(folder / "whole" / "run")


def weights(folder: Path):
    name = (
        "adapter_model.safetensors"
        if (folder / "adapter_model.safetensors").exists()
        else "model.safetensors"
    )
    return load_file(folder / name)


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def run(cut_off, tmp_path):
    folder, given, expected = cut_off
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    return with_changes(given, run__folder=str(tmp_path / "run")), tmp_path, expected


def test_everything_moved_resumes(run, monkeypatch):
    given, folder, expected = run
    monkeypatch.chdir(folder)
    (folder / "base").rename(folder / "renamed")
    (folder / "link").symlink_to(folder / "renamed")
    moved = with_changes(given, run__folder="run", model__path="./link/../link", data__train="train.jsonl")
    assert trainer.train(moved, resume=True).success
    assert equal(weights(folder / "run"), expected)


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def nudged(folder: Path, name: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[3] += 1e-3
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


SWAPS = {
    "another model's weights": (lambda folder: base(folder, seed=1), "the base model's weights"),
    "one weight": (
        lambda folder: nudged(folder, "model.layers.1.mlp.up_proj.weight"),
        "the base model's weights",
    ),
    "a rope's base": (
        lambda folder: edit(
            folder / "config.json", rope_parameters={"rope_theta": 5e5, "rope_type": "default"}
        ),
        "the model's configuration",
    ),
    "an epsilon": (
        lambda folder: edit(folder / "config.json", rms_norm_eps=1e-3),
        "the model's configuration",
    ),
    "an activation": (
        lambda folder: edit(folder / "config.json", hidden_act="relu"),
        "the model's configuration",
    ),
}


@pytest.mark.parametrize("swap", SWAPS)
def test_a_swapped_or_edited_base_is_refused(run, swap):
    given, folder, _ = run
    change, named = SWAPS[swap]
    edited = folder / "edited"
    shutil.copytree(folder / "base", edited)
    change(edited)
    before = contents(folder / "run")
    with pytest.raises(ForeignCheckpoint, match=named) as refused:
        trainer.train(with_changes(given, model__path=str(edited)), resume=True)
    assert refused.value.exit_code == 2
    assert contents(folder / "run") == before


def test_all_differences_are_named_at_once(run):
    given, _, _ = run
    with pytest.raises(ForeignCheckpoint) as refused:
        trainer.train(with_changes(given, optim__lr=0.5, run__seed=9, loss__average="token"), resume=True)
    for named in (
        "optim.lr was 0.01 and is 0.5",
        "run.seed was 1 and is 9",
        "loss.average was sample and is token",
    ):
        assert named in str(refused.value)


def test_what_decides_bits_is_said(run):
    given, folder, _ = run
    changed = with_changes(given, batch__row_tokens=128, numbers__on_nonfinite="skip")
    assert trainer.train(changed, resume=True).success
    decided, said = [note for note in notes(folder / "run") if "rounded otherwise" in note]
    assert "batch.row_tokens is 128 tokens as asked, and was 64 tokens before" in decided
    assert "numbers.on_nonfinite is skip and was stop" in said


def test_other_versions_are_said(run, monkeypatch):
    given, folder, _ = run
    from repsft_fast.rundir import identity

    now = identity.software()
    monkeypatch.setattr(identity, "software", lambda: {**now, "torch": "9.9", "triton": "8.8"})
    assert trainer.train(given, resume=True).success
    (said,) = [note for note in notes(folder / "run") if "rounded otherwise" in note]
    assert f"torch is 9.9 and was {now['torch']}" in said
    assert "triton is 8.8" in said


def test_nothing_is_said_where_nothing_differs(run):
    given, folder, _ = run
    trainer.train(given, resume=True)
    assert not [note for note in notes(folder / "run") if "rounded otherwise" in note]


def test_settings_edited_between_are_refused_or_taken(run):
    """run.yaml itself edited: what --resume is given decides, and says so in run.yaml once it is taken."""
    given, folder, expected = run
    (folder / "run" / "run.yaml").write_text("optim: {lr: 7}\n")
    assert trainer.train(given, resume=True).success
    assert equal(weights(folder / "run"), expected)
    assert "lr: 0.01" in (folder / "run" / "run.yaml").read_text()


def notes(folder: Path) -> list[str]:
    lines = [
        json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines() if line.endswith("}")
    ]
    return [line["text"] for line in lines if line["kind"] == "note"]


def test_what_the_run_takes_back_of_its_history_is_no_trouble(run):
    given, folder, _ = run
    assert trainer.train(given, resume=True).success
    assert json.loads((folder / "run" / "result.json").read_text())["more"]["troubles"] == []


def test_a_refused_resume_starts_no_tracker(run, monkeypatch):
    given, folder, _ = run
    from repsft_fast import trackers

    def made(run_folder, settings):
        (Path(run_folder) / "tensorboard").mkdir()
        raise RuntimeError("no more than that")

    monkeypatch.setattr(trackers, "_missing", lambda name: None)
    monkeypatch.setitem(trackers._MAKERS, "tensorboard", made)
    tracked = with_changes(given, log__trackers=["tensorboard"])
    before = contents(folder / "run")
    with pytest.raises(ForeignCheckpoint):
        trainer.train(with_changes(tracked, optim__lr=0.7), resume=True)
    assert contents(folder / "run") == before
    assert not (folder / "run" / "tensorboard").exists()
    assert trainer.train(tracked, resume=True).success
    assert (folder / "run" / "tensorboard").exists()


def test_a_cut_history_is_said(run):
    given, folder, expected = run
    path = folder / "run" / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:40])
    assert trainer.train(given, resume=True).success
    assert equal(weights(folder / "run"), expected)
    assert any("pictures lack what was cut" in note for note in notes(folder / "run"))


def test_lines_put_before_the_history(run):
    given, folder, expected = run
    path = folder / "run" / "metrics.jsonl"
    path.write_bytes(b'{"kind": "note", "update": 0, "text": "mine"}\n' + path.read_bytes())
    assert trainer.train(given, resume=True).success
    assert equal(weights(folder / "run"), expected)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert any("not as it was at the checkpoint" in line.get("text", "") for line in lines)


@pytest.mark.parametrize("how", ["deleted", "a link"])
def test_without_its_checkpoints_it_does_not_begin_anew(how, run):
    given, folder, expected = run
    (folder / "run" / "checkpoints").rename(folder / "elsewhere")
    if how == "a link":
        (folder / "run" / "checkpoints").symlink_to(folder / "elsewhere")
    before = contents(folder / "run")
    with pytest.raises(ConfigError, match="put the folder"):
        trainer.train(given, resume=True)
    assert contents(folder / "run") == before
    if how == "a link":
        (folder / "run" / "checkpoints").unlink()
    (folder / "elsewhere").rename(folder / "run" / "checkpoints")
    assert trainer.train(given, resume=True).success
    assert equal(weights(folder / "run"), expected)


def test_settings_of_somebodys_own_are_no_run(tmp_path):
    given = runs.settings(tmp_path, budget__epochs=1)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.yaml").write_text(json.dumps(given))
    before = contents(tmp_path / "run")
    for resume, words in ((False, "move them away"), (True, "no run to continue")):
        with pytest.raises(ConfigError, match=words):
            trainer.train(given, resume=resume)
        assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["run.yaml"]
    assert contents(tmp_path / "run") == before


def test_adapters_gone_on_from(tmp_path):
    """The folder moves; its scale is edited; a weight of it is: the first resumes, the others are refused."""
    first = runs.settings(tmp_path / "first", budget__epochs=1, stop__token_accuracy=None)
    first["model"] = {"path": str(base(tmp_path / "base")), **LORA}
    trainer.train(first)
    source = tmp_path / "first" / "run"
    given = runs.settings(
        tmp_path / "second", budget__epochs=3, stop__token_accuracy=None, checkpoint__every_updates=3
    )
    given["model"] = {"path": str(tmp_path / "base"), "lora": {"from": str(source), "rank": 2}}
    stop_after(given, 8)
    before = contents(tmp_path / "second" / "run")

    edited = tmp_path / "edited"
    shutil.copytree(source, edited)
    edit(edited / "adapter_config.json", lora_alpha=64)
    changed = json.loads(json.dumps(given).replace(str(source), str(edited)))
    with pytest.raises((ForeignCheckpoint, Exception), match=r"model.lora.from|lora_alpha"):
        trainer.train(changed, resume=True)
    changed["model"]["lora"]["alpha"] = 64
    with pytest.raises(ForeignCheckpoint, match=r"the adapters of model\.lora\.from"):
        trainer.train(changed, resume=True)
    shutil.copytree(source, tmp_path / "nudged")
    tensors = load_file(tmp_path / "nudged" / "adapter_model.safetensors")
    next(iter(tensors.values())).view(-1)[0] += 1e-3
    save_file(tensors, tmp_path / "nudged" / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ForeignCheckpoint, match=r"the adapters of model\.lora\.from"):
        trainer.train(
            json.loads(json.dumps(given).replace(str(source), str(tmp_path / "nudged"))), resume=True
        )
    assert contents(tmp_path / "second" / "run") == before

    shutil.copytree(source, tmp_path / "moved")
    moved = json.loads(json.dumps(given).replace(str(source), str(tmp_path / "moved")))
    moved["model"]["lora"]["merge"] = True  # it changes no number of the run
    assert trainer.train(moved, resume=True).success
    assert (tmp_path / "second" / "run" / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("changed", ["template", "variables", "tokenizer"])
def test_another_template_or_tokenizer_is_refused_though_the_tokens_are_the_same(changed, tmp_path):
    tokenizer = byte_level()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    rows = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}!"}]}
        for n in range(12)
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = runs.settings(tmp_path, budget__epochs=3, stop__token_accuracy=None, checkpoint__every_updates=2)
    given["data"]["train"] = str(tmp_path / "chats.jsonl")
    given["model"] = {"config": {**runs.MODEL, "vocab_size": len(tokenizer)}}
    given["tokenizer"] = {"path": str(tmp_path / "tokenizer")}
    stop_after(given, 4)
    other = with_changes(given, tokenizer__template_kwargs={"enable_thinking": False})
    if changed == "template":
        other = with_changes(given, tokenizer__chat_template=CHATML + "{# another #}")
    if changed == "tokenizer":
        shutil.copytree(tmp_path / "tokenizer", tmp_path / "other")
        file = tmp_path / "other" / "tokenizer.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"normalizer": {"type": "Lowercase"}}))
        other = with_changes(given, tokenizer__path=str(tmp_path / "other"))
    what = "tokenizer" if changed == "tokenizer" else "chat template"
    with pytest.raises(ForeignCheckpoint, match=f"the {what} is another"):
        trainer.train(other, resume=True)
    (tmp_path / "tokenizer").rename(tmp_path / "renamed")
    assert trainer.train(with_changes(given, tokenizer__path=str(tmp_path / "renamed")), resume=True).success


def test_a_checkpoint_of_an_older_version_is_compared_in_what_both_know(run, monkeypatch):
    """Its identity had the paths and the budget among the settings, and no digests but the data's."""
    given, folder, expected = run
    found = checkpoint.newest(folder / "run" / "checkpoints")
    old = {
        k: v
        for k, v in found.manifest.identity.items()
        if k not in ("model", "weights", "adapters", "template")
    }
    old |= {"model.path": "somewhere", "budget.epochs": 3.0}
    object.__setattr__(found.manifest, "identity", old)
    monkeypatch.setattr(checkpoint, "newest", lambda folder: found)
    assert trainer.train(given, resume=True).success
    assert equal(weights(folder / "run"), expected)
    assert any("an older version wrote the checkpoint" in note for note in notes(folder / "run"))


class TestSettingsThatAnOlderVersionHadNot:
    """What a checkpoint does not say is what its version did."""

    OLDER: ClassVar = {"mixture.policy": None, "mixture.rule": "tested", "mixture.exclude_on": "overfit", "mixture.z": 2.33,
             "mixture.min_progress": 0.01, "weights": "x"}  # fmt: skip
    NOW: ClassVar = {"mixture.policy": None, "mixture.rule": "tested", "mixture.exclude_on": "overfit", "mixture.z": None,
           "mixture.alpha": 0.1, "mixture.min_looks": 8, "mixture.pool": "items", "mixture.keep": None, "weights": "x"}  # fmt: skip

    @pytest.mark.parametrize(
        "run",
        [{}, {"mixture.policy": "sft"}, {"mixture.policy": "msft", "mixture.rule": "paper"}],
        ids=["plain", "sft", "paper"],
    )
    def test_a_rule_that_decides_nothing_is_not_compared(self, run):
        assert identity.check("w", self.OLDER | run, self.NOW | run) is None

    def test_one_that_decides_is(self):
        run = {"mixture.policy": "msft"}
        with pytest.raises(
            ForeignCheckpoint, match=r"mixture\.alpha was null and is 0\.1.*mixture\.z was 2\.33"
        ):
            identity.check("w", self.OLDER | run, self.NOW | run)
        with pytest.raises(ForeignCheckpoint, match=r"mixture\.z was null and is 3\.0"):
            identity.check("w", self.NOW | run, self.NOW | run | {"mixture.z": 3.0})

    def test_rehearsal_that_nobody_named_is_the_rules_own(self):
        run, older = {"mixture.policy": "msft"}, {"mixture.rehearsal": 0.0}
        now = self.NOW | {"mixture.rehearsal": None}
        paper = run | {"mixture.rule": "paper"}
        assert identity.check("w", self.NOW | paper | older, now | paper) is None
        with pytest.raises(ForeignCheckpoint, match=r"mixture\.rehearsal was 0\.0 and is null"):
            identity.check("w", self.NOW | run | older, now | run)
        with pytest.raises(ForeignCheckpoint, match=r"mixture\.rehearsal was 0\.3 and is 0\.0"):
            identity.check("w", self.NOW | paper | {"mixture.rehearsal": 0.3}, now | paper)

    def test_another_mean_is_another_run(self):
        with pytest.raises(ForeignCheckpoint, match=r"mixture\.pool was items and is tasks"):
            identity.check("w", self.OLDER, self.NOW | {"mixture.pool": "tasks"})

    def test_what_saturation_kept(self):
        run = {"mixture.policy": "msft", "mixture.exclude_on": "saturation"}
        with pytest.raises(ForeignCheckpoint, match=r"mixture\.keep was best and is null"):
            identity.check("w", self.OLDER | run, self.NOW | run)
        assert identity.check("w", self.OLDER | run, self.NOW | run | {"mixture.keep": "best"}) is None

    TRIGGERED: ClassVar = {"mixture.policy": None, "schedule.name": "wsd", "stop.token_accuracy": 0.97}

    def test_where_the_decay_began(self):
        """At the accuracy that ended the run."""
        older, now = self.OLDER | self.TRIGGERED, self.NOW | self.TRIGGERED
        with pytest.raises(ForeignCheckpoint, match=r"decay_token_accuracy was 0\.97 and is auto"):
            identity.check("w", older, now | {"stop.decay_token_accuracy": "auto"})
        assert identity.check("w", older, now | {"stop.decay_token_accuracy": 0.97}) is None

    @pytest.mark.parametrize(
        "run", [{"stop.token_accuracy": None}, {"schedule.name": "cosine"}, {"mixture.policy": "sft"}]
    )
    def test_where_no_accuracy_begins_a_decay_it_is_not_compared(self, run):
        older, now = self.OLDER | self.TRIGGERED | run, self.NOW | self.TRIGGERED | run
        assert identity.check("w", older, now | {"stop.decay_token_accuracy": "auto"}) is None
