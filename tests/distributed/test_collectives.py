"""What ranks tell each other: sums, largest and smallest, what the main rank has found, that they are alike."""

import time

import pytest
import torch

from repsft_fast import distributed
from repsft_fast.distributed import World
from repsft_fast.errors import ConfigError, TrainingError
from tests.helpers import ranks

ALONE = World(0, 1, 0, torch.device("cpu"))
# what rank 0 says, and what every rank gets
TOLD = [
    (None, None),
    (True, True),
    ((1, "ü"), [1, "ü"]),
    ({1: [0.1, -0.0, 1e-320]}, {"1": [0.1, -0.0, 1e-320]}),
    (2**200, 2**200),
    ("", ""),
    ("x" * 100_000, "x" * 100_000),
]


class TestAlone:
    def test_everything_is_itself(self):
        table = torch.tensor([2**62, -1])
        assert distributed.all_sum(table) is table
        assert distributed.max_over_hosts(ALONE, 3, 0) == distributed.min_over_hosts(ALONE, 3, 0) == (3, 0)
        distributed.same_everywhere(ALONE, "config", "x")
        distributed.barrier(ALONE, "start")

    @pytest.mark.parametrize(("value", "comes_back"), TOLD)
    def test_a_value_of_the_main_rank_comes_back_as_ranks_would_get_it(self, value, comes_back):
        assert repr(distributed.broadcast_from_main(ALONE, value)) == repr(comes_back)
        assert repr(distributed.gather_everywhere(ALONE, value)) == repr([comes_back])


def messages(world):
    table = distributed.all_sum(torch.tensor([2**53 + 1, world.rank]))
    vetoes = distributed.all_max(torch.tensor([float(world.rank == 1), 0.0]))
    largest = distributed.max_over_hosts(world, world.rank, 5 - world.rank, 2**62)
    smallest = distributed.min_over_hosts(world, world.rank, 5 - world.rank, 2**62)
    distributed.same_everywhere(world, "data", "equal")
    distributed.barrier(world, "the end")
    return table.tolist(), vetoes.tolist(), largest, smallest


def told_by_main(world):
    """Every value twice: with others of the other ranks, and with what JSON cannot say on them."""
    found = [distributed.broadcast_from_main(world, value if world.is_main else "other") for value, _ in TOLD]
    return found, [distributed.broadcast_from_main(world, 7 if world.is_main else object())]


def everyones(world):
    """Of every length: shorter than the other's, longer, and none."""
    return [
        distributed.gather_everywhere(world, values[world.rank])
        for values in ((1, [0.1, "ü"]), ("x" * 70_000, ""), ({}, {"a": None}))
    ]


def main_goes_on(world):
    """Seconds that rank 0 waits for the last to have the value. Of eight, it gets it through two others."""
    if world.rank == 7:
        time.sleep(1)
    began = time.monotonic()
    distributed.broadcast_from_main(world, "value")
    return time.monotonic() - began


def disagree(world):
    try:
        distributed.same_everywhere(world, "config", f"lr of rank {world.rank}")
    except ConfigError as error:
        return str(error)


def one_is_late(world):
    if world.rank == 1:
        time.sleep(3)
        return "late"
    start = time.monotonic()
    try:
        distributed.barrier(world, "saving", timeout_s=1)
    except TrainingError as error:
        return str(error), time.monotonic() - start


class TestTwoRanks:
    def test_sums_are_exact_and_decisions_are_shared(self):
        expected = [2**54 + 2, 1], [1.0, 0.0], (1, 5, 2**62), (0, 4, 2**62)
        assert ranks.run_ranks(messages) == [expected, expected]

    def test_a_value_of_the_main_rank_is_everywhere(self):
        found, number = [value for _, value in TOLD], [7]
        assert repr(ranks.run_ranks(told_by_main)) == repr([(found, number)] * 2)

    def test_everyones_value_is_everywhere_by_rank(self):
        found = [[1, [0.1, "ü"]], ["x" * 70_000, ""], [{}, {"a": None}]]
        assert ranks.run_ranks(everyones) == [found, found]

    def test_different_configurations_are_refused_on_every_rank(self):
        for text in ranks.run_ranks(disagree):
            assert text.startswith("config: ranks 1 differ from rank 0")

    def test_a_late_rank_is_an_error_in_bounded_time(self):
        (text, seconds), _ = ranks.run_ranks(one_is_late)
        assert text.startswith("saving: not every rank arrived within 1 s")
        assert seconds < 2.5


def test_the_main_rank_goes_on_once_all_have_it():
    waited, *_ = ranks.run_ranks(main_goes_on, size=8)
    assert waited > 0.8
