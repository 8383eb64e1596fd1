"""The architecture of a model alone: its configuration, from a folder, the hub, a GGUF file or settings."""

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from repsft_fast.errors import ModelError, describe, did_you_mean
from repsft_fast.hub import offline
from repsft_fast.models.folder import CONFIG, check_model_files, check_unquantised, folder_of
from repsft_fast.models.gguf import config_of_file
from repsft_fast.models.guards import check_counts, library
from repsft_fast.models.paths import config_wrong, located, unreadable
from repsft_fast.ops.attention import NAME

_CONFIG_KEYS_NOT_PASSED = {"model_type", "architectures", "transformers_version"}


def config_of(
    path_or_config: str | Path | PreTrainedConfig | Mapping[str, Any],
    *,
    gguf_file: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedConfig:
    """The architecture alone, without weights; arguments and errors as in `load_model`."""
    if isinstance(path_or_config, PreTrainedConfig):
        # A copy: transformers writes into it which attention a model was made with.
        config = copy.deepcopy(path_or_config)
        if config._attn_implementation == NAME:
            config._attn_implementation = None
        return config
    if isinstance(path_or_config, Mapping):
        return _of_settings(path_or_config)
    folder, gguf, unreached = located(str(path_or_config), gguf_file)
    if not gguf and (here := folder_of(folder)) is not None:
        check_model_files(here, "model.path")

    # A config.json that is there and cannot be read is said to be wrong, not to be missing.
    def instead(error: BaseException) -> ModelError:
        if os.path.isfile(Path(folder, CONFIG)):
            return config_wrong(error, path_or_config)
        return unreadable(error, path_or_config, folder=folder)

    with library("model.path", path_or_config, instead=instead), offline(unreached):
        if gguf and os.path.isdir(folder):
            config = config_of_file(folder, **gguf)
        else:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, **gguf)
        # one that the file names would go before ours, and may not be installed
        config._attn_implementation = None
    if not gguf and (here := folder_of(folder)) is not None:  # again: it may have been fetched only now
        check_model_files(here, "model.path")
    return config


def _of_settings(given: Mapping[str, Any]) -> PreTrainedConfig:
    """A configuration from the keys of a config.json; ModelError for keys that are slips of the pen."""
    kind = given.get("model_type")
    if not isinstance(kind, str):
        raise ModelError(
            describe("model.config", "has no model_type", expected="for example llama", got=kind)
        )
    settings = {name: value for name, value in given.items() if name not in _CONFIG_KEYS_NOT_PASSED}
    check_counts(settings, "model.config")
    check_unquantised(settings, "model.config", kind)
    with library("model.config", kind, "correct it"):
        known = AutoConfig.for_model(kind).to_dict()
        made = AutoConfig.for_model(kind, **settings)
    # transformers keeps keys it does not know, and architectures have some that no default shows: only
    # slips are refused.
    slips = [
        f"model.config.{name} is not a key of {kind}; did you mean {near}?"
        for name in settings
        if name not in known and (near := did_you_mean(name, known, cutoff=0.85))
    ]
    if slips:
        raise ModelError("; ".join(slips))
    return made
