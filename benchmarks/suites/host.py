"""What the host does in an update while a GPU would compute: ms of Python and launches, without a GPU.

    python -m benchmarks.suites.host [samples an update]

A Qwen3 of 28 layers and tiny tensors on a CPU, one sample an update unless told otherwise. What a GPU would
do is left out or tiny: decoder layers are really compiled (guards, autograd and all that torch does around a
graph), but by a backend whose graphs hand out tensors made before; the head's pass and the
optimizer's step are answers made before, and launches of the other Triton kernels (one a row, two an update)
do nothing, though all that leads to them is done: what Triton itself takes for a launch is left out. What
stays is what a GPU would wait for. An operation of
torch on a tiny tensor stands for a launch: 1–3 µs here, 3–5 µs with CUDA's own.

Times are the calling thread's on a core, the least of many updates: what else runs adds to the others.
`layers` are all 28 alone, forward and backward, under one autograd function (`models.compiled_stack`); `one
by one` as torch calls them by itself. What the empty graphs take to hand out tensors, `of layers`, is in all
these figures; no GPU would wait for it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from repsft_fast import stats
from repsft_fast.config import Config
from repsft_fast.data.plan import EpochPlan, Update
from repsft_fast.distributed import decoder_layers
from repsft_fast.models import compiled
from repsft_fast.models.compiled_stack import running
from repsft_fast.models.loss import hidden_states
from repsft_fast.ops import linear_cross_entropy
from repsft_fast.training import garbage, spikes, step
from repsft_fast.training.build import build
from repsft_fast.training.conductor import Conductor
from repsft_fast.training.parts import Parts
from repsft_fast.training.policy import build_policy, weights_are_enough
from repsft_fast.training.reporter import Reporter
from repsft_fast.training.snapshots import Snapshots, closed_list
from repsft_fast.training.step import train_step
from repsft_fast.training.warm_up import warm_up

LAYERS, SAMPLES, REPEATS = 28, 400, 400
MODEL = {
    "model_type": "qwen3", "vocab_size": 512, "hidden_size": 16, "intermediate_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 4096,
    "tie_word_embeddings": True, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def made(folder: str, per_update: int = 1) -> Parts:
    """The parts of a run over samples of 33–64 tokens, half of them trained; one row length."""
    draw = random.Random(0)
    data = Path(folder) / "train.jsonl"
    with data.open("w") as lines:
        for _ in range(SAMPLES):
            ids = [draw.randrange(3, 512) for _ in range(draw.randint(33, 64))]
            labels = [-100] * (len(ids) // 2) + ids[len(ids) // 2 :]
            lines.write(json.dumps({"input_ids": ids, "labels": labels}) + "\n")
    settings = {
        "run": {"folder": f"{folder}/run"},
        "model": {"config": MODEL},
        "data": {"train": str(data), "cache_folder": f"{folder}/cache"},
        "batch": {"samples": per_update, "row_tokens": 64 * per_update, "row_lengths": [64 * per_update]},
        "budget": {"updates": 1_000_000},
        "stop": {"token_accuracy": None},
    }
    parts = build(Config.of(settings))
    parts.folder.mkdir(parents=True, exist_ok=True)
    # of the ways a CPU has the one without a loop on the host, as the kernels of a GPU have none
    parts.model.loss_settings = dataclasses.replace(parts.model.loss_settings, attention="mask")
    return parts


def loop_of(parts: Parts) -> tuple[EpochPlan, Callable[[Update], None]]:
    """The epoch's plan, and one turn of the trainer's loop."""
    snapshots = Snapshots(parts, closed_list(parts), 0, weights_only=weights_are_enough(parts.config))
    conductor = Conductor(parts, Reporter(parts), build_policy(parts), snapshots)
    conductor.begin()
    epoch = parts.plan.epoch(0, 0)

    def turn(update: Update) -> None:
        train_step(parts, update)
        parts.step_done(update, len(epoch))
        parts.progress.update = 1  # never at the epoch's end
        conductor.after_update(update, len(epoch))

    return epoch, turn


EMPTY: list[Callable[[], Any]] = []  # the graphs of this process, forward and backward, as they are called


def hand_out(graph: Any, inputs: Any) -> Callable[[list], list]:
    """A compiler's answer: a graph that computes nothing and hands out tensors of the right shapes."""
    (outputs,) = (node.args[0] for node in graph.graph.nodes if node.op == "output")
    values = [getattr(output, "meta", {}).get("val") for output in outputs]
    shapes = [(tuple(v.shape), v.dtype) if isinstance(v, Tensor) else None for v in values]
    ready: list[Tensor | None] = []
    EMPTY.append(lambda: run([]))

    def run(given: list) -> list:
        given.clear()
        if not ready:  # not while it is compiled, where tensors are fake
            for shape in shapes:
                ready.append(
                    None if shape is None else torch.full(*shape[:1], _some(shape[1]), dtype=shape[1])
                )
        return [None if tensor is None else tensor.detach() for tensor in ready]

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def _some(dtype: torch.dtype) -> float | int:
    return 1e-3 if dtype.is_floating_point else 1


