"""Other trainers' settings lead to ours: every name in every spelling, and everything that is said to be set
here can be."""

import ast
import collections
import importlib.util
import re
from pathlib import Path

import pytest
import yaml

from repsft_fast.cli import run
from repsft_fast.config import Config, setting_names, unknown_setting
from repsft_fast.config.coming_from import coming_from_page
from repsft_fast.config.foreign import NAMES, SECTIONS, nearly, ours
from repsft_fast.config.foreign_values import SCALARS, VALUES
from repsft_fast.config.reference import sections
from repsft_fast.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
LEAST = {
    "run.folder": "r",
    "model.path": "m",
    "data.train": {"a": "a", "b": "b"},
    "data.validation": "v",
    "budget.epochs": 3,
}
THEIRS = {name: here for here, names in NAMES.items() for name in names.split()}
SETTING = re.compile(r"(?<![\w/.])[a-z]+(?:\.[a-z_]+)+(?![\w/])")
FILES = {"config.json", "result.json", "run.png", "metrics.jsonl", "docs", "cluster.md", "data.md"}


def problems(values, **more):
    with pytest.raises(ConfigError) as caught:
        Config.of(LEAST, values, **more)
    assert caught.value.exit_code == 2
    return caught.value.problems


class TestTheTable:
    def test_every_name_stands_once(self):
        counted = collections.Counter(name for names in NAMES.values() for name in names.split())
        assert [name for name, count in counted.items() if count > 1] == []
        assert len(counted) > 800

    def test_no_name_is_a_setting_of_ours(self):
        assert not set(THEIRS) & set(setting_names())

    @pytest.mark.parametrize("here", NAMES)
    def test_what_is_to_be_set_exists_and_takes_the_value_named(self, here):
        known = {*setting_names(), *sections()}
        for found in SETTING.finditer(here):
            name = found[0]
            if name in FILES:
                continue
            assert name in known, here
            given = re.match(r": (\[.*?\]|\{.*?\}|[\w.]+)", here[found.end() :])
            if given and given[1] not in ("the", "drop", "a"):
                Config.of(LEAST, {name: yaml.safe_load(given[1])})
        flags = re.findall(r"--[\w-]+", here)
        assert set(flags) <= {"--resume", "--traceback", "--dry-run"}

    @pytest.mark.parametrize("setting", VALUES)
    def test_values_that_are_said_to_be_meant_can_be_set_and_theirs_cannot(self, setting):
        words = [word for words in VALUES[setting].values() for word in words.split()]
        assert len(set(words)) == len(words)
        for here in VALUES[setting]:
            Config.of(
                {**LEAST, "budget.updates": 9, "budget.epochs": 9},
                {setting: yaml.safe_load(here.partition(",")[0])},
            )
        for word in words:
            given = "" if word == "-" else word
            given = yaml.safe_load(word) if setting.startswith(("budget", "optim.max")) else given
            if setting == "mixture.policy" and word == "none":
                given = "none"
            assert "here it is" in problems({setting: given})[0]

    def test_sections_and_scalars_are_ours(self):
        assert set(SECTIONS.values()) <= set(sections())
        assert set(SCALARS.values()) <= set(setting_names())
        assert set(SCALARS) == set(sections())


