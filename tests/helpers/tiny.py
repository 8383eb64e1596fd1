"""Tiny models and rows shared by the tests: every architecture the trainer promises, small enough for
milliseconds."""

from collections.abc import Sequence

import torch
from transformers import LlamaConfig, Olmo2Config, Olmo3Config, PreTrainedConfig, Qwen2Config, Qwen3Config

from repsft_fast.row import IGNORE_INDEX, Row

VOCABULARY = 97
WINDOW = 6  # of Olmo3's sliding layers: shorter than most documents below
NAMES = ("llama", "llama-tied", "qwen2", "qwen3", "olmo2", "olmo3")
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,  # far from zero, so that attention depends on what it sees
}


def config(name: str, **changes: object) -> PreTrainedConfig:
    sizes = {**_SIZES, "tie_word_embeddings": name == "llama-tied", **changes}
    match name:
        case "llama" | "llama-tied":
            return LlamaConfig(**sizes)
        case "qwen2":
            return Qwen2Config(**sizes)
        case "qwen3":
            return Qwen3Config(**{"head_dim": 16, **sizes})
        case "olmo2":
            return Olmo2Config(**sizes)
        case "olmo3":
            layers = ["sliding_attention", "full_attention"]
            return Olmo3Config(**{"sliding_window": WINDOW, "layer_types": layers, **sizes})
    raise KeyError(name)


def documents(lengths: Sequence[int], seed: int = 0, vocabulary: int = VOCABULARY) -> list[list[int]]:
    """Token documents; a length counts positions, so a document has one token more."""
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocabulary, (n + 1,), generator=draw).tolist() for n in lengths]


def row(
    samples: Sequence[Sequence[int]],
    *,
    denominator: float = 1.0,
    prompt: int = 0,
    length: int | None = None,
    average: str = "sample",
    ids: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
) -> Row:
    """The row of `samples` in this order, padded to `length`; the first `prompt` positions of each are not
    trained.

    A position's weight is 1 / (denominator · trained positions of its sample), or 1 / denominator for
    `token`.
    """
    lengths = [len(s) - 1 for s in samples]
    real = sum(lengths)
    padding = (length or real) - real
    tokens, positions, targets, weights, segments = [], [], [], [], []
    for number, sample in enumerate(samples):
        skipped = min(prompt, len(sample) - 2)
        trained = len(sample) - 1 - skipped
        tokens += sample[:-1]
        positions += range(len(sample) - 1)
        targets += [IGNORE_INDEX] * skipped + list(sample[1:])[skipped:]
        weights += [0.0] * skipped + [1 / denominator / (trained if average == "sample" else 1)] * trained
        segments += [number] * (len(sample) - 1)
    tokens += [samples[0][0] if samples else 0] * padding
    positions += [0] * padding
    targets += [IGNORE_INDEX] * padding
    weights += [0.0] * padding
    total = real + padding
    segment_lengths = (*lengths, padding) if padding else tuple(lengths)
    borders = [sum(segment_lengths[:s]) for s in range(len(segment_lengths) + 1)]
    target = torch.tensor(targets, dtype=torch.int64, device=device)
    trained_positions = (target != IGNORE_INDEX).nonzero()[:, 0]
    return Row(
        tokens=torch.tensor([tokens], dtype=torch.int64, device=device),
        positions=torch.tensor([positions], dtype=torch.int64, device=device),
        targets=target,
        weights=torch.tensor(weights, dtype=torch.float32, device=device),
        trained_positions=trained_positions,
        position_tasks=torch.zeros_like(trained_positions),
        position_segments=torch.tensor(segments + [0] * padding, dtype=torch.int64, device=device)[
            trained_positions
        ],
        cu_seqlens=torch.tensor([*borders, total, total], dtype=torch.int32, device=device),
        segment_lengths=segment_lengths,
        max_seqlen=max(segment_lengths, default=0),
        samples=tuple(range(len(lengths)) if ids is None else ids),
        real_tokens=real,
    )


def filled(model: torch.nn.Module) -> torch.nn.Module:
    """The model with adapters that do something: at the start B is zero."""
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.1)
    return model
