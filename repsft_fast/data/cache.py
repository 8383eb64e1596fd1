"""Tokenised samples on disk: one safetensors file per key, its JSON in the header. No pickle, written
atomically.

The key covers everything that decides the result; the file carries a hash of its own bytes. A file that does
not verify is reported and rebuilt, never half used.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from repsft_fast.data.sample import Loaded, Sample
from repsft_fast.errors import open_plain
from repsft_fast.files import replace_file

VERSION = 3  # raise it when the same input would give other samples
ACCOUNTS = ("columns_used", "columns_unused", "files")


def cache_key(parts: dict[str, Any]) -> str:
    """Hash of a JSON-able description of content, template, tokenizer and settings."""
    text = json.dumps({"version": VERSION, **parts}, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hash of everything that decides ids: the backend's own serialisation where there is one, else the
    vocabulary."""
    if tokenizer is None:
        return ""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    body = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    specials = {name: str(value) for name, value in tokenizer.special_tokens_map.items()}
    added = {
        str(number): (str(token), token.special) for number, token in tokenizer.added_tokens_decoder.items()
    }
    start = list(tokenizer("")["input_ids"])
    text = json.dumps([type(tokenizer).__name__, body, specials, added, start], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def write(folder: Path, key: str, loaded: Loaded) -> None:
    """Raises OSError when the folder cannot be written; nothing partial is left."""
    from safetensors.numpy import save

    samples = loaded.samples
    tasks = list(dict.fromkeys(sample.task for sample in samples))
    places = [sample.source.rpartition(":") for sample in samples]
    files = list(dict.fromkeys(file for file, _, _ in places))
    task_numbers, file_numbers = ({name: n for n, name in enumerate(names)} for names in (tasks, files))
    tensors: dict[str, np.ndarray] = {
        "ids": np.fromiter((token for sample in samples for token in sample.ids), np.int32),
        "trained": np.fromiter((flag for sample in samples for flag in sample.trained), np.uint8),
        "ends": np.cumsum([len(sample.ids) for sample in samples], dtype=np.int64),
        "weights": np.array([sample.weight for sample in samples], np.float64),
        "tasks": np.array([task_numbers[sample.task] for sample in samples], np.int32),
        "files": np.array([file_numbers[file] for file, _, _ in places], np.int32),
        "rows": np.array([int(row) for _, _, row in places], np.int64),
    }
    meta = {
        "key": key,
        "tasks": tasks,
        "files": files,
        "dropped": dict(loaded.dropped),
        "warnings": loaded.warnings,
    }
    # as lists: their order is kept
    meta["accounts"] = {name: list(getattr(loaded, name).items()) for name in ACCOUNTS}
    text = json.dumps(meta, sort_keys=True)
    # Under another name until it is whole: a reader sees all of it or nothing.
    data = save(tensors, metadata={"repsft": text, "sha256": _digest(tensors, text)})
    folder.mkdir(parents=True, exist_ok=True)
    # what a power cut takes is made again
    replace_file(path_of(folder, key), data, "cache", durable=False)


def read(folder: Path, key: str) -> tuple[Loaded | None, str | None]:
    """(what was kept, None), (None, None) when there is nothing, or (None, what is damaged)."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    path = path_of(folder, key)
    try:
        with open_plain(path) as stream:
            data = stream.read()
    except FileNotFoundError:
        return None, None
    except OSError as error:
        return None, f"{path} cannot be read ({error.strerror})"
    # A damaged file is read anew, so whatever a library makes of one is no error of the run.
    try:
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])["__metadata__"]
        tensors = load(data)
        if _digest(tensors, header["repsft"]) != header["sha256"]:
            return None, f"{path} is damaged (its hash differs)"
        meta = json.loads(header["repsft"])
        if meta["key"] != key:
            return None, f"{path} holds another data set"
        return _unpack(tensors, meta), None
    except (
        SafetensorError,
        ValueError,
        KeyError,
        TypeError,
        RecursionError,
        OverflowError,
        MemoryError,
    ) as error:
        return None, f"{path} is damaged ({type(error).__name__})"


def path_of(folder: Path, key: str) -> Path:
    return folder / f"{key[:32]}.safetensors"


def _digest(tensors: dict[str, np.ndarray], text: str) -> str:
    total = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        total.update(f"{name} {tensors[name].dtype} {tensors[name].shape}".encode())
        total.update(np.ascontiguousarray(tensors[name]).tobytes())
    return total.hexdigest()


def _unpack(tensors: dict[str, np.ndarray], meta: dict[str, Any]) -> Loaded:
    borders = [0, *tensors["ends"].tolist()]
    ids, trained = tensors["ids"], tensors["trained"].astype(bool)
    columns = zip(
        pairwise(borders), *(tensors[name].tolist() for name in ("weights", "tasks", "files", "rows"))
    )
    samples = [
        Sample(
            ids[start:end].tolist(),
            trained[start:end].tolist(),
            meta["tasks"][task],
            weight,
            f"{meta['files'][file]}:{row}",
        )
        for (start, end), weight, task, file, row in columns
    ]
    accounts = {name: dict(map(tuple, meta["accounts"][name])) for name in ACCOUNTS}
    return Loaded(samples, Counter(meta["dropped"]), list(meta["warnings"]), **accounts)
