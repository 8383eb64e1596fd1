"""Folders that hold what a run did not make: it is never overwritten, written through or deleted, and is
said.

Each folder here is somebody's file, link, folder or pipe under a name that a run writes, that makes a saved
model be read as another, or that is nothing to it. Begun in it or resumed in it: refused before anything is
written, or the run does no harm.
"""

import json
import os
import shutil
import stat
from pathlib import Path

import pytest

from repsft_fast.config import Config
from repsft_fast.errors import ConfigError
from repsft_fast.rundir import made, publish
from repsft_fast.rundir.fingerprints import Fingerprint
from repsft_fast.rundir.folder import RunFolder
from repsft_fast.training.trainer import train
from tests.helpers import runs

SHORT = {"budget__updates": 2, "checkpoint__every_updates": 1, "stop__token_accuracy": None}
LORA = {"model__lora": {"rank": 2, "merge": True}}
# What stands at a name. Each may also make something outside, which must stay as it is.
KINDS = {
    "file": lambda path, outside: path.write_text("somebody's"),
    "empty": lambda path, outside: path.write_bytes(b""),
    "link": lambda path, outside: path.symlink_to(outside / "theirs"),
    "dangling": lambda path, outside: path.symlink_to(outside / "not-there"),
    "folder-link": lambda path, outside: path.symlink_to(outside / "folder"),
    "folder": lambda path, outside: (path.mkdir(), (path / "inside").write_text("somebody's")),
    "pipe": lambda path, outside: os.mkfifo(path),
    "second-name": lambda path, outside: os.link(outside / "theirs", path),
}
WRITTEN = ("run.yaml", "metrics.jsonl", "result.json", "run.png", "checkpoints", made.FILE, ".lock")
SAVED = ("config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json")
# Beside a saved model these would be read with it or in its place.
READ_WITH_IT = (
    "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "pytorch_model.bin", "pytorch_model-1-of-2.bin",
    "pytorch_model.bin.index.json", "model-00002-of-00002.safetensors", "model.fp16.safetensors", "consolidated.safetensors",
    "model-q4.gguf", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json", "tekken.json",
    "processor_config.json", "preprocessor_config.json", "quantize_config.json", "hf_quant_config.json", "__0_0.distcp",
)  # fmt: skip
HARMLESS = (
    "slurm-4711.out", "config.yaml", "notes.md", "README.md", "train.jsonl", "training_args.bin", ".git", "wandb",
    "tensorboard", "timeline.json", "adapter", "eval.json", ".DS_Store", "modeling_own.py", "run.yaml.bak", ".lock.old",
)  # fmt: skip
HOSTILE = (
    [(name, kind) for name in WRITTEN for kind in KINDS if (name, kind) != (".lock", "empty")]
    + [
        (name, kind)
        for name in SAVED
        for kind in ("file", "link", "dangling", "folder", "pipe", "second-name")
    ]
    + [(name, "file") for name in READ_WITH_IT]
    + [(".run.png.part", "link"), (".run.yaml.1.tmp", "link"), (".metrics.jsonl.part", "folder")]
)
assert len(HOSTILE) >= 60


def everything(top):
    """{path: what is there}: bytes of files, targets of links, kinds of all else. The texts of locks are
    nobody's."""
    found = {}
    for root, folders, files in os.walk(top):
        for path in (Path(root, name) for name in (*folders, *files)):
            mode = os.lstat(path).st_mode
            content = (
                os.readlink(path) if stat.S_ISLNK(mode) else path.read_bytes() if stat.S_ISREG(mode) else None
            )
            ours = path.name == ".lock" and stat.S_ISREG(mode) and content.startswith(b'{"pid": ')
            found[str(path.relative_to(top))] = (stat.S_IFMT(mode), None if ours else content)
    return found


def put(path, kind, outside):
    (outside / "folder").mkdir(parents=True, exist_ok=True)
    (outside / "theirs").write_text("theirs")
    (outside / "folder" / "inside").write_text("theirs")
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    KINDS[kind](path, outside)


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """A run that ended, to be copied: with LoRA, merged, so that it has all there can be."""
    top = tmp_path_factory.mktemp("ended")
    train(runs.settings(top, **SHORT, **LORA))
    return top


