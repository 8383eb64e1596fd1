"""Every figure that needs a GPU, in one command: most valuable first, each record on disk when it is made.

    python -m benchmarks.gpu_records --deadline 480 --out DIR [--commit SHA] [--parts C,E] [--rehearse
    [--threads N]]

Parts are processes with limits of their own, in the order of `PARTS`; what a killed part has written stays. A
red check takes out the operation and dtype it names. The table comes last: goal, measured, predicted,
verdict, what was left out, why. --rehearse runs every part at toy size on a CPU; the figures mean nothing and
the records say so.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from benchmarks.harness import checkout, machine, records
from benchmarks.suites.gpu import facts, goals, right
from benchmarks.suites.gpu.session import LEFT_OUT, RECORDS, Session, append_line, die_with_parent, read_lines

LOG, SUMMARY = "gpu_log.txt", "gpu_summary.txt"
TABLE_S = 4.0  # kept at the end for the summary
MOST_LOG_BYTES = 12 << 20


@dataclass(frozen=True)
class Part:
    """One process. seconds: what it is planned to take; limit_s: when it is ended; least_s: below this it is
    not begun."""

    letter: str
    name: str
    module: str  # of benchmarks.suites.gpu
    seconds: float
    limit_s: float
    least_s: float
    interpreted: bool = False  # in a rehearsal its Triton kernels run, in the interpreter

    @property
    def goals(self) -> Sequence[goals.Goal]:
        return getattr(importlib.import_module(f"benchmarks.suites.gpu.{self.module}"), "GOALS", ())


PARTS = (
    Part("A", "facts and ceilings", "facts", 10, 30, 0),
    Part("B", "is it right", "right", 35, 60, 10),
    Part("C", "one update of Qwen3-0.6B", "step", 75, 110, 30),
    Part("D", "SmolLM2-135M and 1.7B", "sizes", 45, 70, 20),
    Part("E", "other trainers", "trainers", 80, 105, 30),
    Part("F", "heads", "heads", 65, 90, 15),
    Part("G", "row kernel", "row_kernel", 20, 35, 8, interpreted=True),
    Part("H", "masked and memorised rows", "rows", 30, 45, 10, interpreted=True),
    Part("I", "optimizers, snapshots, a checkpoint", "state", 65, 95, 20),
    Part("J", "captured rows", "graphs", 20, 40, 10),
    Part("V", "replies by every engine", "replies", 240, 420, 60),
    Part("P", "a pretrained model", "pretrained", 90, 240, 40),
    Part("M", "tasks that overfit at different times", "overfit", 360, 1800, 140),
)
ALONE = {"V", "P", "M"}  # never with the others, nor together
LETTERS = "".join(part.letter for part in PARTS)


class Ended(BaseException):
    """A signal asks the driver to end: the table is still printed."""


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.part:
        return work(options.part, Path(options.out), options.ends_in, options.rehearse)
    if options.commit:
        os.environ["COMMIT"] = options.commit
    try:
        parts = chosen(options.parts)
        checkout.code()
    except (ValueError, checkout.NoCommit) as error:
        print(f"gpu_records: {error}", file=sys.stderr)
        return 2
    device = "cuda" if _cuda() and not options.rehearse else "cpu"
    if device == "cpu" and not options.rehearse:
        print(
            "gpu_records: no CUDA device here; --rehearse shows on a CPU that every part runs",
            file=sys.stderr,
        )
        return 2
    if options.out is None:
        out = Path(tempfile.mkdtemp(prefix="gpu_rehearsal_")) if options.rehearse else records.FOLDER
    else:
        out = Path(options.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / SUMMARY).touch()
    except OSError as error:  # before a minute of a machine is spent
        print(
            f"gpu_records: --out: nothing can be written there, got {out} ({error.strerror}); name a folder",
            file=sys.stderr,
        )
        return 2
    return drive(parts, out, options.deadline, rehearse=options.rehearse, threads=options.threads)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_records",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--deadline", type=float, default=480.0, help="seconds from now to the end of the table (480)"
    )
    parser.add_argument(
        "--out", help="folder of the records (benchmarks/records; a new temporary one in a rehearsal)"
    )
    parser.add_argument("--commit", help="the commit that was copied here, where there is no git history")
    parser.add_argument(
        "--parts", help=f"letters of {LETTERS}, as C,E; A comes first in any case (all but V, P, M)"
    )
    parser.add_argument("--rehearse", action="store_true", help="toy sizes on a CPU")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of a rehearsal (1)")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # the process of one part
    parser.add_argument("--ends-in", type=float, default=60.0, help=argparse.SUPPRESS)
    return parser


def chosen(letters: str | None) -> list[Part]:
    """The parts asked for, in their own order, A always among them. ValueError for an unknown letter, or
    for V, P or M among others."""
    if letters is None:
        return [part for part in PARTS if part.letter not in ALONE]
    asked = {letter.strip().upper() for letter in letters.split(",") if letter.strip()}
    if not asked:
        raise ValueError(f"--parts: names no part, got {letters!r}; expected letters of {LETTERS}")
    if unknown := sorted(asked - set(LETTERS)):
        raise ValueError(f"--parts: {', '.join(unknown)} is not a part; expected letters of {LETTERS}")
    if asked & ALONE and len(asked - {"A"}) > 1:
        raise ValueError(
            f"--parts: {', '.join(sorted(asked & ALONE))} runs alone, with A at most, got"
            f" {', '.join(sorted(asked))}"
        )
    return [part for part in PARTS if part.letter in asked | {"A"}]


def _cut_short(code: int | None, limit_s: float) -> str:
    """Why a part did not measure all it wanted, by its exit code (None: ended at its limit); else ""."""
    if code is None:
        return f"what it had not measured by {limit_s:.0f} s: its time was over"
    return f"its process ended with {code}; the log has the traceback" if code else ""


def drive(parts: list[Part], out: Path, deadline_s: float, *, rehearse: bool, threads: int) -> int:
    """Runs the parts one after another, then prints the table. 0; 1 where a part failed; 143 where a signal
    ended it."""
    started, failed, ended = time.monotonic(), [], False
    run = f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{uuid.uuid4().hex[:6]}"

    # Parts are other processes: they learn from their environment whose records they write.
    environment = {**os.environ, "REPSFT_RUN": run, "PYTHONUNBUFFERED": "1"}
    if rehearse:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(threads)}

    # What takes the machine away sends a signal first: the table is still printed.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end)
    print(
        f"session {run}: parts {' '.join(part.letter for part in parts)}, {deadline_s:.0f} s, records in"
        f" {out}",
        flush=True,
    )

    # A part that fails, or is late, costs itself alone: the next one is begun with the time that is left.
    try:
        for part in parts:
            left = deadline_s - TABLE_S - (time.monotonic() - started)
            if left < part.least_s or left <= 0:
                leave_out(out, run, part, f"{max(0.0, left):.0f} s were left, it needs {part.least_s:.0f}")
                continue
            limit = min(part.limit_s, left)
            print(f"\n{part.letter}  {part.name} (at most {limit:.0f} s)", flush=True)
            began = time.monotonic()
            code = run_part(part, out, limit, environment, rehearse)
            print(
                f"{part.letter}  {time.monotonic() - began:.1f} s of {part.seconds:.0f} planned", flush=True
            )
            why = _cut_short(code, limit)
            if why:
                leave_out(out, run, part, why, what="the rest of")
            if code:
                failed.append(part.letter)
    except Ended:
        ended = True
        print("\nended by a signal; what was measured is on disk", flush=True)

    # Of files alone, so that a signal leaves as good a table as an end.
    text = summary(parts, out, run, rehearse=rehearse, seconds=time.monotonic() - started)
    (out / SUMMARY).write_text(text + "\n")
    print(text, flush=True)
    if ended:
        return 128 + signal.SIGTERM
    return 1 if failed else 0


def run_part(
    part: Part, out: Path, limit_s: float, environment: dict[str, str], rehearse: bool
) -> int | None:
    """The part's exit code, or None where it was ended at its limit. What it prints is shown and kept."""
    command = [sys.executable, "-m", "benchmarks.gpu_records", "--part", part.letter, "--out", str(out)]
    command += ["--ends-in", f"{limit_s:.1f}"] + (["--rehearse"] if rehearse else [])
    environment = {**environment, "TRITON_INTERPRET": "1"} if rehearse and part.interpreted else environment
    child = subprocess.Popen(
        command, cwd=checkout.ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True, preexec_fn=die_with_parent,
    )  # fmt: skip
    assert child.stdout is not None
    descriptor, ends, late = child.stdout.fileno(), time.monotonic() + limit_s, False
    os.set_blocking(descriptor, False)
    try:
        while True:
            alive = child.poll() is None
            _pass_on(descriptor, out)
            if not alive:
                return None if late else child.returncode
            if time.monotonic() > ends:
                late = True
                _kill(child)
            time.sleep(0.05)
    except BaseException:
        _kill(child)
        raise
    finally:
        child.stdout.close()
        _kill(child)  # what it started and left running


