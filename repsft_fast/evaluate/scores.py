"""What the verdicts on a task's replies come to: Acc@n, Pass@k, termination, lengths, with their intervals.

Problems are the sample: every interval is for other problems of the same kind, not for other draws on these.
95 %, from 2,000 bootstrap draws over problems (percentiles), the same draws in every evaluation. Where all
problems give one value a bootstrap has no width, though other problems may give another: there the mean may
move by the exact bound on how many do, 1 - 0.025^(1/problems) (Clopper and Pearson 1934, 0 of n).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from repsft_fast.errors import describe
from repsft_fast.seeded import key_of, words

RESAMPLES, TAIL = 2_000, 0.025


@dataclass(frozen=True)
class Draw:
    """One reply to a problem, judged."""

    verdict: Literal["right", "wrong", "undecided", "no answer"]
    finished: bool  # it ended by itself
    tokens: int  # generated
    entropy: float | None = None  # mean over its tokens, nats; None or not finite: not known


@dataclass(frozen=True)
class Judged:
    """A problem with all of its draws, in their order."""

    name: str
    draws: tuple[Draw, ...]
    group: str = ""


@dataclass(frozen=True)
class Figure:
    """A mean over problems, or a ratio of sums over them. value None: nothing to take it of. low, high: 95 %;
    None of one problem alone."""

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Lengths:
    """Of replies, in generated tokens; None without one."""

    replies: int
    mean: float | None
    median: float | None
    p90: float | None
    longest: int | None


@dataclass(frozen=True)
class Scores:
    """Of one task or group. Shares are of replies, each problem weighing the same."""

    problems: int
    n: int  # draws of each problem
    acc: Figure  # Acc@n; a right answer counts without an end too, as in paper A
    acc_ended: Figure  # Acc@n of right answers in replies that ended by themselves; the others are wrong
    acc_given_end: Figure  # right ones among the replies that ended by themselves
    ended: Figure  # termination rate
    pass_at: dict[int, Figure]  # k → at least one of k draws right, unbiased (Chen et al. 2021)
    first: dict[int, Figure]  # k → at least one of the first k draws right
    right_without_end: int  # replies
    right_without_end_share: Figure
    no_answer: int
    undecided: int
    lengths: Lengths
    lengths_ended: Lengths
    lengths_cut: Lengths
    entropy: Figure  # mean over replies, nats
    groups: dict[str, Scores] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values, for json."""
        return dataclasses.asdict(self)


def score(problems: Sequence[Judged], ks: Sequence[int] | None = None) -> Scores:
    """ks: of Pass@k; None: 1, 2, 4 … up to n, and n. Groups are scored apart where there are any.

    Raises ValueError: no problems, a name twice, problems with different counts of draws, none, k beyond n.
    """
    n = _draws_of(problems)
    ks = sorted({*(2**i for i in range(n.bit_length())), n} if ks is None else {*ks})
    named = sorted({problem.group for problem in problems} - {""})
    groups = {group: _score([p for p in problems if p.group == group], n, ks) for group in named}
    return dataclasses.replace(_score(problems, n, ks), groups=groups)


def pass_at_k(n: int, right: int, k: int) -> float:
    """The chance that k of n draws, taken without putting back, hold one of the `right` ones: 1 - C(n-c, k) /
    C(n, k), as a product. Unbiased for the chance that k new draws hold one.

    Raises ValueError unless 1 ≤ k ≤ n and 0 ≤ right ≤ n.
    """
    if not 1 <= k <= n or not 0 <= right <= n:
        todo = "draw more replies to each problem, or ask for a smaller k"
        raise ValueError(describe("pass@k", "more draws than there are", expected="1 ≤ k ≤ n, right ≤ n",
                                  got=f"k {k}, n {n}, right {right}", todo=todo))  # fmt: skip
    return 1.0 - math.prod(1.0 - k / i for i in range(n - right + 1, n + 1))


def mean_over_tasks(figures: Sequence[Figure]) -> Figure:
    """Tasks weigh the same, whatever their sizes. The interval is put together from the tasks' own (Zou and
    Donner 2008: distances from the values, squared and added): None where one of them has none."""
    if not figures or any(figure.value is None for figure in figures):
        return Figure(None)
    values = [figure.value or 0.0 for figure in figures]
    mean = math.fsum(values) / len(values)
    if any(figure.low is None or figure.high is None for figure in figures):
        return Figure(mean)
    down = math.hypot(*(value - (f.low or 0.0) for value, f in zip(values, figures))) / len(values)
    up = math.hypot(*((f.high or 0.0) - value for value, f in zip(values, figures))) / len(values)
    return Figure(mean, mean - down, mean + up)


def pooled(tasks: Mapping[str, Scores]) -> dict[str, Figure]:
    """Means over tasks of acc, acc_ended, acc_given_end, ended and of every pass@k and first@k that all tasks
    have, by those names."""
    found = {
        name: mean_over_tasks([getattr(scores, name) for scores in tasks.values()])
        for name in ("acc", "acc_ended", "acc_given_end", "ended")
    }
    for name, table in (("pass", "pass_at"), ("first", "first")):
        tables = [getattr(scores, table) for scores in tasks.values()]
        for k in sorted(set.intersection(*map(set, tables)) if tables else ()):
            found[f"{name}@{k}"] = mean_over_tasks([figures[k] for figures in tables])
    return found


