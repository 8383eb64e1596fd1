"""Write a model so that `AutoModelForCausalLM.from_pretrained(folder)` reads it, tokenizer and template
beside it.

In the source's form and type: `models.readable`. Files have the modes that the umask gives, weights too.
"""

import copy
import os
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from repsft_fast.distributed import World, full_state
from repsft_fast.errors import ModelError, describe
from repsft_fast.models.lora import ADAPTER, has_lora
from repsft_fast.models.merge import merged_state
from repsft_fast.models.readable import (
    ModelForm,
    in_the_models_names,
    model_form,
    readable_config,
    write_generation,
    write_tokenizer,
)

_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PIECE = 1 << 18


def save_pretrained(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | Path,
    *,
    merge_lora: bool = False,
    dtype: str | torch.dtype = "auto",
    world: World | None = None,
) -> list[str]:
    """Weights as safetensors, configuration, tokenizer. Under FSDP2 every rank must call it; rank 0 writes.

    With LoRA: a peft folder (adapters only, as they are held), or with `merge_lora` a plain model with the
    adapters added in. dtype: of the weights. auto: each in the type its source has it in; without weights to
    start from, as they are held. Returns what is to be said of the cast. ModelError for `merge_lora` without
    adapters, and for other types.
    """
    if not isinstance(model, PreTrainedModel):
        todo = "a PeftModel has a save_pretrained of its own"
        raise ModelError(
            describe("save_pretrained", "is for a PreTrainedModel", got=type(model).__name__, todo=todo)
        )
    # All refusals before the weights are gathered, which every rank takes part in.
    adapted = has_lora(model)
    if adapted and ADAPTER not in model.peft_config:
        named = ", ".join(model.peft_config)
        raise ModelError(
            describe("save_pretrained", "knows adapters of one name", expected=ADAPTER, got=named)
        )
    if merge_lora and not adapted:
        raise ModelError(describe("model.lora.merge", "there are no adapters to merge"))
    _type_of(dtype)
    world = world or World(0, 1, 0, torch.device("cpu"))
    state = full_state(model, world)
    if not world.is_main:
        return []
    return write_state(model, tokenizer, state, folder, merge_lora=merge_lora, dtype=dtype)


def write_state(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    state: dict[str, Tensor],
    folder: str | Path,
    *,
    merge_lora: bool = False,
    dtype: str | torch.dtype = "auto",
) -> list[str]:
    """Write given weights (`model.state_dict()`'s names, whole) in the model's clothes; reads nothing mutable
    of `model`.

    So a thread may call it while training goes on. With LoRA and without `merge_lora` the adapters' names are
    enough. dtype and what is returned: as in `save_pretrained`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    said: list[str] = []
    # Adapters alone are as they are held; a whole model takes the names and types of its source.
    form = model_form(model)
    if has_lora(model) and not merge_lora:
        _save_adapters(model, state, form, folder)
    else:
        twin, held = _twin(model), merged_state(model, state) if merge_lora else state
        named = in_the_models_names(form, twin, held)
        whole, said = cast(held, named, dtype)
        if merge_lora:
            said += _narrowed(held, whole, named)
        _save_model(model, twin, whole, form, folder)
    if tokenizer is not None:
        write_tokenizer(tokenizer, folder)
    _by_the_umask(folder)
    return said


def _narrowed(held: Mapping[str, Tensor], saved: Mapping[str, Tensor], form: ModelForm) -> list[str]:
    """The base of adapters is held in the type that is computed with: of a wider source the merged model has
    rounded weights, also where nothing was added, in the source's type."""
    counts: Counter[tuple[torch.dtype, torch.dtype]] = Counter()
    for name, value in {
        id(value): (name, value) for name, value in held.items() if value.is_floating_point()
    }.values():
        source = form.type_of(name)
        wider = (source or value.dtype, saved[name].dtype)
        if all(torch.promote_types(dtype, value.dtype) != value.dtype for dtype in wider):
            counts[wider[0], value.dtype] += value.numel()
    total = sum(value.numel() for value in {id(value): value for value in held.values()}.values())
    return [
        f"{count:,} of {total:,} merged weights are of a base held in {_name(narrow)}, rounded from"
        f" {_name(wide)}; model.compute_dtype: float32 keeps them, or merge the saved adapters into the base"
        " with peft"
        for (wide, narrow), count in counts.items()
    ]


