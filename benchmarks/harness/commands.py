"""The verbs behind `repsft bench`: run, compare, gate. Also `python -m benchmarks …`.

    run                  time every case, append records
    compare A B          two record files, or two git revisions measured side by side
    gate [--update]      counted figures, ratios within this run, and the kernels' ahead-of-time table

Exit codes: 0 passed, 1 something stands against it or nothing was judged, 2 it cannot be asked that way.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.harness import cases, checkout, counting, gate, lowering, machine, records, timing

BASELINE = checkout.ROOT / "benchmarks" / "baseline.json"
ROUNDS = 30


class NoRevision(Exception):
    """A name that git does not know."""


def run(folder: Path = records.FOLDER) -> int:
    """Times every gated case on this machine and appends one record each to `cases.jsonl`."""
    environment = machine.environment("cpu")
    made = []
    for name, case in cases.CASES.items():
        call = case.build()
        times = timing.interleave(timing.with_noise({name: call}), rounds=ROUNDS, budget_s=10.0)
        noise = gate.judge_pairs(times[name], times[timing.NOISE_NAME], gate.LEAST_EFFECT["cpu"])
        point = records.make(
            environment, op=name, implementation="ours", shape={"case": name}, dtype="float32",
            times_ms=times[name], peak_bytes=counting.peak_bytes(call), noise=[noise.low, noise.high],
        )  # fmt: skip
        made.append(point)
        print(f"{name:28s} {point['p50_ms']:9.3f} ms   A/A {noise}")
    records.append(folder / "cases.jsonl", made)
    return 0


def run_gate(*, update: bool = False, baseline: Path = BASELINE, aot: bool = True) -> int:
    """What needs no GPU, on any machine. --update rewrites this torch version's counted figures, and only
    those."""
    known = json.loads(baseline.read_text()) if baseline.exists() else {"counted": {}, "ratios": {}}
    version = ".".join(torch.__version__.split(".")[:2])
    counted = {name: cases.counted(case) for name, case in cases.CASES.items()} | lowering.counted()
    if update:
        known["counted"][version] = counted
        baseline.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")

    # Another torch dispatches otherwise: its figures cannot stand in.
    if version not in known["counted"]:
        print(
            f"gate: no counted figures for torch {version}; `repsft bench gate --update` makes them",
            file=sys.stderr,
        )
        return 1

    # As the committed ratios were measured: with the number of threads a ratio moves, too.
    pairs = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name, (yardstick, ours) in cases.RATIOS.items():
            times = timing.interleave(
                {"yardstick": yardstick(), "ours": ours()}, rounds=ROUNDS, budget_s=10.0
            )
            pairs[name] = times["yardstick"], times["ours"]
    finally:
        torch.set_num_threads(threads)

    # All are made and shown before one of them fails the gate: a reader sees everything at once.
    reports = [
        gate.compare_exact(known["counted"][version], counted),
        gate.compare_ratios(known["ratios"], pairs),
    ]
    if aot:
        reports.append(_aot_report())
    for report in reports:
        print(report)
    return 0 if all(report.passed for report in reports) else 1


def compare(a: str, b: str) -> int:
    """B against A: two .jsonl files of records, or two revisions of this repository."""
    files = [name.endswith(".jsonl") for name in (a, b)]
    if all(files):
        report = gate.compare_records(*(records.latest(records.read(Path(name))) for name in (a, b)))
    elif any(files):
        print(
            "compare: one is a record file and the other is not; give two files or two revisions",
            file=sys.stderr,
        )
        return 2
    else:
        with exported(a) as first, exported(b) as second:
            report = compare_folders(first, second)
    print(report)
    return 0 if report.passed else 1


@contextlib.contextmanager
def exported(revision: str) -> Iterator[Path]:
    """A folder with that revision's packages and today's benchmarks: both sides are measured by the same
    code."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        archive = folder / "tree.tar"
        command = ["git", "archive", "--output", str(archive), revision, "repsft_fast", "csrc_triton"]
        done = subprocess.run(command, cwd=checkout.ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise NoRevision(f"{revision} is not a revision of this repository: {done.stderr.strip()}")
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        shutil.copytree(
            checkout.ROOT / "benchmarks", folder / "benchmarks", ignore=shutil.ignore_patterns("records")
        )
        yield folder


def compare_folders(a: Path, b: Path, rounds: int = ROUNDS) -> gate.Report:
    """Every case of two trees, in two worker processes that take turns call by call, so that rounds are
    pairs."""
    report = gate.Report()
    with _worker(a) as first, _worker(b) as second:
        for name in cases.CASES:
            answers = [_ask(worker, name) for worker in (first, second)]
            missing = [tree for tree, answer in zip("AB", answers) if "error" in answer]
            if missing:
                reasons = "; ".join(answer["error"] for answer in answers if "error" in answer)
                report.add(name, f"does not run in {' and '.join(missing)}: {reasons}", fails="B" in missing)
                continue
            times = timing.interleave_measured(
                {
                    "A": lambda name=name: _ask(first, name)["ms"],
                    "B": lambda name=name: _ask(second, name)["ms"],
                },  # type: ignore[misc]
                rounds=rounds,
            )
            judgement = gate.judge_pairs(times["A"], times["B"], gate.LEAST_EFFECT["cpu"])
            report.judged += 1
            report.add(name, str(judgement), fails=judgement.verdict is gate.Verdict.SLOWER)
    return report


@contextlib.contextmanager
def _worker(folder: Path) -> Iterator[subprocess.Popen]:
    command = [sys.executable, "-m", "benchmarks.harness.worker"]
    process = subprocess.Popen(command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


def _ask(worker: subprocess.Popen, name: str) -> dict:
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write(json.dumps(name) + "\n")
    worker.stdin.flush()
    line = worker.stdout.readline()
    if not line:
        raise RuntimeError(f"compare: the worker ended while it ran {name!r}")
    return json.loads(line)


def _aot_report() -> gate.Report:
    import triton

    from csrc_triton import aot

    report, table = gate.Report(), aot.load_table()
    if triton.__version__ not in table:
        report.add("ahead of time", f"no committed figures for Triton {triton.__version__}", fails=True)
    measured = aot.measure_all()
    report.judged = sum(len(by_case) for by_case in measured.values())
    for problem in aot.problems(table, measured, triton.__version__):
        report.add("ahead of time", problem, fails=True)
    return report


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="repsft bench", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    verbs = parser.add_subparsers(dest="verb")
    verbs.add_parser("run", help="time every case and append records")
    side_by_side = verbs.add_parser("compare", help="two record files, or two git revisions")
    side_by_side.add_argument("a")
    side_by_side.add_argument("b")
    gating = verbs.add_parser("gate", help="counted figures, ratios, ahead-of-time table")
    gating.add_argument("--update", action="store_true", help="rewrite this torch version's counted figures")
    options = parser.parse_args(arguments)
    if options.verb == "compare":
        try:
            return compare(options.a, options.b)
        except (NoRevision, records.BadRecord, OSError) as error:
            print(f"compare: {error}", file=sys.stderr)
            return 2
    if options.verb == "gate":
        return run_gate(update=options.update)
    return run()
