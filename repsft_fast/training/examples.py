"""A few prompts answered by the model as it is: what the figures mean, to look at."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from repsft_fast.data.sample import Sample
from repsft_fast.evaluate.generate import generate
from repsft_fast.models import stops_of
from repsft_fast.training.parts import Parts

if TYPE_CHECKING:
    from repsft_fast.training.reporter import Reporter


def show_answers(parts: Parts, reporter: Reporter, *groups: Sequence[Sample] | None) -> list[dict[str, Any]]:
    """`answer_examples` of each group, told. They only show: what goes wrong is a note, but on several ranks, which answer
    together and would wait for one that gave up."""
    found: list[dict[str, Any]] = []
    with reporter.only_reports("answers to prompts") if parts.world.size == 1 else nullcontext():
        for samples in groups:
            found += answer_examples(parts, samples)
    for answer in found:
        reporter.event("answer", answer)
    return found


def answer_examples(parts: Parts, samples: Sequence[Sample] | None = None) -> list[dict[str, Any]]:
    """The model's own answers to a few prompts, beside the reference. Greedy. Empty without a tokenizer.

    Of `samples`, or of the held-out ones; `seen` says whether a prompt was trained on.
    """
    seen = (samples is None and not parts.data.held_out) or samples is parts.data.seen
    examples = samples if samples is not None else parts.data.held_out or parts.data.seen
    if parts.tokenizer is None or not examples:
        return []
    prompts = [sample.ids[: sample.trained.index(True)] for sample in examples]
    # Where the saved model stops. Rows without an end of their own have none but the tokenizer's.
    end_ids = sorted({*stops_of(parts.model), parts.tokenizer.eos_token_id} - {None})
    replies = generate(
        parts.model,
        prompts,
        end_ids=end_ids,
        max_new_tokens=parts.config.evaluate.generate_tokens,
        pad_id=parts.tokenizer.pad_token_id or 0,
    )
    decode = parts.tokenizer.decode
    return [
        {
            "task": sample.task,
            "seen": seen,
            "prompt": decode(prompt, skip_special_tokens=True),
            "reference": decode(sample.ids[len(prompt) :], skip_special_tokens=True),
            "answer": decode(reply.ids, skip_special_tokens=True),
            "finished": reply.finished,
        }
        for sample, prompt, reply in zip(examples, prompts, replies, strict=True)
    ]
