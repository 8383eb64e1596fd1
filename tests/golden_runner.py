"""Runs commands of one tree for tests.golden: imports the libraries once, then each command is a fork of its own.

Started as a script with that tree first on PYTHONPATH. A line of JSON on standard input asks for one command on one or more
ranks, the answering line on standard output says how each rank ended.
"""

import json
import os
import runpy
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

LIBRARIES = (
    "torch", "torch.distributed.fsdp", "torch.distributed.tensor",
    "transformers.models.llama.modeling_llama", "peft.tuners.lora",
    "matplotlib.pyplot", "pydantic_settings", "rich.console", "rich.table", "rich.live", "safetensors.torch", "yaml",
)  # fmt: skip
POLL_S = 0.004


def enter(arguments: list[str], environment: dict[str, str], out: str) -> None:
    """In the fork: the command as `python -m repsft_fast` runs it, its output in files. Never returns."""
    code = 1
    try:
        for number, ending in ((1, ".out"), (2, ".err")):
            os.dup2(os.open(out + ending, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.update(environment)
        sys.argv = ["repsft_fast", *arguments]
        runpy.run_module("repsft_fast", run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def updates_written(metrics: str) -> int:
    try:
        return Path(metrics).read_bytes().count(b'"kind": "update"')
    except OSError:
        return 0


def serve(request: dict[str, Any]) -> list[int]:
    """Exit codes of the ranks; minus the signal's number for one that a signal ended."""
    left = {}
    for rank, environment in enumerate(request["environments"]):
        out = request["out"] + (f".{rank}" if len(request["environments"]) > 1 else "")
        pid = os.fork()
        if not pid:
            enter(request["arguments"], environment, out)
        left[pid] = rank
    codes: dict[int, int] = {}
    deadline, signalled = time.monotonic() + request["timeout_s"], False
    while left:
        for pid in list(left):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[left.pop(pid)] = os.waitstatus_to_exitcode(status)
        if request["signal"] and not signalled and updates_written(request["metrics"]) >= request["after"]:
            signalled = True
            for pid in left:
                os.kill(pid, request["signal"])
        if time.monotonic() > deadline:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            deadline += 10
        time.sleep(POLL_S)
    return [codes[rank] for rank in sorted(codes)]


def main() -> None:
    import repsft_fast

    for name in LIBRARIES:
        __import__(name)
    print(json.dumps(repsft_fast.__file__), flush=True)
    for line in sys.stdin:
        print(json.dumps(serve(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
