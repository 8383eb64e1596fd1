"""--resume of a run that has ended: said, extended, made whole again or refused, and a refusal changes no
byte of it."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from repsft_fast import cli
from repsft_fast.errors import ConfigError, RepsftError
from repsft_fast.report import result as results
from repsft_fast.training import trainer
from tests.helpers import runs

OPEN = {
    "stop__token_accuracy": None,
    "optim__warmup_updates": 1,
    "budget__epochs": None,
    "budget__updates": 12,
}


@pytest.fixture(scope="module")
def ended_run(tmp_path_factory):
    """Settings and folder of a run that its budget ended."""
    folder = tmp_path_factory.mktemp("ended")
    given = runs.settings(folder, **OPEN)
    result = trainer.train(given)
    assert result.code == "budget"
    return folder, given


@pytest.fixture
def run(ended_run, tmp_path):
    """A copy of it, moved to another folder: the same run."""
    folder, given = ended_run
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    return tmp_path / "run", with_changes(given, run__folder=str(tmp_path / "run"))


def contents(folder: Path) -> dict[str, str]:
    """Every file but the lock, whose text says who held it last."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != ".lock")
    return {str(p.relative_to(folder)): hashlib.blake2b(p.read_bytes()).hexdigest() for p in files}


def with_changes(given, **changes):
    given = json.loads(json.dumps(given))
    for name, value in changes.items():
        section, _, key = name.partition("__")
        given.setdefault(section, {})[key] = value
    return given


def test_it_is_said_and_nothing_is_changed(run, capsys):
    folder, given = run
    before = contents(folder)
    result = trainer.train(given, resume=True)
    said = capsys.readouterr().out
    assert "has ended (the budget of 12 updates is spent) after 12 updates" in said
    assert "Nothing is trained" in said
    assert result.success
    assert result.folder == str(folder)
    assert contents(folder) == before


def test_settings_without_effect_are_named(run, capsys):
    folder, given = run
    before = contents(folder)
    assert trainer.train(
        with_changes(given, log__every_updates=7, checkpoint__keep_last=1), resume=True
    ).success
    said = capsys.readouterr().out
    assert "without effect" in said
    assert "log.every_updates: 7 (it had 5)" in said
    assert "checkpoint.keep_last" in said
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"optim__lr": 1e-3}, "optim.lr: 0.001 (it had 0.01)"),
        ({"stop__token_accuracy": 0.9}, "stop.token_accuracy"),
        ({"batch__samples": 8}, "batch.samples"),
        ({"run__seed": 5}, "run.seed"),
        ({"model__lora": {"rank": 2}}, "model.lora"),
        ({"mixture__z": 3.0}, "mixture.z"),
        ({"budget__updates": 9}, "smaller than the one the run has"),
        ({"budget__updates": 30, "optim__lr": 1e-3}, "optim.lr"),
    ],
)
def test_what_it_cannot_go_on_with_is_refused(run, changes, named):
    folder, given = run
    before = contents(folder)
    with pytest.raises(RepsftError) as refused:
        trainer.train(with_changes(given, **changes), resume=True)
    assert refused.value.exit_code == 2
    assert named in str(refused.value)
    assert contents(folder) == before


def test_moved_with_its_data_it_is_the_same_run(run, tmp_path, capsys):
    folder, given = run
    before = contents(folder)
    assert trainer.train(with_changes(given, data__train=str(tmp_path / "train.jsonl")), resume=True).success
    assert "has ended" in capsys.readouterr().out
    assert contents(folder) == before


def test_other_data_is_refused_and_the_same_data_elsewhere_is_not(run, tmp_path, capsys):
    folder, given = run
    before = contents(folder)
    moved = tmp_path / "elsewhere.jsonl"
    shutil.copy(given["data"]["train"], moved)
    assert trainer.train(with_changes(given, data__train=str(moved)), resume=True).success
    assert "has ended" in capsys.readouterr().out
    assert contents(folder) == before
    runs.write_samples(moved, 24, seed=9)
    with pytest.raises(
        RepsftError, match="the training, validation or test data, as tokens is another"
    ) as refused:
        trainer.train(with_changes(given, data__train=str(moved)), resume=True)
    assert refused.value.exit_code == 2
    assert contents(folder) == before


