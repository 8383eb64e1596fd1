"""Loss spikes: what is one, that device and reference and all ranks decide alike, and what becomes of the
update."""

import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from repsft_fast import checkpoint
from repsft_fast.config import Config
from repsft_fast.distributed import World
from repsft_fast.optim import state_tensors
from repsft_fast.selftest.syncs import SyncCounter
from repsft_fast.training.build import build
from repsft_fast.training.recovery import Recovery
from repsft_fast.training.refusals import Refusals
from repsft_fast.training.spikes import KNOWN, WINDOW, Reference, Spikes, verdict
from repsft_fast.training.step import train_step
from tests.helpers import run_jobs, runs, spike_jobs
from tests.helpers.ranks import _free_port, run_ranks

CPU = torch.device("cpu")
ALONE = World(0, 1, 0, CPU)
# 72 updates of 8 samples, the window known after 64.
LONG = {
    "samples": 24,
    "batch__samples": 8,
    "budget__epochs": 24,
    "stop__token_accuracy": None,
    "schedule__name": "constant",
}


def judged(pairs, max_norm=1.0, world=ALONE):
    """What the device decides about every (loss, norm), one after the other."""
    spikes = Spikes(CPU, world, max_norm, veto_spikes=False)
    found = []
    for loss, norm in pairs:
        outcome = spikes.judge(
            torch.tensor(loss, dtype=torch.float64), torch.tensor(norm, dtype=torch.float64)
        )
        spikes.enter()
        finite = not bool(outcome.veto)  # of a judge that lets spikes pass
        found.append((finite, verdict(outcome.numbers[2:].tolist()) is not None))
    return found


