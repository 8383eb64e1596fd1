"""Runs untrusted work (chat templates) in a forked child with limits on time, memory and output.

Jinja's sandbox keeps a template from reaching Python, not from looping for ever or filling the memory. The
timer is the child's own, with the default action, so it also ends a loop inside C code; the parent sees the
pipe close. It counts CPU time: a busy machine is no fault of the template.
"""

from __future__ import annotations

import json
import os
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from repsft_fast.errors import DataError, describe

MAX_SECONDS = 20.0  # of CPU time, for one item; a template takes ~0.1 ms
WALL_FACTOR = 30  # wall time may be so many times longer: only a child that is stuck reaches it
MAX_MEMORY_BYTES = 2 * 2**30  # on top of what the process has mapped already
MAX_OUTPUT_BYTES = 256 * 2**20  # of one item

Item = TypeVar("Item")


def bounded_map(
    # returns JSON; raises DataError for the user, anything else is reported by name
    work: Callable[[Item], Any],
    items: Sequence[Item],
    where: Callable[[Item], str],  # names an item in errors
    what: str,  # "the chat template", in errors
) -> Iterator[Any]:
    """work(item) for every item, in order, in a child process; a DataError in its place for an item that
    failed.

    Raises DataError naming the item that broke a limit: its child is gone, and another would only break the
    limit again.
    """
    if not items:
        return
    if not hasattr(os, "fork"):  # Windows: no limits but the sandbox's own
        for item in items:
            yield _unwrap(_attempt(work, item), where(item), what)
        return
    read_end, write_end = os.pipe()
    with warnings.catch_warnings():
        # Python 3.12 warns that threads do not survive a fork; the child runs Python and jinja only.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            os.close(read_end)
            _serve(work, items, write_end)
        finally:
            os._exit(0)
    os.close(write_end)
    status: int | None = None
    try:
        with os.fdopen(read_end, "rb") as stream:
            for item in items:
                header = stream.read(8)
                body = stream.read(int.from_bytes(header, "little")) if len(header) == 8 else b""
                if len(header) < 8 or len(body) < int.from_bytes(header, "little"):
                    status = os.waitpid(child, 0)[1]
                    raise DataError(_cause_of_death(status, where(item), what))
                yield _unwrap(json.loads(body), where(item), what)
    finally:
        if status is None:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def _serve(work: Callable[[Item], Any], items: Sequence[Item], write_end: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM, signal.SIGPROF):
        signal.signal(number, signal.SIG_DFL)
    _limit_memory()
    with os.fdopen(write_end, "wb") as stream:
        for item in items:
            signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)
            signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS * WALL_FACTOR)
            answer = _attempt(work, item)
            try:
                body = json.dumps(answer).encode()
            except MemoryError:
                body = b'{"error": "MemoryError: its output is too large"}'
            if len(body) > MAX_OUTPUT_BYTES:
                body = json.dumps({"error": f"its output is larger than {MAX_OUTPUT_BYTES} bytes"}).encode()
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)  # a parent that reads slowly is no fault of the template
            stream.write(len(body).to_bytes(8, "little") + body)
            stream.flush()  # so that the first item without an answer is the one that broke a limit


def _attempt(work: Callable[[Item], Any], item: Item) -> dict[str, Any]:
    try:
        return {"value": work(item)}
    except DataError as error:
        return {"data_error": str(error)}
    except MemoryError:
        return {"error": f"it needs more than {MAX_MEMORY_BYTES} bytes of memory"}
    except Exception as error:
        # Whatever a template raises is the template's: the user gets its name, never a traceback.
        return {"error": f"{type(error).__name__}: {str(error)[:500]}"}


def _unwrap(answer: dict[str, Any], where: str, what: str) -> Any:
    if "value" in answer:
        return answer["value"]
    if "data_error" in answer:
        return DataError(answer["data_error"])
    return DataError(
        describe(where, f"{what} failed on this row ({answer['error']})", todo="mend the row or the template")
    )


def _cause_of_death(status: int, where: str, what: str) -> str:
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    if number == signal.SIGPROF:
        return describe(
            where,
            f"{what} took longer than {MAX_SECONDS:g} s of CPU time on this row",
            todo="mend the template",
        )
    if number == signal.SIGALRM:
        seconds = MAX_SECONDS * WALL_FACTOR
        return describe(
            where, f"{what} was stuck on this row for {seconds:g} s", todo="is the machine out of memory?"
        )
    cause = signal.Signals(number).name if number else f"exit status {os.waitstatus_to_exitcode(status)}"
    return describe(
        where, f"{what} ended its process on this row ({cause}; out of memory?)", todo="mend the template"
    )


def _limit_memory() -> None:
    try:
        import resource

        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        limit = mapped + MAX_MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit if hard < 0 else min(limit, hard), hard))
    except (ImportError, OSError, ValueError):
        return  # no /proc (macOS): time and output stay bounded
