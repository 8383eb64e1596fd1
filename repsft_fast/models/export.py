"""Write a model so that `AutoModelForCausalLM.from_pretrained(folder)` reads it, tokenizer and template beside it."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from repsft_fast.distributed import World, full_state
from repsft_fast.errors import ModelError, describe
from repsft_fast.models.lora import ADAPTER, has_lora, merged_state


def save_pretrained(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | Path,
    *,
    merge_lora: bool = False,
    dtype: torch.dtype | None = None,
    world: World | None = None,
) -> None:
    """Weights as safetensors, configuration, tokenizer. Under FSDP2 every rank must call it; rank 0 writes.

    With LoRA: a peft folder (adapters only), or with `merge_lora` a plain model with the adapters added in.
    dtype: None = the type the weights are held in. ModelError for `merge_lora` without adapters.
    """
    adapted = has_lora(model)
    if merge_lora and not adapted:
        raise ModelError(describe("model.lora.merge", "there are no adapters to merge"))
    world = world or World(0, 1, 0, torch.device("cpu"))
    state = full_state(model, world)
    if not world.is_main:
        return
    if dtype is not None:
        cast = {id(value): value.to(dtype) for value in state.values() if value.is_floating_point()}
        state = {name: cast.get(id(value), value) for name, value in state.items()}  # tied weights stay tied
    write_state(model, tokenizer, state, folder, merge_lora=merge_lora)


def write_state(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    state: dict[str, Tensor],
    folder: str | Path,
    *,
    merge_lora: bool = False,
) -> None:
    """Write given weights (`model.state_dict()`'s names, whole) in the model's clothes; reads nothing mutable of `model`.

    So a thread may call it while training goes on. With LoRA and without `merge_lora` the adapters' names are enough.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if has_lora(model) and not merge_lora:
        _save_adapters(model, state, folder)
    else:
        _save_model(model, merged_state(model, state) if merge_lora else state, folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def stop_at(model: PreTrainedModel, ends: Sequence[int], tokenizer: PreTrainedTokenizerBase | None) -> str | None:
    """Let the model stop at the tokens that end its trained turns, here and in every folder it is saved to.

    They join generation_config.eos_token_id, behind the ids that stand there. Of those one goes: an ordinary token of this
    tokenizer (a default of the model's class, another tokenizer's end), at which replies would break off.
    config.json keeps its eos_token_id, which is the base model's. Returns what is to be said; None = nothing changed.
    """
    settings = model.generation_config
    if settings is None or tokenizer is None or not ends:
        return None
    before = stops_of(model)
    named = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}
    kept = [token for token in before if token in named]
    after = list(dict.fromkeys([*kept, *ends]))
    if after == before:
        return None
    settings.eos_token_id = after[0] if len(after) == 1 else after

    def names(tokens: Sequence[int]) -> str:
        return ", ".join(str(tokenizer.convert_ids_to_tokens(t) if t < len(tokenizer) else t) for t in tokens) or "none"

    new = [token for token in after if token not in before]
    said = []
    if new:
        verb = "joins" if len(new) == 1 else "join"
        said.append(f"trained turns end with {names(new)}, which {verb} the saved model's eos_token_id (was {names(before)})")
    if gone := [token for token in before if token not in kept]:
        said.append(f"{names(gone)} leaves the saved model's eos_token_id: to this tokenizer it is an ordinary token")
    if has_lora(model):
        said.append("an adapter's base model keeps its own: give generate the generation_config.json beside the adapter")
    return "; ".join(said)


def stops_of(model: PreTrainedModel) -> list[int]:
    """The ids at which the model's own `generate` stops."""
    settings = model.generation_config
    ends = settings.eos_token_id if settings is not None else None
    return [] if ends is None else [int(ends)] if isinstance(ends, int) else [int(token) for token in ends]


def _save_model(model: PreTrainedModel, state: dict[str, Any], folder: Path) -> None:
    """Through an empty twin of the model: no adapters in it, no shards, nothing that still calls it quantised."""
    with torch.device("meta"):
        twin = type(model)(copy.deepcopy(model.config))  # FSDP2's subclass makes an object of the class it stands before
    twin.to(next(value.dtype for value in state.values() if value.is_floating_point()))
    twin.generation_config = model.generation_config
    for name in ("_weight_conversions", "_auto_class"):  # how the file's names differ from the modules'; custom code
        if name in model.__dict__:
            setattr(twin, name, getattr(model, name))
    twin.save_pretrained(folder, state_dict=state)


def _save_adapters(model: PreTrainedModel, state: dict[str, Any], folder: Path) -> None:
    from peft import get_peft_model_state_dict

    adapters = get_peft_model_state_dict(model, state_dict=state, adapter_name=ADAPTER)
    tensors = {f"base_model.model.{name}": value.contiguous() for name, value in adapters.items()}
    model.peft_config[ADAPTER].save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)  # where the adapted model stops; its base may stop elsewhere
