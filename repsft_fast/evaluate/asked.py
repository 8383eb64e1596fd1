"""What an evaluation by generation is made of: problems and tasks, what an engine is asked and answers.

Task files become problems, problems become requests, an engine turns requests into replies, and what a reply
is worth is judged apart from all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

GREEDY, SAMPLED, NUCLEUS = 0.0, 0.6, 0.95  # temperature of one reply, of several, and their top-p


@dataclass(frozen=True)
class Problem:
    """One item of a task: a question with its right answer."""

    name: str  # within its task, once: what a resumed evaluation finds it by
    messages: tuple[dict[str, Any], ...]  # what the model is asked, as a chat that ends with the user's turn
    answer: str  # the reference; of a choice its letter
    group: str = ""  # subject, level …: results are shown by it too; "": none
    choices: tuple[str, ...] = ()  # texts of a multiple choice, in the order of their letters
    where: str = ""  # file and line, for errors
    text: str | None = None  # asked as it is, without a chat template, in place of messages
    # of a choice by log-likelihood: what is compared behind the text and one blank, in the order of choices
    compared: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sampling:
    """How replies are drawn. In our own loop the stream of a reply follows from (seed, request) alone:
    neither the batch nor the order moves it. What others promise is said there."""

    n: int = 1  # replies to each problem
    temperature: float = GREEDY  # 0: greedy
    top_p: float = 1.0
    max_new_tokens: int = 4096
    seed: int = 42


@dataclass(frozen=True)
class Task:
    """Problems that are judged in one way."""

    name: str
    problems: tuple[Problem, ...]
    kind: Literal["generate", "choice"] = "generate"  # choice: by log-likelihood, nothing is generated
    extractor: str = "final"  # of answers.EXTRACTORS, or package.module:function
    sampling: Sampling = Sampling()


@dataclass(frozen=True)
class Request:
    """One reply that is asked for. Two requests with equal `prompt` share a prompt."""

    prompt: int  # the prompt's number in its task, 0 …: its seed is sampling.seed + prompt
    draw: int  # 0 … n - 1
    ids: tuple[int, ...]  # the prompt's tokens, at least one


@dataclass(frozen=True)
class Generation:
    """One reply. `finished` = it ended by itself, not by the length limit (paper A's termination)."""

    ids: list[int]  # generated tokens, the end token included when it came
    finished: bool
    # mean over the reply's tokens of the entropy of the model's own distribution (temperature 1, all of the
    # vocabulary) that each was drawn from, in nats; None: not known, or no token
    entropy: float | None = None


class Engine(Protocol):
    """Turns requests into replies."""

    name: str

    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        *,
        end_ids: Sequence[int],
        on_reply: Callable[[Request, Generation], None],
    ) -> None:
        """Every request is answered once, by a call of on_reply as soon as its reply is known, in any
        order."""
        ...
