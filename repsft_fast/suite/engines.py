"""Which engine answers, and that it holds the model's weights: each is probed before it is used."""

from __future__ import annotations

from typing import Any

from repsft_fast.config import Config
from repsft_fast.distributed import World
from repsft_fast.errors import ConfigError, ModelError, RepsftError, describe
from repsft_fast.evaluate.asked import Engine
from repsft_fast.evaluate.continuous import Batching, serves
from repsft_fast.evaluate.decode import Loop
from repsft_fast.evaluate.identity import check_engine


def engine_of(config: Config, model: Any, world: World, tokenizer: Any) -> tuple[Engine, list[str]]:
    """The engine of `evaluate.engine` in this process, probed, and what is to be said of the choice.
    ModelError for one that was asked for and cannot serve the model, or does not compute with its weights.

    Several ranks that hold parts of one model walk the same prompts in our own loop.
    """
    asked = config.evaluate.engine
    if asked == "vllm":
        todo = "use it on the saved model: repsft eval FOLDER --engine vllm"
        raise ConfigError(describe("evaluate.engine", "vllm runs on a saved folder alone", todo=todo))
    if asked == "batching" or (asked == "auto" and world.device.type == "cuda" and world.size == 1):
        why = serves(model)
        try:
            if why is None:
                return probed(Batching(model), model, tokenizer), []
        except RepsftError as error:
            if asked == "batching":
                raise
            why = str(error)
        if asked == "batching":
            wrong = f"batching cannot serve {type(model).__name__}: {why}"
            raise ModelError(describe("evaluate.engine", wrong, todo="set evaluate.engine: loop"))
        note = [f"evaluate.engine: auto is our own loop: {why}"]
    else:
        note = []
    loop = Loop(model, batch_size=config.evaluate.batch_replies, pad_id=pad_of(tokenizer))
    return probed(loop, model, tokenizer), note


def probed(engine: Any, model: Any, tokenizer: Any) -> Any:
    """The engine, once it has given fixed prompts the log-probabilities that training computes. ModelError
    with both numbers where it has not."""
    check_engine(engine, model, special_ids(tokenizer))
    return engine


def special_ids(tokenizer: Any) -> set[int]:
    """What an engine may treat apart, so that no probe holds it."""
    return set(getattr(tokenizer, "all_special_ids", ()) or ())


def pad_of(tokenizer: Any) -> int:
    """What fills a batch up: it is masked, so any id will do."""
    return int(tokenizer.pad_token_id or 0)
