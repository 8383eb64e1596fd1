"""`repsft eval --rows`: what a model makes of rows of data, teacher-forced: nothing is generated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from repsft_fast.config import Config
from repsft_fast.config.loading import text_layer
from repsft_fast.data.store import TokenStore
from repsft_fast.distributed import World
from repsft_fast.errors import ConfigError
from repsft_fast.evaluate.teacher_forced import TeacherForced
from repsft_fast.training.build import check_vocabulary, vocabulary_of
from repsft_fast.training.evaluation import line_of
from repsft_fast.training.samples import apart_of, check_positions, load_data, row_bucket, rows_asked


def score_rows(config: Config, rows: str, model: Any, tokenizer: Any, world: World) -> dict[str, Any]:
    """Loss, token accuracy, entropy, top-1 probability, margin and exact match, over all rows and per task;
    JSON.

    rows: a source, a list or {task: source}, written as in YAML. One forward pass, 2·N·H·V FLOPs in the head
    for N trained tokens, whose logits are never kept. Every rank passes its share of the rows.
    """
    config = with_rows(config, rows)
    data = load_data(config, tokenizer, world.device, vocabulary_of(config, tokenizer))
    check_vocabulary(model, data)
    said = [*data.warnings, *check_positions(config, model, (data.train,))]
    scores = scorer_of(config, world)(data.train)(model)
    found = line_of(scores, data.task_names)
    dropped = dict(data.dropped)
    return {"samples": len(scores.samples), "dropped": dropped, "notes": said, **found}


def scorer_of(config: Config, world: World) -> Callable[[TokenStore], TeacherForced]:
    """Scores all samples of a store, dealt over the ranks in rows as the settings have them."""

    def scorer(store: TokenStore) -> TeacherForced:
        return TeacherForced(
            store,
            range(len(store.index)),
            row_tokens=max(rows_asked(config), int(store.index.lengths.max())),
            bucket_tokens=row_bucket(config, world.device),
            world=world,
            apart=apart_of(config),
        )

    return scorer


def with_rows(config: Config, rows: str) -> Config:
    """The settings with these rows in place of the training's, all of them. ConfigError for no sources."""
    sources = text_layer("--rows", {"data.train": rows}, {"data.train": "--rows"}).values["data"]["train"]
    whole = config.to_dict()
    others = {"validation": None, "test": None, "samples": None, "validation_fraction": 0.0}
    data = {**whole["data"], **others, "test_fraction": 0.0}
    if isinstance(sources, dict):
        data["task_column"] = None
    try:
        return Config.of({**whole, "data": data, "mixture": {}}, {"data.train": sources})
    except ConfigError as error:
        told = [problem.replace(" (overrides)", "") for problem in error.problems]
        raise ConfigError([problem.replace("data.train", "--rows") for problem in told]) from None
