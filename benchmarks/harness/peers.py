"""The heads we are measured against: whichever of them import. Each gives a call that runs forward and
backward.

A peer that does not import, or that cannot run on this device, is named with the reason; it is never left out
silently. Every call computes the mean loss over trained rows and the gradients of hidden states and head;
`returns` says what else.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden [N, H], head [V, H], targets [N] → [] mean loss


@dataclass(frozen=True)
class Peer:
    name: str
    build: Callable[[], Loss]  # imports what it needs; ImportError or AttributeError says it is not here
    returns: str = "loss"
    compiles: bool = False  # takes tens of seconds at every new shape


def ours(skip_below: float = 0.0, kept_share: float = 1.0, chunk_bytes: int | None = None) -> Loss:
    """Our head, every row statistic included. The trained rows come with the batch, as the store gives
    them."""
    from repsft_fast.ops.linear_cross_entropy import linear_cross_entropy

    # the targets are held too: the id of a freed tensor comes again
    known: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def loss(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        if id(targets) not in known:
            rows = (targets != IGNORE).nonzero()[:, 0]
            known[id(targets)] = targets, rows, (targets != IGNORE).float() / max(1, rows.numel())
        _, rows, weights = known[id(targets)]
        return linear_cross_entropy(
            hidden,
            head,
            targets,
            weights,
            rows,
            skip_below=skip_below,
            kept_share=kept_share,
            chunk_bytes=chunk_bytes,
        )[0]

    return loss


def eager(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Full logits, as a plain training loop writes it."""
    return F.cross_entropy((hidden @ head.T).float(), targets, ignore_index=IGNORE)


