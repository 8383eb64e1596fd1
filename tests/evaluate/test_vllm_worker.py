"""What the child uses of vllm, beside the names of the wheel (`vllm_0_33_0.json`, read from its source). What it
does is tested with its parent (`test_vllm_child`)."""

from __future__ import annotations

import ast
import inspect
import json
import sys
from pathlib import Path

import pytest

from repsft_fast.evaluate import vllm_worker

API = json.loads((Path(__file__).parent / "vllm_0_33_0.json").read_text(encoding="utf-8"))


def test_it_uses_names_that_vllm_has():
    tree = ast.parse(Path(vllm_worker.__file__).read_text(encoding="utf-8"))
    reads = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    lists = ("LLMEngine", "RequestOutput", "CompletionOutput", "Logprob")
    ours = {"prompt_logprobs", "logprob", "token_ids", "finish_reason", "finished", "request_id", "outputs"}
    ours |= {"has_unfinished_requests", "step"}
    assert ours <= reads
    assert ours <= set().union(*(API[name] for name in lists))
    assert "prompt_token_ids" in API["TokensPrompt"]


def test_it_imports_nothing_but_the_standard_library_and_vllm():
    tree = ast.parse(Path(vllm_worker.__file__).read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in names} <= {*sys.stdlib_module_names, "vllm"}


def test_the_wheel_that_is_installed_has_the_names():
    vllm = pytest.importorskip("vllm")
    assert set(API["LLM"]) - set(inspect.signature(vllm.LLM.__init__).parameters) == set()
    assert set(API["SamplingParams"]) - set(vllm.SamplingParams.__struct_fields__) == set()
