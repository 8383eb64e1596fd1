"""The tokenizer beside a model, as its own files say; refused where transformers would read another."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from repsft_fast.errors import ModelError, describe
from repsft_fast.hub import offline
from repsft_fast.models.folder import check_tokenizer_files, folder_of
from repsft_fast.models.gguf import correct, declared
from repsft_fast.models.guards import library
from repsft_fast.models.paths import CORRECT, NO_TOKENIZER, config_wrong, is_of_config, located, unreadable
from repsft_fast.models.readable import tokenizer_form
from repsft_fast.models.tokenizer_file import as_the_file_says


def load_tokenizer(
    path: str | Path,
    *,
    gguf_file: str | None = None,
    trust_remote_code: bool = False,
    setting: str = "tokenizer.path",
) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model, with its chat template. Paths as in `load_model`; setting: what errors
    call the path.

    Out of a GGUF file it has the special tokens that the file declares; ModelError where transformers
    misreads its vocabulary. Text is split as tokenizer.json says (`models.tokenizer_file`); `load_said` of
    the result has words for the user.
    """
    what = "a tokenizer" if setting == "tokenizer.path" else "a model with its tokenizer"
    # Its own files first: a library would say of a broken one something about another.
    folder, gguf, unreached = located(str(path), gguf_file, setting, what)
    here = folder_of(folder)
    if here is not None and not gguf:
        check_tokenizer_files(here, setting)

    # The config.json beside it tells the tokenizer's class, so it may be what is wrong.
    def instead(error: BaseException) -> ModelError:
        if not gguf and is_of_config(error, folder, trust_remote_code):
            return config_wrong(error, path, setting)
        return unreadable(error, path, setting, what, folder)

    with library(setting, str(path), instead=instead), offline(unreached):
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, **gguf)
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise TypeError(f"a {type(tokenizer).__name__} is no tokenizer")
    # Of a GGUF file transformers reads the vocabulary and not which tokens are special.
    if gguf and (file := Path(folder, gguf["gguf_file"])).is_file():
        with library(f"{setting} {file.name}", str(path), "fetch it again"):
            correct(tokenizer, declared(file), str(path))
    # The folder is known only now where the hub sent it.
    said: list[str] = []
    if not gguf and (here := here or folder_of(folder)) is not None:
        tokenizer, said = as_the_file_says(tokenizer, here, setting)
    with library(f"{setting} tokenizer_config.json", str(path), CORRECT):
        tokenizer("")  # settings of the wrong type show when it is used
        special = {*tokenizer.all_special_tokens, "▁"}
        # transformers makes one of its class's name alone
        if not gguf and not tokenizer.get_vocab().keys() - special:
            raise ModelError(
                describe(setting, "holds no tokenizer, only special tokens", got=str(path), todo=NO_TOKENIZER)
            )
    tokenizer.__dict__["load_said"] = said
    tokenizer_form(tokenizer)
    return tokenizer