@pytest.fixture
def resumed(ended, tmp_path):
    """(Its settings, its folder) in a copy."""
    shutil.copytree(ended, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("cache"))
    return Config.of(runs.settings(tmp_path, **SHORT, **LORA)), tmp_path / "run"


def enter(config, **how):
    """The words that refuse the folder, or the names of others' files in it where it is had."""
    try:
        with RunFolder(config, **how) as folder:
            assert len(folder.others) <= 1
            said = "".join(folder.others).removeprefix("left alone, for the run did not make them: ")
            return None, said.split(", ") if said else []
    except ConfigError as error:  # exit code 2
        return str(error), None


@pytest.mark.parametrize(("name", "kind"), HOSTILE, ids=lambda part: part)
def test_begun_in_somebodys_folder(name, kind, tmp_path):
    put(tmp_path / "run" / name, kind, tmp_path / "outside")
    config = Config.of(runs.settings(tmp_path))
    before = everything(tmp_path)
    words, _ = enter(config)
    assert name in words, "it says what is in the way"
    assert everything(tmp_path) == before


@pytest.mark.parametrize(("name", "kind"), HOSTILE, ids=lambda part: part)
def test_somebody_put_it_into_a_run(name, kind, resumed, tmp_path):
    """Where the run's file has its name, one with other bytes is taken for its own, if it is one that
    changes."""
    config, folder = resumed
    put(folder / name, kind, tmp_path / "outside")
    before = everything(tmp_path)
    words, _ = enter(config, resume=True)
    by_name = (name in WRITTEN[:4] and kind in ("file", "empty", "second-name")) or (name, kind) == (
        "checkpoints",
        "folder",
    )
    cut = name in SAVED and kind == "empty"
    assert (words is None) == (by_name or cut), words
    assert words is None or name in words
    assert everything(tmp_path) == before


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("kind", ["file", "link", "pipe"])
@pytest.mark.parametrize("name", HARMLESS)
def test_what_is_nothing_to_the_run_is_left_alone_and_named(name, kind, resume, tmp_path):
    config = Config.of(runs.settings(tmp_path))
    if resume:
        (tmp_path / "run").mkdir()
        with RunFolder(config):
            pass
    put(tmp_path / "run" / name, kind, tmp_path / "outside")
    before = everything(tmp_path)
    assert enter(config, resume=resume) == (None, [name])
    after = everything(tmp_path)
    assert {path: after[path] for path in before} == before
    assert set(after) - set(before) <= {f"run/{own}" for own in ("run.yaml", ".lock", made.FILE)}


def test_names_are_told_without_what_a_terminal_obeys(tmp_path):
    config = Config.of(runs.settings(tmp_path))
    put(tmp_path / "run" / "a\x1b[31m\n", "file", tmp_path / "outside")
    assert "\x1b" not in "".join(enter(config)[1])
    put(tmp_path / "run" / "b\x1b[31m\n.gguf", "file", tmp_path / "outside")
    (tmp_path / "run" / "run.yaml").unlink()
    words = enter(config)[0]
    assert "b" in words
    assert not {"\x1b", "\n"} & set(words)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("adapter", LORA),
        ("tensorboard", {"log__trackers": ["tensorboard"]}),
        ("wandb", {"log__trackers": ["wandb"]}),
        ("timeline.json", {"mixture__policy": "msft", "data__validation_fraction": 0.25, "tasks": 2}),
    ],
)
@pytest.mark.parametrize("kind", list(KINDS))
def test_names_that_only_some_settings_write(name, changes, kind, tmp_path):
    put(tmp_path / "run" / name, kind, tmp_path / "outside")
    config = Config.of(runs.settings(tmp_path, **changes))
    before = everything(tmp_path)
    words, _ = enter(config)
    assert "holds what the run would write and did not make" in words
    assert name in words
    assert everything(tmp_path) == before


