"""`repsft eval MODEL`: tasks answered, judged and counted; rows scored without generating; a base beside it."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from repsft_fast import distributed
from repsft_fast.commands import evaluate_models
from repsft_fast.config import Config
from repsft_fast.errors import ConfigError, describe
from repsft_fast.files import replace_file
from repsft_fast.rundir.lock import RunLock
from repsft_fast.suite.tasks import read_tasks
from repsft_fast.training.build import seed_everything
from repsft_fast.training.trainer import quiet_libraries

FILE = "results.json"
_OF_A_TASK = ("n", "temperature", "top_p", "max_tokens", "limit")


def evaluate(
    config: Config,
    of: str,
    *,
    rows: str | None = None,
    base: str | None = None,
    to: str | None = None,
    as_json: bool = False,
    **unsaid: Any,
) -> None:
    """Evaluate the model that `of` names and print its table. unsaid: n, temperature, top_p, max_tokens, limit
    of tasks whose settings do not say. Raises RepsftError."""
    quiet_libraries()
    config = with_unsaid(config, unsaid)
    if config.evaluate.tasks is None and rows is None:
        todo = "name a task: --tasks FILE, or --tasks reasoning-gym:chain_sum?size=50; or rows: --rows FILE"
        raise ConfigError(describe("--tasks", "nothing is asked", todo=todo))
    models = [evaluate_models.evaluated(of, config)]
    if base is not None:
        models.append(evaluate_models.base(base, of, config))
    seed_everything(config)
    tasks = read_tasks(config)
    folder = Path(to if to is not None else Path("evals") / _name(of))
    with distributed.lifecycle() as world, RunLock(folder) if world.is_main else nullcontext():
        found = {one.name: _one(one, tasks, rows, folder, world) for one in models}
        if world.is_main:
            results = _results(of, config, found, world)
            replace_file(folder / FILE, (json.dumps(results, indent=1, allow_nan=False) + "\n").encode(), FILE)
            _show(results, found, folder, as_json=as_json)
