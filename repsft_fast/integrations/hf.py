"""A mixin that gives Hugging Face's `Trainer` and TRL's `SFTTrainer` the fused head and exact token accuracy.

    class FastTrainer(FusedHeadMixin, Trainer): ...

The loss is theirs: the sum over trained tokens divided by `num_items_in_batch` (tokens of the whole
accumulated batch over all ranks), or by this batch's own trained tokens where that is not given. What changes
is that [N, V] logits are never kept, and that accuracy is one integer over another: right tokens over trained
tokens since the last log, over all ranks, not a mean of batches' means.

The model's forward is extended, not replaced: a call with `repsft_denominator` runs backbone and head, every
other call is what it was. So DDP, FSDP, autocast and gradient checkpointing see one ordinary forward call.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from repsft_fast.errors import ConfigError, ModelError, describe
from repsft_fast.models.checks import check_head
from repsft_fast.models.loss import Head
from repsft_fast.ops.linear_cross_entropy import linear_cross_entropy
from repsft_fast.row import IGNORE_INDEX
from repsft_fast.stats import TokenStats

_TABLE = "token_table"


class FusedHeadMixin:
    """Put before the trainer's class. Logs `token_accuracy`, `entropy` and `trained_tokens` (`eval_…` in
    evaluation).

    `token_stats["train"]` and `token_stats["eval"]` are the exact sums of this rank since the last log.
    `fused_head_skip_below` is the τ of `linear_cross_entropy`. Evaluation that asks for logits
    (compute_metrics) pays a second, plain forward. On several ranks an evaluation loader that repeats samples
    to fill its last batch counts them twice.

    Raises ConfigError when the trainer is built, for what needs full logits: label smoothing, an own loss
    function, TRL's dft loss, a router's auxiliary loss, Liger's own fused head, nn.DataParallel. ModelError
    for a head that is no plain linear layer (LoRA on the head, a bias, 4-bit).
    """

    fused_head_skip_below: float = 0.0
    token_stats: dict[str, TokenStats]

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        trainer: Any = self
        problems = _what_needs_logits(trainer)
        if problems:
            raise ConfigError(
                [
                    describe("FusedHeadMixin", problem, todo="turn it off or use the plain trainer")
                    for problem in problems
                ]
            )
        self._logits_are_wanted = True
        self.token_stats = {}
        extend_forward(
            _causal_lm(trainer.accelerator.unwrap_model(trainer.model)), self.fused_head_skip_below
        )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:  # [] loss, or (loss, outputs)
        """Their loss by the fused head. Without "labels" in the inputs this is the trainer's own
        compute_loss."""
        # Without labels there is nothing the fused head could compute.
        trainer: Any = self
        if inputs.get("labels") is None and inputs.get("shift_labels") is None:
            more = {"return_outputs": return_outputs, "num_items_in_batch": num_items_in_batch}
            return super().compute_loss(model, inputs, **more)  # type: ignore[misc]

        # Not a method of its own: wrappers (DDP, FSDP) must see one forward call.
        denominator = 0 if num_items_in_batch is None else num_items_in_batch
        outputs = model(**{**inputs, "use_cache": False}, repsft_denominator=denominator)
        if not isinstance(outputs, Mapping) or _TABLE not in outputs:
            wrong = "the model's forward was replaced after the trainer was built, so the fused head is gone"
            raise ModelError(
                describe("FusedHeadMixin", wrong, todo="patch the model before building the trainer")
            )

        # Sums stay on the device until a log reads them.
        mode = "train" if trainer.model.training else "eval"
        counted = TokenStats(outputs[_TABLE])
        self.token_stats[mode] = self.token_stats[mode] + counted if mode in self.token_stats else counted

        # transformers divides by the tokens of all ranks and lets DDP average over them: undone here.
        loss = outputs["loss"]
        if trainer.args.average_tokens_across_devices and num_items_in_batch is not None:
            ranks = trainer.accelerator.num_processes // trainer.get_tp_size()
            loss = loss * ranks if ranks > 1 else loss

        # Full logits are what this class avoids: they are made only for who looks at them.
        if not return_outputs:
            return loss
        if not self._logits_are_wanted:
            return loss, {"loss": loss}
        with torch.no_grad():
            plain = {name: value for name, value in inputs.items() if name not in ("labels", "shift_labels")}
            return loss, model(**plain)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, *args: Any, **kwargs: Any
    ) -> Any:
        self._logits_are_wanted = not prediction_loss_only
        try:
            return super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)  # type: ignore[misc]
        finally:
            self._logits_are_wanted = True

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the exact figures since the last log. One read of the device, one reduction over the ranks:
        call it on all."""
        trainer: Any = self
        mode = "train" if trainer.model.training else "eval"
        counted = self.token_stats.pop(mode, None) or TokenStats.zeros(1, trainer.args.device)
        if trainer.accelerator.num_processes > 1:
            counted = TokenStats(trainer.accelerator.reduce(counted.table, reduction="sum"))
        total = int(counted.total)
        if total:
            prefix = "eval_" if mode == "eval" else ""
            logs[f"{prefix}token_accuracy"] = int(counted.correct) / total
            logs[f"{prefix}entropy"] = float(counted.mean("entropy"))
            logs[f"{prefix}trained_tokens"] = total
        super().log(logs, *args, **kwargs)  # type: ignore[misc]


