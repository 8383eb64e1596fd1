"""Folders of finished runs as a comparison reads them: run.yaml and result.json, and nothing trained."""

from pathlib import Path
from typing import Any

import yaml

from repsft_fast.report import result as results
from repsft_fast.report.result import RunResult


def write_run(
    folder: Path,
    seed: int,
    score: float | None = 0.5,
    *,
    policy: str | None = "sft",
    code: Any = "policy",
    metric: str = "exact_match",
    total: int = 40,
    data: str = "train.jsonl",
    **mixture: Any,
) -> Path:
    """A run whose test rows have `score` pooled and 0.2 less and more in its two tasks; None: no test rows."""
    folder.mkdir(parents=True)
    settings = {
        "run": {"folder": str(folder), "seed": seed},
        "data": {"train": data, "cache_folder": str(folder)},
        "mixture": {"policy": policy, "metric": metric, **mixture},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    more: dict[str, Any] = {"test": None}
    if score is not None:
        tasks = {
            "a": {"exact_match": score - 0.2, "total": total},
            "b": {"exact_match": score + 0.3, "total": total},
        }
        more["test"] = {"exact_match": score, "loss": 1 - score, "pooled": score, "tasks": tasks}
    if policy is not None:
        more["account"] = {
            "tokens": {"trained": 1000 * seed},
            "flops": {"trained": 6e9, "evaluated": 2e9, "probed": 1e9, "result": 4e9},
        }
        more["mixture"] = {"result": {"pooled": 0.75, "tasks": {"a": {"score": 0.7}, "b": {"score": 0.9}}}}
    results.write(
        RunResult(
            code, "done", str(folder), 10, 2.0, 0.9, 1.0, 2000, 900, seed, validation_loss=0.25, more=more
        )
    )
    return folder
