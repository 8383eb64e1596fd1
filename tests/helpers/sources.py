"""Model folders as transformers 4 writes them, and where a saved folder differs from the one it was loaded
from."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from repsft_fast.models import load_model, load_tokenizer, save_pretrained
from repsft_fast.models.targets import all_linear, shortest
from tests.helpers.architectures import VOCABULARY, tiny_config

THETA = 5000.0
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
# Architecture → what transformers 4 writes of it at the top level of config.json in place of rope_parameters.
OLD_FORMS = {
    "llama": {"rope_theta": THETA, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "qwen3": {"rope_theta": THETA, "rope_scaling": None},
    "gemma3_text": {"rope_theta": THETA, "rope_local_base_freq": 700.0, "rope_scaling": None},
    "gpt_neox": {"rotary_emb_base": int(THETA), "rotary_pct": 0.5},
    "glm": {"rope_theta": THETA, "partial_rotary_factor": 0.5},
    "mixtral": {"rope_theta": THETA},
    "gpt2": {},
    "mamba2": {"time_step_limit": [0.0, float("inf")]},
}
NEWER = "what the library adds, beside the old form"
# Where a saved folder differs from its source though nothing was trained, and why.
DIFFERENCES = {
    ("config.json", "transformers_version"): "the writer's",
    ("config.json", "rope_parameters"): NEWER,
    ("config.json", "tie_word_embeddings"): NEWER,
    ("config.json", "add_cross_attention"): NEWER,
    ("config.json", "eod_token_id"): NEWER,
    ("config.json", "full_attn_idxs"): NEWER,
    ("config.json", "no_rope_layer_interval"): NEWER,
    ("config.json", "decoder_start_token_id"): NEWER,
    ("config.json", "cross_attention_hidden_size"): NEWER,
    ("config.json", "suppress_tokens"): NEWER,
    ("generation_config.json", "transformers_version"): "the writer's",
    ("tokenizer.json", "post_processor"): "none became an empty one",
}


def write_source(folder, kind="llama", *, dtype=torch.bfloat16, **config):
    """A model folder as transformers 4 writes it, with its tokenizer."""
    torch.manual_seed(1)
    made = tiny_config(kind)
    AutoModelForCausalLM.from_config(made, dtype=dtype).save_pretrained(folder)
    written = read(folder / "config.json")
    for name in ("rope_parameters", "dtype", "_experts_implementation", "tie_word_embeddings"):
        written.pop(name, None)
    written |= {
        "torch_dtype": str(dtype).removeprefix("torch."),
        "transformers_version": "4.40.0",
        **OLD_FORMS[kind],
        **config,
    }
    write(folder / "config.json", written)
    words = {f"w{i}": i for i in range(VOCABULARY - 2)}
    added = [
        token(0, "w0"),
        token(2, "w2"),
        token(VOCABULARY - 2, "<tool>"),
        token(VOCABULARY - 1, "<think>", special=False),
    ]
    write(folder / "tokenizer.json", {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "w0"},
    })  # fmt: skip
    special = {"eos_token": "w2", "pad_token": "w0", "additional_special_tokens": ["<tool>"]}
    decoder = {str(one["id"]): {name: value for name, value in one.items() if name != "id"} for one in added}
    write(folder / "tokenizer_config.json", {
        **special, "added_tokens_decoder": decoder, "chat_template": TEMPLATE, "clean_up_tokenization_spaces": False,
        "extra_special_tokens": {}, "model_max_length": 77, "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
    })  # fmt: skip
    write(folder / "special_tokens_map.json", special)
    return folder


def token(number, content, *, special=True):
    kinds = {
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": not special,
        "special": special,
    }
    return {"id": number, "content": content, **kinds}


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def write(path, values):
    path.write_text(json.dumps(values), encoding="utf-8")


def change(path, **values):
    write(path, {**read(path), **values})


def saved(source, result, *, load=None, **options):
    """The model, saved untrained; what was said of it."""
    model = load_model(source, **(load or {}))
    return model, save_pretrained(model, load_tokenizer(source), result, **options)


def differences(source, result):
    """(file, key) of every difference; (file, None) where only one has it, or another mode."""
    found = set()
    for name in {file.name for folder in (source, result) for file in folder.iterdir()}:
        if not all((folder / name).exists() for folder in (source, result)):
            found.add((name, None))
        elif name.endswith(".json"):
            old, new = (read(folder / name) for folder in (source, result))
            found |= {
                (name, key)
                for key in {*old, *new}
                if (key in old, old.get(key)) != (key in new, new.get(key))
            }
        elif name.endswith(".safetensors"):
            old, new = (load_file(folder / name) for folder in (source, result))
            found |= {(name, key) for key in {*old, *new} if not same(old.get(key), new.get(key))}
    return found


def same(old, new):
    return old is not None and new is not None and old.dtype == new.dtype and torch.equal(old, new)


def named_stacks(kind: str) -> list[str]:
    """Names by which settings mean the experts that an architecture keeps in one parameter; skips those
    without a tiny model."""
    try:
        with torch.device("meta"):
            shape = AutoModelForCausalLM.from_config(tiny_config(kind))
    except Exception as error:
        pytest.skip(f"transformers {transformers.__version__} makes no {kind}: {error}")
    if sum(p.numel() for p in shape.parameters()) > 2e7:
        pytest.skip("no tiny model")
    stacks = next(
        (names for why, names in all_linear(shape, lambda _: False)[1].items() if "experts in one" in why), ()
    )
    return shortest(stacks, [name for name, _ in shape.named_parameters() if name not in stacks], parts=2)
