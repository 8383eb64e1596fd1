"""A run's model stops where its trained turns end: found in the data, told to the model before anything is saved."""

from __future__ import annotations

from typing import Any

from repsft_fast.data.ends import Ends, problems
from repsft_fast.models import stop_at


def learn_ends(model: Any, ends: Ends, tokenizer: Any) -> list[str]:
    """The ends join the model's eos_token_id, for its answers during the run and for every folder. What is to be said of it."""
    joined = stop_at(model, list(ends.tokens), tokenizer)
    return ([joined] if joined is not None else []) + problems(ends, tokenizer)
