"""Jobs of the fork server for ranks that die: where they die, run out of memory or wait in vain is planted
here."""

from __future__ import annotations

import importlib
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from repsft_fast import distributed
from repsft_fast.distributed import hub, meeting, watch
from repsft_fast.training import build, trainer
from tests.helpers import run_jobs

# The module; the package has the function by its name.
lifecycle = importlib.import_module("repsft_fast.distributed.lifecycle")

PRELOAD = ["tests.helpers.rank_jobs", *run_jobs.PRELOAD]


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def come(
    meeting_s: float = 20.0,
    die_at: str = "",
    die_after_s: float = 0.0,
    forks: bool = False,
    seen: str | None = None,
    gpus: int | None = None,
    stay_s: float = 0.0,
    fails: str = "",
    raises_first: bool = False,
    meets: bool = False,
    news_late_s: float = 0.0,
) -> dict[str, Any]:
    """Join, stay, leave; what the watch knew at the end.

    die_at: `group` (after the meeting, before the group) or `joined`; forks: a child that outlives this
    process is forked before; seen: a file written once somebody has come to rank 0, or this one to it; gpus:
    what torch.cuda says it sees; stay_s: how long it stays; fails: it raises that instead of leaving;
    raises_first: while another error is handled; meets: at a barrier, before it leaves; news_late_s: so long
    after the end of a message comes the news of the rank that ended it.
    """
    meeting.SPEAK_EVERY_S, watch.FORMING_S = 0.5, 2.0
    if gpus is not None:
        torch.cuda.is_available, torch.cuda.device_count = lambda: gpus > 0, lambda: gpus  # type: ignore[assignment]
    if die_at == "group":
        lifecycle._init_group = die
    if seen is not None:
        threading.Thread(target=_tell_when_here, args=(Path(seen),), daemon=True).start()
    if die_after_s:
        threading.Timer(die_after_s, die).start()
    if news_late_s:
        heard = watch.Watch._ready

        def late(self: watch.Watch, connection: Any) -> None:
            time.sleep(news_late_s if self.met.is_set() else 0.0)
            heard(self, connection)

        watch.Watch._ready = late  # type: ignore[method-assign]
    if raises_first:
        try:
            raise KeyError("handled by the caller")
        except KeyError:
            return come(meeting_s, stay_s=stay_s)
    with distributed.lifecycle(meeting_s=meeting_s) as world:
        found = world.watch
        assert found is not None
        if forks and os.fork() == 0:
            time.sleep(20)
            os._exit(0)
        if die_at == "joined":
            die()
        time.sleep(stay_s)
        if meets:
            distributed.barrier(world, "the end")
        if fails:
            raise RuntimeError(fails)
        return {"rank": world.rank, "loss": found.lost and str(found.lost), "facts": len(found.facts)}


def _tell_when_here(path: Path) -> None:
    """Rank 0: somebody has come to it. Another: it has sent its hello."""
    plain = (hub.Hub._came, watch.Member.__init__)

    def came(self: hub.Hub, *more: Any) -> None:
        plain[0](self, *more)
        path.write_text("here")

    def made(self: watch.Member, *more: Any) -> None:
        plain[1](self, *more)
        path.write_text("here")

    hub.Hub._came, watch.Member.__init__ = came, made  # type: ignore[method-assign]


def train(
    settings: dict[str, Any],
    die_in: str = "",
    waits_in: str = "",
    full_in: str = "",
    at_update: int = 3,
    patience_s: float | None = None,
    meeting_s: float = 20.0,
    **more: Any,
) -> dict[str, Any]:
    """A whole run of run_jobs, with what befalls this rank.

    die_in: `load`, `sent` or `checked`: before the model is read, while it is sent, in its first pass.
    waits_in: `load` or `update`, where it waits for 300 s for nothing that would fail, as NCCL does; or
    `end`, for 5 s. full_in: `forward`, `backward` or `step` of an update, where memory runs out. patience_s:
    in the place of END_S.
    """
    lifecycle.MEETING_TIMEOUT_S = meeting_s
    if patience_s is not None:
        watch.END_S = patience_s
    load, shard, plain, finish = build.load_model, build.distributed.shard, trainer.train_step, trainer.finish

    def wait_in_vain() -> None:
        Path(settings["run"]["folder"]).parent.joinpath("waits").touch()
        threading.Event().wait(300)  # holds no lock and looks at nothing

    def planted_load(*arguments: Any, **options: Any) -> Any:
        if die_in == "load":
            die()
        if waits_in == "load":
            wait_in_vain()
        return load(*arguments, **options)

    def planted_shard(*arguments: Any, **options: Any) -> Any:
        with (
            patch("repsft_fast.distributed.sharding.dist.broadcast", die)
            if die_in == "sent"
            else patch.dict({}, {})
        ):
            return shard(*arguments, **options)

    def planted_step(made: Any, update: Any) -> None:
        here = made.progress.updates == at_update
        if here and waits_in == "update":
            wait_in_vain()
        if not (here and full_in):
            plain(made, update)
            return
        loss = made.model.loss

        def failing(row: Any) -> Any:
            if full_in == "forward":
                full()
            value, stats = loss(row)
            if full_in == "backward":
                value.register_hook(full)
            return value, stats

        made.model.loss = failing
        with patch.object(made.optimizer, "step", full) if full_in == "step" else patch.dict({}, {}):
            plain(made, update)

    def planted_finish(run: Any) -> Any:
        if waits_in == "end":
            Path(run.parts.folder).parent.joinpath(f"at the end {run.parts.world.rank}").touch()
            time.sleep(5)
        return finish(run)

    if die_in == "checked":
        build.check_no_leak = die  # type: ignore[assignment]
    build.load_model, build.distributed.shard = planted_load, planted_shard
    trainer.train_step, trainer.finish = planted_step, planted_finish
    return run_jobs.train(settings, **more)


def full(*_: Any, **__: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has …")
