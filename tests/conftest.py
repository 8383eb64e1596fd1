import functools
import gc
import os
import sys

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side


@pytest.fixture(scope="session")
def server():
    """A warm process that forks whole runs, which a test may kill: the functions of run_jobs, rank_jobs and
    spike_jobs. One for all files: it only forks."""
    from tests.helpers import rank_jobs
    from tests.helpers.forkserver import ForkServer

    started = ForkServer([*rank_jobs.PRELOAD, "tests.helpers.spike_jobs"])
    yield started
    started.close()


@pytest.fixture
def real_pictures():
    """run.png in pixels: everywhere else it is a sketch."""
    from tests.helpers import sketches

    sketches.install(real=True)
    yield
    sketches.install()


@pytest.fixture(scope="session")
def _readings():
    """Of packaged models, which nobody writes to: the parsed file, and the names of an architecture's tensors."""
    import gguf

    return {name: functools.cache(getattr(gguf, name)) for name in ("GGUFReader", "get_tensor_name_map")}


@pytest.fixture
def read_once(monkeypatch, _readings):
    """A GGUF file is parsed once: 3 s for 50,000 tokens, and tokenizer, settings and weights all ask."""
    for name, read in _readings.items():
        monkeypatch.setattr(f"gguf.{name}", read)


@pytest.fixture(autouse=True)
def no_group_is_left():
    """What is built alone may make a group of one rank, which nobody leaves: the next test is to find none."""
    before = _group()
    yield
    if _group() and not before:
        sys.modules["torch.distributed"].destroy_process_group()


def _group() -> bool:
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def pytest_configure(config):
    """Tests marked `slow` take minutes: they run where a -m says so."""
    if not config.option.markexpr:
        config.option.markexpr = "not slow"
    from tests.helpers import asked_once, sketches, unsynced

    sketches.install()
    unsynced.install()
    asked_once.install()


@pytest.hookimpl(wrapper=True)
def pytest_collection(session):
    """What is imported stays: looking for garbage among it meanwhile is a quarter of the collection's time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_modifyitems(config, items):
    """Tests marked `gpu` are skipped, by name and with the reason, on a machine without a CUDA device."""
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        built = (
            f"is built for CUDA {torch.version.cuda} and sees none"
            if torch.version.cuda
            else "is built without CUDA"
        )
        for item in on_gpu:
            item.add_marker(
                pytest.mark.skip(reason=f"needs a CUDA device: torch {torch.__version__} {built}")
            )


def pytest_collection_finish(session):
    """Every run begins with a full collection: what stands by now, some 400,000 objects, is not walked in each."""
    _freeze()


def pytest_runtest_setup(item):
    """Nor what tests imported since: torch's compiler alone is another 200,000."""
    if len(sys.modules) > _frozen_modules + 200:
        _freeze()


_frozen_modules = 0


def _freeze() -> None:
    global _frozen_modules
    gc.collect()
    gc.freeze()
    _frozen_modules = len(sys.modules)


def pytest_sessionfinish(session):
    gc.unfreeze()
