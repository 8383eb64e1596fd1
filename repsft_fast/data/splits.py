"""Who trains on what: nested subsets by seed, and train / validation / test carved by seed, task by task.

The first n of one seeded permutation: 200 ⊂ 400 ⊂ … for the same samples and seed, which is how the paper's
grid is drawn.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations

from repsft_fast import seeded
from repsft_fast.data.sample import Sample
from repsft_fast.errors import DataError, describe


@dataclass
class Splits:
    train: list[Sample]
    validation: list[Sample] = field(default_factory=list)
    test: list[Sample] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def nested_subset(samples: Sequence[Sample], count: int | None, seed: int) -> list[Sample]:
    """The first `count` samples of a seeded permutation; None = all, in their own order.

    Subsets of one seed are nested. Raises DataError when there are fewer samples than asked for.
    """
    if count is None:
        return list(samples)
    if count < 1:
        raise DataError(describe("data.samples", "is too small", expected="at least 1", got=count))
    if count > len(samples):
        expected = f"at most {len(samples)}"
        raise DataError(
            describe("data.samples", "is more than there is", expected=expected, got=count, todo="lower it")
        )
    return [samples[number] for number in _order(len(samples), seed, "subset")[:count]]


def carve(samples: Sequence[Sample], *, validation: float = 0, test: float = 0, seed: int = 0) -> Splits:
    """Split every task by seed. A size below 1 is a fraction of each task, rounded; from 1 on, samples of
    each task.

    Copies (equal token for token, in whatever task) stay together, so no split holds what another has; where
    they do not fit, a split comes out smaller than asked, with a warning. Test is drawn first, so changing
    the size of validation never moves a test sample. Samples keep their order. Raises DataError when a task
    would have nothing left to train on, or when a size asked for comes out as nothing.
    """
    for name, size in (("validation", validation), ("test", test)):
        if not (0 <= size < 1 or (size >= 1 and size == int(size))):
            raise DataError(
                describe(f"data.{name}", "is not a size", expected="a fraction below 1, or a count", got=size)
            )
    by_task: dict[str, list[int]] = defaultdict(list)
    for number, sample in enumerate(samples):
        by_task[sample.task].append(number)
    wanted = _wanted(by_task, validation, test)
    orders = [
        [members[i] for i in _order(len(members), seed, f"carve {task}")] for task, members in by_task.items()
    ]

    # A sample trained on and validated on would make the validation loss lie.
    copies: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for number, sample in enumerate(samples):
        copies[tuple(sample.ids)].append(number)
    part, warnings = ["train"] * len(samples), []
    for name, sizes_of in wanted.items():
        left = sizes_of.copy()
        for order in orders:
            _hold_out(name, samples, order, copies, left, part)
        warnings += _short(name, sizes_of, left)

    # In the order of the data, not of the draw: the plan has a permutation of its own.
    trains, validates, tests = (
        [s for s, at in zip(samples, part) if at == name] for name in ("train", "validation", "test")
    )
    return Splits(trains, validates, tests, warnings)


def _wanted(by_task: dict[str, list[int]], validation: float, test: float) -> dict[str, Counter[str]]:
    """{split: {task: samples}}, test first. Sizes are of each task: a small one would else be held out whole,
    or not at all."""
    wanted = {"test": Counter[str](), "validation": Counter[str]()}
    for task, members in by_task.items():
        sizes = [_size(size, len(members)) for size in (test, validation)]
        if sum(sizes) >= len(members):
            wrong = "leaves nothing to train on"
            got = f"{sizes[1]} validation + {sizes[0]} test of {len(members)}"
            raise DataError(
                describe(f"task {task!r}", wrong, got=got, todo="lower data.validation or data.test")
            )
        for name, asked, size in (("test", test, sizes[0]), ("validation", validation, sizes[1])):
            if asked and not size:
                got = f"{asked} of {len(members)} samples"
                raise DataError(
                    describe(f"task {task!r}, {name}", "would be empty", got=got, todo=f"raise data.{name}")
                )
            wanted[name][task] = size
    return wanted


def _short(name: str, sizes_of: Counter[str], left: Counter[str]) -> list[str]:
    """A warning for each task of which the split has fewer samples than wanted; DataError where it has
    none."""
    warnings = []
    for task, short in left.items():
        if short and short == sizes_of[task]:
            todo = "remove copies, or give the split a source of its own"
            raise DataError(
                describe(f"task {task!r}, {name}", "would be empty: its samples are copies", todo=todo)
            )
        if short:
            got = f"{sizes_of[task] - short} {name} samples where {sizes_of[task]} were asked for"
            warnings.append(f"task {task!r}: {got}, because copies of a sample stay together")
    return warnings


def _hold_out(
    name: str,
    samples: Sequence[Sample],
    order: Sequence[int],
    copies: dict[tuple[int, ...], list[int]],
    left: Counter[str],
    part: list[str],
) -> None:
    """Move samples of one task, in this order, from train into the split, each with its copies, while `left`
    has room."""
    for number in order:
        if not left[samples[number].task]:
            return
        # All of its copies or none: one left behind would be trained on.
        same = copies[tuple(samples[number].ids)]
        needed = Counter(samples[i].task for i in same)
        if part[number] == "train" and all(count <= left[task] for task, count in needed.items()):
            left.subtract(needed)
            for i in same:
                part[i] = name


def overlap(reference: Sequence[Sample], other: Sequence[Sample]) -> int:
    """How many samples of `other` are, token for token, also in `reference`."""
    known = {tuple(sample.ids) for sample in reference}
    return sum(tuple(sample.ids) in known for sample in other)


def overlap_warnings(
    train: Sequence[Sample], validation: Sequence[Sample], test: Sequence[Sample]
) -> list[str]:
    """One warning, with the count, per pair of splits that share samples."""
    warnings = []
    splits = {"train": train, "validation": validation, "test": test}
    for name, other in combinations(splits, 2):
        if count := overlap(splits[name], splits[other]):
            warnings.append(
                f"{count} of {len(splits[other])} {other} samples are also in {name}, token for token"
            )
    return warnings


def _size(size: float, members: int) -> int:
    return int(size) if size >= 1 else round(size * members)


def _order(count: int, seed: int, purpose: str) -> list[int]:
    return seeded.permutation(seeded.key_of_text(f"{seed} {purpose}"), count).tolist()
