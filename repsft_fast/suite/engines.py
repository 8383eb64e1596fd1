"""Which engine answers, and that it holds the model's weights: each is probed before it is used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from repsft_fast.config import Config
from repsft_fast.distributed import World
from repsft_fast.errors import ConfigError, ModelError, RepsftError, describe
from repsft_fast.evaluate.asked import Engine
from repsft_fast.evaluate.continuous import Batching, serves
from repsft_fast.evaluate.decode import Loop
from repsft_fast.evaluate.identity import bound_of, check_engine, own_logprobs, probe_prompts
from repsft_fast.evaluate.vllm_child import VllmChild


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


def vllm_engine(model: Any, saved: Path, folder: Path, tokenizer: Any = None) -> Engine:
    """vLLM in a child process on the saved folder of this model, which probes it before its first reply.
    folder: of its requests, replies and log. Untried on a real engine."""
    prompts = probe_prompts(_vocabulary(model, tokenizer), special_ids(tokenizer))
    dtype = getattr(model, "compute_dtype", None) or next(model.parameters()).dtype
    return _ModelAside(
        VllmChild(
            saved,
            folder,
            probe=prompts,
            own=own_logprobs(model, prompts),
            bound=bound_of(model),
            arguments={"dtype": str(dtype).removeprefix("torch.")},
        ),
        model,
    )


class _ModelAside:
    """An engine in another process, which needs the GPU for itself: our model waits in host memory."""

    def __init__(self, engine: Engine, model: Any):
        self.name, self._engine, self._model = engine.name, engine, model

    def generate(self, *arguments: Any, **more: Any) -> None:
        """As the engine's."""
        device = next(self._model.parameters()).device
        if device.type == "cuda":
            self._model.to("cpu")
            torch.cuda.empty_cache()
        try:
            self._engine.generate(*arguments, **more)
        finally:
            self._model.to(device)


def probed(engine: Any, model: Any, tokenizer: Any) -> Any:
    """The engine, once it has given fixed prompts the log-probabilities that training computes. ModelError
    with both numbers where it has not."""
    check_engine(engine, model, special_ids(tokenizer))
    return engine


def _vocabulary(model: Any, tokenizer: Any) -> int:
    rows = int(model.get_input_embeddings().weight.shape[0])
    return rows if tokenizer is None else min(rows, len(tokenizer))


def special_ids(tokenizer: Any) -> set[int]:
    """What an engine may treat apart, so that no probe holds it."""
    return set(getattr(tokenizer, "all_special_ids", ()) or ())


def pad_of(tokenizer: Any) -> int:
    """What fills a batch up: it is masked, so any id will do."""
    return int(tokenizer.pad_token_id or 0)
