"""Law 6, of budgets: a run whose budget is raised on --resume equals, bit for bit, the run that had it all
along."""

import json
from pathlib import Path

import pytest

from tests.helpers import run_jobs, runs

OPEN = {"stop__token_accuracy": None}
STAGES = {
    "samples": 36, "tasks": 3, "data__validation_fraction": 0.25, "stop__token_accuracy": None, "optim__lr": 3e-2,
    "mixture__metric": "nll", "mixture__rule": "paper", "mixture__policy": "msft", "mixture__max_stages": 9,
}  # fmt: skip
# name: settings, budget before, budget after, update after which the first run is killed (None: it ends)
SCENARIOS = {
    "ended": (OPEN, {"epochs": 3}, {"epochs": 7}, None),
    "ended, in updates": ({**OPEN, "optim__warmup_updates": 2}, {"updates": 19}, {"updates": 31}, None),
    "ended, in tokens": (OPEN, {"tokens": 700}, {"tokens": 1500}, None),
    "ended, batches of tokens": ({**OPEN, "batch__tokens": 40, "batch__samples": None}, {"epochs": 3}, {"epochs": 5}, None),
    "another way to say it": (OPEN, {"epochs": 3}, {"updates": 30}, None),
    "killed in the decay": (
        {**OPEN, "schedule__decay_fraction": 0.5, "checkpoint__every_updates": 3}, {"epochs": 4}, {"epochs": 6}, 20,
    ),
    "killed before it": ({**OPEN, "checkpoint__every_updates": 3}, {"epochs": 4}, {"epochs": 6}, 10),
    "a target beyond the first budget": ({"stop__token_accuracy": 0.5}, {"epochs": 3}, {"epochs": 40}, None),
    "constant": ({**OPEN, "schedule__name": "constant"}, {"epochs": 3}, {"epochs": 5}, None),
    "constant, within an epoch": ({**OPEN, "schedule__name": "constant"}, {"updates": 9}, {"updates": 21}, None),
    "adapters": ({**OPEN, "model__lora": {"rank": 4, "dropout": 0.2}}, {"epochs": 3}, {"epochs": 5}, None),
    "8 bits": ({**OPEN, "optim__name": "adamw8bit"}, {"epochs": 3}, {"epochs": 5}, None),
    "best weights": (
        {**OPEN, "evaluate__keep": "best", "data__validation_fraction": 0.25, "checkpoint__keep_best": True},
        {"epochs": 3}, {"epochs": 6}, None,
    ),
    "constant, the end looked at again": (
        {
            **OPEN, "schedule__name": "constant", "evaluate__keep": "best", "data__validation_fraction": 0.25,
            "checkpoint__keep_last": 1,
        },
        {"updates": 11}, {"updates": 20}, None,
    ),
    "rows left out": ({**OPEN, "loss__skip_below": 0.97, "optim__lr": 3e-2}, {"epochs": 3}, {"epochs": 6}, None),
    "stages": (STAGES, {"epochs": 2}, {"epochs": 5}, None),
    "stages, killed": ({**STAGES, "checkpoint__every_updates": 3}, {"epochs": 3}, {"epochs": 5}, 8),
}  # fmt: skip


def job(server, settings, **more):
    outcome = server.run("tests.helpers.run_jobs:train", {"settings": settings, **more})
    return outcome, (outcome.result, lines(settings))


def within(budget):
    """`runs.settings` has a budget of its own."""
    return {"budget__epochs": None, **{f"budget__{name}": value for name, value in budget.items()}}


