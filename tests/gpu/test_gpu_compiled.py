"""Compiled layers are plain ones, and the compiler captures no CUDA graph.

Graphs kept by `mode="reduce-overhead"` (cudagraph trees) give silently wrong gradients when gradients
accumulate over rows (pytorch #96693), so no mode may reach torch.compile, and no option that captures
(tests/models/test_compiler_options.py). What is captured is captured by hand, in one place
(tests/gpu/test_gpu_graphs.py).
"""

import ast
from pathlib import Path

import pytest
import torch

import repsft_fast
from repsft_fast.config import Config
from repsft_fast.errors import ConfigError
from repsft_fast.models import load_model
from repsft_fast.models.compiler_options import compiler_options
from tests.gpu import small_runs
from tests.gpu.places import anywhere

PRODUCT = Path(repsft_fast.__file__).parent


def compiling_calls():
    """(place, keyword names) of every call of something called `compile`, the regular expressions' aside."""
    found = []
    for path in sorted([*PRODUCT.rglob("*.py"), *PRODUCT.parent.joinpath("csrc_triton").glob("*.py")]):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr == "compile"
            ):
                owner = ast.unparse(node.func.value)
                if owner not in ("re", "triton"):
                    found.append(
                        (
                            f"{path.relative_to(PRODUCT.parent)}: {owner}",
                            sorted(k.arg or "**" for k in node.keywords),
                        )
                    )
    return found


def test_layers_are_compiled_in_one_place_without_a_mode():
    assert compiling_calls() == [("repsft_fast/models/compiled.py: torch", ["dynamic", "options"])]


def test_one_place_captures_a_graph():
    words = (
        "make_graphed_callables",
        "CUDAGraph",
        "cuda.graph(",
        "cudagraph",
        "reduce-overhead",
        "max-autotune",
    )
    sources = {path: path.read_text() for path in PRODUCT.rglob("*.py") if path.name != "capture.py"}
    assert [(path.name, word) for path, text in sources.items() for word in words if word in text] == []


def test_compile_layers_hands_no_mode_on(monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: seen.append(options) or function)
    load_model(small_runs.MODEL, compile=True)
    assert seen == [{"dynamic": False, "options": compiler_options()}], "one function for all layers"


@pytest.mark.parametrize(
    "changes",
    [
        {"model__compile": "reduce-overhead"},
        {"model__compile": {"mode": "reduce-overhead"}},
        {"model__compile_mode": "reduce-overhead"},
        {"model__cuda_graphs": True},
    ],
    ids=str,
)
def test_a_setting_that_asks_for_graphs_is_refused(changes, tmp_path):
    with pytest.raises(ConfigError, match=r"model\.compile|model\.cuda_graphs"):
        Config.of(small_runs.settings_of(tmp_path, **changes))


@anywhere("compile", dtype="bfloat16", on=None)
def test_compiled_layers_are_plain_ones(place, compiled):
    """All gradients of an update against fp32: law 3's bound beside plain layers in bf16. Three more make no
    new graph."""
    found = compiled()
    assert found["plain"] > 0.0
    assert found["compiled"] <= 1.5 * found["plain"], found
    assert found["graphs"] > 0
    assert found["graphs_later"] == found["graphs"], "an update of the same shape was compiled for anew"
    assert len(found["losses"]) == 3
