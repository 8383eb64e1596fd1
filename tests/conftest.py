import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side


def pytest_configure(config):
    """Tests marked `slow` take minutes: they run where a -m says so."""
    if not config.option.markexpr:
        config.option.markexpr = "not slow"


def pytest_collection_modifyitems(config, items):
    """Tests marked `gpu` are deselected, and counted as such, on a machine without a CUDA device."""
    if not any(item.get_closest_marker("gpu") for item in items):
        return
    import torch

    if not torch.cuda.is_available():
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("gpu")])
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]
