"""Every reply of a task in a file, a line each, written as it comes: an evaluation that was killed goes on.

    {"kind": "evaluation", "version": 1, …}                      what was evaluated, and how
    {"prompt": 0, "draw": 0, "ids": […], "finished": true, "entropy": 0.41, "text": "…", …}

The first line is an identity: a file with another one is another evaluation's, and is refused. Once all
replies are there and judged, the file is written again, in order, with what each reply was worth.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from repsft_fast.errors import ConfigError, TrainingError, describe
from repsft_fast.evaluate.asked import Generation, Request
from repsft_fast.files import replace_file

KIND, VERSION = "evaluation", 1
_OTHER_FOLDER = "give another folder, or move this one away"
_LONGEST_SHOWN = 60


class Record:
    """One task's file. `known`: the replies it already holds, by (prompt, draw).

    identity: JSON; what a reply depends on. A last line that was cut short by a kill is dropped. ConfigError
    for a file of another identity, or that is no record.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], *, text_of: Callable[[Generation], str]):
        self.path, self._text_of = path, text_of
        self._header = {"kind": KIND, "version": VERSION, **identity}
        self.known: dict[tuple[int, int], Generation] = {}
        try:
            whole = self._read()
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed by `close`)
            self._file.truncate(whole)
            if not whole:
                self._write(self._header)
        except OSError as error:
            raise ConfigError(describe(str(path), "cannot be written", got=error.strerror)) from error

    def add(self, request: Request, reply: Generation) -> None:
        """A reply that has just ended. TrainingError where it cannot be written."""
        self.known[request.prompt, request.draw] = reply
        line = {
            "prompt": request.prompt,
            "draw": request.draw,
            **line_of(reply),
            "text": self._text_of(reply),
        }
        try:
            self._write(line)
        except OSError as error:
            todo = "make room and start the same command again: it goes on"
            raise TrainingError(
                describe(str(self.path), "cannot be written", got=error.strerror, todo=todo)
            ) from error

    def finish(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """All replies, judged, in place of what was written as they came. TrainingError as `add`."""
        text = "".join(map(_line, [self._header, *lines]))
        try:
            replace_file(self.path, text.encode(), "replies")
        except OSError as error:
            raise TrainingError(describe(str(self.path), "cannot be written", got=error.strerror)) from error
        self.close()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Record:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _write(self, line: Mapping[str, Any]) -> None:
        data = memoryview(_line(line).encode())
        while data:  # a full disk may take only a part
            data = data[self._file.write(data) :]

    def _read(self) -> int:
        """What is there, into `known`. Bytes of whole lines."""
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return 0
        whole = data.rfind(b"\n") + 1
        lines = data[:whole].splitlines()
        if data and not lines:  # the first line itself was cut short, or it is somebody's file
            if self._is_begun(data):
                return 0
            raise ConfigError(describe(str(self.path), "is no record of replies", todo=_OTHER_FOLDER))
        for number, line in enumerate(lines, 1):
            try:
                values = json.loads(line)
                if number == 1:
                    self._check(values)
                else:
                    self.known[int(values["prompt"]), int(values["draw"])] = _reply(values)
            except ConfigError:
                raise
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                wrong = "is no line of a record of replies"
                where = f"{self.path} line {number}"
                raise ConfigError(describe(where, wrong, got=_short(line), todo=_OTHER_FOLDER)) from error
        return whole

    def _is_begun(self, data: bytes) -> bool:
        return _line(self._header).encode().startswith(data)

    def _check(self, found: Any) -> None:
        if not isinstance(found, dict) or found.get("kind") != KIND:
            raise ValueError("no record")
        wanted = json.loads(_line(self._header))
        others = [name for name in {**wanted, **found} if found.get(name) != wanted.get(name)]
        if not others:
            return
        name = others[0]
        wrong = f"holds replies of another evaluation: {', '.join(others)} differ{'s' * (len(others) == 1)}"
        expected, got = (_short(json.dumps(values.get(name)).encode()) for values in (wanted, found))
        raise ConfigError(describe(str(self.path), wrong, expected=expected, got=got, todo=_OTHER_FOLDER))


def line_of(reply: Generation) -> dict[str, Any]:
    return {"ids": reply.ids, "finished": reply.finished, "entropy": reply.entropy}


def _reply(values: Mapping[str, Any]) -> Generation:
    entropy = values["entropy"]
    if not isinstance(values["finished"], bool) or not isinstance(values["ids"], list):
        raise TypeError("no reply")
    return Generation(
        [int(token) for token in values["ids"]],
        values["finished"],
        None if entropy is None else float(entropy),
    )


def _line(values: Mapping[str, Any]) -> str:
    return json.dumps(values, ensure_ascii=False, allow_nan=False) + "\n"


def _short(data: bytes) -> str:
    text = data.decode(errors="replace")
    return text if len(text) <= _LONGEST_SHOWN else text[:_LONGEST_SHOWN] + " …"
