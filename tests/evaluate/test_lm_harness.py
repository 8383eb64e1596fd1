"""lm-eval on a loaded model: its figures, its errors in our words, and a process that is as it was.

With lm-eval itself where it is installed, and with a stand-in that changes whatever it can everywhere.
"""

import contextlib
import copy
import enum
import functools
import json
import logging
import os
import random
import sys
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from repsft_fast import distributed
from repsft_fast.errors import ConfigError, DataError, TrainingError
from repsft_fast.evaluate import lm_harness
from repsft_fast.evaluate.lm_harness import run_lm_eval
from repsft_fast.evaluate.multiple_choice import ChoiceProbe
from repsft_fast.evaluate.task_files import read_task
from repsft_fast.evaluate.teacher_forced import TeacherForced
from repsft_fast.models import load_model
from tests.helpers import tiny
from tests.helpers.chat_tokenizers import byte_level

RESULTS = {
    "results": {
        "mine": {"alias": "mine", "acc,none": 0.25, "acc_stderr,none": 0.125},
        "sums": {
            "alias": "sums", "exact_match,strict-match": 1, "exact_match_stderr,strict-match": "N/A",
            "exact_match,flexible-extract": float("nan"),
        },
    },
    "higher_is_better": {"mine": {"acc": True}, "sums": {"exact_match": True}},
    "n-samples": {"mine": {"original": 12, "effective": 4}, "sums": {"original": 9, "effective": 9}},
    "versions": {"mine": 1.0, "sums": 3},
    "lm_eval_version": "0.4.13",
}  # fmt: skip
Kind = enum.Enum("Kind", ["TASK", "GROUP", "TAG"])


def model_of():
    torch.manual_seed(0)
    return load_model(tiny.config("llama", vocab_size=300))


def state(model, tokenizer):
    """What a training run must find as it left it."""
    names = (None, "lm_eval")
    return {
        "mode": model.training,
        "weights": [id(parameter) for parameter in model.parameters()],
        "attributes": sorted(model.__dict__),
        "random": (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()),
        "dtype": torch.get_default_dtype(),
        "environment": dict(os.environ),
        "logging": [(log.level, log.propagate, log.handlers[:]) for log in map(logging.getLogger, names)],
        "warnings": list(warnings.filters),
        "padding": tokenizer.pad_token,
    }


class Disorder:
    """lm-eval's place taken by what changes everything; `fails`: what its evaluation raises."""

    def __init__(self, monkeypatch):
        self.asked, self.fails = {}, None
        index = {
            "mine": SimpleNamespace(
                kind=Kind.TASK, tags={"few"}, cfg={"task": "mine", "dataset_path": "json"}
            ),
            "sums": SimpleNamespace(
                kind=Kind.TASK, tags={"few"}, cfg={"task": "sums", "dataset_path": "a/b"}
            ),
            "few": SimpleNamespace(kind=Kind.TAG, tags={"mine", "sums"}, cfg=None),
            "all": SimpleNamespace(
                kind=Kind.GROUP, tags=set(), cfg={"task": ["few", {"dataset_path": "c/d"}]}
            ),
        }
        manager = SimpleNamespace(all_tasks=list(index), task_index=index)
        package, tasks = ModuleType("lm_eval"), ModuleType("lm_eval.tasks")
        models, huggingface = ModuleType("lm_eval.models"), ModuleType("lm_eval.models.huggingface")
        package.simple_evaluate, huggingface.HFLM = self.evaluate, self.wrap
        tasks.TaskManager = lambda include_path: self.asked.update(folder=include_path) or manager
        for module in (package, tasks, models, huggingface):
            monkeypatch.setitem(sys.modules, module.__name__, module)

    def wrap(self, *, pretrained, tokenizer, batch_size):
        pretrained.eval()
        tokenizer.pad_token = "<|eot_id|>"
        self.asked.update(batch_size=batch_size, tokenizer=tokenizer)
        return pretrained

    def evaluate(self, model, **asked):
        self.asked.update(asked)
        random.seed(0), np.random.seed(1), torch.manual_seed(2)
        torch.set_default_dtype(torch.float64)
        os.environ.update(TOKENIZERS_PARALLELISM="false", HOME="elsewhere")
        os.environ.pop("PATH")
        for log in map(logging.getLogger, (None, "lm_eval")):
            log.addHandler(logging.NullHandler())
            log.setLevel(5)
        warnings.simplefilter("error")
        if self.fails is not None:
            raise self.fails
        return RESULTS


