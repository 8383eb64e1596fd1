"""From settings to a policy: every setting arrives, and what is asked before a run needs no data."""

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from repsft_fast.config import Config
from repsft_fast.errors import ConfigError
from repsft_fast.memory.model_size import ModelSize
from repsft_fast.policies import (
    POLICIES,
    BaselineSettings,
    History,
    Msft,
    MsftSettings,
    NewStage,
    Saturation,
    SaturationSettings,
    Score,
    Stop,
)
from repsft_fast.signals import Signals
from repsft_fast.training.budget import mixture_epochs
from repsft_fast.training.build import build, model_on_meta
from repsft_fast.training.parts import Parts
from repsft_fast.training.policy import (
    accuracy_target,
    build_policy,
    device_snapshot_bytes,
    named_result,
    policy_of,
    snapshots_needed,
    weights_are_enough,
)
from repsft_fast.training.run import Run
from tests.helpers import runs

# A value of each that is no default
MSFT: dict[str, Any] = {
    "rule": "paper", "compute_budget": 2.5, "evaluations_per_epoch": 3, "max_stages": 7, "optimizer": "restore",
    "schedule": "rewind", "data": "rewind", "exclude_on": "saturation", "rehearsal": 0.25, "min_delta": 0.5,
    "patience": 5, "z": 1.5, "alpha": 0.25, "min_looks": 3, "pool": "tasks", "keep": "best",
}  # fmt: skip


def config_of(policy: str | None, stop: dict[str, Any] | None = None, **mixture: Any) -> Config:
    data = {"train": {"a": "x", "b": "y"}, "validation": "v"}
    ends = {"budget": {"updates": 30}} if policy is None else {"mixture": {"policy": policy, **mixture}}
    return Config.of(
        {"run": {"folder": "f"}, "model": {"path": "m"}, "data": data, "stop": stop or {}, **ends}
    )


def parts_of(config: Config, updates: int = 30, decays: bool = False) -> Parts:
    """As much of a run as its policy looks at: 30 samples of task a, 10 of b."""
    index = SimpleNamespace(tasks=np.repeat([0, 1], [30, 10]))
    made = SimpleNamespace(
        config=config,
        data=SimpleNamespace(task_names=("a", "b"), train=SimpleNamespace(index=index)),
        budget=SimpleNamespace(updates=updates),
        schedule=SimpleNamespace(decays_on_demand=decays),
        validation=object(),
    )
    return cast(Parts, made)


class TestSettings:
    def test_every_setting_of_msft_arrives(self):
        policy = build_policy(parts_of(config_of("msft", {"token_accuracy": 0.5}, **MSFT)))
        assert policy.settings == MsftSettings(**MSFT, token_accuracy=0.5)

    def test_the_rates_are_those_of_the_data(self):
        """Half of what is drawn is b, a quarter of the samples."""
        policy = build_policy(parts_of(config_of("msft", weights={"a": 1.0, "b": 1.0})))
        assert policy.settings.weights == {"a": 0.5 * 40 / 30, "b": 0.5 * 40 / 10}

    @pytest.mark.parametrize("name", [name for name in POLICIES if name != "msft"])
    def test_the_baselines_have_what_they_share(self, name):
        policy = build_policy(parts_of(config_of(name, compute_budget=2.5, evaluations_per_epoch=3)))
        assert type(policy) is POLICIES[name]
        assert policy.settings == BaselineSettings(compute_budget=2.5, evaluations_per_epoch=3)

    def test_without_a_mixture(self):
        stop = {"token_accuracy": 0.5, "plateau_epochs": 3, "plateau_min_delta": 0.25}
        policy = build_policy(parts_of(config_of(None, stop), updates=20, decays=False))
        assert type(policy) is Saturation
        assert policy.settings == SaturationSettings(**stop, budget_updates=20, decays=False)
        assert build_policy(parts_of(config_of(None, stop), decays=True)).settings.decays

    def test_what_cannot_be_used_is_refused(self):
        with pytest.raises(ConfigError, match=r"budget\.updates: leaves nothing to do"):
            build_policy(parts_of(config_of(None), updates=0))