def lines(settings):
    """Without the moment of reading, and without ends that were taken back."""
    found = run_jobs.lines(settings["run"]["folder"])
    kept = [line for n, line in enumerate(found) if line.get("decision") != "stop" or n == len(found) - 1]
    return [{k: v for k, v in line.items() if k != "epoch"} for line in kept]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_raised_budget_equals_the_larger_one_from_the_start(scenario, server, tmp_path):
    changes, before, after, kill = SCENARIOS[scenario]
    changes = {"optim__warmup_updates": 1, **changes}
    outcome, expected = job(server, runs.settings(tmp_path / "whole", **{**changes, **within(after)}))
    assert outcome.exit_code == 0, outcome.output
    short = runs.settings(tmp_path / "short", **{**changes, **within(before)})
    outcome, _ = job(server, short, kill_after=kill)
    assert outcome.killed if kill else outcome.exit_code == 0, outcome.output
    made = outcome.result["work"]["updates"] if kill is None else kill
    outcome, found = job(server, {**short, "budget": after}, resume=True)
    assert outcome.exit_code == 0, outcome.output
    assert expected[0]["work"]["updates"] > made
    assert found == expected
    event = next(line for line in raw(short) if line["kind"] == "resume")
    assert event["update"] > (0 if kill == 10 else made // 3), "it began anew"


def raw(settings):
    return [
        json.loads(line) for line in Path(settings["run"]["folder"], "metrics.jsonl").read_text().splitlines()
    ]


def test_twice_raised(server, tmp_path):
    changes = {**OPEN, "optim__warmup_updates": 1}
    _, expected = job(server, runs.settings(tmp_path / "whole", **{**changes, "budget__epochs": 7}))
    short = runs.settings(tmp_path / "short", **{**changes, "budget__epochs": 2})
    job(server, short)
    for epochs in (4, 7):
        outcome, found = job(server, {**short, "budget": {"epochs": epochs}}, resume=True)
        assert outcome.exit_code == 0, outcome.output
    assert found == expected


def test_resumed_from_before_the_decay_it_can_still_be_raised(server, tmp_path):
    """That checkpoint was made before it had a number that it could hold; newer ones do not push it out."""
    changes = {
        **OPEN,
        "optim__warmup_updates": 1,
        "schedule__decay_fraction": 0.5,
        "checkpoint__keep_last": 1,
    }
    short = runs.settings(tmp_path / "short", **changes, **within({"updates": 20}))
    outcome, _ = job(server, short, kill_after=17)
    assert outcome.killed
    assert (
        job(server, {**short, "checkpoint": {"keep_last": 1, "every_updates": 2}}, resume=True)[0].exit_code
        == 0
    )
    outcome, found = job(server, {**short, "budget": {"updates": 40}}, resume=True)
    assert outcome.exit_code == 0, outcome.output
    assert found == job(server, runs.settings(tmp_path / "whole", **changes, **within({"updates": 40})))[1]


def test_raised_then_killed_and_resumed_within_the_warm_up_it_would_have_had(server, tmp_path):
    changes = {**OPEN, "optim__warmup_fraction": 0.2, "checkpoint__every_updates": 2}
    short = runs.settings(tmp_path / "short", **changes, **within({"updates": 10}))
    assert job(server, short, kill_after=5)[0].killed
    longer = {**short, "budget": {"updates": 60}}
    assert job(server, longer, resume=True, kill_after=7)[0].killed
    outcome, found = job(server, longer, resume=True)
    assert outcome.exit_code == 0, outcome.output
    same = runs.settings(
        tmp_path / "whole", **{**OPEN, "optim__warmup_updates": 2, **within({"updates": 60})}
    )
    assert found == job(server, same)[1]


def test_the_warm_up_stays_what_it_was(server, tmp_path):
    changes = {**OPEN, "optim__warmup_fraction": 0.2}
    short = runs.settings(tmp_path / "short", **{**changes, **within({"updates": 10})})
    job(server, short)
    outcome, found = job(server, {**short, "budget": {"updates": 60}}, resume=True)
    assert outcome.exit_code == 0, outcome.output
    notes = run_jobs.notes(short["run"]["folder"])
    assert any("warm-up stays at 2 updates" in note and "12" in note for note in notes), notes
    same = runs.settings(
        tmp_path / "whole", **{**OPEN, "optim__warmup_updates": 2, **within({"updates": 60})}
    )
    _, expected = job(server, same)
    assert found == expected
