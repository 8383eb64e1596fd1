"""Whole runs on two ranks: the run of one rank by law 2, decided alike, saved, resumed on two and on one; a
rank that dies."""

import json
import shutil
import time

import pytest

from repsft_fast.checkpoint import newest
from tests.helpers import run_jobs, runs
from tests.helpers.ranks import _free_port

SHORT = {"budget__epochs": 2, "log__every_updates": 1, "stop__token_accuracy": None}
LORA = {"rank": 4}


def start(server, settings, ranks=2, **more):
    place = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    children = []
    for rank in range(ranks):
        arguments = {"settings": settings, **more.get(f"rank{rank}", {}), **more.get("every", {})}
        children.append(
            server.spawn(
                "tests.helpers.run_jobs:train",
                arguments,
                {**place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
        )
    return children


@pytest.mark.parametrize("wrong", [False, True], ids=["right", "wrong"])
def test_srun_starts_ranks_as_torchrun_does(wrong, server, tmp_path):
    """The variables of a Slurm step, the command itself; rank 0 alone tells what is wrong with settings."""
    settings = runs.settings(tmp_path, checkpoint__every_updates=3, **SHORT)
    settings["distributed"] = {"shard_ranks": 3 if wrong else None}
    place = {"SLURM_STEP_NUM_TASKS": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    children = []
    for task in range(2):
        (tmp_path / f"task{task}").mkdir()
        arguments = {"settings": settings, "folder": str(tmp_path / f"task{task}")}
        place_of_task = {**place, "SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)}
        children.append(server.spawn("tests.helpers.run_jobs:command_line", arguments, place_of_task))
    outcomes = [child.wait(90) for child in children]
    assert [o.exit_code for o in outcomes] == [2 if wrong else 0] * 2, outcomes[0].output + outcomes[1].output
    if wrong:
        assert ["do not divide" in o.output for o in outcomes] == [True, False]
    else:
        assert json.loads((tmp_path / "run" / "result.json").read_text())["success"]
        assert newest(tmp_path / "run" / "checkpoints").manifest.world_size == 2


def used_folder(folder, settings):
    (folder / "run").mkdir()
    (folder / "run" / "result.json").write_text("{}")


def rank_without_data(folder, settings):
    settings[1]["data"] = {**settings[1]["data"], "train": str(folder / "elsewhere.jsonl")}


def rank_without_tokenizer(folder, settings):
    settings[0]["tokenizer"] = {"path": str(folder / "no-tokenizer")}


def rank_without_model(folder, settings):
    settings[1]["model"] = {"path": str(folder / "no-model")}
    settings[1]["tokenizer"] = settings[0]["tokenizer"] = {}


def wrong_settings_of_one_rank(folder, settings):
    settings[0]["optim"] = {"lr": "fast"}


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (used_folder, "run.folder: holds another run (result.json)"),
        (rank_without_data, "elsewhere.jsonl: does not exist"),
        (rank_without_tokenizer, "tokenizer.path: no such folder"),
        (rank_without_model, "rank 1: model.path: no such folder"),
        (wrong_settings_of_one_rank, "optim.lr"),
    ],
)
def test_what_one_rank_is_refused_all_are_at_once(wrong, words, server, tmp_path):
    """Each ends with exit code 2; rank 0 tells the reason, also when it was another's."""
    settings = [runs.settings(tmp_path, **SHORT) for _ in range(2)]
    wrong(tmp_path, settings)
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    began = time.monotonic()
    children = []
    for rank in range(2):
        (tmp_path / f"rank{rank}").mkdir()
        arguments = {"settings": settings[rank], "folder": str(tmp_path / f"rank{rank}")}
        children.append(
            server.spawn(
                "tests.helpers.run_jobs:command_line",
                arguments,
                {**place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
        )
    outcomes = [child.wait(60) for child in children]
    assert [o.exit_code for o in outcomes] == [2, 2], outcomes[0].output + outcomes[1].output
    assert [words in " ".join(o.output.split()) for o in outcomes] == [True, False], (
        outcomes[0].output + outcomes[1].output
    )
    assert time.monotonic() - began < 30


def run(server, settings, ranks=2, **more):
    outcomes = [child.wait(90) for child in start(server, settings, ranks, **more)]
    for outcome in outcomes:
        assert outcome.exit_code == 0, outcome.output
    assert (
        len(
            {
                (o.result["code"], o.result["updates"], o.result["reason"], o.result["history"])
                for o in outcomes
            }
        )
        == 1
    )
    return outcomes[0].result


def alike(folder, other, rel=2e-5):
    """Every line of both runs: counts equal, figures within fp32's reordering over some dozen updates."""
    pairs = list(zip(run_jobs.lines(folder), run_jobs.lines(other), strict=True))
    assert pairs
    for one, two in pairs:
        assert one.keys() == two.keys()
        for key in one:
            if key in ("loss", "objective", "grad_norm", "entropy"):
                assert two[key] == pytest.approx(one[key], rel=rel), (key, one["update"])
            elif key in ("kind", "update", "epoch", "stage", "total", "lr", "moment", "drop", "to"):
                assert two[key] == one[key]


@pytest.mark.parametrize(
    "changes",
    [{}, {"model__lora": LORA}, {"optim__name": "adamw8bit"}, {"batch__samples": 3}],
    ids=["full", "lora", "8bit", "uneven"],
)
def test_two_ranks_are_one(changes, server, tmp_path):
    alone = run(server, runs.settings(tmp_path / "one", **SHORT, **changes), ranks=1)
    both = run(server, runs.settings(tmp_path / "two", **SHORT, **changes))
    alike(tmp_path / "one" / "run", tmp_path / "two" / "run")
    assert both["updates"] == alone["updates"]


def test_a_mixture_is_decided_alike_and_as_on_one_rank(server, tmp_path):
    changes = {
        "samples": 36, "tasks": 3, "data__validation_fraction": 0.25, "budget__epochs": 6, "stop__token_accuracy": None,
        "optim__lr": 3e-2, "mixture__metric": "nll", "mixture__policy": "msft", "mixture__max_stages": 3,
        "mixture__rule": "paper",
    }  # fmt: skip
    alone = run(server, runs.settings(tmp_path / "one", **changes), ranks=1)
    both = run(server, runs.settings(tmp_path / "two", **changes))
    assert (both["updates"], both["reason"]) == (alone["updates"], alone["reason"])
    alike(tmp_path / "one" / "run", tmp_path / "two" / "run", rel=1e-3)  # dozens of updates at a high rate


def test_a_decay_is_predicted_alike_and_as_on_one_rank(server, tmp_path):
    """Looks at the model, the update at which its decay begins, and the end: integers, so equal."""
    changes = {
        "samples": 9, "budget__epochs": 40, "optim__warmup_fraction": None, "optim__warmup_updates": 2,
        "stop__token_accuracy": 0.95,
    }  # fmt: skip
    alone = run(server, runs.settings(tmp_path / "one", **changes), ranks=1)
    both = run(server, runs.settings(tmp_path / "two", **changes))
    epochs, decays = (
        [runs.metrics(tmp_path / n, kind) for n in ("one", "two")] for kind in ("epoch", "decay")
    )
    looks = [[line.get("own_token_accuracy") for line in lines] for lines in epochs]
    assert sum(look is not None for look in looks[0]) >= 3
    assert looks[1] == looks[0]
    assert decays[1] == decays[0]
    same = ("updates", "reason", "history")
    assert [both[name] for name in same] == [alone[name] for name in same]
    assert alone["updates"] == decays[0][0]["ends_at"]
    assert "was predicted to end at" in alone["reason"]


@pytest.mark.parametrize(
    "changes",
    [{}, {"model__lora": {"rank": 4, "dropout": 0.2}}, {"optim__name": "adamw8bit"}],
    ids=["full", "lora", "8bit"],
)
def test_killed_and_resumed_on_two_ranks_bit_for_bit(changes, server, tmp_path):
    expected = run(server, runs.settings(tmp_path / "whole", checkpoint__every_updates=2, **SHORT, **changes))
    settings = runs.settings(tmp_path / "broken", checkpoint__every_updates=2, **SHORT, **changes)
    # 8 is whole by then: it and 10 lie inside the epoch
    children = start(server, settings, every={"kill_after": 11})
    assert [child.wait(90).killed for child in children].count(True) >= 1
    assert run(server, settings, every={"resume": True}) == expected
    assert run_jobs.lines(tmp_path / "broken" / "run") == run_jobs.lines(tmp_path / "whole" / "run")


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_masters_of_one_rank_are_shards_of_two_and_masters_again(lora, server, tmp_path):
    """Computed in bf16: one rank holds masters, two hold FSDP2's shards. Gradients are rounded otherwise, so
    figures agree to what bf16 leaves."""
    changes = {"model__compute_dtype": "bfloat16", **({"model__lora": LORA} if lora else {}), **SHORT}
    run(server, runs.settings(tmp_path / "whole", **changes), ranks=1)
    settings = runs.settings(tmp_path / "moved", checkpoint__every_updates=1, **changes)
    for ranks, kill in ((1, 4), (2, 8)):
        for child in start(server, settings, ranks, every={"kill_after": kill, "resume": ranks == 2}):
            child.wait(90)
    run(server, settings, 1, every={"resume": True})
    alike(tmp_path / "whole" / "run", tmp_path / "moved" / "run", rel=0.03)
    resumed = runs.metrics(tmp_path / "moved", "resume")
    assert [line["resharded"] for line in resumed] == [True, True]
    held = [newest(tmp_path / name / "run" / "checkpoints").manifest.tensors for name in ("whole", "moved")]
    assert held[0].keys() == held[1].keys()
    assert {t.dtype for name, t in held[1].items() if name.startswith("model/")} == {"F32"}


@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_resumed_on_another_number_of_ranks(first, then, server, tmp_path):
    run(server, runs.settings(tmp_path / "whole", **SHORT), ranks=1)
    settings = runs.settings(tmp_path / "moved", checkpoint__every_updates=3, **SHORT)
    for child in start(server, settings, first, every={"kill_after": 9}):
        child.wait(90)
    run(server, settings, then, every={"resume": True})
    alike(tmp_path / "whole" / "run", tmp_path / "moved" / "run")
    resumed = runs.metrics(tmp_path / "moved", "resume")
    assert [line["resharded"] for line in resumed] == [True]


def test_a_signal_to_one_rank_saves_on_all(server, tmp_path):
    settings = runs.settings(tmp_path, budget__epochs=40, stop__token_accuracy=None)
    outcomes = [child.wait(90) for child in start(server, settings, rank1={"signal_after": 5})]
    assert [o.result and o.result["code"] for o in outcomes] == ["terminated"] * 2, (
        outcomes[0].output + outcomes[1].output
    )
    found = newest(tmp_path / "run" / "checkpoints")
    assert found.manifest.world_size == 2
    assert outcomes[0].result["updates"] == outcomes[1].result["updates"] >= 5


@pytest.mark.parametrize("dead", [0, 1])
def test_a_dead_rank_ends_the_other_with_a_reason(dead, server, tmp_path):
    settings = runs.settings(
        tmp_path, budget__epochs=200, stop__token_accuracy=None, checkpoint__every_updates=5
    )
    children = start(server, settings, **{f"rank{dead}": {"kill_after": 12}})
    began = time.monotonic()
    ended = [child.wait(60) for child in children]
    assert ended[dead].killed
    other = ended[1 - dead]
    assert time.monotonic() - began < 60
    assert other.exit_code == 1
    assert "TrainingError" in other.output
    assert f"rank {dead} is gone" in other.output
    if dead == 1:
        written = json.loads((tmp_path / "run" / "result.json").read_text())
        assert (written["code"], written["success"]) == ("error", False)
        assert "rank 1 is gone" in written["reason"]
    newest(tmp_path / "run" / "checkpoints")


@pytest.mark.parametrize(
    ("name", "others"),
    [("adamw", [(4, 2), (1, None)]), ("adamw8bit", [(4, 1), (2, None)])],
    ids=["again or alone", "four copies or one"],
)
def test_two_copies_of_two_shards_are_one_rank(name, others, server, tmp_path):
    """HSDP: gradients are summed over all four ranks, the norm counts every shard once; killed, resumed so
    and otherwise."""
    changes = {
        **SHORT,
        "optim__name": name,
        "optim__max_norm": 0.5,
        "batch__samples": 12,
        "batch__row_tokens": 24,
    }
    changes["budget__epochs"] = 6  # of two updates, each of several rows a rank
    alone = run(server, runs.settings(tmp_path / "one", **changes), ranks=1)
    folder = tmp_path / "four" / "run"
    settings = runs.settings(
        tmp_path / "four", distributed__shard_ranks=2, checkpoint__every_updates=3, **changes
    )
    for child in start(server, settings, 4, every={"kill_after": 8}):
        child.wait(90)
    assert newest(folder / "checkpoints").manifest.world_size == 4
    shutil.copytree(folder, tmp_path / "killed", symlinks=True)
    for ranks, shard_ranks in others:
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "killed", folder, symlinks=True)
        resumed = run(
            server, settings | {"distributed": {"shard_ranks": shard_ranks}}, ranks, every={"resume": True}
        )
        alike(tmp_path / "one" / "run", folder)
        assert resumed["updates"] == alone["updates"]
        assert len(runs.metrics(tmp_path / "four", "resume")) == 1


def test_ranks_that_do_not_divide_into_copies(server, tmp_path):
    settings = runs.settings(tmp_path, distributed__shard_ranks=3, **SHORT)
    for outcome in [child.wait(90) for child in start(server, settings)]:
        assert outcome.exit_code != 0
        assert "distributed.shard_ranks: 2 ranks do not divide into groups of this size" in outcome.output
