"""The run's folder: locked against a second run, refused when another run's files are in it, settings written first."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

from repsft_fast import distributed
from repsft_fast.config import Config
from repsft_fast.errors import ConfigError, describe
from repsft_fast.runlock import RunLock

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
            (self.folder / SETTINGS).write_text(self.config.to_yaml(), encoding="utf-8")
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
