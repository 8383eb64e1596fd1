"""Settings: where they come from, which source wins, and that nothing is lost on the way to YAML and back."""

from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from repsft_fast.config import Config, setting_names
from repsft_fast.config.reference import OF_A_TASK, sections, settings, settings_page
from repsft_fast.config.task_sections import EvalTask
from repsft_fast.errors import ConfigError

# Machines that run tests are often busy: no verdict by the clock.
CALM = hypothesis_settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted(p.stem for p in (ROOT / "repsft_fast" / "recipes").glob("*.yaml"))
LEAST = {"run.folder": "r", "model.path": "m", "data.train": "a.jsonl", "budget.epochs": 3}


def of(*overrides, **named):
    return Config.of({**LEAST, **dict(*overrides), **named})


def nested(depth):
    value: dict = {}
    for _ in range(depth):
        value = {"a": value}
    return value


def written(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


LEAST_YAML = "run: {folder: r}\nmodel: {path: m}\ndata: {train: a.jsonl}\nbudget: {epochs: 3}\n"


class TestDefaults:
    def test_are_those_of_the_design(self):
        config = of()
        assert config.batch.samples == 16
        assert config.loss.average == "sample"
        assert config.schedule.name == "wsd"
        assert config.schedule.decay_fraction == 0.1
        assert config.stop.token_accuracy == 0.97
        assert config.stop.probe_samples is None
        assert config.model.trust_remote_code is False
        assert config.log.trackers == []

    def test_raise_no_warning(self):
        assert of().warnings == []

    def test_naming_one_of_two_that_exclude_each_other_is_enough(self):
        config = of({"batch.tokens": 8192, "optim.warmup_updates": 5})
        assert (config.batch.samples, config.batch.tokens) == (None, 8192)
        assert (config.optim.warmup_fraction, config.optim.warmup_updates) == (None, 5)


class TestPrecedence:
    def test_defaults_file_environment_overrides(self, tmp_path):
        path = written(tmp_path, LEAST_YAML + "optim: {lr: 1e-4, eps: 1e-6, weight_decay: 0.5}\n")
        environment = {"REPSFT_OPTIM__EPS": "1e-7", "REPSFT_OPTIM__WEIGHT_DECAY": "0.6", "HOME": "/"}
        config = Config.of(path, {"optim.weight_decay": 0.7}, environment=environment)
        assert (config.optim.lr, config.optim.eps, config.optim.weight_decay) == (1e-4, 1e-7, 0.7)
        assert config.optim.max_norm == 1.0

    def test_the_environment_is_read_only_when_asked(self, monkeypatch):
        monkeypatch.setenv("REPSFT_OPTIM__LR", "0.5")
        assert of().optim.lr == 2e-5

    def test_a_section_is_merged_setting_by_setting_and_a_mapping_is_replaced_whole(self):
        config = Config.of(
            {**LEAST, "data.train": {"a": "a.jsonl", "b": "b.jsonl"}}, {"data": {"train": {"c": "c.jsonl"}}}
        )
        assert config.data.train == {"c": "c.jsonl"}

    def test_lora_can_be_switched_on_refined_and_off(self):
        on = Config.of({**LEAST, "model.lora": {"rank": 4, "alpha": 8}}, {"model.lora.rank": 8})
        assert (on.model.lora.rank, on.model.lora.alpha) == (8, 8.0)
        assert Config.of(on, {"model.lora": None}).model.lora is None
        assert Config.of({**LEAST, "model.lora": None}, {"model.lora.rank": 8}).model.lora.rank == 8
        assert of({"model.lora": {}}).model.lora.rank == 16

    @pytest.mark.parametrize(
        "text",
        [
            "rows #1",
            "#1",
            "&a rows",
            "a\nb",
            "<s>{% for m in messages %}\n{{ m.content }}\n\n{% endfor %}",
            "<|user|>\n  {{ messages[0].content }} # no comment",
            "{{ bos_token }}\n{% for m in messages %}{% endfor %}",
            "| x",
        ],
    )
    def test_text_in_a_flag_or_variable_is_as_it_was_typed(self, text):
        assert (
            Config.of(
                LEAST, environment={"REPSFT_TOKENIZER__CHAT_TEMPLATE": text + "{#"}
            ).tokenizer.chat_template
            == text + "{#"
        )
        assert Config.of(LEAST, environment={"REPSFT_DATA__SPLIT": text}).data.split == text

    @pytest.mark.parametrize(
        ("text", "value"),
        [("'a #b'", "a #b"), ('"a\\nb"', "a\nb"), (" a ", "a"), ("!!str 3", "3"), ("'~'", "~")],
    )
    def test_quotes_and_spaces_in_a_flag_or_variable_are_yaml_s(self, text, value):
        assert Config.of(LEAST, environment={"REPSFT_DATA__SPLIT": text}).data.split == value
        assert Config.of(LEAST, environment={"REPSFT_OPTIM__LR": "1e-5 # rate"}).optim.lr == 1e-5

    def test_another_config_can_be_refined(self):
        config = of({"optim.lr": 1e-3})
        assert Config.of(config) == config
        assert Config.of(config, {"run.seed": 7}).run.seed == 7
        assert Config.of(config, {"run.seed": 7}).optim.lr == 1e-3


class TestYaml:
    @pytest.mark.parametrize(
        ("text", "value"),
        [
            ("1e-5", 1e-5),
            ("1E-5", 1e-5),
            ("1.e-5", 1e-5),
            (".5", 0.5),
            ("2e-05", 2e-5),
            ("1e-5 # rate", 1e-5),
            ("'1e-5'", 1e-5),
        ],
    )
    def test_numbers_as_people_write_them(self, tmp_path, text, value):
        assert Config.of(written(tmp_path, LEAST_YAML + f"optim:\n  lr: {text}\n")).optim.lr == value

    @pytest.mark.parametrize(
        ("text", "value"),
        [("51200", 51200), ("51_200", 51200), ("5.12e4", 51200), ("1e4", 10000), ("010", 10)],
    )
    def test_whole_numbers(self, tmp_path, text, value):
        config = Config.of(
            written(
                tmp_path,
                f"run: {{folder: r}}\nmodel: {{path: m}}\ndata: {{train: a}}\nbudget:\n  updates: {text}\n",
            )
        )
        assert config.budget.updates == value

    def test_numbers_in_a_model_config_are_numbers(self, tmp_path):
        numbers = {"rope_theta": 1e6, "rms_norm_eps": 1e-6, "attention_dropout": 0.5}
        inside = "{model_type: llama, rope_theta: 1e6, rms_norm_eps: 1e-6, attention_dropout: 0.5}"
        config = Config.of(written(tmp_path, LEAST_YAML.replace("{path: m}", f"{{config: {inside}}}")))
        assert config.model.config == {"model_type": "llama", **numbers}

    @pytest.mark.parametrize("name", ["tokenizer.template_kwargs", "model.config"])
    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            ({"a": float("inf")}, "finite, not inf"),
            ({"a": {"b": [float("nan")]}}, "finite, not nan"),
            ({"a": {None: 1}}, "keys are text, not None"),
            ({1: 2, "1": 3}, "keys differ as text"),
            ({"a": b"x"}, "not bytes"),
            (nested(60), "at most 50 deep"),
        ],
    )
    def test_free_settings_that_would_not_come_back_from_their_record(self, name, value, expected):
        with pytest.raises(ConfigError, match=f"{name}: cannot be used, expected .*{expected}"):
            of({name: value, **({"model.path": None} if name == "model.config" else {})})

    def test_free_settings_too_deep_to_be_shown(self):
        with pytest.raises(ConfigError, match="nested too deep to show"):
            of({"tokenizer.template_kwargs": nested(5000)})

    def test_a_library_s_own_config_is_one_to_give(self):
        config = of(
            {
                "model.path": None,
                "model.config": {"model_type": "llama", "id2label": {0: "no"}, "betas": (1, 2)},
            }
        )
        assert config.model.config == {"model_type": "llama", "id2label": {"0": "no"}, "betas": [1, 2]}
        assert Config.of(config.to_dict()) == config

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("optim:\n  lr: 1\n  lr: 2\n", "run.yaml line 3: optim.lr is set twice, got also on line 2"),
            ('"a\\nb": 1\n"a\\nb": 2\n', r"run.yaml line 2: a\nb is set twice, got also on line 1"),
            ("a: &a [*a]\n", "run.yaml line 1: an anchor contains itself"),
        ],
    )
    def test_its_own_words_are_not_wrapped(self, tmp_path, text, said):
        with pytest.raises(ConfigError) as caught:
            Config.of(written(tmp_path, text))
        assert caught.value.problems == [f"{tmp_path}/{said}"]

    @pytest.mark.parametrize("word", ["2026-11-21", "1:30", "off", "no", "=", "0o17"])
    def test_words_that_older_yaml_takes_for_something_else(self, tmp_path, word):
        assert (
            Config.of(written(tmp_path, LEAST_YAML.replace("folder: r", f"folder: {word}"))).run.folder
            == word
        )

    def test_sizes_in_bytes(self):
        assert of({"snapshot.device_bytes": "2GiB"}).snapshot.device_bytes == 2**31
        assert of({"snapshot.device_bytes": 4096}).snapshot.device_bytes == 4096

    # What one of YAML's two sets of rules takes for a number, truth, nothing, a merge or a line break.
    @pytest.mark.parametrize(
        "text",
        [
            "1e5",
            "1E-5",
            ".5e3",
            "0e0",
            "010",
            "0x1f",
            "1:30",
            "off",
            "true",
            "null",
            "<<",
            "=",
            "2026-11-21",
            "\x85",
            "a\u2028b",
            " ",
            "~",
            "-",
        ],
    )
    def test_text_that_looks_like_something_else_stays_text(self, tmp_path, text):
        config = of({"data.task_column": text, "tokenizer.template_kwargs": {text: text}})
        assert Config.of(written(tmp_path, config.to_yaml())) == config
        assert yaml.safe_load(config.to_yaml())["data"]["task_column"] == text  # other readers agree
        assert yaml.safe_load(config.to_yaml())["tokenizer"]["template_kwargs"] == {text: text}

    def test_anchors_and_merges_work(self, tmp_path):
        text = LEAST_YAML + "optim: &o {lr: 1e-3}\nloss: {average: token}\n"
        assert Config.of(written(tmp_path, text)).optim.lr == 1e-3
        text = LEAST_YAML.replace("{epochs: 3}", "{<<: {epochs: 3}, updates: 9}")
        assert Config.of(written(tmp_path, text)).budget.epochs == 3

    def test_empty_sections_and_dotted_keys(self, tmp_path):
        config = Config.of(written(tmp_path, LEAST_YAML + "optim:\nloss.average: token\n"))
        assert config.loss.average == "token"

    @CALM
    @given(
        st.fixed_dictionaries(
            {},
            optional={
                # Spaces around a path are refused, and ~ and $ are filled in: tests/config.
                "run.folder": st.text(
                    min_size=1,
                    alphabet=st.characters(
                        exclude_categories=["Cs", "Cc", "Zs", "Zl", "Zp"], exclude_characters="~$:\\\\"
                    ),
                ),
                "data.split": st.text(min_size=1, alphabet=st.characters(exclude_categories=["Cs", "Cc"])),
                "run.seed": st.integers(0, 2**63 - 1),
                "optim.lr": st.floats(1e-300, 1e300),
                "optim.betas": st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
                "optim.max_norm": st.none() | st.floats(1e-9, 1e9),
                "batch.tokens": st.integers(1, 10**12),
                "data.train": st.text("ab.:-#", min_size=1)
                | st.dictionaries(st.text(min_size=1, max_size=3), st.just("x"), min_size=1),
                "snapshot.disk_bytes": st.integers(0, 10**15),
                "model.lora": st.none() | st.just({"rank": 4}),
            },
        )
    )
    def test_round_trip(self, tmp_path_factory, chosen):
        config = of(chosen)
        path = tmp_path_factory.mktemp("yaml") / "run.yaml"
        path.write_text(config.to_yaml(), encoding="utf-8")
        assert Config.of(path) == config
        assert Config.of(config.to_dict()) == config


