"""What token accuracy the finished model will have if the decay of the learning rate begins now.

Looks are the model's own accuracy at epochs' ends, on the same training samples each time. The logarithm of
the share that is wrong (1 - accuracy; "loss" below) falls close to a straight line. Two things lie between
now and the decay's end: the epochs that it lasts, at the slope of the last looks, and what the noise of a
full learning rate costs, which a decay gives back; it shows as the looks' wobble around a smooth curve. A
decay averages that noise over its updates, so one of few takes little of it away: n updates n / (n + 3).
The constants are the best for recorded runs (benchmarks/studies/decay_trigger.py); docs/policies.md says how
far they reach.
"""

import math
from collections.abc import Sequence

FROM = 0.70  # accuracy of the training pass from which on the model itself is looked at
LOOKS_FOR_SLOPE, LOOKS_FOR_WOBBLE = 4, 8
PER_WOBBLE = 8.0  # of log(1 - accuracy), for each of a look's standard deviation around the curve
HALF_AVERAGED = 3  # updates of a decay that give back half of it


def predicted(
    looks: Sequence[tuple[int, int]], decay_epochs: float, decay_updates: int
) -> tuple[float, float]:
    """(accuracy of the finished model if the decay, so many epochs and updates long, begins now; the same of
    one that begins half an epoch later, as far as the slope tells).

    looks: (correct, total) of the model itself at the last epochs' ends, oldest first, at least one.
    """
    losses = [_log_loss(correct, total) for correct, total in looks]
    slope, here = _line(losses[-LOOKS_FOR_SLOPE:])
    averaged = decay_updates / (decay_updates + HALF_AVERAGED)
    finished = here - slope * decay_epochs - averaged * PER_WOBBLE * _wobble(losses[-LOOKS_FOR_WOBBLE:])
    later = finished - max(slope, 0.0) / 2
    return 1 - math.exp(min(finished, 0.0)), 1 - math.exp(min(later, 0.0))


def _log_loss(correct: int, total: int) -> float:
    """Natural logarithm of the share that is wrong; with nothing wrong, as if half a token were."""
    return math.log(max(total - correct, 0.5) / total)


def _line(losses: Sequence[float]) -> tuple[float, float]:
    """(what an epoch takes off, the loss at the last look) of the straight line through them."""
    middle = (len(losses) - 1) / 2
    spread = math.fsum((k - middle) ** 2 for k in range(len(losses)))
    slope = -math.fsum((k - middle) * loss for k, loss in enumerate(losses)) / spread if spread else 0.0
    return slope, math.fsum(losses) / len(losses) - slope * middle


def _wobble(losses: Sequence[float]) -> float:
    """Standard deviation of one look around a smooth curve, from second differences; 0 with two looks."""
    seconds = [a - 2 * b + c for a, b, c in zip(losses, losses[1:], losses[2:], strict=False)]
    return math.sqrt(math.fsum(d * d for d in seconds) / (6 * len(seconds))) if seconds else 0.0
