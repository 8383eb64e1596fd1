"""Where a model is, as people write it, and the error when nothing that can be read is there."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import transformers
from transformers import AutoConfig

from repsft_fast.errors import ModelError, describe
from repsft_fast.hub import near_path, why_local, why_not_reached
from repsft_fast.models.foreign_files import CONFIG, instead_of_a_model
from repsft_fast.models.guards import first_words, quiet

PACKAGE_PREFIX = "package:"
CORRECT = "correct it, or fetch it again"
NO_TOKENIZER = "fetch it, or set tokenizer.path to a folder that has one"
_TRUST = "read that code, and set model.trust_remote_code to true if it may run here"
_TOKENIZERS = ("tokenizer.json", "vocab.json", "vocab.txt", "tekken.json", ".model", ".tiktoken")
_NAMED_IN_A_FOLDER = (CONFIG, "tokenizer.json", "tokenizer_config.json")


def locate(path: str, gguf_file: str | None = None) -> tuple[str, str | None]:
    """(folder or hub id, GGUF file in it or None) for a path as people write it. ModelError for a missing
    package."""
    if path.startswith("~"):
        path = os.path.expanduser(path)  # which leaves it as it is when there is no such user
    if path.startswith(PACKAGE_PREFIX):
        package, _, inside = path.removeprefix(PACKAGE_PREFIX).partition("/")
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            raise ModelError(
                describe("model.path", f"package {package} is not installed", todo=f"pip install {package}")
            )
        path = str(Path(spec.submodule_search_locations[0], inside))
    if path.endswith(".gguf") and gguf_file is None and not os.path.isdir(path):
        file = Path(path)
        return str(file.parent), file.name
    return path, gguf_file


def located(
    path: str, gguf_file: str | None, setting: str = "model.path", what: str = "a causal language model"
) -> tuple[str, dict[str, str], bool]:
    """`locate`, with the GGUF file as the keyword transformers takes, and whether a hub that is asked is out
    of reach.

    ModelError for a GGUF file that is not there, and at once for what looks like a path and is not there.
    """
    folder, gguf_file = locate(path, gguf_file)
    here = os.path.exists(folder)
    if gguf_file and here and not Path(folder, gguf_file).is_file():
        raise ModelError(describe("model.gguf_file", "does not exist", got=str(Path(folder, gguf_file))))
    gguf = {"gguf_file": gguf_file} if gguf_file else {}
    if here:
        if not _is_text(folder):
            raise ModelError(
                describe(setting, "has a name that is not UTF-8", got=ascii(path), todo="rename the folder")
            )
        return folder, gguf, os.path.isfile(folder)  # which transformers would ask the hub for
    # A slip in a path must not wait for a network.
    if why := why_local(folder):
        near = near_path(Path(folder))
        meant = f"did you mean {near}? else " if near else ""
        todo = f"{meant}give a folder or hub id of {what} ({why}: the hub is not asked)"
        raise ModelError(describe(setting, "no such folder", got=path, todo=todo))
    return folder, gguf, why_not_reached(folder, "model") is not None


def unreadable(
    error: BaseException,
    path: str | Path,
    setting: str = "model.path",
    what: str = "a causal language model",
    folder: str | None = None,  # or hub id, that `path` led to
) -> ModelError:
    wrong, todo = first_words(error), f"give a folder or hub id of {what}"
    folder = str(path) if folder is None else folder
    if os.path.isfile(folder):
        wrong = "is a file"
        todo = f"give the folder it is in: {Path(folder).parent}"
    elif _asks_for_code(error):
        todo = _TRUST
    elif os.path.isdir(folder):
        if not any(Path(folder, name).exists() for name in _NAMED_IN_A_FOLDER):
            neither = "the folder holds neither a model nor a tokenizer", todo
            wrong, todo = instead_of_a_model(Path(folder)) or neither
        elif "tokenizer" in what and not any(name.endswith(_TOKENIZERS) for name in os.listdir(folder)):
            wrong, todo = "holds no tokenizer (tokenizer.json, tokenizer.model, vocab.json …)", NO_TOKENIZER
    elif why := why_not_reached(folder, "model"):
        wrong = (
            f"is no folder here ({Path(folder).absolute()}), and could not be had from the hub or its cache"
            f" ({why})"
        )
        todo += "; HF_HUB_OFFLINE=1 reads the cache without asking"
    return ModelError(describe(setting, wrong, got=str(path), todo=todo))


def config_wrong(error: BaseException, path: str | Path, setting: str = "model.path") -> ModelError:
    """For a config.json that transformers does not take."""
    todo = CORRECT
    if _asks_for_code(error):
        todo = _TRUST
    elif "does not recognize this architecture" in str(error):
        todo = f"upgrade transformers ({transformers.__version__} here), or correct model_type"
    return ModelError(describe(f"{setting} {CONFIG}", first_words(error), got=str(path), todo=todo))


def _asks_for_code(error: BaseException) -> bool:
    return "trust_remote_code" in str(error) or "custom code which must be executed" in str(error)


def is_of_config(error: BaseException, folder: str, trust_remote_code: bool) -> bool:
    """Whether a tokenizer could not be had because of the config.json beside it, which tells its class."""
    try:
        with quiet():
            AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except (Exception, SystemExit) as own:
        return os.path.isfile(Path(folder, CONFIG)) and first_words(own) == first_words(error)
    return False


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
