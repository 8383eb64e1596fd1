"""The statistics of rows of logits as one would write them in plain torch: what law 3 measures ours
against."""

import torch
import torch.nn.functional as F

OUTPUTS = ("loss", "entropy", "top1_probability", "margin", "log10_miss")  # the order of the kernel's table


def capped(logits: torch.Tensor, softcap: float | None) -> torch.Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def plain_rows(logits: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
    """In the dtype of the logits."""
    log_p = torch.log_softmax(logits, dim=1)
    p = log_p.exp()
    top = logits.topk(2, dim=1).values
    return {
        "loss": F.cross_entropy(logits, targets, reduction="none"),
        "entropy": -(p * log_p).sum(1),
        "top1_probability": p.amax(1),
        "margin": top[:, 0] - top[:, 1],
        "log10_miss": torch.log10(1 - p.gather(1, targets[:, None])[:, 0]),
    }