@pytest.fixture
def disorder(monkeypatch):
    monkeypatch.setattr(lm_harness, "why_not_reached", lambda name, kind: None)
    yield Disorder(monkeypatch)
    torch.set_default_dtype(torch.float32)


def test_figures_are_json_with_their_versions(disorder, tmp_path):
    folder = str(tmp_path)
    found = run_lm_eval(
        model_of(), byte_level(), ["mine", "few"], limit=4, batch_size=3, task_folder=folder, trusted=True
    )
    assert json.loads(json.dumps(found, allow_nan=False)) == {
        "lm_eval": "0.4.13",
        "tasks": {
            "mine": {
                "version": 1.0,
                "samples": 4,
                "metrics": {"acc": {"value": 0.25, "stderr": 0.125, "higher_is_better": True}},
            },
            "sums": {
                "version": 3,
                "samples": 9,
                "metrics": {
                    "exact_match,strict-match": {"value": 1.0, "stderr": None, "higher_is_better": True},
                    "exact_match,flexible-extract": {"value": None, "stderr": None, "higher_is_better": True},
                },
            },
        },
    }
    asked = {name: disorder.asked[name] for name in ("tasks", "limit", "batch_size", "folder")}
    assert asked == {"tasks": ["mine", "few"], "limit": 4, "batch_size": 3, "folder": folder}


@pytest.mark.parametrize(
    "fails", [None, ValueError("no"), torch.OutOfMemoryError("full"), KeyboardInterrupt()], ids=repr
)
@pytest.mark.parametrize("training", [True, False])
def test_whatever_it_changes_is_put_back_on_every_way_out(disorder, monkeypatch, fails, training):
    model, tokenizer, disorder.fails = model_of().train(training), copy.deepcopy(byte_level()), fails
    # Another state than what is left of the runs before.
    tokenizer.pad_token = "<|begin|>"
    monkeypatch.setenv("HOME", "here")
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    random.seed(7), np.random.seed(8), torch.manual_seed(9)
    for log in map(logging.getLogger, (None, "lm_eval")):
        monkeypatch.setattr(log, "level", 33)
    assert torch.get_default_dtype() == torch.float32
    before = state(model, tokenizer)
    told = {ValueError: TrainingError}.get(type(fails), type(fails))
    with pytest.raises(told) if fails is not None else contextlib.nullcontext():
        run_lm_eval(model, tokenizer, ["mine"])
    after = state(model, tokenizer)
    assert [name for name in before if before[name] != after[name]] == []


@pytest.mark.parametrize(
    ("tasks", "keywords", "words"),
    [
        ([], {}, "names no task"),
        (["mime"], {}, r"is no task of lm-eval, got mime; did you mean mine\?"),
        (["mine", "zzz"], {}, "is no task of lm-eval, got zzz; `lm-eval ls tasks`"),
        (["mine"], {"limit": 0}, "has a limit too small, expected at least 1, got 0"),
        (["mine"], {"task_folder": "no/such"}, "has no such folder of tasks, got no/such"),
        (["mine"], {"task_folder": "."}, "whose code is not run unasked.*model.trust_remote_code"),
    ],
)
def test_what_cannot_be_asked_is_refused(disorder, tasks, keywords, words):
    with pytest.raises(ConfigError, match=f"^--lm-eval: .*{words}"):
        run_lm_eval(model_of(), byte_level(), tasks, **keywords)
    assert "tasks" not in disorder.asked


def test_an_error_of_its_own_is_told_in_one_line(disorder):
    disorder.fails = RuntimeError("first line\nsecond")
    with pytest.raises(TrainingError, match=r"lm-eval failed \(RuntimeError: first line\), got mine$"):
        run_lm_eval(model_of(), byte_level(), ["mine"])