def difference(
    base: Sequence[Judged],
    other: Sequence[Judged],
    of: Callable[[Judged], float] | None = None,
) -> Figure:
    """Mean over problems of what `of` says of each (0 … 1; None: Acc@n), `other` minus `base`, with a paired
    interval: both models' values of a problem are drawn together.

    Raises ValueError unless both were asked the same problems.
    """
    before, after = ({p.name: (of or _acc)(p) for p in side} for side in (base, other))
    if before.keys() != after.keys() or len(before) < len(base) or len(after) < len(other):
        todo = "compare models on one task file and limit"
        got = f"{len(base)} and {len(other)} problems, {len(before.keys() & after.keys())} in both"
        raise ValueError(describe("difference", "not the same problems", got=got, todo=todo))
    values = np.array([after[name] - before[name] for name in before])
    return _figures(values[:, None], np.ones((len(values), 1)), [(-1.0, 1.0)])[0]


def _draws_of(problems: Sequence[Judged]) -> int:
    counts = sorted({len(problem.draws) for problem in problems})
    if len(counts) != 1 or counts[0] < 1:
        wrong = "problems differ in their draws" if problems else "no problems"
        raise ValueError(describe("scores", wrong, expected="as many draws of each", got=counts))
    if len({problem.name for problem in problems}) < len(problems):
        raise ValueError(describe("scores", "a problem is there twice"))
    return counts[0]


def _acc(problem: Judged) -> float:
    return sum(draw.verdict == "right" for draw in problem.draws) / len(problem.draws)


def _score(problems: Sequence[Judged], n: int, ks: Sequence[int]) -> Scores:
    draws = [draw for problem in problems for draw in problem.draws]
    right = np.array([[d.verdict == "right" for d in p.draws] for p in problems])  # [problems, n]
    ended = np.array([[d.finished for d in p.draws] for p in problems])
    entropy = np.array([[math.nan if d.entropy is None else d.entropy for d in p.draws] for p in problems])
    known = np.isfinite(entropy)
    ones = np.ones(len(problems))
    counts = right.sum(1)
    columns = [
        (right.mean(1), ones), ((right & ended).mean(1), ones), ((right & ended).sum(1), ended.sum(1)),
        (ended.mean(1), ones), ((right & ~ended).mean(1), ones),
        *((np.array([pass_at_k(n, int(c), k) for c in counts]), ones) for k in ks),
        *((right[:, :k].any(1), ones) for k in ks),
        (np.where(known, entropy, 0.0).sum(1), known.sum(1)),
    ]  # fmt: skip
    above, below = (np.stack([column[side] for column in columns], axis=1).astype(float) for side in (0, 1))
    bounds = [(0.0, 1.0)] * (len(columns) - 1) + [(0.0, math.inf)]
    acc, acc_ended, given, ending, without, *rest = _figures(above, below, bounds)
    return Scores(
        problems=len(problems), n=n, acc=acc, acc_ended=acc_ended, acc_given_end=given, ended=ending,
        pass_at=dict(zip(ks, rest)), first=dict(zip(ks, rest[len(ks) :])),
        right_without_end=int((right & ~ended).sum()), right_without_end_share=without,
        no_answer=sum(draw.verdict == "no answer" for draw in draws),
        undecided=sum(draw.verdict == "undecided" for draw in draws),
        lengths=_lengths(draws), lengths_ended=_lengths([d for d in draws if d.finished]),
        lengths_cut=_lengths([d for d in draws if not d.finished]),
        entropy=rest[-1],
    )  # fmt: skip


def _lengths(draws: Sequence[Draw]) -> Lengths:
    if not draws:
        return Lengths(0, None, None, None, None)
    tokens = np.array([draw.tokens for draw in draws])
    median, p90 = np.quantile(tokens, [0.5, 0.9])
    return Lengths(len(draws), float(tokens.mean()), float(median), float(p90), int(tokens.max()))


def _figures(above: np.ndarray, below: np.ndarray, bounds: Sequence[tuple[float, float]]) -> list[Figure]:
    """Ratios of column sums. above, below: [problems, figures]; bounds: least and largest value of each
    figure."""
    problems = len(above)
    table = np.concatenate([above, below], axis=1)
    sums = np.empty((RESAMPLES, table.shape[1]))
    at_once = max(1, (1 << 15) // problems)
    for first in range(0, RESAMPLES, at_once):
        count = min(at_once, RESAMPLES - first)
        # a remainder of 2^64: its bias is far below what a double can show
        drawn = words(key_of("bootstrap", first), count * problems) % np.uint64(problems)
        cells = drawn.astype(np.int64) + np.repeat(np.arange(count) * problems, problems)
        times = np.bincount(cells, minlength=count * problems).reshape(count, problems)
        sums[first : first + count] = times.astype(float) @ table
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios = sums[:, : above.shape[1]] / sums[:, above.shape[1] :]
        own = above / below
    return [
        _figure(above[:, j].sum(), below[:, j].sum(), own[below[:, j] > 0, j], ratios[:, j], bounds[j])
        for j in range(above.shape[1])
    ]


def _figure(
    above: float, below: float, own: np.ndarray, ratios: np.ndarray, bounds: tuple[float, float]
) -> Figure:
    """own: each problem's value; ratios: each resample's, NaN where it drew nothing to take it of."""
    if below == 0:
        return Figure(None)
    value = float(above / below)
    if len(own) < 2:
        return Figure(value)
    if np.ptp(own) == 0:
        if not math.isfinite(bounds[1]):
            return Figure(value)
        moved = 1.0 - TAIL ** (1.0 / len(own))
        return Figure(value, *(value + moved * (bound - value) for bound in bounds))
    low, high = np.quantile(ratios[~np.isnan(ratios)], [TAIL, 1.0 - TAIL])
    return Figure(value, float(low), float(high))
