"""Two checks at start: the head computes what the fused head computes, and no document of a row sees another."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from repsft_fast.errors import ModelError, describe
from repsft_fast.models.loss import Head
from repsft_fast.row import Row

# Lengths of the probe's documents: the watched one lies between two others.
_PROBE = (5, 9, 4)
# Largest difference, relative to the spread of the losses, that rounding may explain when a document moves inside a
# row. A leak shows as 0.1 and more; bf16 keeps 8 bits, so its rounding alone reaches a few percent.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.15}


def check_head(model: PreTrainedModel, head: Head) -> None:
    """ModelError unless the model's own logits are those `head` describes: a transform nobody named would train
    something else than what is generated. Costs one forward over four tokens; under FSDP2 every rank must call it."""
    tokens = torch.arange(4, device=next(model.parameters()).device)[None] % model.config.get_text_config().vocab_size
    found: list[Tensor] = []

    def of_the_head(backbone: Any, arguments: Any, output: Any) -> None:
        # inside the model's forward, where FSDP2 has gathered the head
        found.append(output.last_hidden_state[0] @ model.get_output_embeddings().weight.T)

    was_training = model.training
    model.eval()
    hook = getattr(model, model.base_model_prefix).register_forward_hook(of_the_head)
    try:
        with torch.no_grad():
            expected = model(input_ids=tokens, use_cache=False).logits[0].double()
    finally:
        hook.remove()
        model.train(was_training)
    logits = found[0].double() * head.scale
    if head.softcap is not None:
        logits = torch.tanh(logits / head.softcap) * head.softcap
    error = (logits - expected).abs().max() / expected.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    if not error < TOLERANCE[found[0].dtype]:
        wrong = f"{type(model).__name__} transforms its logits in a way the fused head does not know"
        raise ModelError(describe("model", wrong, expected="logits = hidden @ head.T", got=f"relative error {error:.2g}"))


def check_no_leak(model: Any, *, seed: int = 0) -> None:
    """ModelError naming the attention when one document of a row changes another, or a packed document differs from
    the same document alone. Three forward passes over at most 18 tokens; under FSDP2 every rank must call it."""
    vocabulary = model.config.get_text_config().vocab_size
    device = next(model.parameters()).device
    draw = torch.Generator().manual_seed(seed)
    documents = [torch.randint(vocabulary, (n + 1,), generator=draw).tolist() for n in _PROBE]
    others = [[(token + 1) % vocabulary for token in document] for document in documents]
    watched = documents[1]
    was_training = model.training
    model.eval()
    with torch.no_grad():
        packed = _losses(model, documents, 1, device)
        perturbed = _losses(model, [others[0], watched, others[2]], 1, device)
        alone = _losses(model, [watched], 0, device)
    model.train(was_training)
    spread = packed.std().clamp_min(1e-6)
    tolerance = TOLERANCE[getattr(model, "compute_dtype", torch.float32)]
    for other, what in ((perturbed, "changes with its neighbours in the row"), (alone, "differs from the document alone")):
        error = ((packed - other).abs().max() / spread).item()
        if not error < tolerance:
            attention = f"{model.config._attn_implementation}/{model.loss_settings.attention}"
            wrong = f"a packed document {what} (relative error {error:.2g}): {type(model).__name__} leaks or misplaces"
            todo = "choose another model.attention; if none helps, this architecture cannot be packed"
            raise ModelError(describe("model.attention", wrong, expected=f"below {tolerance:g}", got=attention, todo=todo))


def _losses(model: Any, documents: Sequence[Sequence[int]], watched: int, device: torch.device) -> Tensor:  # [n] fp64
    """Loss per position of document number `watched` in the row of `documents`."""
    row = probe_row(documents, device)
    _, stats = model.loss(row)
    return stats.loss[row.row_segments == watched].double()


def probe_row(documents: Sequence[Sequence[int]], device: torch.device) -> Row:
    """A row of token documents without padding, every position trained with weight 1."""
    lengths = tuple(len(document) - 1 for document in documents)
    total = sum(lengths)

    def integers(values: Sequence[int], dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    segments = integers([s for s, n in enumerate(lengths) for _ in range(n)])
    return Row(
        tokens=integers([t for d in documents for t in d[:-1]])[None],
        positions=integers([i for n in lengths for i in range(n)])[None],
        targets=integers([t for d in documents for t in d[1:]]),
        weights=torch.ones(total, device=device),
        trained_rows=torch.arange(total, device=device),
        row_tasks=torch.zeros_like(segments),
        row_segments=segments,
        cu_seqlens=integers([sum(lengths[:s]) for s in range(len(lengths) + 1)], torch.int32),
        segment_lengths=lengths,
        max_seqlen=max(lengths),
        samples=tuple(range(len(lengths))),
        real_tokens=total,
    )
