"""Of the suite: one real run on the device (a whole update, its MFU, what a checkpoint stalls), the checksum of a state,
and the head gradient finished in backward against finished at once."""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks import cases, harness, peers, predictions, records

UPDATES, LOG_EVERY = 24, 4
LARGE = {  # Qwen3-0.6B, drawn at random
    "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True,
    "max_position_embeddings": 4096, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SMALL = {**LARGE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 512}  # fmt: skip


def whole_run(session: Any) -> None:
    """Updates of 16 samples of 2,048 tokens through the trainer, a checkpoint every eight: times from its own metrics.

    The first reading holds the warm-up and is left out; readings in which a checkpoint was taken stay in, as in a real run.
    """
    if session.late("whole run"):
        return
    from repsft_fast.training.trainer import train

    large = session.device == "cuda"
    if large:
        torch.cuda.empty_cache()
    model, length = (LARGE, 2048) if large else (SMALL, 16)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = {
            "run": {"folder": str(folder / "run")},
            "model": {"config": model, **({} if large else {"compute_dtype": "float32"})},
            "data": {"train": str(_samples(folder, model["vocab_size"], length)), "cache_folder": str(folder / "cache")},
            "batch": {"samples": 16, "row_tokens": 8 * length},
            "budget": {"updates": UPDATES, "epochs": None},
            "stop": {"token_accuracy": None},
            "log": {"every_updates": LOG_EVERY},
            "checkpoint": {"every_updates": 8, "every_minutes": None, "keep_last": 1},
            "evaluate": {"generate_samples": 0},
        }
        train(settings)
        lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    read = [line for line in lines if line["kind"] == "update" and "tokens_per_second" in line][1:]
    stalls = [1e3 * line["stall_seconds"] for line in lines if line["kind"] == "checkpoint"]
    per_update = 16 * length
    made = {
        "whole update": [1e3 * per_update / line["tokens_per_second"] for line in read],
        "checkpoint stall": stalls,
    }
    print(f"\nwhole run of a {'0.6B' if large else 'tiny'} model, {per_update} tokens an update")
    for what, times in made.items():
        session.keep_record(
            records.make(
                session.environment, op="whole run", implementation=what, shape={"tokens": per_update, "updates": UPDATES},
                dtype="bfloat16" if large else "float32", times_ms=times, peak_bytes=int(read[-1]["memory_bytes"]),
            )
        )  # fmt: skip
    shares = sorted(line["mfu"] for line in read if line["mfu"])
    if shares:
        session.goal("whole update of 0.6B: MFU", shares[len(shares) // 2])
    else:
        session.named.append("MFU of a whole update: this device's peak is not known")
    session.goal("checkpoint stall / ten minutes", harness.quantile(stalls, 0.5) / (1e3 * 60 * 10))


def _samples(folder: Path, vocabulary: int, length: int) -> Path:
    """64 samples of tokens drawn at random, the second half of each trained."""
    draw = random.Random(0)
    path = folder / "train.jsonl"
    with path.open("w") as lines:
        for _ in range(64):
            ids = [draw.randrange(3, vocabulary) for _ in range(length)]
            lines.write(json.dumps({"input_ids": ids, "labels": [-100] * (length // 2) + ids[length // 2 :]}) + "\n")
    return path


def state_hash(session: Any) -> None:
    """The checksum of as many bytes as the snapshots hold, against one read of them."""
    if session.late("state hash"):
        return
    from csrc_triton.state_hash import checksum

    held = max(1 << 16, 4 * session.sizes.parameters)
    state = torch.randint(0, 255, (held,), dtype=torch.uint8, device=session.device)
    print(f"\nstate hash of {held / 1e9:.3f} GB; floor on an H200 {1e3 * held / predictions.BYTES_PER_S:.2f} ms")
    times = session.measure("state hash", {"ours": lambda: checksum(state)}, {"bytes": held}, moved_bytes=held, dtype="uint8")
    floor = 1e3 * held / session.ceilings["bytes_per_s"]
    session.goal("state hash / its floor", harness.quantile(times["ours"], 0.5) / floor)


def finished_in_backward(session: Any) -> None:
    """One chunk's head gradient, made in backward from scaled hidden states, against made at once, scaled and cast."""
    from repsft_fast.ops import functional

    if not functional.kernel_runs(torch.device(session.device), session.sizes.dtype):
        session.named.append("head finished in backward: the torch path finishes at once and reads the scale for free")
        return
    if session.late("head finished in backward"):
        return
    name, (h, v) = next(iter(session.sizes.heads.items()))
    n = session.sizes.probe
    calls = finishing_calls(session)
    print(f"\nhead gradient finished in backward, {name} N={n}")
    times = session.measure("head, finished", calls, {"head": name, "N": n, "H": h, "V": v}, flops=6 * n * h * v)
    ratio = harness.quantile(times["finished in backward, scale 1.00"], 0.5) / harness.quantile(
        times["finished at once, scale 1.00"], 0.5
    )
    session.goal("head gradient finished in backward / at once", ratio)


def finishing_calls(session: Any) -> dict[str, Callable[[], Any]]:
    from repsft_fast.ops import products

    h, v = next(iter(session.sizes.heads.values()))
    hidden, head, targets = cases.head_operands(session.sizes.probe, h, v, 0.0, session.sizes.dtype, session.device)
    loss = peers.ours()

    def step(waits: bool, scale: float) -> Callable[[], Any]:
        def call() -> None:
            hidden.grad = head.grad = None
            with mock.patch.object(products, "may_wait", products.may_wait if waits else lambda *_: False):
                total = loss(hidden, head, targets)
            (total if scale == 1.0 else total * scale).backward()

        return call

    return {
        f"finished {when}, scale {scale:.2f}": step(when == "in backward", scale)
        for scale in (1.0, 1 / 3)
        for when in ("in backward", "at once")
    }


def through_files(live: dict[str, torch.Tensor], folder: Path) -> float:
    """Milliseconds of one way out to a file and back into the same tensors; the file stays in the page cache."""
    started = time.perf_counter()
    torch.save({name: tensor.cpu() for name, tensor in live.items()}, folder / "state.pt")
    for name, tensor in torch.load(folder / "state.pt", weights_only=True).items():
        live[name].copy_(tensor)
    if next(iter(live.values())).is_cuda:
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - started)
