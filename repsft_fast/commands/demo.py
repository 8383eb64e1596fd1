"""`repsft demo`: a small Llama, a tokenizer made on the spot, procedurally generated reasoning tasks, many
epochs.

Nothing is downloaded. The same trainer, settings and files as a real run; only the data and the weights are
small.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from repsft_fast.config import Config
from repsft_fast.data.gym import gym_rows
from repsft_fast.errors import ConfigError, describe
from repsft_fast.evaluate.answers import final_answer, same_answer
from repsft_fast.report import visible
from repsft_fast.report.result import RunResult
from repsft_fast.rundir.folder import HoldsARun
from repsft_fast.training.trainer import train

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
        build_tokenizer(
            [message["content"] for row in rows for message in row["messages"]], VOCABULARY, target
        )
    return target


def demo(folder: str) -> RunResult | None:
    """Make the tokenizer, train the small model until it has memorised its data, show its answers to held-out
    prompts."""
    target = Path(Config.of("demo", {"run.folder": folder}).run.folder)  # ~ and variables filled in
    tokenizer = prepare(target.parent / f"{target.name}-tokenizer")
    try:
        result = train(Config.of("demo", {"run.folder": folder, "tokenizer.path": str(tokenizer)}))
    except HoldsARun as error:
        todo = "give a new one: --folder"  # the demo has no --resume
        raise ConfigError(describe("--folder", "holds another run", got=folder, todo=todo)) from error
    if result is not None:
        show_answers(result.more.get("answers", []))
        print(
            "\nSmall, from random weights: it keeps most of what it has seen and guesses the rest."
            " A pretrained one learns from it:"
        )
        print("  repsft train --config smollm2")
    return result


def show_answers(answers: list[dict[str, Any]]) -> None:
    """Prompts, the model's greedy answer and the reference, marked right or wrong; trained ones first, then
    held-out ones."""
    console = visible.console()
    for seen, prompts in itertools.groupby(answers, key=lambda answer: answer["seen"]):
        visible.show(console, f"\n{'Trained on' if seen else 'Never seen'}", "bold")
        _show_answers(console, list(prompts))


def _show_answers(console: Any, answers: list[dict[str, Any]]) -> None:
    for answer in answers:
        reference = final_answer(answer["reference"]) or ""
        right = same_answer(final_answer(answer["answer"]), reference)
        prompt = _short(visible.visible(answer["prompt"].strip(), "\n"), 300)
        visible.show(console, f"\n{visible.one_line(answer['task'])}: {prompt}", "dim")
        reply = _short(visible.visible(answer["answer"].strip(), "\n"), 400)
        visible.show(console, "  " + reply.replace("\n", "\n  "))
        verdict = "right" if right else f"wrong, expected {visible.one_line(reference)}"
        visible.show(console, f"  {'✓' if right else '✗'} {verdict}", "green" if right else "red")


def _short(text: str, limit: int) -> str:
    text = text.strip()
    return text if len(text) <= limit else text[:limit] + " …"
