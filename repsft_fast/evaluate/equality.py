"""Whether two answers are the same: as text, as numbers with their unit, as mathematical expressions.

Expressions are read by `math-verify`, which reads anything: words become products of their letters ("step 1"
is "pets 1"), dates become differences, rows of numbers become sums. So what goes there is what looks like
mathematics on both sides; the rest is compared as text.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from fractions import Fraction

LONGEST, LONGEST_NUMBER = 1_000, 4_000  # characters

_WRAPPED = re.compile(
    r"\*\*(?P<b>[^*]*)\*\*|\\\((?P<p>.*)\\\)|\\\[(?P<d>.*)\\\]"
    r"|\\(?:text|textbf|textit|mathrm|mathbf|mbox)\s*\{(?P<t>[^{}]*)\}|\((?P<l>[A-J])\)",
    re.DOTALL,
)
_UNIT = re.compile(
    r"(?:\\[,;:! ]|~|\s)*(?:(?P<degrees>\^\s*\{?\s*\\circ\s*\}?|°)"
    r"|\\(?:text|mathrm|mbox)\s*\{[\s~]*(?P<set>[A-Za-z][A-Za-z ]*?)[\s~.]*\}"
    r"|\s(?P<plain>(?:square |cubic )?[A-Za-z]{2,}|[a-zA-Z](?<![x-z]))"
    r"|(?<=\d)(?P<glued>kg|mg|km|cm|mm|ml|lbs?|ft|oz|mph|am|pm))(?:\^\{?\d\}?)?$"
)
_NO_UNIT = {"or", "and", "not", "to", "plus", "minus", "times", "is", "than", "if", "pi", "in"}
_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_PLAIN = re.compile(
    r"(?=\.?\d)(?P<whole>\d{1,3}(?:,\d{3})+|\d{1,2}(?:,\d{2})+,\d{3}|\d*)(?P<part>\.\d*)?(?:[eE](?P<power>[-+]?\d{1,3}))?"
)
_MIXED = re.compile(r"(?<!\d)(\d+)\s+(\d+)\s*/\s*(\d+)(?!\d)")
_FRACTION = re.compile(
    r"(?:(?P<whole>\d+)\s*)?(?:\\[dt]?frac\s*(?:\{(?P<a>\d+)\}\s*\{(?P<b>\d+)\}|(?P<c>\d)\s*(?P<d>\d))"
    r"|(?:(?<=\s)|(?<!\d))(?P<e>\d+)\s*/\s*(?P<f>\d+))"
)


@dataclass(frozen=True)
class _Number:
    value: Fraction
    plain: bool  # written in decimals
    percent: bool
    unit: str


def same_by_text(got: str | None, reference: str) -> bool | None:
    """Equal as text or as numbers; None where only their mathematics can tell."""
    if got is None:
        return False
    got, reference = _normal(got), _normal(reference)
    if got == reference:
        return True
    a, b = _number(got), _number(reference)
    if a is None or b is None:
        return None
    if a.unit and b.unit and a.unit != b.unit:
        return False
    # what percentage? 50 and 50% are one answer
    same = a.value == b.value or (
        a.percent != b.percent and a.value * 100**a.percent == b.value * 100**b.percent
    )
    return True if same else False if a.plain and b.plain else None


def as_expressions(got: str, reference: str) -> tuple[str, str] | None:
    """Both as math-verify shall read them; None where one of them is no mathematics, or their units differ:
    they are not the same."""
    if max(len(got), len(reference)) > LONGEST:
        return None
    (got, unit), (reference, other) = _split_unit(_normal(got)), _split_unit(_normal(reference))
    if unit != other and ((unit and other) or _SCALES.keys() & {unit, other}):
        return None
    # a mixed number would be read as its whole part
    got, reference = (_MIXED.sub(r"\1\\frac{\2}{\3}", text.replace("$", "")) for text in (got, reference))
    return (got, reference) if _is_expression(got) and _is_expression(reference) else None


def _normal(text: str) -> str:
    """On one line, without what only wraps it."""
    text, before = " ".join(text.split()), None
    while text != before:
        before = text
        text = text.strip().strip("$").rstrip(".,;").strip()
        if wrapped := _WRAPPED.fullmatch(text):
            text = next(part for part in wrapped.groups() if part is not None)
    return text


def _split_unit(text: str) -> tuple[str, str]:
    """(what it is a quantity of, the unit), "" without one."""
    found = _UNIT.search(text)
    if found is None or not any(c.isdigit() for c in text[: found.start()]):
        return text, ""
    unit = "°" if found["degrees"] else (found["set"] or found["plain"] or found["glued"]).lower()
    return (text, "") if unit in _NO_UNIT else (text[: found.start()], "°" if unit == "degrees" else unit)


def _number(text: str) -> _Number | None:
    if len(text) > LONGEST_NUMBER:
        return None
    text = (
        re.sub(r"[−–]", "-", text).replace("\\$", "").replace("$", "").replace("{,}", ",").replace("\\!", "")
    )
    text, unit = _split_unit(text)
    scale = Fraction(_SCALES.get(unit, 1))
    digits = re.sub(r"\s*\\?%$", "", text)
    percent = digits != text or unit in ("percent", "pct")
    negative = digits.startswith("-")
    digits = digits[digits.startswith(("-", "+")) :].lstrip()
    value = _value(digits)
    if value is None:
        return None
    unit = "" if percent or unit in _SCALES else unit
    plain = _PLAIN.fullmatch(digits) is not None
    return _Number((-value if negative else value) * scale / (100 if percent else 1), plain, percent, unit)


def _value(digits: str) -> Fraction | None:
    """Of a number without a sign: decimals, a fraction or a mixed number."""
    if plain := _PLAIN.fullmatch(digits):
        value = Fraction(f"{plain['whole'].replace(',', '') or 0}{(plain['part'] or '').rstrip('.')}")
        return value * Fraction(10) ** int(plain["power"] or 0)
    if found := _FRACTION.fullmatch(digits):
        above, below = (
            int(next(filter(None, found.group(*names)))) for names in (("a", "c", "e"), ("b", "d", "f"))
        )
        if below and (found["whole"] is None or above < below):
            return int(found["whole"] or 0) + Fraction(above, below)
    return None


_COMMAND = re.compile(r"\\(?:begin|end)\{\w+\}|\\[A-Za-z]+")
_FUNCTIONS = set(
    re.findall(
        r"\w+",
        "sqrt sin cos tan cot sec csc arcsin arccos arctan log exp det max min gcd lcm mod and inf abs",
    )
)
# rows of numbers, dates and ranges, times and versions: none of them is a sum, a difference or a quotient
_NO_MATHEMATICS = re.compile(
    r".*(?<![_\d])\d+\s+[\d.].*|[-−]?[\d.]+(?:\s+[-−]?[\d.]+)+"
    r"|\d+(?:\s*[-−–]\s*\d+)+|\d+(?:[/:.]\d+){2,}|.*\d:\d\d\s*[AaPp]\.?[Mm].*"
)


def _is_expression(text: str) -> bool:
    """Whether it may be read as mathematics: signs of it, and no words but names of functions."""
    if _NO_MATHEMATICS.fullmatch(text):
        return False
    bare = _COMMAND.sub(" ", text)
    words = {word.lower() for word in re.findall(r"[^\W\d_]{3,}", bare)}
    return words <= _FUNCTIONS and (bare != text or re.search(r"[\d+*/^=<>|≤≥√π∞-]", text) is not None)


def same_in_process(got: str, reference: str) -> bool:
    """By math-verify, in this process and without a time limit: for expressions that are cheap to evaluate.
    False for others, and where it is not installed."""
    pair = as_expressions(got, reference)
    if pair is None or not all(map(_is_cheap, pair)):
        return False
    try:
        from math_verify import LatexExtractionConfig, parse, verify
    except ImportError:
        return False
    # it warns at every call that no time limit is set
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    try:
        found, right = (
            parse(f"${text}$", [LatexExtractionConfig()], parsing_timeout=None)  # type: ignore[arg-type]
            for text in pair
        )
        return bool(verify(right, found, timeout_seconds=None))
    # whatever a parser of mathematics raises over a model's words: they are not the same expression
    except Exception:
        return False


LONGEST_CHEAP, LARGEST_POWER = 200, 1_000
_CHEAP = set(
    re.findall(
        r"\w+",
        "frac dfrac tfrac sqrt pi text textbf mathrm mathbf left right cdot times div pm mp le leq ge geq ne"
        " neq lt gt infty circ quad in cup cap emptyset sin cos tan log ln theta alpha beta",
    )
)
# After ^ or **: a short number, fraction or sum, in brackets or not, without another power inside.
_POWER = re.compile(r"(?:\^|\*\*)\s*(?:\{([^{}^*!]{1,16})\}|\(([^()^*!]{1,16})\)|(-?\w{1,4}|\\circ))")


def _is_cheap(text: str) -> bool:
    """No sums, integrals, factorials or unknown functions; all its powers together at most
    `LARGEST_POWER`."""
    names = {name[1:] for name in _COMMAND.findall(text)}
    if len(text) > LONGEST_CHEAP or "!" in text or not names <= _CHEAP:
        return False
    if re.search(r"[A-Za-z]{2,}\s*\(", _COMMAND.sub(" ", text)) or re.search(
        r"(?:\^|\*\*)\s*-?\w+\s*(?:\^|\*\*)", text
    ):
        return False  # a function by its name, or a tower of powers
    powers = [next(part for part in match if part) for match in _POWER.findall(text)]
    if len(powers) != text.count("^") + text.count("**"):
        return False
    product = 1
    for power in powers:
        product *= max([int(digits) for digits in re.findall(r"\d+", power)] + [1])
    return product <= LARGEST_POWER