def sequence(seed, length=300):
    """Losses and norms of every sort a run can meet, and some that it cannot."""
    draw = np.random.default_rng(seed)
    spread = draw.choice([0.0, 1e-6, 0.05, 0.5, 2.0])
    pairs = np.exp(
        draw.normal(
            [draw.uniform(-9, 2), draw.uniform(-3, 3)], [spread, draw.choice([0.0, 0.1, 1.0])], (length, 2)
        )
    )
    if draw.random() < 0.5:
        pairs[length // 2 :] *= 10.0 ** draw.uniform(-3, 6)
    for value in (float("nan"), float("inf"), -float("inf"), 0.0, -2.5, 1e300, 5e-324, 1e12):
        for _ in range(draw.integers(0, 4)):
            pairs[draw.integers(length), draw.integers(2)] = value
    return [(float(loss), float(norm)) for loss, norm in pairs]


@pytest.mark.parametrize("max_norm", [1.0, 0.01, None])
def test_the_device_decides_as_the_reference(max_norm):
    spikes = 0
    for seed in range(24):
        reference, pairs = Reference(max_norm), sequence(seed)
        expected = [(bool(np.isfinite(pair).all()), reference.judge(*pair)) for pair in pairs]
        assert judged(pairs, max_norm) == expected, f"sequence {seed}"
        spikes += sum(spike for _, spike in expected)
    assert spikes > 50, "the test needs spikes"


def quiet(count, seed=0):
    draw = np.random.default_rng(seed)
    return [(float(2 + 0.1 * x), float(np.exp(0.3 * y))) for x, y in draw.normal(size=(count, 2))]


@pytest.mark.parametrize(
    ("pair", "expected"),
    [
        ((2.3, 1.0), False),
        ((4.0, 1.0), True),
        ((2.0, 20.0), False),
        ((2.0, 100.0), True),
        ((0.001, 0.001), False),
    ],
)
def test_a_spike_lies_above_six_deviations_of_the_logarithms(pair, expected):
    assert judged([*quiet(WINDOW), pair])[-1] == (True, expected)


def test_nothing_is_judged_before_enough_is_known():
    found = judged([*quiet(KNOWN - 1), (1e6, 1e6)])
    assert not any(spike for _, spike in found)
    assert judged([*quiet(KNOWN), (1e6, 1e6)])[-1][1]


def test_a_judgement_that_failed_leaves_the_window_as_it_is(monkeypatch):
    """It is computed in the room of the window's next state, which nothing then takes for that."""
    state = Spikes(torch.device("cpu"), World(0, 1, 0, torch.device("cpu")), 1.0)
    one = torch.ones((), dtype=torch.float64)
    for _ in range(2):
        state.judge(one, one)
        state.enter()
    state.judge(one * 3, one)
    known = {name: tensor.clone() for name, tensor in state.tensors().items()}

    def full(*_):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(state, "_after", full)
    with pytest.raises(torch.OutOfMemoryError):
        state.judge(one * 5, one)
    state.enter()
    assert all(torch.equal(known[name], tensor) for name, tensor in state.tensors().items())


def test_what_is_not_finite_and_what_has_no_gradient_teaches_nothing():
    between = [(float("nan"), 1.0), (1.0, float("inf")), (900.0, 0.0)] * WINDOW
    assert judged([*quiet(WINDOW), *between, (4.0, 1.0)])[-1] == (True, True)
    assert judged([*quiet(KNOWN - 1), *between, (1e6, 1e6)])[-1] == (
        True,
        False,
    ), "they are not counted either"


def test_memorised_losses_that_jitter_are_no_spikes_and_a_loss_from_nothing_is():
    memorised = [(1e-7 if n % 3 else 0.0, 1e-5) for n in range(WINDOW)]
    assert not any(spike for _, spike in judged([*memorised, (0.4, 0.9)]))
    assert judged([*memorised, (3.0, 0.9)])[-1][1]


@pytest.mark.parametrize(("height", "within"), [(1.5, 4), (10.0, 7), (1e6, 10), (1e300, 16)])
@pytest.mark.parametrize("column", [0, 1])
def test_a_new_level_is_accepted(height, within, column):
    """Spikes enter the window too, so that skipping them cannot go on for ever."""
    level = [2.0, 1.0]
    level[column] *= height if column == 0 else min(40.0 * height, 1e300)
    found = [spike for _, spike in judged([(2.0, 1.0)] * WINDOW + [tuple(level)] * WINDOW)[WINDOW:]]
    assert 1 <= sum(found) <= within
    assert not any(found[sum(found) :])


def test_a_spike_does_not_hide_the_next():
    found = judged([*quiet(WINDOW), (1e300, 1e300), *quiet(3, 1), (5.0, 1.0), *quiet(3, 2), (2.0, 1e6)])
    assert [n for n, (_, spike) in enumerate(found) if spike] == [WINDOW, WINDOW + 4, WINDOW + 8]


def _on_ranks(world, pairs):
    """Every rank's share of the losses goes in; decisions come out."""
    return judged([(shares[world.rank], norm) for shares, norm in pairs], world=world)


def test_two_ranks_decide_as_one():
    draw = random.Random(1)
    hostile = [(4.0, 1.0), (2.0, 100.0), (float("nan"), 1.0), (1e300, 1.0), (float("inf"), 1.0), (9.0, 1.0)]
    whole = [*quiet(150), *(pair for bad in hostile for pair in (bad, *quiet(6, 1)))]
    pairs = []
    for loss, norm in whole:
        part = draw.random() * 0.8
        pairs.append(
            (
                (
                    part * loss if np.isfinite(loss) else 1.0,
                    loss - part * loss if np.isfinite(loss) else loss,
                ),
                norm,
            )
        )
    first, second = run_ranks(_on_ranks, pairs)
    assert first == second
    assert first == judged(whole)
    assert sum(spike for _, spike in first) == 4


class Parts:
    """Parts of a run after 66 quiet updates."""

    def __init__(self, folder, **changes):
        self.parts = build(Config.of(runs.settings(folder, **{**LONG, **changes})))
        self.epoch = self.parts.plan.epoch(0, 0)
        self.steps(66)

    def steps(self, count):
        for n in range(count):
            train_step(self.parts, self.epoch[n % len(self.epoch)])
            self.parts.progress.updates += 1

    def spike(self):
        loss = self.parts.model.loss
        self.parts.model.loss = lambda row: [
            part * 1e4 if n == 0 else part for n, part in enumerate(loss(row))
        ]
        with SyncCounter() as syncs:
            self.steps(1)
        self.parts.model.loss = loss
        assert syncs.total == 0, syncs.found
        return self.parts.ledger.read()[-1]

    def state(self):
        moments = state_tensors(self.parts.optimizer)
        return [t.detach().clone() for t in (*self.parts.optimizer.names.values(), *moments.values())]


@pytest.mark.parametrize("policy", ["log", "skip"])
def test_a_skipped_spike_changes_nothing_and_a_logged_one_is_applied_without_a_read(policy, tmp_path):
    run = Parts(tmp_path, numbers__on_spike=policy)
    before, counted = run.state(), int(run.parts.ledger.epoch_totals().total.sum())
    record = run.spike()
    assert (record.spike, record.vetoed) == (True, policy == "skip")
    assert all(torch.equal(*pair) for pair in zip(before, run.state(), strict=True)) == (policy == "skip")
    assert (int(run.parts.ledger.epoch_totals().total.sum()) == counted) == (policy == "skip")
    assert float(run.parts.spikes.tensors()["window"][-1, 0]) > np.log(10.0), "it enters the window"


def test_log_says_loss_and_norm_and_samples_and_trains_as_if_nobody_looked(tmp_path, monkeypatch):
    found = spike_jobs.planted(runs.settings(tmp_path, **LONG), {68: 100.0})
    assert (found["spiked"], found["vetoed"], found["updates"]) == (1, 0, 72)
    (line,) = [line for line in runs.metrics(tmp_path, "update") if line.get("spike")]
    assert (line["update"], line.get("vetoed")) == (69, None)
    (note,) = [text for text in run_jobs.notes(tmp_path / "run") if "spike" in text]
    for part in (
        "update 69: a spike, applied: loss ",
        "6 deviations above the last",
        "gradient norm",
        "train.jsonl:",
    ):
        assert part in note
    monkeypatch.setattr("repsft_fast.training.spikes.KNOWN", 1000)  # nothing is ever judged
    blind = spike_jobs.planted(runs.settings(tmp_path / "blind", **LONG), {68: 100.0})
    assert (blind["spiked"], blind["weights"]) == (0, found["weights"])


def test_skip_counts_and_goes_on(tmp_path):
    found = spike_jobs.planted(
        runs.settings(tmp_path, numbers__on_spike="skip", **LONG), {68: 100.0, 70: 1e4}
    )
    assert (found["spiked"], found["vetoed"], found["updates"]) == (2, 0, 72)
    lines = [line for line in runs.metrics(tmp_path, "update") if line.get("spike")]
    assert [(line["update"], line["vetoed"]) for line in lines] == [(69, True), (71, True)]


def test_revert_passes_the_update_over_as_if_it_had_never_been(tmp_path, monkeypatch):
    settings = {**LONG, "numbers__on_spike": "revert", "log__every_updates": 2}
    found = spike_jobs.planted(runs.settings(tmp_path / "reverted", **settings), {67: 1e4}, stay=True)
    (line,) = runs.metrics(tmp_path / "reverted", "revert")
    assert (line["update"], line["passed_over"]) == (66, [[0, 22, 1]])
    assert (found["spiked"], found["updates"]) == (1, 72)
    monkeypatch.setattr(
        Recovery, "is_passed_over", lambda self, cursor: (cursor.epoch, cursor.update) == (22, 1)
    )
    never = spike_jobs.planted(runs.settings(tmp_path / "never", **settings))
    assert (never["weights"], never["made"]) == (found["weights"], found["made"] - 2)


def test_revert_accepts_a_new_level(tmp_path):
    """What spikes are judged by is not put back: the data became another, and the run goes on with it."""
    level = {str(n): 1e3 for n in range(68, 200)}
    settings = runs.settings(
        tmp_path, **{**LONG, "numbers__on_spike": "revert", "log__every_updates": 1, "budget__epochs": 27}
    )
    found = spike_jobs.planted(settings, level, stay=True)
    assert found["updates"] == 81
    assert 2 <= found["spiked"] <= 4


def test_a_state_gone_back_to_too_often_is_left_alone_and_spikes_are_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr("repsft_fast.training.recovery.MAX_REVERTS", 1)
    changes = {
        "samples": 48,
        "batch__samples": 4,
        "budget__epochs": 7,
        "numbers__on_spike": "revert",
        "log__every_updates": 1,
    }
    settings = runs.settings(tmp_path, **{**LONG, **changes})
    found = spike_jobs.planted(settings, {"73": 1e3, "76": 1e5, "79": 1e8}, stay=True)
    assert (len(runs.metrics(tmp_path, "revert")), found["spiked"], found["updates"]) == (1, 3, 84)
    assert sum("skipped: went back too often" in note for note in run_jobs.notes(tmp_path / "run")) == 2


@pytest.mark.parametrize(("policy", "ended"), [("skip", 68), ("revert", 64)])
def test_a_resumed_run_judges_as_the_whole_one(policy, ended, tmp_path):
    """The window and the count are state: ended before a spike or between two, the run decides the same and
    ends bit-equal."""
    changes = {**LONG, "numbers__on_spike": policy, "checkpoint__every_updates": 33, "log__every_updates": 1}
    spikes = {"65": 1e3, "69": 1e4}
    whole = spike_jobs.planted(runs.settings(tmp_path / "whole", **changes), spikes, stay=True)
    assert whole["spiked"] == 2
    settings = runs.settings(tmp_path / "resumed", **changes)
    with pytest.raises(RuntimeError, match="ended by the test"):
        spike_jobs.planted(settings, spikes, stay=True, end_after=ended)
    assert spike_jobs.planted(settings, spikes, stay=True, resume=True) == whole
    assert runs.metrics(tmp_path / "resumed", "resume")[0]["update"] == (66 if policy == "skip" else 33)


@pytest.mark.parametrize("policy", ["skip", pytest.param("revert", marks=pytest.mark.slow)])
def test_a_spike_of_one_rank_is_one_of_both(policy, server, tmp_path):
    """Planted on the second rank alone: both refuse the update, as the run of one rank does."""
    settings = runs.settings(tmp_path, **{**LONG, "numbers__on_spike": policy, "log__every_updates": 1})
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    children = []
    for rank in range(2):
        arguments = {"settings": settings, "spikes": {"67": 1e4} if rank else {}, "stay": True}
        children.append(
            server.spawn(
                "tests.helpers.spike_jobs:planted",
                arguments,
                {**place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
        )
    first, second = (child.wait(90) for child in children)
    assert first.exit_code == second.exit_code == 0, first.output + second.output
    assert first.result["spiked"] == second.result["spiked"] == 1
    settings = runs.settings(tmp_path / "alone", **{**LONG, "numbers__on_spike": policy})
    alone = spike_jobs.planted(settings, {"67": 1e4}, stay=True)
    assert (alone["spiked"], alone["updates"]) == (1, first.result["updates"])
    lines = [line["update"] for line in runs.metrics(tmp_path, "update") if line.get("spike")]
    assert (
        lines
        == [line["update"] for line in runs.metrics(tmp_path / "alone", "update") if line.get("spike")]
        == [68]
    )


PLAIN = {  # 0 alarms: 150 updates and more each
    "plain": {"samples": 96, "budget__epochs": 8},
    "repeated": {"samples": 24, "budget__epochs": 50},
    "memorised": {"samples": 24, "budget__epochs": 90, "optim__lr": 2e-3},
    "one sample": {"samples": 60, "batch__samples": 1, "budget__epochs": 5},
    "one sample, memorised": {"samples": 12, "batch__samples": 1, "budget__epochs": 40},
    "one sample, once": {"samples": 300, "batch__samples": 1, "budget__epochs": 1},
    "one sample by tokens": {"samples": 60, "batch__samples": 1, "budget__epochs": 5, "loss__average": "token"},
    "sixteen": {"samples": 160, "batch__samples": 16, "budget__epochs": 16},
    "whole set": {"samples": 8, "batch__samples": 8, "budget__epochs": 200},
    "sgd": {"samples": 96, "budget__epochs": 8, "optim__name": "sgd", "optim__lr": 0.1},
    "sgd, high": {"samples": 96, "budget__epochs": 8, "optim__name": "sgd", "optim__lr": 1.0},
    "adamw8bit": {"samples": 96, "budget__epochs": 8, "optim__name": "adamw8bit"},
    "lora": {"samples": 96, "budget__epochs": 8, "model__lora": {"rank": 4}},
    "by tokens": {"samples": 96, "budget__epochs": 8, "loss__average": "token"},
    "high": {"samples": 96, "budget__epochs": 8, "optim__lr": 0.1},
    "low": {"samples": 96, "budget__epochs": 8, "optim__lr": 1e-4},
    "cosine": {"samples": 96, "budget__epochs": 8, "schedule__name": "cosine"},
    "decay": {"samples": 96, "budget__epochs": 8, "schedule__name": "wsd"},
    "warm-up": {"samples": 96, "budget__epochs": 8, "optim__warmup_updates": 100, "optim__warmup_fraction": None},
    "unclipped": {"samples": 96, "budget__epochs": 8, "optim__max_norm": None},
    "learned rows left out": {"samples": 24, "budget__epochs": 50, "loss__skip_below": 0.1},
    "stages": {"samples": 400, "tasks": 3, "data__validation_fraction": 0.25, "mixture__policy": "msft",
               "mixture__metric": "nll", "mixture__max_stages": 4, "mixture__rule": "paper", "budget__epochs": 60},
}  # fmt: skip
assert len(PLAIN) >= 20


@pytest.mark.slow
@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_run_has_no_spike(name, tmp_path):
    settings = {"stop__token_accuracy": None, "schedule__name": "constant", **PLAIN[name]}
    found = spike_jobs.planted(runs.settings(tmp_path, **settings))
    assert found["made"] >= 150
    assert found["spiked"] == 0, run_jobs.notes(tmp_path / "run")


def test_it_stands_in_result_json(tmp_path):
    spike_jobs.planted(runs.settings(tmp_path, samples=4, budget__epochs=1))
    assert json.loads((tmp_path / "run" / "result.json").read_text())["more"]["spiked"] == 0


def test_a_checkpoint_of_before_there_were_spikes_is_loaded_and_the_window_left_as_it_is(tmp_path):
    """All of one's tensors may be missing, not some: that would be damage."""
    spikes = Spikes(CPU, ALONE, 1.0)
    live = {"w": torch.ones(2), **{f"spikes/{name}": tensor for name, tensor in spikes.tensors().items()}}
    old = checkpoint.save(tmp_path, 0, {"w": torch.full((2,), 3.0)}, {})
    checkpoint.load(old, live, may_lack=("spikes/",))
    assert (live["w"].tolist(), float(live["spikes/count"])) == ([3.0, 3.0], 0.0)
    with pytest.raises(checkpoint.ForeignCheckpoint, match="spikes/window"):
        checkpoint.load(old, live)
    some = checkpoint.save(
        tmp_path, 1, {"w": torch.ones(2), "spikes/count": torch.ones((), dtype=torch.float64)}, {}
    )
    with pytest.raises(checkpoint.ForeignCheckpoint, match="spikes/window"):
        checkpoint.load(some, live, may_lack=("spikes/",))
    new = checkpoint.save(tmp_path, 2, {**live, "spikes/count": torch.full((), 7.0, dtype=torch.float64)}, {})
    checkpoint.load(new, live, may_lack=("spikes/",))
    assert float(live["spikes/count"]) == 7.0


@pytest.mark.parametrize(("loss", "norm"), [(0.4473, 900.0), (900.0, 0.5), (900.0, 900.0)])
def test_only_the_side_that_is_above_is_said_to_be(loss, norm):
    judged = [1.0, *np.log([0.03114, 2.0, 810.6, 810.6])]
    record = SimpleNamespace(update=3, loss=loss, grad_norm=norm, judged=judged)
    refusals = Refusals(
        SimpleNamespace(config=SimpleNamespace(numbers=SimpleNamespace(on_spike="log"))), None
    )
    text = refusals._spike(record, None)
    for name, value, middle in (("loss", loss, "0.03114"), ("gradient norm", norm, "2")):
        above = (
            f"> 810.6, 6 deviations above the last updates' {middle}" if value == 900.0 else "(limit 810.6)"
        )
        assert f"{name} {value:.4g} {above}" in text
