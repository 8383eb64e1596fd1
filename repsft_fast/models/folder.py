"""A model folder's own files, before a library reads them: kinds, JSON, what sort of folder, its weights'
names.

Nothing here reads a weight. safetensors: 8 bytes of length (little-endian), a JSON header {name: dtype,
shape, data_offsets}, data (https://github.com/huggingface/safetensors, README, format).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from safetensors import safe_open

from repsft_fast.errors import ModelError, describe, kind_of_file, open_plain
from repsft_fast.models.foreign_files import ADAPTERS, AGAIN, CONFIG, INDEX, WEIGHTS, other_file, some
from repsft_fast.models.guards import check_counts, first_words, library, size
from repsft_fast.models.tokenizer_bounds import check_bounds

_MODEL_FILES = (CONFIG, "generation_config.json", INDEX, ADAPTERS)
_TOKENIZER_FILES = (
    CONFIG, "tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "tokenizer.model", "merges.txt", "vocab.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_LARGEST = {
    "tokenizer.json": 2**30,
    "vocab.json": 2**30,
    "tokenizer.model": 2**30,
    "merges.txt": 2**30,
    "vocab.txt": 2**30,
}
_LARGEST_OTHER = 2**26  # the longest public index, of a trillion parameters, has 20 MB
# torch.distributed.checkpoint's
_DISTRIBUTED = re.compile(r"\.distcp$|^shard-\d+-model-\d+-of-\d+\.safetensors$")
_LONGEST_HEADER = 100_000_000  # safetensors' own bound
# ends of names of files
_READ = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".safetensors", ".gguf", ".bin", ".py")
_MORE_TEMPLATES = "additional_chat_templates"  # a folder of a tokenizer's
_DEEPEST = 100  # levels of JSON; no model's file has ten
UNQUANTISED = "give the repository it was quantised from, or a GGUF file, which is de-quantised"


@dataclass(frozen=True)
class Stored:
    """One tensor of a safetensors file, by its header."""

    file: Path
    dtype: str  # safetensors' name: F32, BF16, I8 …
    shape: tuple[int, ...]


def folder_of(path: str) -> Path | None:
    """The folder that `path` is, or the one in the hub's cache that its name has; None when nothing is
    here."""
    if os.path.isdir(path):
        return Path(path)
    if os.path.exists(path):
        return None
    try:
        cached = try_to_load_from_cache(path, CONFIG)
    except ValueError:  # no name the hub could have
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def check_model_files(folder: Path, where: str) -> None:
    """ModelError unless the model's JSON files can be read, and it is a model in weights: no adapters,
    nothing quantised."""
    _check_kinds(folder, where)
    found = checked_files(folder, _MODEL_FILES, where)
    # transformers adds adapters that lie beside a model to it, and says nothing.
    config, adapters = found.get(CONFIG), found.get(ADAPTERS)
    if adapters is not None:
        base = adapters.get("base_model_name_or_path")
        if config is None:
            wrong = "holds adapters, no model"
            todo = f"set model.path to their base ({base}) and model.lora.from to this folder"
        else:
            wrong = f"holds a model and adapters ({ADAPTERS}), which would be added to it in silence"
            todo = "take one of the two out of the folder; adapters are gone on from by model.lora.from"
        raise ModelError(describe(where, wrong, got=str(folder), todo=todo))
    # What is wrong with it would show in the last minute, when the model is saved.
    for name, value in found.get("generation_config.json", {}).items():
        if name.endswith("_token_id") and not _are_ids(value):
            place = f"{where} generation_config.json"
            raise ModelError(
                describe(place, f"{name} is no token", expected="a number or a list of them", got=value)
            )
    if config is None:
        return
    # Before a model is built of it: counts that take minutes, weights that are no numbers.
    check_counts(config, f"{where} {CONFIG}")
    check_unquantised(config, where, folder)
    # A key that names other files than the usual ones may lead anywhere.
    explicit = config.get("transformers_weights")
    if explicit is not None and (
        not isinstance(explicit, str) or not _is_plain(explicit) or not explicit.endswith(".safetensors")
    ):
        wrong = "transformers_weights names no safetensors file of this folder"
        raise ModelError(describe(f"{where} {CONFIG}", wrong, got=explicit, todo="take the key out"))
    if distributed := next((name for name in sorted(os.listdir(folder)) if _DISTRIBUTED.search(name)), None):
        wrong = (
            f"its weights are a distributed checkpoint ({distributed}), whose table is a pickle, which is not"
            " read"
        )
        raise ModelError(
            describe(where, wrong, got=str(folder), todo=f"save it as {WEIGHTS}, in a folder without it")
        )


def check_tokenizer_files(folder: Path, where: str) -> None:
    """ModelError unless the tokenizer's files can be read, and are themselves: a text that points to one is
    text too."""
    _check_kinds(folder, where)
    found = checked_files(folder, _TOKENIZER_FILES, where)
    check_counts(found.get(CONFIG, {}), f"{where} {CONFIG}")  # which is read for a tokenizer too
    check_bounds(found.get("tokenizer.json", {}), found.get("tokenizer_config.json", {}), where)
    for name in _TOKENIZER_FILES:
        # Beside tokenizer.json the vocabularies of old are not read, and may have been left unfetched on
        # purpose.
        read = name.startswith("chat_template") or (name != "merges.txt" and "tokenizer.json" not in found)
        if (
            read
            and name not in found
            and os.path.exists(folder / name)
            and (other := other_file(folder / name)) is not None
        ):
            raise ModelError(describe(f"{where} {name}", other[0], got=str(folder / name), todo=other[1]))


def settings_of(folder: Path, where: str) -> dict[str, Any]:
    """config.json as it is written; empty where there is none."""
    return checked_files(folder, (CONFIG,), where).get(CONFIG, {})


def check_unquantised(config: dict[str, Any], where: str, got: object) -> None:
    """ModelError for a configuration whose weights are quantised, of the model or of a part of it."""
    for holder in (config, *(part for part in config.values() if isinstance(part, dict))):
        settings = holder.get("quantization_config", holder.get("compression_config"))
        if settings is not None:
            method = (
                settings.get("quant_method") or "unnamed"
                if isinstance(settings, dict)
                else type(settings).__name__
            )
            wrong = f"its weights are quantised ({method}): they are not trained here"
            raise ModelError(describe(where, wrong, got=str(got), todo=UNQUANTISED))


def stored_weights(folder: Path, where: str) -> dict[str, Stored] | None:
    """Every tensor of the folder's safetensors files by their headers; None when it has none.

    ModelError for an index that leads outside, to nothing or to something else, for a name in two files, for
    damaged files, and for two sets of weights, of which transformers would take one in silence.
    """
    # As transformers looks for them: what the configuration names, one file, the files of an index.
    explicit = checked_files(folder, (CONFIG,), where).get(CONFIG, {}).get("transformers_weights")
    if explicit is not None and os.path.exists(folder / explicit):
        return header_of(folder / explicit, where)
    index = checked_files(folder, (INDEX,), where).get(INDEX, {})
    if os.path.lexists(folder / WEIGHTS):
        _check_one_set(folder, index.get("weight_map"), where)
        return header_of(folder / WEIGHTS, where)
    if not os.path.lexists(folder / INDEX):
        return None
    return _stored_by_index(folder, index, where)


def _check_one_set(folder: Path, named: Any, where: str) -> None:
    """ModelError where an index beside the one file of weights names others here. named: its weight_map."""
    files = {file for file in named.values() if isinstance(file, str)} if isinstance(named, dict) else set()
    others = [file for file in files - {WEIGHTS} if _is_plain(file) and os.path.exists(folder / file)]
    if others:
        wrong = f"it holds two sets of weights: {WEIGHTS}, and {some(sorted(others))} named by {INDEX}"
        raise ModelError(
            describe(where, wrong, got=str(folder), todo="take one of the two out, with the index")
        )


def _stored_by_index(folder: Path, index: dict[str, Any], where: str) -> dict[str, Stored]:
    """Every tensor of the files that an index names, which must be in the file it names for it and in no
    other."""
    place = f"{where} {INDEX}"
    named = index.get("weight_map")
    if not isinstance(named, dict) or not named or not all(isinstance(file, str) for file in named.values()):
        raise ModelError(describe(place, "has no weight_map", expected="{tensor: file}", got=named))
    if not isinstance(index.get("metadata"), dict):  # without which transformers does not read it
        raise ModelError(
            describe(place, "has no metadata", expected="an object ({} will do)", got=index.get("metadata"))
        )

    # A tensor in two files would be taken from one of them in silence.
    stored: dict[str, Stored] = {}
    files = sorted(set(named.values()))
    for name in files:
        _check_indexed(folder, name, files, place)
        for tensor, entry in header_of(folder / name, where).items():
            if tensor in stored:
                wrong = f"{tensor} is in two files: one of them would be dropped"
                raise ModelError(
                    describe(place, wrong, got=f"{stored[tensor].file.name} and {name}", todo="take one out")
                )
            stored[tensor] = entry

    # An index of one download beside the files of another.
    lost = sorted(
        tensor for tensor, file in named.items() if tensor not in stored or stored[tensor].file.name != file
    )
    if lost:
        wrong = f"{len(lost)} of its {len(named)} tensors are not in the file it names, first {lost[0]}"
        todo = "fetch index and weights again: they do not belong together"
        raise ModelError(describe(place, wrong, got=named[lost[0]], todo=todo))
    return stored


def _check_indexed(folder: Path, name: str, files: list[str], place: str) -> None:
    """ModelError unless the file `name`, one of the index's `files`, is here and in this folder."""
    if not _is_plain(name):
        raise ModelError(
            describe(place, "leads outside its folder", got=name, todo="name files of this folder")
        )
    # False for names that no file can have, where Path.exists raises
    if not os.path.exists(folder / name):
        missing = [file for file in files if not os.path.exists(folder / file)]
        wrong = f"{len(missing)} of its {len(files)} files are not here, first {name[:200]}"
        raise ModelError(describe(place, wrong, got=str(folder), todo="fetch them"))
    # in the hub's cache all files are links to one folder
    inside = {folder.resolve(), (folder / INDEX).resolve().parent}
    if (folder / name).resolve().parent not in inside:
        wrong = f"{name} is a link that leads outside its folder"
        raise ModelError(
            describe(place, wrong, got=str((folder / name).resolve()), todo="put the file itself there")
        )


