"""Law 6: kill -9 at any moment, resume: the run equals the uninterrupted one in losses, decisions and state
hash."""

import json
import shutil

import pytest

from repsft_fast.checkpoint import newest
from tests.helpers import run_jobs, runs

MIXTURE = {
    "samples": 36, "tasks": 3, "data__validation_fraction": 0.25, "budget__epochs": 6, "stop__token_accuracy": None,
    "optim__lr": 3e-2, "mixture__metric": "nll", "mixture__rule": "paper",
}  # fmt: skip
LORA = {"rank": 4, "dropout": 0.2}
# name: settings, updates after which the process is killed (counted over all branches), an event that lies
# before the last kill
SCENARIOS = {
    "plain": ({"stop__token_accuracy": 0.4, "budget__epochs": 30}, (8, 15), "epoch"),
    "a decay that a prediction began": ({"stop__token_accuracy": 0.95, "budget__epochs": 60}, (170, 190), "decay"),
    "before the first checkpoint": ({}, (1, 2), None),
    "lora with dropout": ({"model__lora": LORA}, (7, 14), "epoch"),
    "adamw8bit": ({"optim__name": "adamw8bit"}, (7, 14), "epoch"),
    "bf16 weights, 8 bits": ({"optim__name": "adamw8bit", "model__param_dtype": "bfloat16"}, (7, 14), "epoch"),
    "masters": ({"model__compute_dtype": "bfloat16", "batch__samples": 8}, (5, 8), "epoch"),
    "masters, best adapters": (
        {
            "model__compute_dtype": "bfloat16", "model__lora": LORA, "evaluate__keep": "best",
            "data__validation_fraction": 0.25,
        },
        (6, 11), "evaluation",
    ),
    "masters, msft, 8 bits": (
        {
            **MIXTURE, "mixture__policy": "msft", "mixture__max_stages": 4, "model__compute_dtype": "bfloat16",
            "optim__name": "adamw8bit",
        },
        (8, 13), "roll_back",
    ),
    "best weights": (
        {"evaluate__keep": "best", "data__validation_fraction": 0.25, "checkpoint__keep_best": True}, (6, 11), "evaluation",
    ),
    "msft": ({**MIXTURE, "mixture__policy": "msft", "mixture__max_stages": 4}, (8, 13), "roll_back"),
    "msft, everything rewound": (
        {
            **MIXTURE, "mixture__policy": "msft", "mixture__max_stages": 4, "mixture__optimizer": "restore",
            "mixture__schedule": "rewind", "mixture__data": "rewind",
        },
        (8, 14), "roll_back",
    ),
    "ies": (
        {**MIXTURE, "mixture__policy": "ies", "mixture__compute_budget": 9.0, "budget__epochs": 10, "optim__lr": 1e-4},
        (9, 60), "epoch",  # a sample skips the last epoch
    ),
    "dynamix": (
        {**MIXTURE, "mixture__policy": "dynamix", "mixture__compute_budget": 2.5, "batch__samples": 1},
        (30, 56), "epoch",  # probed and reweighted after 50
    ),
    "reverted for a NaN": ({"numbers__on_nonfinite": "revert", "log__every_updates": 2}, (12, 17), "revert"),
    "memorised rows left out": (
        # the guess is below 1 at both
        {"loss__skip_below": 0.97, "optim__lr": 3e-2, "budget__epochs": 4}, (9, 16), "epoch",
    ),
    "out of memory, retried": ({"numbers__on_out_of_memory": "retry", "batch__samples": 8}, (5, 8), "epoch"),
}  # fmt: skip


def settings_of(folder, changes, every=3):
    changes = dict(changes)
    return runs.settings(folder, **{"checkpoint__every_updates": every, **changes})


def whole(server, settings, **more):
    outcome = server.run("tests.helpers.run_jobs:train", {"settings": settings, **more})
    assert outcome.exit_code == 0, outcome.output
    return outcome.result, run_jobs.lines(settings["run"]["folder"])


def killed(server, settings, **more):
    outcome = server.run("tests.helpers.run_jobs:train", {"settings": settings, **more})
    assert outcome.killed, f"the kill did not land: {outcome.output}"
    return run_jobs.lines(settings["run"]["folder"])


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_killed_and_resumed_run_equals_the_uninterrupted_one(scenario, server, tmp_path):
    changes, kills, event = SCENARIOS[scenario]
    more = {"poison": [8]} if event == "revert" else {"full_after": 4} if "out of memory" in scenario else {}
    expected = whole(server, settings_of(tmp_path / "whole", changes), **more)
    assert expected[0]["work"]["updates"] > kills[-1]
    broken = settings_of(tmp_path / "broken", changes)
    for n, kill in enumerate(kills):
        seen = killed(server, broken, kill_after=kill, resume=n > 0, **more)
    assert event is None or any(line["kind"] == event for line in seen)
    assert whole(server, broken, resume=True, **more) == expected
    resumed = [note for note in run_jobs.notes(broken["run"]["folder"]) if "--resume: goes on" in note]
    assert bool(resumed) == (kills[-1] > 3)


