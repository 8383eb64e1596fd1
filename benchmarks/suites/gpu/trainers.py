"""Part E: other trainers beside ours. SmolLM2-135M and Qwen3-0.6B, random weights, the same samples for
everybody.

    ours                    16,384 tokens an update (batch.tokens) in rows of 8,192; every other setting is
                            the default
    trl                     TRL's SFTTrainer at its fastest: packing (bfd), bf16 autocast over fp32 weights as
                            it loads them, liger's layers, activations kept (its default recomputes them),
                            16,384 slots an update, the best attention that is there (`attentions`); left out
                            where one packed document sees another
    paper                   a loop in the style of paper A's code: bf16 weights, torch's fused AdamW, one
                            sample an update, full logits, fp32 copies and `.item()` for the metrics of every
                            update
    ours, one sample        ours at one sample an update: the same samples in the same order as the paper's
                            loop
    ours, compiled          ours with model.compile, rows padded to 8,192; `ours` is plain
    trl, bf16 weights       trl over weights loaded in bf16: less exact, and what many do

Samples: lengths log-uniform from 128 to 2,048 (mean 680), ids log-uniform over the vocabulary, the second
half trained. A sample's tokens are what a trainer reads of it: ours leaves its last one out, since nothing
follows it (0.15 % of them).

Each trainer is a process: all import at once, one at a time is told to go and is gone before the next one is.

    python -m benchmarks.suites.gpu.trainers KIND DEVICE
                            the process: imports, then a job a line, an answer a line
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import IO, Any

from benchmarks.harness.checkout import ROOT
from benchmarks.suites.gpu.goals import Found, Goal, Predict, Read
from benchmarks.suites.gpu.session import Session, die_with_parent, first_line
from benchmarks.suites.gpu.trainer_jobs import LONGEST, PER_UPDATE, ROW, SHORTEST, TOY_CUT, Job, do

OP = "trainer"
SIZES = ("Qwen3-0.6B", "SmolLM2-135M")
IMPORTS_S = 60.0  # until a process that imports is given up
KEPT = (  # of an answer, as they are
    "seconds", "updates", "tokens", "samples_per_update", "first_s", "reserved_bytes", "setting", "weights",
    "attention", "leak", "moved", "unchecked", "tried", "compiled_graphs", "versions",
)  # fmt: skip
OFFLINE = {
    "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
}  # fmt: skip


# Seconds assumed: 2 for CUDA and the model, 3 for ours' checks and Triton, 15 for flex attention's kernels,
# then 12 updates of 0.4 (ours) and 0.6 (TRL), or 32 of 0.1. The compiled form comes with part C's compiled
# layers on disk.
JOBS = (
    Job("ours", "Qwen3-0.6B", 13), Job("trl", "Qwen3-0.6B", 26), Job("paper", "Qwen3-0.6B", 8),
    Job("ours, one sample", "Qwen3-0.6B", 9), Job("ours", "SmolLM2-135M", 9), Job("trl", "SmolLM2-135M", 22),
    Job("paper", "SmolLM2-135M", 7), Job("ours, one sample", "SmolLM2-135M", 8),
    Job("ours, compiled", "Qwen3-0.6B", 25), Job("trl, bf16 weights", "Qwen3-0.6B", 18),
)  # fmt: skip
# checks that ours stands on; the others stand on nothing of ours
PROVED = ("train step", "head", "attention", "row kernel")


def run(session: Session) -> None:
    dtype = "bfloat16" if session.device == "cuda" else "float32"
    with processes(session, JOBS) as given_to:
        for job, process in zip(JOBS, given_to, strict=True):
            if job.kind == "ours" and session.blocked(
                job.what, *((operation, dtype) for operation in PROVED)
            ):
                continue
            if session.late(job.what, 2.0 if session.rehearsal else job.needs_s):
                continue
            with session.attempt(job.what):
                answer = process.do(job, session)
                if "error" in answer:
                    session.leave_out(job.what, answer["error"])
                else:
                    record(session, job, answer, dtype)


def record(session: Session, job: Job, answer: Mapping[str, Any], dtype: str) -> None:
    seconds, updates = answer["seconds"], answer["updates"]
    more = {f"{name}_per_s": answer[name] / seconds for name in ("tokens", "trained", "slots", "samples")}
    more |= {name: answer[name] for name in KEPT if name in answer}
    losses = answer["losses"]
    if len(losses) > 1:
        part = max(1, len(losses) // 4)
        first, last = statistics.mean(losses[:part]), statistics.mean(losses[-part:])
        more |= {"first_loss": first, "last_loss": last, "loss_fell": last < first}
    session.record(
        OP, job.implementation, answer["update_ms"], shape_of(job.model, toy=session.rehearsal), dtype=dtype,
        peak_bytes=answer["peak_bytes"], updates_per_s=updates / seconds,
        tokens_per_update=answer["tokens"] / updates, **more,
    )  # fmt: skip


def shape_of(model: str, *, toy: bool) -> dict[str, int | float | str]:
    cut = TOY_CUT if toy else 1
    lengths = f"{SHORTEST // cut}-{LONGEST // cut} log-uniform"
    return {"model": model, "lengths": lengths, "row_tokens": ROW // cut, "update_tokens": PER_UPDATE // cut}


# Processes ------------------------------------------------------------------------------------------------


def command_of(kind: str, device: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.suites.gpu.trainers", kind, device]


class Process:
    """A trainer's process. Started early, it imports while others train, and touches the device when it is
    told to go."""

    def __init__(self, kind: str, session: Session, hub: str):
        self.shared = session.rehearsal  # several jobs, since imports are most of a rehearsal's time
        self.child = subprocess.Popen(
            command_of(kind, session.device), cwd=ROOT, env={**os.environ, **OFFLINE, "HF_HOME": hub},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, preexec_fn=die_with_parent,
        )  # fmt: skip
        self.ready: dict[str, Any] | None = None
        self._read = b""

    def do(self, job: Job, session: Session) -> dict[str, Any]:
        """What the job answered, or {"error": why it did not}. The process is gone after it, unless it is
        shared."""
        try:
            if self.ready is None:
                self.ready = self._line(min(IMPORTS_S, session.left_s - 1), "it was still importing")
            if "error" in self.ready:
                return self.ready
            if self.child.poll() is not None:
                return self._ended()
            limit = max(1.0, min(session.left_s - 1.0, 2 * job.needs_s))
            order = {"job": dataclasses.asdict(job), "toy": session.rehearsal, "seconds": 0.7 * limit}
            assert self.child.stdin is not None
            try:
                self.child.stdin.write(json.dumps(order).encode() + b"\n")
                self.child.stdin.flush()
            except BrokenPipeError:
                return self._ended()
            return self._line(limit, "it was not done")
        finally:
            if not self.shared:
                self.close()

    def _line(self, limit_s: float, late: str) -> dict[str, Any]:
        """The next line, or an error. A process that is late is ended: what it would still say belongs to
        nothing."""
        assert self.child.stdout is not None
        ends = time.monotonic() + limit_s
        while b"\n" not in self._read:
            ready, _, _ = select.select([self.child.stdout], [], [], max(0.0, ends - time.monotonic()))
            if not ready:
                self.close()
                return {"error": f"{late} after {max(0.0, limit_s):.0f} s"}
            data = os.read(self.child.stdout.fileno(), 1 << 16)
            if not data:
                return self._ended()
            self._read += data
        line, _, self._read = self._read.partition(b"\n")
        return json.loads(line)

    def _ended(self) -> dict[str, Any]:
        """It answers no more."""
        with suppress(subprocess.TimeoutExpired):
            self.child.wait(5)
        if self.child.returncode is None:
            self.close()
        return {"error": f"its process ended with {self.child.returncode}; the log says why"}

    def close(self) -> None:
        """End it, however it stands; its memory on the device is free when this returns."""
        self.child.kill()
        self.child.wait()
        for pipe in (self.child.stdin, self.child.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()


@contextmanager
def processes(session: Session, jobs: Sequence[Job]) -> Iterator[list[Process]]:
    """A process for every job; in a rehearsal one for TRL's and one for all others."""
    with tempfile.TemporaryDirectory() as hub:
        made: list[Process] = []
        try:
            shared: dict[bool, Process] = {}
            for job in jobs:
                others = job.kind == "trl"
                if session.rehearsal and others in shared:
                    made.append(shared[others])
                else:
                    made.append(Process(job.kind, session, hub))
                    shared[others] = made[-1]
            yield made
        finally:
            for process in made:
                process.close()


