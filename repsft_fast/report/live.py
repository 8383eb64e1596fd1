"""What a person sees while a run goes on: one calm line, a permanent line per epoch, notes above it.

The trainer hands over plain dicts (the records of metrics.jsonl) and knows nothing of terminals:

    live = Live(enabled=world.is_main)
    live.start({"folder": ..., "model": ..., "parameters": ..., "samples": ..., "updates": 3000, "target":
    0.97}) live.update(record); live.epoch(record); live.evaluation(record); live.note("text");
    live.end(result)

Without a terminal there are plain lines, one per epoch and one every `every_seconds`.
Not enabled (ranks other than 0), it prints nothing.
"""

import math
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, TextIO

from repsft_fast.report import live_mixture, visible
from repsft_fast.report.format import MISSING, count, duration, number, percent, size
from repsft_fast.report.stream import Stream

Record = Mapping[str, Any]
BAR = 24  # columns, at most
# What the line shows, most needed first: a narrow terminal loses the last ones.
ORDER = ("target", "update", "loss", "speed", "eta", "epoch", "lr", "memory", "grad", "mfu", "wait", "vetoed")
# In which order it is read.
READ = ("target", "update", "epoch", "loss", "grad", "lr", "speed", "mfu", "memory", "wait", "vetoed", "eta")
# so long a reader that does not read (a stopped terminal, a full pipe) holds the run up, once
PATIENCE_S = 2.0