class TestBeforeTheRun:
    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("msft", (17.5, "mixture.compute_budget 2.5 × max_stages 7")),
            ("sft_resets", (17.5, "mixture.compute_budget 2.5 × max_stages 7")),
            ("sft", (2.5, "mixture.compute_budget 2.5 × one run")),
            ("continual", (5.0, "mixture.compute_budget 2.5 × 2 tasks")),
            ("sro", (5.0, "mixture.compute_budget 2.5 × 2 runs")),
            ("soft_sro", (5.0, "mixture.compute_budget 2.5 × 2 runs")),
            ("ies", (2.5, "mixture.compute_budget 2.5 × one run")),
            ("dynamix", (2.5, "mixture.compute_budget 2.5 × one run")),
        ],
    )
    def test_how_long_it_lasts_at_most(self, name, expected):
        assert mixture_epochs(config_of(name, compute_budget=2.5, max_stages=7), 2) == expected

    def test_snapshots(self):
        def needed(name: str | None, **mixture: Any) -> int:
            parts = parts_of(config_of(name, **mixture))
            return snapshots_needed(parts, build_policy(parts))

        assert needed(None) == 0
        assert needed("sft") == 1
        assert needed("dynamix") == 2  # and the state before a probe
        assert needed("msft") == 3
        assert needed("msft", exclude_on="saturation") == 0
        assert needed("msft", exclude_on="saturation", keep="best") == 1
        assert needed("msft", keep="last") == 2

    def test_a_snapshot_is_weights_unless_the_optimizer_comes_back(self):
        assert weights_are_enough(config_of(None))
        assert weights_are_enough(config_of("msft"))
        assert not weights_are_enough(config_of("msft", optimizer="restore"))
        assert not weights_are_enough(config_of("dynamix"))

    def test_the_accuracy_that_decides(self):
        stop = {"token_accuracy": 0.5}
        assert accuracy_target(config_of(None, stop)) == 0.5
        assert accuracy_target(config_of(None, {"token_accuracy": None})) is None
        assert accuracy_target(config_of("msft", stop)) is None
        assert accuracy_target(config_of("msft", stop, exclude_on="saturation")) == 0.5
        assert accuracy_target(config_of("sft", stop)) is None

    def test_the_result_that_a_table_names(self):
        history = History.start([("a", 30), ("b", 10)])
        assert named_result(config_of("sft"), history) is None
        history.took(NewStage(None, ("a", "b")))
        for number, value in enumerate((0.1, 0.9, 0.2)):
            history.tick(number, number / 4, 0)
            history.evaluated(f"0.{number}", {"a": Score(value, 9), "b": Score(value, 9)})
        history.took(Stop("policy", "1 epoch is done"))
        assert named_result(config_of("sft"), history) == "0.1"
        assert named_result(config_of("msft"), history) == "0.1"
        assert named_result(config_of(None), history) is None

    def test_a_policy_without_data_is_the_runs_but_for_its_rates(self):
        policy = policy_of(config_of("msft", **MSFT, weights={"a": 3.0, "b": 1.0}))
        assert type(policy) is Msft
        assert policy.settings == MsftSettings(**MSFT)


MIXED = {"mixture__policy": "msft", "data__validation_fraction": 0.2}
SNAPSHOTS = {
    "none": {},
    "of the whole state": {**MIXED, "mixture__optimizer": "restore"},
    "of weights": {**MIXED, "mixture__optimizer": "reset"},
    "the best": {"evaluate__keep": "best", "evaluate__every_epochs": 1, "data__validation_fraction": 0.2},
    "to go back to, on the device": {"numbers__on_spike": "revert", "snapshot__device_bytes": 10**9},
    "for checkpoints, on the device": {"checkpoint__every_updates": 5, "snapshot__device_bytes": 10**9},
    "what few bytes hold": {**MIXED, "mixture__optimizer": "restore", "snapshot__device_bytes": 500_000},
}


@pytest.mark.parametrize("changes", SNAPSHOTS.values(), ids=SNAPSHOTS)
def test_bytes_of_snapshots_are_those_their_pools_take(changes, tmp_path):
    """On a CPU its memory is the device's, so the run's own pools say what is right."""
    disk = {"snapshot__disk_bytes": 10**9}  # for what the device has no room
    config = Config.of(runs.settings(tmp_path, tasks=3, samples=40, **{**disk, **changes}))
    run = Run.of(build(config), Signals())
    try:
        if config.snapshot.device_bytes is not None:
            run.snapshots.freeze().release()
        pools = [run.snapshots._policy, run.snapshots._best]
        if config.snapshot.device_bytes is not None:  # else in pinned memory, where there is a GPU
            pools.append(run.snapshots._whole)
        taken = sum(pool.plan.device * pool.bytes_each for pool in pools if pool is not None)
    finally:
        run.close()
    model = ModelSize.of(model_on_meta(config, None))
    found = device_snapshot_bytes(config, model, tasks=3, shards=1, room=10**12)
    assert found == pytest.approx(taken, rel=0.02), "but for what small tensors are rounded up to"
    assert (found == 0) == (not changes)


def test_snapshots_take_half_of_what_the_state_leaves(tmp_path):
    changes = SNAPSHOTS["of the whole state"]
    config = Config.of(runs.settings(tmp_path, tasks=3, samples=40, **changes))
    model = ModelSize.of(model_on_meta(config, None))
    held = model.held("adamw", tasks=3)
    state = held.weights + held.masters + held.moments

    def taken(room):
        return device_snapshot_bytes(config, model, tasks=3, shards=1, room=room)

    assert taken(state + 3 * held.snapshot) == held.snapshot
    assert taken(state + held.snapshot) == taken(0) == 0
