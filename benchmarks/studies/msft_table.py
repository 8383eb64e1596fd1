"""What the records of the mSFT study say: means, 95 % intervals and paired differences, as Markdown.

Intervals are Student's over seeds; a difference to the baseline is taken seed by seed first, because both
cells of a seed have the same rows and the same start (`repsft compare` does the same with folders of runs).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from repsft_fast.report.compare import interval, paired

BASELINE = "sft C=6"
Record = Mapping[str, Any]


def by_cell(records: Iterable[Record]) -> dict[str, dict[int, Record]]:
    """{cell: {seed: record}} in the order of the records."""
    found: dict[str, dict[int, Record]] = {}
    for record in records:
        found.setdefault(record["cell"], {})[record["seed"]] = record
    return found


def peaks(record: Record) -> dict[str, float]:
    """Epoch of every task's first maximum on its validation rows over a run of one stage."""
    found = {}
    for number, task in enumerate(record["tasks"], start=3):
        found[task] = max(record["curve"], key=lambda line: line[number])[2]
    return found


def stages(record: Record) -> int:
    """Stages by the curve; the field `stages` counts the first one twice in records of one day."""
    return 1 + max(line[1] for line in record["curve"])


def forgetting(records: Iterable[Record]) -> list[float]:
    """Validation score in the result minus that at the exclusion, one value per excluded task. Below 0:
    forgotten.

    A task that leaves after the result's moment tells nothing and is left out.
    """
    changes = []
    for record in records:
        place = {line[0]: number for number, line in enumerate(record["curve"])}
        for gone in record["exclusions"]:
            if place[record["result_moment"]] > place[gone["moment"]]:
                changes.append(gone["score_in_result"] - gone["score"])
    return changes


def table(records: Sequence[Record]) -> str:
    """All tables. ValueError without records."""
    if not records:
        raise ValueError(
            "benchmarks/studies/msft_table.py: no records, expected at least 1; run the study first"
        )
    cells = by_cell(records)
    sections = [_summary(cells), _work(cells), _tasks(cells), _exclusions(cells)]
    if BASELINE in cells:
        sections.append(_peaks(cells[BASELINE].values()))
    sections.append(_headroom(cells))
    return "\n\n".join(text for text in sections if text.count("\n") > 1)  # what has more than its head


def _summary(cells: Mapping[str, Mapping[int, Record]]) -> str:
    baseline = _column(cells.get(BASELINE, {}), "test_macro")
    lines = _head("cell", "seeds", "test exact match", f"minus {BASELINE}", "validation", "before training")
    for cell, seeds in cells.items():
        runs = list(seeds.values())
        difference = paired(_column(seeds, "test_macro"), baseline) if cell != BASELINE else None
        lines.append(
            _row(
                cell, len(runs), _pm(interval([r["test_macro"] for r in runs])),
                _pm(difference, sign=True) if difference else "",
                f"{fmean(r['validation'] for r in runs):.3f}",
                f"{fmean(r['validation_start'] for r in runs):.3f}",
            )
        )  # fmt: skip
    return "\n".join(lines)


def _work(cells: Mapping[str, Mapping[int, Record]]) -> str:
    lines = _head(
        "cell", "stages", "updates", "tokens trained", "not in the result", "tokens evaluated", "more tokens",
        "TFLOP training", "TFLOP evaluation", "seconds", "of these evaluating", "snapshots and reverts, ms",
    )  # fmt: skip
    for cell, seeds in cells.items():
        runs = list(seeds.values())

        def mean(name: str, scale: float = 1.0, runs: list[Record] = runs) -> float:
            return fmean(r[name] for r in runs) / scale

        share = fmean(r["discarded_tokens"] / r["tokens"] for r in runs)
        snapshots = fmean(r["snapshots"]["seconds"] for r in runs) * 1e3
        lines.append(
            _row(
                cell, f"{fmean(stages(r) for r in runs):.1f}", f"{mean('updates'):.0f}",
                f"{mean('tokens', 1e3):.0f} k", f"{share:.0%}",
                f"{mean('evaluated_tokens', 1e3):.0f} k", f"{mean('extra_tokens', 1e3):.0f} k",
                f"{mean('train_flops', 1e12):.2f}", f"{mean('evaluation_flops', 1e12):.2f}",
                f"{mean('seconds'):.0f}", f"{mean('evaluation_seconds'):.0f}", f"{snapshots:.0f}",
            )
        )  # fmt: skip
    return "\n".join(lines)


def _tasks(cells: Mapping[str, Mapping[int, Record]]) -> str:
    names = next(iter(next(iter(cells.values())).values()))["tasks"]
    lines = _head("test exact match", *names)
    for cell, seeds in cells.items():
        lines.append(_row(cell, *(f"{fmean(r['test'][task] for r in seeds.values()):.3f}" for task in names)))
    return "\n".join(lines)


def _exclusions(cells: Mapping[str, Mapping[int, Record]]) -> str:
    lines = _head(
        "cell",
        "tasks excluded per run",
        "change of an excluded task until the result",
        "who left, at which epoch",
    )
    for cell, seeds in cells.items():
        gone = [r["exclusions"] for r in seeds.values()]
        if not any(gone):
            continue
        changes = forgetting(seeds.values())
        # Tasks of one run are not independent: their mean per run is the unit.
        per_run = [fmean(found) for r in seeds.values() if (found := forgetting([r]))]
        change = (
            f"{_pm(interval(per_run), sign=True)} ({len(changes)} tasks)"
            if per_run
            else "none left before the result"
        )
        words = "; ".join(f"seed {s}: " + ", ".join(f"{e['task']} {e['epoch']:.2f}" for e in r["exclusions"])
                          for s, r in seeds.items() if r["exclusions"])  # fmt: skip
        lines.append(_row(cell, f"{fmean(len(g) for g in gone):.1f}", change, words))
    return "\n".join(lines)


def _peaks(runs: Iterable[Record]) -> str:
    listed = list(runs)
    lines = _head(f"first maximum in {BASELINE}, epochs", *listed[0]["tasks"])
    for record in listed:
        found = peaks(record)
        lines.append(_row(f"seed {record['seed']}", *(f"{found[task]:.2f}" for task in record["tasks"])))
    return "\n".join(lines)


def _headroom(cells: Mapping[str, Mapping[int, Record]]) -> str:
    """What an ideal schedule could have won at most in each run; records older than that have no line."""
    lines = _head(
        "head-room, validation", "unit", "mean over seeds", "by chance", "seed by seed, ± in the run"
    )
    for cell, seeds in cells.items():
        found = {seed: r["headroom"] for seed, r in seeds.items() if (r.get("headroom") or {}).get("common")}
        if not found:
            continue
        words = "; ".join(f"seed {seed}: {_pm((room['value'], room['interval'] or math.inf))}"
                          for seed, room in found.items())  # fmt: skip
        chance = fmean(room["by_chance"] for room in found.values())
        unit = next(iter(found.values()))["unit"]
        middle = _pm(interval([room["value"] for room in found.values()]))
        lines.append(_row(cell, unit, middle, f"{chance:.3f}", words))
    return "\n".join(lines)


def _column(seeds: Mapping[int, Record], name: str) -> dict[int, float]:
    return {seed: record[name] for seed, record in seeds.items()}


def _pm(found: tuple[float, float], sign: bool = False) -> str:
    middle, half = found
    return f"{middle:{'+' if sign else ''}.3f}" + (f" ± {half:.3f}" if math.isfinite(half) else "")


def _head(*names: str) -> list[str]:
    return [_row(*names), "|" + "---|" * len(names)]


def _row(*cells: Any) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"
