"""Run a function on several gloo ranks, each a process of its own, and give back what each rank returned.

A fork server imports torch and transformers once; a rank then starts in a fraction of a second. The servers of
`tests/helpers/forkserver.py` are forked from it too, and so have what its jobs need.
"""

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    [
        "pytest", "torch", "torch.distributed.fsdp", "transformers.models.llama.modeling_llama", "peft",
        "peft.tuners.lora", "matplotlib.backends.backend_agg", "matplotlib.figure", "matplotlib.style",
        "numpy.ctypeslib", "safetensors.numpy", "torch.profiler._cupti_monitor", "repsft_fast.training.trainer",
        "tests.helpers.rank_jobs", "tests.helpers.spike_jobs", "tests.helpers.forked",
    ]
)  # fmt: skip


def run_ranks(
    function: Callable[..., Any], *arguments: Any, size: int = 2, timeout_s: float = 60.0
) -> list[Any]:
    """`function(world, *arguments)` on every rank. AssertionError with the traceback of a rank that failed or
    hung."""
    port = _free_port()
    pipes, processes = [], []
    for rank in range(size):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(
            target=_enter, args=(sender, rank, size, port, function, arguments), daemon=True
        )
        process.start()
        sender.close()
        pipes.append(receiver)
        processes.append(process)
    deadline = time.monotonic() + timeout_s
    try:
        answers = [_answer(pipe, rank, deadline) for rank, pipe in enumerate(pipes)]
    finally:
        for process in processes:
            process.join(max(0.0, min(5.0, deadline - time.monotonic())))
            process.kill()
    failures = [f"rank {rank}:\n{text}" for rank, (ok, text) in enumerate(answers) if not ok]
    assert not failures, "\n".join(failures)
    return [value for _, value in answers]


def _answer(pipe: Any, rank: int, deadline: float) -> tuple[bool, Any]:
    if not pipe.poll(max(0.0, deadline - time.monotonic())):
        return False, "no answer in time: it hangs"
    try:
        return pipe.recv()
    except EOFError:
        return False, "the process ended without an answer"


def _enter(
    sender: Any, rank: int, size: int, port: int, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    from repsft_fast import distributed

    torch.set_num_threads(1)
    place = {
        "RANK": rank,
        "WORLD_SIZE": size,
        "LOCAL_RANK": rank,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ.update({name: str(value) for name, value in place.items()})
    try:
        with distributed.lifecycle("cpu", timeout_s=30) as world:
            answer = function(world, *arguments)
            sender.send((True, answer))
    except BaseException:
        sender.send((False, traceback.format_exc()))


def leave_group() -> None:
    """Take down what a sharded model of this process has made: the group of one rank."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
