"""How the tests of this folder are run, ordered and told: `python -m pytest tests/gpu -m gpu`, in one
process.

REPSFT_CHECKS names a file: one JSON line per finished test, written at once, says what was to be proved and
how it went. A CUDA error that leaves the process unusable ends the session: what follows is "not run", and no
failure of its own.
"""

import json
import os
from pathlib import Path

# Before CUDA starts: torch looks once, at its first product, whether this allows deterministic ones.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch
import torch.distributed

from tests.gpu import children
from tests.gpu.places import DTYPES, INTERPRETED, OPERATIONS, Place

HERE = Path(__file__).parent
WORDS = 300  # characters of a failure that are told
# Cheap and fundamental first, and what needs few kernels of ours: the others are compiled meanwhile. Last
# what waits.
ORDER = (
    "hash", "attention", "snapshots", "rows", "update", "row_kernel", "kept_rows", "head", "adamw", "adamw8bit",
    "equal_runs", "compiled", "graphs", "telling",
)  # fmt: skip
PREFIX = "test_gpu_"
_PHASES = pytest.StashKey[list]()


def pytest_collection_modifyitems(items):
    """This folder's order, in the places its tests have among all. A test with a place must say what it
    proves."""
    numbers = [number for number, item in enumerate(items) if item.path.parent == HERE]
    for item in (items[number] for number in numbers):
        proves = [mark.args for mark in item.iter_markers("proves")]
        known = all(len(args) == 2 and args[0] in OPERATIONS and args[1] in DTYPES for args in proves)
        if (
            not known
            or bool(proves) != ("place" in item.fixturenames)
            or item.path.stem.removeprefix(PREFIX) not in ORDER
        ):
            raise pytest.UsageError(
                f"{item.nodeid}: expected a file of ORDER and proves(operation, dtype), got {proves}"
            )
    ours = sorted(
        (items[number] for number in numbers),
        key=lambda item: ORDER.index(item.path.stem.removeprefix(PREFIX)),
    )
    for number, item in zip(numbers, ours, strict=True):
        items[number] = item


@pytest.fixture
def place(request, monkeypatch) -> Place:
    if request.param == "interpreter":
        from tests.helpers.interpreter import interpret

        interpret(monkeypatch, *INTERPRETED)
    return Place(request.param)


@pytest.fixture(autouse=True)
def as_found(request):
    """No test leaves a mode or a group behind for the next, and its kernels are waited for: their errors are
    its own."""
    grouped = torch.distributed.is_initialized()
    yield
    if torch.are_deterministic_algorithms_enabled():  # asked first: switching imports the whole of Inductor
        torch.use_deterministic_algorithms(False)
    if _on_gpu(request.node):
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    elif torch.distributed.is_initialized() and not grouped:
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="session", autouse=True)
def beside(request, tmp_path_factory):
    """The children that run beside the tests on a GPU, or None: see `children`."""
    items = [item for item in request.session.items if item.path.parent == HERE and _on_gpu(item)]
    if not items:
        yield None
        return
    jobs = {name for item in items for name in item.fixturenames} & children.JOBS.keys()
    kernels = {item.path.stem.removeprefix(PREFIX) for item in items} & children.KERNELS.keys()
    started = children.Started(
        tmp_path_factory.mktemp("children"), jobs, kernels if len(items) > 50 else set()
    )
    yield started
    started.close()
    # kept from test to test: a communicator takes its time
    if torch.distributed.is_initialized() and not _poisoned():
        torch.distributed.destroy_process_group()


@pytest.fixture
def blocked(beside, tmp_path):
    """`children.updates` in a process whose every launch blocks; on a CPU, where none does, in this one."""
    return lambda count: beside.result("blocked") if beside else children.updates(tmp_path / "blocked", count)


@pytest.fixture
def compiled(beside, tmp_path):
    """`children.compiled`, in a process of its own."""
    return lambda: beside.result("compiled") if beside else children.compiled(tmp_path / "compiled")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    phases = item.stash.setdefault(_PHASES, [])
    phases.append(report)
    if report.when == "teardown":
        _tell(item, *_outcome(phases))
        if any(phase.failed for phase in phases) and _on_gpu(item) and _poisoned():
            words = f"not run: {item.nodeid} left CUDA unusable"
            for other in item.session.items[item.session.items.index(item) + 1 :]:
                if other.path.parent == HERE:
                    _tell(other, "not run", words, 0.0)
            item.session.shouldstop = words
    return report


def _on_gpu(item) -> bool:
    return item.get_closest_marker("gpu") is not None and torch.cuda.is_available()


def _outcome(phases) -> tuple[str, str, float]:
    """(outcome, words, seconds) of a test that is over."""
    seconds = sum(phase.duration for phase in phases)
    for phase in phases:
        if phase.failed:
            crash = getattr(phase.longrepr, "reprcrash", None)
            return "failed", crash.message if crash is not None else str(phase.longrepr), seconds
    for phase in phases:
        if phase.skipped:
            return (
                "skipped",
                phase.longrepr[2] if isinstance(phase.longrepr, tuple) else str(phase.longrepr),
                seconds,
            )
    return "passed", "", seconds


def _tell(item, outcome: str, words: str, seconds: float) -> None:
    path = os.environ.get("REPSFT_CHECKS")
    if not path:
        return
    proves = [list(mark.args) for mark in item.iter_markers("proves")]
    line = {
        "test": item.nodeid,
        "proves": proves,
        "outcome": outcome,
        "seconds": round(seconds, 3),
        "words": words[:WORDS],
    }
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(file, (json.dumps(line) + "\n").encode())
    finally:
        os.close(file)


def _poisoned() -> bool:
    """Whether a CUDA error is one that stays: after those every call fails."""
    try:
        torch.cuda.synchronize()
    except Exception:
        return True
    return False
