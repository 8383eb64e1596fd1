"""Mixture policies in whole runs: what the trainer did is what the policy says of the same history, and what
it left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from repsft_fast import train
from repsft_fast.evaluate.teacher_forced import TeacherForced
from repsft_fast.policies import Continue, Evaluation, History, Probe, RollBack, Stop
from repsft_fast.report.result import RunResult
from repsft_fast.training import trainer
from repsft_fast.training.snapshots import Snapshots
from tests.helpers import runs

MIXTURE: dict[str, Any] = {
    "samples": 48, "tasks": 3, "data__validation_fraction": 0.25, "schedule__name": "constant", "budget__epochs": 60,
    "mixture__metric": "nll", "mixture__max_stages": 4, "mixture__rule": "paper",
}  # fmt: skip
TESTED = {
    "mixture__rule": "tested",
    "mixture__z": 0.0,
    "mixture__patience": 1,
    "mixture__min_looks": 1,
    "optim__lr": 3e-2,
}
# name → settings, and which decisions the run must hold, so that no test passes on an empty run
POLICIES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "msft-paper": ({"mixture__policy": "msft"}, {"NewStage", "RollBack", "Stop"}),
    "msft-tested": ({"mixture__policy": "msft", "mixture__compute_budget": 3, "mixture__rehearsal": 0.0, **TESTED}, {"NewStage", "RollBack", "Stop"}),
    "msft-rehearsal": ({"mixture__policy": "msft", "mixture__rehearsal": 0.3}, {"NewStage", "RollBack", "Stop"}),
    "msft-restore-rewind": (
        {"mixture__policy": "msft", "mixture__optimizer": "restore", "mixture__schedule": "rewind", "mixture__data": "rewind"},
        {"NewStage", "RollBack", "Stop"},
    ),
    "msft-saturation": (
        {"mixture__policy": "msft", "mixture__exclude_on": "saturation", "stop__token_accuracy": 0.15,
         "mixture__compute_budget": 3, "optim__lr": 3e-2},
        {"NewStage", "Stop"},
    ),
    "sft": ({"mixture__policy": "sft", "mixture__compute_budget": 2}, {"NewStage", "Stop"}),
    "continual": ({"mixture__policy": "continual", "mixture__compute_budget": 3, "optim__lr": 3e-2},
                  {"NewStage", "RollBack", "Stop"}),
    "sro": ({"mixture__policy": "sro", "mixture__compute_budget": 4, "optim__lr": 3e-2}, {"NewStage", "Stop"}),
    "soft_sro": ({"mixture__policy": "soft_sro", "mixture__compute_budget": 4, "optim__lr": 3e-2}, {"NewStage", "Stop"}),
    "ies": ({"mixture__policy": "ies", "mixture__compute_budget": 8, "optim__lr": 1e-6}, {"NewStage", "SkipSamples", "Stop"}),
    "dynamix": ({"mixture__policy": "dynamix", "mixture__compute_budget": 15}, {"NewStage", "Probe", "Reweight", "Stop"}),
}  # fmt: skip


class Run:
    """One whole run, and what the conductor and its moments held when it ended."""

    def __init__(self, folder: Path, watch: pytest.MonkeyPatch, **changes: Any):
        self.folder = folder
        self.kept: dict[str, dict[str, torch.Tensor]] = {}  # moment → weights when it was taken
        self.scored: list[tuple[str, int]] = []  # (split, updates done) of every evaluation
        self.restored: list[tuple[str, dict[str, torch.Tensor]]] = []
        self.losses: list[Any] = []  # of every epoch; the history forgets old ones
        finish, take, restore, call = (
            trainer.finish,
            Snapshots.take,
            Snapshots.restore,
            TeacherForced.__call__,
        )
        epoch_ended = History.epoch_ended

        def ending(run: Any) -> RunResult:
            self.conductor, self.parts = run.conductor, run.parts
            self.history: History = run.conductor.history
            self.work = run.parts.lasting.all_work.values()
            return finish(run)

        def taking(moments: Snapshots, name: str) -> None:
            take(moments, name)
            self.kept[name] = weights_of(moments)
            self.parts = moments.parts

        def restoring(moments: Snapshots, name: str) -> None:
            restore(moments, name)
            self.restored.append((name, weights_of(moments)))

        def scoring(scorer: TeacherForced, model: Any) -> Any:
            data = self.parts.data if hasattr(self, "parts") else None
            split = "test" if data is not None and scorer.store is data.test else "other"
            done = self.parts.lasting.all_work.updates if data is not None else 0
            self.scored.append((split, done))
            return call(scorer, model)

        def ended(history: History, tokens: Any, losses: Any = None, own: Any = None) -> Any:
            self.losses.append(losses)
            return epoch_ended(history, tokens, losses, own)

        watch.setattr(trainer, "finish", ending)
        watch.setattr(History, "epoch_ended", ended)
        watch.setattr(Snapshots, "take", taking)
        watch.setattr(Snapshots, "restore", restoring)
        watch.setattr(TeacherForced, "__call__", scoring)
        result = train(runs.settings(folder, **{**MIXTURE, **changes}))
        assert result is not None
        self.result = result

    def lines(self, kind: str | None = None) -> list[dict[str, Any]]:
        return runs.metrics(self.folder, kind)


def weights_of(moments: Snapshots) -> dict[str, torch.Tensor]:
    live = moments.state.tensors().items()
    return {name: tensor.detach().clone() for name, tensor in live if name.startswith("model/")}


@pytest.fixture(scope="module", params=["msft-paper", "msft-tested"])
def msft(request, tmp_path_factory):
    with pytest.MonkeyPatch.context() as watch:
        changes = {**POLICIES[request.param][0], "data__test_fraction": 0.1}
        yield Run(tmp_path_factory.mktemp(request.param), watch, **changes)


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_runs_to_its_end_and_decides_what_it_says_of_its_history(name, tmp_path, monkeypatch):
    changes, wanted = POLICIES[name]
    run = Run(tmp_path, monkeypatch, **changes)
    assert run.result.code == "policy"
    assert run.result.success
    taken = [t.decision for t in run.history.decisions]
    assert wanted <= {type(d).__name__ for d in taken}
    assert isinstance(taken[-1], Stop)
    if name in ("msft-saturation", "sro"):
        assert len(run.history.stages[-1].active) < 3, "nobody left"
    assert replay(run.conductor.policy, run.history, run.losses) == taken


def replay(policy: Any, seen: History, losses: list[Any]) -> list[Any]:
    """The decisions of a policy that is told, one after the other, what was measured: nothing here knows the
    trainer."""
    again = History.start(seen.tasks.items())
    probes = list(seen.probes)

    def ask() -> None:
        while not isinstance(decision := policy.decide(again, again.active), Continue):
            again.took(decision)
            if isinstance(decision, Probe):
                again.probed(probes.pop(0).losses)
            if isinstance(decision, Stop):
                return

    first_of_stage = {(e.stage, e.snapshot_id) for e in seen.evaluations if e.stage > 0 and e.epochs == 0.0}
    records = [e for e in seen.evaluations if (e.stage, e.snapshot_id) not in first_of_stage] + list(
        seen.epochs
    )
    epochs_at = {(r.stage, r.update): r.epochs for r in records}
    by_place: dict[tuple[int, int, float], list[Any]] = {
        (p.stage, p.update, epochs_at.get((p.stage, p.update), 0.5)): [] for p in probes
    }
    for record in records:
        by_place.setdefault((record.stage, record.update, record.epochs), []).append(record)
    ask()
    for stage, update, epochs in sorted(by_place):
        again.tick(update, epochs, 0)
        for record in by_place[stage, update, epochs]:
            if isinstance(record, Evaluation):
                again.evaluated(record.snapshot_id, record.scores)
            else:
                again.epoch_ended(record.tokens, losses[seen.epochs.index(record)])
        ask()
    return [t.decision for t in again.decisions]


def test_an_excluded_task_is_not_trained_any_more(msft):
    active = {"task0", "task1", "task2"}
    excluded, trained_alone = set(), 0
    for line in msft.lines():
        if line["kind"] == "stage":
            active = set(line["active"])
            excluded |= {"task0", "task1", "task2"} - active
            assert not excluded & active, "an excluded task came back"
        if line["kind"] == "update":
            trained = {task for task, counts in line["tasks"].items() if counts["total"]}
            assert trained <= active
            trained_alone += bool(excluded)
    assert excluded
    assert trained_alone, "the run must exclude somebody and train on"


def test_every_evaluation_covers_every_task_excluded_ones_too(msft):
    scored = [line for line in msft.lines("evaluation") if "scores" in line]
    moments = {e.snapshot_id for e in msft.history.evaluations}
    assert [line["moment"] for line in scored] == sorted(moments, key=lambda m: int(m.split(".")[1]))
    for line in scored:
        assert set(line["scores"]) == {"task0", "task1", "task2"}
        assert all(isinstance(score, float) for score in line["scores"].values())


def test_the_result_is_the_best_pooled_moment_and_the_saved_weights_are_that_moments(msft):
    def pooled(evaluation: Evaluation) -> float:
        items = [item for score in evaluation.scores.values() for item in score.items]
        return float(np.mean(items))

    best = max(msft.history.evaluations, key=pooled)  # the first of equals
    assert msft.result.more["moment"] == best.snapshot_id
    kept = msft.kept[best.snapshot_id]
    saved = AutoModelForCausalLM.from_pretrained(msft.folder / "run").state_dict()
    assert kept
    for name, weight in kept.items():
        assert torch.equal(saved[name.removeprefix("model/")], weight), name
    others = [m for m, weights in msft.kept.items() if m != best.snapshot_id]
    assert any(not torch.equal(msft.kept[m][name], kept[name]) for m in others for name in kept)


def test_a_roll_back_goes_to_the_very_state_that_was_evaluated(msft):
    backs = [t.decision for t in msft.history.decisions if isinstance(t.decision, RollBack)]
    assert backs
    restored = [name for name, _ in msft.restored]
    assert restored[: len(backs)] == [decision.to for decision in backs]
    for name, weights in msft.restored:
        assert all(torch.equal(weights[key], kept) for key, kept in msft.kept[name].items())
    left = [decision.drop for decision in backs]
    assert len(left) == len(set(left))


def test_the_test_split_is_read_once_after_the_last_update(msft):
    reads = [done for split, done in msft.scored if split == "test"]
    assert reads == [msft.work["updates"]]
    assert msft.result.more["test"]["tasks"].keys() == {"task0", "task1", "task2"}
    assert len(msft.parts.data.test.index) > 0
    assert 0.0 <= msft.result.more["test"]["exact_match"] <= 1.0


def test_the_same_settings_give_the_same_decisions_and_weights(msft, tmp_path):
    settings = json.loads(json.dumps(msft.parts.config.to_dict()))
    settings["run"]["folder"] = str(tmp_path / "run")
    again = train(settings)
    assert again.more["moment"] == msft.result.more["moment"]
    first, second = (
        AutoModelForCausalLM.from_pretrained(f / "run").state_dict() for f in (msft.folder, tmp_path)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
