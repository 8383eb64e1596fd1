"""Runs beside each other: means over seeds, their intervals, differences seed by seed.

An *arm* is what runs have in common that differ in their seed alone. Its score is the mean over seeds with
Student's interval; its difference to the baseline is taken seed by seed first, because runs of one seed share
rows, order and start, and what they share cancels. Errors: ConfigError, every problem at once.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

from repsft_fast.errors import ConfigError, describe
from repsft_fast.policies.student import student_quantile

# Settings that say where, how often and what is told, or which way the same numbers are computed.
_NOT_OF_AN_ARM = (
    "run.seed", "run.folder", "data.cache_folder", "log", "checkpoint", "snapshot",
    "loss.chunk_bytes", "model.attention", "model.compile", "model.cuda_graphs", "batch.row_tokens",
    "batch.row_lengths",
)  # fmt: skip
Interval = tuple[float, float]


@dataclass(frozen=True)
class FinishedRun:
    """What a table says of one run.

    settings   {"section.setting": value}, as JSON has them
    score      of its rows, in the metric's own direction
    rows       what tells its rows from others: {task: tokens that are scored}; {} where that is not known
    gross      FLOPs of everything: training, evaluation, probes, what roll-backs discarded; None = unknown
    net        FLOPs that the result has seen; None = unknown
    """

    folder: str
    seed: int
    settings: Mapping[str, Any]
    score: float
    rows: Mapping[str, int] = field(default_factory=dict)
    tokens: int | None = None
    gross: float | None = None
    net: float | None = None


@dataclass(frozen=True)
class Arm:
    """Runs that differ in their seed alone. settings: those in which the arms differ."""

    name: str
    settings: Mapping[str, Any]
    runs: Mapping[int, FinishedRun]

    @property
    def scores(self) -> dict[int, float]:
        return {seed: run.score for seed, run in self.runs.items()}

    def mean(self, what: str) -> float | None:
        """Of `tokens`, `gross` or `net` over the seeds; None where a run does not say it."""
        found = [getattr(run, what) for run in self.runs.values()]
        return None if None in found else fmean(found)


@dataclass(frozen=True)
class Line:
    """An arm in the table. score, difference: mean and half the width of the 95 % interval, inf for one seed;
    difference: None for the baseline; common: seeds that it is taken over."""

    arm: Arm
    score: Interval
    difference: Interval | None = None
    common: tuple[int, ...] = ()


def interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Mean and half the width of its Student interval; infinite for one value, ValueError for none."""
    if not values:
        raise ValueError(describe("interval", "of no values", expected="at least 1", got=0))
    if len(values) == 1:
        return float(values[0]), math.inf
    t = student_quantile((1 - confidence) / 2, len(values) - 1)
    return fmean(values), t * stdev(values) / math.sqrt(len(values))


def paired(arm: Mapping[int, float], baseline: Mapping[int, float]) -> Interval | None:
    """Interval of arm − baseline over the seeds that both have; None without a common seed."""
    seeds = sorted(arm.keys() & baseline.keys())
    return interval([arm[seed] - baseline[seed] for seed in seeds]) if seeds else None


def arms_of(
    runs: Sequence[FinishedRun], by: Sequence[str] | None = None, names: Sequence[str] | None = None
) -> list[Arm]:
    """The runs' arms, in the order in which they come. by: the settings that alone make an arm; names: the
    arms' names in that order."""
    of_arms = [_of_an_arm(run, by) for run in runs]
    groups: dict[str, list[int]] = {}
    for number, settings in enumerate(of_arms):
        groups.setdefault(_key(settings), []).append(number)
    firsts = [of_arms[numbers[0]] for numbers in groups.values()]
    differing = [
        name
        for name in dict.fromkeys(name for settings in firsts for name in settings)
        if len({_key(settings.get(name)) for settings in firsts}) > 1
    ]
    told = [{name: settings.get(name) for name in by or differing} for settings in firsts]
    if names is not None:
        _check_names(names, len(groups))
    shown = list(names) if names is not None else _distinct([_words(one) for one in told])
    problems: list[str] = []
    arms = []
    for name, settings, numbers in zip(shown, told, groups.values(), strict=True):
        by_seed: dict[int, FinishedRun] = {}
        for run in (runs[number] for number in numbers):
            if run.seed in by_seed:
                both = f"{by_seed[run.seed].folder} and {run.folder}"
                todo = "leave one out, or tell them apart by a setting with --by"
                problems.append(describe(name, f"has seed {run.seed} twice", got=both, todo=todo))
            by_seed.setdefault(run.seed, run)
        arms.append(Arm(name, settings, dict(sorted(by_seed.items()))))
    if problems:
        raise ConfigError(problems)
    return arms


