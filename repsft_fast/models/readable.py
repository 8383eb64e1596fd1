"""What a model's source had in which form, so that whatever could read the source can read what is saved of
it.

transformers 5 writes forms that 4 does not read: `rope_parameters` in place of `rope_theta`, a tokenizer
class of its own, a list of special tokens where a mapping was, infinities as mappings. So a saved file starts
from the source's: a key that stands there as it was loaded keeps the source's value and form, one that has
changed since has the new value, and what the library adds is added. Names are compared in the library's own
writing: of the source, read again, and of what is saved.
"""

import contextlib
import copy
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import cached_file

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_OF_PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
# without what was added
_OF_PIECES = ("tokenizer.model", "spiece.model", "vocab.json", "merges.txt", "vocab.txt")
_OF_ADDED = ("added_tokens.json", "special_tokens_map.json")
_OF_ALL = ("tekken.json",)
_TEMPLATE, _TEMPLATE_OF_PROCESSOR = "chat_template.jinja", "chat_template.json"
_NAMES_WEIGHTS_TYPE = ("dtype", "torch_dtype")
# How it loaded the tokenizer, which is no part of what it is, and another name that 5.0 has for the source's
# special tokens.
_SAID_BY_THE_LIBRARY = ("backend", "is_local", "local_files_only", "model_specific_special_tokens")
# what is saved is plain, where it was loaded so
_OF_OTHER_WEIGHTS = ("quantization_config", "compression_config")
_VERSION, _DERIVED = "transformers_version", "_from_model_config"
_LOADED_FROM_FILES = "_weight_conversions"  # transformers sets it where weights were read
# transformers sets it where it read one, and where it read quantised weights, which are refused
_FROM_GGUF = "hf_quantizer"
_KEPT = "_source_form"


@dataclass(frozen=True)
class ModelForm:
    """Of the folder that a model was loaded from; all empty for one made from a configuration."""

    config: dict[str, Any] = field(default_factory=dict)
    generation: dict[str, Any] = field(default_factory=dict)
    types: dict[str, torch.dtype] = field(default_factory=dict)  # of the weights, by their names in the files
    # the type of most weights; None: the files hold none, or they were not read
    most: torch.dtype | None = None
    # of a processor, which a model of images needs beside it
    files: dict[str, bytes] = field(default_factory=dict)

    def type_of(self, name: str) -> torch.dtype | None:
        """Of a weight by its name in the model; files may leave out the first parts of it (GPT-2's
        `h.0.ln_1.weight`).

        Of a weight that the files do not know all of that last name decide, where they agree, else most.
        """
        parts = name.split(".")
        for first in range(len(parts) - 1):
            if (dtype := self.types.get(".".join(parts[first:]))) is not None:
                return dtype
        last = parts[-1]
        alike = {dtype for other, dtype in self.types.items() if other.rpartition(".")[2] == last}
        return alike.pop() if len(alike) == 1 else self.most


@dataclass(frozen=True)
class TokenizerForm:
    """Of the folder that a tokenizer was loaded from: its small files as they are."""

    config: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)


def weights_were_read(model: PreTrainedModel) -> bool:
    """Out of files, not drawn at random. True on meta, where nobody knows."""
    return (
        _LOADED_FROM_FILES in model.__dict__ or was_gguf(model) or any(p.is_meta for p in model.parameters())
    )


def was_gguf(model: PreTrainedModel) -> bool:
    return _FROM_GGUF in model.__dict__


def model_form(model: PreTrainedModel) -> ModelForm:
    """Read at the first call and kept with the model: the source may be gone when the run ends."""
    kept = model.__dict__.get(_KEPT)
    if not isinstance(kept, ModelForm):
        # What lies beside a GGUF file is said of other weights: of the model before it was quantised, or of
        # another.
        folder = None if was_gguf(model) else _folder(model.config._name_or_path)
        kept = _read_model(folder, weights=_LOADED_FROM_FILES in model.__dict__)
        model.__dict__[_KEPT] = kept
    return kept