def eager64(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """The same in the operands' own precision: float64 operands give the truth."""
    return F.cross_entropy(hidden @ head.T, targets, ignore_index=IGNORE)


def paper_metrics(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Full logits and the metrics paper A logs from them, in the manner of its code: [N, V] fp32 copies each
    time."""
    logits = (hidden @ head.T).float()
    with torch.no_grad():
        kept = logits[targets != IGNORE]
        log_p = F.log_softmax(kept, dim=-1)
        p = log_p.exp()
        entropy = -(p * log_p).sum(-1).mean()
        accuracy = (kept.argmax(-1) == targets[targets != IGNORE]).float().mean()
        top1 = p.max(-1).values.mean()
        two = kept.topk(2, dim=-1).values
        metrics = torch.stack([entropy, accuracy, top1, (two[:, 0] - two[:, 1]).mean()])
    loss = F.cross_entropy(logits, targets, ignore_index=IGNORE)
    return loss + 0 * metrics.sum().to(loss.dtype)


def _compiled() -> Loss:
    return torch.compile(eager, dynamic=False)


def _auto_chunker() -> Loss:
    import torch._inductor.config as inductor

    inductor.auto_chunker  # noqa: B018  (AttributeError where this torch has none)
    return torch.compile(eager, dynamic=False, options={"auto_chunker.enable": True})


def _torch_linear() -> Loss:
    function = F.linear_cross_entropy
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda hidden, head, targets: function(hidden, head, targets, ignore_index=IGNORE, options=options)


def _liger(chunk_mem_const: int | None = None, accumulate: torch.dtype | None = None) -> Loss:
    function = importlib.import_module(
        "liger_kernel.ops.fused_linear_cross_entropy"
    ).LigerFusedLinearCrossEntropyFunction
    more = () if chunk_mem_const is None else (chunk_mem_const,)

    def loss(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        fixed = (
            None,
            None,
            IGNORE,
            0.0,
            0.0,
            "mean",
            None,
            False,
            accumulate,
            False,
            False,
            False,
            None,
            None,
        )
        return function.apply(hidden, head, targets, *fixed, *more)[0]

    return loss


def _cce() -> Loss:
    function = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    return lambda hidden, head, targets: function(hidden, head, targets, ignore_index=IGNORE, impl="cce")


def _quack() -> Loss:
    module = importlib.import_module("quack.linear_cross_entropy")
    function = module.chunked_linear_cross_entropy
    return lambda hidden, head, targets: function(
        hidden, head, targets, ignore_index=IGNORE, reduction="mean"
    )


def _trl() -> Loss:
    function = importlib.import_module("trl.kernels.chunked_logprob").ChunkedLogProbFunction
    size = getattr(importlib.import_module("trl.trainer.utils"), "_CHUNKED_LOGPROB_CHUNK_SIZE", 4096)

    def loss(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        mask = targets != IGNORE
        outputs = ("entropy", "is_top1")
        log_probs = function.apply(hidden[mask], head, None, targets[mask], 1.0, size, None, 1.0, outputs)[0]
        return -log_probs.sum() / mask.sum().clamp(min=1)

    return loss


def _unsloth() -> Loss:
    function = importlib.import_module("unsloth_zoo.fused_losses.cross_entropy_loss").unsloth_fused_ce_loss

    def loss(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        shape = (1, *hidden.shape)
        return function(
            trainer=None, hidden_states=hidden.view(shape), lm_head_weight=head, lm_head_bias=None,
            labels=targets[None], shift_labels=False, ignore_index=IGNORE,
        )  # fmt: skip

    return loss


PEERS = (
    Peer("torch eager, full logits", lambda: eager),
    Peer("torch.compile", _compiled, compiles=True),
    Peer("Inductor auto-chunker", _auto_chunker, compiles=True),
    Peer("F.linear_cross_entropy", _torch_linear),
    Peer("Liger, default chunks", _liger),
    Peer("Liger, default chunks, fp32 sum", lambda: _liger(None, torch.float32)),
    Peer("Liger, chunk_mem_const=16", lambda: _liger(16)),
    Peer("Liger, chunk_mem_const=16, fp32 sum", lambda: _liger(16, torch.float32)),
    Peer("cut-cross-entropy", _cce, returns="loss; leaves out small gradients"),
    Peer("QuACK", _quack),
    Peer("TRL fused head", _trl, returns="loss, entropy, is_top1"),
    Peer("Unsloth-zoo", _unsloth),
    Peer("paper A's metrics", lambda: paper_metrics, returns="loss, entropy, accuracy, top-1, margin"),
)


def step(loss: Loss, hidden: Tensor, head: Tensor, targets: Tensor) -> Callable[[], Any]:
    """A call: forward and backward, gradients dropped before, as a training step does."""

    def call() -> Tensor:
        hidden.grad = head.grad = None
        value = loss(hidden, head, targets)
        value.backward()
        return value.detach()

    return call


def usable(
    hidden: Tensor, head: Tensor, targets: Tensor, *, compiling: bool, names: Collection[str] | None = None
) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """(calls of the peers that run on these operands and are right, reasons of the others). names: None = all
    of them.

    Right: the loss within 2 % and the gradient of the hidden states within 5 % (RMS) of full logits in fp32;
    looser than our own tests because some leave out small gradients by design.
    """
    expected, reference = _reference(hidden, head, targets)
    calls: dict[str, Callable[[], Any]] = {}
    reasons: dict[str, str] = {}
    for peer in PEERS:
        if names is not None and peer.name not in names:
            continue
        if peer.compiles and not compiling:
            reasons[peer.name] = "compiles for long: measured at one shape only"
            continue
        try:
            call = step(peer.build(), hidden, head, targets)
            value = float(call())
            assert hidden.grad is not None
            wrong = float((hidden.grad.float() - reference).norm() / reference.norm().clamp(min=1e-30))
        # A peer's own trouble (an import, a device, a compiler) must not end the session.
        except Exception as error:
            reasons[peer.name] = (
                f"{type(error).__name__}: {str(error).splitlines()[0][:100] if str(error) else ''}"
            )
            continue

        # Asked this way round, a NaN is wrong.
        if not abs(value - expected) <= 0.02 * abs(expected) + 1e-3 or not wrong < 0.05:
            reasons[peer.name] = (
                f"wrong here: loss {value:.4f} for {expected:.4f}, gradient off by {wrong:.1%}"
            )
            continue
        calls[peer.name] = call
    hidden.grad = head.grad = None
    return calls, reasons


def _reference(hidden: Tensor, head: Tensor, targets: Tensor, chunk: int = 1024) -> tuple[float, Tensor]:
    """Mean loss and the gradient of the hidden states in fp32, by chunks so that any size fits."""
    kept = (targets != IGNORE).nonzero()[:, 0]
    gradient = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    total = 0.0
    with torch.no_grad():
        for rows in kept.split(chunk):
            logits = (hidden[rows] @ head.T).float()
            log_p = F.log_softmax(logits, dim=-1)
            total -= float(log_p.gather(1, targets[rows, None]).sum())
            p = log_p.exp_().scatter_add_(1, targets[rows, None], torch.full_like(logits[:, :1], -1.0))
            gradient[rows] = (p.to(hidden.dtype) @ head).float() / kept.numel()
    return total / max(1, kept.numel()), gradient