def extend_forward(model: PreTrainedModel, skip_below: float = 0.0) -> None:
    """Make `model(..., labels=…, repsft_denominator=d)` run backbone and fused head. Every other call stays
    what it was.

    The call returns {"loss": [] Σ loss / d, "token_table": [1, K] int64 (`TokenStats.table`)}; d: [] tensor
    or number, 0 = the trained tokens of this batch, at least 1.
    """
    # What computes logits otherwise would be left out silently.
    settings = Head.of(model)
    head = model.get_output_embeddings()
    if getattr(type(head), "forward", None) is not nn.Linear.forward:
        wrong = f"{type(head).__name__} computes the logits, not a plain linear layer"
        raise ModelError(
            describe(
                "FusedHeadMixin: model", wrong, expected="nn.Linear", todo="leave lm_head out of the adapters"
            )
        )

    # A head that computes something else must be found before the first update, where there are weights.
    if not any(parameter.is_meta for parameter in model.parameters()):  # weights may come later, from rank 0
        check_head(model, settings)

    original = model.forward

    @functools.wraps(type(model).forward)  # the trainer keeps the columns its signature names
    def forward(
        self: PreTrainedModel, *args: Any, repsft_denominator: Tensor | float | None = None, **inputs: Any
    ) -> Any:
        if repsft_denominator is None:
            return original(*args, **inputs)
        targets = _targets(inputs.pop("labels", None), inputs.pop("shift_labels", None))
        hidden = getattr(self, self.base_model_prefix)(*args, **inputs).last_hidden_state
        weight = self.get_output_embeddings().weight
        dtype = _compute_dtype(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            hidden = hidden.flatten(0, 1).to(dtype)
            if settings.scale != 1.0:
                hidden = hidden * settings.scale
            weights = _weights(
                targets, repsft_denominator, torch.float64 if dtype == torch.float64 else torch.float32
            )
            loss, stats = linear_cross_entropy(
                hidden, weight.to(dtype), targets, weights, softcap=settings.softcap, skip_below=skip_below
            )
        return {"loss": loss, _TABLE: stats.sum_by(torch.zeros_like(stats.loss, dtype=torch.int64), 1).table}

    model.forward = MethodType(forward, model)  # type: ignore[method-assign]


def _targets(labels: Tensor | None, shifted: Tensor | None) -> Tensor:  # [B, T] → [B·T]
    if shifted is None:
        assert labels is not None
        shifted = F.pad(labels, (0, 1), value=IGNORE_INDEX)[..., 1:]
    return shifted.reshape(-1)


def _weights(targets: Tensor, denominator: Tensor | float, dtype: torch.dtype) -> Tensor:
    """[N], 1 / denominator. Inside the loss, so that backward meets a scale of 1. No host sync."""
    given = torch.as_tensor(denominator, dtype=dtype, device=targets.device)
    own = (targets != IGNORE_INDEX).sum().clamp(min=1).to(dtype)
    return (1.0 / torch.where(given > 0, given, own)).expand(targets.shape).contiguous()


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def _causal_lm(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _what_needs_logits(trainer: Any) -> list[str]:
    arguments, found = trainer.args, []
    if trainer.label_smoother is not None:
        found.append("label smoothing needs the full logits")
    if trainer.compute_loss_func is not None:
        found.append("compute_loss_func needs the full logits")
    if getattr(arguments, "loss_type", "nll") != "nll":
        found.append(f"loss_type {arguments.loss_type} is another loss than cross entropy")
    if getattr(trainer, "aux_loss_enabled", False) or getattr(
        trainer.model.config, "output_router_logits", False
    ):
        found.append("the router's auxiliary loss is not part of the fused head")
    liger = (getattr(arguments, "liger_kernel_config", None) or {}).get("fused_linear_cross_entropy", True)
    if getattr(arguments, "use_liger_kernel", False) and liger:
        found.append("use_liger_kernel brings a fused head of its own")
    if arguments.n_gpu > 1:
        found.append("nn.DataParallel copies the model without its extended forward")
    if getattr(getattr(trainer.model, "active_peft_config", None), "is_prompt_learning", False):
        found.append("virtual tokens shift the targets")
    parallelism = getattr(trainer.accelerator, "parallelism_config", None)
    if parallelism is not None and (parallelism.sp_enabled or parallelism.cp_enabled):
        found.append("sequence and context parallelism split the targets")
    return found
