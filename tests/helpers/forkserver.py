"""A fork server for crash tests: importing costs seconds, forking a warm process milliseconds.

    server = ForkServer(preload=["torch"])
    child = server.spawn("module:function", {"keyword": "arguments"}, env={"RANK": "0"})
    child.kill()                       # SIGKILL by its own pid
    outcome = child.wait(timeout_s=30) # how it ended, what it returned, what it printed

The server is a process with one thread, forked from the one that forks ranks; its children never return to its
loop.
Several children at once are ranks of one job. A function's return value must be JSON.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.helpers import ranks

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Outcome:
    exit_code: int | None  # None: ended by a signal
    signal: int | None
    result: Any  # what the function returned; None when it did not
    output: str  # stdout and stderr

    @property
    def killed(self) -> bool:
        return self.signal == signal.SIGKILL


class Child:
    def __init__(self, server: ForkServer, pid: int, files: Path):
        self._server, self.pid, self._files = server, pid, files

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Sends a signal to this child alone. It stays a zombie until `wait`, so its pid cannot be
        another's."""
        os.kill(self.pid, number)

    def wait(self, timeout_s: float = 60.0) -> Outcome:
        """How it ended. A child that outlives its time is killed and reported as a TimeoutError with its
        output."""
        status = self._server._call({"wait": self.pid, "timeout_s": timeout_s})["status"]
        printed = self._files / "output"  # not there when the child was killed before its first line
        output = printed.read_text(errors="replace") if printed.exists() else ""
        if status is None:
            self.kill()
            self._server._call({"wait": self.pid, "timeout_s": 10})
            raise TimeoutError(f"child {self.pid} did not end within {timeout_s} s\n{output}")
        result = self._files / "result.json"
        value = json.loads(result.read_text()) if result.exists() else None
        if os.WIFSIGNALED(status):
            return Outcome(None, os.WTERMSIG(status), value, output)
        return Outcome(os.WEXITSTATUS(status), None, value, output)


class ForkServer:
    def __init__(self, preload: list[str]):
        """Starts the server, which imports what of `preload` is not there yet. This checkout comes first on its
        PYTHONPATH."""
        ours, theirs = socket.socketpair()
        self._folder = tempfile.TemporaryDirectory(prefix="forkserver-")
        self._process = ranks.context.Process(target=_begin, args=(theirs, preload))
        self._process.start()
        theirs.close()
        self._lines = ours.makefile("rw")
        self._socket = ours
        self._count = 0
        assert json.loads(self._lines.readline()) == "ready"

    def spawn(self, target: str, arguments: dict[str, Any], env: dict[str, str] | None = None) -> Child:
        """Forks a child that runs module:function(**arguments)."""
        self._count += 1
        files = Path(self._folder.name, str(self._count))
        files.mkdir()
        answer = self._call({"target": target, "arguments": arguments, "env": env or {}, "files": str(files)})
        return Child(self, answer["pid"], files)

    def run(
        self,
        target: str,
        arguments: dict[str, Any],
        timeout_s: float = 60.0,
        env: dict[str, str] | None = None,
    ) -> Outcome:
        return self.spawn(target, arguments, env).wait(timeout_s)

    def _call(self, request: dict[str, Any]) -> dict[str, Any]:
        self._lines.write(json.dumps(request) + "\n")
        self._lines.flush()
        return json.loads(self._lines.readline())

    def close(self) -> None:
        self._lines.close()
        self._socket.close()
        self._process.join(30)
        self._folder.cleanup()


def _serve(lines, preload: list[str]) -> None:
    for name in preload:
        with contextlib.suppress(ModuleNotFoundError):  # of another torch: its insides have other names
            importlib.import_module(name)
    importlib.import_module("tests.helpers.forked")
    lines.write('"ready"\n')
    lines.flush()
    while line := lines.readline():
        request = json.loads(line)
        if "wait" in request:
            answer = {"status": _wait(request["wait"], request["timeout_s"])}
        else:
            pid = os.fork()
            if pid == 0:
                _child(request)
            answer = {"pid": pid}
        lines.write(json.dumps(answer) + "\n")
        lines.flush()


def _wait(pid: int, timeout_s: float) -> int | None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return status
        time.sleep(0.002)
    return None


def _child(request: dict[str, Any]) -> None:
    code = 1
    try:
        out = os.open(Path(request["files"], "output"), os.O_WRONLY | os.O_CREAT, 0o644)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.environ.update(request["env"])
        module, function = request["target"].split(":")
        result = getattr(importlib.import_module(module), function)(**request["arguments"])
        Path(request["files"], "result.json").write_text(json.dumps(result))
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _begin(connection: socket.socket, preload: list[str]) -> None:
    """Forked like a rank, from a process that has imported what a run imports."""
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", PYTHONPATH=paths)
    _serve(connection.makefile("rw"), preload)