def test_checkpoints_change_nothing(server, tmp_path):
    def without_moment_of_reading(found):
        return found[0], [{k: v for k, v in line.items() if k != "epoch"} for line in found[1]]

    with_them = whole(server, settings_of(tmp_path / "with", {}, every=1))
    without = whole(server, settings_of(tmp_path / "without", {}, every=None))
    assert without_moment_of_reading(with_them) == without_moment_of_reading(without)
    found = json.loads((tmp_path / "with" / "run" / "checkpoints" / "LATEST").read_text())
    assert found["generation"] >= 10


# Runs killed where the items of the closed list differ from a fresh run's; between them every item matters.
KILLED = {
    "msft": ({**SCENARIOS["msft, everything rewound"][0], "model__lora": LORA}, 13, {}),
    "stages": (SCENARIOS["msft"][0], 13, {}),
    "ies": ({**SCENARIOS["ies"][0], "mixture__compute_budget": 8.0, "optim__lr": 3e-2}, 40, {}),
    "skipping": (SCENARIOS["ies"][0], 60, {}),
    "dynamix": (SCENARIOS["dynamix"][0], 56, {}),
    "memory": (SCENARIOS["out of memory, retried"][0], 8, {"full_after": 4}),
    "decay": (
        {"numbers__on_nonfinite": "skip", "budget__epochs": None, "budget__updates": 17},
        17,
        {"poison": [3]},
    ),
    "revert": ({"numbers__on_nonfinite": "revert"}, 12, {"poison": [8]}),
    "memorised": (SCENARIOS["memorised rows left out"][0], 16, {}),
    # best after 10
    "best": ({**SCENARIOS["best weights"][0], "optim__lr": 0.03, "budget__epochs": 9}, 18, {}),
}
# The first two are as in a fresh run until a run has ended, which saves nothing more; seconds are of the
# clock; and every update sets the length of its epoch before anybody reads it.
NEVER = {
    "value:state|progress|reason", "value:conductor|words", "value:conductor|seconds",
    "value:state|progress|updates_in_epoch",
}  # fmt: skip


@pytest.fixture(scope="module")
def broken_runs(server, tmp_path_factory):
    """Of every scenario: what is expected, and a folder of the killed run."""
    found = {}
    for name, (changes, kill, more) in KILLED.items():
        folder = tmp_path_factory.mktemp(name)
        expected = whole(server, settings_of(folder / "whole", changes, every=1), **more)
        killed(server, settings_of(folder / "broken", changes, every=1), kill_after=kill, **more)
        found[name] = (expected, folder / "broken", changes, more)
    return found


def items_of(folder):
    """Names of everything that the newest checkpoint of a run holds."""
    generation = newest(folder / "run" / "checkpoints")
    values = json.loads((generation.path / "values-00000-of-00001.json").read_text())
    found = [f"value:state|{name}" for name in values["state"] if name not in ("progress", "schedule")]
    found += [
        f"value:state|{part}|{name}" for part in ("progress", "schedule") for name in values["state"][part]
    ]
    return [
        *generation.manifest.tensors,
        *found,
        *(f"value:conductor|{name}" for name in values["conductor"]),
    ]


def is_missed(item, server, broken_runs, tmp_path):
    for name, (expected, folder, changes, more) in broken_runs.items():
        if item not in items_of(folder):
            continue
        copy = tmp_path / name
        shutil.copytree(folder, copy)
        settings = settings_of(copy, changes, every=1)
        settings["data"] = settings_of(folder, changes)["data"]
        outcome = server.run(
            "tests.helpers.run_jobs:train", {"settings": settings, "resume": True, "forget": item, **more}
        )
        if outcome.exit_code != 0 or (outcome.result, run_jobs.lines(copy / "run")) != expected:
            return True
    return False


def test_nothing_forgotten_nothing_missed(server, broken_runs, tmp_path):
    """The mutation test's own control: without a mutation every one of its runs ends as expected."""
    everything = {item for _, folder, *_ in broken_runs.values() for item in items_of(folder)}
    assert len(everything) > 100
    for name, (expected, folder, changes, more) in broken_runs.items():
        copy = tmp_path / name
        shutil.copytree(folder, copy)
        settings = settings_of(copy, changes, every=1)
        settings["data"] = settings_of(folder, changes)["data"]
        assert whole(server, settings, resume=True, **more) == expected


EMBEDDING = "model.embed_tokens.weight"
KINDS = [
    f"model/{EMBEDDING}", "optimizer/optim.step", f"optimizer/optim.exp_avg.{EMBEDDING}",
    f"optimizer/optim.exp_avg_sq.{EMBEDDING}", "ledger/ledger.epoch", "samples/ledger.samples", f"best/model/{EMBEDDING}",
    f"moments/0.18/model/{EMBEDDING}",
]  # fmt: skip


@pytest.mark.parametrize("item", KINDS)
def test_every_kind_of_tensor_is_needed(item, server, broken_runs, tmp_path):
    assert any(item in items_of(folder) for _, folder, *_ in broken_runs.values())
    assert is_missed(item, server, broken_runs, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_value_is_needed(server, broken_runs, tmp_path):
    everything = {
        item
        for _, folder, *_ in broken_runs.values()
        for item in items_of(folder)
        if item.startswith("value:")
    }
    unmissed = [
        item
        for n, item in enumerate(sorted(everything - NEVER))
        if not is_missed(item, server, broken_runs, tmp_path / str(n))
    ]
    assert not unmissed, "\n".join(unmissed)
