"""Generation over transformers' forward call and cache, for a CPU and wherever nothing faster is there.

Prompts of about one length are read together, padded on the left; replies to one prompt share the reading of
it; a reply that ended leaves the batch. Of several ranks that share a model all make the same steps
(`evaluate.lockstep`).

Not every model can be served so: rotary frequencies may follow the length of a batch, layers may carry a
state through padding, caches may be of a kind nobody here knows. A model is tried once, beside its own
forward pass without a cache; where it computes something else, batches hold prompts of one length, and where
that does not help transformers' own `generate` computes, a reply at a time, and only the drawing is ours.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from repsft_fast.errors import ModelError, describe
from repsft_fast.evaluate.asked import Generation, Request, Sampling
from repsft_fast.evaluate.drawing import choose, entropies, uniforms
from repsft_fast.evaluate.identity import PROBED_TOKENS, Scored
from repsft_fast.evaluate.kept import new_cache
from repsft_fast.evaluate.lockstep import Lockstep, raising

# How far padding and cache may move logits, in their own spread: rounding in fp32, and in half precision. Too
# strict costs time alone.
EXACT, ROUNDED = 1e-3, 0.05
SHOWN, PADDED = 8, 5  # tokens of a prompt that a model is tried with, and of padding before it

# Batches of any prompts, or of prompts of one length; transformers' `generate` in batches of one length, or a
# reply at a time.
Way = Literal["padded", "alike", "theirs", "one by one"]


# How a model is served, once it has been tried: six short passes, which a look at a few prompts would feel.
_WAYS: weakref.WeakKeyDictionary[nn.Module, Way] = weakref.WeakKeyDictionary()


@dataclass
class _Reply:
    """A reply on its way."""

    request: Request
    uniform: np.ndarray  # [limit] float64: one number a token
    ids: list[int] = field(default_factory=list)
    entropy: float = 0.0  # sum over its tokens
    ended: bool = False


class Loop:
    """An engine (`asked.Engine`). Under FSDP2 every rank calls it with the same requests, and all get the
    same replies."""

    name = "loop"

    def __init__(self, model: nn.Module, *, batch_size: int = 16, pad_id: int = 0):
        """batch_size: replies at a time. pad_id: any token of the vocabulary; it is masked."""
        self.model: Any = model
        self.batch_size = batch_size
        self.pad_id = pad_id
        self.way: Way | None = None  # how this model is served, once it has been tried
        taken = inspect.signature(model.forward).parameters
        self._takes = {name for name in ("position_ids", "logits_to_keep") if name in taken}
        caches = ("past_key_values", "cache_params")
        self._cache_name = next((name for name in caches if name in taken), "")

    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        *,
        end_ids: Sequence[int],
        on_reply: Callable[[Request, Generation], None],
    ) -> None:
        """Answers every request by on_reply, a batch's shortest reply first. Penalties and the like in the
        model's generation settings are not applied: greedy is the most likely token.

        A model that learned its positions one by one (`model.position_limit`) replies no further than they
        go; a prompt that leaves no room gets Generation([], False). The model's mode and every random
        generator are left as they were. Raises ValueError on an empty prompt, ModelError where logits are not
        finite, torch.OutOfMemoryError on every rank where memory runs out on one.
        """
        if any(len(request.ids) == 0 for request in requests):
            raise ValueError("prompts: expected at least one token in each, got an empty prompt")
        limit = getattr(self.model, "position_limit", None)
        known = []
        for request in sorted(requests, key=lambda r: (-len(r.ids), r.prompt, r.draw)):
            if sampling.max_new_tokens < 1 or (limit is not None and len(request.ids) >= limit):
                on_reply(request, Generation([], False))
            else:
                known.append(request)
        if not known:
            return
        with _evaluating(self.model), Lockstep(self.model) as together:
            if self.way is None:
                self.way = _WAYS.get(self.model) or self._try(
                    together, [request.ids for request in known], limit
                )
                _WAYS[self.model] = self.way
            batch = _Batch(self, together, sampling, frozenset(end_ids), on_reply)
            size = 1 if self.way == "one by one" else self.batch_size
            for some in _cut(known, size, alike=self.way != "padded"):
                replies = []
                for request in some:
                    room = sampling.max_new_tokens
                    if limit is not None:
                        room = min(room, limit - len(request.ids))
                    numbers = uniforms(sampling.seed + request.prompt, request.draw, room)
                    replies.append(_Reply(request, numbers))
                (batch.decode if self.way in ("padded", "alike") else batch.by_transformers)(replies)

    def probe(self, prompts: Sequence[Sequence[int]]) -> list[Scored]:
        """Every prompt with a few greedy tokens behind it, and their log-probabilities as this loop computes
        them (`identity`). Under FSDP2 every rank calls it."""
        with _evaluating(self.model), Lockstep(self.model) as together:
            return [self._scored(together, list(ids)) for ids in prompts]

    def _scored(self, together: Lockstep, ids: list[int]) -> Scored:
        found, read = [], 0
        try:
            cache = new_cache(self.model)
        except ModelError:  # served by transformers' own loop
            cache = None

        def likeliest() -> Tensor:
            new = torch.tensor([ids[read:]], device=together.device)
            if cache is None:
                logits = _wide(self.model(input_ids=new, use_cache=False).logits[0, -1])
            else:
                positions = torch.arange(read, len(ids), device=together.device)[None]
                logits = self.forward(new, None, positions, cache)[0]
            logprob, token = logits.log_softmax(dim=-1).max(dim=-1)
            return torch.stack([token.double(), logprob.double()])

        for _ in range(PROBED_TOKENS):
            token, logprob = together(2, likeliest)
            read = 0 if cache is None else len(ids)
            ids = [*ids, int(token)]
            found.append(logprob)
        return Scored(tuple(ids), tuple(found))

    def forward(self, ids: Tensor, mask: Tensor | None, positions: Tensor, cache: Any) -> Tensor:
        """[B, V] logits of the last column of ids [B, T], fp32 or fp64. mask: [B, columns so far] int64, None
        where nothing is padded; positions [B, T]."""
        given = {"input_ids": ids, "attention_mask": mask, self._cache_name: cache, "use_cache": True}
        more = {"position_ids": positions, "logits_to_keep": 1}
        given.update({name: value for name, value in more.items() if name in self._takes})
        return _wide(self.model(**given).logits[:, -1])

    def _try(self, together: Lockstep, prompts: Sequence[Sequence[int]], limit: int | None) -> Way:
        """How this model is to be served: what its own forward pass over whole sequences gives is right."""
        text = self.model.config.get_text_config()
        rope = str(getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None))
        # cached keys are turned by what a shorter sequence asked for, which few tokens do not show
        if "longrope" in rope or "dynamic" in rope:
            return "theirs"
        # Tokens that differ, the prompts' own first: of equal ones no order shows.
        some = [token for prompt in prompts[-SHOWN:] for token in prompt[: 4 * SHOWN]]
        tokens = list(dict.fromkeys([*some, *range(min(text.vocab_size, 4 * SHOWN))]))
        short, long = tokens[:SHOWN], tokens[SHOWN : 2 * SHOWN + PADDED]
        if not self._cache_name or (limit is not None and limit < len(long) + 2):
            return "one by one"
        ways: tuple[tuple[Way, list[int]], ...] = (("padded", long), ("alike", long[:SHOWN]))
        for way, other in ways:
            try:
                if self._served(together, short, other):
                    return way
            except torch.OutOfMemoryError:
                raise
            except Exception:  # its code takes no such call
                continue
        return "one by one"

    def _served(self, together: Lockstep, short: list[int], long: list[int]) -> bool:
        """Whether two prompts in one batch, which change places and of which the shorter leaves, have the
        logits of each alone."""
        device, tail, alone = together.device, short[2::-2], []

        def whole(ids: list[int]) -> Tensor:
            found = self.model(input_ids=torch.tensor([ids + tail], device=device), use_cache=False)
            alone.append(_wide(found.logits[0, -3:]))
            return torch.zeros(1, dtype=torch.float64)

        for prompt in (short, long):
            together(1, functools.partial(whole, prompt))
        ids, mask = (x.to(device) for x in padded([short, long], self.pad_id))
        cache: Any = new_cache(self.model)

        def compared(step: int, rows: list[int]) -> Tensor:
            now = mask[rows] if len(rows) > 1 and len(short) < len(long) else None
            positions = (mask[rows].cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            found = self.forward(ids, now, positions, cache)
            expected = torch.stack([alone[row][step] for row in rows])
            return ((found - expected).abs().amax() / expected.std()).double().reshape(1)

        worst = together(1, functools.partial(compared, 0, [0, 1]))
        for step, rows, moved in ((1, [1, 0], [1, 0]), (2, [1], [0])):
            cache.reorder_cache(torch.tensor(moved, device=device))
            ids = torch.full((len(rows), 1), tail[step - 1], device=device)
            mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
            worst += together(1, functools.partial(compared, step, rows))
        exact = next(self.model.parameters()).dtype in (torch.float32, torch.float64)
        return all(value < (EXACT if exact else ROUNDED) for value in worst)


class _Batch:
    """Batches of replies, one after another."""

    def __init__(
        self,
        loop: Loop,
        together: Lockstep,
        sampling: Sampling,
        end_ids: frozenset[int],
        on_reply: Callable[[Request, Generation], None],
    ):
        self.loop = loop
        self.together = together
        self.sampling = sampling
        self.end_ids = end_ids
        self.on_reply = on_reply

    def decode(self, replies: list[_Reply]) -> None:
        device = self.together.device
        prompts = {reply.request.ids: None for reply in replies}
        of = {ids: row for row, ids in enumerate(prompts)}
        chosen = torch.tensor([of[reply.request.ids] for reply in replies], device=device)
        ids, mask = (x.to(device) for x in padded(list(prompts), self.loop.pad_id))
        pads = [ids.shape[1] - len(reply.request.ids) for reply in replies]
        columns = ids.shape[1]
        cache: Any = None

        def read() -> Tensor:
            nonlocal cache
            cache = new_cache(self.loop.model)
            positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
            logits = self.loop.forward(ids, mask if max(pads) else None, positions, cache)
            if len(prompts) < len(replies):
                cache.reorder_cache(chosen)
            return logits[chosen]

        def go_on() -> Tensor:
            if len(rows) < len(pads):
                cache.reorder_cache(torch.tensor(rows, device=device))
            padding = torch.tensor([pads[row] for row in rows], device=device)[:, None]
            seen = (torch.arange(columns, device=device) >= padding).long() if any(pads) else None
            last = torch.tensor([[reply.ids[-1]] for reply in replies], device=device)
            return self.loop.forward(last, seen, columns - 1 - padding, cache)

        self._step(replies, read)
        while rows := [row for row, reply in enumerate(replies) if not reply.ended]:
            replies = [replies[row] for row in rows]
            columns += 1
            self._step(replies, go_on)
            pads = [pads[row] for row in rows]

    def by_transformers(self, replies: list[_Reply]) -> None:
        """Replies to prompts of one length by `model.generate`, whose choice of the next token is ours."""
        model, device = self.loop.model, self.together.device
        ids = torch.tensor([reply.request.ids for reply in replies], device=device)

        def only(_: Tensor, scores: Tensor) -> Tensor:
            tokens = self._step(replies, lambda: _wide(scores))
            place = torch.tensor(tokens, device=scores.device)[:, None]
            return torch.full_like(scores, float("-inf")).scatter(1, place, 0.0)

        own, model.generation_config = model.generation_config, GenerationConfig()
        try:
            model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, num_beams=1,
                max_new_tokens=len(replies[0].uniform), eos_token_id=sorted(self.end_ids) or None,
                pad_token_id=self.loop.pad_id, use_cache=True, synced_gpus=False, logits_processor=[only],
            )  # fmt: skip
        except Exception as error:
            if self.together.unmet(error):
                self.together(2 * len(replies), raising(error))
            raise
        finally:
            model.generation_config = own

    def _step(self, replies: list[_Reply], logits: Callable[[], Tensor]) -> list[int]:
        """The next token of each; of those that have ended, any."""

        def drawn() -> Tensor:
            found = logits()
            numbers = [float(reply.uniform[-1 if reply.ended else len(reply.ids)]) for reply in replies]
            uniform = torch.tensor(numbers, dtype=torch.float64, device=found.device)
            tokens = choose(found, self.sampling.temperature, self.sampling.top_p, uniform)
            return torch.cat([tokens.double(), entropies(found).double()])

        values = self.together(2 * len(replies), drawn)
        tokens = [int(value) for value in values[: len(replies)]]
        if any(value != value for value in values):
            wrong = "its logits are not finite: no token can be chosen"
            raise ModelError(describe("model", wrong, todo="evaluate an earlier checkpoint"))
        for reply, token, entropy in zip(replies, tokens, values[len(replies) :], strict=True):
            if reply.ended:
                continue
            reply.ids.append(token)
            reply.entropy += entropy
            finished = token in self.end_ids
            if finished or len(reply.ids) == len(reply.uniform):
                reply.ended = True
                self.on_reply(reply.request, Generation(reply.ids, finished, reply.entropy / len(reply.ids)))
        return tokens


def padded(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """[B, longest] int64 ids and mask, padded on the left, since replies go on at the right."""
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad_id, dtype=torch.int64)
    mask = torch.zeros(len(prompts), longest, dtype=torch.int64)
    for line, prompt in enumerate(prompts):
        ids[line, longest - len(prompt) :] = torch.tensor(list(prompt))
        mask[line, longest - len(prompt) :] = 1
    return ids, mask


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _cut(requests: list[Request], size: int, *, alike: bool) -> Iterator[list[Request]]:
    """Batches of neighbours, alike: of prompts of one length."""
    start = 0
    while start < len(requests):
        length, stop = len(requests[start].ids), min(start + size, len(requests))
        while alike and len(requests[stop - 1].ids) != length:
            stop -= 1
        yield requests[start:stop]
        start = stop


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Training goes on after this, in the mode it was in, also where a batch fails. Every new token is
    another length: compiled layers (static shapes) would be compiled anew for each."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        model.train(was_training)
