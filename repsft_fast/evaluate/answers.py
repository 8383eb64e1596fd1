"""Take the final answer out of a generated text and compare it with the reference."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from decimal import Decimal, InvalidOperation

Extractor = Callable[[str], str | None]

_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:[eE][-+]?\d+)?%?")


def boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{…}`, braces balanced; None without one or when it never closes."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 0, start + len("\\boxed{")
    for i in range(begin - 1, len(text)):
        if text[i] == "{":
            depth += 1
        elif text[i] == "}":
            depth -= 1
            if depth == 0:
                return text[begin:i].strip()
    return None


def hashes(text: str) -> str | None:
    """What follows the last `####` on its line (GSM8K's way)."""
    _, found, rest = text.rpartition("####")
    return rest.split("\n", 1)[0].strip() if found else None


def last_number(text: str) -> str | None:
    """The last number in the text, as written."""
    numbers = [m.group() for m in _NUMBER.finditer(text) if any(c.isdigit() for c in m.group())]
    return numbers[-1] if numbers else None


def whole(text: str) -> str | None:
    """The whole reply, stripped."""
    return text.strip() or None


def final_answer(text: str) -> str | None:
    r"""The answer a reader would take: `\boxed{}`, else `####`, else the whole reply."""
    return boxed(text) or hashes(text) or whole(text)


EXTRACTORS: dict[str, Extractor] = {
    "final": final_answer,
    "boxed": boxed,
    "hashes": hashes,
    "last_number": last_number,
    "whole": whole,
}


def same_answer(got: str | None, reference: str) -> bool:
    """Equal as text, as numbers (1,000 = 1000.0), or, where `math-verify` is installed, as mathematical expressions."""
    if got is None:
        return False
    got, reference = _normal(got), _normal(reference)
    if got == reference:
        return True
    a, b = _number(got), _number(reference)
    if a is not None and b is not None:
        return a == b
    return _math_equal(got, reference)


def _normal(text: str) -> str:
    return " ".join(text.strip().strip("$").rstrip(".").split())


def _number(text: str) -> Decimal | None:
    cleaned = text.replace(",", "").replace("$", "").strip()
    percent = cleaned.endswith("%")
    try:
        value = Decimal(cleaned.removesuffix("%"))
    except InvalidOperation:
        return None
    if not value.is_finite():
        return None
    return value / 100 if percent else value


def _math_equal(got: str, reference: str) -> bool:
    """By math-verify, for expressions that are cheap to evaluate; a reply must not be able to stop the run.

    Not by a time limit: verdicts would depend on the machine, and the package's own limit uses a signal.
    """
    if not any(c.isdigit() for c in reference) or not (_is_cheap(got) and _is_cheap(reference)):
        return False  # prose is compared as text
    try:
        from math_verify import parse, verify
    except ImportError:
        return False
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns at every call that no time limit is set
    try:
        parsed = [parse(f"${text}$", parsing_timeout=None) for text in (reference, got)]
        return bool(verify(*parsed, timeout_seconds=None))
    except Exception:  # whatever a parser of mathematics raises over a model's words: they are not the same expression
        return False


LONGEST, LARGEST_POWER = 200, 1_000
_COMMAND = re.compile(r"\\([A-Za-z]+)")
_CHEAP = set(
    re.findall(
        r"\w+",
        "frac dfrac tfrac sqrt pi text textbf mathrm mathbf left right cdot times div pm mp le leq ge geq ne neq lt gt infty "
        "circ quad in cup cap emptyset sin cos tan log ln theta alpha beta",
    )
)
# After ^ or **: a short number, fraction or sum, in brackets or not, without another power inside.
_POWER = re.compile(r"(?:\^|\*\*)\s*(?:\{([^{}^*!]{1,16})\}|\(([^()^*!]{1,16})\)|(-?\w{1,4}|\\circ))")


def _is_cheap(text: str) -> bool:
    """No sums, integrals, factorials or unknown functions; all its powers together at most `LARGEST_POWER`."""
    if len(text) > LONGEST or "!" in text or not _CHEAP.issuperset(_COMMAND.findall(text)):
        return False
    if re.search(r"[A-Za-z]{2,}\s*\(", _COMMAND.sub(" ", text)) or re.search(r"(?:\^|\*\*)\s*-?\w+\s*(?:\^|\*\*)", text):
        return False  # a function by its name, or a tower of powers
    powers = [next(part for part in match if part) for match in _POWER.findall(text)]
    if len(powers) != text.count("^") + text.count("**"):
        return False
    product = 1
    for power in powers:
        product *= max([int(digits) for digits in re.findall(r"\d+", power)] + [1])
    return product <= LARGEST_POWER
