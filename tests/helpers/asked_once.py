"""What every run asks of its process and what does not change between runs, answered from memory.

How many objects are frozen is counted by walking all of them: 40 ms for the 400,000 of a process that has torch
and transformers, a tenth of a small run. Which version a package has is read from a file and parsed, twelve times
a run.
"""

import functools
import gc
import importlib.metadata

_FREEZE, _UNFREEZE, _COUNT = gc.freeze, gc.unfreeze, gc.get_freeze_count
_known: int | None = None


def freeze() -> None:
    global _known
    _known = None
    _FREEZE()


def unfreeze() -> None:
    global _known
    _known = None
    _UNFREEZE()


def get_freeze_count() -> int:
    """As counted when it was first asked after a change; frozen objects that died since are still in it."""
    global _known
    if _known is None:
        _known = _COUNT()
    return _known


def install() -> None:
    """For this process and what it forks."""
    gc.freeze, gc.unfreeze, gc.get_freeze_count = freeze, unfreeze, get_freeze_count
    if not hasattr(importlib.metadata.version, "cache_clear"):
        importlib.metadata.version = functools.cache(importlib.metadata.version)
