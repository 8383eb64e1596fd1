"""Every policy by its name in `mixture.policy`. A new one is a file with its class, and a line here."""

from repsft_fast.policies.baselines import Continual, Dynamix, Ies, Sft, SftResets, SoftSro, Sro
from repsft_fast.policies.msft import Msft
from repsft_fast.policies.protocol import Policy
from repsft_fast.policies.saturation import Saturation

POLICIES: dict[str, type[Policy]] = {
    "sft": Sft,
    "sft_resets": SftResets,
    "msft": Msft,
    "continual": Continual,
    "sro": Sro,
    "soft_sro": SoftSro,
    "ies": Ies,
    "dynamix": Dynamix,
}


def policy_class(name: str | None) -> type[Policy]:
    """The policy that `mixture.policy` names, whose facts hold for every run with it; None: the saturation
    rule."""
    return Saturation if name is None else POLICIES[name]
