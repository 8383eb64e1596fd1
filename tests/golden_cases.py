"""The runs of tests.golden: a tiny model, its tokenizer and rows, and what is asked of `python -m repsft_fast` with them.

Nothing of the package is imported and nothing here follows the other tests, so that two trees can be asked the same.
"""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIALS = ("<|im_start|>", "<|im_end|>", "<|begin|>")
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": True,
}  # fmt: skip
PLAIN_IDS = {
    "model_type": "llama",
    "vocab_size": 61,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    **SIZES,
}
COLOURS = ("red", "red", "red", "blue")  # so that a guess can be right


def material(folder: Path) -> None:
    """model/ with its tokenizer and the rows, the same bytes at every call."""
    folder.mkdir(parents=True)
    _write_model(folder / "model")
    draw = random.Random(5)
    chats = [_chat(draw, number % 3) for number in range(48)]
    _lines(folder / "chats.jsonl", chats)
    _lines(folder / "few.jsonl", chats[:6])
    _lines(folder / "held_out.jsonl", [_chat(draw, number % 3) for number in range(9)])
    _lines(folder / "test.jsonl", [_chat(draw, number % 3) for number in range(6)])
    _lines(folder / "ids.jsonl", [_ids(draw, number % 3) for number in range(24)])
    odd = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "ZQ#@!~^|{}Z"}]}
    same = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "yes"}]}
    _lines(folder / "same.jsonl", [same] * 48)
    _lines(folder / "odd.jsonl", [odd if number % 80 == 7 else same for number in range(320)])


def _lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _chat(draw: random.Random, task: int) -> dict[str, Any]:
    """A task of sums, one of colours that follow no rule, one of repeated letters."""
    a, b = draw.randint(0, 9), draw.randint(0, 9)
    asked, answer = {
        0: (f"{a}+{b}", str(a + b)),
        1: (f"colour {a}{b}", draw.choice(COLOURS)),
        2: (f"say {chr(97 + a)}", chr(97 + a) * (1 + b % 4)),
    }[task]
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    if draw.random() < 0.2:
        turns += [{"role": "user", "content": "and?"}, {"role": "assistant", "content": "no"}]
    return {"messages": turns, "task": ("sums", "colours", "letters")[task]}


def _ids(draw: random.Random, task: int) -> dict[str, Any]:
    n = draw.randint(6, 20)
    ids = [3 + (draw.randrange(18) + 7 * task) % 58 for _ in range(n)]
    return {"input_ids": ids, "labels": [-100] * (n // 2) + ids[n // 2 :], "task": f"task{task}"}


def _write_model(folder: Path) -> None:
    import torch
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*letters, "Ġa", "he", "ll"])}
    backend = Tokenizer(models.BPE(vocabulary, [("Ġ", "a"), ("h", "e"), ("l", "l")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIALS])
    end = SPECIALS[1]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=SPECIALS[2], eos_token=end, pad_token=end
    )
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    logging.disable_progress_bar()
    torch.manual_seed(11)
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = LlamaConfig(vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id, **ids, **SIZES)
    LlamaForCausalLM(config).save_pretrained(folder)


@dataclass(frozen=True)
class Step:
    """One command. `signal` is sent to all ranks once `after` updates are told in metrics.jsonl; `code` is the exit code due.

    RUN, CASE and ROWS in flags and settings stand for folders.
    """

    verb: str = "train"
    flags: tuple[str, ...] = ()
    settings: bool = True
    changes: Mapping[str, Any] = field(default_factory=dict)  # to the settings, from here on
    ranks: int = 1
    code: int = 0
    signal: int = 0
    after: int = 0
    cold: bool = False  # by a new interpreter
    prose: bool = False  # where its lines break does not matter


Facts = Mapping[str, Any]


@dataclass(frozen=True)
class Case:
    """`changes` are dotted settings; `holds` says of the facts whether what the case is for happened."""

    changes: Mapping[str, Any]
    holds: Callable[[Facts], bool]
    steps: tuple[Step, ...] = (Step(),)
    computed_only: bool = (
        False  # killed at no certain moment: what only tells of checkpoints and of work is left out
    )


BASE: dict[str, Any] = {
    "run.seed": 1,
    "model.path": "ROWS/model",
    "data.train": "ROWS/chats.jsonl",
    "batch.samples": 8,
    "batch.row_tokens": 128,
    "optim.lr": 1e-2,
    "budget.epochs": 4,
    "stop.token_accuracy": None,
    "log.every_updates": 5,
    "evaluate.generate_samples": 0,
}
IDS = {
    "model.path": None,
    "model.config": PLAIN_IDS,
    "data.train": "ROWS/ids.jsonl",
    "batch.samples": 4,
    "batch.row_tokens": 64,
}
MIXTURE = {
    "data.task_column": "task", "data.validation_fraction": 0.25, "schedule.name": "constant", "budget.epochs": 60,
    "mixture.policy": "msft", "mixture.max_stages": 4,
}  # fmt: skip
EAGER = {
    "mixture.z": 0.0,
    "mixture.patience": 1,
    "mixture.min_looks": 0,
    "mixture.rehearsal": 0.0,
    "mixture.compute_budget": 3,
    "optim.lr": 3e-2,
}
LEARNT = {"run.folder": "CASE/learnt"}  # a run whose model the next step begins with
FROM_LEARNT = {"run.folder": "RUN", "model.path": "CASE/learnt"}
RESUME = Step(flags=("--resume",))


def ended_by(code: str) -> Callable[[Facts], bool]:
    return lambda facts: facts["result"].get("code") == code


