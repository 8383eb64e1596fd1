"""The run's folder: locked against a second run, refused when another run's files are in it, settings written first.

run.yaml holds the settings as given, and what the run decides where they leave it open, as soon as it is decided.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from repsft_fast import distributed
from repsft_fast.checkpoint.files import replace_file
from repsft_fast.config import Config
from repsft_fast.errors import ConfigError, describe
from repsft_fast.runlock import RunLock
from repsft_fast.training import chunks

if TYPE_CHECKING:
    from repsft_fast.training.parts import Parts

SETTINGS = "run.yaml"
_LEFT_BY_A_RUN = ("metrics.jsonl", "result.json", SETTINGS, "checkpoints")


class RunFolder:
    """Context manager around a whole run. Only the main rank locks and writes; what it is refused, all are."""

    def __init__(self, config: Config, *, resume: bool = False):
        self.config = config
        self.resume = resume
        self.folder = Path(config.run.folder)
        self._lock: RunLock | None = None

    def __enter__(self) -> RunFolder:
        with distributed.together():
            if distributed.place()[0] == 0:
                self._take()
        return self

    def _take(self) -> None:
        self._lock = RunLock(self.folder)
        try:
            self._check_contents()
            write_settings(self.config, chunk_bytes_before(self.config) if self.resume else None)
        except BaseException:
            self._lock.close()
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._lock is not None:
            if error is not None and not self.resume and self._used() == [SETTINGS]:
                (self.folder / SETTINGS).unlink()  # the run never began: the corrected one may have the folder
            self._lock.close()

    def _used(self) -> list[str]:
        return [name for name in _LEFT_BY_A_RUN if (self.folder / name).exists()]

    def _check_contents(self) -> None:
        used = self._used()
        if used and not self.resume:
            raise ConfigError(
                describe(
                    "run.folder",
                    f"holds another run ({', '.join(used)})",
                    expected="a new or empty folder",
                    got=str(self.folder),
                    todo="choose another folder, or continue that run with --resume",
                )
            )
        if self.resume and not used:
            raise ConfigError(
                describe(
                    "--resume", "there is no run to continue", expected=f"a run's files in {self.folder}", todo="drop --resume"
                )
            )


def settle(parts: Parts) -> None:
    """What is decided by now goes into run.yaml. All ranks may call it."""
    chunk_bytes = chunks.decided(parts)
    if parts.world.is_main and chunk_bytes is not None and parts.config.loss.chunk_bytes is None:
        write_settings(parts.config, chunk_bytes)


def write_settings(config: Config, chunk_bytes: int | None) -> None:
    """run.yaml, in which loss.chunk_bytes is the given one where the settings leave it open."""
    if config.loss.chunk_bytes is None:
        config = config.model_copy(update={"loss": config.loss.model_copy(update={"chunk_bytes": chunk_bytes})})
    replace_file(Path(config.run.folder) / SETTINGS, config.to_yaml().encode(), SETTINGS)


def chunk_bytes_before(config: Config) -> int | None:
    """What the folder's run.yaml says of loss.chunk_bytes, None where it is not there, cannot be read or leaves it open."""
    try:
        found = Config.of(Path(config.run.folder) / SETTINGS).loss.chunk_bytes
    except (ConfigError, OSError):
        return None
    return None if found is None else int(found)
