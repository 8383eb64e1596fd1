"""How much the scores of single validation rows move from look to look while a model is trained.

    python -m benchmarks.studies.item_noise WORK    a warm start, a run for each metric; prints the table

Four of the study's tasks (`msft_tasks`), 200 validation rows each, plain SFT over eight epochs, four looks an
epoch. A look changes no training, so both runs are one run, looked at in two ways. Row by row scores come
from the history in the run's last checkpoint. docs/policies.md compares them with what the worlds of
`rule_tables` assume. WORK may be deleted at any time; one thread, a minute. Needs reasoning-gym.
"""

import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.studies import msft_study, msft_tasks, positive_control
from repsft_fast.policies.history import History

TASKS = ("chain_sum", "spell_backward", "gcd", "letter_counting")
TRAIN, VALIDATION, EPOCHS, LOOKS, SEED = 80, 200, 8, 4, 1
LAGS = (1, 4, 16)  # looks


def moved(looks: NDArray[np.float64], lag: int) -> tuple[float, float]:
    """(share of the rows whose score is another one, standard deviation of its move over the rows) between
    looks so far apart, over all such pairs of looks [looks, rows]. A move of all rows alike is none."""
    moves = looks[lag:] - looks[:-lag]
    return float((moves != 0).mean()), float(np.sqrt(moves.var(axis=1).mean()))


def table(exact: Mapping[str, NDArray[np.float64]], nll: Mapping[str, NDArray[np.float64]]) -> str:
    """A line a task, and the smallest and largest of the tasks; scores are task → [looks, rows]."""
    shares = {task: [100 * moved(looks, lag)[0] for lag in LAGS] for task, looks in exact.items()}
    moves = {task: [moved(looks, lag)[1] for lag in LAGS] for task, looks in nll.items()}
    head = ["task", "first", "last"]
    head += [f"% changed over {lag}" for lag in LAGS] + [f"nats moved over {lag}" for lag in LAGS]
    lines = [head, ["---"] * len(head)]
    for task, looks in exact.items():
        ends = [f"{looks[at].mean():.3f}" for at in (0, -1)]
        lines.append([task, *ends, *(f"{x:.1f}" for x in shares[task]), *(f"{x:.3f}" for x in moves[task])])
    columns = [f"{min(column):.1f} to {max(column):.1f}" for column in zip(*shares.values(), strict=True)]
    columns += [f"{min(column):.3f} to {max(column):.3f}" for column in zip(*moves.values(), strict=True)]
    lines.append(["all", "", "", *columns])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def by_task(history: History) -> dict[str, NDArray[np.float64]]:
    """Of a run of one stage: task → scores [looks, rows]."""
    return {task: np.array([e.scores[task].items for e in history.evaluations]) for task in history.tasks}


def write(folder: Path) -> dict[str, dict[str, str]]:
    """Files of rows under `folder`: part → task → path. No prompt lies in two parts."""
    files: dict[str, dict[str, str]] = {}
    for task in TASKS:
        rows = msft_tasks.universe(task)
        own = rows[-msft_tasks.STUDY_ROWS :]
        parts = {"pool": msft_tasks.pool(rows), "train": own[:TRAIN], "validation": own[TRAIN:][:VALIDATION]}
        for part, some in parts.items():
            path = folder / part / f"{task}.jsonl"
            msft_tasks.write_rows(path, some)
            files.setdefault(part, {})[task] = str(path)
    return files


def run(work: Path, metric: str, files: Mapping[str, dict[str, str]]) -> History:
    """Train from the warm start, which is made once; the run's history."""
    from repsft_fast import checkpoint, train

    warm = work / "warm"
    if not (warm / "result.json").exists():
        shutil.rmtree(warm, ignore_errors=True)
        train(
            msft_study.settings(
                warm, files["pool"], work, 0,
                model={"config": positive_control.MODEL}, budget={"epochs": msft_study.WARM_EPOCHS},
                optim={"lr": msft_study.WARM_LR}, schedule={"name": "constant"},
            )
        )  # fmt: skip
    folder = work / metric
    shutil.rmtree(folder, ignore_errors=True)
    train(
        msft_study.settings(
            folder, files["train"], work, SEED,
            model={"path": str(warm)}, data={"validation": files["validation"]},
            optim={"lr": msft_study.LR, "max_norm": None, "warmup_updates": 0},
            schedule={"name": "constant"}, budget={"epochs": 1000},
            mixture={
                "policy": "sft", "compute_budget": float(EPOCHS), "evaluations_per_epoch": LOOKS,
                "metric": metric,
            },
        )
    )  # fmt: skip
    values = checkpoint.values_of(checkpoint.newest(folder / "checkpoints").path)
    return History.load(values["conductor"]["history"])


def main(arguments: Sequence[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else arguments
    if len(given) != 1:
        raise SystemExit(f"item_noise: expected WORK, a folder for data and runs, got {' '.join(given)}")
    import torch

    from repsft_fast.commands.demo import build_tokenizer

    torch.set_num_threads(1)
    work = Path(given[0]).resolve()
    build_tokenizer(["no merges: bytes"], positive_control.MODEL["vocab_size"], work / "tokenizer")
    files = write(work / "data")
    exact, nll = (by_task(run(work, metric, files)) for metric in ("exact_match", "nll"))
    print(table(exact, nll))


if __name__ == "__main__":
    main()