def decided(*kinds: str) -> Callable[[Facts], bool]:
    """There is a line of each of these kinds, and more than one stage."""
    return lambda facts: (
        all(facts["kinds"].get(kind, 0) > 0 for kind in kinds) and facts["kinds"].get("stage", 0) > 1
    )


def reweighted(facts: Facts) -> bool:
    return any(line.get("decision") == "reweight" for line in facts["decisions"])


def told(facts: Facts) -> bool:
    """Nothing is trained: the exit codes say enough."""
    return True


budget = ended_by("budget")
KILL = Step(code=-signal.SIGKILL, signal=signal.SIGKILL, after=14)
TERMINATE = Step(code=128 + signal.SIGTERM, signal=signal.SIGTERM, after=10)
OFTEN = {"run.deterministic": True, "log.every_updates": 1, "checkpoint.every_updates": 4, "budget.epochs": 8}

CASES: dict[str, Case] = {
    "plain": Case({"data.train": "ROWS/few.jsonl", "budget.epochs": 20, "batch.samples": 3}, budget, (Step(cold=True),)),
    "lora": Case(
        {"model.lora": {"rank": 4, "dropout": 0.1, "merge": True}, "run.deterministic": True, "schedule.name": "linear"},
        budget,
        (Step(), Step("export", ("RUN", "--to", "CASE/exported", "--merge", "false"), settings=False)),
    ),
    "ranks": Case({"data.validation": "ROWS/held_out.jsonl", "run.deterministic": True}, budget, (Step(ranks=2),)),
    "killed": Case(OFTEN, budget, (KILL, RESUME), computed_only=True),
    "saturated": Case(
        {"data.train": "ROWS/few.jsonl", "budget.epochs": 80, "stop.token_accuracy": 0.97, "optim.lr": 2e-2},
        ended_by("token_accuracy"),
    ),
    "plateau": Case({"stop.plateau_epochs": 1, "stop.plateau_min_delta": 0.05, "budget.epochs": 40}, ended_by("plateau")),
    "msft": Case({**MIXTURE, **EAGER, "mixture.metric": "nll"}, decided("roll_back")),
    "msft_rewind": Case(
        {**MIXTURE, "mixture.rule": "paper", "mixture.metric": "exact_match", "mixture.optimizer": "restore",
         "mixture.schedule": "rewind", "mixture.data": "rewind", "mixture.rehearsal": 0.3},
        decided("roll_back"),
    ),
    "msft_answer": Case(
        {**LEARNT, "data.task_column": "task", "budget.epochs": 20},
        decided("roll_back"),
        (
            Step(),
            Step(changes={
                **FROM_LEARNT, **MIXTURE, **EAGER, "mixture.metric": "answer", "mixture.extractor": "whole",
                "mixture.answer_tokens": 6, "mixture.evaluations_per_epoch": 2, "data.test_fraction": 0.1,
            }),
        ),
    ),
    "msft_ranks": Case(
        {**MIXTURE, **EAGER, "mixture.metric": "nll", "mixture.temperature": 2.0}, decided("roll_back"), (Step(ranks=2),)
    ),
    "terminated": Case(
        {**MIXTURE, **EAGER, **OFTEN, "mixture.metric": "nll", "budget.epochs": 40, "optim.lr": 1e-2},
        decided("roll_back"),
        (TERMINATE, RESUME),
        computed_only=True,
    ),
    "sro": Case({**MIXTURE, "mixture.policy": "sro", "mixture.compute_budget": 3, "mixture.metric": "nll"}, decided("stage")),
    "dynamix": Case({**MIXTURE, "mixture.policy": "dynamix", "mixture.compute_budget": 12}, reweighted),
    "extended": Case(
        {"run.deterministic": True}, budget, (Step(), Step(flags=("--resume",), changes={"budget.epochs": 6}))
    ),
    "validated": Case(
        {"data.validation": "ROWS/held_out.jsonl", "data.test": "ROWS/test.jsonl", "evaluate.keep": "best",
         "checkpoint.keep_best": True, "evaluate.generate_samples": 2, "evaluate.generate_tokens": 6, "optim.lr": 3e-2,
         "evaluate.every_epochs": 0.5, "optim.weight_decay": 0.1},
        budget,
    ),
    "spikes": Case(
        {**LEARNT, "data.train": "ROWS/same.jsonl", "batch.samples": 2, "schedule.name": "constant"},
        lambda facts: facts["result"]["spiked"] > 0,
        (
            Step(),
            Step(changes={
                **FROM_LEARNT, "data.train": "ROWS/odd.jsonl", "budget.epochs": 1, "numbers.on_spike": "skip", "optim.lr": 1e-4,
            }),
        ),
    ),
    "skip_below": Case(
        {**IDS, "loss.skip_below": 0.3, "loss.average": "token", "batch.samples": None, "batch.tokens": 80,
         "budget.epochs": None, "budget.tokens": 6000, "optim.lr": 3e-2},
        budget,
    ),
    "adamw8bit": Case(
        {**IDS, "optim.name": "adamw8bit", "schedule.name": "cosine", "budget.epochs": None, "budget.updates": 30}, budget
    ),
    "words": Case(
        {},
        told,
        (
            Step(flags=("--dry-run",)),
            Step("doctor", settings=False),
            Step("doctor", ("--settings",), settings=False, prose=True),
            Step("inspect"),
            Step("train", ("--help",), settings=False, prose=True),
            Step(flags=("--dry-run", "--world", "2")),
            Step(flags=("--dry-run",), changes={"optim.name": "adam"}, code=2),
        ),
    ),
}  # fmt: skip
