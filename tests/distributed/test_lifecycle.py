"""The beginning and end of a launch: which rank this is, whose group it is, what a fork keeps."""

import os

import pytest
import torch

from repsft_fast import distributed
from repsft_fast.distributed import World, shard
from repsft_fast.distributed.lifecycle import _gpu
from repsft_fast.errors import ConfigError
from repsft_fast.models import load_model
from tests.helpers import ranks, tiny

ALONE = World(0, 1, 0, torch.device("cpu"))


class TestPlace:
    def test_alone(self, monkeypatch):
        for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
            monkeypatch.delenv(name, raising=False)
        with distributed.lifecycle("cpu") as world:
            assert world == ALONE
            assert not torch.distributed.is_initialized()

    def test_the_group_of_one_rank_ends_with_the_lifecycle(self, monkeypatch):
        for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
            monkeypatch.delenv(name, raising=False)
        made = []

        def fails():
            with distributed.lifecycle("cpu") as world:
                made.append(shard(load_model(tiny.config("llama")), world, compute_dtype=torch.float64))
                made.append(torch.distributed.is_initialized())
                raise KeyError("an error on its way out")

        with pytest.raises(KeyError, match="an error on its way out"):
            fails()
        assert made == [True, True]
        assert not torch.distributed.is_initialized()

    def test_torchrun_and_srun(self):
        assert distributed.rank_from_environment({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}) == (
            3,
            8,
            1,
        )
        assert distributed.rank_from_environment(
            {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2", "SLURM_LOCALID": "0"}
        ) == (
            2,
            4,
            0,
        )
        assert distributed.rank_from_environment({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) == (
            0,
            1,
            0,
        )
        assert distributed.rank_from_environment({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}) == (0, 1, 0), (
            "a batch script is not a step"
        )

    @pytest.mark.parametrize(
        "place", [{"WORLD_SIZE": "2"}, {"WORLD_SIZE": "2", "RANK": "x"}, {"WORLD_SIZE": "2", "RANK": "2"}]
    )
    def test_half_an_environment(self, place):
        with pytest.raises(ConfigError):
            distributed.rank_from_environment(place)

    def test_no_address(self, monkeypatch):
        for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("MASTER_ADDR", raising=False)
        with (
            pytest.raises(ConfigError, match=r"MASTER_ADDR: is not set.*torchrun"),
            distributed.lifecycle("cpu"),
        ):
            pass

    @pytest.mark.parametrize(("seen", "local_rank", "gpu"), [(8, 3, 3), (1, 0, 0), (1, 3, 0), (2, 2, None)])
    def test_the_gpu_of_a_rank(self, seen, local_rank, gpu, monkeypatch):
        """srun may show every task all GPUs of the node or its own alone."""
        monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
        if gpu is None:
            with pytest.raises(
                ConfigError, match=r"rank 2 of this node has no GPU, expected at most 2 ranks"
            ):
                _gpu(local_rank)
        else:
            assert _gpu(local_rank) == gpu

    def test_a_world_by_itself_is_none_where_the_launcher_has_started_several(self, monkeypatch):
        for name in ("WORLD_SIZE", "RANK", "SLURM_STEP_NUM_TASKS"):
            monkeypatch.delenv(name, raising=False)
        assert distributed.alone("cpu") == ALONE
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", "1")
        with pytest.raises(ConfigError, match=r"^the launcher: has started several ranks, got 2"):
            distributed.alone("cpu")


def one_inside_another(world):
    """(the inner world, whether it is linked, a sum inside it, one after it, whether a lone group was left)."""
    with distributed.lifecycle("cpu") as inner:
        inside = distributed.all_sum(torch.ones(())).item(), distributed.max_over_hosts(inner, inner.rank)
    after = distributed.max_over_hosts(world, world.rank)
    return inner == world, inner.links, inside, after, world.watch is not None


def forks(world):
    """(what the child still has of the links, whether the parent has them and meets the other rank)."""
    receives, sends = os.pipe()
    child = os.fork()
    if child == 0:
        kept = [world.watch, world.control]
        os.write(sends, b"nothing" if kept == [None, None] else b"something")
        os._exit(0)
    os.waitpid(child, 0)
    distributed.barrier(world, "after the fork", timeout_s=10)
    return os.read(receives, 64), world.watch is not None


class TestTwoRanks:
    def test_a_group_that_is_there_is_used_and_left_standing(self):
        assert ranks.run_ranks(one_inside_another) == [(True, None, (2.0, (1,)), (1,), True)] * 2

    def test_a_forked_child_has_no_links_and_its_parent_keeps_them(self):
        assert ranks.run_ranks(forks) == [(b"nothing", True)] * 2
