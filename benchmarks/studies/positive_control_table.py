"""What the records of the positive control say: head-room, the choice on mixture A, the verdict on B."""

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

WIDTH = 5  # looks that a score is smoothed over
# Student's two-sided 95 % quantile by degrees of freedom
STUDENT = {
    1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228,
    11: 2.201,
}  # fmt: skip
Record = Mapping[str, Any]


def smooth(values: Sequence[float]) -> list[float]:
    """Means over WIDTH neighbours, over as many as there are at both ends."""
    half = WIDTH // 2
    return [fmean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def curves(record: Record) -> tuple[list[float], dict[str, list[float]]]:
    """Epochs of a one-stage run's looks, and each task's smoothed scores there."""
    looks = record["curve"]
    return [look[2] for look in looks], {
        task: smooth([look[3 + i] for look in looks]) for i, task in enumerate(record["tasks"])
    }


def own_best_epochs(record: Record) -> dict[str, float]:
    epochs, scores = curves(record)
    return {task: epochs[max(range(len(s)), key=s.__getitem__)] for task, s in scores.items()}


def head_room_of(record: Record) -> float:
    """Mean over tasks of each task's own best, minus the best common moment, of one plain run's smoothed
    curves."""
    _, scores = curves(record)
    common = max(fmean(at) for at in zip(*scores.values(), strict=True))
    return fmean(max(s) for s in scores.values()) - common


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval (Student); infinite for one value."""
    if len(values) < 2:
        return fmean(values), float("inf")
    return fmean(values), STUDENT[len(values) - 1] * stdev(values) / len(values) ** 0.5


def by_seed(records: Sequence[Record], mixture: str, arm: str) -> dict[int, Record]:
    return {r["seed"]: r for r in records if (r["mixture"], r["arm"]) == (mixture, arm)}


def paired(records: Sequence[Record], mixture: str, arm: str, other: str = "sft") -> list[float]:
    """Test scores of `arm` minus those of `other`, on the seeds that both have."""
    mine, theirs = by_seed(records, mixture, arm), by_seed(records, mixture, other)
    return [mine[s]["test_macro"] - theirs[s]["test_macro"] for s in sorted(mine.keys() & theirs.keys())]


def chosen_rehearsal(records: Sequence[Record], arms: Mapping[float, str]) -> float:
    """The rehearsal whose mean gain over sft on mixture A is highest; the smaller one at a tie."""
    gains = {rehearsal: paired(records, "A", arm) for rehearsal, arm in sorted(arms.items())}
    means = {rehearsal: fmean(gain) for rehearsal, gain in gains.items() if gain}
    if not means:
        raise SystemExit("mixture A comes first: its records choose the rehearsal")
    return max(means, key=means.__getitem__)


def verdict(gains: Sequence[float], room: Sequence[float]) -> bool:
    """Passed: the gain's interval lies above 0 and its mean is a third of head-room's lower bound or more."""
    gain, half = interval(gains)
    mean, width = interval(room)
    return gain - half > 0 and gain >= (mean - width) / 3


def tables(records: Sequence[Record], rehearsals: Mapping[float, str]) -> str:
    found = []
    for mixture in ("A", "B"):
        arms = list(dict.fromkeys(r["arm"] for r in records if r["mixture"] == mixture))
        if "sft" not in arms:
            continue
        room = [head_room_of(r) for r in by_seed(records, mixture, "sft").values()]
        found += [
            f"Mixture {mixture}: head-room {plus_minus(room)} over {len(room)} seeds.",
            "",
            "| arm | seeds | test | minus sft | tokens | discarded | left in a run |",
            "|---|---|---|---|---|---|---|",
        ]
        for arm in arms:
            runs = list(by_seed(records, mixture, arm).values())
            gain = "" if arm == "sft" else plus_minus(paired(records, mixture, arm), "+")
            test, spent, lost = (
                fmean(r[key] for r in runs) for key in ("test_macro", "tokens", "discarded_tokens")
            )
            left = fmean(len(r["exclusions"]) for r in runs)
            found.append(
                f"| {arm} | {len(runs)} | {test:.3f} | {gain} | {spent:,.0f} | {lost:,.0f} | {left:.1f} |"
            )
        found.append("")
        if mixture == "B":
            arm = rehearsals[chosen_rehearsal(records, rehearsals)]
            passed = verdict(paired(records, "B", arm), room)
            found.append(f"Verdict ({arm} minus sft): {'passed' if passed else 'not passed'}.")
    return "\n".join(found)


def plus_minus(values: Sequence[float], sign: str = "") -> str:
    mean, half = interval(values)
    return f"{mean:{sign}.3f} ± {half:.3f}"
