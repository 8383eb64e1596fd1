"""The answers are those of the process, after every change too."""

import gc
import importlib.metadata

import pytest
import torch

from tests.helpers import asked_once
from tests.helpers.ranks import run_ranks


@pytest.fixture
def thawed():
    standing = gc.get_freeze_count() > 0
    gc.unfreeze()
    yield
    gc.unfreeze()
    if standing:
        gc.freeze()


def is_answered(world=None):
    return (gc.get_freeze_count, gc.freeze, gc.unfreeze) == (
        asked_once.get_freeze_count, asked_once.freeze, asked_once.unfreeze,
    )  # fmt: skip


def test_here_and_in_whatever_is_forked(server):
    assert is_answered()
    assert run_ranks(is_answered) == [True, True]
    outcome = server.run("tests.helpers.test_asked_once:is_answered", {})
    assert outcome.result, outcome.output


def test_what_is_frozen(thawed, monkeypatch):
    assert gc.get_freeze_count() == asked_once._COUNT() == 0
    gc.freeze()
    count = gc.get_freeze_count()
    assert count == asked_once._COUNT() > 0
    kept = [[] for _ in range(100)]
    gc.freeze()
    assert gc.get_freeze_count() >= count + len(kept)
    with monkeypatch.context() as patch:
        patch.setattr(asked_once, "_COUNT", lambda: pytest.fail("it is counted again"))
        assert gc.get_freeze_count() >= count
    gc.unfreeze()
    assert gc.get_freeze_count() == asked_once._COUNT() == 0


def test_versions():
    assert importlib.metadata.version("torch").partition("+")[0] == torch.__version__.partition("+")[0]
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("no package of this name")
    hits = importlib.metadata.version.cache_info().hits
    importlib.metadata.version("torch")
    assert importlib.metadata.version.cache_info().hits == hits + 1