class TestRecipes:
    def test_there_are_some(self):
        assert {"repetition", "paper_a", "msft_paper", "msft", "smollm2", "demo"} <= set(RECIPES)

    @pytest.mark.parametrize("name", RECIPES)
    def test_every_recipe_is_valid_round_trips_and_warns_of_nothing(self, name, tmp_path):
        config = Config.of(name)
        assert config == Config.of(ROOT / "repsft_fast" / "recipes" / f"{name}.yaml")
        assert Config.of(written(tmp_path, config.to_yaml())) == config
        assert config.warnings == []

    def test_paper_a_is_the_papers_protocol(self):
        config = Config.of("paper_a")
        assert (config.batch.samples, config.budget.updates, config.schedule.name) == (1, 51200, "cosine")
        assert (config.optim.lr, config.optim.betas, config.optim.warmup_fraction) == (
            2e-5,
            (0.9, 0.999),
            0.1,
        )
        assert (config.optim.weight_decay, config.optim.max_norm, config.loss.average) == (0.0, 1.0, "sample")
        assert config.stop.token_accuracy is None
        assert config.data.samples * 128 == config.budget.updates

    def test_msft_paper_is_the_papers_protocol(self):
        config = Config.of("msft_paper")
        assert (config.batch.samples, config.optim.lr, config.schedule.name, config.optim.max_norm) == (
            64,
            1e-5,
            "constant",
            None,
        )
        mixture = config.mixture
        assert (mixture.policy, mixture.rule, mixture.evaluations_per_epoch, mixture.max_stages) == (
            "msft",
            "paper",
            4,
            10,
        )


