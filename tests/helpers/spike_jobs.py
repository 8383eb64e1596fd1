"""A run with planted loss spikes: finite, at chosen updates, on this rank alone; and what the run decided
about them."""

from __future__ import annotations

from typing import Any

from repsft_fast.state import state_hash
from repsft_fast.training import trainer
from repsft_fast.training.snapshots import closed_list


def planted(
    settings: dict[str, Any],
    spikes: dict[int, float] | None = None,
    resume: bool = False,
    end_after: int | None = None,
    stay: bool = False,
) -> dict[str, Any]:
    """Train. spikes: updates made (of all branches) → factor of the next one's loss on this rank; stay: keyed
    by the update of the kept branch instead, so that it comes whenever the update is made. end_after: so many
    updates, then RuntimeError.

    Returns the hash of the closed list and of the weights as they were when the loop ended, and the result's
    counts.
    """
    found: dict[str, Any] = {}
    finish, train_step = trainer.finish, trainer.train_step
    factors = {int(key): value for key, value in (spikes or {}).items()}

    def at_the_end(run: Any) -> Any:
        found["hash"] = closed_list(run.parts).hash()
        found["weights"] = state_hash(dict(run.parts.model.named_parameters()), {})
        return finish(run)

    def step(parts: Any, update: Any) -> None:
        done = parts.lasting.all_work.updates
        if done == end_after:
            raise RuntimeError("ended by the test")
        cursor = update.cursor
        key = cursor.epoch * parts.progress.updates_in_epoch + cursor.update if stay else done
        loss, factor = parts.model.loss, factors.get(key, 1.0)
        parts.model.loss = lambda row: [part * factor if n == 0 else part for n, part in enumerate(loss(row))]
        try:
            train_step(parts, update)
        finally:
            parts.model.loss = loss

    trainer.finish, trainer.train_step = at_the_end, step
    try:
        result = trainer.train(settings, resume=resume)
    finally:
        trainer.finish, trainer.train_step = finish, train_step
    assert result is not None
    counts = {name: result.more[name] for name in ("spiked", "vetoed")}
    return {**found, **counts, "updates": result.updates, "made": result.more["work"]["updates"]}
