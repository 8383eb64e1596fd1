"""Imported last by a process that forks others."""

import gc

# A run begins with a full collection, which would walk, and so copy, every object of that process.
gc.collect()
gc.freeze()
