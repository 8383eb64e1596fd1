"""What a GGUF file says about its own tokenizer, held against what transformers made of it.

Older transformers read some of these files wrongly: 5.0 to 5.4 make a CodeLlama tokenizer with five tokens
too many out of SmolLM2's, 5.0 to 5.12 end it with `<|im_start|>`. A model that is trained on other ids than
it was made with is wasted, and one saved with a wrong end token never stops; so the file has the last word.
"""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedConfig

from repsft_fast.errors import ModelError, describe

SPECIAL = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "pad_token": "padding_token_id"}


def config_of_file(folder: str | Path, gguf_file: str) -> PreTrainedConfig:
    """The architecture in a GGUF file of a folder. transformers parses all of it, every token of the
    vocabulary too: 5 s for 50k tokens, and a run asks several times before it trains."""
    there = Path(folder, gguf_file).stat()
    return copy.deepcopy(_config_of_file(str(folder), gguf_file, there.st_size, there.st_mtime_ns))


@functools.lru_cache(maxsize=2)
def _config_of_file(folder: str, gguf_file: str, size: int, changed_ns: int) -> PreTrainedConfig:
    return AutoConfig.from_pretrained(folder, gguf_file=gguf_file)


def declared(file: Path) -> dict[str, int]:
    """`tokens`: how many there are; `bos_token`, `eos_token`, `pad_token`: their ids, where named. 2 s for
    50k tokens."""
    from gguf import GGUFReader  # transformers asks for it too

    fields = GGUFReader(str(file)).fields
    found = {}
    if (tokens := fields.get("tokenizer.ggml.tokens")) is not None:
        found["tokens"] = len(tokens.data)
    for name, key in SPECIAL.items():
        if (field := fields.get(f"tokenizer.ggml.{key}")) is not None:
            found[name] = int(field.parts[field.data[0]][0])
    return found


def correct(tokenizer: Any, says: dict[str, int], source: str) -> None:
    """Give the tokenizer the special tokens that its file declares.

    Raises ModelError where the vocabulary itself differs: then every id may be wrong, and nothing can be put
    right here.
    """
    if (tokens := says.get("tokens")) is not None and len(tokenizer) != tokens:
        raise ModelError(
            describe(
                "tokenizer.path",
                f"transformers {transformers.__version__} reads it wrongly out of this GGUF, as"
                f" {type(tokenizer).__name__}",
                expected=f"the {tokens:,} tokens the file declares",
                got=f"{len(tokenizer):,} in {source}",
                todo="upgrade transformers, or name a folder with the tokenizer in tokenizer.path",
            )
        )
    # Ids are the file's: the token behind an id is what the vocabulary calls it.
    for name in SPECIAL:
        if name in says and getattr(tokenizer, f"{name}_id") != says[name]:
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(says[name]))
