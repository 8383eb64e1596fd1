"""run.png: loss and token accuracy by epoch, the target, where the decay began and where the run stopped.

Reads only the run's folder (metrics.jsonl, result.json, run.yaml), so it can be drawn again at any time, on
any machine. What of it is damaged is left out, and the picture says so.
"""

import bisect
import math
import os
import stat
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

from repsft_fast.errors import RepsftError, describe
from repsft_fast.files import replace_file
from repsft_fast.report.format import count, duration, percent
from repsft_fast.report.records import Metrics, is_number, read_metrics, result_or_nothing, setting
from repsft_fast.report.result import FILE as RESULT_FILE
from repsft_fast.report.visible import one_line

FILE = "run.png"
TITLE_WIDTH = 105  # letters that fit a line of it
INK, FAINT, GRID = "#1f2328", "#8b949e", "#e6e8eb"
LOSS, ACCURACY, HELD_OUT, DECAY = "#0b6e99", "#1a7f37", "#bc6c25", "#8250df"
DAMAGE = "#b42318"
Record = Mapping[str, Any]
Curve = list[tuple[float, float]]


def draw(folder: Path | str) -> Path:
    """Draws run.png into the run's folder and returns its path. Raises RepsftError when there is nothing to
    draw."""
    folder = Path(folder)
    found = read_metrics(folder)
    records, result = found.records, result_or_nothing(folder / RESULT_FILE)
    updates = [r for r in records if r.get("kind") == "update"]
    epochs = [r for r in records if r.get("kind") == "epoch"]
    if not updates and not epochs:
        raise RepsftError(
            describe(
                str(folder / "metrics.jsonl"), "holds no update", todo="the run ended before its first one"
            )
        )

    with drawing():
        return save(_figure(folder, found, updates, epochs, result), folder)


def _figure(
    folder: Path, found: Metrics, updates: Sequence[Record], epochs: Sequence[Record], result: Record
) -> Any:
    records, figure = found.records, new_figure(10, 4.2)
    left, right = figure.subplots(1, 2)
    x_of = _epoch_axis(updates, epochs)
    held_out = [r for r in records if r.get("kind") == "evaluation"]
    # Noisy updates pale below the epochs' means, so that the trend is what is seen.
    for axes, name, colour in ((left, "loss", LOSS), (right, "token_accuracy", ACCURACY)):
        _style(axes)
        fine, coarse, other = (_curve(part, name, x_of) for part in (updates, epochs, held_out))
        if fine:
            axes.plot(
                *zip(*fine, strict=True), color=colour, linewidth=0.8, alpha=0.35, solid_joinstyle="round"
            )
        if coarse:
            marker = {"marker": "o", "markersize": 3.5} if len(coarse) <= 60 else {}
            axes.plot(
                *zip(*coarse, strict=True), color=colour, linewidth=2.0, label="training, per epoch", **marker
            )
        if other:
            # a single point has no line
            marker = {"marker": "o", "markersize": 3.5} if len(other) <= 60 else {}
            axes.plot(
                *zip(*other, strict=True),
                color=HELD_OUT,
                linewidth=1.5,
                linestyle=(0, (4, 2)),
                label="validation",
                **marker,
            )
    _finish_loss(left)
    target = setting(folder, "stop", "token_accuracy")
    _finish_accuracy(right, float(target) if is_number(target) else None)
    _mark_moments(left, right, records, x_of, result)
    # Last, when it is known what has a label.
    for axes in (left, right):
        if axes.get_legend_handles_labels()[1]:
            place = "lower left" if axes is left else "lower right"  # where no training curve runs
            axes.legend(loc=place, framealpha=1, edgecolor="none", fontsize=9, labelcolor=INK)
    # An error's words may hold anything: a $ in them begins no formula.
    title = "\n".join(one_line(line) for line in _title(result))
    figure.suptitle(title, fontsize=11, color=INK, x=0.01, ha="left", parse_math=False)
    say_damage(figure, found.words)
    return figure


@contextmanager
def drawing() -> Iterator[None]:
    """matplotlib as it comes, whatever the user's matplotlibrc makes of it, and no warning about a letter
    without a picture."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        matplotlib.rcdefaults()
        yield


def new_figure(width: float, height: float) -> Any:
    """By the object interface and not pyplot: no global state, no window, safe beside a caller's own
    figures."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def say_damage(figure: Any, words: str) -> None:
    if words:
        figure.supxlabel(words, fontsize=8, color=DAMAGE, x=0.01, ha="left", parse_math=False)


def save(figure: Any, folder: Path) -> Path:
    """run.png into the run's folder."""
    content = BytesIO()
    figure.savefig(content, format="png", metadata={"Software": "repsft_fast"})
    return write_whole(folder / FILE, content.getvalue())


