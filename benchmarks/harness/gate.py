"""Verdicts: FASTER, SAME, SLOWER or UNCLEAR, from rounds; and the gate, which passes nothing silently.

Two conditions make a difference: its 99.9 % interval excludes 1, and it is at least the minimum effect. Both,
because 20 benchmarks in 20 runs are 400 tests, and because a machine's noise between processes is larger than
within rounds. A difference that is neither shown nor excluded is UNCLEAR, and said so.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

CONFIDENCE = 0.999
LEAST_ROUNDS = 8  # fewer cannot carry a 99.9 % interval
LEAST_EFFECT = {"cuda": 0.03, "cpu": 0.05}  # of time; a planted 10 % on a CPU and 3 % on a GPU must show
RESAMPLES = 10_000


class Verdict(enum.Enum):
    FASTER = "FASTER"
    SAME = "SAME"
    SLOWER = "SLOWER"
    UNCLEAR = "UNCLEAR"


class Refused(ValueError):
    """Two things that must not be compared."""


@dataclass(frozen=True)
class Judgement:
    """time(B) / time(A): above 1, B is slower."""

    verdict: Verdict
    ratio: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.verdict.value:8s} {self.ratio:.3f} ({self.low:.3f} … {self.high:.3f})"


def judge_pairs(
    a_ms: Sequence[float], b_ms: Sequence[float], least_effect: float, *, paired: bool = True
) -> Judgement:
    """B against A. paired: round i of both ran side by side, so their ratio is free of what slowed both.

    Raises Refused for times that are zero, negative or not finite, and for pairs of unequal length.
    """
    a, b = (_logs(name, times) for name, times in (("A", a_ms), ("B", b_ms)))
    if paired and len(a) != len(b):
        raise Refused(f"paired rounds: unequal numbers, got {len(a)} and {len(b)}")
    generator = np.random.default_rng(0)  # fixed: the same rounds give the same verdict
    if paired:
        picks = generator.integers(0, len(a), (RESAMPLES, len(a)))
        samples, centre = _centre((b - a)[picks]), float(_centre((b - a)[None])[0])
    else:
        first, second = (_centre(x[generator.integers(0, len(x), (RESAMPLES, len(x)))]) for x in (a, b))
        samples, centre = second - first, float(_centre(b[None])[0] - _centre(a[None])[0])
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(samples, [tail, 1 - tail])
    enough = min(len(a), len(b)) >= LEAST_ROUNDS
    return Judgement(
        _verdict(centre, low, high, least_effect, enough), *(math.exp(x) for x in (centre, low, high))
    )


def _verdict(centre: float, low: float, high: float, least_effect: float, enough: bool) -> Verdict:
    effect = math.log1p(least_effect)
    if not enough:
        return Verdict.UNCLEAR
    if low > 0 and centre >= effect:
        return Verdict.SLOWER
    if high < 0 and centre <= -effect:
        return Verdict.FASTER
    if -effect < low and high < effect:
        return Verdict.SAME
    return Verdict.UNCLEAR


def _centre(logs: np.ndarray) -> np.ndarray:
    """[r, n] → [r], the mean without the outer fifths: nearly the mean's precision, and no outlier moves it
    far."""
    ordered = np.sort(logs, axis=1)
    cut = logs.shape[1] // 5
    return ordered[:, cut : logs.shape[1] - cut].mean(axis=1)


def _logs(name: str, times: Sequence[float]) -> np.ndarray:
    values = np.asarray(times, dtype=np.float64)
    if values.size == 0 or not np.isfinite(values).all() or (values <= 0).any():
        bad = [t for t in times if not (math.isfinite(t) and t > 0)]
        raise Refused(
            f"times of {name}: not measurements, expected numbers above 0, got {bad[:3] if bad else 'none'}"
        )
    return np.log(values)


@dataclass
class Report:
    """What a gate found. It passes only if something was judged and nothing stands against it."""

    lines: list[str] = field(default_factory=list)
    against: list[str] = field(default_factory=list)  # each alone fails the gate
    judged: int = 0

    def add(self, name: str, text: str, *, fails: bool = False) -> None:
        line = f"{name}: {text}"
        self.lines.append(line)
        if fails:
            self.against.append(line)

    @property
    def passed(self) -> bool:
        return self.judged > 0 and not self.against

    def __str__(self) -> str:
        end = "passed" if self.passed else "FAILED" if self.judged else "REFUSED: nothing was judged"
        return "\n".join([*self.lines, f"gate: {end}; {self.judged} judged, {len(self.against)} against"])


def compare_records(
    baseline: Mapping[str, Mapping[str, Any]], current: Mapping[str, Mapping[str, Any]]
) -> Report:
    """Records of two sessions on one kind of machine (`records.latest` of each). Not paired, so the sessions'
    own A/A rounds widen nothing here: a small drift between sessions is what the minimum effect is for."""
    report = Report()
    _name_missing(report, set(baseline), set(current))
    for name in sorted(set(baseline) & set(current)):
        old, new = baseline[name], current[name]
        for what in ("device", "device_class", "threads"):
            if old.get(what) != new.get(what):
                report.add(name, f"refused: another {what}, {old.get(what)} and {new.get(what)}", fails=True)
                break
        else:
            try:
                effect = LEAST_EFFECT["cuda" if new["device_class"] == "cuda" else "cpu"]
                judgement = judge_pairs(
                    old.get("rounds_ms", []), new.get("rounds_ms", []), effect, paired=False
                )
            except Refused as error:
                report.add(name, f"refused: {error}", fails=True)
                continue
            report.judged += 1
            report.add(name, str(judgement), fails=judgement.verdict is Verdict.SLOWER)
    return report


def compare_exact(
    baseline: Mapping[str, Mapping[str, int]], current: Mapping[str, Mapping[str, int]]
) -> Report:
    """Counted figures: any increase is SLOWER. A decrease is FASTER and fails too, until the table says so:
    an old figure left standing would let the next increase through."""
    report = Report()
    _name_missing(report, set(baseline), set(current))
    for name in sorted(set(baseline) & set(current)):
        old, new = baseline[name], current[name]
        for metric in sorted(set(old) | set(new)):
            if metric not in old or metric not in new:
                report.add(
                    f"{name} {metric}",
                    "vanished" if metric not in new else "is new: update the table",
                    fails=True,
                )
                continue
            report.judged += 1
            if new[metric] > old[metric]:
                report.add(f"{name} {metric}", f"SLOWER {old[metric]} → {new[metric]}", fails=True)
            elif new[metric] < old[metric]:
                report.add(
                    f"{name} {metric}", f"FASTER {old[metric]} → {new[metric]}: update the table", fails=True
                )
    return report


def compare_ratios(
    ceilings: Mapping[str, float], current: Mapping[str, tuple[Sequence[float], Sequence[float]]]
) -> Report:
    """Times as ratios within one run: ours and its yardstick, paired. `ceilings`: the committed ratio ours /
    yardstick that must not be exceeded by more than the minimum effect, beyond the interval."""
    report = Report()
    _name_missing(report, set(ceilings), set(current))
    for name in sorted(set(ceilings) & set(current)):
        limit = ceilings[name]
        if not (math.isfinite(limit) and limit > 0):
            report.add(
                name, f"refused: the committed ratio is {limit!r}, expected a number above 0", fails=True
            )
            continue
        yardstick, ours = current[name]
        try:
            scaled = [time * limit for time in yardstick]  # so that 1 means "as committed"
            judgement = judge_pairs(scaled, ours, LEAST_EFFECT["cpu"])
        except Refused as error:
            report.add(name, f"refused: {error}", fails=True)
            continue
        report.judged += 1
        report.add(
            name, f"{judgement} of the committed ratio {limit:.3f}", fails=judgement.verdict is Verdict.SLOWER
        )
    return report


def _name_missing(report: Report, before: set[str], now: set[str]) -> None:
    for name in sorted(before - now):
        report.add(name, "vanished: it was measured before and is not now", fails=True)
    for name in sorted(now - before):
        report.add(name, "is new: it has no baseline", fails=True)
