"""`repsft bench`: the benchmarks' own command line. They measure a source tree and are not installed with
the package."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from repsft_fast.errors import ConfigError, describe

CHECKOUT = Path(__file__).resolve().parents[2]


def bench(arguments: Sequence[str]) -> int:
    """`python -m benchmarks ARGUMENTS` of this checkout, and its exit code."""
    if not (CHECKOUT / "benchmarks" / "__main__.py").exists():
        wrong = "the benchmarks are not part of the installed package"
        raise ConfigError(
            describe("bench", wrong, expected=f"{CHECKOUT}/benchmarks", todo="run it from a checkout")
        )
    # A process of its own finds them by its path; -P: not those of another project in the current folder,
    # which stays the same, since record files are named from there.
    path = os.pathsep.join(filter(None, (str(CHECKOUT), os.environ.get("PYTHONPATH"))))
    sys.stdout.flush()
    command = [sys.executable, "-P", "-m", "benchmarks", *arguments]
    child = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path})
    with _handing_on(child):
        while True:
            try:
                code = child.wait()
                break
            except KeyboardInterrupt:  # the terminal has sent it to both: the child says how it ends
                continue
    return code if code >= 0 else 128 - code


@contextmanager
def _handing_on(child: subprocess.Popen) -> Iterator[None]:
    """A request to end goes to the benchmark too, which would else go on measuring, on its GPU as well."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            before[number] = signal.signal(number, lambda sent, _: child.send_signal(sent))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