def cast(
    state: Mapping[str, Tensor], form: ModelForm, dtype: str | torch.dtype = "auto"
) -> tuple[dict[str, Tensor], list[str]]:
    """(weights in the type they are saved in, what is to be said); tied ones stay one tensor.

    A type that cannot hold a finite weight is not taken, for none of them: a run's result is worth more than
    its size.
    """
    chosen = _type_of(dtype)
    made: dict[int, Tensor] = {}
    rounded: Counter[torch.dtype] = Counter()
    total = 0
    for name, value in state.items():
        if not value.is_floating_point() or id(value) in made:
            continue
        wanted = chosen or form.type_of(name) or value.dtype
        saved = made[id(value)] = value.to(wanted)
        total += value.numel()
        if torch.promote_types(wanted, value.dtype) == wanted:
            continue  # wide enough for all of them
        if lost := _too_large(value, wanted):
            wrong = (
                f"{lost:,} of {name} are larger than {_name(wanted)} can hold"
                f" ({torch.finfo(wanted).max:,.0f})"
            )
            todo = "model.save_dtype: bfloat16 holds them"
            return dict(state), [
                f"the weights are saved as they are held, not as {_name(wanted)}: {wrong}; {todo}"
            ]
        rounded[wanted] += _rounded(value, saved)
    # Rounding that the source's own type forces is said all the same: the saved model is another.
    said = []
    for wanted, count in rounded.items():
        if count:
            why = (
                "the source's type; model.save_dtype: float32 keeps them"
                if chosen is None
                else "as model.save_dtype says"
            )
            said.append(f"{count:,} of {total:,} weights are rounded to {_name(wanted)}, {why}")
    return {name: made.get(id(value), value) for name, value in state.items()}, said


def _too_large(value: Tensor, wanted: torch.dtype) -> int:
    """How many finite weights would become infinite."""
    largest = torch.finfo(wanted).max
    if value.numel() == 0 or all(abs(float(end)) <= largest for end in value.aminmax()):
        return 0
    return int(torch.count_nonzero(value.to(wanted).isinf() & value.isfinite()))


def _rounded(value: Tensor, saved: Tensor) -> int:
    """How many weights are no longer what they were; in pieces that stay in the processor's cache."""
    count = 0
    for exact, got in zip(value.flatten().split(_PIECE), saved.flatten().split(_PIECE), strict=True):
        count += int(torch.count_nonzero(got.to(exact.dtype).sub_(exact).nan_to_num_()))
    return count


def stop_at(
    model: PreTrainedModel, ends: Sequence[int], tokenizer: PreTrainedTokenizerBase | None
) -> str | None:
    """Let the model stop at the tokens that end its trained turns, here and in every folder it is saved to.

    They join generation_config.eos_token_id, behind the ids that stand there. Of those one goes: an ordinary
    token of this tokenizer (a default of the model's class, another tokenizer's end), at which replies would
    break off. config.json keeps its eos_token_id, which is the base model's. Returns what is to be said; None
    = nothing changed.
    """
    settings = model.generation_config
    if settings is None or tokenizer is None or not ends:
        return None
    # An id that this tokenizer knows as an ordinary token would cut replies at a word.
    before = stops_of(model)
    named = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}
    kept = [token for token in before if token in named]
    after = list(dict.fromkeys([*kept, *ends]))
    if after == before:
        return None
    settings.eos_token_id = after[0] if len(after) == 1 else after

    def names(tokens: Sequence[int]) -> str:
        return (
            ", ".join(str(tokenizer.convert_ids_to_tokens(t) if t < len(tokenizer) else t) for t in tokens)
            or "none"
        )

    new = [token for token in after if token not in before]
    # What generation does changes, so it is said, each change with what was there.
    said = []
    if new:
        verb = "joins" if len(new) == 1 else "join"
        said.append(
            f"trained turns end with {names(new)}, which {verb} the saved model's eos_token_id (was"
            f" {names(before)})"
        )
    if gone := [token for token in before if token not in kept]:
        said.append(
            f"{names(gone)} leaves the saved model's eos_token_id: to this tokenizer it is an ordinary token"
        )
    if has_lora(model):
        said.append(
            "an adapter's base model keeps its own: give generate the generation_config.json beside the"
            " adapter"
        )
    return "; ".join(said)


