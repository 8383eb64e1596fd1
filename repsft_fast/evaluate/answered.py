"""Evaluation by generation: is the final answer of the model's own reply the reference's?

For replies with a rationale, where many texts are right and exact match of tokens says little. Greedy,
batched.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from repsft_fast.data.store import TokenStore
from repsft_fast.errors import DataError, describe
from repsft_fast.evaluate.answers import find_extractor, same_answer
from repsft_fast.evaluate.generate import generate


@dataclass(frozen=True)
class Answers:
    """What one round of generation found."""

    right: np.ndarray  # [n] float64, 1.0 where the extracted answer is the reference's
    finished: np.ndarray  # [n] bool: ended by itself, not by the length limit
    tokens: int  # read and generated
    generated: int
    sum_squared_lengths: int


class Answered:
    """A fixed set of samples, asked as often as wanted. Every rank asks all of them and finds the same."""

    def __init__(
        self,
        store: TokenStore,
        samples: Sequence[int],
        tokenizer: Any,
        *,
        extractor: str = "final",
        trusted: bool = False,
        max_new_tokens: int = 512,
        batch_size: int = 16,
        end_ids: Sequence[int] = (),
    ):
        """extractor: a name of answers.EXTRACTORS, or, trusted, package.module:function (text → answer or
        None). end_ids: at which replies end, besides the tokenizer's own and the one that most references end
        with.

        Raises ConfigError for an unknown extractor, DataError naming a sample whose reference holds no
        answer.
        """
        self._decode: Callable[[Sequence[int]], str] = lambda ids: tokenizer.decode(
            ids, skip_special_tokens=True
        )
        self._extract = find_extractor(extractor, trusted=trusted)
        pad_id = tokenizer.pad_token_id or 0
        self._generate = functools.partial(
            generate, max_new_tokens=max_new_tokens, batch_size=batch_size, pad_id=pad_id
        )
        pairs = [store.last_reply(int(i)) for i in samples]
        self.prompts = [prompt for prompt, _ in pairs]
        self.references: list[str] = []
        # Told at the start: a sample that nobody can answer would count as wrong in every evaluation.
        for i, (_, reply) in zip(samples, pairs, strict=True):
            answer = self._extract(self._decode(reply))
            if answer is None:
                where = store.sources[int(i)] or f"sample {int(i)}"
                wrong = "its reference holds no answer for mixture.extractor"
                todo = "choose another extractor, or mixture.metric: exact_match"
                got = self._decode(reply)[-80:]
                raise DataError(describe(where, wrong, expected=extractor, got=got, todo=todo))
            self.references.append(answer)
        last = collections.Counter(reply[-1] for _, reply in pairs)
        # A reply cut for its length ends anywhere: an end token is one that many replies share.
        self.end_ids = sorted(
            {token for token, n in last.items() if 2 * n > len(pairs)}
            | ({tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set())
            | set(end_ids)
        )

    def __call__(self, model: nn.Module) -> Answers:
        """Generate every reply and judge it. Costs one forward pass per generated token."""
        replies = self._generate(model, self.prompts, end_ids=self.end_ids)
        right = [
            float(same_answer(self._extract(self._decode(reply.ids)), reference))
            for reply, reference in zip(replies, self.references, strict=True)
        ]
        lengths = np.array(
            [len(p) + len(r.ids) for p, r in zip(self.prompts, replies, strict=True)], dtype=np.int64
        )
        return Answers(
            np.array(right),
            np.array([reply.finished for reply in replies]),
            int(lengths.sum()),
            sum(len(reply.ids) for reply in replies),
            int((lengths * lengths).sum()),
        )