def header_of(file: Path, where: str) -> dict[str, Stored]:
    place = f"{where} {file.name}"
    _check_regular(file, place)

    def instead(error: BaseException) -> ModelError:
        again = "make it readable" if isinstance(error, OSError) else AGAIN
        wrong, todo = other_file(file) or (first_words(error), again)
        return ModelError(describe(place, wrong, got=str(file), todo=todo))

    with library(place, str(file), instead=instead):
        with open(file, "rb") as opened:
            with safe_open(file, "pt"):  # which checks the offsets against the file's length
                pass
            (length,) = struct.unpack("<Q", opened.read(8))
            text = opened.read(min(length, _LONGEST_HEADER))
        found = _parsed(text.decode("utf-8"), place, str(file))
        return {
            name: Stored(file, entry["dtype"], tuple(entry["shape"]))
            for name, entry in found.items()
            if name != "__metadata__"
        }


def checked_files(folder: Path, names: tuple[str, ...], where: str) -> dict[str, dict[str, Any]]:
    """{name: object} of the JSON files that are there; the others are regular files of a sane size."""
    found = {}
    for name in names:
        file, place = folder / name, f"{where} {name}"
        if not os.path.lexists(file):
            continue
        _check_regular(file, place)
        largest = _LARGEST.get(name, _LARGEST_OTHER)
        if (bytes_there := file.stat().st_size) > largest:
            raise ModelError(
                describe(
                    place,
                    "is too large to be one",
                    expected=f"at most {size(largest)}",
                    got=size(bytes_there),
                )
            )
        # Templates and vocabularies are the tokenizer's library to parse.
        if not name.endswith(".json"):
            continue
        try:
            found[name] = _parsed(file.read_text(encoding="utf-8"), place, str(file))
        except OSError as error:
            raise ModelError(
                describe(place, first_words(error), got=str(file), todo="make it readable")
            ) from error
        except ValueError as error:  # UnicodeDecodeError is one, and ModelError
            other = other_file(file)
            if other is None and isinstance(error, ModelError):
                raise
            wrong, todo = other or (first_words(error), AGAIN)
            raise ModelError(
                describe(place, wrong, expected="JSON in UTF-8", got=str(file), todo=todo)
            ) from error
    return found