def tokenizer_form(tokenizer: PreTrainedTokenizerBase) -> TokenizerForm:
    """As `model_form`."""
    kept = tokenizer.__dict__.get(_KEPT)
    if not isinstance(kept, TokenizerForm):
        names = {
            *_OF_PIECES,
            *_OF_ADDED,
            *_OF_ALL,
            *tokenizer.vocab_files_names.values(),
            TOKENIZER,
            _TEMPLATE,
            _TEMPLATE_OF_PROCESSOR,
        }
        folder = _folder(tokenizer.name_or_path)
        kept = (
            TokenizerForm()
            if folder is None
            else TokenizerForm(_json(folder / TOKENIZER_CONFIG), _files(folder, names))
        )
        tokenizer.__dict__[_KEPT] = kept
    return kept


def in_the_models_names(form: ModelForm, twin: PreTrainedModel, state: Mapping[str, Tensor]) -> ModelForm:
    """The types of the source's weights also by the names that the model has for them.

    transformers renames weights as it reads them (Mixtral's `block_sparse_moe.gate` is `mlp.gate`) and stacks
    experts in one; what it will write for each of ours it tells here, of tensors without memory. A stack has
    the widest of its parts' types.
    """
    empty = {
        name: torch.empty_like(value, device="meta")
        for name, value in state.items()
        if value.is_floating_point()
    }
    if not form.types or form.types.keys() >= empty.keys():
        return form

    def written(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with contextlib.suppress(Exception):  # of any operation, which may need more than this one tensor
            return revert_weight_conversion(twin, dict(tensors))
        return {}

    renamed = {id(value): name for name, value in written(empty).items()}
    found: dict[str, torch.dtype] = {}
    for name, value in empty.items():
        if name not in form.types:
            names = [renamed[id(value)]] if id(value) in renamed else written({name: value})
            for dtype in {form.types[one] for one in names if one in form.types}:
                found[name] = torch.promote_types(found.get(name, dtype), dtype)
    return replace(form, types={**form.types, **found})


def readable_config(model: PreTrainedModel, form: ModelForm, folder: Path, *, retyped: bool) -> None:
    """Mend the config.json that transformers has written into `folder`; retyped: the weights are not in the
    source's types."""
    path = folder / "config.json"
    now = json.loads(path.read_text(encoding="utf-8"))
    if form.config.get("model_type") == now.get("model_type"):
        try:
            then = json.loads(type(model.config).from_dict(copy.deepcopy(form.config)).to_json_string())
        except Exception:  # of any library's class: what it cannot read twice is left as it was written
            then = {}
        named = next((form.config[name] for name in _NAMES_WEIGHTS_TYPE if form.config.get(name)), None)
        dtype = now["dtype"] if retyped or named is None else named
        made = _in_the_form_of(form.config, _untyped(then), _untyped(now), model.config.attribute_map)
        _write(path, {**(_typed(made, dtype) if retyped else made), "dtype": dtype})
    for name, content in form.files.items():
        (folder / name).write_bytes(content)


def write_generation(settings: GenerationConfig | None, form: ModelForm, folder: Path) -> None:
    """generation_config.json: all settings that the source has, also those for which transformers refuses to
    write it."""
    if settings is None:
        return
    now = json.loads(settings.to_json_string(keys_to_pop=["compile_config"]))
    try:
        then = (
            json.loads(GenerationConfig.from_dict(copy.deepcopy(form.generation)).to_json_string())
            if form.generation
            else {}
        )
    except Exception:  # as above
        then = {}
    made = _in_the_form_of(form.generation, then, now, {})
    if any(then.get(name) != now.get(name) for name in {*then, *now} - {_VERSION, _DERIVED}):
        # with it transformers 4 may derive them anew when it generates, without what was set here
        made.pop(_DERIVED, None)
    _write(folder / "generation_config.json", made)


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """The tokenizer as it is now, in the source's form: class, special tokens, places of the chat template,
    vocabularies."""
    form = tokenizer_form(tokenizer)
    source, files = form.config, form.files
    inside = "chat_template" in source
    apart = _TEMPLATE in files
    # Asked only where it is needed: tokenizers that are no Hugging Face ones do not know the word.
    how: dict[str, Any] = {"save_jinja_files": False} if inside and not apart else {}
    tokenizer.save_pretrained(folder, **how)
    path = folder / TOKENIZER_CONFIG
    if not (source or files) or not path.exists():
        return
    now = json.loads(path.read_text(encoding="utf-8"))
    # What this version of the library writes of its own accord, older readers may not take.
    for name in _SAID_BY_THE_LIBRARY:
        if name not in source:
            now.pop(name, None)
    if "tokenizer_class" in source:
        now["tokenizer_class"] = source["tokenizer_class"]
    else:
        now.pop("tokenizer_class", None)
    _old_special_tokens(source, now)
    template = tokenizer.chat_template
    if inside and apart and template is not None:
        named = isinstance(template, dict)
        now["chat_template"] = (
            [{"name": n, "template": t} for n, t in template.items()] if named else template
        )
    # The source's own vocabularies beside tokenizer.json, as long as they are those of this tokenizer.
    pieces, added = _same_tokens(form, folder)
    if "added_tokens_decoder" in source or not added:  # what pieces leave out is found there
        now["added_tokens_decoder"] = {
            str(id): token.__getstate__() for id, token in tokenizer.added_tokens_decoder.items()
        }
    _write(path, {**{name: value for name, value in source.items() if name != "chat_template"}, **now})
    # A template changed in the run would else be there in two versions.
    if _TEMPLATE_OF_PROCESSOR in files:
        was = (source.get("chat_template"), files.get(_TEMPLATE, b"").decode("utf-8", "replace"))
        if isinstance(template, str) and template not in was:
            _write(folder / _TEMPLATE_OF_PROCESSOR, {"chat_template": template})
        else:
            (folder / _TEMPLATE_OF_PROCESSOR).write_bytes(files[_TEMPLATE_OF_PROCESSOR])
    for name, content in files.items():
        fits = pieces and (added or name in _OF_PIECES)
        if fits and name not in (_TEMPLATE, _TEMPLATE_OF_PROCESSOR) and not (folder / name).exists():
            (folder / name).write_bytes(content)


def _old_special_tokens(source: Mapping[str, Any], now: dict[str, Any]) -> None:
    """transformers 4 takes `extra_special_tokens` as a mapping only, and fails on the list that 5 writes."""
    extra = now.get("extra_special_tokens")
    if not isinstance(extra, list) or isinstance(source.get("extra_special_tokens"), list):
        return
    del now["extra_special_tokens"]
    was = source.get("additional_special_tokens")
    same = isinstance(was, list) and _contents(was) == _contents(extra)
    now["additional_special_tokens"] = was if same else extra


def _contents(tokens: Iterable[Any]) -> list[Any]:
    return [token.get("content") if isinstance(token, Mapping) else token for token in tokens]


def _same_tokens(form: TokenizerForm, folder: Path) -> tuple[bool, bool]:
    """Whether the saved tokenizer.json has the source's pieces, and its added tokens: then its vocabulary
    files still hold.

    Of what else a model of tokens says (its unknown token, empty affixes) transformers 5 writes some
    differently.
    """
    now = _json(folder / TOKENIZER)
    if TOKENIZER in form.files:
        then = _parsed(form.files[TOKENIZER])
        pieces, added = (bool(now) and part(now) == part(then) for part in (_pieces, _added))
        return pieces, added
    named = json.dumps(form.config) + "".join(
        json.dumps(_parsed(form.files.get(name, b""))) for name in _OF_ADDED
    )
    same = all(json.dumps(token)[1:-1] in named for token in _contents(now.get("added_tokens") or []))
    return same, same


def _pieces(tokenizer: Mapping[str, Any]) -> Any:
    model = tokenizer.get("model") or {}
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges") or []]
    return model.get("vocab"), merges


def _added(tokenizer: Mapping[str, Any]) -> dict[Any, Any]:
    return {token.get("id"): token.get("content") for token in tokenizer.get("added_tokens") or []}


def _in_the_form_of(
    source: Mapping[str, Any], then: Mapping[str, Any], now: Mapping[str, Any], aliases: Mapping[str, str]
) -> dict[str, Any]:
    """`now`, where it says the same as `then` said of `source` in the words of `source`."""
    made = dict(now)
    for name, value in source.items():
        own = aliases.get(name, name)
        if name in now:
            if name in then and then[name] == now[name]:
                made[name] = value
            elif all(isinstance(part.get(name), Mapping) for part in (source, then, now)):
                made[name] = _in_the_form_of(value, then[name], now[name], {})
        # at its default, or what the library calls otherwise
        elif name not in then and name not in _OF_OTHER_WEIGHTS:
            made[name] = value if then.get(own) == now.get(own) else now.get(own)
    if _VERSION in now:
        made[_VERSION] = now[_VERSION]
    return made


def _typed(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Every place that names the type of the weights, also of a part, names the one they are saved in."""
    for name, value in config.items():
        if name in _NAMES_WEIGHTS_TYPE:
            config[name] = dtype
        elif isinstance(value, dict):
            _typed(value, dtype)
    return config


def _untyped(config: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in config.items() if name not in _NAMES_WEIGHTS_TYPE}
    return {name: _untyped(value) if isinstance(value, dict) else value for name, value in kept.items()}


def _read_model(folder: Path | None, *, weights: bool) -> ModelForm:
    if folder is None:
        return ModelForm()
    types: dict[str, torch.dtype] = {}
    sizes: Counter[torch.dtype] = Counter()
    index = _json(folder / INDEX).get("weight_map")
    for name in sorted(
        {WEIGHTS} if not isinstance(index, dict) else {Path(str(file)).name for file in index.values()}
    ):
        if weights and (folder / name).is_file():
            with contextlib.suppress(SafetensorError, OSError), safe_open(folder / name, "pt") as file:
                for tensor in file.keys():  # noqa: SIM118 (no mapping)
                    part = file.get_slice(tensor)
                    if (dtype := _TYPES.get(part.get_dtype())) is not None:
                        types[tensor] = dtype
                        sizes[dtype] += torch.Size(part.get_shape()).numel()
    most = sizes.most_common(1)[0][0] if sizes else None
    config, generation = _json(folder / "config.json"), _json(folder / "generation_config.json")
    return ModelForm(config, generation, types, most, _files(folder, _OF_PROCESSORS))


def _folder(name: str | None) -> Path | None:
    """Where a path or hub id lies on this disk. None: nowhere, as for what was made from a configuration."""
    if not name:
        return None
    if Path(name).is_dir():
        return Path(name)
    for file in ("config.json", TOKENIZER_CONFIG):
        with contextlib.suppress(OSError, ValueError):
            if found := cached_file(
                name, file, local_files_only=True, _raise_exceptions_for_missing_entries=False
            ):
                return Path(found).parent
    return None


def _files(folder: Path, names: Iterable[str]) -> dict[str, bytes]:
    found = {}
    for name in sorted(set(names)):
        with contextlib.suppress(OSError):
            found[name] = (folder / name).read_bytes()
    return found


def _json(path: Path) -> dict[str, Any]:
    try:
        return _parsed(path.read_bytes())
    except OSError:
        return {}


def _parsed(content: bytes) -> dict[str, Any]:
    with contextlib.suppress(ValueError, RecursionError):
        read = json.loads(content)
        if isinstance(read, dict):
            return read
    return {}


def _write(path: Path, values: Mapping[str, Any]) -> None:
    text = json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False)
    path.write_text(f"{text}\n", encoding="utf-8")
