"""What a run made: the record by which its files are told from everybody else's.

RUN/.made.json   {"version": 1, "names": […], "models": {".": {"config.json": [fingerprint, …], …},
                 "adapter": {…}}, "moving": […]}

names    files that grow or change and folders (run.yaml, metrics.jsonl, checkpoints …): claimed before the
         first byte is written, so that what has the name later is the run's, unless it is a link or of
         another kind
models   the model folders the run wrote, "." its own: a file is the run's as long as it has the content that
         was written
moving   model folders whose files are being moved in; left behind by a kill, and then none of them is to be
         read

Only the main rank calls these functions. What somebody else made is never overwritten, written through a link
or deleted.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from repsft_fast.checkpoint.files import parse_json
from repsft_fast.config import Config
from repsft_fast.errors import CheckpointError, ConfigError, RepsftError, TrainingError, describe
from repsft_fast.files import replace_file
from repsft_fast.report import result as results
from repsft_fast.report.visible import one_line
from repsft_fast.rundir.fingerprints import Fingerprint, open_file, places

FILE = ".made.json"
SETTINGS, METRICS = "run.yaml", "metrics.jsonl"
LEFT_BY_A_RUN = (METRICS, results.FILE, SETTINGS, "checkpoints")
PICTURES = ("run.png", "timeline.json")
TASKS = "tasks"  # replies to evaluate.tasks, a folder for each look
TRACKERS = ("tensorboard", "wandb")  # those that write into the folder
STAGED = ".writing-model-"
# of the names a run claims; all others are files
FOLDERS = frozenset({"checkpoints", "adapter", TASKS, "tensorboard", "wandb"})
# What a model is saved as, and what would make its folder be read as another model, as a quantised one or not
# at all: transformers adds adapters it finds beside a model, and there and in vLLM some names go before those
# that are written.
MODEL = (
    "config.json", "generation_config.json",
    "*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin*",
    "adapter_config.json", "adapter_model.*", "*.gguf", "*.distcp", "model_index.json", "modules.json",
    "quantize_config.json", "quant_config.json", "hf_quant_config.json",
    "tokenizer.*", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.*", "vocab-*.json",
    "merges.txt", "*.model", "*.spm", "*.tiktoken", "tekken.json", "bpe.codes", "encoder.json", "emoji.json",
    "chat_template*", "additional_chat_templates", "processor_config.json", "preprocessor_config.json",
    "video_preprocessor_config.json",
)  # fmt: skip
_LARGEST, _LARGEST_SETTINGS = 1 << 26, 1 << 20


@dataclass
class Made:
    """The record of one run's folder. `write` puts it on the disk, whole or not at all."""

    folder: Path
    names: set[str] = field(default_factory=set)
    models: dict[str, dict[str, list[Fingerprint]]] = field(default_factory=dict)
    moving: set[str] = field(default_factory=set)

    @staticmethod
    def read(folder: Path) -> Made | None:
        """None: there is none. ConfigError for a damaged one and for what is no record."""
        path = folder / FILE
        try:
            fd, size = open_file(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _no_record(path, error.strerror) from error
        try:
            if size > _LARGEST:
                raise _no_record(path, f"{size:,} bytes")
            return _parsed(folder, parse_json(os.pread(fd, size, 0), str(path)))
        except (OSError, CheckpointError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise _no_record(path, str(error)) from error
        finally:
            os.close(fd)

    def write(self) -> None:
        """Raises OSError."""
        models = {
            place: {
                name: [[p.bytes, *p.pieces] for p in contents] for name, contents in sorted(files.items())
            }
            for place, files in sorted(self.models.items())
        }
        values = {"version": 1, "names": sorted(self.names), "models": models, "moving": sorted(self.moving)}
        replace_file(self.folder / FILE, json.dumps(values, indent=1).encode(), FILE)

    # Whose what is ----------------------------------------------------------------------------------------

    def not_ours(self, names: Iterable[str]) -> dict[str, str]:
        """Of these names of the run's folder, what is there and is not to be written to: {name: why}."""
        found = {}
        for name in names:
            wanted = "folder" if name in FOLDERS else "file"
            kind = kind_of(self.folder / name)
            if kind is not None and (kind != wanted or name not in self.names):
                found[name] = f"a {kind}" if kind != wanted else ""
        return found

    def not_our_model(self, place: str, more: Collection[str] = ()) -> dict[str, str]:
        """Of a model folder's files, those that a model would be written over or be read with, and the run
        did not write.

        place: "." or the folder's name in the run's; more: names beside MODEL's that will be written.
        """
        into = self.folder / place
        if kind_of(into) not in ("folder", None) and place != ".":
            return {place: f"a {kind_of(into)}"}
        names = sorted(os.listdir(into)) if into.is_dir() else []
        # Where upper and lower case are one, Config.json is what writing config.json would write over.
        said_otherwise = {
            name for name in (*MODEL, *more) if "*" not in name and kind_of(into / name) is not None
        }
        names += sorted(said_otherwise - set(names))
        before = "" if place == "." else f"{place}/"
        found = {}
        for name in names:
            if is_model_name(name) or name in more:
                why = self._why_not(place, name)
                if why is not None:
                    found[before + name] = why
        return found

    def _why_not(self, place: str, name: str) -> str | None:
        """None: what is at this name is as the run wrote it, or the beginning of it."""
        path, written = self.folder / place / name, self.models.get(place, {})
        kind = kind_of(path)
        if kind == "folder" and any(other.startswith(f"{name}/") for other in written):
            inside = (self._why_not(place, f"{name}/{entry}") for entry in sorted(os.listdir(path)))
            return "holds files of others" if any(why is not None for why in inside) else None
        if kind != "file":
            return f"a {kind}"
        if name not in written:
            return ""
        return None if any(p.tells(path) != "other" for p in written[name]) else "not as the run wrote it"

    def ours(self, place: str, name: str) -> bool:
        """Whether this file of a model folder is there, on a way without links, and the run wrote it."""
        path = self.folder / place
        parts = name.split("/")
        for part in parts[:-1]:
            path /= part
            if kind_of(path) != "folder":
                return False
        return kind_of(path / parts[-1]) == "file" and self._why_not(place, name) is None


def _parsed(folder: Path, values: Any) -> Made:
    if values["version"] != 1:
        raise ValueError(f"version {values['version']}; this one reads 1")
    models = {
        _plain(place, 1): {
            _plain(name, 3): [Fingerprint(int(p[0]), tuple(map(str, p[1:]))) for p in contents]
            for name, contents in files.items()
        }
        for place, files in values["models"].items()
    }
    for contents in (contents for files in models.values() for contents in files.values()):
        if any(len(places(p.bytes)) != len(p.pieces) for p in contents):
            raise ValueError("a print is not whole")
    names = {_plain(name, 1) for name in values["names"]}
    return Made(folder, names, models, {_plain(place, 1) for place in values["moving"]})


def _plain(name: str, deep: int) -> str:
    """A name that leads nowhere else; "." for the run's folder itself."""
    parts = name.split("/")
    if name != "." and (len(parts) > deep or any(part in ("", ".", "..") or "\0" in part for part in parts)):
        raise ValueError(f"{name!r} is no name in a folder")
    return name


def _no_record(path: Path, got: str | None) -> ConfigError:
    todo = "move it away; without it a run's files are known by their names"
    return ConfigError(describe(str(path), "is no record of what a run made", got=got, todo=todo))


def is_model_name(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in MODEL)


def kind_of(path: Path) -> str | None:
    """file, folder, link, pipe …; None where nothing is. A link is never followed."""
    try:
        mode = os.lstat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    kinds = {
        stat.S_IFREG: "file",
        stat.S_IFDIR: "folder",
        stat.S_IFLNK: "link",
        stat.S_IFIFO: "pipe",
        stat.S_IFSOCK: "socket",
    }
    return kinds.get(stat.S_IFMT(mode), "device")


def listed(found: Mapping[str, str], most: int = 6) -> str:
    """
    >>> listed({"config.json": "", "run.png": "a link"})
    'config.json, run.png (a link)'
    """
    named = [one_line(f"{name} ({why})" if why else name) for name, why in found.items()]
    return ", ".join(named[:most]) + (f" and {len(named) - most} more" if len(named) > most else "")


def known(folder: Path) -> Made | None:
    """The record of the run that is in a folder; of one that was made before there were records, what can be
    said of it.

    Then its files are known by their names, and its model if it ended well, as it is now. None where there is
    no run. ConfigError for a damaged record, or where the settings are not a run's.
    """
    found = Made.read(folder)
    if (found is not None and SETTINGS in found.names) or not any(
        os.path.lexists(folder / name) for name in LEFT_BY_A_RUN
    ):
        return found
    if found is None and not any(
        os.path.lexists(folder / name) for name in LEFT_BY_A_RUN if name != SETTINGS
    ):
        return None  # settings alone are somebody's: a run has written its history beside them
    before = _adopted(folder)
    if found is not None:
        before.names |= found.names
        before.models |= found.models
        before.moving |= found.moving
    return before


def _adopted(folder: Path) -> Made:
    files = [name for name in (*LEFT_BY_A_RUN, *PICTURES, *TRACKERS) if kind_of(folder / name) is not None]
    found = Made(folder, set(files))
    if not _is_a_runs(folder / SETTINGS):
        wrong = f"holds no record of a run ({FILE}), and its {SETTINGS} is not a run's settings"
        todo = f"put the run's settings there as {SETTINGS}, or begin a run in another folder"
        raise ConfigError(describe("--resume", wrong, got=str(folder), todo=todo))
    try:
        ended = kind_of(folder / results.FILE) == "file" and results.read(folder).success
    except RepsftError:
        ended = False
    if ended:
        for place in (".", "adapter"):
            if kind_of(folder / place) == "folder":
                there = {name for name in os.listdir(folder / place) if is_model_name(name)}
                plain = sorted(name for name in there if kind_of(folder / place / name) == "file")
                found.models[place] = {name: [Fingerprint.of(folder / place / name)] for name in plain}
                found.names |= {place} - {"."}
    return found


def _is_a_runs(path: Path) -> bool:
    if kind_of(path) != "file" or path.stat().st_size > _LARGEST_SETTINGS:
        return False
    try:
        Config.of(path)
        return True
    except (RepsftError, OSError):
        pass
    try:  # an older version's settings
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        return (
            all(isinstance(values[section], dict) for section in ("run", "data"))
            and "folder" in values["run"]
        )
    except (yaml.YAMLError, OSError, ValueError, TypeError, KeyError, RecursionError):
        return False


# What the trainer calls -----------------------------------------------------------------------------------


def claim(folder: Path, names: Collection[str]) -> None:
    """From here on these names of the run's folder are the run's. ConfigError where something else has one of
    them."""
    made = Made.read(folder) or Made(folder)
    if found := made.not_ours(names):
        wrong = f"holds what the run would write and did not make: {listed(found)}"
        raise ConfigError(describe(str(folder), wrong, todo="move it away"))
    if not made.names >= set(names):
        made.names |= set(names)
        record(made)


def record(made: Made) -> None:
    """`Made.write`, whose errors are told. TrainingError."""
    try:
        made.write()
    except OSError as error:
        raise TrainingError(
            describe(str(made.folder / FILE), "cannot be written", got=error.strerror)
        ) from error


def whole(folder: Path) -> str | None:
    """What is missing or damaged of the models the run wrote, by its record; None: all is there as it was
    written."""
    made = Made.read(folder)
    if made is None or "." not in made.models:
        return "no model was written"
    problems = [
        f"the model in {'it' if place == '.' else place} was moved in only in part"
        for place in sorted(made.moving)
    ]
    for place, files in sorted(made.models.items()):
        for name, contents in files.items():
            path = folder / place / name
            try:
                if not made.ours(place, name) or contents[-1].tells(path) != "same":
                    wrong = "is missing" if kind_of(path) is None else "is not as it was written"
                    problems.append(f"{os.path.normpath(f'{place}/{name}')} {wrong}")
            except OSError as error:
                problems.append(f"{place}/{name} cannot be read ({error.strerror})")
    if not problems:
        return None
    return "; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if problems[3:] else "")
