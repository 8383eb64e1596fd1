"""`model.loss(row)`: backbone → hidden [T, H] → fused head → weighted loss sum and the statistics of its
rows.

One method on the causal LM runs both halves, because FSDP2 gathers parameters around *one* entry: calling the
backbone and the head apart mixes sharded and plain tensors, or leaves the head's gradient unreduced without a
word.
"""

import contextlib
import math
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from repsft_fast.errors import ModelError, describe
from repsft_fast.ops.attention import Packed, no_mask
from repsft_fast.ops.linear_cross_entropy import linear_cross_entropy
from repsft_fast.row import Row
from repsft_fast.stats import PositionStats

# Keys of text configurations that stand between the head and its logits. `check_head` finds out whether they
# are all.
_MULTIPLY: tuple[str, ...] = ("logit_scale", "lm_head_multiplier")  # Cohere, Falcon H1
_DIVIDE: tuple[str, ...] = ("logits_scaling", "logits_mup_width_multiplier")  # Granite, Inkling
# Gemma 2, RecurrentGemma, xLSTM
_CAP = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


@dataclass(frozen=True)
class Head:
    """logits = cap · tanh(scale · hidden @ W.T / cap); no cap: logits = scale · hidden @ W.T. bias: + b
    behind hidden @ W.T."""

    scale: float = 1.0
    softcap: float | None = None
    bias: bool = False

    @staticmethod
    def of(model: PreTrainedModel) -> "Head":
        """The head transformers' configuration describes. ModelError for a head that is no linear layer."""
        head = model.get_output_embeddings()
        name = type(model).__name__
        if head is None or getattr(head, "weight", None) is None:
            raise ModelError(
                describe("model", f"{name} has no linear output head", expected="a causal language model")
            )
        config = model.config.get_text_config()
        multiply, divide = _MULTIPLY, _DIVIDE
        # it multiplies by what Granite divides by, under the same name
        if config.model_type.startswith("hyperclovax"):
            multiply, divide = ("logits_scaling",), ()
        scale = math.prod(float(getattr(config, key, None) or 1.0) for key in multiply)
        scale /= math.prod(float(getattr(config, key, None) or 1.0) for key in divide)
        cap = next((c for key in _CAP if (c := getattr(config, key, None)) is not None), None)
        bias = getattr(head, "bias", None) is not None  # Phi, GPT-J
        return Head(scale, cap, bias)

    def inputs(self, hidden: Tensor, head: Any) -> tuple[Tensor, Tensor]:  # [T, H'], [V, H'] in hidden's type
        """What the fused head multiplies. A bias is a column of ones beside the hidden states, exactly: 1 ·
        b, and the gradient of b is that column's. The columns are filled up to a multiple of 8, which GPU
        products want."""
        if self.scale != 1.0:
            hidden = hidden * self.scale
        weight = head.weight.to(hidden.dtype)
        if not self.bias:
            return hidden, weight
        more = 8 - hidden.shape[-1] % 8
        ones = F.pad(hidden.new_ones(*hidden.shape[:-1], 1), (0, more - 1))
        bias = F.pad((head.bias * self.scale).to(hidden.dtype)[:, None], (0, more - 1))
        return torch.cat([hidden, ones], dim=-1), torch.cat([weight, bias], dim=-1)


@dataclass(frozen=True)
class LossSettings:
    """What `loss` needs beside the row; lives on the model as `model.loss_settings`."""

    head: Head
    attention: str = "auto"
    packed: bool = True  # rows hold several documents; False: one each, and the model's own attention
    skip_below: float = 0.0
    chunk_bytes: int | None = None  # of logits held at once; None = by device


def attach_loss(model: Any, settings: LossSettings) -> None:
    """Give `model` its method `loss(row) -> ([] fp32 weighted sum, PositionStats)`."""
    model.loss_settings = settings
    model.loss = MethodType(_loss, model)