def write_whole(path: Path, content: bytes) -> Path:
    """Whole or not at all: a killed or failed write leaves the one before it. RepsftError where something
    else has the name."""
    if os.path.lexists(path) and not stat.S_ISREG(os.lstat(path).st_mode):
        raise RepsftError(
            describe(str(path), "is a link or no file", todo="move it away: it is not written over")
        )
    replace_file(path, content, path.name, durable=False)  # drawn again from the record, at any time
    return path


def _epoch_axis(updates: Sequence[Record], epochs: Sequence[Record]) -> Callable[[Record], float | None]:
    """Record → epochs. Records with no epoch of their own (a decay, a note) get it from their update."""
    known = sorted(
        {
            (r["update"], r["epoch"])
            for r in (*updates, *epochs)
            if is_number(r.get("update")) and is_number(r.get("epoch"))
        }
    )
    at = [update for update, _ in known]

    def epoch_of(record: Record) -> float | None:
        if is_number(record.get("epoch")):
            return float(record["epoch"])
        if not known or not is_number(record.get("update")):
            return None
        return float(known[min(bisect.bisect_left(at, record["update"]), len(known) - 1)][1])

    return epoch_of


def _curve(records: Sequence[Record], name: str, epoch_of: Callable[[Record], float | None]) -> Curve:
    points = [(epoch_of(record), record.get(name)) for record in records]
    return [(x, float(y)) for x, y in points if x is not None and is_number(y) and y is not None]


def _style(axes: Any) -> None:
    axes.grid(True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=9, length=0)
    axes.set_xlabel("epoch", color=INK, fontsize=10)
    axes.margins(x=0.02)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(FAINT)


def _finish_loss(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_title("loss", loc="left", fontsize=11, color=INK)
    low, high = axes.dataLim.intervaly
    if low > 0 and high > 20 * low:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(bottom=0)


def _finish_accuracy(axes: Any, target: float | None) -> None:
    from matplotlib.ticker import PercentFormatter

    axes.set_title("token accuracy", loc="left", fontsize=11, color=INK)
    low = axes.dataLim.intervaly[0]
    axes.set_ylim(bottom=max(0.0, math.floor(low * 10 - 0.5) / 10) if math.isfinite(low) else 0.0, top=1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    if target is not None:
        axes.axhline(target, color=FAINT, linewidth=1, linestyle=(0, (2, 2)))
        axes.annotate(
            f"target {percent(target)}", (0.01, target), xycoords=("axes fraction", "data"), xytext=(0, 3),
            textcoords="offset points", fontsize=9, color=INK,
        )  # fmt: skip


def _mark_moments(
    left: Any,
    right: Any,
    records: Sequence[Record],
    epoch_of: Callable[[Record], float | None],
    result: Record,
) -> None:
    """Where the decay began, and where a rule ended the run."""
    # The budget's end needs no line: the curve ends there.
    moments: list[tuple[float, str, str]] = []
    for record in records:
        x = epoch_of(record) if record.get("kind") == "decay" else None
        if x is not None:
            moments.append((x, "decay", DECAY))
    ends = [
        x
        for record in records
        if record.get("kind") in ("update", "epoch") and (x := epoch_of(record)) is not None
    ]
    if ends and result.get("code") in ("token_accuracy", "plateau", "policy"):
        moments.append((max(ends), "stop", ACCURACY))
    for x, word, colour in moments:
        for axes in (left, right):
            axes.axvline(x, color=colour, linewidth=1, alpha=0.8)
        # Words stand above the plot, where no curve runs, on the outer sides of their lines: these are often
        # close.
        side = {"xytext": (-2, 2), "ha": "left"} if word == "stop" else {"xytext": (2, 2), "ha": "right"}
        right.annotate(
            word,
            (x, 1.0),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            fontsize=9,
            color=colour,
            **side,
        )


def _title(result: Record) -> list[str]:
    """One line, or two where all facts are too wide for it."""
    facts = [str(result["reason"])] if result.get("reason") else ["unfinished run"]
    if is_number(result.get("saved_token_accuracy")):
        facts.append(f"saved model {percent(result['saved_token_accuracy'], 2)}")
    if is_number(result.get("updates")):
        facts.append(f"{count(result['updates'])} updates")
    if is_number(result.get("seconds")):
        facts.append(duration(result["seconds"]))
    lines = [" · ".join(facts)]
    if len(lines[0]) > TITLE_WIDTH:
        lines = [facts[0], " · ".join(facts[1:])]
    return [line if len(line) <= TITLE_WIDTH else f"{line[: TITLE_WIDTH - 1]}…" for line in lines if line]
