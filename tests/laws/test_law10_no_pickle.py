"""Law 10: no pickle is read on any load path. Static: every call and import in the sources is looked at."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(p for base in ("repsft_fast", "csrc_triton") for p in (ROOT / base).rglob("*.py"))
MODULES = {
    "pickle", "_pickle", "cPickle", "pickletools", "dill", "cloudpickle", "joblib", "marshal", "shelve", "dbm",
    "torch.package", "torch.distributed.checkpoint",  # the latter keeps a pickled .metadata beside its data
}  # fmt: skip
CALLS = {
    "torch.load", "torch.jit.load", "torch.hub.load", "torch.export.load", "numpy.lib.format.read_array", "pandas.read_pickle",
    "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.unsafe_load_all", "yaml.full_load", "yaml.full_load_all",
    "torch.serialization.load", "safetensors.torch.load_model",
}  # fmt: skip
# These unpickle what another rank sent.
METHODS = {
    "all_gather_object",
    "gather_object",
    "broadcast_object_list",
    "scatter_object_list",
    "recv_object_list",
    "read_pickle",
}
TRUE_IS_PICKLE, FALSE_IS_PICKLE = {"allow_pickle"}, {"weights_only", "use_safetensors", "safe_serialization"}


def violations(source: str) -> list[str]:
    """What reads, or may read, a pickle in a Python source, in words. Aliases of imports are followed."""
    tree, names, found = ast.parse(source), {}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
                found += _forbidden_module(alias.name, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                names[alias.asname or alias.name] = full
                found += _forbidden_module(full, node.lineno)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name):
            full = _dotted(node, names)
            last = full.rsplit(".", 1)[-1]
            if full in CALLS or last in METHODS:
                found.append(f"line {node.lineno}: {full}")
        if isinstance(node, ast.Call):
            for keyword in node.keywords:
                # None: not known here
                value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
                if (keyword.arg in TRUE_IS_PICKLE and value is not False) or (
                    keyword.arg in FALSE_IS_PICKLE and value is False
                ):
                    found.append(f"line {node.lineno}: {keyword.arg}={ast.unparse(keyword.value)}")
            if _dotted(node.func, names) in ("importlib.import_module", "__import__") and node.args:
                given = node.args[0].value if isinstance(node.args[0], ast.Constant) else ""
                found += _forbidden_module(str(given), node.lineno)
    return found


def _forbidden_module(name: str, line: int) -> list[str]:
    hit = any(name == module or name.startswith(module + ".") for module in MODULES)
    return [f"line {line}: import {name}"] if hit or name in CALLS else []


def _dotted(node: ast.AST, names: dict[str, str]) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value, names)}.{node.attr}"
    return names.get(node.id, node.id) if isinstance(node, ast.Name) else ""


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_source_reads_a_pickle(path):
    assert violations(path.read_text(encoding="utf-8")) == []


def test_there_are_sources():
    assert len(SOURCES) > 20


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import joblib as j",
        "import torch\ntorch.load('x')",
        "import torch as t\nf = t.load",
        "from torch import load",
        "import torch\ntorch.load('x', weights_only=True)",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "import numpy as np\nnp.load('x', allow_pickle=flag)",
        "import yaml\nyaml.load(text, Loader=yaml.SafeLoader)",
        "from yaml import unsafe_load",
        "import torch.distributed as dist\ndist.all_gather_object(a, b)",
        "from torch.distributed.checkpoint import load",
        "import torch.distributed.checkpoint as dcp",
        "import importlib\nimportlib.import_module('pickle')",
        "AutoModel.from_pretrained('x', use_safetensors=False)",
        "import pandas as pd\npd.read_pickle('x')",
    ],
)
def test_each_way_in_is_seen(source):
    assert violations(source), source


@pytest.mark.parametrize(
    "source",
    [
        "import json, torch\njson.load(f)\ntorch.utils.data.load",
        "import numpy as np\nnp.load('x', allow_pickle=False)",
        "import yaml\nyaml.safe_load(text)",
        "self.load('x')",
        "from safetensors.torch import load_file",
    ],
)
def test_harmless_code_is_not(source):
    assert violations(source) == []
