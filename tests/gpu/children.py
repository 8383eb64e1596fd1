"""Processes beside the tests on a GPU: what must be one of its own, and kernels that are compiled before they
are asked for.

    python -m tests.gpu.children updates FOLDER    50 updates, to be compared with the same under another
                                                   CUDA_LAUNCH_BLOCKING
    python -m tests.gpu.children compiled FOLDER   compiled layers beside plain ones: half a minute of compiling,
                                                   all told
    python -m tests.gpu.children rows bfloat16     every variant of a kernel that the tests launch, once, on one
                                                   row

They begin when the session does; a test that needs one waits for it. Kernels land in Triton's cache on disk:
where such a child fails or is late, the test compiles what it needs itself.
"""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
UPDATES = 50
WAIT_S = 25.0  # beyond the time that the other tests took
# By the name of the fixture that asks for it: the function below, and what its environment is changed by.
JOBS = {"blocked": ("updates", {"CUDA_LAUNCH_BLOCKING": "1"}), "compiled": ("compiled", {})}
# By the test file: functions below, a child each.
KERNELS = {
    "row_kernel": [("rows", "bfloat16"), ("rows", "float16"), ("rows", "float32")],
    "kept_rows": [("kept", "bfloat16"), ("kept", "float32")],
    "adamw8bit": [("adamw8bit", "bfloat16"), ("adamw8bit", "float32")],
}
DEVICE = torch.device("cuda")
VOCABULARIES = (1_000, 4_097, 151_936)  # a block, an odd one, one that Triton knows to be divisible by 16


class Started:
    """Children with their output in files. A failed one is told by `result`, in its own last words."""

    def __init__(self, folder: Path, jobs: set[str], kernels: set[str]):
        self.folder = folder
        self._children: dict[str, subprocess.Popen] = {}
        for name in sorted(jobs):
            function, changes = JOBS[name]
            self._start(name, [function, str(folder / name)], changes)
        for stem in sorted(kernels):
            for arguments in KERNELS[stem]:
                self._start(" ".join(arguments), list(arguments), {})

    def _start(self, name: str, arguments: list[str], changes: dict[str, str]) -> None:
        environment = {key: value for key, value in os.environ.items() if key != "REPSFT_CHECKS"}
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment |= changes | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
        with self._file(name, "out").open("w") as out, self._file(name, "err").open("w") as err:
            command = [sys.executable, "-m", "tests.gpu.children", *arguments]
            options: dict[str, Any] = {"env": environment, "preexec_fn": _end_with_parent}
            self._children[name] = subprocess.Popen(command, stdout=out, stderr=err, **options)

    def _file(self, name: str, kind: str) -> Path:
        return self.folder / f"{name.replace(' ', '-')}.{kind}"

    def result(self, name: str) -> Any:
        """What the child's function returned; waits for it."""
        try:
            code = self._children[name].wait(WAIT_S)
        except subprocess.TimeoutExpired:
            code = f"nothing after {WAIT_S:g} s"
        said = self._file(name, "err").read_text()[-2000:]
        assert code == 0, f"the child {name} ended with {code}: {said.strip().splitlines()[-1:]}\n{said}"
        return json.loads(self._file(name, "out").read_text().splitlines()[-1])

    def close(self) -> None:
        for child in self._children.values():
            if child.poll() is None:
                child.kill()
                child.wait()


