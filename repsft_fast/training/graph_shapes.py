"""Which rows can be captured: what stands against it, and the few shapes that the plan's rows have.

A function of settings, model and plan alone, so that a resumed run would capture the same. Of the lengths of
rows the most used are captured; rows of another one, and those that come later and fit none (another mixture,
a longer sample), take the plain pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations, islice

import numpy as np
from torch import nn

from repsft_fast.data.plan import PlannedRow
from repsft_fast.models.loss import row_limit
from repsft_fast.row import Row
from repsft_fast.training.capture import allocator_conflict
from repsft_fast.training.graphs import Shapes
from repsft_fast.training.parts import Parts
from repsft_fast.training.static_row import Shape

MOST_LENGTHS = 6  # of rows that are captured; others take the plain pass
SERVED = 0.5  # least share of the rows that these have to be
LEVELS = 3  # capacities for N' a length
STEP = 64  # they are multiples of
LOOKED_AT = 512  # updates of the plan
_BEYOND = 8  # the largest capacity is a part of this larger than any N' seen


def why_not(parts: Parts) -> str | None:
    """Why this run's rows cannot be captured, with the way out; None: nothing is known against it."""
    config, model = parts.config, parts.model
    if parts.world.size > 1:
        return "they are for one rank alone"
    if any(hasattr(p, "to_local") for p in model.parameters()):
        return "FSDP2 holds the weights, which gathers them anew"
    if not model.loss_settings.packed:
        return "a row of one sample is passed without its padding: set batch.pack: true"
    if config.loss.skip_below > 0.0:
        return "how many positions loss.skip_below keeps is another number in every row: set it to 0"
    if (drawn := dropout_of(model)) is not None:
        return f"a replay would have to draw other random numbers every time: set {drawn} to 0"
    if row_limit(model.config) is not None:
        return "how long a packed row may be depends on the row in this architecture"
    return allocator_conflict()


def dropout_of(model: nn.Module) -> str | None:
    """The setting or module that drops at random; None: none is known. What is not seen here is seen in the
    capture, by the random streams."""
    text = model.config.get_text_config()  # type: ignore[operator, union-attr]
    for name, value in sorted(text.to_dict().items()):
        if (
            name.endswith(("dropout", "_pdrop", "dropout_prob", "layerdrop"))
            and isinstance(value, float)
            and value > 0
        ):
            return f"{name} of the model's config.json"
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            return "model.lora.dropout" if "lora_" in name else f"the dropout of {name}"
    return None


def shapes_of(parts: Parts) -> Shapes | str:
    """What to capture for the rows of the run's first epoch; in words, why nothing."""
    index = parts.data.train.index
    found: dict[int, list[int]] = {}
    most, longest = None, None  # the rows with the most samples and with the longest one
    for row in islice(_rows(parts), LOOKED_AT * 64):
        if not len(row.samples):
            continue
        found.setdefault(row.padded_tokens, []).append(int(index.trained[row.samples].sum()))
        most = row if most is None or len(row.samples) >= len(most.samples) else most
        longest = row if longest is None or _longest(parts, row) > _longest(parts, longest) else longest
    if most is None or longest is None:
        return "no row is planned"
    used = sorted(found, key=lambda length: (-len(found[length]), -length))[:MOST_LENGTHS]
    every = sum(map(len, found.values()))
    if sum(len(found[length]) for length in used) < SERVED * every:
        wrong = f"rows have {len(found)} lengths, and the {MOST_LENGTHS} that are captured hold few of them"
        return f"{wrong}: set batch.bucket_tokens to a larger part of batch.row_tokens"
    shapes = [Shape(length, trained) for length in used for trained in capacities(length, found[length])]
    # Of the store's own rows, so that how it pads borders and bounds is known in one place.
    borders, bound = _row(parts, most).cu_seqlens.numel(), _row(parts, longest).max_seqlen
    return Shapes(tuple(sorted(shapes)), borders, bound)


def capacities(length: int, counts: Sequence[int], levels: int = LEVELS) -> tuple[int, ...]:
    """At most `levels` capacities for rows of so many trained positions, ascending: what is padded to them is
    least for these rows, and the last is larger than any of them by an eighth, for rows that are still to
    come."""
    step = max(STEP, -(-length // (STEP * STEP)) * STEP)  # so that few are weighed up
    sizes = [min(length, -(-max(n, 1) // step) * step) for n in counts]
    top = min(length, -(-max(1, max(counts) + max(counts) // _BEYOND) // step) * step)
    some, times = np.unique(sizes, return_counts=True)

    def slots(chosen: tuple[int, ...]) -> int:
        ladder = np.array(chosen)
        return int((ladder[np.searchsorted(ladder, some)] * times).sum())

    lower = [int(size) for size in some if size < top]
    ways = [(*chosen, top) for n in range(levels) for chosen in combinations(lower, n)]
    return min(ways, key=lambda way: (slots(way), len(way)))


def _rows(parts: Parts) -> Iterator[PlannedRow]:
    epoch = parts.plan.epoch(0, 0)
    for number in range(min(len(epoch), LOOKED_AT)):
        yield from epoch.update(number).ranks[parts.world.rank]


def _longest(parts: Parts, row: PlannedRow) -> int:
    return int(parts.data.train.index.lengths[row.samples].max())


def _row(parts: Parts, planned: PlannedRow) -> Row:
    return parts.data.train.row(planned, denominator=1.0, average="token")
