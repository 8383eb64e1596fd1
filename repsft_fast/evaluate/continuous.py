"""Replies by transformers' continuous batching, in this process, on the weights that are trained.

Nothing is copied and nothing synchronised; what it leaves changed is put back (`evaluate.untouched`). Greedy
replies are those of one-by-one generation up to rounding. Sampled ones are drawn from one stream for all
requests: the same requests in the same order on the same machine give the same replies, and one reply alone
cannot be had again (our own loop can).
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, __version__

from repsft_fast import seeded
from repsft_fast.errors import ModelError, TrainingError, describe
from repsft_fast.evaluate import paged
from repsft_fast.evaluate.asked import Generation, Request, Sampling
from repsft_fast.evaluate.identity import PROBED_TOKENS, Scored
from repsft_fast.evaluate.untouched import configs_of, left_as_it_was
from repsft_fast.ops.attention import takes_grouped_heads

WHERE = "engine batching"
OWN_LOOP = "use our own loop"
PAGE_TOKENS = 256  # of the cache: transformers' own default
MOST_AT_ONCE = 1024  # requests in a batch: its default too
RESERVE_BYTES = 2 << 30  # of a GPU's free memory, left alone
HOST_SHARE = 0.5  # of the host memory that is available, at most


def serves(model: Any) -> str | None:
    """Why continuous batching cannot answer for this model; None where it can, as far as its configuration
    tells. What it does not tell the probe finds (`evaluate.identity`)."""
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        return "it runs on one rank, and there are several"
    if not is_known() or not hasattr(model, "init_continuous_batching"):
        return f"transformers {__version__} has no continuous batching, or another than the one known here"
    if getattr(model, "_cached_continuous_batching_manager", None) is not None:
        return "the model holds a manager of somebody else's"
    text = model.config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ()) - {"full_attention"}
    if kinds or getattr(text, "sliding_window", None) is not None:
        return f"its layers are not all of full attention ({', '.join(sorted(kinds)) or 'sliding window'})"
    if getattr(model, "_is_stateful", False) or getattr(text, "kv_lora_rank", None) is not None:
        return "its layers keep another state than keys and values"
    if not getattr(model, "_supports_attention_backend", False) or not _packs(model):
        return "its layers do not call transformers' attention interface"
    if getattr(model, "position_limit", None) is not None:
        return "it learned its positions one by one"
    rope = str(getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None))
    if "longrope" in rope or "dynamic" in rope:
        return "its rotary frequencies follow the longest request of a batch"
    return None


def is_known() -> bool:
    """Whether it hands the cache to the attention as `paged` takes it: releases differ."""
    try:
        from transformers.generation.continuous_batching.cache import PagedAttentionCache
    except ImportError:
        return False
    return "kwargs" in inspect.signature(PagedAttentionCache.update).parameters


def _packs(model: Any) -> bool:
    settings = getattr(model, "loss_settings", None)
    return settings is None or settings.packed


class Batching:
    """asked.Engine on a model of this process."""

    name = "batching"

    def __init__(self, model: Any):
        """ModelError where it cannot serve the model."""
        if why := serves(model):
            raise ModelError(describe(WHERE, f"cannot serve {type(model).__name__}: {why}", todo=OWN_LOOP))
        self._model = model

    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        *,
        end_ids: Sequence[int],
        on_reply: Callable[[Request, Generation], None],
    ) -> None:
        """Entropy is not known here: Generation.entropy is None.

        The stream of random numbers follows from sampling.seed and the list of (prompt, draw). ValueError for
        an empty prompt; TrainingError when the scheduler fails, or memory does not hold the longest request.
        """
        if any(len(request.ids) == 0 for request in requests):
            raise ValueError("requests: expected at least one token in each, got an empty prompt")
        if sampling.max_new_tokens < 1:  # transformers refuses it
            for request in requests:
                on_reply(request, Generation([], False))
            return
        ends = set(end_ids)

        def handed(number: int, output: Any) -> None:
            ids = list(output.generated_tokens)
            on_reply(requests[number], Generation(ids, bool(ids) and ids[-1] in ends))

        # Which replies are asked for is part of the key: further draws of the same prompts, or those that a
        # killed evaluation lacks, would else be the ones that are there already.
        asked = (number for request in requests for number in (request.prompt, request.draw))
        key = seeded.key_of("continuous batching", sampling.seed, *asked)
        self._run([request.ids for request in requests], sampling, end_ids, handed, key=key)

    def probe(self, prompts: Sequence[Sequence[int]]) -> list[Scored]:
        """Every prompt with a few greedy tokens behind it, and their log-probabilities (`identity`)."""
        found: dict[int, Scored] = {}

        def handed(number: int, output: Any) -> None:
            ids = (*prompts[number], *output.generated_tokens)
            found[number] = Scored(ids, tuple(output.logprobs))

        self._run(prompts, Sampling(max_new_tokens=PROBED_TOKENS), (), handed, logprobs=True)
        return [found[number] for number in range(len(prompts))]

    def _run(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        end_ids: Sequence[int],
        handed: Callable[[int, Any], None],
        *,
        key: int = 0,
        logprobs: bool = False,
    ) -> None:
        if not prompts:
            return
        # Compiled layers (static shapes) would be compiled anew for every length.
        with left_as_it_was(self._model), torch.compiler.set_stance("force_eager"):
            _switch_attention(self._model)
            with self._manager(prompts, sampling, end_ids, key, logprobs) as manager:
                for number, ids in enumerate(prompts):
                    manager.add_request(list(ids), request_id=str(number))
                # All are there before the first batch is made: which share one follows from the list alone.
                manager.start()
                _collect(manager, len(prompts), handed)

    @contextlib.contextmanager
    def _manager(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        end_ids: Sequence[int],
        key: int,
        logprobs: bool,
    ) -> Iterator[Any]:
        """A manager whose cache is made, and whose thread is gone at the end."""
        settings = _generation_settings(sampling, end_ids)
        options = _options(self._model, key, len(prompts), logprobs)
        pages = sorted(
            (-(-(len(ids) + sampling.max_new_tokens) // PAGE_TOKENS) for ids in prompts), reverse=True
        )
        manager = _with_cache(self._model, settings, options, sum(pages[:MOST_AT_ONCE]))
        try:
            held = manager.batch_processor.cache.num_blocks
            if held < pages[0]:
                wrong = f"its cache holds {held * PAGE_TOKENS:,} tokens, and a request may need more"
                todo = f"lower the limit of new tokens, or {OWN_LOOP}"
                raise TrainingError(describe(WHERE, wrong, expected=f"{pages[0] * PAGE_TOKENS:,}", todo=todo))
            yield manager
        finally:
            if manager.is_running():
                manager.stop(block=True, hard_stop=True)
            manager.batch_processor = None
            manager.destroy()


def _switch_attention(model: nn.Module) -> None:
    """To a name that the scheduler takes; ours, which training uses, is refused there."""
    weight = next(model.parameters())
    half = weight.dtype in (torch.bfloat16, torch.float16)
    name = paged.register() if half or not weight.is_cuda else "sdpa"
    takes_grouped_heads(weight.device)  # tried now: while a graph is captured nothing can be
    for config in configs_of(model):
        if config._attn_implementation_internal is not None:
            config._attn_implementation_internal = name


def _generation_settings(sampling: Sampling, end_ids: Sequence[int]) -> GenerationConfig:
    """Nothing of the model's own, which may hold a penalty or a top-k."""
    drawn = sampling.temperature > 0
    return GenerationConfig(
        do_sample=drawn,
        temperature=sampling.temperature if drawn else None,
        top_p=sampling.top_p if drawn else None,
        top_k=0 if drawn else None,
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=list(end_ids) or -1,  # -1: none
    )


