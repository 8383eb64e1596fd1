"""Replies to a task: which are wanted, which a record already holds, an engine asked for the rest."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from repsft_fast.evaluate.asked import Engine, Generation, Request, Task
from repsft_fast.evaluate.record import Record

Told = Callable[[Request, Generation], None]


@dataclass(frozen=True)
class Asked:
    """A task and its prompts as one model's tokenizer spells them."""

    task: Task
    prompts: tuple[tuple[int, ...], ...]  # one of each problem

    def requests(self, part: tuple[int, int] = (0, 1)) -> list[Request]:
        """Every reply that is wanted; part: (rank, ranks), whose prompts are dealt out in turn."""
        rank, ranks = part
        return [
            Request(number, draw, prompt)
            for number, prompt in enumerate(self.prompts)
            if number % ranks == rank
            for draw in range(self.task.sampling.n)
        ]

    def identity(self) -> dict[str, Any]:
        """What replies depend on besides the model: the prompts and how replies are drawn."""
        digest = hashlib.blake2b(digest_size=16)
        for problem, prompt in zip(self.task.problems, self.prompts, strict=True):
            digest.update(f"{problem.name} {len(prompt)} ".encode() + np.array(prompt, np.int64).tobytes())
        # More replies to each problem go on from fewer.
        drawn = {name: value for name, value in asdict(self.task.sampling).items() if name != "n"}
        return {"task": self.task.name, "prompts": digest.hexdigest(), **drawn}


@dataclass(frozen=True)
class Replies:
    """One task's replies, and what they cost in this process."""

    found: Mapping[tuple[int, int], Generation]  # by (prompt, draw)
    seconds: float
    generated: int  # tokens, of those made now: others were in the record


def answer(
    engine: Engine,
    asked: Asked,
    record: Record | None,
    *,
    end_ids: Sequence[int],
    part: tuple[int, int] = (0, 1),
    told: Told = lambda request, reply: None,
) -> Replies:
    """Every reply of a part of the task; those in the record are not asked again. told: of each new one."""
    wanted = asked.requests(part)
    found = {} if record is None else dict(record.known)
    missing = [request for request in wanted if (request.prompt, request.draw) not in found]
    began, generated = time.perf_counter(), 0

    def keep(request: Request, reply: Generation) -> None:
        nonlocal generated
        generated += len(reply.ids)
        found[request.prompt, request.draw] = reply
        if record is not None:
            record.add(request, reply)
        told(request, reply)

    if missing:
        engine.generate(missing, asked.task.sampling, end_ids=end_ids, on_reply=keep)
    replies = {(r.prompt, r.draw): found[r.prompt, r.draw] for r in wanted}
    return Replies(replies, time.perf_counter() - began, generated)


def text_of(tokenizer: Any, end_ids: Sequence[int]) -> Callable[[Generation], str]:
    """A reply as text, its end token left out. Special tokens stay: <think> is one of some tokenizers, and an
    answer is sought behind it."""

    def text(reply: Generation) -> str:
        ids = reply.ids[:-1] if reply.finished and reply.ids and reply.ids[-1] in ends else reply.ids
        return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    ends = frozenset(end_ids)
    return text