def assert_not_extended(given, words, **larger):
    """A larger budget is refused in these words, and the run's folder stays as it is."""
    before = contents(Path(given["run"]["folder"]))
    with pytest.raises(ConfigError, match=words):
        trainer.train(with_changes(given, **larger), resume=True)
    assert contents(Path(given["run"]["folder"])) == before


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_schedules_that_fall_over_the_budget_are_not_extended(schedule, tmp_path):
    given = runs.settings(tmp_path, **OPEN, schedule__name=schedule)
    trainer.train(given)
    assert_not_extended(given, f"cannot be raised under schedule.name: {schedule}", budget__updates=20)


def test_a_run_that_its_rule_ended_is_not_extended(tmp_path):
    given = runs.settings(tmp_path, stop__token_accuracy=0.3, budget__epochs=60)
    assert trainer.train(given).code == "token_accuracy"
    assert_not_extended(given, "ended by its rule", budget__epochs=90)


def test_nothing_from_before_the_decay(tmp_path):
    given = runs.settings(tmp_path, **OPEN, checkpoint__keep_extendable=False)
    trainer.train(given)
    assert_not_extended(given, "before the decay.*keep_extendable", budget__updates=20)


def damage(path: Path, how: str) -> None:
    if how == "deleted":
        path.unlink()
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    else:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 4
        path.write_bytes(bytes(data))


@pytest.mark.parametrize("how", ["deleted", "cut", "a bit"])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_missing_or_damaged_model_is_written_again(run, name, how, capsys):
    folder, given = run
    before = (folder / name).read_bytes()
    damage(folder / name, how)
    try:
        result = trainer.train(given, resume=True)
    except RepsftError as refused:  # what is not as it was written may be somebody else's
        if how == "deleted" or name not in str(refused) or refused.exit_code != 2:
            raise
        (folder / name).rename(folder.parent / name)
        result = trainer.train(given, resume=True)
    assert result.success
    assert result.updates == 12
    assert (folder / name).read_bytes() == before
    said = capsys.readouterr().out
    assert "it is written again" in said
    assert name in said
    assert results.read(folder).updates == 12


@pytest.mark.parametrize("how", ["deleted", "cut"])
def test_a_missing_or_damaged_result_is_made_again(run, how):
    folder, given = run
    before = {
        n: h
        for n, h in contents(folder).items()
        if n.endswith((".safetensors", "config.json", "gen-00000001"))
    }
    damage(folder / "result.json", how)
    result = trainer.train(given, resume=True)
    assert result.success
    assert result.updates == 12
    assert results.read(folder).code == "budget"
    assert {n: contents(folder)[n] for n in before} == before


def test_without_checkpoints_its_beginning_is_no_place_to_go_on_from(run):
    folder, given = run
    shutil.rmtree(folder / "checkpoints")
    before = contents(folder)
    assert trainer.train(given, resume=True).success
    with pytest.raises(ConfigError, match="holds no checkpoint to go on from"):
        trainer.train(with_changes(given, budget__updates=20), resume=True)
    assert contents(folder) == before


@pytest.mark.parametrize("lost", ["the end's", "all"])
def test_an_ended_run_with_a_whole_model_is_never_trained_again(lost, run, tmp_path, capsys):
    """Whatever became of its checkpoints, and however the same request is written."""
    folder, given = run
    for generation in sorted((folder / "checkpoints").glob("gen-*"))[-1 if lost == "the end's" else 0 :]:
        shutil.rmtree(generation)
    before = contents(folder)
    shutil.copy(given["data"]["train"], tmp_path / "copy.jsonl")
    for changes in (
        {"data__train": str(tmp_path / "copy.jsonl")},
        {"budget__updates": None, "budget__epochs": 2},
    ):
        if lost == "all" and "budget__epochs" in changes:
            continue  # another budget cannot be compared without one
        assert trainer.train(with_changes(given, **changes), resume=True).success
        assert "Nothing is trained" in capsys.readouterr().out
        assert contents(folder) == before


def test_the_command_line_says_it_too(run, capsys, tmp_path):
    _, given = run
    file = tmp_path / "settings.yaml"
    file.write_text(json.dumps(given))
    assert cli.main(["train", "--config", str(file), "--resume"]) == 0
    assert "has ended" in capsys.readouterr().out
    assert cli.main(["train", "--config", str(file), "--resume", "--optim.lr", "0.5"]) == 2
    assert "optim.lr: 0.5 (it had 0.01)" in capsys.readouterr().err