def _options(model: Any, key: int, requests: int, logprobs: bool) -> Any:
    from transformers.generation import ContinuousBatchingConfig

    device = next(model.parameters()).device
    return ContinuousBatchingConfig(
        page_size=PAGE_TOKENS,
        max_memory_percent=_share(device),
        max_requests_per_batch=min(requests, MOST_AT_ONCE),
        return_logprobs=logprobs,
        seed=key % (1 << 63),
        # It would be taken from the net where the package is not there.
        auto_switch_to_flash=False,
        # It writes to the environment.
        disable_nccl_graph_mixing=False,
    )


def _share(device: torch.device) -> float:
    """Of what transformers calls free, the part it may plan with."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(device)[0]
        usable, of = free - RESERVE_BYTES, free
    else:
        import psutil

        memory = psutil.virtual_memory()
        usable, of = HOST_SHARE * memory.available, memory.total - psutil.Process().memory_info().rss
    if usable <= 0:
        todo = f"free memory on {device}, or {OWN_LOOP}"
        raise TrainingError(
            describe(WHERE, "there is no memory for its cache", got=f"{of:,} bytes free", todo=todo)
        )
    return min(1.0, usable / of)


def _with_cache(model: Any, settings: GenerationConfig, options: Any, pages: int) -> Any:
    """A manager with a cache of so many pages, or of as many as there is memory for."""
    for blocks in (pages, None):
        options.num_blocks = blocks
        manager = model.init_continuous_batching(settings, options)
        try:
            manager.warmup()
            return manager
        except (MemoryError, ValueError, torch.OutOfMemoryError) as error:
            why = str(error).partition("\n")[0]
            manager.destroy()
    todo = f"free memory, lower the limit of new tokens, or {OWN_LOOP}"
    raise TrainingError(describe(WHERE, f"memory does not hold its cache ({why})", todo=todo))


def _collect(manager: Any, count: int, handed: Callable[[int, Any], None]) -> None:
    """Every output as it comes."""
    while count:
        running = manager.is_running()  # before the look: what a dying thread still hands over is seen
        output = manager.get_result(timeout=1.0)
        if output is None and running:
            continue
        if output is None or output.error is not None:
            cause = output.error if output is not None else manager.background_thread_status.fatal_error
            wrong = f"its scheduler failed ({str(cause).partition(chr(10))[0] or 'no words'})"
            raise TrainingError(describe(WHERE, wrong, todo=OWN_LOOP))
        count -= 1
        handed(int(output.request_id), output)