def _end_with_parent() -> None:
    """A session that is killed leaves nobody on the GPU (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def updates(folder: Path, count: int = UPDATES) -> dict[str, Any]:
    """Losses and the state's hash after `count` deterministic updates with 8-bit moments, whose kernel takes
    raw addresses."""
    from tests.gpu import small_runs

    parts = small_runs.parts_of(Path(folder), optim__name="adamw8bit")
    small_runs.steps(parts, count)
    return {"losses": small_runs.losses(parts), "hash": small_runs.state_of(parts)}


def compiled(folder: Path) -> dict[str, Any]:
    """Relative errors of all gradients of one row against fp32, plain and compiled, and the graphs that were
    made by then and after three updates of the same shapes."""
    from torch._dynamo.utils import counters

    from repsft_fast.training.step import forward_backward, train_step
    from repsft_fast.training.warm_up import warm_up
    from tests.gpu import small_runs

    def made(name: str, **changes: Any):
        model = small_runs.MODEL | {"num_hidden_layers": 1}
        changes |= {"batch__row_lengths": [64], "run__deterministic": False}
        return small_runs.parts_of(Path(folder) / name, model__config=model, **changes)

    def gradients(parts: Any) -> torch.Tensor:
        forward_backward(parts, small_runs.updates_of(parts)[0])
        found = torch.cat([gradient.flatten() for gradient in small_runs.gradients_of(parts).values()])
        parts.optimizer.zero_grad()
        parts.ledger.drop_open()
        return found

    truth = gradients(made("truth", model__compute_dtype="float32"))
    plain = gradients(made("plain"))
    parts, said = made("compiled", model__compile=True), []
    warm_up(parts, said.append)
    first = counters["stats"]["unique_graphs"]
    ours = gradients(parts)
    for _ in range(3):
        train_step(parts, small_runs.updates_of(parts)[0])
    return {
        "plain": float((plain - truth).norm() / truth.norm()),
        "compiled": float((ours - truth).norm() / truth.norm()),
        "graphs": first,
        "said": said,
        "graphs_later": counters["stats"]["unique_graphs"],
        "losses": small_runs.losses(parts),
    }


def rows(dtype: str) -> None:
    """The row kernel of every vocabulary, capped or not, with its gradient; and that of an evaluation."""
    from csrc_triton.cross_entropy import cross_entropy_rows_fwd
    from repsft_fast.ops.row_pass import padded_logits

    cases = [(vocabulary, softcap, True) for vocabulary in VOCABULARIES for softcap in (None, 6.0)]
    for vocabulary, softcap, gradient in [*cases, (VOCABULARIES[0], None, False)]:
        logits = padded_logits(1, vocabulary, getattr(torch, dtype), DEVICE).zero_()
        targets, weights = torch.zeros(1, dtype=torch.int64, device=DEVICE), torch.ones(1, device=DEVICE)
        table, flags = torch.zeros(5, 1, device=DEVICE), torch.zeros(2, 1, dtype=torch.uint8, device=DEVICE)
        cross_entropy_rows_fwd(logits, targets, weights, table, flags, 0, gradient=gradient, softcap=softcap)


def kept(dtype: str) -> None:
    """Both products of the rows beyond the capacity."""
    from csrc_triton.kept_rows import kept_head, kept_hidden
    from repsft_fast.ops.row_pass import padded_logits

    gradient = padded_logits(4, 1000, getattr(torch, dtype), DEVICE).zero_()
    head, hidden = gradient.new_zeros(1000, 64), gradient.new_zeros(4, 64)
    order, count = torch.arange(4, device=DEVICE), torch.tensor([4], device=DEVICE)
    kept_hidden(gradient, head, order, count, 1, hidden)
    kept_head(gradient, hidden, order, count, 1, torch.zeros(1000, 64, device=DEVICE))


def adamw8bit(dtype: str) -> None:
    """Moments of 8 and of 32 bits, sizes that take wide accesses and that do not, contracted or not."""
    from tests.helpers.adamw_sides import ODD, SHAPES, Sides, contraction, gradients

    kind = getattr(torch, dtype)
    for shapes, contracted in ((SHAPES, True), (SHAPES, False), (ODD, True), (ODD, False)):
        with contraction(contracted):
            Sides(shapes, kind, DEVICE).kernel(1, gradients(shapes, kind, 1))


def main(function: str, *arguments: str) -> None:
    began = time.perf_counter()
    result = globals()[function](*arguments)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    print(f"{function}: {time.perf_counter() - began:.1f} s", file=sys.stderr)
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
