"""Ranks that are gone: what an error means among ranks, and the words in which the others hear of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from repsft_fast.distributed.interfaces import of_the_wire
from repsft_fast.distributed.watch import LostRank
from repsft_fast.distributed.world import World
from repsft_fast.errors import RepsftError, TrainingError, describe

NEWS_S = 5.0  # a message fails; the name of the rank that is gone comes this much later at most


def lost_rank(error: BaseException, world: World) -> TrainingError | None:
    """What an error of this rank means among ranks. It came from a rank that is gone or silent: the error
    that names it, in its own words where it left some. It is this rank's own: None, and the others are told
    at once."""
    if world.size == 1:
        return None
    own = isinstance(error, RepsftError) or not of_the_wire(error)
    if world.watch is None:
        return None if own else error_naming(None, world.rank, first_line(error))
    # the news of who is gone may come a little later than the error
    lost = world.watch.lost if own else world.watch.wait_for_news(NEWS_S)
    if lost is None:
        world.watch.tell(_words(error), error.code if isinstance(error, TrainingError) else None)
    if own:
        world.watch.disarm()  # it may finish what it writes; `lifecycle` makes it hurry
        return None
    world.watch.arm()
    return error_naming(lost, world.rank, first_line(error))


def error_naming(lost: LostRank | None, rank: int, got: str | None = None) -> TrainingError:
    """The error of `rank` when another is lost: in that one's own words and with its code, where it left
    some."""
    if lost is not None and lost.words:
        return TrainingError(str(lost), code=lost.code)
    who = "another rank is gone" if lost is None else str(lost)
    todo = "read the other ranks' output, then go on with --resume"
    return TrainingError(describe(f"rank {rank}", who, got=got, todo=todo))


@contextmanager
def naming_the_lost(world: World) -> Iterator[None]:
    """Messages between ranks inside: where one fails because a rank is gone, the error names it."""
    try:
        yield
    except RuntimeError as error:
        lost = None if isinstance(error, RepsftError) else lost_rank(error, world)
        if lost is None:
            raise
        raise lost from error


def on_rank_death(world: World, callback: Callable[[LostRank], None]) -> None:
    """Called, from another thread, when a lost rank's process has ended: what has not come from it will
    not."""
    if world.watch is not None:
        world.watch.on_rank_death(callback)


def before_exit(world: World, callback: Callable[[LostRank], None]) -> None:
    """Called, from another thread, before a rank that waits for a lost one in vain is ended (`watch`)."""
    if world.watch is not None:
        world.watch.before_exit(callback)


def disarm(world: World) -> None:
    """From here on this rank needs no other, or what it asks of them fails by itself: a later loss does not
    end it."""
    if world.watch is not None and world.watch.lost is None:
        world.watch.disarm()


def first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else ""


def _words(error: BaseException) -> str:
    if isinstance(error, RepsftError):
        return str(error)
    return f"{type(error).__name__}: {first_line(error)}".removesuffix(": ")
