"""pytest-benchmark's silences, closed: another machine, a vanished or new benchmark, none run, a zero or NaN
baseline.

`pytest benchmarks --benchmark-enable --benchmark-only` times the suites; `--benchmark-save NAME` and
`--benchmark-compare NAME` keep and compare. Left alone, the plugin only warns on another machine, and passes
when a benchmark is new or missing, or when none ran.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest

MACHINE = ("node_class", "processor_model", "cpus", "torch")


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    """Of the plugin's machine description only what makes times comparable; no host names in a committed
    file."""
    import os

    import torch

    from benchmarks.harness.machine import machine

    here = machine("cpu")
    machine_info.clear()
    machine_info.update(
        {"node_class": here["device_class"], "processor_model": here["device"], "cpus": os.cpu_count()}
    )
    machine_info["torch"] = torch.__version__


def pytest_benchmark_compare_machine_info(
    config: Any, benchmarksession: Any, machine_info: dict, compared_benchmark: dict
) -> None:
    saved = compared_benchmark["machine_info"]
    differing = [name for name in MACHINE if saved.get(name) != machine_info.get(name)]
    if differing:
        text = ", ".join(f"{name} {saved.get(name)!r} and {machine_info.get(name)!r}" for name in differing)
        raise pytest.UsageError(
            f"benchmarks: the baseline is from another kind of machine ({text}); nothing was compared"
        )


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    plugin = getattr(session.config, "_benchmarksession", None)
    if plugin is None or plugin.disabled or session.config.option.collectonly or exitstatus not in (0, 5):
        return
    problems = session_problems(
        [
            {"fullname": bench.fullname, "median": bench.stats.median}
            for bench in plugin.benchmarks
            if not bench.has_error
        ],
        [(str(path), saved) for path, saved in getattr(plugin, "compared_mapping", {}).items()],
    )
    if problems:
        print("\n" + "\n".join(f"benchmarks: {problem}" for problem in problems), file=sys.stderr)
        session.exitstatus = 1


def session_problems(
    ran: list[dict[str, Any]], compared: list[tuple[str, dict[str, dict[str, Any]]]]
) -> list[str]:
    """What the plugin would pass over. ran: fullname and median; compared: (file, {fullname: saved
    benchmark})."""
    if not ran:
        return ["none ran, expected at least one; is --benchmark-enable missing, or is the selection empty?"]
    found = [
        f"{bench['fullname']}: the median is not a time: {bench['median']!r}"
        for bench in ran
        if not _is_time(bench["median"])
    ]
    names = {bench["fullname"] for bench in ran}
    for path, saved in compared:
        found += [f"{name}: vanished, {path} has it" for name in sorted(set(saved) - names)]
        found += [f"{name}: is new, {path} does not have it" for name in sorted(names - set(saved))]
        medians = {name: bench.get("stats", bench).get("median", math.nan) for name, bench in saved.items()}
        found += [
            f"{name}: {path} holds no time: {value!r}"
            for name, value in sorted(medians.items())
            if not _is_time(value)
        ]
    return found


def _is_time(value: object) -> bool:
    return (
        isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0
    )
