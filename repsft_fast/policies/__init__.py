"""Who is trained when, and when to stop: tables in, decisions out. No torch in here.

docs/policies.md has the protocol; `registry` has the policies.
"""

from repsft_fast.policies.baselines import (
    BaselineSettings,
    Continual,
    Dynamix,
    Ies,
    Sft,
    SftResets,
    SoftSro,
    Sro,
)
from repsft_fast.policies.decisions import (
    Code,
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
from repsft_fast.policies.history import History, due, shares
from repsft_fast.policies.msft import Msft, MsftSettings
from repsft_fast.policies.protocol import Policy
from repsft_fast.policies.records import Evaluation, Stage
from repsft_fast.policies.registry import POLICIES, policy_class
from repsft_fast.policies.saturation import Saturation, SaturationSettings
from repsft_fast.policies.statistics import Score

__all__ = [
    "POLICIES",
    "BaselineSettings",
    "Code",
    "Continual",
    "Continue",
    "Decay",
    "Decision",
    "Dynamix",
    "Evaluation",
    "History",
    "Ies",
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
    "Sft",
    "SftResets",
    "SkipSamples",
    "SoftSro",
    "Sro",
    "Stage",
    "Stop",
    "due",
    "explain",
    "policy_class",
    "shares",
]
