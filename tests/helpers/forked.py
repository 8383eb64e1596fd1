"""Imported last by a process that forks others."""

import gc

from tests.helpers import asked_once, sketches, unsynced

sketches.install()
unsynced.install()
asked_once.install()

# A run begins with a full collection, which would walk, and so copy, every object of that process.
gc.collect()
gc.freeze()
gc.get_freeze_count()  # counted here, not by every one of them