@pytest.mark.parametrize(
    ("task", "asked"), [("mine", []), ("sums", ["a/b"]), ("few", ["a/b"]), ("all", ["c/d"])]
)
def test_data_that_cannot_be_had_is_said_before_the_library_tries_for_minutes(
    disorder, monkeypatch, task, asked
):
    names = []
    monkeypatch.setattr(lm_harness, "why_not_reached", lambda name, kind: names.append(name) or "no answer")
    offline = []
    monkeypatch.setattr(
        lm_harness, "offline", lambda wanted: offline.append(wanted) or contextlib.nullcontext()
    )
    disorder.fails = ConnectionError("lost")
    with pytest.raises((DataError, TrainingError)) as error:
        run_lm_eval(model_of(), byte_level(), [task])
    assert (names, offline) == (asked, [bool(asked)])
    assert isinstance(error.value, DataError if asked else TrainingError)
    if asked:
        assert "cannot have the data of" in str(error.value)
        assert "(no answer; ConnectionError: lost)" in str(error.value)


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"needs lm-eval, which cannot be imported .*repsft-fast\[eval\]"):
        run_lm_eval(model_of(), byte_level(), ["mine"])


def test_on_several_ranks_it_is_refused(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ConfigError, match="runs lm-eval on one rank alone, got 2 ranks"):
        run_lm_eval(model_of(), byte_level(), ["mine"])


MINE = """\
task: mine
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
test_split: test
output_type: OUTPUT
description: "The following are multiple choice questions (with answers) about high school law.\\n\\n"
doc_to_text: "{{question.strip()}}\\nA. {{choices[0]}}\\nB. {{choices[1]}}\\nC. {{choices[2]}}\\nD. {{choices[3]}}\\nAnswer:"
"""
CHOICE = (
    MINE.replace("OUTPUT", "multiple_choice")
    + """\
doc_to_choice: ["A", "B", "C", "D"]
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {version: 7.0}
"""
)
WRITTEN = (
    MINE.replace("task: mine", "task: written").replace("OUTPUT", "generate_until")
    + """\
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["Q"], max_gen_toks: 4, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
)


def test_lm_eval_itself_finds_what_the_probe_finds_and_leaves_the_process_as_it_was(tmp_path):
    pytest.importorskip("lm_eval")
    pytest.importorskip("accelerate")
    rows = [
        {"question": f" What is {n} + {n}?", "choices": [str(n), str(2 * n + 1), "7 b", "x"], "answer": n * 7 % 4, "subject": "high_school_law"}
        for n in range(40)
    ]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in (("mine", CHOICE), ("written", WRITTEN)):
        (tmp_path / f"{name}.yaml").write_text(text.replace("ROWS", str(tmp_path / "rows.jsonl")))
    model = model_of()
    before = state(model, byte_level())
    found = run_lm_eval(model, byte_level(), ["mine", "written"], task_folder=tmp_path, trusted=True)
    after = state(model, byte_level())
    assert [name for name in before if before[name] != after[name]] == []
    assert found["tasks"]["written"]["metrics"]["exact_match"]["value"] == 0.0

    task = read_task("mmlu", tmp_path / "rows.jsonl")[0]
    packing = {"row_tokens": 4096, "bucket_tokens": 1, "world": distributed.alone("cpu")}
    scorer = functools.partial(lambda store: TeacherForced(store, range(len(store.index)), **packing))
    ours = ChoiceProbe(task, byte_level(), device="cpu", scorer=scorer)(model)
    mine = found["tasks"]["mine"]
    assert (mine["samples"], mine["version"]) == (40, 7.0)
    assert mine["metrics"]["acc"]["value"] == ours.accuracy
    assert 0 < ours.accuracy < 1


def test_mmlu_is_asked_as_lm_eval_asks_it(tmp_path):
    package = pytest.importorskip("lm_eval")
    import jinja2
    import yaml

    folder = Path(package.__file__).parent / "tasks" / "mmlu" / "default"
    asked = yaml.safe_load((folder / "_default_template_yaml").read_text())
    subject = yaml.safe_load((folder / "mmlu_high_school_biology.yaml").read_text())
    row = {
        "question": " Which cell? ",
        "choices": ["a", "b c", "d", "{e}"],
        "answer": 2,
        "subject": "high_school_biology",
    }
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    problem = read_task("mmlu", tmp_path / "rows.jsonl")[0].problems[0]
    assert problem.text == subject["description"] + jinja2.Template(asked["doc_to_text"]).render(row)
    assert list(problem.compared) == asked["doc_to_choice"]
