"""Which token ends a trained turn: a model that has learned it must be stopped by it, and one that has not
never stops.

A base model that is trained with a chat template learns to end its turns with that template's token
(<|im_end|>), while its folder still names the token that ended its documents (<|endoftext|>). So the ends are
found in the samples themselves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from repsft_fast.data.placeholders import special_strings
from repsft_fast.data.sample import Sample
from repsft_fast.data.settings import DataSettings

LOOKED_AT = 1000  # samples that are searched for ends which stand inside trained text as well
SURE = 0.99  # of a token's trained places, at the least so many must be ends


@dataclass(frozen=True)
class Ends:
    """What ends the trained runs of some samples. Only special tokens of the tokenizer are ends."""

    samples: int = 0
    # id → trained runs that it ends, the most frequent first
    tokens: dict[int, int] = field(default_factory=dict)
    # the same, of those that stand inside trained runs as well
    doubtful: dict[int, int] = field(default_factory=dict)
    endless: int = 0  # samples whose last trained token is no end, though they were not cut for their length
    known: bool = True  # False: no tokenizer says which tokens are special


def find_ends(samples: Sequence[Sample], tokenizer: Any, *, cut_at: int | None = None) -> Ends:
    """Look at the last token of every trained run; white space behind an end belongs to it.

    cut_at: the length in positions at which samples were cut (overlong: truncate): the last run of one so
    long ends anywhere. Costs one pass over the flags: 10,000 samples of 1,000 tokens take about 0.1 s.
    """
    if tokenizer is None:
        return Ends(len(samples), known=False)
    special, blank = end_candidates(tokenizer), _Blank(tokenizer)
    found: Counter[int] = Counter()
    endless = 0
    for sample in samples:
        last = len(sample.ids)
        cut = cut_at is not None and sample.positions >= cut_at
        for start, stop in trained_runs(sample.trained):
            token = _end_of(sample.ids, start, stop, special, blank)
            if stop == last and cut:
                continue
            if token is not None:
                found[token] += 1
            elif stop == last:
                endless += 1
    doubtful = _inside(samples, found, special, blank) - {tokenizer.eos_token_id}
    ordered = dict(found.most_common())
    return Ends(
        len(samples),
        {token: n for token, n in ordered.items() if token not in doubtful},
        {token: n for token, n in ordered.items() if token in doubtful},
        endless,
    )


def end_candidates(tokenizer: Any) -> frozenset[int]:
    """Ids of special tokens, without those that stand for something else in a text: unknown, mask."""
    other = {tokenizer.unk_token_id, getattr(tokenizer, "mask_token_id", None)} - {tokenizer.eos_token_id}
    ids = {tokenizer.convert_tokens_to_ids(text) for text in special_strings(tokenizer)}
    return frozenset(token for token in ids - other if isinstance(token, int))


def trained_runs(trained: Sequence[bool]) -> Iterator[tuple[int, int]]:
    """(first, past the last) of every unbroken stretch of trained tokens."""
    flags = bytes(trained)  # finds twice as fast as a list does
    stop = 0
    while (start := flags.find(1, stop)) >= 0:
        stop = flags.find(0, start)
        if stop < 0:
            stop = len(flags)
        yield start, stop


def cut_at(settings: DataSettings) -> int | None:
    """The length in positions at which over-long samples are cut; None where none is."""
    return settings.max_tokens if settings.overlong == "truncate" else None


def ends_in_words(ends: Ends, tokenizer: Any) -> list[str]:
    """All there is to say of them: what ends the trained turns, and what is wrong."""
    named = ", ".join(f"{name_of(token, tokenizer)} ({n}×)" for token, n in ends.tokens.items())
    return ([f"trained turns end with {named}"] if named else []) + problems(ends, tokenizer)


def problems(ends: Ends, tokenizer: Any) -> list[str]:
    """Why a model trained on these samples may not stop."""
    if not ends.known:
        return [
            "which tokens end a turn cannot be known without a tokenizer: the model's own eos_token_id stays"
            " as it is"
        ]
    words = [
        f"{name_of(token, tokenizer)} ends {n} trained turns and stands inside others as well:"
        " it does not join the saved model's eos_token_id"
        for token, n in ends.doubtful.items()
    ]
    if ends.endless:
        some = bool(ends.tokens or ends.doubtful)
        words.append(
            f"{ends.endless} of {ends.samples} samples end without an end-of-turn token: the model will not"
            " learn to stop"
            + (" there" if some else "")
            + "; use a chat template that writes one behind the assistant's turns, or a tokenizer with an"
            " eos_token"
        )
    return words


def name_of(token: int, tokenizer: Any) -> str:
    name = tokenizer.convert_ids_to_tokens(token) if tokenizer is not None else None
    return str(token) if name is None else str(name)


class _Blank:
    """Is a token white space only? Asked of the tokenizer once per token."""

    def __init__(self, tokenizer: Any):
        self._tokenizer, self._known = tokenizer, dict[int, bool]()

    def __call__(self, token: int) -> bool:
        if token not in self._known:
            text = self._tokenizer.decode(
                [token], skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
            spelled = self._tokenizer.convert_ids_to_tokens(token) or ""  # a lone ▁ may be decoded to nothing
            self._known[token] = not text.strip() and not spelled.strip("▁ĠĊĉ \n\t\r")
        return self._known[token]


def _end_of(ids: list[int], start: int, stop: int, special: frozenset[int], blank: _Blank) -> int | None:
    """The end token of the run ids[start:stop], or None where it ends in text."""
    last = stop - 1
    while last > start and ids[last] not in special and blank(ids[last]):
        last -= 1
    return ids[last] if ids[last] in special else None


def _inside(
    samples: Sequence[Sample], found: Counter[int], special: frozenset[int], blank: _Blank
) -> set[int]:
    """Ends that stand in the middle of trained runs too often to stop at: harmony's <|end|> behind a train of
    thought."""
    if not found or not samples:
        return set()
    step = -(-len(samples) // LOOKED_AT)
    places: Counter[int] = Counter()
    last_places: Counter[int] = Counter()
    for sample in samples[::step]:
        for start, stop in trained_runs(sample.trained):
            run = sample.ids[start:stop]
            for token in found:
                places[token] += run.count(token)
            end = _end_of(sample.ids, start, stop, special, blank)
            if end is not None:
                last_places[end] += 1
    return {token for token in found if places[token] and last_places[token] < SURE * places[token]}
