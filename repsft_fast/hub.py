"""What is a path on this machine and what a name on the Hugging Face hub; one bounded question before a
library asks the hub.

The libraries try a hub that they cannot reach for minutes (several files, each with several tries and longer
and longer pauses), and a slip in a path looks to them like the name of a repository. So a name that looks
like a path is never asked of the hub, and the hub is asked once, within `SECONDS`, whether it is there and
knows the name.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from repsft_fast.errors import did_you_mean

SECONDS = 10.0  # for reaching the hub, in all; a download that makes progress may take its time
FORGET_SECONDS = 60.0  # a hub that could not be reached is not tried again for so long
_NAME = re.compile(
    r"[A-Za-z0-9_](?:[\w.-]*[A-Za-z0-9_])?(?:/[A-Za-z0-9_](?:[\w.-]*[A-Za-z0-9_])?)?", re.ASCII
)
_FILE_SUFFIXES = {
    ".gguf",
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".model",
    ".yaml",
    ".yml",
    ".txt",
    ".json",
    ".jinja",
}
_TRUE = {"1", "ON", "YES", "TRUE"}


class _Answer(NamedTuple):
    """Of the hub: whether it was reached, and why the name cannot be had (None: it can)."""

    reached: bool
    why: str | None


_asked: dict[tuple[str, str], _Answer] = {}
_unreachable: list[tuple[float, str, str]] = []  # (when, endpoint, why) of the last try that failed


def why_local(name: str, suffixes: tuple[str, ...] = ()) -> str | None:
    """Why a name that is no file here is meant as one and never asked of the hub; None when it can be a hub's
    name."""
    path = Path(name)
    if name.startswith((".", "/", "~")) or "\\" in name or re.match(r"[A-Za-z]:", name):
        return "it is written as a path"
    if path.suffix.lower() in {*suffixes, *_FILE_SUFFIXES}:
        return f"it ends in {path.suffix}"
    if name.count("/") > 1 or name.endswith("/"):
        return "hub names are owner/name"
    if not _NAME.fullmatch(name) or len(name) > 96 or "--" in name or ".." in name:
        return "it cannot be a name on the hub"
    if "/" in name and _is_folder(path.parent) and not _cached(name):
        return f"{path.parent}/ is a folder here"
    return None


def near_path(path: Path) -> str | None:
    """What is there and nearly has this name."""
    try:
        near = did_you_mean(path.name, [entry.name for entry in path.parent.iterdir()])
    except (OSError, ValueError):
        return None
    return str(path.parent / near) if near and str(path.parent) != "." else near


def why_not_reached(name: str, kind: str) -> str | None:
    """None when the hub knows the name, else why it cannot be had from there. kind: model | dataset.

    Takes at most SECONDS, and is asked once for each name: what is in the cache can be used in either case.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or _said("HF_HUB_OFFLINE"):
        return "HF_HUB_OFFLINE is set"
    if kind == "dataset" and _said("HF_DATASETS_OFFLINE"):
        return "HF_DATASETS_OFFLINE is set"
    if kind == "model" and _said("TRANSFORMERS_OFFLINE"):
        return "TRANSFORMERS_OFFLINE is set"
    endpoint = constants.ENDPOINT
    for when, where, why in _unreachable:
        if where == endpoint and time.monotonic() - when < FORGET_SECONDS:
            return why
    known = _asked.get((kind, name))
    if known is None or not known.reached:  # a hub that was not reached may be by now
        known = _asked[kind, name] = _ask(name, kind, endpoint)
        if not known.reached and known.why is not None:
            _unreachable[:] = [(time.monotonic(), endpoint, known.why)]
    return known.why


@contextlib.contextmanager
def offline(wanted: bool = True) -> Iterator[None]:
    """What is in the cache, and no tries of a hub that was not reached: the libraries read these flags
    whenever they ask."""
    from huggingface_hub import constants

    places = [(constants, "HF_HUB_OFFLINE")]
    if (datasets := sys.modules.get("datasets")) is not None:
        places += [(datasets.config, "HF_HUB_OFFLINE"), (datasets.config, "HF_DATASETS_OFFLINE")]
    before = [
        (place, flag, getattr(place, flag)) for place, flag in places if wanted and hasattr(place, flag)
    ]
    try:
        for place, flag, _ in before:
            setattr(place, flag, True)
        yield
    finally:
        for place, flag, value in before:
            setattr(place, flag, value)


def _ask(name: str, kind: str, endpoint: str) -> _Answer:
    """One request in a thread of its own: neither a name server nor a drip of bytes is bounded by the
    client's timeouts."""
    answers: list[_Answer] = []

    def ask() -> None:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

        try:
            HfApi(endpoint=endpoint).repo_info(name, repo_type=kind, timeout=SECONDS)
            answers.append(_Answer(True, None))
        except RepositoryNotFoundError as error:
            unknown = f"the hub knows no {kind} of that name that this account may read (HF_TOKEN)"
            gated = type(error).__name__ == "GatedRepoError"  # it is there, and a library says what to accept
            answers.append(_Answer(True, None if gated else unknown))
        except HfHubHTTPError as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            answers.append(_Answer(False, f"no answer from {endpoint} but HTTP {status}"))
        # the client's errors have no common base class, and differ between its versions
        except Exception as error:
            words = (str(error) or "no words").splitlines()[0]
            answers.append(_Answer(False, f"no answer from {endpoint} ({type(error).__name__}: {words})"))

    # A daemon: a hub that never answers must not keep the process from ending.
    thread = threading.Thread(target=ask, daemon=True, name="one question to the hub")
    thread.start()
    thread.join(SECONDS)
    return answers[0] if answers else _Answer(False, f"no answer from {endpoint} within {SECONDS:g} s")


def _said(variable: str) -> bool:
    return os.environ.get(variable, "").upper() in _TRUE


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def _cached(name: str) -> bool:
    """True for what was fetched from the hub before, though a folder here has its owner's name."""
    from huggingface_hub import constants

    folder = name.replace("/", "--")
    return any(
        _is_folder(Path(constants.HF_HUB_CACHE, f"{kind}--{folder}")) for kind in ("models", "datasets")
    )
