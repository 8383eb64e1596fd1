"""Who is trained when, and when to stop: tables in, decisions out. No torch in here; docs/policies.md has the protocol."""

from typing import Protocol

from repsft_fast.policies.baselines import BaselineSettings, Continual, Dynamix, Ies, Sft, SoftSro, Sro
from repsft_fast.policies.decisions import (
    Continue,
    Decay,
    Decision,
    NewStage,
    Probe,
    Reset,
    Reweight,
    RollBack,
    SkipSamples,
    Stop,
)
from repsft_fast.policies.explain import explain
from repsft_fast.policies.history import Evaluation, History, Stage, due, shares
from repsft_fast.policies.msft import Msft, MsftSettings
from repsft_fast.policies.saturation import Saturation, SaturationSettings
from repsft_fast.policies.statistics import Score

__all__ = [
    "BASELINES",
    "BaselineSettings",
    "Continue",
    "Decay",
    "Decision",
    "Evaluation",
    "History",
    "Msft",
    "MsftSettings",
    "NewStage",
    "Policy",
    "Probe",
    "Reset",
    "Reweight",
    "RollBack",
    "Saturation",
    "SaturationSettings",
    "Score",
    "SkipSamples",
    "Stage",
    "Stop",
    "due",
    "explain",
    "shares",
]

BASELINES: dict[str, type[Sft]] = {
    "sft": Sft,
    "continual": Continual,
    "sro": Sro,
    "soft_sro": SoftSro,
    "ies": Ies,
    "dynamix": Dynamix,
}


class Policy(Protocol):
    """What the trainer needs of a policy. All are pure functions of the history: a policy object holds settings only."""

    evaluations_per_epoch: int  # 0: it needs none
    needs_losses: bool  # History.epoch_ended wants the mean loss of every sample of the epoch, skipped ones too

    def decide(self, history: History, active: frozenset[str]) -> Decision: ...

    def next_call(self, history: History) -> int | None:
        """The next update at which to ask even if nothing has been recorded."""

    def kept(self, history: History, active: frozenset[str]) -> set[str]:
        """Moments that must stay available; every other one may be forgotten."""

    def most_kept(self, tasks: int) -> int:
        """The most moments `kept` ever names at once in a mixture of so many tasks: what the snapshot budget must hold."""

    def result(self, history: History) -> str | None:
        """The moment that is the run's result; None: the state at the end."""
