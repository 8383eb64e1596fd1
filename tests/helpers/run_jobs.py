"""Whole runs as jobs of the fork server: killed at a chosen moment, resumed, and told apart by everything
they computed."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from repsft_fast import checkpoint
from repsft_fast.checkpoint.files import hash_bytes
from repsft_fast.distributed import held_parameters
from repsft_fast.state import state_hash
from repsft_fast.training import build as building
from repsft_fast.training import saver, trainer
from repsft_fast.training.snapshots import closed_list
from repsft_fast.training.step import OutOfMemory
from tests.helpers import run_points, runs, sketches

PRELOAD = [
    "torch", "transformers.models.llama.modeling_llama", "peft.tuners.lora",
    # what a run imports on its way
    "matplotlib.backends.backend_agg", "matplotlib.figure", "matplotlib.style", "numpy.ctypeslib", "safetensors.numpy",
    "torch.profiler._cupti_monitor", "tests.helpers.run_jobs",
]  # fmt: skip
sketches.install()  # of the server, and so of what it forks
# Lines of metrics.jsonl and what in them does not depend on the clock.
_KINDS = ("update", "epoch", "evaluation", "roll_back", "revert", "stage", "decision", "decay")
_OF_THE_CLOCK = (
    "seconds", "slots_per_second", "tokens_per_second", "trained_tokens_per_second", "model_flops_per_second", "mfu",
    "memory_bytes", "data_wait_fraction", "tokens", "trained_tokens", "slots", "text",
)  # fmt: skip

VALUE = "value:"


def train(
    settings: dict[str, Any],
    resume: bool = False,
    kill_after: int | None = None,
    kill_at: str | None = None,
    kill_time: int = 1,
    signal_at: str | None = None,
    passings: str | None = None,
    signal_after: int | None = None,
    number: int = signal.SIGTERM,
    forget: str | None = None,
    poison: tuple[int, ...] = (),
    full_after: int | None = None,
    full_at_end: bool = False,
    again: float | None = None,
    block_checkpoints: bool = False,
    fsdp: bool = False,
) -> dict[str, Any]:
    """Train. kill_after: SIGKILL after that many updates of this and all earlier processes; kill_at: at the
    kill_time-th passing of that crash point, of the checkpoint's or of run_points; signal_after: `number` to
    itself after that many updates; signal_at: at the kill_time-th passing of that point. again: the signal
    comes once more, so many seconds later. passings: a file for how often each of run_points was passed.
    forget: the item of the closed list that a resumed run does not put back. poison: after these many updates
    (of all branches) the next one's loss is NaN. full_after: after that many updates memory runs out in the
    next one, unless its rows are shorter than the settings'; full_at_end: it runs out in every pass once the
    run has ended. block_checkpoints: a file lies where their
    folder should be. fsdp: one rank by FSDP2 too.

    Returns the result and the hash of the closed list of state as it was when the loop ended.
    """
    found: dict[str, Any] = {}
    finish = trainer.finish
    building.ONE_RANK_FSDP = fsdp

    def at_the_end(run: Any) -> Any:
        found["hash"] = closed_list(run.parts).hash()
        table = run.conductor.history.values()
        found["history"] = hash_bytes(json.dumps(table, sort_keys=True).encode())
        if full_at_end:
            run.parts.model.model.layers[0].mlp.register_forward_hook(full)
        result = finish(run)
        weights = dict(held_parameters(run.parts.model))
        found["result_hash"] = state_hash(weights, {})  # the policy's choice or the best ones, put back
        return result

    def after_update(work: Any) -> None:
        random.random(), np.random.random()  # someone's code draws from these: they are on the list too
        if work.updates == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)
        if work.updates == signal_after:
            if block_checkpoints:
                Path(settings["run"]["folder"], "checkpoints").write_text("")
            os.kill(os.getpid(), number)
            if again is not None:
                time.sleep(again)
                os.kill(os.getpid(), number)

    passed: Counter[str] = Counter()

    def point(name: str) -> None:
        passed[name] += 1
        if name == (kill_at or signal_at) and passed[name] == kill_time:
            os.kill(os.getpid(), signal.SIGKILL if kill_at else number)

    if forget is not None:
        forgetting(forget)
    train_step = trainer.train_step

    def step(parts: Any, update: Any) -> None:
        spoilt = parts.lasting.all_work.updates in poison
        if parts.lasting.all_work.updates == full_after and parts.lasting.row_tokens is None:
            raise OutOfMemory(torch.OutOfMemoryError("out of memory"), torn=False)
        with runs.losses_not_finite(parts.model) if spoilt else nullcontext():
            train_step(parts, update)

    trainer.finish, trainer.train_step = at_the_end, step
    checkpoint.set_crash_hook(point)
    try:
        planned = passings is not None or {kill_at, signal_at} & set(run_points.POINTS)
        with run_points.planted(point) if planned else nullcontext():
            result = trainer.train(settings, resume=resume, on_update=after_update)
    finally:
        trainer.finish, trainer.train_step = finish, train_step
        checkpoint.set_crash_hook(None)
    assert result is not None
    if passings is not None:
        Path(passings).write_text(json.dumps({name: passed[name] for name in run_points.POINTS}))
    shown = (
        "code",
        "exit_code",
        "reason",
        "updates",
        "epochs",
        "token_accuracy",
        "loss",
        "tokens",
        "validation_loss",
        "tasks",
    )
    return {
        **found,
        **{name: getattr(result, name) for name in shown},
        "work": result.more["work"],
        "vetoed": result.more["vetoed"],
    }


def full(*_: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has …")


def command_line(settings: dict[str, Any], folder: str, signal_after: int = -1, resume: bool = False) -> None:
    """`repsft train --config …`, and a SIGTERM to itself after that many updates; exits as the command
    does."""
    from repsft_fast import cli

    build = trainer.build

    def listening(config: Any, **more: Any) -> Any:
        def after_update(work: Any) -> None:
            if work.updates == signal_after:
                os.kill(os.getpid(), signal.SIGTERM)

        return build(config, **{**more, "on_update": after_update})

    trainer.build = listening
    path = Path(folder) / "settings.yaml"
    path.write_text(json.dumps(settings))  # JSON is YAML
    sys.exit(cli.main(["train", "--config", str(path), *(["--resume"] if resume else [])]))


def forgetting(item: str) -> None:
    """From now on a load leaves this item as it finds it: a tensor's name, or a value's as
    `value:state|progress|update`."""
    load, load_values = checkpoint.load, saver.Saver.load

    def without_tensor(path: Any, tensors: Any, *, prefix: str = "", **more: Any) -> Any:
        found = {name: tensor for name, tensor in tensors.items() if prefix + name == item}
        before = {name: tensor.detach().clone() for name, tensor in found.items()}
        loaded = load(path, tensors, prefix=prefix, **more)
        for name, tensor in found.items():
            tensor.detach().copy_(before[name])
        return loaded

    def without_value(self: saver.Saver, values: dict[str, Any]) -> None:
        new = {"state": self.state.values(), "conductor": self.conductor.values()}
        *path, last = item.removeprefix(VALUE).split("|")
        at, fresh = values, new
        for key in path:
            at, fresh = at[key], fresh[key]
        at[last] = fresh[last]
        load_values(self, values)

    checkpoint.load = without_tensor
    if item.startswith(VALUE):
        saver.Saver.load = without_value


def lines(folder: str | Path) -> list[dict[str, Any]]:
    """What the run computed, in order, without what depends on the clock."""
    text = (Path(folder) / "metrics.jsonl").read_text()
    found = [json.loads(line) for line in text.splitlines()]
    return [
        {k: v for k, v in line.items() if k not in _OF_THE_CLOCK} for line in found if line["kind"] in _KINDS
    ]


def notes(folder: str | Path) -> list[str]:
    text = (Path(folder) / "metrics.jsonl").read_text()
    return [line["text"] for line in map(json.loads, text.splitlines()) if line["kind"] == "note"]
