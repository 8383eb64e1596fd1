"""Compiled or plain is decided once: by the setting, by the device, by what failed; a resumption keeps it."""

from types import SimpleNamespace

import pytest
import torch

from repsft_fast.config import Config
from repsft_fast.errors import ConfigError, ModelError
from repsft_fast.models import load_model
from repsft_fast.models.compiled import compiled_layers
from repsft_fast.models.layers import compiles
from repsft_fast.training import compiled
from tests.helpers import runs

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def traced(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


def parts_of(tmp_path, asked="auto", *, now=False):
    config = Config.of(runs.settings(tmp_path, model__compile=asked))
    return SimpleNamespace(config=config, model=load_model(runs.MODEL, compile=now))


@pytest.mark.parametrize(
    ("asked", "kernels", "device", "packed", "wanted"),
    [
        ("auto", "auto", CPU, True, False),
        ("auto", "auto", CUDA, True, True),
        ("auto", "none", CUDA, True, True),
        ("auto", "liger", CUDA, True, False),
        ("auto", "auto", CUDA, False, False),
        (True, "auto", CPU, True, True),
        (True, "auto", CUDA, False, True),
        (False, "auto", CUDA, True, False),
    ],
)
def test_what_is_compiled(asked, kernels, device, packed, wanted):
    assert compiles(asked, kernels, device, packed=packed) is wanted


def test_now(tmp_path):
    parts = parts_of(tmp_path, now=True)
    assert compiled.now(parts) is True
    compiled_layers(parts.model).on = False
    assert compiled.now(parts) is False
    assert compiled.now(parts_of(tmp_path)) is False


@pytest.mark.parametrize("now", [True, False])
def test_kernels_launched_one_by_one_stay_so(tmp_path, monkeypatch, now):
    monkeypatch.setattr("repsft_fast.models.compiled.compiler_options", lambda: {"combo_kernels": True})
    parts = parts_of(tmp_path, now=now)
    compiled.use(parts, compiled.SEPARATE)
    assert compiled.now(parts) == compiled.SEPARATE
    assert compiled_layers(parts.model).on
    assert "a launch of its own" in compiled.words(compiled.SEPARATE)
    assert compiled.written(compiled.SEPARATE) is True


def test_nothing_is_compiled_before_the_warm_up(tmp_path):
    parts = parts_of(tmp_path, now=True)
    compiled.hold(parts.model)
    assert compiled_layers(parts.model).warm == set()
    compiled.hold(parts_of(tmp_path).model)  # plain layers hold nothing


@pytest.mark.parametrize("began", [True, False])
@pytest.mark.parametrize("now", [True, False])
def test_the_run_before_is_followed(tmp_path, began, now):
    parts = parts_of(tmp_path, now=now)
    compiled.use(parts, began)
    assert compiled.now(parts) is began
    if began and not now:
        assert compiled_layers(parts.model).warm == set(), "its checks would be compiled for"


def test_what_cannot_be_compiled_here_is_refused(tmp_path, monkeypatch):
    parts = parts_of(tmp_path)
    parts.model.liger = True
    with pytest.raises(ConfigError, match=r"model.compile: .*liger.*model.layer_kernels to none"):
        compiled.use(parts, True)
    compiled.use(parts, False)
    parts.model.liger = False

    def no_layers(model, *, enabled):
        raise ModelError("no layers are found")

    monkeypatch.setattr(compiled, "compile_layers", no_layers)
    with pytest.raises(ConfigError, match=r"cannot be here \(no layers are found\).*model.compile to false"):
        compiled.use(parts, True)


@pytest.mark.parametrize(("asked", "before"), [("auto", False), (False, False), (True, True)])
def test_older_versions_compiled_where_they_were_told(tmp_path, asked, before):
    assert compiled.before(parts_of(tmp_path, asked)) is before


def test_words_and_settings():
    assert compiled.words(True) == "compiled layers"
    assert compiled.words(False) == "plain layers"
    assert compiled.written(False) is False
    assert compiled.written(True) is True
