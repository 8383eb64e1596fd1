"""Whole trainers against each other on CPU: ours, TRL's SFTTrainer (packing on), and a loop in the style of paper A's code.

Same tiny Llama, same samples, one process each, taken in turns (A B C A B C …); the medians of tokens/s and their ratios
are printed and appended to records/end_to_end.jsonl. TRL's rows are first checked for leaks, with the collator and the
`use_cache=False` that its trainer uses.

    python benchmarks/end_to_end.py                 all of them, 5 rounds
    python benchmarks/end_to_end.py --worker trl    one process's work (what the first form starts)

Settings: 10M-parameter Llama (H 288, 6 layers, V 8192), samples of 32–128 tokens of which the last half is trained,
rows of 1,024, fp32, AdamW, clipping at 1.0. `ours` computes every statistic of the ledger; `trl` its own token accuracy
and entropy; `paper` loss, accuracy, entropy, top-1 probability and margin on full logits, `.item()` every update.
Two comparisons: `batched` (16 samples an update for ours, one packed row of 1,024 for TRL, one sample for the paper's loop)
and `single` (one sample an update for ours and the paper's loop: identical updates).
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SAMPLES, SEED, VOCABULARY, ROW = 512, 7, 8192, 1024


def samples() -> list[dict]:
    import numpy as np

    rng = np.random.default_rng(SEED)
    rows = []
    for _ in range(SAMPLES):
        n = int(rng.integers(32, 129))
        ids = rng.integers(4, VOCABULARY, n).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * (n // 2) + ids[n // 2 :]})
    return rows


def model_config() -> dict:
    return {
        "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 288, "intermediate_size": 768, "num_hidden_layers": 6,
        "num_attention_heads": 6, "num_key_value_heads": 6, "max_position_embeddings": 2048, "tie_word_embeddings": False,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip


def build_model():
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(SEED)
    settings = dict(model_config())
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings))


def run_ours(updates: int, warmup: int, per_update: int) -> dict:
    from repsft_fast import train

    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "train.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in samples()))
        stamps: list[tuple[float, int]] = []
        train(
            {
                "run": {"folder": f"{folder}/run", "seed": SEED},
                "model": {"config": model_config()},
                "data": {"train": str(data), "cache_folder": f"{folder}/cache"},
                "batch": {"samples": per_update, "row_tokens": ROW},
                "optim": {"lr": 1e-4},
                "budget": {"updates": updates + warmup},
                "stop": {"token_accuracy": None},
                "log": {"every_updates": 10},
            },
            on_update=lambda work: stamps.append((time.perf_counter(), work.tokens)),
        )
    (start, before), (end, after) = stamps[warmup - 1], stamps[-1]
    return {"seconds": end - start, "tokens": after - before, "updates": updates, "samples_per_update": per_update}


def run_trl(updates: int, warmup: int) -> dict:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Clock(TrainerCallback):
        def __init__(self):
            self.stamps = []

        def on_step_end(self, args, state, control, **_):
            self.stamps.append(time.perf_counter())

    rows = samples()
    data = Dataset.from_list(
        [{"input_ids": r["input_ids"], "completion_mask": [int(x != -100) for x in r["labels"]]} for r in rows]
    )
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=build_model(),
            args=SFTConfig(
                output_dir=folder, max_steps=updates + warmup, per_device_train_batch_size=1, packing=True,
                max_length=ROW,
                learning_rate=1e-4, lr_scheduler_type="constant", logging_steps=10, save_strategy="no",
                report_to="none",
                use_cpu=True, bf16=False, gradient_checkpointing=False, seed=SEED, disable_tqdm=True,
                dataloader_pin_memory=False,
            ),
            train_dataset=data,
            processing_class=_tokenizer(PreTrainedTokenizerFast),
            callbacks=[clock],
        )  # fmt: skip
        lengths = [len(row["input_ids"]) for row in trainer.train_dataset]
        trainer.train()
    return {
        "seconds": clock.stamps[-1] - clock.stamps[warmup - 1],
        "tokens": updates * statistics.mean(lengths),  # packed rows are nearly full; their mean is what an update holds
        "updates": updates,
        "samples_per_update": SAMPLES / len(lengths),
    }


def run_paper_style(updates: int, warmup: int) -> dict:
    """One sample an update, full logits, fp32 copies for the metrics, a host read of every one of them."""
    import torch

    model = build_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    rows = samples()
    tokens = 0
    for step in range(updates + warmup):
        if step == warmup:
            start, tokens = time.perf_counter(), 0
        row = rows[step % len(rows)]
        ids = torch.tensor([row["input_ids"]])
        labels = torch.tensor([row["labels"]])
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        shifted, targets = logits[:, :-1].float(), labels[:, 1:]
        mask = targets != -100
        token_loss = torch.nn.functional.cross_entropy(shifted.transpose(1, 2), targets, ignore_index=-100, reduction="none")
        loss = token_loss.sum() / mask.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            logprobs = shifted.log_softmax(-1)
            probabilities = logprobs.exp()
            entropy = -(probabilities * logprobs).sum(-1)[mask]
            top2 = shifted.topk(2, dim=-1).values
            figures = [
                loss.item(), token_loss[mask].std().item(),
                (shifted.argmax(-1) == targets)[mask].float().mean().item(),
                entropy.mean().item(), probabilities.max(-1).values[mask].mean().item(),
                (top2[..., 0] - top2[..., 1])[mask].mean().item(),
            ]  # fmt: skip
        tokens += len(row["input_ids"])
        del figures
    return {"seconds": time.perf_counter() - start, "tokens": tokens, "updates": updates, "samples_per_update": 1}


def _tokenizer(kind):
    from tokenizers import Tokenizer, models

    vocabulary = {f"t{i}": i for i in range(VOCABULARY)}
    return kind(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="t0")), pad_token="t0", eos_token="t2")


PAIRS = {
    "batched / TRL": ("ours_batched", "trl"),
    "batched / paper": ("ours_batched", "paper"),
    "single / paper": ("ours_single", "paper"),
}
WORKERS = {
    "ours_batched": lambda: run_ours(24, 4, 16),
    "trl": lambda: run_trl(24, 4),
    "paper": lambda: run_paper_style(200, 20),
    "ours_single": lambda: run_ours(200, 20, 1),
}


def leak_of_trl() -> float:
    """Largest change of the second document's logits when the first document of a TRL-collated row changes."""
    import torch
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    model = build_model().eval()
    rows = samples()[:2]
    lengths = [len(r["input_ids"]) for r in rows]
    collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)

    def logits(first: list[int]):
        packed = {"input_ids": first + rows[1]["input_ids"], "seq_lengths": lengths}
        batch = collator([packed])
        batch.pop("labels", None)
        with torch.no_grad():
            return model(**batch, use_cache=False).logits[0, lengths[0] :]

    return float((logits(rows[0]["input_ids"]) - logits(rows[0]["input_ids"][::-1])).abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", choices=[*WORKERS, "leak"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.worker == "leak":
        print(json.dumps({"leak": leak_of_trl()}))
        return
    if arguments.worker:
        import torch

        torch.set_num_threads(arguments.threads)
        line = WORKERS[arguments.worker]()
        line["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps(line))
        return
    lines: dict[str, list[dict]] = {name: [] for name in WORKERS}
    for round_ in range(arguments.rounds):
        order = list(WORKERS) if round_ % 2 == 0 else list(WORKERS)[::-1]
        for name in order:
            line = _worker(name, arguments.threads)
            lines[name].append(line)
            print(f"round {round_ + 1} {name:13} {line['tokens'] / line['seconds']:8,.0f} tokens/s", flush=True)
    _report(lines, _worker("leak", arguments.threads)["leak"])


def _worker(name: str, threads: int) -> dict:
    command = [sys.executable, __file__, "--worker", name, "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _report(lines: dict[str, list[dict]], leak: float) -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from benchmarks import records
    from benchmarks.harness import environment

    speeds = {name: [line["tokens"] / line["seconds"] for line in found] for name, found in lines.items()}
    shape = {"parameters": "10M", "lengths": "32-128", "row_tokens": ROW, "vocabulary": VOCABULARY, "samples": SAMPLES}
    made = [
        records.make(
            environment(),
            op="end_to_end_1000_tokens",
            implementation=name,
            shape=shape,
            dtype="float32",
            times_ms=[1e6 / speed for speed in speeds[name]],  # milliseconds per 1,000 tokens
            peak_bytes=max(line["peak_bytes"] for line in found),
            tokens_per_second=statistics.median(speeds[name]),
            samples_per_update=found[0]["samples_per_update"],
            trl_leak=leak,
        )
        for name, found in lines.items()
    ]
    records.append(Path(__file__).parent / "records" / "end_to_end.jsonl", made)
    print()
    for name, found in lines.items():
        peak = max(line["peak_bytes"] for line in found) / 2**20
        print(f"{name:13} {statistics.median(speeds[name]):8,.0f} tokens/s, peak {peak:,.0f} MiB")
    for label, (ours, peer) in PAIRS.items():
        ratios = sorted(a / b for a, b in zip(speeds[ours], speeds[peer], strict=True))
        print(f"{label:16} {statistics.median(ratios):.2f} × (from {ratios[0]:.2f} to {ratios[-1]:.2f}), pair by pair")
    print(f"TRL rows: perturbing the first document moves the second one's logits by at most {leak:.1e}")


if __name__ == "__main__":
    main()
