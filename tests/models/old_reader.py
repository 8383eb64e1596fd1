"""Runs under an old transformers, without ours: makes model folders as it writes them, reads what we made of
them.

    python old_reader.py make CONFIGS FOLDER     CONFIGS: JSON file {name: configuration}; FOLDER/NAME/source,
                                                 one of each
    python old_reader.py read FOLDER             logits of NAME/source and NAME/result, token ids of a text,
                                                 stops of generate

Both print one JSON object {name: what was found}.
"""

import json
import sys
import warnings
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, logging

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]])
TEXT = "w5 <tool> w6 <think> w7"
LARGEST = 5_000_000  # parameters
THETA = 5000.0  # no architecture's default: a reader that loses it computes something else


def make(configs, folder):
    found = {}
    for name, settings in configs.items():
        try:
            kind = settings.pop("model_type")
            config = AutoConfig.for_model(kind, **settings)
            for part in {id(c): c for c in (config, config.get_text_config())}.values():
                if getattr(part, "rope_theta", None) is not None:
                    part.rope_theta = THETA
            with torch.device("meta"):
                size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
            if size > LARGEST:
                raise ValueError(f"no small configuration is known: {size:,} parameters")
            torch.manual_seed(1)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
            model.save_pretrained(folder / name / "source")
            tokenizer(config.get_text_config().vocab_size).save_pretrained(
                folder / name / "source", save_jinja_files=False
            )
            found[name] = "made"
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"[:300]
    return found


def tokenizer(size):
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size - 2)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="w2", pad_token="w0", additional_special_tokens=["<tool>"]
    )
    made.add_tokens([AddedToken("<think>", special=False)])
    made.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return made


def read(folder):
    found = {}
    for place in sorted(path.parent for path in folder.glob("*/result")):
        seen = {}
        for name in ("source", "result"):
            try:
                seen[name] = look(place / name)
            except Exception as error:
                found[place.name] = {
                    "error": f"{type(error).__name__}: {error}"[:300],
                    "source": name == "source",
                }
                break
        else:
            source, result = seen["source"], seen["result"]
            difference = (source.pop("logits") - result.pop("logits")).abs().max().item()
            found[place.name] = {
                "difference": difference,
                "unlike": [key for key in source if source[key] != result[key]],
            }
    return found


def look(folder):
    """What a user sees of a model folder."""
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    with torch.no_grad():
        logits = model.eval()(input_ids=IDS, use_cache=False).logits
    words = AutoTokenizer.from_pretrained(folder)
    return {
        "logits": logits,
        "class": type(model).__name__,
        "loading": {key: sorted(map(str, value)) for key, value in report.items()},
        "generation": {
            k: v for k, v in model.generation_config.to_dict().items() if k != "transformers_version"
        },
        "tokenizer": type(words).__name__,
        "ids": words(TEXT)["input_ids"],
        "added": {str(token): str(value) for token, value in words.added_tokens_decoder.items()},
        "special": {key: str(value) for key, value in words.special_tokens_map.items()},
        "chat": words.apply_chat_template([{"role": "user", "content": "w5"}], tokenize=False),
    }


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    if sys.argv[1] == "make":
        print(json.dumps(make(json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3]))))
    else:
        print(json.dumps(read(Path(sys.argv[2]))))
