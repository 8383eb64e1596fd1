"""Which rank this process is, as its launcher's environment says; what contradicts itself is refused before
anything waits."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from repsft_fast.errors import ConfigError, describe, spelled

MOST_RANKS = 1 << 16
# Variables of a rank, of the number of ranks and of the rank's place on its node. The first whose number is
# set counts: ranks of mpirun may stand inside a Slurm step that has one task a node, which started them.
_OURS = ("RANK", "WORLD_SIZE", "LOCAL_RANK")  # torchrun's; also what is exported by hand
_LAUNCHERS = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),  # mpirun of Open MPI
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),  # mpiexec of MPICH and Intel MPI
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),  # srun; a batch script is no step
)
VARIABLES = tuple(name for names in (_OURS, *_LAUNCHERS) for name in names)


class LaunchError(ConfigError):
    """What this rank alone knows is wrong with the launch: it says so itself, whatever its number."""

    every_rank = True


@dataclass(frozen=True)
class Place:
    rank: int
    size: int
    local_rank: int | None  # None: nobody said
    names: tuple[str, str, str] = _OURS


def rank_from_environment(environment: Mapping[str, str] = os.environ) -> tuple[int, int, int]:
    """(rank, size, local rank), alone where no launcher speaks. LaunchError where it says too little or
    contradicts itself."""
    found = read(environment)
    return found.rank, found.size, found.local_rank or 0


def read(environment: Mapping[str, str] = os.environ) -> Place:
    """As `place`, and whether the place on the node was said. A variable that is set and empty is not set."""
    said = {name: text.strip() for name, text in environment.items() if text.strip()}
    launched = _of_launcher(said)
    if "WORLD_SIZE" not in said:
        return _checked(launched, said)
    size = _number(said, "WORLD_SIZE", least=1)
    if "RANK" in said:
        return _among(_number(said, "RANK"), size, said, _OURS)
    if launched is not None and launched.size == size:  # scripts for srun often export the size alone
        return launched
    if size == 1:
        return Place(0, 1, _number(said, "LOCAL_RANK") if "LOCAL_RANK" in said else None)
    if launched is not None:
        expected = f"{launched.names[1]} ({launched.size})"
        todo = "unset WORLD_SIZE, or give every process its RANK too"
        raise LaunchError(
            describe("WORLD_SIZE", "contradicts the launcher", expected=expected, got=size, todo=todo)
        )
    todo = "launch with torchrun, srun or mpirun; to train with one process unset WORLD_SIZE"
    raise LaunchError(
        describe("RANK", f"is not set, and WORLD_SIZE is {size}", expected=f"0 to {size - 1}", todo=todo)
    )


def _of_launcher(said: Mapping[str, str]) -> Place | None:
    for names in _LAUNCHERS:
        if names[1] in said:
            size = _number(said, names[1], least=1)
            if size == 1:
                return None
            found = _among(_number(said, names[0]), size, said, names)
            if (
                found.local_rank is None
                and said.get("SLURM_PROCID") == str(found.rank)
                and "SLURM_LOCALID" in said
            ):
                return Place(found.rank, size, _number(said, "SLURM_LOCALID"), names)  # srun's own PMI
            return found
    return None


def _checked(launched: Place | None, said: Mapping[str, str]) -> Place:
    """The launcher's word, where WORLD_SIZE is not set: a RANK must not say something else."""
    if "RANK" not in said:
        return launched or Place(0, 1, None)
    rank = _number(said, "RANK")
    if launched is not None and launched.rank == rank:
        return launched
    if launched is not None:
        expected = f"{launched.names[0]} ({launched.rank})"
        raise LaunchError(
            describe("RANK", "contradicts the launcher", expected=expected, got=rank, todo="unset RANK")
        )
    todo = "launch with torchrun, or export WORLD_SIZE; to train with one process unset RANK"
    raise LaunchError(
        describe("WORLD_SIZE", f"is not set, and RANK is {rank}", expected="the number of ranks", todo=todo)
    )


def _among(rank: int, size: int, said: Mapping[str, str], names: tuple[str, str, str]) -> Place:
    if rank >= size:
        expected = f"0 to {size - 1}, for {names[1]} is {size}"
        todo = (
            f"look at how the processes are started: every one needs its own {names[0]} and all the same"
            f" {names[1]}"
        )
        raise LaunchError(
            describe(names[0], "is not one of the ranks", expected=expected, got=rank, todo=todo)
        )
    return Place(rank, size, _number(said, names[2]) if names[2] in said else None, names)


def _number(said: Mapping[str, str], name: str, *, least: int = 0) -> int:
    text = said.get(name)
    if text is None:
        raise LaunchError(
            describe(
                name, "is not set", expected="the rank of this process", todo="launch with torchrun or srun"
            )
        )
    if not (text.isascii() and text.isdecimal() and len(text) < 12 and least <= int(text) <= MOST_RANKS):
        todo = "look at how the processes are started, or unset it"
        expected = f"a whole number, {least} to {MOST_RANKS}"
        raise LaunchError(describe(name, "cannot be read", expected=expected, got=text, todo=todo))
    return int(text)


def says_alone(environment: Mapping[str, str] = os.environ) -> str | None:
    """What a process that trains alone should know: its allocation holds more tasks than this one. None as a
    rule."""
    tasks = environment.get("SLURM_NTASKS", "")
    if "SLURM_STEP_NUM_TASKS" in environment or not tasks.isdecimal() or int(tasks) < 2:
        return None
    return f"this Slurm job has {tasks} tasks and this process trains alone: srun starts one rank per task"


@functools.cache
def say_once(text: str) -> None:
    say(text)


def say(text: str) -> None:
    """To stderr, from a rank that has no run to note it in. What is quoted of the environment a terminal does
    not obey."""
    print("\n".join(map(spelled, text.split("\n"))), file=sys.stderr, flush=True)


def on_one_host(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the launcher says that all ranks are on this host."""
    size = environment.get("WORLD_SIZE")
    return (size is not None and environment.get("LOCAL_WORLD_SIZE") == size) or environment.get(
        "SLURM_STEP_NUM_NODES"
    ) == "1"
