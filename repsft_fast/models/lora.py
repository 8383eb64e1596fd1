"""Low-rank adapters through peft: y = W x + (alpha / rank) · B A x, with W frozen."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from repsft_fast.errors import ModelError, describe

ADAPTER = "default"


@dataclass(frozen=True)
class LoraSettings:
    rank: int = 16
    alpha: float = 32.0  # the adapter's output is multiplied by alpha / rank
    dropout: float = 0.0  # before the adapter
    target_modules: str | Sequence[str] = "all-linear"  # every linear layer of the backbone, or names

    @staticmethod
    def of(given: Any) -> "LoraSettings":
        """From a mapping or any object with these attributes; others it has are not read."""
        if isinstance(given, LoraSettings):
            return given
        names = [field.name for field in fields(LoraSettings)]
        values = given if isinstance(given, Mapping) else {name: getattr(given, name) for name in names if hasattr(given, name)}
        unknown = sorted(set(values) - set(names) - {"merge"})
        if unknown:
            raise ModelError(describe("model.lora", "has unknown settings", expected=", ".join(names), got=", ".join(unknown)))
        return LoraSettings(**{name: values[name] for name in names if name in values})


def add_lora(model: PreTrainedModel, settings: LoraSettings) -> None:
    """Inject fp32 adapters in place and freeze everything else. ModelError when peft is missing or nothing matches."""
    try:
        import peft
    except ImportError as error:
        raise ModelError(describe("model.lora", "needs peft, which is not installed", todo="pip install peft")) from error
    targets = settings.target_modules
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # a scale; peft divides it, whole or not
        lora_dropout=settings.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type=peft.TaskType.CAUSAL_LM,
    )
    try:
        model.add_adapter(config, adapter_name=ADAPTER)
    except ValueError as error:
        raise ModelError(describe("model.lora.target_modules", str(error), got=targets)) from error
    if any(isinstance(m, peft.tuners.lora.LoraLayer) for m in (model.get_output_embeddings(), model.get_input_embeddings())):
        wrong = "names the embedding or the output head, which stay frozen"
        raise ModelError(describe("model.lora.target_modules", wrong, expected="linear layers of the backbone", got=targets))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)


def has_lora(model: nn.Module) -> bool:
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def merged_state(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the plain model with the adapters added in, from a gathered `state` of the adapted model.

    W + (alpha / rank) · B A in fp32 (fp64 stays fp64), cast back to W's type. The model itself is not touched.
    """
    from peft.tuners.lora import LoraLayer

    merged = {name.replace(".base_layer.", "."): value for name, value in state.items() if ".lora_" not in name}
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        down, up = (state[f"{name}.lora_{side}.{ADAPTER}.weight"] for side in "AB")
        weight = state[f"{name}.base_layer.weight"]
        wide = torch.promote_types(weight.dtype, torch.float32)
        delta = (up.to(wide) @ down.to(wide)) * module.scaling[ADAPTER]
        merged[f"{name}.weight"] = (weight.to(wide) + delta).to(weight.dtype)
    return merged
