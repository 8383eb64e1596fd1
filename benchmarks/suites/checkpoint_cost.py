"""What a checkpoint costs a run, and what resuming from it does, against torch.save and torch's own
asynchronous writer.

    python -m benchmarks.suites.checkpoint_cost [rounds] [--record]
                                        --record appends records/checkpoint_cost.jsonl

The state: weights of a Llama of about 50M parameters in fp32 and AdamW's two moments, 600 MB. Three ways, in
turn:

    ours        copy into the pool of snapshots, a thread writes, hashes, fsyncs, renames
                (repsft_fast.checkpoint)
    torch.save  one file by pickle, then fsync: training waits for all of it
    dcp async   torch.distributed.checkpoint.async_save, then fsync of its folder

`stall` is the time the training thread is held: until the call returns and the live tensors may change.
`durable` is from the call to bytes and names on disk, for all three. `resume` reads into live tensors with
the file in the page cache; ours verifies every byte first. `resume, unverified` is ours without the hashing,
so the difference is what verification costs. Each round times every way once, in an order that alternates.

    python -m benchmarks.suites.checkpoint_cost --share [pairs] [--record]

The share of a real run: 60 updates of a 10M-parameter Llama (120 MB of state) with a checkpoint every 20
updates and without any, in turn, whole runs of the trainer. What the saves add is asked of the pairs' seconds
in updates and, apart, of the stalls the run itself reports.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.harness import machine, records, timing
from repsft_fast import checkpoint
from repsft_fast.checkpoint import shards
from repsft_fast.files import sync_tree
from repsft_fast.snapshot import SnapshotPool

PATH = records.FOLDER / "checkpoint_cost.jsonl"
WIDTH, LAYERS, VOCABULARY = 576, 10, 16384
SHARE_UPDATES, SHARE_EVERY = 60, 20
Times = dict[str, float]  # milliseconds by what was measured


def made_state(width: int = WIDTH, layers: int = LAYERS, vocabulary: int = VOCABULARY) -> dict[str, Tensor]:
    """{name: [..] fp32} with the shapes of a Llama with tied embeddings: weights and two moments each."""
    shapes: dict[str, tuple[int, ...]] = {"embed": (vocabulary, width)}
    for i in range(layers):
        shapes |= {f"{i}.{name}": (width, width) for name in "qkvo"}
        shapes |= {f"{i}.{name}": (width * 8 // 3, width) for name in ("gate", "up")}
        shapes |= {f"{i}.down": (width, width * 8 // 3), f"{i}.norm": (width,)}
    return {
        f"{part}/{n}": torch.randn(shape)
        for part in ("weight", "exp_avg", "exp_avg_sq")
        for n, shape in shapes.items()
    }


class Ours:
    """The trainer's own path: pool, background writer, loader."""

    def __init__(self, live: dict[str, Tensor], folder: Path):
        self.live, self.folder = live, folder
        held = sum(t.numel() * t.element_size() for t in live.values())
        self.pool = SnapshotPool(live, device_bytes=2 * held, pinned_bytes=0, keep=1)

    def save(self) -> Times:
        shutil.rmtree(self.folder, ignore_errors=True)
        writer = checkpoint.BackgroundWriter(self.folder)
        start = time.perf_counter()
        self.pool.take("x", {})
        writer.submit(0, self.pool.hold("x"), {}, done=lambda: self.pool.unhold("x"))
        stall = time.perf_counter() - start
        (outcome,) = writer.close()
        durable = time.perf_counter() - start
        self.pool.release("x")
        if outcome.path is None:
            raise RuntimeError(f"the save failed: {outcome.error}")
        return {"stall": stall * 1e3, "durable": durable * 1e3}

    def resume(self) -> Times:
        return {"resume": _timed(lambda: checkpoint.resume(self.folder, self.live))}

    def resume_unverified(self) -> Times:
        with mock.patch.object(shards, "HostChecksum", Unsummed):
            return {"resume, unverified": _timed(lambda: checkpoint.resume(self.folder, self.live))}


class Unsummed:
    """In place of the checksum: looks at nothing and finds everything whole."""

    def update(self, block: object) -> None:
        return

    def hexdigest(self) -> object:
        return mock.ANY


class TorchSave:
    def __init__(self, live: dict[str, Tensor], folder: Path):
        self.live, self.folder = live, folder

    def save(self) -> Times:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        start = time.perf_counter()
        torch.save(self.live, self.folder / "state.pt")
        sync_tree(self.folder)
        whole = (time.perf_counter() - start) * 1e3
        return {"stall": whole, "durable": whole}

    def resume(self) -> Times:
        def load() -> None:
            saved = torch.load(self.folder / "state.pt", weights_only=True)
            for name, tensor in self.live.items():
                tensor.copy_(saved[name])

        return {"resume": _timed(load)}