def backbone_of(model: PreTrainedModel) -> Any:
    """The module whose last hidden states the output head reads: `get_decoder()`'s (OPT's lies inside its
    base model), else the base model, else the one model inside (Llama 4 names another). ModelError where
    there is none."""
    candidates: list[Any] = [getattr(model, model.base_model_prefix, None), *model.children()]
    with contextlib.suppress(AttributeError, NotImplementedError):
        # ModernBERT calls its output layer so: no model, so not taken
        candidates.insert(0, model.get_decoder())
    found = next(
        (module for module in candidates if isinstance(module, PreTrainedModel) and module is not model), None
    )
    if found is None:
        raise ModelError(
            describe(
                "model",
                f"{type(model).__name__} has no backbone of its own",
                expected="a causal language model",
            )
        )
    return found


def hidden_states(
    model: PreTrainedModel, row: Row, attention: str = "auto", *, packed: bool = True
) -> Tensor:  # [T, H]
    """The backbone's last hidden states (after its final norm) for every position of the row.

    `use_cache=False` always: with the default cache Hugging Face models let packed documents see each other.
    packed=False: the row is one document; its tokens alone are passed, without the padding behind them, so
    that every architecture computes what it computes elsewhere. Then [real tokens, H].
    """
    backbone = backbone_of(model)
    if not packed:
        return backbone(
            input_ids=row.tokens[:, : max(row.real_tokens, 1)], use_cache=False
        ).last_hidden_state[0]
    if len(row.samples) > 1:
        check_row(backbone, row)
    output = backbone(
        input_ids=row.tokens,
        position_ids=row.positions,
        attention_mask=no_mask(row.tokens.device),
        use_cache=False,
        packed=Packed.of(row, attention),
    )
    return output.last_hidden_state[0]


def row_limit(config: Any) -> int | None:
    """How long a row of several documents may be, where layers count positions from its start; None: as long
    as it likes.

    Llama 4 scales the queries of layers without rotary embedding by their place in the row
    (`attn_temperature_tuning`): by 1 up to `floor_scale` positions, and past it a document would be scaled by
    the length of those before it.
    """
    text = config.get_text_config()
    rope = getattr(text, "no_rope_layers", None) or []
    if getattr(text, "attn_temperature_tuning", False) and not all(rope):
        return max(int(text.floor_scale) - 1, 0)
    return None


def check_row(backbone: Any, row: Row) -> None:
    """ModelError for a row longer than `row_limit` that holds several documents. Shapes alone are looked
    at."""
    limit = row_limit(backbone.config)
    if limit is not None and row.real_tokens > limit and len(row.samples) > 1:
        raise too_long(type(backbone).__name__, limit, row.real_tokens)


def too_long(name: str, limit: int, got: int) -> ModelError:
    wrong = f"{name} scales attention by the place in the row past {limit} positions"
    todo = f"set batch.row_tokens: {limit}, or batch.pack: false" if limit else "set batch.pack: false"
    expected = f"rows of at most {limit} positions" if limit else "rows of one sample"
    return ModelError(describe("batch.row_tokens", wrong, expected=expected, got=got, todo=todo))


def _loss(self: Any, row: Row) -> tuple[Tensor, PositionStats]:
    settings: LossSettings = self.loss_settings
    hidden = hidden_states(self, row, settings.attention, packed=settings.packed)
    hidden, weight = settings.head.inputs(hidden, self.get_output_embeddings())
    if row.spare:
        hidden = F.pad(hidden, (0, 0, 0, 1))
    return linear_cross_entropy(
        hidden,
        weight,
        row.targets[: len(hidden)],
        row.weights[: len(hidden)],
        row.trained_positions,
        skip_below=settings.skip_below,
        softcap=settings.head.softcap,
        chunk_bytes=settings.chunk_bytes,
        kept_share=row.kept_share,
    )


def supported_dtype(value: str | torch.dtype, where: str) -> torch.dtype:
    """float32, bfloat16, float16 or float64, as a torch type; ModelError otherwise."""
    dtype = getattr(torch, value, None) if isinstance(value, str) else value
    if dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ModelError(
            describe(where, "is not a type a model can be held in", expected="float32 or bfloat16", got=value)
        )
    return dtype
