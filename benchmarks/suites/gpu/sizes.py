"""Part D: the same updates for a smaller and a larger model than part C's, with the layers that were fastest
there.

SmolLM2-135M (in rows of 8,192 and of 4,096, where the host is said to be the limit) and Qwen3-1.7B. Where C
has no records in this folder, plain layers; where C's fastest need a compiler and time is short, the next
ones, and the table says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.suites.gpu import processes, step, training
from benchmarks.suites.gpu.goals import Card, Found, Goal
from benchmarks.suites.gpu.session import RECORDS, Session, read_lines

SMALL, LARGE, SHORT = "SmolLM2-135M", "Qwen3-1.7B", "SmolLM2-135M, rows of 4,096"
# Name, model, tokens of a row, seconds it takes beyond C's point until its times are on disk, and after that.
POINTS = (
    (SMALL, "SmolLM2-135M", 8192, 0, 5),
    (LARGE, "Qwen3-1.7B", 8192, 6, 6),
    (SHORT, "SmolLM2-135M", 4096, 0, 2),
)
# until its times are on disk, where C has not measured it
COST_S = {"plain": 14.0, "liger": 14.0, "compiled": 50.0}
SHARE = 2.0  # of that: when a point is ended


@dataclass(frozen=True)
class Way:
    variant: str
    cost_s: float


def run(session: Session) -> None:
    ways = ways_of(session)
    with processes.workers(session, ["llama", "qwen3", "llama"]) as made:
        for place, ((name, model, row_tokens, more_s, after_s), process) in enumerate(
            zip(POINTS, made, strict=True)
        ):
            later_s = (
                0
                if session.rehearsal
                else sum(cheapest(ways).cost_s + m + a for _, _, _, m, a in POINTS[place + 1 :])
            )
            way = chosen(session, ways, name, more_s, later_s)
            if way is None:
                continue
            with session.attempt(f"an update of {name}"):
                point = training.point(
                    name,
                    model,
                    way.variant,
                    row_tokens,
                    toy=session.rehearsal,
                    rows=step.ROWS,
                    kernels=name != SHORT,
                )
                if not fits(session, point):
                    continue
                # Figures after the times (host, kernels) may take what is left; the times are not waited for
                # so long.
                limit = session.left_s - later_s - 1
                if not session.rehearsal:
                    limit = min(
                        max(limit, way.cost_s), SHARE * (way.cost_s + more_s) + step.IMPORTS_S + after_s
                    )
                process.measure(session, point, min(limit, session.left_s - 1))
            if not session.rehearsal:
                process.close()  # its memory is free for the next


def ways_of(session: Session) -> list[Way]:
    """Layers by part C's times on this device, fastest first; plain ones where it has none. Cost as measured
    there."""
    here = {"part": "C", "device": session.environment["device"], "rehearsal": session.rehearsal}
    same = [
        r for r in read_lines(session.out / RECORDS) if all(r[name] == value for name, value in here.items())
    ]
    made = Found(same).all("update", model=step.MODEL)
    order = sorted(
        (variant for variant in training.VARIANTS if variant in made), key=lambda v: float(made[v]["row_ms"])
    )
    ways = [Way(variant, float(made[variant]["until_s"])) for variant in order]
    return ways or [Way("plain", COST_S["plain"])]


def cheapest(ways: list[Way]) -> Way:
    return min(ways, key=lambda way: way.cost_s)


def chosen(session: Session, ways: list[Way], name: str, more_s: float, later_s: float) -> Way | None:
    """The fastest layers that are not red and leave time for the points to come; else the cheapest, if these
    fit."""
    free = [way for way in ways if not step.blocked(session, way.variant, f"{name}, layers {way.variant}")]
    if not free:
        return None
    for way in free:
        if way.cost_s + more_s <= session.left_s - later_s:
            return way
        why = f"about {way.cost_s + more_s:.0f} s, {max(0.0, session.left_s - later_s):.0f} s are left"
        session.leave_out(f"{name}, layers {way.variant}", f"they take {why} beside the other points")
    last = cheapest(free)
    return None if session.late(f"an update of {name}", last.cost_s + more_s) else last


def fits(session: Session, point: training.Point) -> bool:
    """Whether our own sizing says that the row fits this card with fp32 masters and AdamW; else it is named
    as left out."""
    sized = step.size_of(point)
    memory = step.memory_bytes(session)
    longest = sized.fp32.longest_row(memory, "adamw", 1, sized.saved)
    if longest >= point.row_tokens:
        return True
    state = sized.fp32.held("adamw").state / 1e9
    why = (
        f"its rows of {point.row_tokens:,} do not fit {memory / 1e9:.0f} GB: fp32 AdamW holds {state:.0f} GB;"
        f" {longest:,} would"
    )
    session.leave_out(f"an update of {point.name}", why)
    return False


# What is known and expected -------------------------------------------------------------------------------

# Milliseconds of a row on an H100 and an H200, two rows an update, counted before anything was measured:
# layers compiled, FSDP2's copies once an update. The small model is bound by the host: 48 ms a row of any
# length, less with fewer launches.
ROW_MS = {SMALL: (40.0, 40.0), LARGE: (202.0, 187.0), SHORT: (40.0, 40.0)}
MFU = {SMALL: (0.20, 0.20), LARGE: (0.41, 0.44), SHORT: (0.10, 0.10)}
HOST_MS = 48.0
# of the larger model's updates with plain layers, storage by storage, on fake tensors; Liger's keep less
PEAK_GB = 59.5


def _fastest(name: str, what: str, op: str = "update") -> Callable[[Found], float | None]:
    """A field of the fastest layers that were measured of this point."""

    def read(found: Found) -> float | None:
        made = found.all("update", model=name)
        if not made:
            return None
        return found.value(
            op, min(made, key=lambda variant: float(made[variant]["row_ms"])), what, model=name
        )

    return read


def _of(pair: tuple[float, float]) -> Callable[[Card], float | None]:
    return lambda card: card.of_kind(H100=pair[0], H200=pair[1])


def _busy(name: str) -> Callable[[Found], float | None]:
    def read(found: Found) -> float | None:
        whole, busy = _fastest(name, "p50_ms")(found), _fastest(name, "p50_ms", "kernels of an update")(found)
        return None if whole is None or busy is None else busy / whole

    return read


def _gigabytes(found: Found) -> float | None:
    peak = _fastest(LARGE, "peak_bytes")(found)
    return None if peak is None else peak / 1e9


GOALS = (
    *(Goal(f"{name}: ms a row", _fastest(name, "row_ms"), predicted=_of(ROW_MS[name])) for name in ROW_MS),
    *(Goal(f"{name}: MFU", _fastest(name, "mfu"), predicted=_of(MFU[name])) for name in MFU),
    *(Goal(f"{name}: tokens/s", _fastest(name, "tokens_per_s")) for name in ROW_MS),
    Goal(
        f"{SMALL}: host ms a row",
        _fastest(SMALL, "row_ms", "host of an update"),
        predicted=_of((HOST_MS, HOST_MS)),
    ),
    Goal(
        f"{SHORT}: host ms a row",
        _fastest(SHORT, "row_ms", "host of an update"),
        predicted=_of((HOST_MS, HOST_MS)),
    ),
    Goal(f"{SMALL}: device busy", _busy(SMALL), predicted=_of((0.8, 0.7))),
    Goal(f"{LARGE}: device busy", _busy(LARGE), predicted=_of((1.0, 1.0))),
    Goal(f"{LARGE}: peak GB", _gigabytes, predicted=_of((PEAK_GB, PEAK_GB))),
)
