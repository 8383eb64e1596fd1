"""`model.loss(row)`: backbone → hidden [T, H] → fused head → weighted loss sum and the statistics of its rows.

One method on the causal LM runs both halves, because FSDP2 gathers parameters around *one* entry: calling the backbone
and the head apart mixes sharded and plain tensors, or leaves the head's gradient unreduced without a word.
"""

from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from repsft_fast.errors import ModelError, describe
from repsft_fast.ops.attention import Packed, no_mask
from repsft_fast.ops.linear_cross_entropy import linear_cross_entropy
from repsft_fast.row import Row
from repsft_fast.stats import RowStats


@dataclass(frozen=True)
class Head:
    """logits = cap · tanh(scale · hidden @ W.T / cap); no cap: logits = scale · hidden @ W.T."""

    scale: float = 1.0
    softcap: float | None = None

    @staticmethod
    def of(model: PreTrainedModel) -> "Head":
        """The head transformers' configuration describes. ModelError for a bias or a head that is no linear layer."""
        head = model.get_output_embeddings()
        name = type(model).__name__
        if head is None or getattr(head, "weight", None) is None:
            raise ModelError(describe("model", f"{name} has no linear output head", expected="a causal language model"))
        if getattr(head, "bias", None) is not None:
            wrong = f"{name}'s output head has a bias, which the fused head does not add"
            raise ModelError(describe("model", wrong, expected="a head without bias"))
        config = model.config.get_text_config()
        scale = float(getattr(config, "logit_scale", None) or 1.0)  # Cohere multiplies
        scale /= float(getattr(config, "logits_scaling", None) or 1.0)  # Granite divides
        return Head(scale, getattr(config, "final_logit_softcapping", None))  # Gemma 2


@dataclass(frozen=True)
class LossSettings:
    """What `loss` needs beside the row; lives on the model as `model.loss_settings`."""

    head: Head
    attention: str = "auto"
    skip_below: float = 0.0
    chunk_bytes: int | None = None  # of logits held at once; None = by device


def attach_loss(model: Any, settings: LossSettings) -> None:
    """Give `model` its method `loss(row) -> ([] fp32 weighted sum, RowStats)`."""
    model.loss_settings = settings
    model.loss = MethodType(_loss, model)


def hidden_states(model: PreTrainedModel, row: Row, attention: str = "auto") -> Tensor:  # [T, H]
    """The backbone's last hidden states (after its final norm) for every position of the row.

    `use_cache=False` always: with the default cache Hugging Face models let packed documents see each other.
    """
    backbone = getattr(model, model.base_model_prefix)
    output = backbone(
        input_ids=row.tokens,
        position_ids=row.positions,
        attention_mask=no_mask(row.tokens.device),
        use_cache=False,
        packed=Packed.of(row, attention),
    )
    return output.last_hidden_state[0]


def _loss(self: Any, row: Row) -> tuple[Tensor, RowStats]:
    settings: LossSettings = self.loss_settings
    hidden = hidden_states(self, row, settings.attention)
    if settings.head.scale != 1.0:
        hidden = hidden * settings.head.scale
    weight = self.get_output_embeddings().weight
    return linear_cross_entropy(
        hidden,
        weight if weight.dtype == hidden.dtype else weight.to(hidden.dtype),
        row.targets,
        row.weights,
        row.trained_rows,
        skip_below=settings.skip_below,
        softcap=settings.head.softcap,
        chunk_bytes=settings.chunk_bytes,
        kept_share=row.kept_share,
    )


def supported_dtype(value: str | torch.dtype, where: str) -> torch.dtype:
    """float32, bfloat16, float16 or float64, as a torch type; ModelError otherwise."""
    dtype = getattr(torch, value, None) if isinstance(value, str) else value
    if dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ModelError(describe(where, "is not a type a model can be held in", expected="float32 or bfloat16", got=value))
    return dtype
