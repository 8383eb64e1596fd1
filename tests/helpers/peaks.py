"""The fullest moment of whole updates, counted storage by storage on a GPU that is not there, beside what
`memory.model_size` says of it. `python -m tests.helpers.peaks` prints the table of docs/memory.md."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from repsft_fast.config import Config
from repsft_fast.memory.peak import Peak
from repsft_fast.sizing.known_models import MODELS
from repsft_fast.state import local
from repsft_fast.training import step
from repsft_fast.training.build import model_on_meta
from repsft_fast.training.sizes import sizes_of
from repsft_fast.training.snapshots import closed_list
from tests.helpers import runs
from tests.helpers.fake_runs import fake_run

BF16 = {"optim__name": "adamw8bit", "model__param_dtype": "bfloat16"}
LORA = {"model__lora": {"rank": 16}}


def recompute(which: str) -> dict[str, Any]:
    return {"model__activation_checkpointing": which}


@dataclass(frozen=True)
class Case:
    """An update of `rows` rows of two samples, half of each trained."""

    model: str
    row_tokens: int
    changes: dict[str, Any]
    rows: int = 2
    vocabulary: int | None = None  # another than the model's

    @property
    def name(self) -> str:
        said = [self.model, f"{self.rows} × {self.row_tokens:,}"]
        words = {
            "adamw8bit": "adamw8bit",
            "bfloat16": "bf16 weights",
            "full": "full",
            "selective": "selective",
        }
        said += [words[value] if isinstance(value, str) else "lora" for value in self.changes.values()]
        return ", ".join(said + ([f"V = {self.vocabulary:,}"] if self.vocabulary else []))

    def config(self, layers: int | None = None) -> dict[str, Any]:
        """The architecture, perhaps cut to so many layers."""
        made = {**MODELS[self.model], "pad_token_id": 0, "max_position_embeddings": 40960}
        made["num_hidden_layers"] = layers or made["num_hidden_layers"]
        made["vocab_size"] = self.vocabulary or made["vocab_size"]
        return made

    def settings(self) -> dict[str, Any]:
        rows = {"batch__samples": 2 * self.rows, "batch__row_tokens": self.row_tokens}
        return {**rows, "data__max_tokens": self.row_tokens, **self.changes}


CASES = (
    Case("SmolLM2-135M", 2048, {}),
    Case("SmolLM2-135M", 8192, recompute("full")),
    Case("Qwen3-0.6B", 8192, {}),
    Case("Qwen3-0.6B", 8192, {}, rows=1),
    Case("Qwen3-0.6B", 8192, {}, vocabulary=2_000),
    Case("Qwen3-1.7B", 8192, recompute("selective")),
    Case("Qwen3-1.7B", 8192, LORA),
    Case("Qwen3-4B", 2048, {"optim__name": "adamw8bit"}),
    Case("Qwen3-4B", 8192, {**BF16, **recompute("full")}),
    Case("Llama-3.1-8B", 8192, {**BF16, **recompute("full")}),
    Case("Llama-3.1-8B", 8192, {**LORA, **recompute("full")}, rows=1),
)


def counted(case: Case, layers: int | None = None) -> int:
    """The most bytes that live in the second update."""
    patches = pytest.MonkeyPatch()
    try:
        with tempfile.TemporaryDirectory() as folder:
            more = {**case.settings(), "tokens": case.row_tokens // 2 + 1}
            with fake_run(patches, Path(folder), case.config(layers), every=10**9, meta=True, **more) as (
                _,
                parts,
            ):
                peak, epoch = Peak("cuda"), parts.plan.epoch(0, 0)
                with peak:
                    held = [*parts.model.parameters(), *parts.model.buffers(), *parts.optimizer.held.values()]
                    peak.see([tensor.detach() for tensor in held])
                    peak.see([local(tensor) for tensor in closed_list(parts).tensors().values()])
                    step.train_step(parts, epoch[0])
                    assert len(epoch[1].ranks[0]) == case.rows
                    peak.forget()
                    step.train_step(parts, epoch[1])
                return peak.most
    finally:
        patches.undo()


def predicted(case: Case, layers: int | None = None) -> int:
    with tempfile.TemporaryDirectory() as folder:
        made = runs.settings(Path(folder), **case.settings())
    made["model"] |= {"config": case.config(layers), "compute_dtype": "bfloat16"}
    config = Config.of(made)
    sizes = sizes_of(config, model_on_meta(config, None))
    assert sizes.saved is not None, sizes.why
    trained = 2 * (case.row_tokens // 4)
    of = {"trained": trained, "rows": case.rows}
    return sizes.model.peak(
        config.optim.name, case.row_tokens, sizes.saved, config.model.activation_checkpointing, **of
    ).total


def table() -> str:
    lines = ["| configuration | predicted | counted | predicted / counted |", "| --- | ---: | ---: | ---: |"]
    for case in CASES:
        said, found = predicted(case), counted(case)
        lines.append(f"| {case.name} | {said / 1e9:.2f} GB | {found / 1e9:.2f} GB | {said / found:.3f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