class TestWarnings:
    def test_a_schedule_over_the_whole_budget_with_an_early_stop(self):
        for name in ("cosine", "linear"):
            assert "learning rate" in " ".join(of({"schedule.name": name}).warnings)
            assert of({"schedule.name": name, "stop.token_accuracy": None}).warnings == []
            assert (
                of({"schedule.name": name, "stop.token_accuracy": None, "stop.plateau_epochs": 3}).warnings
                != []
            )
        assert of({"schedule.name": "constant"}).warnings == []

    def test_bfloat16_weights_without_stochastic_rounding(self):
        assert "stall" in " ".join(of({"model.param_dtype": "bfloat16"}).warnings)
        assert of({"model.param_dtype": "bfloat16", "optim.name": "adamw8bit"}).warnings == []

    def test_mixture_settings_without_a_policy(self):
        assert of({"mixture.z": 3}).warnings == ["mixture.z: has no effect without mixture.policy"]

    @pytest.mark.parametrize("name", ["evaluate.keep", "evaluate.every_epochs", "stop.plateau_epochs"])
    def test_settings_that_a_policy_replaces(self, name):
        value = {"evaluate.keep": "best", "evaluate.every_epochs": 2, "stop.plateau_epochs": 3}[name]
        held = {"data.validation_fraction": 0.1, "data.task_column": "task", "mixture.policy": "sft"}
        assert of(held).warnings == []
        assert of({name: value, "data.validation_fraction": 0.1}).warnings == []
        assert [text.split(":")[0] for text in of({**held, name: value}).warnings] == [name]