def compile_emptily(parts: Parts) -> None:
    """Each decoder layer through `models.compiled` and warmed as a run warms it, computing nothing."""
    from functorch.compile import min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd

    backend = aot_autograd(
        fw_compiler=hand_out, bw_compiler=hand_out, partition_fn=min_cut_rematerialization_partition
    )
    make, compare, opened = torch.compile, compiled._compare, compiled.opened
    torch.compile = lambda function, **_: make(function, backend=backend, dynamic=False)
    compiled.opened = lambda hidden, args, kwargs: kwargs  # one length: what is handed out has a size
    compiled._compare = lambda *_: None  # what is handed out is no layer's output
    try:
        compiled.compile_layers(parts.model, enabled=True)
        compiled.compiled_layers(parts.model).warm = set()
        warm_up(parts, lambda _: None)
    finally:
        torch.compile, compiled._compare, compiled.opened = make, compare, opened
    layers = compiled.compiled_layers(parts.model)
    assert layers.on
    assert not layers.stack.why, layers.stack.why


@contextlib.contextmanager
def layer_by_layer(model: Any) -> Iterator[None]:
    """Inside, every layer is called through torch's own way around its graph."""
    stack = compiled.compiled_layers(model).stack
    plans, stack._plans = stack._plans, {}
    try:
        yield
    finally:
        stack._plans = plans


@contextlib.contextmanager
def one_after_another(model: Any) -> Iterator[None]:
    """Inside, the model's loop calls every layer."""
    stack = compiled.compiled_layers(model).stack
    kept = [(plan, plan.at_once) for plan in stack._plans.values()]
    for plan, _ in kept:
        plan.at_once = None
    try:
        yield
    finally:
        for plan, at_once in kept:
            plan.at_once = at_once


@contextlib.contextmanager
def without_a_gpu(parts: Parts) -> Iterator[None]:
    """Inside, the head's pass and the optimizer's step are answers made before, statistics and judgements
    take the GPU's way, and no Triton kernel is launched."""
    passes, known = linear_cross_entropy.head_pass, {}

    def head(*arguments: Any, **more: Any) -> Any:
        shape = arguments[0].shape, arguments[4].shape
        if shape not in known:
            known[shape] = passes(*arguments, **more)
        loss, of_hidden, of_head, stats = known[shape]
        return loss.detach(), of_hidden.detach(), of_head.detach(), stats

    inner: Any = parts.optimizer.inner
    plain = inner.step
    linear_cross_entropy.head_pass = head  # type: ignore[assignment]
    inner.step = lambda *_: None
    launch, kernel, sums = JITFunction.run, parts.spikes._kernel, stats.kernel_sums
    parts.spikes._kernel = spikes._Kernel(parts.world.device)
    stats.kernel_sums = lambda _: True  # type: ignore[assignment]
    JITFunction.run = lambda *_, **__: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        linear_cross_entropy.head_pass, inner.step = passes, plain
        JITFunction.run = launch  # type: ignore[method-assign]
        parts.spikes._kernel, stats.kernel_sums = kernel, sums


