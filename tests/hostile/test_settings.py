"""Bad settings: every one is told, all at once, by name, with what was expected and what came; nothing else
ever escapes."""

import collections
import time
from enum import Enum
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from repsft_fast.config import Config, reference, setting_names
from repsft_fast.errors import ConfigError
from tests.hostile.byte_doors import GOOD_SETTINGS as LEAST_YAML
from tests.hostile.byte_doors import SettingsText, config_or_error
from tests.hostile.mutated_settings import MUTATIONS, drawn, mutated, said, same

# Machines that run tests are often busy: no verdict by the clock.
CALM = hypothesis_settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
LEAST = {"run.folder": "r", "model.path": "m", "data.train": "a.jsonl", "budget.epochs": 3}
TASKS = {"data.train": {"a": "a.jsonl", "b": "b.jsonl"}, "data.validation_fraction": 0.1}


def problems(overrides=None, source=LEAST, **more):
    with pytest.raises(ConfigError) as caught:
        Config.of(source, overrides, **more)
    assert caught.value.exit_code == 2
    return caught.value.problems


def problems_of_file(tmp_path, content):
    path = tmp_path / "run.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return problems(source=path)


class TestUnknownKeys:
    def test_the_designs_example(self):
        assert problems({"optim.warmup_fracton": 0.1}) == [
            "optim.warmup_fracton is not a setting; did you mean optim.warmup_fraction? (overrides)"
        ]

    @pytest.mark.parametrize("name", [n for n in setting_names() if len(n.rpartition(".")[2]) > 4])
    def test_a_typo_in_any_setting_finds_it(self, name):
        typo = name[:-3] + name[-2:]
        assert problems({typo: 1})[0].startswith(f"{typo} is not a setting; did you mean {name}?")

    @pytest.mark.parametrize(
        ("wrong", "right"),
        [
            ("schedule.warmup_fraction", "optim.warmup_fraction"),
            ("lr", "optim.lr"),
            ("optm", "optim.name"),
            ("train.epochs", "budget.epochs"),
            ("model.lora.rnk", "model.lora.rank"),
        ],
    )
    def test_a_right_word_in_the_wrong_place(self, wrong, right):
        assert f"did you mean {right}?" in problems({wrong: 1})[0]

    def test_a_word_like_nothing_gets_no_suggestion(self):
        assert problems({"zzzzqqqq": 1}) == ["zzzzqqqq is not a setting (overrides)"]

    def test_the_file_and_line_are_named(self, tmp_path):
        assert problems_of_file(tmp_path, LEAST_YAML + "optim:\n  lr: 1\n  warmup_fracton: 3\n") == [
            "optim.warmup_fracton is not a setting; did you mean optim.warmup_fraction? (run.yaml line 7)"
        ]

    def test_in_the_environment(self):
        found = problems(environment={"REPSFT_OPTIM__LRR": "1", "REPSFT_NONSENSE": "1", "OTHER": "1"})
        assert any(
            "REPSFT_OPTIM__LRR" in problem and "did you mean optim.lr?" in problem for problem in found
        )
        assert any("REPSFT_NONSENSE" in problem for problem in found)
        assert len(found) == 2

    def test_a_variable_in_two_spellings(self):
        found = problems(environment={"REPSFT_OPTIM__LR": "1", "repsft_optim__lr": "2"})
        assert found[0].endswith("optim.lr is set twice, got also by environment variable REPSFT_OPTIM__LR")

    @pytest.mark.parametrize("key", [1, None, True, 1.5, ("a", "b")])
    def test_keys_that_are_no_words(self, key):
        assert "is not a setting" in problems(source={**LEAST, key: 1})[0]


class TestAllAtOnce:
    def test_every_kind_of_problem_in_one_report(self, tmp_path):
        path = tmp_path / "run.yaml"
        path.write_text(
            "optim: {warmup_fracton: 1, lr: x}\nbatch: {samples: 0}\nevaluate: 3\n"
            "data: {train: a, validation: b, validation_fraction: 0.1}\n"
        )
        found = "\n".join(
            problems({"loss.average": "sum"}, source=path, environment={"REPSFT_RUN__SEED": "-1"})
        )
        for piece in (
            "optim.warmup_fracton is not a setting",
            "optim.lr: cannot be used, expected a valid number, got x (run.yaml line 1)",
            "batch.samples: cannot be used, expected greater than or equal to 1, got 0 (run.yaml line 2)",
            "evaluate: is a section",
            "run.folder: is missing",
            "loss.average: cannot be used, expected 'sample' or 'token', got sum (overrides)",
            (
                "run.seed: cannot be used, expected greater than or equal to 0, got -1 (environment variable"
                " REPSFT_RUN__SEED)"
            ),
            "data.validation_fraction: validation rows are given",
            "model: has neither path nor config",
            "budget: has no limit",
        ):
            assert piece in found
        assert len(found.splitlines()) == 10

    def test_a_wrong_setting_does_not_cause_second_errors(self):
        assert len(problems({"budget.epochs": "many"})) == 1
        assert len(problems({"batch.tokens": "many"})) == 1
        assert len(problems({"data.train": 3})) == 1
        assert len(problems({"model.path": 7, "model.gguf_file": "x"})) == 1