class TestPage:
    def test_docs_are_up_to_date(self):
        assert (ROOT / "docs" / "settings.md").read_text(encoding="utf-8") == settings_page(), (
            "run `repsft doctor --settings > docs/settings.md`"
        )

    def test_every_setting_says_what_it_means(self):
        assert set(settings()) == set(setting_names())
        assert all(setting.meaning and setting.kind for setting in settings().values())
        assert all(sections().values())

    def test_every_setting_is_one_whole_row_of_its_table(self):
        rows = [line for line in settings_page().splitlines() if line.startswith("| `")]
        names = [row.split("`")[1] for row in rows]
        of_a_task = [f"{OF_A_TASK}.{name}" for name in EvalTask.model_fields]
        assert [name for name in names if not name.startswith(OF_A_TASK)] == list(settings())
        assert [name for name in names if name.startswith(OF_A_TASK)] == of_a_task
        assert all(row.endswith(" |") for row in rows)

    def test_every_default_on_the_page_is_the_default(self):
        config = of()
        for name, setting in settings().items():
            if setting.default is not None and not name.startswith("model.lora.") and name not in LEAST:
                value = config.to_dict()
                for step in name.split("."):
                    value = value[step]
                assert (
                    Config.of({**LEAST, name: yaml.safe_load(setting.default)}).to_dict() == config.to_dict()
                ), name


def test_formats_are_those_of_the_reader():
    from repsft_fast.data.formats import FORMATS

    kind = settings()["data.format"].short_kind
    assert set(kind.split("|")) == {"auto", *FORMATS}


def test_settings_cannot_be_changed_behind_the_checks():
    with pytest.raises(ValueError, match="frozen"):
        of().optim.lr = -1


def test_a_missing_file_names_the_recipes(tmp_path):
    with pytest.raises(ConfigError, match="paper_a"):
        Config.of(tmp_path / "none.yaml")
