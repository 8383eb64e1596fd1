"""A finished run's folder, read for a comparison: run.yaml and result.json, nothing else.

The score is the test rows' where the run has some, else the validation rows' of the result. `--metric` asks
for another one than the run decided by. Errors: ConfigError, which names the folder.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from repsft_fast.errors import ConfigError, RepsftError, describe, open_plain
from repsft_fast.report import result as results
from repsft_fast.report.compare import FinishedRun
from repsft_fast.report.records import LARGEST_FILE, is_number
from repsft_fast.report.result import RunResult

SETTINGS = "run.yaml"
METRICS = ("exact_match", "token_accuracy", "loss", "nll", "answer")
POOLS = ("items", "tasks")
_OF_THE_POLICY = ("nll", "answer")  # what test rows have only in runs that decide by it
_DEEPEST = 3  # folders below the one that is given


@dataclass(frozen=True)
class Scored:
    """What a run can be compared by. metric: of METRICS; pool: of POOLS; test: the test rows, else those of
    the validation that chose the result."""

    metric: str
    pool: str
    test: bool

    @property
    def words(self) -> str:
        """test exact match; validation loss, mean over tasks."""
        rows = "test" if self.test else "validation"
        return f"{rows} {self.metric.replace('_', ' ')}" + (
            ", mean over tasks" if self.pool == "tasks" else ""
        )


def runs_below(folder: Path) -> list[Path]:
    """The folder itself where it is a run's, else those of the runs in it, by name. ConfigError for none."""
    if not folder.is_dir():
        wrong = "is no folder" if folder.exists() else "there is no such folder"
        todo = "give folders of runs, or one that holds runs"
        raise ConfigError(describe(str(folder), wrong, todo=todo))
    if found := list(_runs(folder, _DEEPEST)):
        return found
    expected = f"a run's folder ({SETTINGS}, {results.FILE}), or one that holds runs"
    raise ConfigError(describe(str(folder), "is no run and holds none", expected=expected))


def _runs(folder: Path, deep: int) -> Sequence[Path]:
    if (folder / SETTINGS).is_file() or (folder / results.FILE).is_file():
        return [folder]
    if not deep:
        return []
    inner = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False))
    return [run for name in inner if not name.startswith(".") for run in _runs(folder / name, deep - 1)]


@dataclass(frozen=True)
class Folder:
    """A finished run as its files have it."""

    folder: str
    settings: Mapping[str, Any]
    result: RunResult

    @property
    def test(self) -> Mapping[str, Any] | None:
        return _mapping(self.result.more.get("test")) or None

    @property
    def has_policy(self) -> bool:
        return self.mixture("policy") is not None

    def mixture(self, name: str) -> Any:
        """A setting of the mixture; None where the run's version did not have it."""
        return self.settings.get(f"mixture.{name}")

    @property
    def pool(self) -> str:
        """How the run's own `pooled` figures are taken."""
        return str(self.mixture("pool") or "items")

    def scored(self, metric: str | None, pool: str | None) -> Scored:
        """By what it is compared unless something is asked for: what it decided by; plain runs by their
        loss, which every one has."""
        own = str(self.mixture("metric") or "exact_match") if self.has_policy else "loss"
        own_pool = self.pool if self.has_policy else "items"
        return Scored(metric or own, pool or own_pool, self.test is not None)


def read(folder: Path) -> Folder:
    """A run that ended by its rule or its budget. ConfigError for any other."""
    if not (folder / results.FILE).is_file():
        wrong = f"is no finished run: it holds no {results.FILE}"
        raise ConfigError(describe(str(folder), wrong, todo="let it end, or leave it out"))
    try:
        result = results.read(folder)
    except RepsftError as error:
        raise ConfigError(str(error)) from error
    if not result.success:
        wrong, expected = "is no finished run", "one that ended by its rule or its budget"
        todo = "go on with it by --resume, or leave it out"
        raise ConfigError(describe(str(folder), wrong, expected=expected, got=result.code, todo=todo))
    return Folder(str(folder), _settings(folder / SETTINGS), result)


def _settings(path: Path) -> dict[str, Any]:
    """{"section.setting": value}; what is a mapping below that is one value."""
    try:
        with open_plain(path) as file:
            sections = yaml.safe_load(file.read(LARGEST_FILE).decode())
        return {
            f"{section}.{name}": value
            for section, values in sections.items()
            for name, value in values.items()
        }
    except (OSError, yaml.YAMLError, AttributeError, ValueError, RecursionError) as error:
        words = getattr(error, "strerror", None) or "it is not as a run writes it"
        raise ConfigError(describe(str(path), f"cannot be read ({words})")) from error


def finished(run: Folder, how: Scored) -> FinishedRun:
    """The run as it is compared. ConfigError where its files do not have what is asked for."""
    if (run.test is not None) is not how.test:
        wrong = "has test rows, the others have none" if run.test else "has no test rows, the others have"
        raise ConfigError(describe(run.folder, wrong, expected="all runs with test rows, or none"))
    score = _test_score(run, how) if how.test else _validation_score(run, how)
    if not is_number(score):
        asked = how.words
        todo = f"choose another with --metric: {', '.join(METRICS)}"
        raise ConfigError(describe(run.folder, f"its {results.FILE} has no {asked}", got=score, todo=todo))
    account = _mapping(run.result.more.get("account"))
    flops, tokens = _mapping(account.get("flops")), _mapping(account.get("tokens"))
    parts = [flops.get(name) for name in ("trained", "evaluated", "probed")]
    tasks = _mapping((run.test or {}).get("tasks")) if how.test else {}
    return FinishedRun(
        run.folder,
        run.result.seed,
        run.settings,
        float(score),
        {name: found["total"] for name, found in tasks.items() if "total" in _mapping(found)},
        _number(tokens.get("trained"), run.result.tokens),
        sum(parts) if all(map(is_number, parts)) else None,  # type: ignore[arg-type]
        _number(flops.get("result"), None),
    )


def _test_score(run: Folder, how: Scored) -> Any:
    test = run.test or {}
    if how.metric in _OF_THE_POLICY:
        return _decided(run, how, test, _mapping(test.get("scores")).values())
    if how.pool == "items":
        return test.get(how.metric)
    return _mean(_mapping(found).get(how.metric) for found in _mapping(test.get("tasks")).values())


def _validation_score(run: Folder, how: Scored) -> Any:
    """Of the result, by what chose it. The loss: the lowest that was seen, all that plain runs tell."""
    if how.metric == "loss":
        return run.result.validation_loss if how.pool == "items" else None
    found = _mapping(_mapping(run.result.more.get("mixture")).get("result"))
    tasks = _mapping(found.get("tasks")).values()
    return _decided(run, how, found, [_mapping(task).get("score") for task in tasks])


def _decided(run: Folder, how: Scored, found: Mapping[str, Any], tasks: Iterable[Any]) -> Any:
    """A score in the measure that the run decided by; None for another. An nll as such: lower is better."""
    if not run.has_policy or how.metric != run.mixture("metric"):
        return None
    score: Any = _pooled(run, found) if how.pool == "items" else _mean(tasks)
    return -score if how.metric == "nll" and is_number(score) else score


def _pooled(run: Folder, found: Mapping[str, Any]) -> float | None:
    """The mean over rows, which a run that pooled over tasks did not write."""
    return found.get("pooled") if run.pool == "items" else None


def _mean(values: Iterable[Any]) -> float | None:
    found = list(values)
    return sum(found) / len(found) if found and all(map(is_number, found)) else None


def _number(value: Any, other: Any) -> Any:
    return value if is_number(value) else other


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
