"""How tests are told to the benchmark: a whole line each, what it proves, and no blame for what a broken
device took along."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

HERE = Path(__file__).parent
# What the rules ask of torch, on a machine whose GPU can be broken; importing the real one takes seconds.
TORCH = """
from types import SimpleNamespace

class dtype: pass
class Tensor: pass

bfloat16, float16, float32, float64 = (dtype() for _ in range(4))
device = str
are_deterministic_algorithms_enabled = lambda: False
nothing = lambda *_: None
cuda = SimpleNamespace(is_available=lambda: True, set_sync_debug_mode=nothing, synchronize=nothing)
"""
TESTS = """
import pytest
import torch
from tests.gpu.places import anywhere


@anywhere("state hash")
def test_passes(place):
    pass


@anywhere("snapshot", dtype="float32", on=None)
def test_fails(place):
    raise ValueError("2 is not 3" + 500 * "x")


@anywhere("snapshot", on=None)
def test_is_skipped(place):
    pytest.skip("not today")


@pytest.fixture
def breaks():
    yield
    raise ValueError("the teardown")


@anywhere("adamw8bit", "attention", on=None)
def test_fails_late(place, breaks):
    pass


def unusable():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


@anywhere("head", dtype="bfloat16", on=None)
def test_breaks_the_device(place):
    torch.cuda.synchronize = unusable  # seen by the look after the test, not by the test


@anywhere("head", dtype="float16", on=None)
def test_is_innocent(place):
    raise ValueError("never run")
"""


def test_lines_outcomes_and_the_end_of_the_session(tmp_path):
    """In a process of its own, over a copy of this folder's rules."""
    (tmp_path / "conftest.py").write_text((HERE / "conftest.py").read_text())
    (tmp_path / "test_gpu_hash.py").write_text(TESTS)
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(TORCH)
    (tmp_path / "torch" / "distributed.py").write_text("is_initialized = lambda: False\n")
    checks = tmp_path / "checks.jsonl"
    checks.write_text('{"test": "of an earlier run"}\n')
    paths = os.pathsep.join([str(tmp_path), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "REPSFT_CHECKS": str(checks)}
    options = ["-c", os.devnull, "--rootdir", str(tmp_path), "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, str(tmp_path)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    lines = [json.loads(line) for line in checks.read_text().splitlines()][1:]
    names = {line["test"].split("::test_")[1]: line for line in lines}
    outcomes = {name: line["outcome"] for name, line in names.items()}
    assert outcomes == {
        "passes[cpu]": "passed", "passes[cuda]": "passed", "fails[cuda]": "failed", "is_skipped[cuda]": "skipped",
        "fails_late[cuda]": "failed", "breaks_the_device[cuda]": "failed", "is_innocent[cuda]": "not run",
    }, ended.stdout  # fmt: skip
    assert ended.returncode == 2, "the session was not ended"
    assert names["fails[cuda]"]["proves"] == [["snapshot", "float32"]]
    assert names["fails_late[cuda]"]["proves"] == [["adamw8bit", "any"], ["attention", "any"]]
    assert names["fails[cuda]"]["words"].startswith("ValueError: 2 is not 3")
    assert len(names["fails[cuda]"]["words"]) == 300
    assert names["fails_late[cuda]"]["words"] == "ValueError: the teardown"
    assert names["is_skipped[cuda]"]["words"] == "Skipped: not today"
    assert "illegal memory access" in names["breaks_the_device[cuda]"]["words"]
    assert "test_breaks_the_device" in names["is_innocent[cuda]"]["words"]
    assert all(
        set(line) == {"test", "proves", "outcome", "seconds", "words"} and line["seconds"] >= 0
        for line in lines
    )


@pytest.mark.parametrize("marks", [[], [("head",)], [("heads", "any")], [("head", "bf16")]])
def test_a_test_that_does_not_say_what_it_proves_is_refused(marks, request):
    rules = next(
        plugin
        for plugin in request.config.pluginmanager.get_plugins()
        if getattr(plugin, "HERE", None) == HERE
    )
    item = SimpleNamespace(
        path=Path(__file__),
        nodeid="a::b",
        fixturenames=["place"],
        iter_markers=lambda _: [SimpleNamespace(args=m) for m in marks],
    )
    with pytest.raises(
        pytest.UsageError, match=r"a::b: expected a file of ORDER and proves\(operation, dtype\), got"
    ):
        rules.pytest_collection_modifyitems([item])
