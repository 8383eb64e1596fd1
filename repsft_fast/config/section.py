"""What every section of the settings is."""

from typing import Any

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


def instead(given: Any, chosen: str, default: str) -> Any:
    """Of two settings that exclude each other, naming one switches the other's default off."""
    if isinstance(given, dict) and given.get(chosen) is not None and default not in given:
        return {**given, default: None}
    return given
