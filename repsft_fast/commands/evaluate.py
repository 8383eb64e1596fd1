"""`repsft eval MODEL`: tasks answered, judged and counted; rows scored without generating; a base beside
it."""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from repsft_fast import distributed
from repsft_fast.commands import evaluate_models, evaluate_rows, evaluate_table
from repsft_fast.commands.evaluate_models import Evaluated
from repsft_fast.commands.evaluate_progress import Progress
from repsft_fast.config import Config
from repsft_fast.distributed import World
from repsft_fast.errors import ConfigError, describe
from repsft_fast.evaluate.asked import Engine
from repsft_fast.evaluate.judging import Judge
from repsft_fast.evaluate.lm_harness import run_lm_eval
from repsft_fast.evaluate.scores import difference
from repsft_fast.files import replace_file
from repsft_fast.models import stops_of
from repsft_fast.report import visible
from repsft_fast.rundir.identity import base_of
from repsft_fast.rundir.lock import RunLock
from repsft_fast.suite.engines import engine_of, vllm_engine
from repsft_fast.suite.evaluation import Under
from repsft_fast.suite.results import TaskResult, result_of_task
from repsft_fast.suite.tasks import Tasks, asked_of, digest, other_form, read_tasks
from repsft_fast.training import attention
from repsft_fast.training.build import seed_everything, versions
from repsft_fast.training.samples import rows_asked
from repsft_fast.training.trainer import quiet_libraries

FILE = "results.json"
_SETTINGS = {"replies": "n"}  # flags whose setting has another name


def evaluate(
    config: Config,
    of: str,
    *,
    rows: str | None = None,
    base: str | None = None,
    to: str | None = None,
    as_json: bool = False,
    **given: Any,
) -> None:
    """Evaluate the model that `of` names, print its table and keep results.json and every reply in a folder.

    base: a second model, or auto. to: the folder; None: below evals/. given: replies, temperature,
    top_p, max_tokens and limit of every task. Raises RepsftError.
    """
    quiet_libraries()
    config = with_flags(config, given)
    if config.evaluate.tasks is None and rows is None:
        todo = "name a task: --tasks FILE, or --tasks reasoning-gym:chain_sum?size=50; or rows: --rows FILE"
        raise ConfigError(describe("--tasks", "nothing is asked", todo=todo))
    models = [evaluate_models.evaluated(of, config)]
    if base is not None:
        models.append(evaluate_models.base(base, of, config))
    tasks = read_tasks(config)
    folder = Path(to if to is not None else Path("evals") / name_of(of))
    with distributed.lifecycle() as world:
        with distributed.raise_together(world):
            lock = RunLock(folder) if world.is_main else nullcontext()
        with lock:
            seed_everything(config)
            found = {one.name: _one(one, tasks, rows, folder, world) for one in models}
            if world.is_main:
                results = _results(of, base, found, world)
                text = json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
                replace_file(folder / FILE, text.encode(), FILE)
                _show(results, found, folder, as_json=as_json)


def with_flags(config: Config, given: Mapping[str, Any]) -> Config:
    """The settings, with these values of every task: flags win. ConfigError for what cannot be."""
    changes = {_SETTINGS.get(name, name): value for name, value in given.items() if value is not None}
    if not changes or config.evaluate.tasks is None:
        return config
    tasks = {
        name: {**settings.model_dump(mode="json"), **changes}
        for name, settings in config.evaluate.tasks.items()
    }
    try:
        return Config.of(config, {"evaluate.tasks": tasks})
    except ConfigError as error:
        raise ConfigError([problem.replace(" (overrides)", "") for problem in error.problems]) from None


def name_of(of: str) -> str:
    """What the folder of a model's results is called.

    >>> name_of("runs/smollm2/"), name_of("owner/name"), name_of("package:llm/x.Q4.gguf")
    ('smollm2', 'name', 'x.Q4.gguf')
    """
    return of.rstrip("/").rpartition("/")[2].rpartition(":")[2] or "model"


@dataclass(frozen=True)
class _Of:
    """What one model made of everything."""

    said: dict[str, Any]  # as JSON
    results: list[TaskResult]
    rows: dict[str, Any] | None