Word = Enum("Word", {"adamw": "adamw"})
NAN, INF = float("nan"), float("inf")
IMPOSSIBLE = {
    "optim": [3, "adamw", [1]],
    "optim.lr": [0, -1, "nan", NAN, INF, True, None, [1], {"a": 1}, ""],
    "optim.betas": [[0.9], [0.9, 1.0], 0.9, [0.9, -0.1], [0.9, "x"]],
    "optim.max_norm": [0, "none"],
    "batch.samples": [0, 1.5, True, "1.5e0", "1e999", [16]],
    "batch.row_tokens": [1, None],
    "batch.bucket_tokens": [0, "big"],
    "budget.epochs": [0, -1, INF],
    "budget.updates": [0, 2**63],
    "budget.tokens": [-5],
    "stop.token_accuracy": [0, 97, NAN, "97%"],
    "run.seed": [-1, 2**63, "1" * 5000, 0.5, Word.adamw],
    "run.folder": ["", 5, None, True, ["r"]],
    "run.deterministic": ["maybe", 3, None],
    "loss.skip_below": [1, -0.1],
    "loss.average": ["mean", None, True],
    "data.train": [[], {}, [""], None, {"a": 3}, [["a"]], 3, True],
    "data.samples": [0],
    "data.validation_fraction": [1, -0.1],
    "log.trackers": [["mlflow"], "wandb", None],
    "mixture.weights": [{"a": -1}, {"a": NAN}, {"a": None}, [1, 2]],
    "mixture.temperature": [0],
    "snapshot.device_bytes": [
        "many",
        -1,
        True,
        "2026-11-21",
        0.5,
        "1.5",
        "2GiB more",
        "2 potatoes",
        "1e30",
        "9999999999GiB",
        b"3",
    ],
    "data.split": [b"train", "\ud800", Path("train")],
    "schedule.decay_fraction": [2],
    "checkpoint.keep_last": [0],
    "model.config": [[], "llama"],
    "model.lora": ["yes", [], 8, np.array([1, 2]), np.array([])],
    "model.lora.rank": [0],
}


class TestWrongTypesAndValues:
    @pytest.mark.parametrize(
        ("name", "value"), [(name, value) for name, values in IMPOSSIBLE.items() for value in values]
    )
    def test_is_told_by_name(self, name, value):
        found = problems({name: value})
        assert len(found) == 1
        assert found[0].startswith(name)
        assert "(overrides)" in found[0] or "names no source" in found[0]

    def test_what_came_is_shown_short(self):
        assert len(problems({"optim.lr": "x" * 10_000})[0]) < 400