def stops_of(model: PreTrainedModel) -> list[int]:
    """The ids at which the model's own `generate` stops."""
    settings = model.generation_config
    ends = settings.eos_token_id if settings is not None else None
    if ends is None:
        return []
    return [int(ends)] if isinstance(ends, int) else [int(token) for token in ends]


def _type_of(dtype: str | torch.dtype) -> torch.dtype | None:
    """None: the source's."""
    if dtype in (*_TYPES.values(), torch.float64) and isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return None
    if dtype not in _TYPES:
        raise ModelError(
            describe(
                "model.save_dtype", "is no type for weights", expected=f"auto, {', '.join(_TYPES)}", got=dtype
            )
        )
    return _TYPES[str(dtype)]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _twin(model: PreTrainedModel) -> Any:
    """An empty one to save through: no adapters in it, no shards, nothing that still calls it quantised."""
    config = copy.deepcopy(model.config)
    # transformers refuses to save them here; the source's stay in its file
    for name in config._get_generation_parameters():
        delattr(config, name)
    with torch.device("meta"):
        twin: Any = type(model)(config)  # FSDP2's subclass makes an object of the class it stands before
    twin.generation_config = GenerationConfig()
    # how the file's names differ from the modules'; custom code
    for name in ("_weight_conversions", "_auto_class"):
        if name in model.__dict__:
            setattr(twin, name, getattr(model, name))
    return twin


def _save_model(
    model: PreTrainedModel, twin: Any, state: dict[str, Any], form: ModelForm, folder: Path
) -> None:
    sizes: Counter[torch.dtype] = Counter()
    for value in {id(v): v for v in state.values() if v.is_floating_point()}.values():
        sizes[value.dtype] += value.numel()
    most = sizes.most_common(1)[0][0]
    twin.to(most)
    twin.save_pretrained(folder, state_dict=state)
    readable_config(model, form, folder, retyped=most != form.most)
    if twin.can_generate():
        write_generation(model.generation_config, form, folder)


def _save_adapters(model: PreTrainedModel, state: dict[str, Any], form: ModelForm, folder: Path) -> None:
    from peft import get_peft_model_state_dict

    # Embeddings stay frozen here. Left to itself, peft asks the hub whether they were changed, in the last
    # minute of a run.
    adapters = get_peft_model_state_dict(
        model, state_dict=state, adapter_name=ADAPTER, save_embedding_layers=False
    )
    tensors = {f"base_model.model.{name}": value.contiguous() for name, value in adapters.items()}
    model.peft_config[ADAPTER].save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    # where the adapted model stops; its base may stop elsewhere
    write_generation(model.generation_config, form, folder)


def _by_the_umask(folder: Path) -> None:
    """safetensors makes its files for their owner alone. What the umask gives is seen at a file: asking for
    it would set it."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        probe = Path(place, "probe")
        probe.touch()
        mode = probe.stat().st_mode & 0o777
    for file in folder.glob("*.safetensors"):
        os.chmod(file, mode)
