"""Part V: how fast Qwen3-0.6B answers, by every engine that evaluates it.

Random weights, prompts of 128 random tokens, 256 new tokens each, nothing ends a reply: lengths are equal, so
the figures are of the engines and not of what a model says. Each engine passes the weight probe first; its
difference from the trainer's own log-probabilities is in its record. vLLM answers where its package is there.

Tokens a second predicted on an H100, counted: a step of 512 requests reads 1.2 GB of weights and, at 256
tokens a request on average, 15 GB of keys and values (28 layers, 8 heads of 128, bf16: 115 kB a token), 5.3
ms at 3 TB/s. The scheduler's Python and launches are more: published are 6,094 tokens/s for a model of this
size (transformers #48462). Our own loop, 64 replies a step of about 25 ms of launches: 2,500.
"""

from __future__ import annotations

import importlib.util
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.suites.gpu import step, training
from benchmarks.suites.gpu.goals import Card, Found, Goal
from benchmarks.suites.gpu.session import Session

MODEL, OP = "Qwen3-0.6B", "replies"
PROMPT, NEW, SEED = 128, 256, 0
REQUESTS = {"batching": 512, "loop": 64, "vllm": 512}
ROUNDS = 2  # the first of them makes what is made once
NEEDS_S = {"batching": 60.0, "loop": 25.0, "vllm": 150.0}
TOY_SIZES = (8, 6, 4)  # prompt, new tokens, requests


def run(session: Session) -> None:
    if step.blocked(session, "plain", "replies"):
        return
    with session.attempt("the model"):
        model = build(session)
        for engine in ("batching", "loop", "vllm"):
            if engine == "vllm" and importlib.util.find_spec("vllm") is None:
                session.leave_out("replies by vllm", "its package is not there")
            elif not session.late(f"replies by {engine}", 1.0 if session.rehearsal else NEEDS_S[engine]):
                with session.attempt(f"replies by {engine}"):
                    measure(session, model, engine)


def build(session: Session) -> Any:
    """Random weights, held in what is computed in: nothing trains."""
    from repsft_fast.models import load_model
    from repsft_fast.sizing.known_models import MODELS

    config = {**MODELS[MODEL], **(training.TOY if session.rehearsal else {})}
    dtype = torch.bfloat16 if session.device == "cuda" else torch.float32
    torch.manual_seed(SEED)
    return load_model(config, device=session.device, param_dtype=dtype).requires_grad_(False).eval()


def measure(session: Session, model: Any, name: str) -> None:
    from repsft_fast.evaluate.asked import Request, Sampling

    prompt, new, count = TOY_SIZES if session.rehearsal else (PROMPT, NEW, REQUESTS[name])
    draw = random.Random(SEED)
    vocabulary = model.config.vocab_size
    requests = [
        Request(number, 0, tuple(draw.randrange(vocabulary) for _ in range(prompt)))
        for number in range(count)
    ]
    with tempfile.TemporaryDirectory() as folder:
        engine, difference = probed(name, model, count, Path(folder))
        times, tokens = [], 0
        for _ in range(1 if name == "vllm" else ROUNDS):
            got: dict[int, int] = {}
            began = time.perf_counter()
            engine.generate(
                requests, Sampling(max_new_tokens=new), end_ids=(),
                on_reply=lambda request, reply, got=got: got.__setitem__(request.prompt, len(reply.ids)),
            )  # fmt: skip
            times.append(1e3 * (time.perf_counter() - began))
            tokens = sum(got.values())
            if tokens != count * new:
                raise RuntimeError(f"{tokens} tokens came, expected {count * new}")
    peak = torch.cuda.max_memory_allocated() if session.device == "cuda" else 0
    dtype = str(model.compute_dtype).rsplit(".", 1)[-1]
    session.record(
        OP, name, times[-1:], {"model": MODEL, "requests": count, "prompt": prompt, "new": new}, dtype=dtype,
        peak_bytes=peak, tokens_per_s=tokens / times[-1] * 1e3, first_ms=times[0], probe_nats=difference,
    )  # fmt: skip


def probed(name: str, model: Any, count: int, folder: Path) -> tuple[Any, float]:
    """The engine, once it has passed the probe, and the mean difference of a log-probability in nats. vLLM's
    child is probed by itself, before its first reply; 0 stands for it."""
    from repsft_fast.evaluate.continuous import Batching
    from repsft_fast.evaluate.decode import Loop
    from repsft_fast.evaluate.identity import check_engine
    from repsft_fast.models import save_pretrained
    from repsft_fast.suite.engines import vllm_engine

    if name == "vllm":
        save_pretrained(model, None, folder / "model")
        return vllm_engine(model, folder / "model", folder / "vllm"), 0.0
    engine: Any = Batching(model) if name == "batching" else Loop(model, batch_size=count)
    _, scatter = check_engine(engine, model)
    return engine, scatter


# What is known and expected -------------------------------------------------------------------------------


def _rate(engine: str) -> Callable[[Found], float | None]:
    return lambda found: found.value(OP, engine, "tokens_per_s", model=MODEL)


def _nats(engine: str) -> Callable[[Found], float | None]:
    return lambda found: found.value(OP, engine, "probe_nats", model=MODEL)


def _either(value: float) -> Callable[[Card], float | None]:
    return lambda card: card.of_kind(H100=value, H200=value)


GOALS = (
    Goal(
        f"{MODEL}: tokens/s by continuous batching", _rate("batching"), least=6000, predicted=_either(6094.0)
    ),
    Goal(f"{MODEL}: tokens/s by our loop, 64 replies", _rate("loop"), predicted=_either(2500.0)),
    Goal(f"{MODEL}: tokens/s by vLLM", _rate("vllm")),
    Goal("  probe of batching, nats a token", _nats("batching"), most=0.05),
    Goal("  probe of our loop, nats a token", _nats("loop"), most=0.05),
)