def _check_kinds(folder: Path, where: str) -> None:
    """ModelError for a pipe, device or socket under any name that a library might open, whichever names it
    knows today."""
    for inside in (folder, folder / _MORE_TEMPLATES):
        try:
            entries = sorted(os.scandir(inside), key=lambda entry: entry.name)
        except OSError:  # none there; what of the folder itself cannot be read is said by who reads it
            continue
        for entry in entries:
            plain = os.path.isfile(entry) or os.path.isdir(entry) or not os.path.exists(entry)
            if not plain and entry.name.endswith(_READ):
                _check_regular(Path(entry), f"{where} {entry.name}")


def _check_regular(file: Path, place: str) -> None:
    """A pipe would be waited for, a device read without end."""
    try:
        open_plain(file).close()
    except OSError as error:  # a link to nothing, or to itself, too
        with contextlib.suppress(OSError):
            if not stat.S_ISREG(mode := file.stat().st_mode):
                wrong = f"is {kind_of_file(mode)}"
                raise ModelError(
                    describe(place, wrong, expected="a file", got=str(file), todo="put the file there")
                ) from None
        todo = "make it readable" if isinstance(error, PermissionError) else "put the file there"
        raise ModelError(describe(place, first_words(error), got=str(file), todo=todo)) from error


def _parsed(text: str, place: str, got: str) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            for name, value in pairs:
                if repr(made[name]) != repr(value):  # true is not 1
                    wrong = f"{name} is there twice, with different values"
                    raise ModelError(describe(place, wrong, got=got, todo="take one out"))
        return made

    try:
        value = json.loads(text, object_pairs_hook=once)
        _check_depth(value, place, got)
    except (ValueError, RecursionError) as error:  # ModelError is a ValueError
        if isinstance(error, ModelError):
            raise
        wrong = (
            "is nested too deep" if isinstance(error, RecursionError) else f"is no JSON: {first_words(error)}"
        )
        raise ModelError(describe(place, wrong, got=got, todo="fetch it again, or correct it")) from error
    if not isinstance(value, dict):
        raise ModelError(
            describe(place, f"holds a {type(value).__name__}", expected="an object ({…})", got=got)
        )
    return value


def _check_depth(value: Any, place: str, got: str) -> None:
    level, depth = [value], 0
    while level:
        if depth > _DEEPEST:
            raise ModelError(
                describe(
                    place, f"is nested over {_DEEPEST} deep", got=got, todo="fetch it again, or correct it"
                )
            )
        inner = [x for x in level if isinstance(x, dict | list)]
        level = [
            y for x in inner for y in (x.values() if isinstance(x, dict) else x) if isinstance(y, dict | list)
        ]
        depth += 1


def _is_plain(name: str) -> bool:
    return bool(name) and name not in (".", "..") and not any(mark in name for mark in ("/", "\\", "\0"))


def _are_ids(value: Any) -> bool:
    each = value if isinstance(value, list) else [value]
    return value is None or all(isinstance(number, int) and not isinstance(number, bool) for number in each)
