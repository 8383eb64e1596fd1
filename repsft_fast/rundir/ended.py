"""--resume of a run that has ended: say so and with what, extend it, make its model again, or refuse. Never
in silence."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from repsft_fast import distributed
from repsft_fast.config import Config
from repsft_fast.distributed import World
from repsft_fast.errors import ConfigError, RepsftError, describe
from repsft_fast.report import pictures
from repsft_fast.report import result as results
from repsft_fast.report.result import RunResult
from repsft_fast.report.visible import one_line
from repsft_fast.rundir import made
from repsft_fast.rundir.folder import SETTINGS
from repsft_fast.rundir.identity import BUDGET, DECIDED_ONCE, flat, is_free, is_place


@dataclass(frozen=True)
class Ended:
    """A run that ended by rule or budget."""

    result: RunResult
    lacks: str = ""  # what of its model is missing or damaged, in words
    differs: tuple[str, ...] = ()  # settings that are other than the run's, in words
    # some of them say where content lies: only when it is read it is seen whether it is another
    look: bool = False
    budget: bool = False  # the budget is among them

    @property
    def is_done(self) -> bool:
        """Whether there is nothing to build: nothing is missing, and nothing asked for could change
        anything."""
        return not (self.lacks or self.look or self.budget)


def finished_result(config: Config, world: World) -> Ended | None:
    """What a resumed run finds of its end; None when it has not ended. All ranks call it.

    ConfigError when settings are asked for that the run did not have, and that decide what is computed.
    """
    found = None
    with distributed.raise_together(world):
        if world.is_main and (result := _result(Path(config.run.folder))) is not None:
            found = _compared(result, config)
    told = distributed.broadcast_from_main(
        world, None if found is None else [bool(found.lacks), found.look, found.budget]
    )
    if told is None:
        return None
    lacks, look, budget = told
    with distributed.raise_together(world):  # a disk that others share may show it later than the main rank's
        if found is None:
            result = replace(results.read(config.run.folder), folder=config.run.folder)
            found = Ended(result, "a file" if lacks else "", (), look, budget)
    return found


def _result(folder: Path) -> RunResult | None:
    """Of a run that ended by rule or budget; None for a damaged one too: the checkpoint knows better."""
    if not (folder / results.FILE).is_file():
        return None
    try:
        result = results.read(folder)
    except RepsftError:
        return None
    return replace(result, folder=str(folder)) if result.success else None


def _compared(result: RunResult, config: Config) -> Ended:
    folder = Path(config.run.folder)
    lacks = made.whole(folder) or ""
    try:
        before = dict(flat(Config.of(folder / SETTINGS)))
    except (ConfigError, OSError):
        return Ended(result, lacks, (f"{SETTINGS} cannot be read",), look=True)
    now = dict(flat(config))
    if now["batch.row_tokens"] == "auto":  # run.yaml has what its rows hold
        now["data.max_tokens"] = before["data.max_tokens"]
    names = [
        n
        for n in sorted(before.keys() | now.keys())
        if n not in _OPEN and before.get(n) != now.get(n) and not (n in DECIDED_ONCE and now.get(n) == "auto")
    ]
    words = tuple(f"{name}: {_short(now.get(name))} (it had {_short(before.get(name))})" for name in names)
    other = [w for n, w in zip(names, words) if not (is_free(n) or is_place(n) or n.startswith(f"{BUDGET}."))]
    if other:
        todo = "leave them as they were, or start another run in another folder"
        wrong = f"{_ended(result)}, and cannot go on with other settings"
        raise ConfigError(describe(str(folder), wrong, got="; ".join(other), todo=todo))
    look, budget = any(map(is_place, names)), any(n.startswith(f"{BUDGET}.") for n in names)
    return Ended(result, lacks, words, look, budget)


# moved folders are the same run; run.yaml says what was decided
_OPEN = ("run.folder", "loss.chunk_bytes", "batch.row_lengths", "model.cuda_graphs")


def say(ended: Ended, world: World, *, again: bool = False) -> None:
    """On the main rank's terminal: that the run has ended, with what, and what of the request has no
    effect."""
    if not world.is_main:
        return
    lines = [f"--resume: {_ended(ended.result)}. Nothing is trained."]
    if again:
        lines = [
            f"--resume: {_ended(ended.result)}; of its model {ended.lacks}: it is written again, nothing is"
            " trained."
        ]
    if ended.differs:
        lines.append(f"--resume: without effect on a run that has ended: {'; '.join(ended.differs)}")
    with suppress(OSError, ValueError):
        print("\n".join(map(one_line, lines)), flush=True)


def picture(config: Config, world: World) -> None:
    """A run that was killed after its result and before its picture gets the picture now."""
    if world.is_main and not (Path(config.run.folder) / pictures.FILE).exists():
        with suppress(Exception):  # it only reports
            pictures.draw(config.run.folder, mixture=config.mixture.policy is not None)


def _ended(result: RunResult) -> str:
    figures = [f"{result.updates:,} updates", f"{result.epochs:g} epochs"]
    if result.token_accuracy is not None:
        figures.append(f"{100 * result.token_accuracy:.2f} % token accuracy")
    return f"this run has ended ({result.reason}) after {', '.join(figures)}"


def _short(value: Any) -> str:
    text = "null" if value is None else str(value)
    if isinstance(value, Mapping):
        text = str(dict(value))
    return text if len(text) <= 80 else f"{text[:80]}…"
