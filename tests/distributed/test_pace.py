"""Memory that runs out on one of two ranks in a forward pass: both hear of it at the pass's end, and the model
is as it was."""

from contextlib import ExitStack
from unittest.mock import patch

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from repsft_fast.config import Config
from repsft_fast.distributed import Pace, keep_gathered
from repsft_fast.stats import PositionStats
from repsft_fast.training import step
from repsft_fast.training.build import build
from repsft_fast.training.snapshots import closed_list
from tests.helpers import ranks, runs

FSDP = "torch.distributed.fsdp._fully_shard._fsdp_param_group"
MODEL = {**runs.MODEL, "num_hidden_layers": 3, "tie_word_embeddings": False}
PLACES = ("row", "embedding", "gather 0", "gather 1", "copy 1", "layer 0", "layer 2", "norm", "sums")


def full(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


class Failing:
    """Memory runs out here, once, in the `row`-th row of a pass (from 1)."""

    def __init__(self, parts, place, row):
        self.parts, self.rows, self.row, self.times = parts, 0, row, 0
        self.what, _, self.number = place.partition(" ")
        layers = parts.model.model.layers
        self.layer = layers[int(self.number or 0)]
        self.modules = {"embedding": parts.model.model.embed_tokens, "norm": parts.model.model.norm,
                        "layer": self.layer.mlp}  # fmt: skip

    def __call__(self, *_):
        if self.rows == self.row and not self.times:
            self.times += 1
            full()

    def before(self, called, only=lambda *_: True):
        def failing(*given, **named):
            if only(*given):
                self()
            return called(*given, **named)

        return failing

    def __enter__(self):
        self.plants = ExitStack()
        store, group = self.parts.data.train, self.layer._get_fsdp_state()._fsdp_param_group
        row = type(store).row

        def counted(*given, **named):
            self.rows += 1
            if self.what == "row":
                self()
            return row(*given, **named)

        self.plants.enter_context(patch.object(type(store), "row", counted))
        if self.what in self.modules:
            hook = self.modules[self.what].register_forward_hook(self)
            self.plants.callback(hook.remove)
        for what, function in (("gather", "foreach_all_gather"), ("copy", "foreach_all_gather_copy_out")):
            if self.what == what:
                called = getattr(__import__(FSDP, fromlist=["x"]), function)
                its = lambda *given: any(one is group.fsdp_params for one in given)  # noqa: E731
                self.plants.enter_context(patch(f"{FSDP}.{function}", self.before(called, its)))
        if self.what == "sums":
            self.plants.enter_context(
                patch.object(PositionStats, "sum_by", self.before(PositionStats.sum_by))
            )

    def __exit__(self, *error):
        self.plants.close()


def passes(world, given, places, stay):
    """(what was raised of each place, whether passes and an update after all of them are as without)."""
    parts, other = (build(Config.of(given), world=world) for _ in range(2))
    keep_gathered(parts.model, stay)
    scorer = parts.scorer(parts.data.train)
    assert len(scorer.planned) == 3
    expected, found, same = scorer(parts.model).stats.table, [], []
    for place, row in places:
        failing = Failing(parts, place, row)
        with failing if world.rank == 1 else ExitStack():
            try:
                scorer(parts.model)
            except torch.OutOfMemoryError as error:
                found.append((failing.times, str(error)))
        same.append(torch.equal(scorer(parts.model).stats.table, expected))
    for one in (parts, other):
        step.train_step(one, next(iter(one.plan.epoch(0, 0))))
    same.append(closed_list(parts).hash() == closed_list(other).hash())
    return found, same


@pytest.mark.parametrize("stay", [False, True], ids=["dropped", "gathered stay"])
def test_both_ranks_meet_wherever_it_is(stay, tmp_path):
    given = runs.settings(tmp_path, model__config=MODEL, distributed__keep_gathered=stay)
    places = [*((place, 2) for place in PLACES), ("row", 1), ("layer 2", 1), ("gather 0", 3), ("norm", 3)]
    (left, same), (right, same_too) = ranks.run_ranks(passes, given, places, stay, timeout_s=120)
    assert left == [(0, "memory ran out on 1 of 2 ranks")] * len(places)
    assert right == [(1, "CUDA out of memory. Tried to allocate 2.00 GiB")] * len(places)
    assert all(same + same_too)


def gathered_at_once(world, given):
    """Most layers whose parameters are whole at a time, where none of a row's gathers was made."""
    model, most = build(Config.of(given), world=world).model, 0
    reshard = FSDPModule.reshard

    def counted(module):
        nonlocal most
        groups = [layer._get_fsdp_state()._fsdp_param_group for layer in model.model.layers]
        most = max(most, sum(group.is_unsharded for group in groups))
        reshard(module)

    with patch.object(FSDPModule, "reshard", counted), Pace(model) as pace:
        pace.begin_row()
        pace.finish_row()
    return most


def test_one_layer_at_a_time(tmp_path):
    given = runs.settings(tmp_path, model__config=MODEL)
    assert ranks.run_ranks(gathered_at_once, given) == [1, 1]


def test_nothing_is_done_to_a_model_of_one_rank():
    model = torch.nn.Linear(2, 2)
    with Pace(model) as pace:
        pace.begin_row()
        pace.finish_row()
        assert not model._forward_pre_hooks
