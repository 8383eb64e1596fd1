"""Every combination of settings that cannot be used is refused by the setting's name, in its own words."""

import pytest

from repsft_fast.config import Config
from repsft_fast.errors import ConfigError

LEAST = {"run.folder": "r", "model.path": "m", "data.train": {"a": "x", "b": "y"}, "budget.epochs": 3}
MSFT = {"mixture.policy": "msft", "data.validation_fraction": 0.5}
NO_BASE = {"model.path": None}
RANDOM = NO_BASE | {"model.config": {"model_type": "llama"}}

REFUSED = [
    (NO_BASE, "model: has neither path nor config"),
    ({"model.config": {"model_type": "llama"}}, "model: has both path and config"),
    (RANDOM | {"model.init": "pretrained"}, "model.init: a config has no pretrained weights"),
    (RANDOM | {"model.gguf_file": "f"}, "model.gguf_file: needs the folder it lies in"),
    (
        {"model.resize_vocabulary": True, "model.lora": {}},
        "model.resize_vocabulary: adapters leave the embedding frozen",
    ),
    (
        {"model.lora.from": "f", "model.init": "random"},
        "model.lora.from: adapters mean nothing beside random weights",
    ),
    (
        {"model.layer_kernels": "liger", "model.compile": True},
        "model.layer_kernels: liger's kernels inside compiled layers",
    ),
    (RANDOM | {"data.format": "messages"}, "tokenizer.path: a model made from a config brings no tokenizer"),
    ({"data.train": []}, "data.train: names no source"),
    ({"data.train": ["a", "a"]}, "data.train: names a source twice"),
    (
        {"data.test": "t", "data.test_fraction": 0.1},
        "data.test_fraction: test rows are given by data.test too",
    ),
    (
        {"data.validation_fraction": 0.5, "data.test_fraction": 0.5},
        "data.validation_fraction: leaves no training samples",
    ),
    ({"data.task_column": "t"}, "data.task_column: data.train already names the tasks"),
    (
        {"data.train": "x", "data.task_column": "t", "data.weight_column": "t"},
        "data.weight_column: names data.task_column too",
    ),
    ({"batch.samples": None}, "batch: has neither samples nor tokens"),
    ({"batch.samples": 2, "batch.tokens": 2}, "batch.tokens: batch.samples is set too"),
    ({"batch.bucket_tokens": 100}, "batch.row_tokens: is not a multiple of batch.bucket_tokens"),
    (
        {"batch.row_tokens": 1 << 23, "batch.bucket_tokens": 1 << 23},
        "batch.bucket_tokens: even the shortest row",
    ),
    ({"batch.row_lengths": [512, 256]}, "batch.row_lengths: are not ascending"),
    ({"batch.row_lengths": []}, "batch.row_lengths: are not ascending"),
    ({"batch.row_lengths": [512, 4097]}, "batch.row_lengths: has a row longer than batch.row_tokens"),
    (
        {"batch.row_lengths": [4096], "batch.bucket_tokens": 64},
        "batch.row_lengths: says what rows are padded to, and so does batch.bucket_tokens",
    ),
    (
        {"batch.row_lengths": [4096], "batch.pack": False},
        "batch.row_lengths: pads rows, and batch.pack: false gives the model a sample as it is",
    ),
    ({"data.max_tokens": 4098}, "data.max_tokens: a sample this long fits into no row"),
    ({"budget.epochs": None}, "budget: has no limit"),
    (
        {"optim.warmup_fraction": 0.1, "optim.warmup_updates": 1},
        "optim.warmup_updates: optim.warmup_fraction is set too",
    ),
    (
        {"optim.warmup_updates": 5, "budget.updates": 5},
        "optim.warmup_updates: is longer than the run",
    ),
    ({"evaluate.keep": "best"}, "evaluate.keep: the best is judged on validation data and there is none"),
    ({"checkpoint.keep_best": True}, "checkpoint.keep_best: the best is judged on validation data"),
    (
        {"checkpoint.every_updates": 5, "checkpoint.every_minutes": 5},
        "checkpoint.every_minutes: checkpoint.every_updates is set too",
    ),
    ({"log.trackers": ["wandb", "wandb"]}, "log.trackers: names a tracker twice"),
    (
        {"mixture.weights": {"a": 1}, "mixture.temperature": 1},
        "mixture.temperature: mixture.weights is set too",
    ),
    ({"mixture.weights": {"a": 0}}, "mixture.weights: sum to 0"),
    ({"mixture.weights": {"c": 1}}, "mixture.weights.c: is not a task, expected one of a, b"),
    (MSFT | {"data.train": "x"}, "mixture.policy: msft needs to know the tasks"),
    (
        MSFT | RANDOM | {"mixture.metric": "answer"},
        "mixture.metric: answer reads text, and there is no tokenizer",
    ),
    ({"mixture.policy": "msft"}, "mixture.policy: msft scores tasks on validation rows and there are none"),
    (
        MSFT | {"mixture.exclude_on": "saturation", "stop.token_accuracy": None},
        "mixture.exclude_on: saturation is judged by stop.token_accuracy",
    ),
    (
        MSFT | {"mixture.compute_budget": 0.1},
        "mixture.compute_budget: a stage would end before its first evaluation",
    ),
    ({"mixture.extractor": "finel"}, "mixture.extractor: is not known"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "said"), REFUSED, ids=[said.partition(": ")[0] for _, said in REFUSED])
def test_is_refused_alone(changes, said):
    settings = {name: value for name, value in LEAST.items() if name not in changes}
    with pytest.raises(ConfigError) as refused:
        Config.of(settings | changes)
    (problem,) = refused.value.problems
    assert problem.startswith(said)


def test_what_is_refused_is_all_that_is_wrong():
    Config.of(LEAST)
    Config.of(LEAST | MSFT)


def test_the_place_inside_a_value_is_named_where_there_is_one():
    with pytest.raises(ConfigError) as refused:
        Config.of(LEAST | {"mixture.weights": {"a": -1}, "optim.betas": [0.9, 7]})
    told = sorted(problem.partition(": ")[0] for problem in refused.value.problems)
    assert told == ["mixture.weights [a]", "optim.betas [1]"]
