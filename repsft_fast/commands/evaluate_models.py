"""Which model `repsft eval` is asked about: a run's folder, a model's, one of adapters, a hub id; and its
base."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic_core import PydanticCustomError

from repsft_fast.config import Config
from repsft_fast.config.model_sections import Lora
from repsft_fast.config.paths import as_folder_or_hub_id
from repsft_fast.errors import ConfigError, ModelError, RepsftError, describe, open_plain
from repsft_fast.report import result as results
from repsft_fast.rundir.folder import SETTINGS
from repsft_fast.training.build import build_model, build_tokenizer

ADAPTERS, WEIGHTS = "adapter_config.json", "config.json"
BASE_OF_THE_RUN = "auto"  # of --base
_LARGEST = 1 << 20


@dataclass(frozen=True)
class Evaluated:
    """A model to be evaluated. `name` heads its column; `config` says how it is loaded."""

    name: str
    config: Config
    # last tokens before the replies that a run trained it on, where it says so
    learned: tuple[tuple[int, ...], ...] = ()

    def tokenizer(self) -> Any:
        """ModelError where there is none: prompts are text."""
        found = build_tokenizer(self.config)
        if found is None:
            todo = "say where one is: --tokenizer.path FOLDER"
            raise ModelError(
                describe("model.path", "has no tokenizer", got=self.config.model.path, todo=todo)
            )
        return found

    def load(self, world: Any, tokenizer: Any) -> Any:
        """The model on the world's device, in evaluation mode, without gradients."""
        model = build_model(held_as_computed(self.config, world.device.type), world, tokenizer)
        return model.requires_grad_(False).eval()


def held_as_computed(config: Config, device: str) -> Config:
    """The settings with weights in the type they are computed in: nothing is trained, so no copy in fp32 need
    stand beside them. A setting of its own stays."""
    model = config.model
    computed = model.compute_dtype
    if computed == "auto" and device == "cuda":
        computed = "bfloat16"
    if model.param_dtype != "auto" or computed == "auto":
        return config
    return config.model_copy(update={"model": model.model_copy(update={"param_dtype": computed})})


def settings_file(target: str) -> str | None:
    """The settings of the run whose folder `target` is; None: it is no run's."""
    file = Path(target) / SETTINGS
    return str(file) if os.path.isfile(file) else None


def evaluated(target: str, config: Config) -> Evaluated:
    """The model that MODEL names. ConfigError where there is none."""
    path = _path(target, "MODEL")
    folder = Path(path)
    learned = _learned(folder)
    if folder.is_dir() and not (folder / WEIGHTS).exists():
        if (folder / ADAPTERS).exists():
            return Evaluated("model", _of_adapters(config, folder), learned)
        if settings_file(path) is not None:
            wrong = "is a run's folder without a model"
            todo = f"write the model of its newest checkpoint first: repsft export {target}"
            raise ConfigError(describe("MODEL", wrong, got=target, todo=todo))
    return Evaluated("model", _plain(config, path), learned)


def base(asked: str, target: str, config: Config) -> Evaluated:
    """What the model is compared with: a model of its own, or what the run began with. ConfigError where
    that is not known."""
    if asked != BASE_OF_THE_RUN:
        return Evaluated("base", _plain(config, _path(asked, "--base")))
    model = config.model
    if settings_file(target) is None:
        wrong = "MODEL is no run's folder, so nobody knows its base"
        raise ConfigError(describe("--base", wrong, got=target, todo="name it: --base FOLDER"))
    if model.path is None or model.init == "random":
        wrong = "the run began with random weights"
        raise ConfigError(describe("--base", wrong, got=target, todo="drop it, or name a model"))
    source = getattr(model.lora, "from", None)
    lora = None if source is None else Lora.model_validate({"from": source})
    return Evaluated("base", _with(config, lora=lora))


def _learned(folder: Path) -> tuple[tuple[int, ...], ...]:
    """As the run's result.json has it; nothing where there is none, or of an older version."""
    try:
        found = results.read(folder).more.get("before_replies", [])
        return tuple(tuple(map(int, ids)) for ids in found)
    except (RepsftError, OSError, ValueError, TypeError, AttributeError):
        return ()


def _plain(config: Config, path: str) -> Config:
    """The settings for a whole model at this path: nothing of how another one was made holds for it."""
    config = _with(
        config, path=path, gguf_file=None, config=None, init="auto", resize_vocabulary=False, lora=None
    )
    # A folder's own tokenizer is the one it was trained with.
    of_its_own = any((Path(path) / name).exists() for name in ("tokenizer.json", "tokenizer_config.json"))
    if of_its_own and config.tokenizer.path is not None:
        config = config.model_copy(update={"tokenizer": config.tokenizer.model_copy(update={"path": None})})
    return config


def _of_adapters(config: Config, folder: Path) -> Config:
    """Adapters on their base: the run's, or what their own file names."""
    path = config.model.path
    if path is None or settings_file(str(folder)) is None:
        with open_plain(folder / ADAPTERS) as file:
            try:
                path = json.loads(file.read(_LARGEST))["base_model_name_or_path"]
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                wrong = "does not say which model the adapters are of"
                raise ConfigError(describe(str(folder / ADAPTERS), wrong)) from error
        if not isinstance(path, str):
            wrong = "does not say which model the adapters are of"
            raise ConfigError(describe(str(folder / ADAPTERS), wrong, got=path))
    return _with(config, path=path, lora=Lora.model_validate({"from": str(folder)}))


def _with(settings: Config, **changes: Any) -> Config:
    """The settings with another model, computed with as nobody needs gradients for."""
    plain = {"compile": False, "activation_checkpointing": "none"}
    return settings.model_copy(update={"model": settings.model.model_copy(update={**plain, **changes})})


def _path(given: str, where: str) -> str:
    try:
        return str(as_folder_or_hub_id(given))
    except PydanticCustomError as error:
        raise ConfigError(describe(where, error.message(), got=given)) from error