class TestWholeRuns:
    """The same through the front door: exit code 2 and nothing touched, or a run and nothing of others
    touched."""

    @pytest.mark.parametrize("name", ["slurm-4711.out", "config.yaml", "adapter"])
    def test_it_trains_beside_other_files_and_resumes(self, name, tmp_path):
        put(tmp_path / "run" / name, "link", tmp_path / "outside")
        settings = runs.settings(tmp_path, **SHORT)
        before = everything(tmp_path)
        assert train(settings).updates == 2
        assert train(settings, resume=True).updates == 2
        after = everything(tmp_path)
        assert {path: after[path] for path in before} == before
        assert made.whole(tmp_path / "run") is None

    @pytest.mark.parametrize(
        ("name", "kind"), [("adapter", "folder-link"), ("model.safetensors", "link"), ("run.png", "link")]
    )
    def test_nothing_is_written_through_a_link(self, name, kind, tmp_path):
        put(tmp_path / "run" / name, kind, tmp_path / "outside")
        settings = runs.settings(tmp_path, **SHORT, **LORA)
        before = everything(tmp_path)
        with pytest.raises(ConfigError, match=name):
            train(settings)
        assert everything(tmp_path) == before

    def test_a_model_put_in_the_place_of_its_own(self, resumed, tmp_path):
        config, folder = resumed
        shutil.copy(folder / "adapter" / "adapter_model.safetensors", folder / "model.safetensors")
        before = everything(tmp_path)
        with pytest.raises(
            ConfigError, match=r"model.safetensors \(not as the run wrote it\).* got .*; move them away"
        ):
            train(config, resume=True)
        assert everything(tmp_path) == before

    @pytest.mark.parametrize(
        "gone", ["model.safetensors", "config.json", "adapter/adapter_model.safetensors"]
    )
    def test_a_model_that_is_missing_is_written_again(self, gone, resumed):
        config, folder = resumed
        was = everything(folder)[gone]
        (folder / gone).unlink()
        assert made.whole(folder) == f"{gone} is missing"
        train(config, resume=True)
        assert made.whole(folder) is None
        assert everything(folder)[gone] == was