class DcpAsync:
    def __init__(self, live: dict[str, Tensor], folder: Path):
        self.live, self.folder = live, folder

    def save(self) -> Times:
        import torch.distributed.checkpoint as dcp

        shutil.rmtree(self.folder, ignore_errors=True)
        start = time.perf_counter()
        future: Any = dcp.async_save(self.live, checkpoint_id=self.folder, no_dist=True)
        stall = time.perf_counter() - start
        future.result()
        sync_tree(self.folder)
        return {"stall": stall * 1e3, "durable": (time.perf_counter() - start) * 1e3}

    def resume(self) -> Times:
        import torch.distributed.checkpoint as dcp

        return {"resume": _timed(lambda: dcp.load(self.live, checkpoint_id=self.folder, no_dist=True))}


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def measure(live: dict[str, Tensor], folder: Path, rounds: int) -> dict[tuple[str, str], list[float]]:
    """{(what, way): milliseconds of every round}. The first round warms up and is not kept."""
    ways = {
        "ours": Ours(live, folder / "ours"),
        "torch.save": TorchSave(live, folder / "torch"),
        "dcp async": DcpAsync(live, folder / "dcp"),
    }
    found: dict[tuple[str, str], list[float]] = {}
    before = {name: t.clone() for name, t in live.items()}
    for done in range(-1, rounds):
        for name in list(ways)[:: 1 if done % 2 else -1]:
            way = ways[name]
            gc.collect()
            times = way.save()
            for tensor in live.values():
                tensor.zero_()
            times |= way.resume()
            if not all(torch.equal(t, before[n]) for n, t in live.items()):
                raise RuntimeError(f"{name}: what was loaded is not what was saved")
            if isinstance(way, Ours):
                times |= way.resume_unverified()
            if done >= 0:
                for what, value in times.items():
                    found.setdefault((what, name), []).append(value)
    ways["ours"].pool.close()  # type: ignore[union-attr]
    return found


def run_seconds(folder: Path, every: int | None) -> tuple[float, float]:
    """(seconds in the loop, seconds of them held by saves) of one run of the trainer."""
    from benchmarks.suites.end_to_end import model_config, samples
    from repsft_fast import train

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples()))
    settings = {
        "run": {"folder": str(folder / "run")},
        "model": {"config": model_config()},
        "data": {"train": str(folder / "train.jsonl"), "cache_folder": str(folder / "cache")},
        "batch": {"samples": 4, "row_tokens": 1024},
        "optim": {"lr": 1e-4},
        "budget": {"updates": SHARE_UPDATES},
        "stop": {"token_accuracy": None},
        "evaluate": {"generate_samples": 0},
        "checkpoint": {"every_updates": every, "every_minutes": None, "keep_extendable": False},
    }
    moments: list[float] = []
    train(settings, on_update=lambda work: moments.append(time.perf_counter()))
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    stalls = [
        line["stall_seconds"] + line["waited_seconds"]
        for line in lines
        if line["kind"] == "checkpoint" and line["why"] == "due"
    ]
    if len(stalls) != (0 if every is None else (SHARE_UPDATES - 1) // every):
        raise RuntimeError(f"{len(stalls)} checkpoints were made, which is not what was asked for")
    return moments[-1] - moments[0], sum(stalls)


def share(pairs: int, record: bool) -> None:
    """Whole runs with and without checkpoints, in turn."""
    found: dict[str, list[float]] = {"with checkpoints": [], "without": []}
    stalls = []
    with tempfile.TemporaryDirectory() as name:
        for pair in range(pairs):
            for what in list(found)[:: 1 if pair % 2 else -1]:
                seconds, held = run_seconds(
                    Path(name, "run"), SHARE_EVERY if what == "with checkpoints" else None
                )
                found[what].append(seconds * 1e3)
                if what == "with checkpoints":
                    stalls.append(held / seconds)
    middle = {what: timing.quantile(each, 0.5) for what, each in found.items()}
    ratios = [a / b - 1 for a, b in zip(found["with checkpoints"], found["without"], strict=True)]
    for what, each in found.items():
        print(f"  {what:20s} {middle[what] / 1e3:8.2f} s   {' '.join(f'{x / 1e3:.2f}' for x in each)}")
    print(
        f"  stalls are {timing.quantile(stalls, 0.5):.2%} of the loop; pairs differ by"
        f" {timing.quantile(ratios, 0.5):+.2%}"
    )
    if record:
        shape = {"updates": SHARE_UPDATES, "every": SHARE_EVERY, "parameters": "10M"}
        made = [
            records.make(
                machine.environment("cpu"), op="checkpointed run", implementation=what, shape=shape,
                dtype="float32", times_ms=each, peak_bytes=0,
                stall_share=stalls if what == "with checkpoints" else [],
            )
            for what, each in found.items()
        ]  # fmt: skip
        records.append(PATH, made)


def _rounds(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"rounds are a count above 0, got {text!r}")
    return int(text)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rounds", type=_rounds, nargs="?", default=7)
    parser.add_argument("--share", action="store_true", help="whole runs with and without checkpoints")
    parser.add_argument("--record", action="store_true", help=f"append to {PATH.name}")
    given = parser.parse_args(arguments)
    rounds = given.rounds
    if given.share:
        share(rounds, given.record)
        return
    live = made_state()
    held = sum(t.numel() * t.element_size() for t in live.values())
    with tempfile.TemporaryDirectory() as name:
        times = measure(live, Path(name), rounds)
    print(f"{held / 1e6:.0f} MB of state, {rounds} rounds, milliseconds at p20 / p50 / p80")
    for (what, way), each in sorted(times.items()):
        quantiles = " / ".join(f"{timing.quantile(each, q):8.0f}" for q in (0.2, 0.5, 0.8))
        print(f"  {what:20s} {way:12s} {quantiles}")
    if given.record:
        environment = machine.environment("cpu")
        made = [
            records.make(
                environment, op=f"checkpoint {what}", implementation=way, shape={"bytes": held},
                dtype="float32", times_ms=each, peak_bytes=0, moved_bytes=held,
            )
            for (what, way), each in times.items()
        ]  # fmt: skip
        records.append(PATH, made)


if __name__ == "__main__":
    main(sys.argv[1:])
