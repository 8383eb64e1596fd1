"""Updates that train nothing, or not all: an error wherever there was something to learn, since nothing else would tell.

A missing gradient looks like a quiet run: the norm is 0.0 or a little small, nothing is vetoed, and the weights stand still.
What the host knows (which gradients are there) is asked in every update; what only the device knows (that all of them are
zero) when the ledger is read.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from repsft_fast.data.plan import Update
from repsft_fast.distributed import unfinished
from repsft_fast.errors import TrainingError, describe
from repsft_fast.metrics import UpdateRecord

if TYPE_CHECKING:
    from repsft_fast.training.parts import Parts
    from repsft_fast.training.reporter import Reporter

RESUME = "--resume goes on from the last checkpoint"
UNREACHED = "if it comes again, the loss does not reach the weights that are trained (model.lora, the model's own code)"

RAN_AWAY = "updates before it had gradients, so the weights have run away: begin in another folder with a lower optim.lr"


def check_arrived(parts: Parts, update: Update) -> None:
    """Called when every row of the update has been passed backward. TrainingError when its gradients have not come.

    Waits for nothing and asks no other rank: FSDP2 gives every rank its part of every gradient, also one with padding alone. An
    update without a weighted position (`denominator` 0) may have none.
    """
    where = f"update {parts.progress.updates + 1}"
    if unfinished(parts.model):
        wrong = "FSDP2 has not ended its backward pass, so some gradients are missing; no weight was changed by it"
        raise TrainingError(describe(where, wrong, todo=RESUME))
    if update.denominator > 0.0 and all(p.grad is None for p in parts.optimizer.names.values()):
        wrong = f"its {len(update.samples)} samples have left no gradient: nothing would be learned, and nothing was changed"
        raise TrainingError(describe(where, wrong, todo=f"{RESUME}; {UNREACHED}"))


class ZeroGradients:
    """Counts updates whose gradients were all exactly zero for a reason, and ends the run at the first without one.

    Reasons: loss.skip_below left out every position; every weight is 0, or every position is learned to the last bit, and then
    the loss is exactly 0 too.
    """

    def __init__(self, skip_below: float, reporter: Reporter):
        self.skip_below, self.reporter = skip_below, reporter
        self.count = 0
        self.had_some = False  # an update of this process had a gradient: the loss does reach the weights

    def look(self, records: Iterable[UpdateRecord]) -> None:
        """What the ledger told, the same on every rank. TrainingError when a norm is 0.0 and something was to be learned."""
        found: dict[str, list[int]] = {}
        for record in records:
            self.had_some = self.had_some or (not record.vetoed and record.grad_norm > 0.0)
            if record.vetoed or record.grad_norm != 0.0 or not int(record.tasks.total.sum()):
                continue
            number = record.update + 1
            if self.skip_below > 0.0 and record.kept == 0.0:
                found.setdefault("every position was below loss.skip_below", []).append(number)
            elif record.loss == 0.0:
                found.setdefault("the loss is exactly 0", []).append(number)
            else:
                wrong = "every gradient was exactly 0 although there was something to learn"
                todo = RAN_AWAY if self.had_some else f"{RESUME}; {UNREACHED}"
                raise TrainingError(describe(f"update {number}", wrong, got=f"a loss of {record.loss:.6g}", todo=todo))
        for reason, updates in found.items():
            if not self.count:
                self.reporter.note(f"update {updates[0]} has no gradient: {reason}; such updates are counted from here on")
            self.count += len(updates)
            self.reporter.event("no_gradient", {"updates": updates, "reason": reason, "so_far": self.count})
