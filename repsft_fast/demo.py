"""`repsft demo`: a small Llama, a tokenizer made on the spot, procedurally generated reasoning tasks, many epochs.

Nothing is downloaded. The same trainer, settings and files as a real run; only the data and the weights are small.
"""

from pathlib import Path

from repsft_fast.config import Config
from repsft_fast.data.gym import gym_rows

USER, ASSISTANT, END, PAD = "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>"
# The reply and its end token are what is trained on: transformers' {% generation %} block says so.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    + ASSISTANT
    + "{% generation %}{{ message['content'] }}"
    + END
    + "{% endgeneration %}"
    "{% else %}" + USER + "{{ message['content'] }}" + END + "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}" + ASSISTANT + "{% endif %}"
)
VOCABULARY = 1024


def build_tokenizer(texts: list[str], vocabulary: int, folder: Path) -> None:
    """Train a byte-level BPE tokenizer on `texts` and save it, chat template included, for AutoTokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, USER, ASSISTANT, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=END)
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)


def prepare(folder: Path) -> Path:
    """Make the demo's tokenizer from its own training texts under `folder` (once) and return its folder."""
    target = folder / "tokenizer"
    if not (target / "tokenizer.json").exists():
        sources = Config.of("demo").data.train
        assert isinstance(sources, dict)
        rows = [row for source in sources.values() for row in gym_rows(str(source))]
        build_tokenizer([message["content"] for row in rows for message in row["messages"]], VOCABULARY, target)
    return target