def least_ms(call: Callable[[], Any]) -> float:
    best = float("inf")
    for _ in range(REPEATS):
        begun = time.thread_time()
        call()
        best = min(best, time.thread_time() - begun)
    return best * 1e3


def parts_of_an_update(parts: Parts, update: Update) -> dict[str, float]:
    """Least ms of what an update is made of; nothing of it is state of a run that goes on."""
    model, names = parts.model, parts.optimizer.names
    (row, *_) = parts.rows(update)
    found = {"rows": least_ms(lambda: list(parts.rows(update)))}

    # what layers are given, as the model hands it over
    layers, given = decoder_layers(model), []
    plain = [layer.forward for layer in layers]
    for layer in layers:
        layer.forward = lambda x, *args, **kwargs: given.append((args, kwargs)) or x
    hidden_states(model, row, "mask")
    found["model around the layers"] = least_ms(lambda: model.loss(row)[0].backward())
    for layer, forward in zip(layers, plain, strict=True):
        layer.forward = forward
    hidden = torch.zeros(1, row.tokens.shape[1], model.config.hidden_size, requires_grad=True)

    def layers_pass() -> None:
        with running(model):
            output = hidden
            for layer, (args, kwargs) in zip(layers, given, strict=False):
                output = layer(output, *args, **kwargs)
        output.backward(output.detach())
        parts.optimizer.zero_grad()

    found["gradients dropped"] = least_ms(parts.optimizer.zero_grad)
    found["layers"] = least_ms(layers_pass) - found["gradients dropped"]
    found["of layers, the empty graphs"] = LAYERS * sum(map(least_ms, EMPTY))
    with layer_by_layer(model):
        found["layers one by one"] = least_ms(layers_pass) - found["gradients dropped"]

    loss, found_of = model.loss(row)
    table = parts.ledger.open_table()
    found["statistics"] = least_ms(lambda: found_of.add_to(table, row.position_tasks))
    found["ledger"] = least_ms(lambda: parts.ledger.add(loss))
    for parameter in names.values():
        parameter.grad = torch.zeros_like(parameter)
    found["norm, clip, veto"] = least_ms(lambda: step.clip_and_veto(parts))
    _, clip, veto, *_ = step.clip_and_veto(parts)
    found["optimizer"] = least_ms(lambda: parts.optimizer.step(0.0, found_inf=veto, clip=clip))
    parts.optimizer.zero_grad()
    parts.ledger.drop_open()
    return found


def measure(per_update: int = 1) -> dict[str, float]:
    """Least ms of an update (`all`; and with layers called one by one) and of what it is made of."""
    with tempfile.TemporaryDirectory() as folder, garbage.kept_out():
        parts = made(folder, per_update)
        compile_emptily(parts)
        with without_a_gpu(parts), contextlib.redirect_stderr(io.StringIO()):
            epoch, turn = loop_of(parts)
            updates = list(epoch)
            for update in updates[:20]:
                turn(update)
            turns = itertools.cycle(updates)
            rounds: list[tuple[float, float]] = []
            for _ in range(2):
                together = least_ms(lambda: turn(next(turns)))
                with one_after_another(parts.model):
                    rounds.append((together, least_ms(lambda: turn(next(turns)))))
            found = dict(zip(("all", "all, each layer called"), map(min, *rounds), strict=True))
            with layer_by_layer(parts.model):
                found["all, layers one by one"] = least_ms(lambda: turn(next(turns)))
            return found | parts_of_an_update(parts, updates[0])


def main() -> None:
    torch.set_num_threads(1)
    for name, ms in measure(int(sys.argv[1]) if len(sys.argv) > 1 else 1).items():
        print(f"{name:28s} {ms:7.3f} ms")


if __name__ == "__main__":
    main()
