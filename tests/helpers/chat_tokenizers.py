"""Tiny hand-made tokenizers and chat templates in the style of common models, for the tests of data."""

from functools import cache
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n'"
    " }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BLOCKS = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}{% endgeneration %}"
    "{% else %}{{ message.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message.role +"
    " '<|end_header_id|>\n\n' + message.content | trim + '<|eot_id|>' }}{% endfor %}{% if"
    " add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# As Qwen3's: thinking is kept in the turns after the last question only, and an empty one is written into the
# last turn.
QWEN3 = (
    "{%- set ns = namespace(last=0) %}{%- for message in messages %}{%- if message.role == 'user' %}{%- set"
    " ns.last = loop.index0 %}{%- endif %}{%- endfor %}{%- for message in messages %}{%- if message.role =="
    " 'assistant' %}{%- set content = message.content %}{%- set reasoning = '' %}{%- if"
    " message.reasoning_content is string %}{%- set reasoning = message.reasoning_content %}{%- elif"
    " '</think>' in content %}{%- set reasoning ="
    " content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}{%- set content ="
    " content.split('</think>')[-1].lstrip('\n') %}{%- endif %}{%- if loop.index0 > ns.last and (loop.last or"
    " reasoning) %}{{- '<|im_start|>assistant\n<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' +"
    " content.lstrip('\n') }}{%- else %}{{- '<|im_start|>assistant\n' + content }}{%- endif %}{{-"
    " '<|im_end|>\n' }}{%- else %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n'"
    " }}{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
SPECIALS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|begin|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)
END = "<|im_end|>"


@cache
def byte_level(template: str | None = CHATML, bos: str | None = "<|begin|>", eos: str | None = END) -> Any:
    """A byte-level BPE tokenizer with a few merges: 256 bytes, merges, specials, and <think> as Qwen3 has it
    (not special)."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "a"), ("h", "e"), ("Ċ", "Ċ"), ("l", "l"), ("Ġ", "he")]
    vocabulary = {
        token: number for number, token in enumerate([*letters, *("".join(pair) for pair in merges)])
    }
    backend = Tokenizer(models.BPE(vocabulary, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIALS])
    backend.add_tokens(
        [AddedToken(text, special=False, normalized=False) for text in ("<think>", "</think>")]
    )
    return _wrap(backend, template, bos, eos)


@cache
def metaspace(template: str | None = CHATML) -> Any:
    """A SentencePiece-like tokenizer that writes ▁ before the first word: text cannot be cut without changing
    its tokens."""
    letters = ["<unk>", "▁", "\n", *"abcdefghijklmnopqrstuvwxyz0123456789<|>_.,?!"]
    merges = [("▁", "a"), ("▁", "h")]
    vocabulary = {
        token: number for number, token in enumerate([*letters, *("".join(pair) for pair in merges)])
    }
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIALS])
    return _wrap(backend, template, None, END)


def _wrap(backend: Tokenizer, template: str | None, bos: str | None, eos: str | None) -> Any:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token=eos)
    tokenizer.chat_template = template
    return tokenizer


def trained_text(sample: Any, tokenizer: Any) -> str:
    """The trained tokens, decoded; what is not trained shows as one ·."""
    text, ids = "", []
    for token, flag in zip(sample.ids, sample.trained):
        if flag:
            ids.append(token)
        else:
            text, ids = text + (tokenizer.decode(ids) if ids else ""), []
            text += "" if text.endswith("·") else "·"
    return text + tokenizer.decode(ids)
