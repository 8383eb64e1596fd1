"""A/A control of mSFT's rules: one task cut into two halves.

Nothing tells the halves apart, so a rule that excludes one is either answering noise (the curve never falls)
or right about both (it falls). Prints the table of docs/policies.md.

    python -m benchmarks.suites.aa_control [runs] [seed]

Items are 0/1 against a known curve; a share `churn` of the items is redrawn at every evaluation, the others
stay as they are. Standard library only; some minutes for 200 runs per line on one core.
"""

import random
import sys

from repsft_fast.policies import Msft, MsftSettings, RollBack, Stop
from tests.helpers.policies_simulation import Curve, curves, simulate

CURVES = {
    "flat": Curve(base=0.2, top=0.6, peak=1.0, fall=0.0),  # learnt after one epoch, then level
    "rising": Curve(base=0.2, top=0.6, peak=12.0, fall=0.0),
    "falling": Curve(base=0.2, top=0.6, peak=1.0, fall=0.05),  # loses five points per epoch
}
RULES = {
    "paper": MsftSettings(rule="paper"),
    "tested z=0 p=2": MsftSettings(rule="tested", z=0.0, patience=2),
    "tested z=1.645 p=1": MsftSettings(rule="tested", z=1.645, patience=1),
    "tested z=1.645 p=2": MsftSettings(rule="tested", z=1.645),
    "tested z=1.645 p=3": MsftSettings(rule="tested", z=1.645, patience=3),
    "tested z=2.33 p=2": MsftSettings(rule="tested", z=2.33),
}


def first_stage(
    curve: Curve, items: int, churn: float, seed: int, settings: MsftSettings, budget: float
) -> float | None:
    """Epochs of the moment gone back to when a half leaves in a first roll-out of `budget` epochs; None when
    both stay."""
    one_stage = MsftSettings(**{**settings.__dict__, "compute_budget": budget, "max_stages": 2})
    world = curves({"half1": curve, "half2": curve}, items, seed, churn)
    run = simulate(StopAfterOne(one_stage), world)
    back = next((d for d in run.log if isinstance(d, RollBack)), None)
    return None if back is None else run.history.evaluation_of(back.to).epochs


class StopAfterOne(Msft):
    """Ends the run with its first stage, so that only one roll-out is paid for."""

    def decide(self, history, active):
        return Stop("policy", "one stage") if len(history.stages) > 1 else super().decide(history, active)


def main(runs: int = 200, seed: int = 1) -> None:
    budget = 3.0
    print(
        f"Share of {runs} runs in which one of two equal halves is excluded in a roll-out of {budget:g}"
        f" epochs (seed {seed})."
    )
    print("For the falling curve (true peak at 1.00) also the mean moment gone back to.\n")
    print("| curve | items per half | churn | " + " | ".join(RULES) + " |")
    print("|" + "---|" * (3 + len(RULES)))
    for name, curve in CURVES.items():
        for items in (50, 200):
            for churn in (0.1, 1.0):
                cells = []
                for rule in RULES.values():
                    rng = random.Random(f"{seed}|{name}|{items}|{churn}")  # the same noise for every rule
                    found = [
                        first_stage(curve, items, churn, rng.randrange(2**40), rule, budget)
                        for _ in range(runs)
                    ]
                    hits = [moment for moment in found if moment is not None]
                    cell = f"{len(hits) / runs:.3f}"
                    if name == "falling" and hits:
                        cell += f" at {sum(hits) / len(hits):.2f}"
                    cells.append(cell)
                print(f"| {name} | {items} | {churn} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:3]))
