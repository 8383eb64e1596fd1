"""Law 6 on this machine: a run that kills itself in the middle of an epoch, goes on, and equals the one left
alone.

Two processes, because a process cannot be killed and compared by itself:

    python -m repsft_fast.selftest.kill_and_resume settings.json whole killed    trains in `whole`, then in
                                                                                 `killed` until SIGKILL
    python -m repsft_fast.selftest.kill_and_resume settings.json --resume killed
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from repsft_fast.checkpoint.files import hash_file
from repsft_fast.distributed import launch
from repsft_fast.selftest.laws import Found
from repsft_fast.throughput import Work

# Checkpoints after updates 2 and 4 of 6, four updates to an epoch. The save after 4 waits for the one after
# 2, so that one is whole when the process is killed after update 5: in epoch 1, with the other save perhaps
# under way.
UPDATES, EVERY, KILL_AFTER = 6, 2, 5
TIMEOUT_S = 600.0
_COMPARED = ("update", "epoch", "loss", "grad_norm", "lr", "total", "correct")
_RANKS = frozenset(launch.VARIABLES)


def killed_and_resumed(settings: Mapping[str, Any], folder: Path) -> Found:
    """Run it twice, kill the second, resume it, compare every update's figures and the bytes of the saved
    weights."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "settings.json"
    file.write_text(json.dumps(settings))
    whole, killed = folder / "whole", folder / "killed"
    first = _run([str(file), str(whole), str(killed)])
    if first.returncode != -signal.SIGKILL:
        return Found(f"the run to be killed ended with {first.returncode}: {_last_line(first)}", False)
    if not (whole / "result.json").exists() or (killed / "result.json").exists():
        return Found("the kill did not come between the two runs' ends", False)
    second = _run([str(file), "--resume", str(killed)])
    if second.returncode:
        return Found(f"--resume ended with {second.returncode}: {_last_line(second)}", False)
    resumed = [line for line in _lines(killed) if line["kind"] == "resume"]
    if not resumed:
        return Found("--resume began anew, though a checkpoint was whole", False)
    return compared(whole, killed)


def compared(whole: Path, resumed: Path) -> Found:
    """Two finished runs' folders: the figures of their updates, and the weights they saved."""
    expected, got = _updates(whole), _updates(resumed)
    equal = sum(a == b for a, b in zip(expected, got, strict=False))
    weights = _weights(whole) == _weights(resumed)
    holds = expected == got and len(expected) == UPDATES and weights
    return Found(
        f"{equal} of {UPDATES} updates and {'' if weights else 'not '}the saved weights equal", holds
    )


def _run(arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in _RANKS}
    command = [sys.executable, "-m", "repsft_fast.selftest.kill_and_resume", *arguments]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        errors="replace",
        env=environment,
        timeout=TIMEOUT_S,
        check=False,
    )


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    lines = (done.stderr.strip() or done.stdout.strip() or "no words").splitlines()
    return lines[-1][:300]


def _lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def _updates(folder: Path) -> list[dict[str, Any]]:
    return [
        {name: line.get(name) for name in _COMPARED} for line in _lines(folder) if line["kind"] == "update"
    ]


def _weights(folder: Path) -> dict[str, str]:
    return {path.name: hash_file(folder, path.name) for path in sorted(folder.glob("*.safetensors"))}


def _main(arguments: Sequence[str]) -> None:
    """The child: see the module's first lines."""
    from repsft_fast.training.trainer import train

    settings = json.loads(Path(arguments[0]).read_text())
    if arguments[1] == "--resume":
        train(settings, {"run.folder": arguments[2]}, resume=True)
        return

    def kill(work: Work) -> None:
        if work.updates == KILL_AFTER:
            os.kill(os.getpid(), signal.SIGKILL)

    train(settings, {"run.folder": arguments[1]})
    train(settings, {"run.folder": arguments[2]}, on_update=kill)


if __name__ == "__main__":
    _main(sys.argv[1:])