def lines_of(arms: Sequence[Arm], baseline: str | None = None) -> list[Line]:
    """The table, the baseline first. ConfigError where arms have no seed in common with it, or the same seed
    has other rows."""
    base = _baseline(arms, baseline)
    problems: list[str] = []
    lines = [Line(base, interval(list(base.scores.values())))]
    for arm in (arm for arm in arms if arm is not base):
        common = tuple(sorted(arm.runs.keys() & base.runs.keys()))
        difference = paired(arm.scores, base.scores)
        if difference is None:
            expected, got = _seeds(base), _seeds(arm)
            wrong = f"no seed in common with the baseline, {base.name}"
            problems.append(describe(arm.name, wrong, expected=f"seeds {expected}", got=f"seeds {got}"))
        for seed in common:
            ours, theirs = arm.runs[seed], base.runs[seed]
            if ours.rows != theirs.rows:
                wrong = f"is scored on other rows than {theirs.folder}: they cannot be compared"
                expected, got = _rows(theirs.rows), _rows(ours.rows)
                problems.append(describe(ours.folder, wrong, expected=expected, got=got))
        lines.append(Line(arm, interval(list(arm.scores.values())), difference, common))
    if problems:
        raise ConfigError(problems)
    return lines


def _of_an_arm(run: FinishedRun, by: Sequence[str] | None) -> dict[str, Any]:
    """The settings that make a run's arm; a file's name that carries the seed is the same in every seed."""
    if by is not None:
        missing = [name for name in by if name not in run.settings]
        if missing:
            raise ConfigError(describe("--by", "is not a setting of every run", got=missing[0]))
        return {name: run.settings[name] for name in by}
    found = {}
    for name, value in run.settings.items():
        if name in _NOT_OF_AN_ARM or name.partition(".")[0] in _NOT_OF_AN_ARM:
            continue
        found[name] = _without_seed(value, run.seed) if name.startswith("data.") else value
    return found


def _without_seed(value: Any, seed: int) -> Any:
    """data/seed3/train.jsonl of seed 3 as data/seed{run.seed}/train.jsonl, also seed-3 and seed_03."""
    if isinstance(value, str):
        return re.sub(rf"(seed[-_=]?)0*{seed}(?![0-9])", r"\1{run.seed}", value, flags=re.IGNORECASE)
    if isinstance(value, Mapping):
        return {name: _without_seed(one, seed) for name, one in value.items()}
    return [_without_seed(one, seed) for one in value] if isinstance(value, list) else value


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _words(settings: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={_value(value)}" for name, value in settings.items()) or "all runs"


def _value(value: Any, most: int = 40) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _distinct(names: Sequence[str]) -> list[str]:
    """Values that were cut may look alike: a number behind each after the first."""
    seen: dict[str, int] = {}
    for name in names:
        seen[name] = seen.get(name, 0) + 1
    count: dict[str, int] = {}
    shown = []
    for name in names:
        count[name] = count.get(name, 0) + 1
        shown.append(f"{name} ({count[name]})" if seen[name] > 1 else name)
    return shown


def _check_names(names: Sequence[str], arms: int) -> None:
    if len(names) != arms or len(set(names)) != len(names) or not all(names):
        expected = f"{arms} different names, in the order of the arms"
        raise ConfigError(
            describe("--names", "does not fit the arms", expected=expected, got=",".join(names))
        )


def _baseline(arms: Sequence[Arm], name: str | None) -> Arm:
    """The arm of that name, or the only one in whose name it stands, as a whole word before as a part of one
    (sft is a part of msft); the first where none is asked for."""
    if not arms:
        raise ConfigError(describe("compare", "there is no run", expected="at least 1 finished run"))
    if name is None:
        return arms[0]
    word = re.compile(rf"(?<![\w.]){re.escape(name)}(?![\w.])")
    found = (
        [arm for arm in arms if arm.name == name]
        or [arm for arm in arms if word.search(arm.name)]
        or [arm for arm in arms if name in arm.name]
    )
    if len(found) != 1:
        wrong = "is no arm" if not found else f"stands in the names of {len(found)} arms"
        expected = f"one of: {'; '.join(arm.name for arm in arms)}"
        raise ConfigError(describe("--baseline", wrong, expected=expected, got=name))
    return found[0]


def _seeds(arm: Arm) -> str:
    return ", ".join(map(str, arm.runs))


def _rows(rows: Mapping[str, int]) -> str:
    return ", ".join(f"{task} {count} tokens" for task, count in sorted(rows.items())) or "none"


def as_json(lines: Iterable[Line]) -> list[dict[str, Any]]:
    """The table's lines as JSON can write them: an interval of one seed has no width, which is null."""

    def spread(found: Interval | None) -> dict[str, float | None] | None:
        return found and {"mean": found[0], "half_width": found[1] if math.isfinite(found[1]) else None}

    return [
        {
            "arm": line.arm.name,
            "settings": dict(line.arm.settings),
            "seeds": list(line.arm.runs),
            "score": spread(line.score),
            "difference": spread(line.difference),
            "common_seeds": list(line.common),
            "tokens": line.arm.mean("tokens"),
            "flops_gross": line.arm.mean("gross"),
            "flops_net": line.arm.mean("net"),
            "runs": [
                {
                    "folder": run.folder, "seed": run.seed, "score": run.score, "tokens": run.tokens,
                    "flops_gross": run.gross, "flops_net": run.net,
                }
                for run in line.arm.runs.values()
            ],
        }
        for line in lines
    ]  # fmt: skip