def main(kind: str, device: str, answers: IO[str]) -> None:
    """The process: imports, says so, and then answers jobs. Nothing touches the device before the first
    one."""
    modules = [
        "transformers.models.qwen3.modeling_qwen3",
        "transformers.models.llama.modeling_llama",
        "benchmarks.suites.gpu.training",
    ]
    if kind == "trl":
        modules = ["trl.trainer.sft_trainer", "datasets", *modules]
    else:
        modules += ["repsft_fast.training.trainer"]
    if kind != "paper" and device == "cuda" and importlib.util.find_spec("liger_kernel"):
        modules += ["liger_kernel.transformers"]
    error = ""
    try:
        for module in modules:
            importlib.import_module(module)
    except Exception as failed:
        traceback.print_exc()
        error = f"{module} cannot be imported: {first_line(failed)}"
    print(json.dumps({"error": error} if error else {"ready": kind}), file=answers, flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        job = Job(**order["job"])
        try:
            answer = do(job, device, toy=order["toy"], ends=time.monotonic() + order["seconds"])
        except Exception as failed:
            traceback.print_exc()
            answer = {"error": first_line(failed)}
        print(json.dumps(answer), file=answers, flush=True)


# Goals ----------------------------------------------------------------------------------------------------


def rate(implementation: str, model: str) -> Read:
    return lambda found: found.value(OP, implementation, "tokens_per_s", model=model)


def over(a: str, b: str, model: str) -> Read:
    """Tokens a second of one trainer over another's."""

    def read(found: Found) -> float | None:
        ours, theirs = rate(a, model)(found), rate(b, model)(found)
        return None if ours is None or theirs is None else ours / theirs

    return read


# Layers not compiled: a row of 8,192 tokens in 178 ms (0.6B) and 54 ms (135M), from counted bytes, launches
# and products.
PREDICTED = {"Qwen3-0.6B": 46_000.0, "SmolLM2-135M": 152_000.0}


def predicted(model: str) -> Predict:
    return lambda card: card.of_kind(H100=PREDICTED[model])


GOALS = (
    *(
        goal
        for model in SIZES
        for goal in (
            Goal(f"ours / TRL, tokens/s, {model}", over("ours", "trl", model), least=1.5),
            Goal(f"ours / the paper's loop, tokens/s, {model}", over("ours", "paper", model)),
            Goal(
                f"ours / the paper's loop, same updates, {model}",
                over("ours, one sample", "paper", model),
                least=1.0,
            ),
            Goal(f"ours, tokens/s, {model}", rate("ours", model), predicted=predicted(model)),
            Goal(f"TRL, tokens/s, {model}", rate("trl", model)),
        )
    ),
    Goal("ours compiled / ours, tokens/s, Qwen3-0.6B", over("ours, compiled", "ours", "Qwen3-0.6B")),
    Goal(
        "ours / TRL with bf16 weights, tokens/s, Qwen3-0.6B", over("ours", "trl, bf16 weights", "Qwen3-0.6B")
    ),
)


if __name__ == "__main__":
    die_with_parent()
    said_to_parent = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to the log
    main(sys.argv[1], sys.argv[2], said_to_parent)
