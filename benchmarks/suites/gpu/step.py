"""Part C: whole updates of Qwen3-0.6B as a user runs them, and where their time goes.

Random weights, fp32 masters, bf16 compute; updates of two rows of 8,192 tokens made of samples of 2,048, half
of each trained. Layers plain, with Liger's kernels, and compiled, each in a process of its own: Liger patches
transformers for a whole process, and what a compiler does to one must not take the others along.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from benchmarks.suites.gpu import launches, processes, training
from benchmarks.suites.gpu.goals import Card, Found, Goal
from benchmarks.suites.gpu.session import Session

MODEL = "Qwen3-0.6B"
ROW_TOKENS, ROWS = 8192, 2
# Seconds on an H100, imports apart: context, NCCL, weights, data and warm-up 10, updates 5, host 2, kernels
# 5; Triton compiles what the first process needs in 10 more; the compiler takes 20 to 40 cold. needs: below
# it a variant is not begun.
NEEDS_S = {"plain": 20, "liger": 15, "compiled": 35}
SHARE_S = {"plain": 45, "liger": 35, "compiled": 75}
IMPORTS_S = 8
PROOFS = ("train step", "head", "row kernel", "attention")


def run(session: Session) -> None:
    (session.out / training.KERNELS).unlink(missing_ok=True)  # of an earlier session in this folder
    toy = session.rehearsal
    points = {
        name: training.point(MODEL, MODEL, name, ROW_TOKENS, toy=toy, rows=ROWS, launches=name == "compiled")
        for name in training.VARIANTS
    }
    with processes.workers(session, ["qwen3"] * len(points)) as made:
        predicted = None
        with session.attempt("peak memory by our own sizing"):  # while they import
            predicted = predicted_bytes(session, points["plain"])
        for (variant, point), process in zip(points.items(), made, strict=True):
            if not blocked(session, variant) and not session.late(
                f"layers {variant}", needs_s(session, variant)
            ):
                if variant == "plain":  # sizing counts the activations of plain layers
                    point = dataclasses.replace(point, predicted_bytes=predicted)
                process.measure(session, point, min(SHARE_S[variant] + IMPORTS_S, session.left_s - 1))
            if not toy:
                process.close()  # its memory is free for the next


def needs_s(session: Session, variant: str) -> float:
    return 1 if session.rehearsal else NEEDS_S[variant]


def blocked(session: Session, variant: str, what: str = "") -> bool:
    """Whether a red check takes these layers out: of any operation of an update, or of compiling."""
    names = (*PROOFS, "compile") if variant == "compiled" else PROOFS
    dtype = "bfloat16" if session.device == "cuda" else "float32"
    return session.blocked(what or f"layers {variant}", *((name, dtype) for name in names))


def predicted_bytes(session: Session, point: training.Point) -> int:
    """Peak memory of a point with plain layers, as `repsft doctor --plan` would say it for this card."""
    from repsft_fast.memory.model_size import RESERVED

    sized = size_of(point)
    size, memory = sized.fp32, memory_bytes(session)
    state = size.held("adamw").state
    # half of the positions are trained
    chunk = size.chunk(point.row_tokens // 2, memory, int(memory * (1 - RESERVED)) - state)
    half = point.row_tokens // 2
    return size.peak(
        "adamw", point.row_tokens, sized.saved, trained=half, rows=point.rows, chunk_bytes=chunk
    ).total


def size_of(point: training.Point) -> Any:
    from repsft_fast.memory.activations import saved_per_token
    from repsft_fast.memory.model_size import ModelSize
    from repsft_fast.models.load import config_of, load_model
    from repsft_fast.sizing.page import Sized

    config = config_of(point.config)
    model = load_model(config, device="meta", compute_dtype="bfloat16", layer_kernels="none")
    return Sized(point.name, {"float32": ModelSize.of(model)}, saved_per_token(config))


def memory_bytes(session: Session) -> int:
    """Of the card; in a rehearsal of the one that predictions were made for."""
    import torch

    return torch.cuda.get_device_properties(0).total_memory if session.device == "cuda" else 80 * 10**9


# What is known and expected -------------------------------------------------------------------------------

# Milliseconds of a row of 8,192 tokens on an H100, counted from operations, bytes and launches before
# anything was measured; on an H200 what moves bytes takes 3.0 / 4.3 of them. Plain elementwise work: 87, less
# 3.5 for grouped keys and values that are no longer expanded. Liger: its norms, rotary embedding and gate
# move about 1.5 GB a layer, at half of the copy rate in rows of 128 (QK norms). Compiled: the sum that was
# predicted for compiled layers (98), less everything else.
H200 = 3.0 / 4.3
PRODUCTS, HEAD, ATTENTION = 38.7, 7.7, 26.0
ELEMENTWISE = {"plain": 83.5, "liger": 26.0, "compiled": 17.3}
# gradients of a row added in fp32: 6 B a parameter of the first row, 10 of the second, at 3.0 TB/s
COPIES = 1.6
OPTIMIZER = 6.8  # of an update: the norm, 4 B a parameter, and AdamW on masters, 30 B
HOST, LAUNCHES = 53.0, 5300  # of a row, plain
# of these updates, storage by storage, on fake tensors; our sizing, from shapes alone, says the same
PEAK_GB = 29.2


def row_ms(variant: str) -> Callable[[Card], float | None]:
    """The whole of a row, two rows an update."""
    moved = ELEMENTWISE[variant] + COPIES + OPTIMIZER / ROWS
    steady = PRODUCTS + HEAD + ATTENTION
    return lambda card: card.of_kind(H100=steady + moved, H200=steady + moved * H200)


def _of(name: str, variant: str, op: str = "update", scale: float = 1.0) -> Callable[[Found], float | None]:
    def read(found: Found) -> float | None:
        value = found.value(op, variant, name, model=MODEL)
        return None if value is None else value * scale

    return read


def _kernels(*kinds: str, rows: int = ROWS) -> Callable[[Found], float | None]:
    """Milliseconds of these classes in an update of plain layers, a row."""

    def read(found: Found) -> float | None:
        record = found.one("kernels of an update", "plain", model=MODEL)
        return None if record is None else sum(float(record[f"{kind}_ms"]) for kind in kinds) / rows

    return read


def _best(name: str) -> Callable[[Found], float | None]:
    def read(found: Found) -> float | None:
        made = [r[name] for r in found.all("update", model=MODEL).values() if r.get(name) is not None]
        return max(made, default=None)

    return read


def _memory(found: Found) -> float | None:
    record = found.one("update", "plain", model=MODEL)
    if record is None or not record.get("predicted_peak_bytes"):
        return None
    return float(record["peak_bytes"]) / float(record["predicted_peak_bytes"])


def _over(variant: str) -> Callable[[Found], float | None]:
    """How many times faster than plain layers."""

    def read(found: Found) -> float | None:
        plain, other = _of("row_ms", "plain")(found), _of("row_ms", variant)(found)
        return None if plain is None or other is None else plain / other

    return read


def _busy(found: Found) -> float | None:
    """Share of an unprofiled update in which the device had something to do."""
    busy, record = (
        found.p50("kernels of an update", "plain", model=MODEL),
        found.one("update", "plain", model=MODEL),
    )
    return None if busy is None or record is None else busy / float(record["p50_ms"])


def _start(found: Found) -> float | None:
    """Building and the first update with compiled layers, imports apart."""
    built, first = _of("build_s", "compiled")(found), _of("first_update_ms", "compiled", scale=1e-3)(found)
    return None if built is None or first is None else built + first


def _moved(amount: float) -> Callable[[Card], float | None]:
    return lambda card: card.of_kind(H100=amount, H200=amount * H200)


def _steady(amount: float) -> Callable[[Card], float | None]:
    return lambda card: card.of_kind(H100=amount, H200=amount)


GOALS = (
    *(
        Goal(f"0.6B, layers {v}: ms a row of 8,192", _of("row_ms", v), predicted=row_ms(v))
        for v in training.VARIANTS
    ),
    Goal(
        "0.6B: plain / Liger's layers", _over("liger"), least=1.3,
        predicted=lambda card: _ratio(card, "liger"),
    ),
    Goal(
        "0.6B: plain / compiled layers", _over("compiled"), least=1.3,
        predicted=lambda card: _ratio(card, "compiled"),
    ),
    Goal(
        "0.6B: MFU of the best", _best("mfu"), least=0.45,
        predicted=lambda card: card.of_kind(H100=0.32, H200=0.35),
    ),
    Goal(
        "0.6B: tokens/s of the best", _best("tokens_per_s"),
        predicted=lambda card: None if (ms := row_ms("compiled")(card)) is None else 1e3 * ROW_TOKENS / ms,
    ),
    Goal("0.6B, plain: peak memory / our sizing's", _memory, most=1.1, least=0.9, predicted=_steady(0.95)),
    Goal("0.6B, plain: peak GB", _of("peak_bytes", "plain", scale=1e-9), predicted=_steady(PEAK_GB)),
    Goal("0.6B, plain: host ms a row", _of("row_ms", "plain", "host of an update"), predicted=_steady(HOST)),
    Goal("0.6B, Liger: host ms a row", _of("row_ms", "liger", "host of an update")),
    Goal(
        "0.6B, plain: kernels a row", _of("kernels", "plain", "kernels of an update", 1 / ROWS),
        predicted=_steady(LAUNCHES),
    ),
    Goal("0.6B, plain: device busy", _busy, predicted=lambda card: 1.0),
    Goal("0.6B, plain: layers' products, ms a row", _kernels("products"), predicted=_steady(PRODUCTS)),
    Goal("0.6B, plain: head, ms a row", _kernels("head"), predicted=_steady(HEAD)),
    Goal("0.6B, plain: attention, ms a row", _kernels("attention"), predicted=_steady(ATTENTION)),
    Goal(
        "0.6B, plain: elementwise, casts, copies, ms a row",
        _kernels("elementwise", "copies", "sharding", "transfers", "other"),
        predicted=_moved(ELEMENTWISE["plain"] + COPIES),
    ),
    Goal(
        "0.6B, plain: norm and AdamW, ms an update", _kernels("optimizer", rows=1),
        predicted=_moved(OPTIMIZER),
    ),
    Goal("0.6B, compiled: s until updates run", _start, most=60, predicted=_steady(40)),
    *launches.goals_of(MODEL, row_ms("compiled"), ROWS),
)  # fmt: skip


def _ratio(card: Card, variant: str) -> float | None:
    plain, other = row_ms("plain")(card), row_ms(variant)(card)
    return None if plain is None or other is None else plain / other
