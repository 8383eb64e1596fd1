"""More tokens than the model knows: rows for them in the embedding and in the output head."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from repsft_fast.errors import ModelError, describe

SETTING = "model.resize_vocabulary"


def tokens_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """Rows that a model needs for every token of this tokenizer; ids may have gaps."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1))


def grow_vocabulary(model: PreTrainedModel, size: int, *, frozen: bool = False) -> str | None:
    """Make room for token ids below `size`, in place; what is to be said, or None where there was room.

    frozen: only adapters will learn, so there must be room already.

    A new token begins as the mean of the old ones (embedding, head and its bias), so before training it is as
    likely as they are on average and takes little from any of them (Hewitt 2021, "Initializing new word
    embeddings for pretrained language models"). Nothing is drawn: every rank and every resumption makes the
    same. Never smaller, tied weights stay tied. On meta only the shapes change. ModelError for an
    architecture that keeps tokens elsewhere too.
    """
    head = model.get_output_embeddings()
    parts = [part for part in (model.get_input_embeddings(), head) if part is not None]
    old = min(_rows(part, model) for part in parts)
    if size <= old:
        return None
    if frozen:
        wrong = "adapters leave the embedding frozen, so new tokens would never be learned"
        raise ModelError(
            describe(SETTING, wrong, expected=f"{old:,} tokens", got=f"{size:,}", todo="drop model.lora")
        )
    # Some pad one of the two: which rows would be the new tokens' is then not known.
    if (most := max(_rows(part, model) for part in parts)) != old:
        raise _cannot(
            model,
            f"its embedding and head have {most:,} and {old:,} rows, of which some are no tokens of text",
        )
    tied = _tied(model)
    if others := _other_tables(model, old):
        wrong = (
            f"{type(model).__name__} keeps {old:,} tokens in {', '.join(others)} too, which would not know"
            " new ones"
        )
        raise ModelError(
            describe(SETTING, wrong, got=f"{size:,} tokens", todo="use the model's own tokenizer")
        )
    try:
        model.resize_token_embeddings(size, mean_resizing=False)
    except Exception as error:  # of any library's class
        raise _cannot(model, f"{type(error).__name__}: {error}".splitlines()[0]) from error
    _check_grown(model, size, tied)
    # Once each: a tied head is the embedding itself.
    embeddings: Any = model.get_input_embeddings()
    head = model.get_output_embeddings()
    for parameter in {
        id(p): p for p in (embeddings.weight, getattr(head, "weight", None), getattr(head, "bias", None))
    }.values():
        if parameter is not None:
            _begin_as_the_mean(parameter, old)
    return (
        f"{size - old:,} tokens more than the model had ({old:,}): their rows begin as the mean of the others"
    )


def _check_grown(model: PreTrainedModel, size: int, tied: set[tuple[str, ...]]) -> None:
    """ModelError unless all of the model followed: transformers changes what it knows of. tied: as before."""
    parts = (model.get_input_embeddings(), model.get_output_embeddings())
    rows = [_rows(part, model) for part in parts if part is not None]
    if any(count != size for count in rows):
        raise _cannot(model, f"it has {' and '.join(map(str, rows))} rows after it")
    if apart := tied - _tied(model):
        raise _cannot(model, f"{' and '.join(min(apart))} come apart, which it holds as one")
    if unlike := _unlike_its_configuration(model):
        raise _cannot(
            model,
            f"its configuration would not give {', '.join(unlike[:3])} their new sizes when it is loaded",
        )


def _begin_as_the_mean(parameter: Tensor, old: int) -> None:
    if parameter.device.type != "meta":
        with torch.no_grad():
            parameter[old:] = parameter[:old].mean(
                0, dtype=torch.promote_types(parameter.dtype, torch.float32)
            )


def _rows(part: Any, model: PreTrainedModel) -> int:
    weight = getattr(part, "weight", None)
    if not isinstance(weight, Tensor):
        raise _cannot(model, f"its tokens are a {type(part).__name__}")
    return weight.shape[0]


def _other_tables(model: PreTrainedModel, old: int) -> list[str]:
    """Embeddings and biases by token beside the two that transformers resizes."""
    known = {id(part) for part in (model.get_input_embeddings(), model.get_output_embeddings())}
    found = [name for name, buffer in model.named_buffers() if buffer.dim() and buffer.shape[-1] == old]
    for name, module in model.named_modules():
        if (
            isinstance(module, nn.Embedding | nn.Linear)
            and id(module) not in known
            and module.weight.shape[0] == old
        ):
            found.append(name)
    return found


def _tied(model: PreTrainedModel) -> set[tuple[str, ...]]:
    """Names that are one weight."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {tuple(some) for some in names.values() if len(some) > 1}


def _unlike_its_configuration(model: PreTrainedModel) -> list[str]:
    """Weights and buffers that the configuration gives another shape: by which the saved model will be
    loaded."""
    try:
        with torch.device("meta"):
            twin = type(model)(copy.deepcopy(model.config))
    except Exception as error:  # of any library's class
        raise _cannot(model, f"{type(error).__name__}: {error}".splitlines()[0]) from error
    shapes = {name: value.shape for name, value in (*twin.named_parameters(), *twin.named_buffers())}
    held = (*model.named_parameters(), *model.named_buffers())
    return [name for name, value in held if shapes.get(name, value.shape) != value.shape]


def _cannot(model: PreTrainedModel, why: str) -> ModelError:
    return ModelError(
        describe(
            SETTING,
            f"{type(model).__name__} cannot be given more tokens ({why})",
            todo="use the model's own tokenizer",
        )
    )