def _one(one: Evaluated, tasks: Tasks, rows: str | None, folder: Path, world: World) -> _Of:
    """Everything that is asked of one model. Its memory is free afterwards."""
    config = one.config
    with distributed.raise_together(world):
        tokenizer = one.tokenizer()
        asked, said = asked_of(tasks, tokenizer, config)
        if one.learned:
            said += other_form(asked, one.learned, tokenizer)
        (folder / one.name).mkdir(parents=True, exist_ok=True)
    distributed.same_everywhere(world, "--tasks", digest(asked))
    alone = World(0, 1, world.local_rank, world.device)  # each rank holds the whole model
    model = one.load(alone, tokenizer)
    notes = [*tasks.notes, *said, *getattr(tokenizer, "load_said", ()), *model.load_said]
    backend, more = attention.decide(config, world, model)
    attention.set_attention(model, backend)
    notes += more
    told: dict[str, Any] = {"model": config.model.path, "digests": base_of(model, config, alone)}
    results: list[TaskResult] = []
    if asked:
        engine, more = _engine(one, model, tokenizer, folder, world)
        notes += more
        told["engine"] = engine.name
        ends = {*stops_of(model), tokenizer.eos_token_id} - {None}
        under = Under(
            model, tokenizer, engine, world, tuple(sorted(ends)), rows_asked(config), config.batch.pack,
            evaluate_rows.scorer_of(config, world), folder / one.name, told["digests"], shared=True,
        )  # fmt: skip
        trusted = config.model.trust_remote_code
        judging = Judge(note=notes.append) if world.is_main else nullcontext()
        with judging as judge, Progress(world.is_main) as progress:
            for task in asked:
                share = len(task.requests((world.rank, world.size)))
                progress.begin(f"{one.name}: {task.task.name}", share)
                results.append(result_of_task(under, task, judge, trusted=trusted, told=progress.told))
        told["tasks"] = {result.task.name: result.as_json() for result in results}
    if tasks.harness:
        told["lm_eval"] = _by_harness(tasks, config, model, tokenizer)
    if rows is not None:
        told["rows"] = evaluate_rows.score_rows(config, rows, model, tokenizer, world)
    told["notes"] = list(dict.fromkeys(notes))
    del model
    gc.collect()
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
    return _Of(told, results, told.get("rows"))


def _engine(
    one: Evaluated, model: Any, tokenizer: Any, folder: Path, world: World
) -> tuple[Engine, list[str]]:
    config = one.config
    alone = World(0, 1, world.local_rank, world.device)
    if config.evaluate.engine != "vllm":
        return engine_of(config, model, alone, tokenizer)
    saved = Path(config.model.path or "")
    where = "evaluate.engine"
    if world.size > 1:
        wrong, todo = "vllm is asked by one process", "start one process: the engine uses the GPUs itself"
        raise ConfigError(describe(where, wrong, got=f"{world.size} ranks", todo=todo))
    if not (saved / "config.json").exists() or config.model.lora is not None:
        wrong, todo = (
            "vllm reads a saved model's folder",
            "save the model whole, or set evaluate.engine: auto",
        )
        raise ConfigError(describe(where, wrong, got=config.model.path, todo=todo))
    said = "evaluate.engine: vllm was never tried on a real engine by this package; read some of its replies"
    return vllm_engine(model, saved, folder / one.name / "vllm", tokenizer), [said]


def _by_harness(tasks: Tasks, config: Config, model: Any, tokenizer: Any) -> dict[str, Any]:
    """lm-eval's own tasks, each by itself: their limits may differ."""
    found = {}
    for name, settings in tasks.harness.items():
        where, size = f"evaluate.tasks [{name}]", config.evaluate.batch_replies
        found[name] = run_lm_eval(
            model, tokenizer, [settings.source], limit=settings.limit, batch_size=size, where=where
        )
    return found


def _results(of: str, base: str | None, found: Mapping[str, _Of], world: World) -> dict[str, Any]:
    """results.json."""
    results: dict[str, Any] = {
        "evaluated": of,
        "base": base,
        "versions": versions(world.device),
        "ranks": world.size,
        **{name: one.said for name, one in found.items()},
    }
    if "base" in found:
        pairs = zip(found["model"].results, found["base"].results, strict=True)
        results["differences"] = {
            mine.task.name: vars(difference(theirs.problems, mine.problems)) for mine, theirs in pairs
        }
    return results


def _show(results: Mapping[str, Any], found: Mapping[str, _Of], folder: Path, *, as_json: bool) -> None:
    console = visible.console()
    if as_json:
        visible.show(console, json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False))
        return
    for one in found.values():
        for text in one.said["notes"]:
            visible.show(console, visible.one_line(text), "yellow")
    lines = evaluate_table.lines_of(
        {name: one.results for name, one in found.items()}, {name: one.rows for name, one in found.items()}
    )
    for name, one in found.items():
        lines += evaluate_table.harness_lines(one.said.get("lm_eval", {}), name if len(found) > 1 else "")
    for line in [*lines, "", f"→ {folder}"]:
        visible.show(console, line)
