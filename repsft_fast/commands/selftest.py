"""`repsft selftest`: the laws on this machine, with the built-in model or that of the given settings."""

import os

from repsft_fast.config import Config
from repsft_fast.selftest import table


def selftest(config: str | None) -> table.Outcome:
    """config: a settings file or a recipe's name; the environment goes over it. None: the built-in model."""
    return table.selftest(None if config is None else Config.of(config, environment=os.environ))
