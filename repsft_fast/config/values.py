"""What one setting may hold: numbers, words, paths and free mappings, as YAML and other trainers' users write
them."""

import math
import re
from enum import Enum
from typing import Annotated, Any

from pydantic import BeforeValidator, ByteSize, Field

from repsft_fast.config.paths import as_folder, as_folder_or_hub_id, as_source, as_template, refused


def as_number(value: Any) -> Any:
    """YAML 1.1 reads `1e-5` as text and `yes` as true: text that is a number is one, a truth value is not."""
    if isinstance(value, bool):
        raise ValueError("Input should be a number, not true or false")
    value = value.value if isinstance(value, Enum) else value
    return value.strip() if isinstance(value, str) else value


def as_whole(value: Any) -> Any:
    """Whole numbers may be written `51200`, `51_200` or `5.12e4`."""
    value = as_number(value)
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            return value
        return (
            int(number) if math.isfinite(number) and number.is_integer() and "e" in value.lower() else value
        )
    return value


def as_size(value: Any) -> Any:
    """Sizes in bytes: a whole number, or one with a unit. pydantic alone reads 2026-11-21 as 2026 and 0.5 as
    0."""
    value = as_whole(value)
    whole = (isinstance(value, int) or (isinstance(value, float) and value.is_integer())) and value >= 0
    text = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if not whole and not (text and (text[1] or "b").lower() in ByteSize.byte_sizes):
        raise ValueError(
            "Input should be a whole number of bytes, or one with a unit, such as 512MiB or 2GiB"
        )
    return value


def as_word(value: Any) -> Any:
    """YAML 1.1 reads `off` and `no` as false; a setting that is a word wants the word."""
    if isinstance(value, bool):
        raise ValueError(
            f"Input should be text, not {str(value).lower()} (YAML reads bare yes, no, on and off so: quote"
            " the word)"
        )
    if isinstance(value, bytes | bytearray):
        raise ValueError("Input should be text, not bytes")
    return as_utf8(value)


def as_utf8(value: Any) -> Any:
    """Half a surrogate pair is no character: neither run.yaml nor JSON could hold it."""
    if isinstance(value, str) and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise refused(
                f"is not UTF-8 text, got {ascii(value)[:200]}", todo="write it in UTF-8, or rename the file"
            ) from None
    return value


def as_plain(value: Any, deep: int = 0) -> Any:
    """Free settings in the form JSON keeps (lists, text keys), so that the run's own record of them reads
    back equal."""
    if deep > _DEEPEST:
        raise ValueError(f"Input should be nested at most {_DEEPEST} deep")
    if isinstance(value, dict):
        if odd := [key for key in value if type(key) not in (str, int)]:
            raise ValueError(f"Input should be a mapping whose keys are text, not {odd[0]!r}")
        if len({str(key) for key in value}) < len(value):
            raise ValueError("Input should be a mapping whose keys differ as text")
        return {as_utf8(str(key)): as_plain(inner, deep + 1) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_plain(inner, deep + 1) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"Input should be finite, not {value}")
    if value is not None and type(value) not in (str, bool, int, float):
        raise ValueError(
            "Input should be numbers, text, true, false, null, lists and mappings, not"
            f" {type(value).__name__}"
        )
    return as_utf8(value)


_LARGEST = 2**63 - 1  # what an int64 counter and torch's seeds can hold
_SIZE = re.compile(r"[0-9]+(?:(?:\.[0-9]+)?\s*([A-Za-z]+))?")
_DEEPEST = 50  # of free settings, such as a model's config: real ones are 3 or 4 deep

Text = Annotated[str, BeforeValidator(as_word), Field(min_length=1)]
Name = Annotated[str, BeforeValidator(as_utf8)]
# Validators before the type run from right to left.
Folder = Annotated[str, BeforeValidator(as_word), BeforeValidator(as_folder), Field(min_length=1)]
FolderOrHubId = Annotated[
    str, BeforeValidator(as_word), BeforeValidator(as_folder_or_hub_id), Field(min_length=1)
]
Template = Annotated[str, BeforeValidator(as_word), BeforeValidator(as_template), Field(min_length=1)]
Source = Annotated[str, BeforeValidator(as_word), BeforeValidator(as_source), Field(min_length=1)]
Positive = Annotated[float, BeforeValidator(as_number), Field(gt=0)]
NotNegative = Annotated[float, BeforeValidator(as_number), Field(ge=0)]
Fraction = Annotated[float, BeforeValidator(as_number), Field(ge=0, le=1)]
Share = Annotated[float, BeforeValidator(as_number), Field(gt=0, le=1)]
Part = Annotated[float, BeforeValidator(as_number), Field(ge=0, lt=1)]
Inside = Annotated[float, BeforeValidator(as_number), Field(gt=0, lt=1)]
Count = Annotated[int, BeforeValidator(as_whole), Field(ge=1, le=_LARGEST)]
AtLeastTwo = Annotated[int, BeforeValidator(as_whole), Field(ge=2, le=_LARGEST)]
Whole = Annotated[int, BeforeValidator(as_whole), Field(ge=0, le=_LARGEST)]
Bytes = Annotated[ByteSize, BeforeValidator(as_size), Field(ge=0, le=_LARGEST)]
SomeBytes = Annotated[ByteSize, BeforeValidator(as_size), Field(ge=1, le=_LARGEST)]
Free = Annotated[dict[str, Any], BeforeValidator(as_plain)]
Sources = Source | list[Source] | dict[Name, Source | list[Source]]