def _kill(child: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _pass_on(descriptor: int, out: Path) -> None:
    """What a part printed, to the screen and the log; the log stops growing before it is too large to be
    taken along."""
    while True:
        try:
            data = os.read(descriptor, 1 << 16)
        except BlockingIOError:
            return
        if not data:
            return
        sys.stdout.buffer.write(data)
        sys.stdout.flush()
        with (out / LOG).open("ab") as log:
            if log.tell() < MOST_LOG_BYTES:
                log.write(data)


def work(letter: str, out: Path, ends_in_s: float, rehearse: bool) -> int:
    """The process of one part."""
    die_with_parent()
    part = next(part for part in PARTS if part.letter == letter)
    device = "cuda" if _cuda() and not rehearse else "cpu"
    session = Session(
        part=letter, out=out, device=device, rehearsal=rehearse, ends=time.monotonic() + ends_in_s,
        environment={**machine.environment(device), "run": os.environ["REPSFT_RUN"]},
        ceilings=facts.ceilings_of(out), red=right.red(out),
    )  # fmt: skip
    importlib.import_module(f"benchmarks.suites.gpu.{part.module}").run(session)
    return 0


def leave_out(out: Path, run: str, part: Part, why: str, what: str = "") -> None:
    line = {
        "run": run,
        "part": part.letter,
        "what": f"{what} part {part.letter}, {part.name}".strip(),
        "why": why,
    }
    append_line(out / LEFT_OUT, line)
    print(f"  left out: {line['what']}: {why}", flush=True)


def summary(parts: Sequence[Part], out: Path, run: str, *, rehearse: bool, seconds: float) -> str:
    """The table of a session, from its files alone."""
    made = read_lines(out / RECORDS, run)
    left = read_lines(out / LEFT_OUT, run)
    card = goals.Card(made[-1]["device"] if made else "no record", {} if rehearse else facts.ceilings_of(out))
    head = f"\n{len(made)} records in {seconds:.0f} s on {card.name}"
    lines = [head + ("; a rehearsal: the figures mean nothing" if rehearse else "")]
    lines += goals.table(
        [(part.letter, goal) for part in parts for goal in part.goals], goals.Found(made), card
    )
    red = sorted(right.red(out))
    lines += ["red checks: " + (", ".join(f"{operation} in {dtype}" for operation, dtype in red) or "none")]
    lines += (
        ["left out:", *(f"  {line['part']} {line['what']}: {line['why']}" for line in left)]
        if left
        else ["left out: nothing"]
    )
    return "\n".join(lines)


def _end(number: int, frame: FrameType | None) -> None:
    raise Ended


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    sys.exit(main())
