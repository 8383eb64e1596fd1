"""The tables' simulated paths: decided as the policy decides, items counted as they are."""

import numpy as np
import pytest

from benchmarks.studies.rule_paths import MOST_ROWS, NEVER, Cell, Losses, Shares, count_true, leaving
from repsft_fast.policies import History, Msft, MsftSettings, NewStage, RollBack, Score
from tests.helpers.policies_simulation import Curve, curves, simulate

LOOSE = {"alpha": 0.9, "stages": 3}  # so that few rows and looks decide something


def rng(*seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.SFC64(seed))


class Given:
    """A world of given items, [looks, 1, paths, rows]."""

    def __init__(self, items: np.ndarray, correction: float) -> None:
        self.items, self.correction, self.now = items, correction, -1
        self.rows = items.shape[-1]
        self.peak = items[0].copy()

    def look(self):
        self.now += 1
        return self.items[self.now].mean(axis=-1)

    def keep(self, here):
        self.peak[here] = self.items[self.now][here]

    def squares(self):
        return ((self.items[self.now] - self.peak) ** 2).sum(axis=-1)


def by_the_policy(items: np.ndarray, cell: Cell) -> int:
    """The look at which the policy's own code excludes the task with these items, [looks, rows]; every other
    task is one score forever."""
    names = ["a", *(f"b{n}" for n in range(cell.tasks - 1))]
    policy = Msft(
        MsftSettings(
            compute_budget=cell.looks / 4, max_stages=cell.stages, alpha=cell.alpha, patience=cell.patience
        )
    )
    history = History.start([(name, 64) for name in names])
    history.took(NewStage(None, tuple(names)))
    still = Score.of([1.0, 0.0, 1.0])
    for now, row in enumerate(items):
        if now:
            in_stage = (now - 1) % cell.looks + 1
            history.tick(now, in_stage / 4, 0)
        history.evaluated(f"m{now}", {name: still for name in names[1:]} | {"a": Score.of(row.tolist())})
        decision = policy.decide(history, history.active)
        if isinstance(decision, RollBack):
            assert decision.drop == "a"
            return now
        history.took(decision)  # goes on, or opens the next stage
    return NEVER


def histories(kind: str, seed: int, looks: int, paths: int, rows: int) -> np.ndarray:
    """Curves that stay, fall slowly, fall at once, rise and fall; [looks, 1, paths, rows]."""
    draw = np.random.default_rng(seed)
    at, turn = np.arange(looks)[:, None], draw.integers(2, looks, paths)
    level = 0.6 - draw.choice([0.0, 0.03, 0.1], paths) * np.maximum(0, at - turn)
    level = (
        level
        - draw.choice([0.0, 0.5], paths) * (at > turn + 2)
        + draw.choice([0.0, 0.08], paths) * (at - 4).clip(-4, 0)
    )
    level = level + draw.choice([0.0, 0.02], paths) * draw.standard_normal((looks, paths))
    noise = draw.random((looks, paths, rows))
    own = draw.random((paths, rows))
    number = np.where(noise < draw.choice([0.1, 0.5], paths)[:, None], draw.random(noise.shape), own)
    if kind == "nll":
        return (level[..., None] + 0.3 * (number - 0.5))[:, None]
    return (number < level[..., None])[:, None].astype(float)


@pytest.mark.parametrize("kind", ["exact match", "nll"])
def test_paths_leave_when_the_policy_says_so(kind):
    """100 histories under each of four runs, look by look: the first exclusion is at the same one."""
    left, paths = 0, 100
    runs = [(1, 4, 0.1, 2), (3, 12, 0.1, 2), (2, 5, 0.9, 2), (2, 12, 0.1, 1)]
    for seed, (tasks, looks, alpha, patience) in enumerate(runs):
        cell = Cell(tasks, looks, 3, alpha, patience)
        items = histories(kind, seed, cell.last + looks + 1, paths, 40)
        found = leaving(Given(items, 1 / 40 if kind == "exact match" else 0.0), cell.last + looks, [cell])[
            0, 0
        ]
        literal = [by_the_policy(items[:, 0, path], cell) for path in range(paths)]
        assert found.tolist() == literal
        left += int((found < NEVER).sum())
    assert left >= 50, f"{left} of 400 left: little was compared"


def tied(counts: list[int], rows: int, turned: tuple[int, ...] = ()) -> np.ndarray:
    """So many rows right at every look; at the looks named, others than before as far as there are any."""
    items, order = [], np.arange(rows)
    for look, count in enumerate(counts):
        order = order[::-1] if look in turned else order
        items.append(np.isin(np.arange(rows), order[:count]))
    return np.array(items, float)


