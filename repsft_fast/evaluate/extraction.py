r"""Where the answer stands in a reply: in `\boxed{}`, behind `####`, as the last number, or it is the reply.

A thought, `<think>…</think>`, is no part of a reply: answers are looked for behind the last `</think>`, and a
thought that never ends holds none. A box is the exception, as in paper A's scorer: the last one of the whole
text counts, wherever it stands.
"""

from __future__ import annotations

import re

_BOX = re.compile(
    # \boxed{…}, or what TeX would take without braces: a number, a command, one capital letter
    r"\\(?:boxed|fbox)\s*(?:(?P<open>\{)|(?P<bare>[-+−]?[\d.][^\s${}]*|\\[a-zA-Z]+(?:\{[^{}]*\})+|[A-Z](?![A-Za-z])))"
)
# A minus behind a digit, a letter or a bracket subtracts.
_SIGN = r"(?:(?<![\w)\]}])[-+−–](?:\\?\$)?)?"
_FRACTION = r"(?:\d+\s*)?\\[dt]?frac\{\d+\}\{\d+\}|(?<![\d/])(?:\d{1,3} )?\d+/\d+(?![\d/]|\.\d)"
_WHOLE = r"\d{1,3}(?:(?:,|\{,\})\d{3})+(?!\d)|\d+"
_NUMBER = re.compile(rf"{_SIGN}(?:{_FRACTION}|(?:(?:{_WHOLE})(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?(?:\\?%)?)")


def spoken(text: str) -> str:
    """What of a reply is no thought: behind the last `</think>`, before a `<think>` that never ends."""
    return text.rpartition("</think>")[2].partition("<think>")[0]


def boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{…}` or `\fbox{…}`, braces balanced, escaped ones aside; None without
    one or when it never closes."""
    last = max(_BOX.finditer(text), key=re.Match.start, default=None)
    if last is None:
        return None
    if not last["open"]:
        return last["bare"].rstrip(".,;:")
    depth, at = 1, last.end()
    while at < len(text):
        if text[at] == "\\":
            at += 1  # whatever it escapes
        elif text[at] == "{":
            depth += 1
        elif text[at] == "}":
            depth -= 1
            if depth == 0:
                return text[last.end() : at].strip()
        at += 1
    return None


def hashes(text: str) -> str | None:
    """What follows the last `####` on its line (GSM8K's way)."""
    _, found, rest = spoken(text).rpartition("####")
    return rest.split("\n", 1)[0].strip() if found else None


def last_number(text: str) -> str | None:
    r"""The last number, as written: 1,234  −.5  2.5e3  50%  3/4  1 1/2  \frac{3}{4}."""
    last = max(_NUMBER.finditer(spoken(text)), key=re.Match.start, default=None)
    return last.group() if last else None


def number(text: str) -> str | None:
    r"""`\boxed{}`, else `####`, else the last number: for answers that are numbers."""
    return boxed(spoken(text).strip() or text) or hashes(text) or last_number(text)


def whole(text: str) -> str | None:
    """The whole reply, stripped."""
    return spoken(text).strip() or None


def final_answer(text: str) -> str | None:
    r"""The answer a reader would take: `\boxed{}`, else `####`, else the whole reply. A thought's box is
    taken where nothing is said behind it."""
    return boxed(spoken(text).strip() or text) or hashes(text) or whole(text)
