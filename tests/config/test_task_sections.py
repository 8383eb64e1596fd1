"""`evaluate.tasks` as people write it: a source, a list, a mapping; each slip named with what to write."""

import json

import pytest
import yaml

from repsft_fast.config import Config, environment_layer, text_layer
from repsft_fast.config.task_sections import EvalTask, name_of
from repsft_fast.errors import ConfigError

BASE = {
    "run.folder": "x",
    "data.train": "a.jsonl",
    "budget.epochs": 1,
    "model.config": {"model_type": "llama"},
}


def tasks(value, **more):
    return Config.of({**BASE, "evaluate.tasks": value, **more}).evaluate.tasks


@pytest.mark.parametrize(
    ("written", "found"),
    [
        ("data/aime24.jsonl", {"aime24": {"source": "data/aime24.jsonl"}}),
        (["a/one.jsonl", "owner/two"], {"one": {"source": "a/one.jsonl"}, "two": {"source": "owner/two"}}),
        ({"x": "a.csv"}, {"x": {"source": "a.csv"}}),
        ({"x": {"source": "a", "n": "4", "max_tokens": "1e3"}}, {"x": {"source": "a", "n": 4, "max_tokens": 1000}}),
        ("reasoning-gym:gsm?size=3&seed=9", {"gsm": {"source": "reasoning-gym:gsm?size=3&seed=9"}}),
        ({7: "a"}, {"7": {"source": "a"}}),
    ],
)  # fmt: skip
def test_what_it_may_be_written_as(written, found):
    assert tasks(written) == {name: EvalTask(**values) for name, values in found.items()}


def test_it_reads_back_equal_from_what_a_run_writes():
    written = {"x": {"source": "a", "n": 4, "prompt": "{question}?"}, "y": "b.jsonl"}
    config = Config.of({**BASE, "evaluate.tasks": written})
    assert Config.of(config.to_dict()) == config
    assert Config.of(yaml.safe_load(config.to_yaml())) == config


def test_flags_and_the_environment_may_name_several():
    flags = text_layer("flags", {"evaluate.tasks": ["a.jsonl", "{x: b.jsonl}"]}, {})
    plain = text_layer("file", {key: json.dumps(value) for key, value in BASE.items()}, {})
    assert list(Config.from_layers([plain, flags]).evaluate.tasks) == ["a", "x"]
    environment = environment_layer({"REPSFT_EVALUATE__TASKS": "{y: c.jsonl}"})
    assert list(Config.from_layers([plain, environment]).evaluate.tasks) == ["y"]


@pytest.mark.parametrize(
    ("written", "words"),
    [
        (["a/b.jsonl", "c/b.jsonl"], "two sources that would both be called b; name them"),
        ({"x y": "a"}, "names a task 'x y', and files are called by it, .*say x_y"),
        ({"../x": "a"}, "names a task '../x'"),
        ({"..": "a"}, "names a task '..'"),
        ({"": "a"}, "names a task ''"),
        ({"x": {"source": "a", "tempratur": 2}}, "of x has tempratur, which is not known.*did you mean temperature"),
        ({"x": {"n": 2}}, "of x has no source"),
        ({"x": 3}, "of x is 3, expected one source"),
        ({"x": None}, "of x is None, expected one source"),
        ({"x": ["a", "b"]}, "of x is .*expected one source"),
        (3, "is 3, expected sources"),
        ([3], "holds 3 in a list"),
        ({}, "names no task"),
        ([], "names no task"),
        ("", r"evaluate.tasks \[task.source\]: cannot be used"),
        ({"x": {"source": "a", "n": 0}}, r"evaluate.tasks \[x.n\]: cannot be used.*got 0"),
        ({"x": {"source": "a", "top_p": 0}}, r"evaluate.tasks \[x.top_p\]"),
        ({"x": {"source": "a", "top_p": 1.5}}, r"evaluate.tasks \[x.top_p\]"),
        ({"x": {"source": "a", "temperature": -1}}, r"evaluate.tasks \[x.temperature\]"),
        ({"x": {"source": "a", "layout": "aim"}}, r"evaluate.tasks \[x.layout\].*did you mean aime"),
        ({"x": {"source": "a", "n": 4, "temperature": 0}}, "asks for 4 replies at temperature 0, which are one reply"),
        ({"x": {"source": "a", "extractor": "boxd"}}, r"evaluate.tasks \[x.extractor\].*did you mean boxed"),
        ({"x": {"source": "a", "extractor": "os:system"}}, "is of os, a module of Python's own library"),
        ({"x": {"source": "a", "extractor": "mine:answer"}}, "names code, which is not run unasked.*trust_remote_code"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused_with_the_way_out(written, words):
    with pytest.raises(ConfigError, match=words):
        tasks(written)


def test_own_code_may_be_named_where_code_may_run():
    found = tasks({"x": {"source": "a", "extractor": "mine:answer"}}, **{"model.trust_remote_code": True})
    assert found["x"].extractor == "mine:answer"


@pytest.mark.parametrize("name", ["engine", "tasks_every_epochs", "batch_replies"])
def test_what_is_about_tasks_says_nothing_without_them(name):
    value = {"engine": "loop", "tasks_every_epochs": 2, "batch_replies": 4}[name]
    said = f"evaluate.{name}: has no effect without evaluate.tasks; drop it"
    assert said in Config.of({**BASE, f"evaluate.{name}": value}).warnings
    assert said not in Config.of({**BASE, f"evaluate.{name}": value, "evaluate.tasks": "a"}).warnings


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("data/aime24.jsonl", "aime24"), ("reasoning-gym:chain_sum?size=20", "chain_sum"), ("openai/gsm8k", "gsm8k"),
        ("a/b.c.jsonl.gz", "b"), ("x y.jsonl", "x_y"), ("ünï.jsonl", "n"), ("...", "task"), ("owner/gpqa:diamond", "gpqa_diamond"),
        ("data/mmlu/", "mmlu"), ("d/aime_2024.jsonl.gz", "aime_2024"),
    ],
)  # fmt: skip
def test_a_source_without_a_name_is_called_by_its_file(source, name):
    assert name_of(source) == name
