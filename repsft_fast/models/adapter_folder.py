"""A folder of adapters to go on from: its settings, whose layers and weights must all be this model's."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from repsft_fast.errors import ModelError, describe
from repsft_fast.models.folder import checked_files, header_of
from repsft_fast.models.guards import library
from repsft_fast.models.merge import ADAPTER, adapted_layers, is_adapters, plain_name
from repsft_fast.models.targets import endless

WHERE = "model.lora.from"
CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_PREFIX = "base_model.model."
# Keys of adapter_config.json that change what is computed and are understood here, or that change nothing.
_KNOWN = {
    "r", "lora_alpha", "lora_dropout", "target_modules", "target_parameters", "exclude_modules",
    "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out", "layers_to_transform", "layers_pattern",
    "init_lora_weights", "base_model_name_or_path", "revision", "task_type", "peft_type", "peft_version",
    "inference_mode", "auto_mapping", "runtime_config", "loftq_config", "megatron_config", "megatron_core",
    "eva_config",
}  # fmt: skip
# ways to begin that leave the base's own weights as they are
_FROM_THE_DATA = ("gaussian", "eva", "orthogonal")
_OTHER_BASE = "set model.path to the model these adapters were trained beside, or train new ones"
_MERGE_FIRST = (
    "merge them into their base with peft's merge_and_unload, set model.path to that, and train new ones"
    " beside it"
)
_SAVE_AGAIN = "load them with peft beside their base and save them again: they get the names of today"
_OLD_EXPERTS = re.compile(r"\.experts\.\d+\.")  # one layer an expert, as in transformers 4


@dataclass(frozen=True)
class AdapterFolder:
    folder: Path
    settings: dict[str, Any]  # adapter_config.json
    shapes: dict[str, tuple[int, ...]]  # of the weights, by their names in the file

    @staticmethod
    def read(given: str) -> AdapterFolder:
        """ModelError for what is no folder of LoRA adapters in safetensors, or uses more of peft than is
        understood here."""
        folder = Path(given).expanduser()
        todo = f"give the folder with {CONFIG} and {WEIGHTS}"
        if not os.path.isdir(folder):  # False for names that no folder can have, where Path.is_dir raises
            wrong = "is a file" if os.path.isfile(folder) else "no such folder"
            raise ModelError(describe(WHERE, wrong, got=given, todo=todo))
        settings = checked_files(folder, (CONFIG,), WHERE).get(CONFIG)
        if settings is None:
            wrong = f"holds no {CONFIG}"
            if (folder / "config.json").is_file():
                wrong, todo = "holds a model, no adapters", "set it as model.path instead"
            elif inside := sorted(file.parent.name for file in folder.glob(f"*/{CONFIG}")):
                todo = f"give the folder inside it: {', '.join(inside[:3])}"
            raise ModelError(describe(WHERE, wrong, got=given, todo=todo))
        if (kind := settings.get("peft_type")) != "LORA":
            todo = _MERGE_FIRST if kind else todo
            wrong = describe(
                f"{WHERE} {CONFIG}", "is of no LoRA adapters", expected="peft_type LORA", got=kind, todo=todo
            )
            raise ModelError(wrong)
        # A pickle may run code, so what is missing is said with what lies in its place.
        if not os.path.lexists(folder / WEIGHTS):
            wrong = f"holds no {WEIGHTS}"
            if (folder / PICKLE).is_file():
                wrong = f"holds its weights as {PICKLE}, a pickle, which is not read"
                todo = f"save them as {WEIGHTS}: loaded and saved again by peft, they are"
            raise ModelError(describe(WHERE, wrong, got=given, todo=todo))
        shapes = {name: stored.shape for name, stored in header_of(folder / WEIGHTS, WHERE).items()}
        return AdapterFolder(folder, settings, shapes)

    def config(self, dropout: float) -> Any:
        """The folder's settings as peft's, without what belongs to the run that made it. ModelError for what
        is not known."""
        import peft

        plain = peft.LoraConfig().to_dict()
        for name, value in self.settings.items():
            empty = value in (None, False, [], {}, "none", plain.get(name))
            if name not in _KNOWN and not empty:
                raise self._wrong(f"{name} is not understood here", value, _MERGE_FIRST)
        # PiSSA and its like change the base: beside the base as it is, their adapters mean nothing.
        if (begun := self.settings.get("init_lora_weights", True)) not in (True, False, *_FROM_THE_DATA):
            wrong = "its adapters were made from the base's own weights, which it changed"
            raise self._wrong(wrong, f"init_lora_weights {begun}", _MERGE_FIRST)
        kept = {
            name: value
            for name, value in self.settings.items()
            if name in _KNOWN and name in plain and value is not None
        }
        for name in (
            "peft_type",
            "peft_version",
            "auto_mapping",
            "runtime_config",
            "megatron_config",
            "eva_config",
        ):
            kept.pop(name, None)
        # What the run decides is not the folder's to say.
        kept |= {
            "lora_dropout": dropout,
            "init_lora_weights": True,
            "inference_mode": False,
            "task_type": "CAUSAL_LM",
        }
        # peft asks these for truth, and takes "false" for true.
        for name in ("use_rslora", "fan_in_fan_out"):
            if type(kept.get(name, False)) is not bool:
                raise self._wrong(f"{name} is neither true nor false", kept[name])
        self._check_sizes()
        self._check_pattern()
        # what peft and Python say of other types
        with library(f"{WHERE} {CONFIG}", str(self.folder), "correct it"):
            return peft.LoraConfig(**kept)

    def _check_sizes(self) -> None:
        """Ranks that the weights show and scales that are numbers: before memory is asked for what a file
        only claims."""
        largest = max(
            (shape[0] for name, shape in self.shapes.items() if "lora_A" in name and shape), default=0
        )
        largest = max(
            [
                largest,
                *(min(shape) for name, shape in self.shapes.items() if "lora_embedding" in name and shape),
            ]
        )
        for key, pattern, most in (("r", "rank_pattern", largest), ("lora_alpha", "alpha_pattern", math.inf)):
            given = self.settings.get(pattern) or {}
            if not isinstance(given, dict):
                raise self._wrong(f"{pattern} is no mapping", given)
            for value in (self.settings.get(key), *given.values()):
                numbers = (int,) if key == "r" else (int, float)
                if type(value) not in numbers or not (value > 0 and math.isfinite(value)):
                    raise self._wrong(f"{key} is no number above 0", value)
                if value > most:
                    raise self._wrong(
                        f"{key} is more than its weights have: they are of another shape", value
                    )

    def _check_pattern(self) -> None:
        """Names of layers are texts, and matching them ends."""
        for key in (
            "target_modules",
            "target_parameters",
            "exclude_modules",
            "layers_pattern",
            "rank_pattern",
            "alpha_pattern",
        ):
            given = self.settings.get(key)
            given = list(given) if isinstance(given, dict) else given
            names = [given] if isinstance(given, str) or given is None else given
            if not isinstance(names, list) or not all(
                isinstance(name, str) or name is None for name in names
            ):
                raise self._wrong(f"{key} is neither text nor a list of texts", given)
            for pattern in (name for name in names if name):
                if endless(pattern):
                    raise self._wrong(f"{key} repeats too much to be matched", pattern)

    def agrees(self, wanted: Any, plain: Any, base: str | None) -> list[str]:
        """What is to be said: whose adapters, and of which base. ModelError where a setting that was given
        says otherwise.

        wanted, plain: LoraSettings as given and as they are by default. A setting left at its default is not
        given.
        """
        # Adapters cannot change their shape or place, so another setting would be passed over.
        for name, key in (("rank", "r"), ("alpha", "lora_alpha")):
            value = getattr(wanted, name)
            if value != getattr(plain, name) and value != self.settings.get(key):
                todo = f"drop it: the adapters go on as they are, with {name} {self.settings.get(key)}"
                raise ModelError(
                    describe(f"model.lora.{name}", f"is not that of {WHERE}", got=value, todo=todo)
                )
        targets = wanted.target_modules
        if targets != plain.target_modules and _as_set(targets) != _as_set(
            self.settings.get("target_modules")
        ):
            todo = "drop it: the adapters go on where they are"
            raise ModelError(
                describe("model.lora.target_modules", f"are not those of {WHERE}", got=targets, todo=todo)
            )
        # What may differ is said: it may be meant.
        rank, alpha = self.settings.get("r"), self.settings.get("lora_alpha")
        said = [f"{WHERE}: goes on from {self.folder}, with its rank {rank}, alpha {alpha} and layers"]
        if (was := self.settings.get("lora_dropout") or 0.0) != wanted.dropout:
            said.append(f"model.lora.dropout: {wanted.dropout:g}, where its adapters were trained with {was}")
        made_on = self.settings.get("base_model_name_or_path")
        if made_on and base and not _same_place(str(made_on), base):
            said.append(
                f"{WHERE}: its adapters were trained beside {made_on}; model.path is {base}: are these the"
                " same weights?"
            )
        return said

    def load_into(self, model: PreTrainedModel) -> None:
        """Put the weights where the model has adapters; shapes alone on meta. ModelError unless each has its
        place and its weight, of its shape, and all are finite."""
        layers = adapted_layers(model)
        # The names that peft writes, which are those of the file.
        places = {
            _PREFIX + name.replace(f".{ADAPTER}.", ".").removesuffix(f".{ADAPTER}"): parameter
            for name, parameter in model.named_parameters()
            if is_adapters(name, layers)
        }
        base = self._base_weights(model, layers, set(self.shapes) - set(places))
        missing = sorted(set(places) - set(self.shapes))
        unused = sorted(set(self.shapes) - set(places) - set(base))
        # Half a set of adapters would train on as if the rest had been at its beginning.
        if missing or unused:
            what = [f"{len(missing)} weights are missing, first {missing[0]}"] if missing else []
            what += [f"{len(unused)} belong to no layer, first {unused[0]}"] if unused else []
            wrong, todo = f"{WEIGHTS} is not of this model: {'; '.join(what)}", _OTHER_BASE
            if old := sum(bool(_OLD_EXPERTS.search(name)) for name in unused):
                wrong = (
                    f"{old} weights of {WEIGHTS} are of experts that were a layer each, first {unused[0]};"
                    " here they are"
                )
                wrong, todo = f"{wrong} one parameter", _SAVE_AGAIN
            raise self._wrong(wrong, self.folder, todo)
        for name, parameter in [*places.items(), *base.items()]:
            if tuple(parameter.shape) != self.shapes[name]:
                wrong = f"{WEIGHTS} is not of this model: {name} has another shape"
                raise ModelError(
                    describe(
                        WHERE, wrong, expected=tuple(parameter.shape), got=self.shapes[name], todo=_OTHER_BASE
                    )
                )
        # Names and shapes are all that a model without memory can be asked.
        if any(parameter.is_meta for parameter in places.values()):
            return
        with (
            library(f"{WHERE} {WEIGHTS}", str(self.folder), "fetch it again"),
            safe_open(self.folder / WEIGHTS, "pt") as file,
            torch.no_grad(),
        ):
            for name, parameter in places.items():
                value = file.get_tensor(name)
                if not value.is_floating_point():
                    raise self._wrong(f"{name} is not of a floating-point type", value.dtype)
                parameter.copy_(value)
                if not parameter.isfinite().all():
                    raise self._wrong(f"{name} holds numbers that are not finite", self.folder)
            for name, parameter in base.items():
                if not torch.equal(file.get_tensor(name).to(parameter), parameter):
                    wrong = (
                        f"{WEIGHTS} holds {name.removeprefix(_PREFIX)}, other than the base's: it was trained"
                        " or grew"
                    )
                    raise self._wrong(wrong, self.folder, _MERGE_FIRST)

    def _base_weights(
        self, model: PreTrainedModel, layers: dict[str, nn.Module], names: set[str]
    ) -> dict[str, Tensor]:
        """Weights of the file that are the base's own, with the model's: peft saves embeddings beside
        adapters it has on them, or where it thinks that they grew."""
        own = {
            plain_name(name, layers): parameter
            for name, parameter in model.named_parameters(remove_duplicate=False)
            if not is_adapters(name, layers)
        }
        found: dict[str, Tensor] = {}
        for name in names:
            inside = name.removeprefix(_PREFIX)
            plain = inside if inside in own else inside.replace(".base_layer.", ".")
            if name.startswith(_PREFIX) and plain in own:
                found[name] = own[plain]
        return found

    def _wrong(self, wrong: str, got: object, todo: str = _OTHER_BASE) -> ModelError:
        got = str(got) if isinstance(got, Path) else got
        return ModelError(describe(f"{WHERE} {self.folder.name}", wrong, got=got, todo=todo))


def _as_set(targets: str | Iterable[str] | None) -> set[str] | str:
    return targets if isinstance(targets, str) else set(targets or ())


def _same_place(one: str, other: str) -> bool:
    return one == other or (os.path.exists(one) and os.path.exists(other) and os.path.samefile(one, other))
