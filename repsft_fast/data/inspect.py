"""What `repsft inspect` shows, as data: a sample as the model sees it, lengths, and what was dropped. Prints
nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from repsft_fast.data.sample import Loaded, Sample

HALF = "\ufffd"  # what a decoder writes for bytes that are no whole character
MOST_TOGETHER = 16  # tokens tried together; a character has at most four bytes, a token may begin within one


@dataclass(frozen=True)
class TokenView:
    id: int
    # what it adds to the text; of tokens that make one character together the first holds it, the others
    # nothing
    text: str
    trained: bool


@dataclass(frozen=True)
class SampleView:
    tokens: tuple[TokenView, ...]
    task: str
    weight: float
    source: str
    positions: int
    trained: int


@dataclass(frozen=True)
class TaskSummary:
    samples: int
    positions: int
    trained: int


@dataclass(frozen=True)
class Summary:
    tasks: dict[str, TaskSummary]
    positions: dict[str, int]  # min, median, p95, max, total
    trained: dict[str, int]  # the same of trained positions
    histogram: list[tuple[int, int, int]]  # (first length, last length, samples), lengths in positions
    duplicates: int  # samples that are, token for token, an earlier one again
    dropped: dict[str, int]
    warnings: list[str]


def view(sample: Sample, tokenizer: Any) -> SampleView:
    """The sample, token by token. Without a tokenizer (pre-tokenised rows) the ids stand for the text."""
    texts = _texts(sample.ids, sample.trained, tokenizer)
    pieces = tuple(TokenView(*piece) for piece in zip(sample.ids, texts, sample.trained, strict=True))
    return SampleView(pieces, sample.task, sample.weight, sample.source, sample.positions, sample.num_trained)


def summarise(loaded: Loaded, bins: int = 12) -> Summary:
    tasks: dict[str, TaskSummary] = {}
    for name in dict.fromkeys(sample.task for sample in loaded.samples):
        members = [sample for sample in loaded.samples if sample.task == name]
        tasks[name] = TaskSummary(
            len(members), sum(s.positions for s in members), sum(s.num_trained for s in members)
        )
    lengths = [sample.positions for sample in loaded.samples]
    return Summary(
        tasks=tasks,
        positions=_figures(lengths),
        trained=_figures([sample.num_trained for sample in loaded.samples]),
        histogram=histogram(lengths, bins),
        duplicates=sum(
            count - 1 for count in Counter(tuple(sample.ids) for sample in loaded.samples).values()
        ),
        dropped=dict(loaded.dropped),
        warnings=list(loaded.warnings),
    )


def histogram(lengths: Sequence[int], bins: int = 12) -> list[tuple[int, int, int]]:
    """(first, last, count) of at most `bins` equally wide ranges that cover every length; counts sum to
    len(lengths)."""
    if not lengths:
        return []
    low, high = min(lengths), max(lengths)
    width = -(-(high - low + 1) // bins)
    counts = Counter((length - low) // width for length in lengths)
    return [
        (low + n * width, min(low + (n + 1) * width - 1, high), counts[n])
        for n in range((high - low) // width + 1)
    ]


def _figures(values: Sequence[int]) -> dict[str, int]:
    if not values:
        return dict.fromkeys(("min", "median", "p95", "max", "total"), 0)
    ordered = np.sort(np.asarray(values, np.int64))
    at = {
        "min": 0,
        "median": len(ordered) // 2,
        "p95": min(len(ordered) - 1, int(0.95 * len(ordered))),
        "max": -1,
    }
    return {name: int(ordered[number]) for name, number in at.items()} | {"total": int(ordered.sum())}


def _texts(ids: Sequence[int], trained: Sequence[bool], tokenizer: Any) -> list[str]:
    """What every token adds to the text of those before it. Where that is no text, the vocabulary's own
    spelling."""
    if tokenizer is None:
        return [f"<{token}>" for token in ids]

    def decode(tokens: Sequence[int]) -> str:
        text = tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(text)

    texts: list[str] = []
    # the tokens in front: some decoders leave out the space before the first word they see
    before: Sequence[int] = []
    while (start := len(texts)) < len(ids):
        head = decode(before) if before else ""
        for stop in range(start + 1, min(start + MOST_TOGETHER, len(ids)) + 1):
            if any(trained[n] != trained[start] for n in range(start, stop)):
                break
            both = decode([*before, *ids[start:stop]])
            text = both[len(head) :] if both.startswith(head) else decode(ids[start:stop])
            if HALF not in text:
                texts += [text] + [""] * (stop - start - 1)
                break
        if len(texts) == start:
            texts.append(str(tokenizer.convert_ids_to_tokens(ids[start])))
        before = ids[start : len(texts)]
        if HALF in decode(before):
            before = []
    return texts