class TestWhereTheFolderIs:
    """By what paths lead to: a run's folder that is, or would be written over, what the run reads."""

    @pytest.mark.parametrize("spelled", ["base", "./base", "base/../base", "linked", "other/../base/"])
    @pytest.mark.parametrize(
        "setting", ["model.path", "tokenizer.path", "model.lora.from", "data.cache_folder", "data.train"]
    )
    def test_the_folder_that_is_read(self, setting, spelled, tmp_path, monkeypatch):
        (tmp_path / "base").mkdir()
        (tmp_path / "other").mkdir()
        (tmp_path / "linked").symlink_to("base")
        monkeypatch.chdir(tmp_path)
        settings = runs.settings(tmp_path)
        if setting in ("model.path", "model.lora.from"):
            settings["model"] = {"path": str(tmp_path / "other")}
        before = everything(tmp_path)
        for resume in (False, True):
            words, _ = enter(
                Config.of(settings, {setting: str(tmp_path / "base"), "run.folder": spelled}), resume=resume
            )
            assert f"is the folder of {setting}" in words
        assert everything(tmp_path) == before

    def test_a_new_folder_inside_the_models_is_fine(self, tmp_path):
        (tmp_path / "base").mkdir()
        settings = runs.settings(tmp_path)
        del settings["model"]["config"]
        config = Config.of(
            settings, {"model.path": str(tmp_path / "base"), "run.folder": str(tmp_path / "base" / "run1")}
        )
        assert enter(config) == (None, [])

    def test_what_is_read_may_lie_in_the_runs_folder(self, tmp_path):
        (tmp_path / "run" / "base").mkdir(parents=True)
        shutil.move(runs.write_samples(tmp_path / "x.jsonl", 8), tmp_path / "run" / "x.jsonl")
        settings = runs.settings(tmp_path)
        del settings["model"]["config"]
        where = {
            "model.path": str(tmp_path / "run" / "base"),
            "data.train": str(tmp_path / "run" / "x.jsonl"),
        }
        assert enter(Config.of(settings, where)) == (None, ["base", "x.jsonl"])

    @pytest.mark.parametrize("where", ["adapter", "checkpoints/gen-00000001/hf"])
    def test_but_not_where_the_run_writes(self, where, resumed):
        config, folder = resumed
        config = Config.of(
            {
                **config.to_dict(),
                "model": {"path": str(folder.parent), "lora": {"from": str(folder / where), "merge": True}},
            }
        )
        words, _ = enter(config, resume=True)
        assert (
            f"is where model.lora.from lies, under a name that the run writes itself ({where.split('/')[0]})"
            in words
        )

    def test_rows_are_not_read_from_a_run(self, tmp_path):
        """The run's own metrics.jsonl would be rows of the next one, or of its own resume."""
        (tmp_path / "rows").mkdir()
        settings = runs.settings(tmp_path)
        inside = {"data.train": str(tmp_path / "rows"), "run.folder": str(tmp_path / "rows" / "runs" / "1")}
        assert "all of which is read" in enter(Config.of(settings, inside))[0]
        assert not (tmp_path / "rows" / "runs").exists()
        assert enter(
            Config.of(settings, {**inside, "run.folder": str(tmp_path / "rows" / ".runs" / "1")})
        ) == (None, [])

    @pytest.mark.parametrize(
        ("pattern", "mean"),
        [("runs/*/*.jsonl", True), ("runs/**/*.json*", True), ("**/*", True), ("runs/1/m*.jsonl", True),
         ("runs/1/?.txt", False), ("runs/**/*.csv", False), ("runs/*.jsonl", False), ("rows/**/*.jsonl", False),
         ("runs/1/train-*.jsonl", False)],
    )  # fmt: skip
    def test_nor_by_a_pattern(self, pattern, mean, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        words, _ = enter(Config.of(runs.settings(tmp_path), {"data.train": pattern, "run.folder": "runs/1"}))
        assert (words is not None) == mean
        assert words is None or "is where data.train finds its files" in words

    @pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoints", "adapter"])
    def test_a_cache_that_would_be_made_at_a_name_of_the_runs(self, name, tmp_path):
        config = Config.of(
            runs.settings(tmp_path, **LORA), {"data.cache_folder": str(tmp_path / "run" / name)}
        )
        assert (
            f"is where data.cache_folder lies, under a name that the run writes itself ({name})"
            in enter(config)[0]
        )
        assert not (tmp_path / "run").exists()
        inside = Config.of(config, {"data.cache_folder": str(tmp_path / "run" / "cache")})
        assert enter(inside) == (None, [])

    @pytest.mark.parametrize("folder", ["org/model", "org", "org/model/run"])
    def test_it_does_not_take_the_place_of_a_hub_name(self, folder, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        settings = runs.settings(tmp_path)
        del settings["model"]["config"]
        words, _ = enter(Config.of(settings, {"model.path": "org/model", "run.folder": folder}))
        assert (words is None) == (folder == "org")
        assert words is None or "would take the place of model.path" in words
        assert folder == "org" or not (tmp_path / "org").exists()

    def test_not_in_another_runs_checkpoint(self, resumed):
        config, folder = resumed
        inside = folder / "checkpoints" / "gen-00000001" / "mine"
        assert "lies in another run's checkpoint" in enter(Config.of(config, {"run.folder": str(inside)}))[0]
        assert not inside.exists()

    @pytest.mark.parametrize("odd", ["a\0b", "x" * 300, "file/run", "dangling"])
    def test_what_no_folder_can_be(self, odd, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "file").write_text("somebody's")
        (tmp_path / "dangling").symlink_to("nowhere")
        config = Config.of(runs.settings(tmp_path))
        config = config.model_copy(update={"run": config.run.model_copy(update={"folder": odd})})
        before = everything(tmp_path)
        for resume in (False, True):
            words, _ = enter(config, resume=resume)
            assert words.startswith(("run.folder", "run folder", "--resume"))
        assert everything(tmp_path) == before


class TestNothingToResume:
    """The advice works: what it says to do is not refused in turn."""

    def test_no_folder(self, tmp_path):
        config = Config.of(runs.settings(tmp_path))
        words = enter(config, resume=True)[0]
        assert "there is no such folder" in words
        assert "drop --resume" in words
        assert not (tmp_path / "run").exists()
        assert enter(config) == (None, [])

    def test_an_empty_folder(self, tmp_path):
        (tmp_path / "run").mkdir()
        config = Config.of(runs.settings(tmp_path))
        words = enter(config, resume=True)[0]
        assert "there is no run to continue" in words
        assert "drop --resume" in words
        assert enter(config) == (None, [])

    def test_somebodys_folder(self, tmp_path):
        put(tmp_path / "run" / "config.json", "file", tmp_path / "outside")
        words = enter(Config.of(runs.settings(tmp_path)), resume=True)[0]
        assert "there is no run to continue" in words
        assert "drop --resume" not in words

    def test_a_folder_of_a_run_that_lost_its_settings(self, resumed):
        config, folder = resumed
        (folder / "run.yaml").unlink()
        assert enter(config, resume=True) == (None, [])

    def test_a_folder_of_runs(self, resumed):
        config, folder = resumed
        words = enter(Config.of(config, {"run.folder": str(folder.parent)}), resume=True)[0]
        assert f"give one of the runs in it: {folder}" in words

    def test_a_file(self, tmp_path):
        (tmp_path / "run").write_text("somebody's")
        words = enter(Config.of(runs.settings(tmp_path)), resume=True)[0]
        assert "run.folder is a file" in words
        assert "drop --resume" not in words
        assert enter(Config.of(runs.settings(tmp_path)))[0] is not None

    def test_a_start_that_was_killed_before_it_wrote_its_settings(self, tmp_path):
        config = Config.of(runs.settings(tmp_path))
        with RunFolder(config):
            (tmp_path / "run" / "run.yaml").rename(tmp_path / "run" / ".run.yaml.1.tmp")
        assert "drop --resume" in enter(config, resume=True)[0]
        assert enter(config) == (None, [])


class TestHostileRecords:
    """.made.json is read like anything from outside: what it says leads nowhere else."""

    @pytest.mark.parametrize(
        "record",
        [
            "", "{", "[]", "null", "7", '{"version": 2}', '{"version": 1}', "\x00" * 9, "[" * 100_000,
            '{"version": 1, "names": ["../x"], "models": {}, "moving": []}',
            '{"version": 1, "names": [], "models": {"..": {}}, "moving": []}',
            '{"version": 1, "names": [], "models": {".": {"/etc/x": []}}, "moving": []}',
            '{"version": 1, "names": [], "models": {".": {"a": [[5]]}}, "moving": []}',
            '{"version": 1, "names": [], "models": {".": {"a": [["x", "y"]]}}, "moving": []}',
            '{"version": 1, "names": [], "names": [], "models": {}, "moving": []}',
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("resume", [False, True])
    def test_no_record(self, record, resume, resumed, tmp_path):
        config, folder = resumed
        (folder / made.FILE).write_text(record)
        before = everything(tmp_path)
        words, _ = enter(config, resume=resume)
        assert "is no record of what a run made" in words
        assert everything(tmp_path) == before
        (folder / made.FILE).unlink()  # as it says
        assert enter(config, resume=True)[0] is None

    def test_a_record_that_claims_a_way_through_a_link(self, tmp_path):
        """It says that a file below a link is the run's; with its print it would be deleted by the next
        publish."""
        folder, outside = tmp_path / "run", tmp_path / "outside"
        outside.mkdir(), folder.mkdir()
        (outside / "x").write_text("theirs")
        (folder / "sub").symlink_to(outside)
        print_ = Fingerprint.of(outside / "x")
        made.Made(folder, models={".": {"sub/x": [print_]}}).write()
        staged = publish.stage(folder)
        (staged / "config.json").write_text("{}")
        publish.publish(staged, folder)
        assert (outside / "x").read_text() == "theirs"
        assert json.loads((folder / made.FILE).read_text())["models"]["."].keys() == {"config.json"}
