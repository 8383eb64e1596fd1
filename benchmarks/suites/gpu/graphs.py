"""Part J: updates of one short sample, the papers' protocol, with rows passed as they are and captured as
CUDA graphs.

SmolLM2-135M, one row of 512 tokens an update, layers plain: the host queues thousands of kernels, and the
device waits for them. `captured` asks for `model.cuda_graphs: auto`; its record says what the trial
decided, how long both took in it, and how many rows were replayed.
"""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.suites.gpu import processes, step, training
from benchmarks.suites.gpu.goals import Card, Found, Goal
from benchmarks.suites.gpu.session import Session

MODEL, NAME = "SmolLM2-135M", "SmolLM2-135M, one sample"
ROW_TOKENS = 512
VARIANTS = ("plain", "captured")
UPDATES, WARM = 48, 8
NEEDS_S, SHARE_S = 8, 18


def run(session: Session) -> None:
    toy = session.rehearsal
    # a row of a rehearsal is 1/64 as long
    more = {} if toy else {"updates": UPDATES, "warm": WARM}
    points = [
        training.point(
            NAME, MODEL, variant, ROW_TOKENS, toy=toy, sample_tokens=ROW_TOKENS, rows=1, kernels=False, **more
        )
        for variant in VARIANTS
    ]
    with processes.workers(session, ["llama"] * len(points)) as made:
        for point, process in zip(points, made, strict=True):
            what = f"an update of {NAME}, {point.variant}"
            if not blocked(session, point.variant, what) and not session.late(what, 1 if toy else NEEDS_S):
                process.measure(session, point, min(SHARE_S + step.IMPORTS_S, session.left_s - 1))
            if not toy:
                process.close()  # its memory is free for the next


def blocked(session: Session, variant: str, what: str) -> bool:
    """Whether a red check takes these updates out: of any operation of an update, or of capturing one."""
    names = (*step.PROOFS, "graphs") if variant == "captured" else step.PROOFS
    dtype = "bfloat16" if session.device == "cuda" else "float32"
    return session.blocked(what, *((name, dtype) for name in names))


# What is known and expected -------------------------------------------------------------------------------

# Milliseconds of an update, counted before anything was measured. Plain: 4,200 launches are 48 ms of host,
# and the optimizer's beside them. Captured: the same kernels, at about 2 us each where they are short, are
# 8 ms; products and attention of 512 tokens 1; norm and AdamW 1.9 of bytes. Neither depends on the card
# much.
PLAIN_MS, CAPTURED_MS = 50.0, 11.0


def _update_ms(variant: str) -> Callable[[Found], float | None]:
    return lambda found: found.value("update", variant, "row_ms", model=NAME)


def _ratio(found: Found) -> float | None:
    return found.ratio("update", "plain", "captured", model=NAME)


def _replayed(found: Found) -> float | None:
    return found.value("update", "captured", "replayed", model=NAME)


def _either(value: float) -> Callable[[Card], float | None]:
    return lambda card: card.of_kind(H100=value, H200=value)


GOALS = (
    Goal(f"{NAME}: ms an update, plain", _update_ms("plain"), predicted=_either(PLAIN_MS)),
    Goal(f"{NAME}: ms an update, captured", _update_ms("captured"), predicted=_either(CAPTURED_MS)),
    Goal(f"{NAME}: plain / captured", _ratio, least=1.0, predicted=_either(PLAIN_MS / CAPTURED_MS)),
    Goal(f"{NAME}: rows replayed", _replayed, predicted=_either(UPDATES)),
)