SPELLINGS = {
    "plain": lambda name: name,
    "in a section": lambda name: f"training.{name}",
    "in one of ours": lambda name: f"numbers.{name}",
    "dashes": lambda name: name.replace("_", "-"),
    "capitals": lambda name: name.upper(),
    "camel": lambda name: re.sub(r"(?<=[a-z0-9])_([a-z])", lambda found: found[1].upper(), name),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_name_leads_to_ours(spelling):
    wrong = []
    for name, here in THEIRS.items():
        if "." in name and spelling in ("in a section", "in one of ours"):
            continue
        given = SPELLINGS[spelling](name)
        told = "\n".join(problems({given: "x"}))
        right = here if here in setting_names() else here.split(" (")[0].split(":")[0]
        wrong += [] if " is not a setting; " in told and right in told else [told]
    assert not wrong


def test_a_setting_of_theirs_is_never_applied():
    """Refused wherever it stands, whatever it is given."""
    for value in (1, None, True, {"a": 1}, {}, [], "x"):
        assert "is not a setting" in problems({"learning_rate": value})[0]
        assert "is not a setting" in problems({"optim": {"learning_rate": value}})[0]


@pytest.mark.parametrize(
    "spelled",
    [
        "optim.LR",
        "optim_lr",
        "OPTIM_LR",
        "Optim.lr",
        "optim.Lr",
        "optimizer.lr",
        "Optimizer.LR",
        "lr",
        "optim.lerning_rate",
    ],
)
def test_our_own_names_in_other_spellings(spelled):
    expected = "optim" if spelled == "Optim.lr" else r"optim\.lr"
    assert re.search(rf"did you mean {expected}\?", problems({spelled: 1})[0])


@pytest.mark.parametrize("name", ["no-packing", "use_packing", "disable_packing", "enablePacking"])
def test_switches_are_names_too(name):
    assert "did you mean batch.pack?" in problems({name: True})[0]


@pytest.mark.parametrize(
    ("name", "here"),
    [
        ("bs", "batch.samples:"),
        ("training.grad_accum", "batch.samples:"),
        ("warmup", "optim.warmup_fraction (a share of the budget) or optim.warmup_updates"),
        ("optim.momentum", "optim.betas: [0.9, 0.999], whose first is the momentum of sgd"),
        ("nesterov", "there is no Nesterov momentum"),
        ("lr_scheduler", "did you mean schedule.name?"),
        ("schedule.type", "did you mean schedule.name?"),
        ("model.type", "the model's own config.json says it"),
        ("loss.type", "the loss is the cross entropy of the next token"),
        ("stop.patience", "did you mean stop.plateau_epochs?"),
        ("checkpoint.keep", "did you mean checkpoint.keep_last?"),
        ("run.name", "did you mean run.folder?"),
        ("evaluate.every", "here it is evaluate.every_epochs"),
        ("LR", "did you mean optim.lr?"),
        ("SEED", "did you mean run.seed?"),
        ("Training.LR", "did you mean optim.lr?"),
        ("lora", "here it is model.lora: {rank: 16}"),
        ("modle", "did you mean model.path?"),
        ("Data", "did you mean data.train?"),
    ],
)
def test_names_that_people_try(name, here):
    assert f"{name} is not a setting; " in (told := unknown_setting(name))
    assert here in told


def test_short_words_are_alike_by_chance():
    """`type` is not a slip of `dtype`, nor `kind` one of anything."""
    assert nearly("loss.type") is None
    assert nearly("learnng_rate") == "optim.lr"
    assert unknown_setting("loss.kind") == "loss.kind is not a setting"


def test_a_section_is_meant_only_where_one_was_written():
    sentences = [
        unknown_setting(name)
        for section in sections()
        for name in (section.upper(), f"{section}s", section[:-1])
    ]
    meant = {found[1] for text in sentences if (found := re.search(r"did you mean ([\w.]+)\?", text))}
    assert len(meant) > 9
    assert not meant & set(sections())
    assert problems({"modle": {"path": "x"}}) == ["modle is not a setting; did you mean model? (overrides)"]
    assert problems({"modle": "x"}) == ["modle is not a setting; did you mean model.path? (overrides)"]


def test_a_name_with_a_new_line_stays_one_line():
    assert problems({"a\nb": 3, "optim.x\x1b[31m": 1}) == [
        "a\\nb is not a setting (overrides)",
        "optim.x\\x1b[31m is not a setting; did you mean optim.name? (overrides)",
    ]


def test_whole_settings_files_of_others(tmp_path):
    """Line by line; a section that is known as a whole is told once."""
    (tmp_path / "run.yaml").write_text(
        "base_model: owner/name\ndatasets:\n  - path: x\n    type: alpaca\nadapter: lora\nlora_r:"
        " 8\nsequence_len: 2048\nmicro_batch_size: 2\nnum_epochs: 3\noptimizer: adamw_bnb_8bit\nlr_scheduler:"
        " cosine\nlearning_rate: 0.0002\nbf16: auto\nval_set_size: 0.05\nload_in_8bit:"
        " true\nspecial_tokens:\n  pad_token: x\n"
    )
    with pytest.raises(ConfigError) as caught:
        Config.of(tmp_path / "run.yaml", LEAST)
    found = [
        re.fullmatch(r"(\w+) is not a setting; .+ \(run.yaml line \d+\)", problem)
        for problem in caught.value.problems
    ]
    assert all(found)
    assert [match[1] for match in found][:4] == ["base_model", "datasets", "adapter", "lora_r"]
    assert len(found) == 14
    titan = {
        "optimizer": {"name": "AdamW", "lr": 3e-4, "eps": 1e-8}, "lr_scheduler": {"warmup_steps": 200, "decay_ratio": 0.1},
        "training": {"local_batch_size": 3, "seq_len": 8192, "steps": 9, "max_norm": 1.0}, "checkpoint": {"interval": 5},
        "parallelism": {"data_parallel_shard_degree": 8, "tensor_parallel_degree": 2},
        "activation_checkpoint": {"mode": "full"},
    }  # fmt: skip
    told = {p.split(" ")[0]: p for p in problems(titan)}
    for theirs, here in {
        "optimizer.name": "optim.name", "optimizer.lr": "optim.lr", "lr_scheduler.warmup_steps": "optim.warmup_updates",
        "lr_scheduler.decay_ratio": "schedule.decay_fraction", "training.local_batch_size": "batch.samples",
        "training.seq_len": "data.max_tokens", "training.steps": "budget.updates", "training.max_norm": "optim.max_norm",
        "checkpoint.interval": "checkpoint.every_updates", "parallelism.tensor_parallel_degree": "data parallel alone",
        "parallelism.data_parallel_shard_degree": "distributed.shard_ranks",
        "activation_checkpoint": "model.activation_checkpointing: full",
    }.items():  # fmt: skip
        assert here in told[theirs]


def test_on_the_command_line_and_in_the_environment(monkeypatch):
    monkeypatch.setenv("REPSFT_NUM_TRAIN_EPOCHS", "3")
    with pytest.raises(ConfigError) as caught:
        run(
            [
                "inspect",
                "--learning-rate",
                "1e-5",
                "--per_device_train_batch_size=8",
                "--bf16",
                "--model",
                "owner/name",
            ]
        )
    told = "\n".join(caught.value.problems)
    for words in (
        "learning-rate is not a setting; did you mean optim.lr?",
        "per_device_train_batch_size is not a setting; here it is batch.samples",
        "bf16 is not a setting; here it is model.compute_dtype: bfloat16",
        "num_train_epochs is not a setting; here it is budget.epochs",
        "model: is a section, expected settings below it, got owner/name; did you mean model.path? (--model)",
    ):
        assert words in told


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"model.activation_checkpointing": True}, "here it is full"),
        ({"log.trackers": "wandb"}, "here it is [wandb]"),
        ({"log.trackers": ["mlflow"]}, "here it is [wandb], trackio or tensorboard"),
        ({"optim.name": "AdamW"}, "did you mean adamw?"),
        ({"schedule.name": "cosin"}, "did you mean cosine?"),
        ({"optim": "adamw"}, "did you mean optim.name?"),
        ({"schedule": "cosine"}, "did you mean schedule.name?"),
        ({"model.lora": True}, "write model.lora: {} for its defaults"),
        ({"model.lora": False}, "or null for none of it"),
    ],
)
def test_values_and_sections_given_a_value(values, said):
    assert said in problems(values)[0]


def test_hugging_faces_own_lists_are_covered():
    """Names that the installed version has; a few words of its own machinery are no setting of a run."""
    own = {name.rpartition(".")[2] for name in setting_names()}
    names = fields("transformers", "training_args.py", "TrainingArguments")
    assert {"learning_rate", "num_train_epochs", "warmup_steps", "fsdp", "report_to"} <= set(names)
    left = [name for name in names if not ours(name) and name not in own]
    assert len(left) <= len(names) // 10, left


def fields(package, file, name):
    """The fields of a dataclass, read from its source: its package takes seconds to import."""
    tree = ast.parse(
        Path(importlib.util.find_spec(package).origin).with_name(file).read_text(encoding="utf-8")
    )
    (found,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name]
    return [node.target.id for node in found.body if isinstance(node, ast.AnnAssign)]


def test_the_page_is_up_to_date():
    said = "run `python -m repsft_fast.config.coming_from > docs/coming_from.md`"
    assert (ROOT / "docs" / "coming_from.md").read_text(encoding="utf-8") == coming_from_page(), said