class TestContradictions:
    @pytest.mark.parametrize(
        ("overrides", "named"),
        [
            ({"model.path": None}, "model"),
            ({"model.config": {"model_type": "llama"}}, "model"),
            (
                {"model.path": None, "model.config": {"model_type": "llama"}, "model.init": "pretrained"},
                "model.init",
            ),
            (
                {"model.path": None, "model.config": {"model_type": "llama"}, "data.format": "messages"},
                "tokenizer.path",
            ),
            ({"model.path": None, "model.config": {"a": 1}, "model.gguf_file": "x"}, "model.gguf_file"),
            ({"model.layer_kernels": "liger", "model.compile": True}, "model.layer_kernels"),
            ({"batch.samples": 4, "batch.tokens": 100}, "batch.tokens"),
            ({"batch.samples": None}, "batch"),
            ({"batch.row_tokens": 100, "batch.bucket_tokens": 64}, "batch.row_tokens"),
            ({"batch.row_tokens": 10**9, "batch.bucket_tokens": 10**9}, "batch.bucket_tokens"),
            ({"data.max_tokens": 5000, "batch.row_tokens": 4096}, "data.max_tokens"),
            ({"data.train": ["a", "a"]}, "data.train"),
            ({"data.validation": "v", "data.validation_fraction": 0.1}, "data.validation_fraction"),
            ({"data.test": "v", "data.test_fraction": 0.1}, "data.test_fraction"),
            ({"data.validation_fraction": 0.5, "data.test_fraction": 0.5}, "data.validation_fraction"),
            ({**TASKS, "data.task_column": "t"}, "data.task_column"),
            ({"budget.epochs": None}, "budget"),
            ({"optim.warmup_fraction": 0.1, "optim.warmup_updates": 5}, "optim.warmup_updates"),
            ({"optim.warmup_updates": 10, "budget.updates": 10}, "optim.warmup_updates"),
            ({"evaluate.keep": "best"}, "evaluate.keep"),
            ({"checkpoint.keep_best": True}, "checkpoint.keep_best"),
            ({"checkpoint.every_updates": 5, "checkpoint.every_minutes": 5}, "checkpoint.every_minutes"),
            ({"log.trackers": ["wandb", "wandb"]}, "log.trackers"),
            ({"mixture.policy": "msft", "data.validation": "v"}, "mixture.policy"),
            ({**TASKS, "mixture.policy": "msft", "data.validation_fraction": 0}, "mixture.policy"),
            ({"mixture.policy": "sft", "data.task_column": "t"}, "mixture.policy"),
            (
                {
                    **TASKS,
                    "data.validation_fraction": 0,
                    "mixture.policy": "msft",
                    "mixture.exclude_on": "saturation",
                },
                "mixture.policy",
            ),
            ({**TASKS, "mixture.policy": "msft", "mixture.compute_budget": 0.2}, "mixture.compute_budget"),
            (
                {
                    **TASKS,
                    "mixture.policy": "msft",
                    "mixture.exclude_on": "saturation",
                    "stop.token_accuracy": None,
                },
                "mixture.exclude_on",
            ),
            ({**TASKS, "mixture.weights": {"a": 0, "b": 0}}, "mixture.weights"),
            ({**TASKS, "mixture.weights": {"a": 1, "c": 1}}, "mixture.weights.c"),
            ({**TASKS, "mixture.weights": {"a": 1}, "mixture.temperature": 2}, "mixture.temperature"),
        ],
    )
    def test_is_told_by_name(self, overrides, named):
        found = problems(overrides)
        assert [problem.split(":")[0] for problem in found] == [named]

    @pytest.mark.parametrize(
        "overrides",
        [
            {"data.max_tokens": 4097, "batch.row_tokens": 4096},
            {"model.layer_kernels": "liger"},
            {"model.layer_kernels": "none", "model.compile": True},
            {"batch.row_tokens": 128, "batch.bucket_tokens": 64},
            {"batch.row_tokens": 1 << 22, "batch.bucket_tokens": 1 << 22},
            {**TASKS, "mixture.weights": {"a": 1e308, "b": 1e308}},
            {"optim.warmup_updates": 9, "budget.updates": 10},
            {**TASKS, "mixture.policy": "msft", "mixture.compute_budget": 0.25},
            {"evaluate.keep": "best", "data.validation": "v"},
            {"mixture.policy": "sft", "data.task_column": "t", "data.validation_fraction": 0.1},
            {"model.path": None, "model.config": {"model_type": "llama"}, "data.format": "input_ids"},
        ],
    )
    def test_its_nearest_neighbour_is_fine(self, overrides):
        Config.of(LEAST, overrides)

    def test_the_same_setting_twice(self):
        assert "optim.lr is set twice" in problems(source={**LEAST, "optim.lr": 1, "optim": {"lr": 2}})[0]