class Live:
    """The view of one run. `close` is safe to call at any time and twice; as a context manager it is called
    for you."""

    def __init__(
        self,
        enabled: bool = True,
        *,
        stream: TextIO | None = None,
        terminal: bool | None = None,
        every_seconds: float = 30.0,
    ):
        """terminal: None = ask the stream (standard output unless given)."""
        self._stream: Any = Stream(stream if stream is not None else sys.stdout, patience_s=PATIENCE_S)
        self._shown = enabled
        self._terminal = self._stream.isatty() if terminal is None else terminal
        self._every_seconds = every_seconds
        self._given: dict[str, Any] = {}  # what the run was started with
        self._info: Record = {}  # and what is known since
        self._pace = _Pace()
        self._last_line = -math.inf
        self._standing: Record | None = None  # of a mixture's tasks
        self._record: Record | None = None  # the newest update
        self._console: Any = None
        self._screen: Any = None

    @property
    def trouble(self) -> str:
        """Why nothing is shown any more; "" while all is well."""
        return str(self._stream.trouble)

    def __enter__(self) -> "Live":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self, info: Record) -> None:
        """info: folder, model, parameters, samples, tasks, device, updates (the most there can be), target
        (token accuracy or None), ends_by_rule (a policy may end the run before `updates`)."""
        self._given = self._info = dict(info)
        if not self._shown:
            return
        facts = [str(info[key]) for key in ("model", "device") if info.get(key)]
        for key, word in (
            ("parameters", "parameters"),
            ("samples", "samples"),
            ("updates", "updates at most"),
        ):
            if info.get(key):
                facts.insert(
                    -1 if key == "parameters" and len(facts) > 1 else len(facts), f"{count(info[key])} {word}"
                )
        if info.get("target") is not None:
            facts.append(f"stops at {percent(info['target'])} token accuracy")
        self._print(" · ".join(facts), "dim")
        if info.get("folder"):
            self._print(f"→ {info['folder']}", "dim")
        if self._terminal:
            self._open_screen()

    def update(self, record: Record) -> None:
        """A record of kind `update`. Cheap: the screen is redrawn a few times a second whatever the pace."""
        if not self._shown:
            return
        self._pace.see(record.get("update"), time.monotonic())
        self._record = record
        if self._screen is not None:
            self._redraw()
        elif time.monotonic() - self._last_line >= self._every_seconds:
            self._last_line = time.monotonic()
            self._print("  ".join(self._fields(record).values()), "")

    def epoch(self, record: Record) -> None:
        """A record of kind `epoch`: a line that stays."""
        if not self._shown:
            return
        parts = [
            f"epoch {_whole(record.get('epoch')):>4}",
            f"loss {number(record.get('loss'), 4)}",
            f"token accuracy {percent(record.get('token_accuracy'), 2)}",
        ]
        parts += _known(record, speed=False)
        if record.get("seconds") is not None:
            parts.append(duration(record["seconds"]))
        self._print("  ".join(parts), "bold")

    def evaluation(self, record: Record) -> None:
        """A record of kind `evaluation`: a line that stays."""
        if not self._shown:
            return
        if "moment" in record:
            metric = str((self._standing or {}).get("metric", "exact_match"))
            width = self._console.width if self._screen is not None else None
            self._print(live_mixture.evaluation_line(record, metric, width), "cyan")
            return
        parts = [f"  {record.get('name', 'validation')}", f"loss {number(record.get('loss'), 4)}"]
        parts.append(f"token accuracy {percent(record.get('token_accuracy'), 2)}")
        if record.get("exact_match") is not None:
            parts.append(f"exact match {percent(record['exact_match'])}")
        self._print("  ".join(parts), "cyan")
        self._tasks(record)

    def mixture(self, standing: Record) -> None:
        """How the tasks stand: bars above the line; without a terminal, lines when a stage begins."""
        if not self._shown:
            return
        moved = self._standing is not None and self._standing["stage"] != standing["stage"]
        self._standing = standing
        if self._screen is not None:
            self._redraw()
        elif moved and not self._terminal:
            for line in live_mixture.lines(standing):
                self._print(line, "")

    def ends_at(self, update: int | None) -> None:
        """The decay has begun: the last update is known, the bar runs to it, the time left is no bound. None:
        not begun."""
        known = {"updates": update, "target": None, "ends_by_rule": False}
        self._info = self._given | known if update is not None else self._given

    def note(self, text: str) -> None:
        """A sentence that stays: a decision, a warning, something dropped and counted."""
        if self._shown:
            self._print(text, "")

    def end(self, result: Any) -> None:
        """result: report.result.RunResult, or a dict of its fields."""
        self.close()
        if not self._shown:
            return
        value = (
            result.get
            if isinstance(result, Mapping)
            else lambda name, default=None: getattr(result, name, default)
        )
        if self._standing is not None:
            for line in live_mixture.ending(self._standing, value("more", None) or {}):
                self._print(line, "")
        good = bool(value("success", True))
        self._print(
            f"{'✓' if good else '✗'} {value('reason', 'ended')}", "bold green" if good else "bold red"
        )
        facts = [
            f"{count(value('updates'))} updates",
            f"{number(value('epochs'))} epochs",
            duration(value("seconds")),
        ]
        if value("token_accuracy") is not None:
            facts.append(f"token accuracy {percent(value('token_accuracy'), 2)} (last epoch)")
        if value("saved_token_accuracy") is not None:
            facts.append(f"{percent(value('saved_token_accuracy'), 2)} (saved model)")
        self._print("  " + " · ".join(facts), "")
        self._print(f"  {value('folder', '')}", "dim")

    def close(self) -> None:
        """Leave the terminal as it was found."""
        screen, self._screen = self._screen, None
        if screen is not None:
            with suppress(Exception):  # a terminal that is gone has nothing to be left as it was
                screen.stop()

    def _open_screen(self) -> None:
        from rich.live import Live as Screen
        from rich.text import Text

        self._screen = Screen(
            Text("preparing …", style="dim"),
            console=self._rich(),
            refresh_per_second=4,
            transient=True,
            redirect_stderr=False,
        )
        self._screen.start()

    def _redraw(self) -> None:
        from rich.console import Group

        width = self._console.width
        line = self._line(self._record, width) if self._record is not None else ""
        self._screen.update(
            line if self._standing is None else Group(live_mixture.bars(self._standing, width), line)
        )

    def _rich(self) -> Any:
        if self._console is None:
            self._console = visible.console(self._stream, terminal=True)
        return self._console

    def _print(self, text: str, style: str) -> None:
        """A line that stays. It may hold names and texts that are not ours: the terminal shows them and does
        not obey them."""
        text = visible.visible(text)
        if self._terminal:
            visible.show(self._rich(), text, style)
        else:
            print(text, file=self._stream, flush=True)

    def _tasks(self, record: Record) -> None:
        tasks = record.get("tasks") or {}
        if len(tasks) < 2:
            return
        names = {name: visible.one_line(name) for name in tasks}
        width = max(map(visible.columns, names.values()))
        for name, task in tasks.items():
            figures = (
                f"loss {number(task.get('loss'), 4):>7}  token accuracy"
                f" {percent(task.get('token_accuracy'), 2):>8}"
            )
            self._print(f"    {visible.padded(names[name], width)}  {figures}", "dim")

    def _fields(self, record: Record) -> dict[str, str]:
        target, total = self._info.get("target"), self._info.get("updates")
        accuracy, update = record.get("token_accuracy"), record.get("update")
        fields = {
            "target": (
                f"{percent(accuracy)} of {percent(target)}"
                if target is not None
                else f"accuracy {percent(accuracy)}"
            ),
            "update": f"update {count(update)}/{count(total)}" if total else f"update {count(update)}",
            "loss": f"loss {number(record.get('loss'))}",
            "grad": f"grad {number(record.get('grad_norm'))}",
            "lr": f"lr {number(record.get('lr'))}",
        }
        if record.get("epoch") is not None:
            fields["epoch"] = (
                f"epoch {number(record['epoch'])}"
                if isinstance(record["epoch"], float)
                else f"epoch {record['epoch']}"
            )
        fields |= dict(zip(("speed", "mfu", "memory", "wait"), _known(record, keep_empty=True), strict=True))
        if record.get("vetoed"):
            # True in the line of one update, spikes among them
            fields["vetoed"] = f"{int(record['vetoed'])} skipped"
        left = self._pace.seconds_for((total or 0) - (update or 0)) if total else None
        if left is not None:
            # A stop rule or a policy may end the run earlier: the budget's end is an upper bound.
            sooner = target is not None or self._info.get("ends_by_rule")
            fields["eta"] = f"ETA {'≤ ' if sooner else ''}{duration(left)}"
        return {name: fields[name] for name in READ if fields.get(name)}

    def _line(self, record: Record, width: int) -> Any:
        from rich.text import Text

        fields = self._fields(record)
        kept: list[str] = []
        bar = min(BAR, width // 7)
        room = width - bar - 1
        for name in ORDER:
            if name in fields and len(fields[name]) + 2 <= room:
                room -= len(fields[name]) + 2
                kept.append(name)
        line = _bar(self._done(record), bar)
        for name in READ:
            if name in kept:
                style = "dim" if name in ("wait", "memory") else ""
                line.append("  ").append(fields[name], style="bold" if name == "target" else style)
        line.no_wrap = True
        assert isinstance(line, Text)
        return line

    def _done(self, record: Record) -> float:
        target, total = self._info.get("target"), self._info.get("updates")
        if target:
            return (record.get("token_accuracy") or 0.0) / target
        return (record.get("update") or 0) / total if total else 0.0


def _whole(epoch: float | None) -> str:
    return MISSING if epoch is None else f"{epoch:.2f}".removesuffix(".00")


class _Pace:
    """Seconds per update, averaged over about the last twenty records, so that the ETA does not jump."""

    def __init__(self) -> None:
        self._last: tuple[int, float] | None = None
        self._per_update: float | None = None

    def see(self, update: int | None, now: float) -> None:
        if update is None:
            return
        if self._last is not None and update > self._last[0]:
            pace = (now - self._last[1]) / (update - self._last[0])
            self._per_update = pace if self._per_update is None else 0.9 * self._per_update + 0.1 * pace
        self._last = (update, now)

    def seconds_for(self, updates: int) -> float | None:
        return None if self._per_update is None else max(updates, 0) * self._per_update


def _known(record: Record, *, speed: bool = True, keep_empty: bool = False) -> list[str]:
    """Speed, MFU, memory and data wait, each only where it is known."""

    def text(name: str, say: Any, pattern: str) -> str:
        return pattern.format(say(record[name])) if record.get(name) is not None else ""

    found = [
        text("tokens_per_second", count, "{} tok/s"),
        text("mfu", lambda value: percent(value, 0), "MFU {}"),
        text("memory_bytes", size, "{}") if speed else "",
        text("data_wait_fraction", percent, "wait {}") if speed else "",
    ]
    return found if keep_empty else [one for one in found if one]


def _bar(done: float, width: int) -> Any:
    from rich.text import Text

    done = min(max(done, 0.0), 1.0) if math.isfinite(done) else 0.0
    halves = int(done * width * 2)
    full, half = divmod(halves, 2)
    bar = Text("━" * full + ("╸" if half else ""), style="green")
    return bar.append("─" * (width - full - half), style="grey50")
