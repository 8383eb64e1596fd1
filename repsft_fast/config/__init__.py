"""Typed settings with units: `Config.of(dict | path | Config, overrides)`; every problem is reported at
once."""

from repsft_fast.config.loading import (
    Config,
    Layer,
    environment_layer,
    file_layer,
    text_layer,
)
from repsft_fast.config.names import setting_names, unknown_setting

__all__ = [
    "Config",
    "Layer",
    "environment_layer",
    "file_layer",
    "setting_names",
    "text_layer",
    "unknown_setting",
]