class TestHostileFiles:
    @pytest.mark.parametrize(
        ("content", "piece"),
        [
            ("- a\n- b\n", "is not a mapping"),
            ("just words", "is not a mapping"),
            ("3", "is not a mapping"),
            ("optim: {lr: 1\n", "is not valid YAML"),
            ("a: b: c", "is not valid YAML"),
            ("\tx: 1", "is not valid YAML"),
            ("a: 1\n---\nb: 2\n", "is not valid YAML"),
            ("x: !!python/object/apply:os.system [echo]", "is not valid YAML"),
            ("x: !!binary aGk=", "is not valid YAML"),
            ("x: !!timestamp 2026-11-21", "is not valid YAML"),
            ("x: !!int abc", "is not valid YAML"),
            ("x: *nowhere", "is not valid YAML"),
            (b"x: \xff\xfe", "is not UTF-8"),
            (b"x: \x00", "is not valid YAML"),
            (b"x: \x07", "is not valid YAML"),
            ("? [a, b]\n: 1\n", "a key is not a word"),
            ("optim: {lr: 1, lr: 2}", "optim.lr is set twice"),
            ("run: {folder: a}\noptim: {}\nrun: {folder: b}\n", "run is set twice"),
            ("x: " + "[" * 100_000, "is nested too deeply"),
            ("x: " + "{a: " * 5_000 + "}" * 5_000, "is nested too deeply"),
            ("x: &a [*a]", "contains itself"),
            ("x: &a {y: *a}", "contains itself"),
            ("#" * (1 << 21), "is too large"),
            ("run: {seed: " + "9" * 5000 + "}", "is not valid YAML"),
        ],
    )
    def test_is_refused_by_name_and_soon(self, tmp_path, content, piece):
        started = time.monotonic()
        found = problems_of_file(tmp_path, content)
        assert piece in found[0]
        assert "run.yaml" in found[0]
        assert time.monotonic() - started < 20  # a bound on hanging, not a measurement

    @pytest.mark.parametrize("kind", ["list", "mapping", "merge"])
    def test_a_bomb_of_anchors_is_refused_before_it_is_built(self, tmp_path, kind):
        lines = ["a0: &a0 {k: x}" if kind != "list" else "a0: &a0 [x, x]"]
        for i in range(1, 40):
            before = f"*a{i - 1}"
            inside = {
                "list": f"[{before}, {before}]",
                "mapping": f"{{x: {before}, y: {before}}}",
                "merge": f"{{<<: [{before}, {before}]}}",
            }
            lines.append(f"a{i}: &a{i} {inside[kind]}")
        assert "means too many values" in problems_of_file(tmp_path, "\n".join(lines))[0]

    def test_a_byte_order_mark_and_windows_lines_are_fine(self, tmp_path):
        path = tmp_path / "run.yaml"
        path.write_bytes(b"\xef\xbb\xbf" + LEAST_YAML.replace("\n", "\r\n").encode())
        assert Config.of(path).run.folder == "r"

    def test_a_folder_a_missing_file_and_an_endless_one(self, tmp_path):
        assert "cannot be read" in problems(source=tmp_path)[0]
        assert "no such settings file" in problems(source=tmp_path / "x.yaml")[0]
        assert "it is a device" in problems(source="/dev/zero")[0]

    def test_an_empty_file_lacks_what_must_be_given(self, tmp_path):
        assert any("run.folder: is missing" in problem for problem in problems_of_file(tmp_path, ""))

    def test_a_source_that_is_none_of_them(self):
        assert "expected a mapping, a path or a Config" in problems(source=3)[0]


class TestMutated:
    """Whole files that something went over: told with a place, or read whole, in either case soon."""

    @pytest.mark.parametrize("seed", range(120))
    def test_is_told_with_a_place_or_read_whole(self, tmp_path, seed):
        name, content = mutated(seed)
        path = tmp_path / "run.yaml"
        path.write_bytes(content)
        began = time.process_time()
        read = config_or_error(lambda: Config.of(path))
        assert time.process_time() - began < 1
        if isinstance(read, ConfigError):
            places = ("run.yaml", *(f"{n}:" for n in (*setting_names(), *reference.sections())))
            assert all(any(place in problem for place in places) for problem in read.problems), (
                name,
                read.problems,
            )
            return
        path.write_text(read.to_yaml(), encoding="utf-8")
        assert Config.of(path) == read
        held = read.to_dict()
        for key, written in said(content.decode("utf-8-sig")).items():
            value, lost = held, list(key)
            while lost and isinstance(value, dict) and lost[0] in value:
                value = value[lost.pop(0)]
            assert not lost, f"{name}: {key} is lost"
            assert same(written, value), f"{name}: {key} is {value!r}, not {written!r}"

    @pytest.mark.parametrize("seed", range(0, 1000, 20))
    def test_what_they_are_made_of_is_valid(self, tmp_path, seed):
        (tmp_path / "run.yaml").write_text(drawn(seed))
        assert Config.of(tmp_path / "run.yaml").run.folder == "runs/x"

    def test_every_mutation_is_among_them_and_each_end_is_met(self, tmp_path):
        ends = collections.Counter()
        for seed in range(120):
            _, content = mutated(seed)
            (tmp_path / "run.yaml").write_bytes(content)
            ends[isinstance(config_or_error(lambda: Config.of(tmp_path / "run.yaml")), Config)] += 1
        assert {mutated(seed)[0] for seed in range(120)} == set(MUTATIONS)
        assert min(ends.values()) >= 15


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


class TestNothingElseEscapes:
    @CALM
    @given(st.dictionaries(st.sampled_from(setting_names()) | st.text(max_size=12), json_values, max_size=5))
    def test_any_values_give_settings_or_a_config_error(self, values):
        config_or_error(lambda: Config.of({**LEAST, **values}))

    @CALM
    @given(
        st.binary(max_size=80)
        | st.text(max_size=80).map(lambda text: (LEAST_YAML + text).encode("utf-8", "surrogatepass"))
    )
    def test_any_file(self, tmp_path_factory, content):
        SettingsText(tmp_path_factory.mktemp("any"))(content)

    @CALM
    @given(st.sampled_from(setting_names()), st.text(max_size=20))
    def test_any_text_in_the_environment(self, name, text):
        config_or_error(
            lambda: Config.of(LEAST, environment={"REPSFT_" + name.upper().replace(".", "__"): text})
        )
