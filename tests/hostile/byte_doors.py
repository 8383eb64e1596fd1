"""Where bytes from outside enter: data rows, settings, checkpoint indices. Shared by the property tests and
the fuzzer.

Each door takes bytes and gives what was read, or the project's own error. Any other exception escapes, an
error without words and a result that breaks its promise fail an assertion: both are findings.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from repsft_fast.checkpoint import load, newest, save, verify
from repsft_fast.checkpoint.manifest import LATEST, MANIFEST, _sealed, shard_file
from repsft_fast.config import Config
from repsft_fast.data import bounded
from repsft_fast.data.load import DataSettings, Loaded
from repsft_fast.data.load import load as load_rows
from repsft_fast.errors import CheckpointError, ConfigError, DataError
from repsft_fast.state import state_hash
from tests.helpers.chat_tokenizers import byte_level

GOOD_ROW = b'{"query": "q", "response": "a"}\n'
GOOD_SETTINGS = "run: {folder: r}\nmodel: {path: m}\ndata: {train: a.jsonl}\nbudget: {epochs: 3}\n"
_NAMES = ("rows.jsonl", "rows.json")


class Rows:
    """Bytes as a data file. The template renders in this process: that it is bounded in another one is tested
    elsewhere."""

    def __init__(self, folder: Path):
        self._folder, self._tokenizer = folder, byte_level()

    def __call__(self, data: bytes) -> None:
        for name in _NAMES:
            self.read(data, name)

    def read(self, data: bytes, name: str) -> Loaded | DataError:
        path = self._folder / name
        path.write_bytes(data)
        try:
            with patch("repsft_fast.data.sample_builder.bounded_map", _here):
                loaded = load_rows(str(path), self._tokenizer, DataSettings())
        except DataError as error:
            told = error
        else:
            return self._checked(loaded)
        assert name in str(told), f"the file is not named: {told}"
        return told

    @staticmethod
    def _checked(loaded: Loaded) -> Loaded:
        for sample in loaded.samples:
            assert len(sample.ids) == len(sample.trained)
            assert sample.trained[-1]
            assert not sample.trained[0]
        return loaded


def _here(work: Callable[[Any], Any], items: Any, where: Callable[[Any], str], what: str) -> Iterator[Any]:
    """`bounded_map` without its process: a fork for every input is a hundred times slower."""
    for item in items:
        yield bounded._unwrap(json.loads(json.dumps(bounded._attempt(work, item))), where(item), what)


class SettingsText:
    """Bytes as a settings file."""

    def __init__(self, folder: Path):
        self._path = folder / "run.yaml"

    def __call__(self, data: bytes) -> None:
        self.read(data)

    def read(self, data: bytes) -> Config | ConfigError:
        self._path.write_bytes(data)
        return config_or_error(lambda: Config.of(self._path))


def config_or_error(make: Callable[[], Config]) -> Config | ConfigError:
    """The Config, which comes back from its own JSON, or the ConfigError, which tells something."""
    try:
        config = make()
    except ConfigError as error:
        told = error
    else:
        assert Config.of(json.loads(json.dumps(config.to_dict()))) == config
        return config
    assert told.problems
    assert all(isinstance(problem, str) and problem.strip() for problem in told.problems)
    return told


class Index:
    """Bytes as each index of a checkpoint in turn: manifest, LATEST, header of a shard; hashed anew where
    they are a table.

    However they read, `verify` answers, `load` gives the state saved or leaves the live tensors alone, and
    the generation that is whole is found when LATEST lies.
    """

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / "gen-00000000"
        self._saved = {"w": torch.arange(20.0).reshape(5, 4), "step": torch.tensor(3.0)}
        save(folder, 0, self._saved, {"n": 0})
        self._shard = self.path / shard_file(0, 1)
        self.manifest = (self.path / MANIFEST).read_bytes()
        self._whole = self._shard.read_bytes()
        self._body = 8 + int.from_bytes(self._whole[:8], "little")
        self.header = self._whole[8 : self._body]

    def __call__(self, data: bytes) -> None:
        for form in (data, hashed_anew(data)):
            if form is not None:
                self.as_manifest(form)
                self.as_latest(form)
        self.as_header(data)

    def as_manifest(self, data: bytes) -> list[str]:
        """What is wrong with a generation that has this manifest."""
        return self._with(self.path / MANIFEST, data, self._read)

    def as_header(self, data: bytes) -> list[str]:
        return self._with(
            self._shard, len(data).to_bytes(8, "little") + data + self._whole[self._body :], self._read
        )

    def as_latest(self, data: bytes) -> None:
        found = self._with(self.folder / LATEST, data, lambda: newest(self.folder))
        assert found.number == 0

    def _read(self) -> list[str]:
        problems = verify(self.path)
        assert all(isinstance(problem, str) and problem.strip() for problem in problems)
        live = {name: torch.full_like(tensor, 7) for name, tensor in self._saved.items()}
        try:
            load(self.path, live)
        except CheckpointError:
            assert all((tensor == 7).all() for tensor in live.values()), "half loaded"
        else:
            assert state_hash(live, {}) == state_hash(self._saved, {}), "something else was loaded"
        return problems

    @staticmethod
    def _with(path: Path, data: bytes, then: Callable[[], Any]) -> Any:
        whole = path.read_bytes()
        path.write_bytes(data)
        try:
            return then()
        finally:
            path.write_bytes(whole)


def hashed_anew(data: bytes) -> bytes | None:
    """The same table with the hash that it would have; None for bytes that are no table."""
    try:
        body = json.loads(data)
        if not isinstance(body, dict):
            return None
        body.pop("hash", None)
        return _sealed(body)
    except (ValueError, RecursionError):
        return None


DOORS: dict[str, Callable[[Path], Callable[[bytes], None]]] = {
    "rows": Rows,
    "settings": SettingsText,
    "manifest": Index,
}


def corpus(door: str, folder: Path) -> list[bytes]:
    """Bytes that are read well, for a fuzzer to start from."""
    if door == "settings":
        recipes = sorted((Path(__file__).parents[2] / "repsft_fast" / "recipes").glob("*.yaml"))
        return [GOOD_SETTINGS.encode(), *(recipe.read_bytes() for recipe in recipes)]
    if door == "manifest":
        made = Index(folder / "corpus")
        return [made.manifest, (made.folder / LATEST).read_bytes(), made.header]
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [
        {"messages": turns}, {"messages": turns, "tools": [{"type": "function", "function": {"name": "f"}}]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"prompt": "p", "completion": "c"}, {"prompt": turns[:1], "completion": turns[1:]},
        {"instruction": "i", "input": "", "output": "o"}, {"text": "t"}, {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]},
    ]  # fmt: skip
    return [
        GOOD_ROW,
        *(json.dumps(row).encode() + b"\n" for row in rows),
        json.dumps([rows[0], rows[0]]).encode(),
    ]