@pytest.mark.parametrize(
    ("counts", "turned", "leaves"),
    [
        # The last look at the top has other rows right: half of these fall, all of the first's.
        ([32] * 10 + [16] * 4, (9,), 11),
        ([32] * 10 + [16] * 4, (9, 10), NEVER),  # and the other way round
        # Two equal steps down. The first is left out: its neighbours were 0 and the other; or gentle ones.
        ([64] * 8 + [40, 16, 16, 16], (), 9),
        ([64] * 8 + [60, 52, 44, 48, 44, 44], (), NEVER),
    ],
)
def test_ties_are_broken_as_the_policy_breaks_them(counts, turned, leaves):
    """64 rows, so that equal steps of the curve are equal numbers."""
    items, cell = tied(counts, 64, turned), Cell(1, 6, 3)
    assert by_the_policy(items, cell) == leaves
    assert leaving(Given(items[:, None, None], 1 / 64), cell.last, [cell]).tolist() == [[[leaves]]]


def test_cells_together_decide_as_each_alone():
    cells = [Cell(tasks, looks, 3, 0.9) for looks in (4, 12) for tasks in (1, 5)]
    items = histories("exact match", 7, 25, 200, 40)
    together = leaving(Given(items, 1 / 40), 24, cells)
    for number, cell in enumerate(cells):
        assert (together[number] == leaving(Given(items, 1 / 40), 24, [cell])[0]).all()
    assert (together < NEVER).any(axis=(1, 2)).all()


def test_one_of_several_leaves_as_often_as_single_paths_say():
    """Whole runs of two equal tasks through the policy, against 1 − (1 − q)² of single paths.

    Both fall: from noise alone nobody would leave within so few looks."""
    runs, tasks, looks, rows, fall = 300, 2, 8, 30, 0.1
    settings = MsftSettings(compute_budget=looks / 4, max_stages=3, alpha=0.9)
    falling = Curve(base=0.6, top=0.6, peak=0.5, fall=fall)
    hits = 0
    for seed in range(runs):
        run = simulate(Msft(settings), curves({"a": falling, "b": falling}, rows, seed, churn=0.3))
        hits += any(isinstance(decision, RollBack) for decision in run.log)
    line = 0.6 - fall * np.maximum(0.0, np.arange(25) / 4 - 0.5)
    world = Shares(rng(5), 20_000, rows, (0.0,), line, churn=0.3, lasting=False)
    left = leaving(world, 16, [Cell(tasks, looks, 3, 0.9)])
    wanted = 1 - (1 - (left < NEVER).mean()) ** tasks
    assert 0.1 < wanted < 0.9
    assert abs(hits / runs - wanted) < 3 * np.sqrt(wanted * (1 - wanted) / runs), (hits / runs, wanted)


def test_items_are_counted_as_they_are():
    bits = rng(1).random((3, 5, MOST_ROWS)) < 0.9
    assert (count_true(bits) == bits.sum(axis=-1)).all()
    assert (count_true(np.ones((2, MOST_ROWS), bool)) == MOST_ROWS).all()
    with pytest.raises(ValueError, match="at most 2040, got 2041"):
        Shares(rng(1), 1, MOST_ROWS + 1, (0.0,), np.zeros(1))


@pytest.mark.parametrize("world", ["shares", "losses"])
def test_squares_are_those_of_the_items(world):
    """50 rows, no multiple of eight; the peak is kept where it is told."""
    made = Shares(rng(2), 20, 50, (0.0, 0.02), np.linspace(0.9, 0.4, 6)) if world == "shares" else Losses(
        rng(2), 20, 50, (0.0, 0.02), np.linspace(0.3, 0.0, 6), lasting=0.5)  # fmt: skip
    peaks = np.zeros((2, 20, 50))
    for look in range(6):
        values = made.look()
        items = (
            made.right[..., :50].astype(float) if world == "shares" else made.noise + made.shift[..., None]
        )
        assert values == pytest.approx(items.mean(axis=-1), abs=1e-6)
        here = np.full((2, 20), look == 0) | (rng(3, look).random((2, 20)) < 0.2)
        made.keep(here)
        peaks[here] = items[here]
        assert made.squares() == pytest.approx(((items - peaks) ** 2).sum(axis=-1), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("lasting", [True, False])
def test_redrawn_items_last_or_pass(lasting):
    """Of 0/1 items at 0.5, the share that differs from the first look's: (1 − 0.7^lag) / 2 where a redrawn
    item keeps its number, else (1 − 0.7) / 2 at any lag."""
    world = Shares(rng(4), 500, 200, (0.0,), np.full(9, 0.5), churn=0.3, lasting=lasting)
    world.look()
    world.keep(np.ones((1, 500), bool))
    for lag in range(1, 9):
        world.look()
        stays = (1 - 77 / 256) ** (lag if lasting else 1)
        assert world.squares().mean() / 200 == pytest.approx((1 - stays) / 2, abs=0.006)


def test_losses_forget():
    world = Losses(rng(6), 500, 200, (0.0,), np.zeros(9), sigma=0.3, lasting=0.7)
    world.look()
    world.keep(np.ones((1, 500), bool))
    for lag in range(1, 9):
        world.look()
        assert world.squares().mean() / 200 == pytest.approx(2 * 0.09 * (1 - 0.7**lag), rel=0.02)


def test_a_cell_knows_when_somebody_may_leave():
    assert (Cell(1, 4).last, Cell(1, 4).first_stage, Cell(1, 12).first_stage) == (36, 8, 12)
    assert Cell(5, 12).chance == pytest.approx(0.1 / (4 * 5 * 120))
