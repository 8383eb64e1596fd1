"""What token accuracy the finished model will have if the decay of the learning rate begins now.

Looks are the model's own accuracy at epochs' ends, on the same training samples each time. In logarithms of
the share that is wrong (1 - accuracy; "loss" below), learning is close to a straight line. Three things lie
between now and the decay's end: the epochs that it lasts, at the slope of the last looks; what the noise of a
full learning rate costs, which a decay gives back: it shows as the looks' wobble around a smooth curve; and a
little more, whatever the run. The constants are those that ended 6 of 7 recorded runs between 96 and 98 % (benchmarks/studies/decay_trigger.py).
"""

import math
from collections.abc import Sequence

FROM = 0.70  # accuracy of the training pass from which on the model itself is looked at
LOOKS_FOR_SLOPE, LOOKS_FOR_WOBBLE = 4, 8
GIVEN_BACK, PER_WOBBLE = 0.1, 8.0  # in units of log(1 - accuracy)


def predicted(looks: Sequence[tuple[int, int]], decay_epochs: float) -> tuple[float, float]:
    """(accuracy of the finished model if the decay, so many epochs long, begins now; the same of one that
    begins half an epoch later, as far as the slope tells).

    looks: (correct, total) of the model itself at the last epochs' ends, oldest first, at least one.
    """
    losses = [_log_loss(correct, total) for correct, total in looks]
    slope = _slope(losses[-LOOKS_FOR_SLOPE:])
    gained = GIVEN_BACK + slope * decay_epochs + PER_WOBBLE * _wobble(losses[-LOOKS_FOR_WOBBLE:])
    now = losses[-1] - gained
    return 1 - math.exp(min(now, 0.0)), 1 - math.exp(min(now - max(slope, 0.0) / 2, 0.0))


def _log_loss(correct: int, total: int) -> float:
    """Natural logarithm of the share that is wrong; with nothing wrong, as if half a token were."""
    return math.log(max(total - correct, 0.5) / total)


def _slope(losses: Sequence[float]) -> float:
    """What an epoch takes off, by least squares; 0 with one look."""
    middle = (len(losses) - 1) / 2
    spread = math.fsum((k - middle) ** 2 for k in range(len(losses)))
    return -math.fsum((k - middle) * loss for k, loss in enumerate(losses)) / spread if spread else 0.0


def _wobble(losses: Sequence[float]) -> float:
    """Standard deviation of one look around a smooth curve, from second differences; 0 with two looks."""
    seconds = [a - 2 * b + c for a, b, c in zip(losses, losses[1:], losses[2:], strict=False)]
    return math.sqrt(math.fsum(d * d for d in seconds) / (6 * len(seconds))) if seconds else 0.0
