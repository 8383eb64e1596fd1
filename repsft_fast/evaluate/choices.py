"""Which letter of a multiple choice a reply names."""

from __future__ import annotations

import re

from repsft_fast.evaluate.extraction import boxed, spoken

LETTERS = "ABCDEFGHIJ"

_FONT = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mathsf|mbox|boldsymbol)\s*(?=\{)")
_OPEN, _CLOSE = r"[\s*_$(\[{\"'“‘`]{0,6}", r"[\s*_$)\]}\"'”’`]{0,6}"
_IS = r"(?:\s*(?:is|was|would be|should be|must be|has to be|=|:|-|–|—|\*\*|__)){1,3}"
_NAMED = r"(?:(?:option|choice|letter|answer)\s+)?"
# What `A` may go on with where it is no article.
_GOES_ON = r"(?:because|since|as|is|was|and|or|for|with|due|which|based|would|can)\b"
_ARTICLE = rf"(?<=[AI])\s+(?!{_GOES_ON})[a-z]"
# What says that this is the answer. The last one counts. `or`: it says of another too.
_STATED = re.compile(
    rf"(?i:\banswer|\b(?:correct|right|best|final|my)\s+(?:option|choice|letter)){_CLOSE}(?i:{_IS})"
    rf"{_OPEN}(?i:{_NAMED}){_OPEN}([A-Z])(?![A-Za-z'’]|{_ARTICLE})(?P<more>\)?\s*(?:or|and|[/,&])\s*\(?[A-HJ-Z]\b)?"
    r"|(?i:\banswer(?:\s+is)?|\bchoose|\bselect|\bpick)[\s:*]*(?i:option\s+|choice\s+)?\(([A-Za-z])\)"
    rf"|(?<![A-Za-z])\(?([A-Z])\)?(?:\*\*)?\s+is\s+(?:the\s+|therefore\s+)*(?:correct|right|best|answer)\b"
    r"|####\s*\(?([A-Z])(?![A-Za-z])"
)
# A line that is a letter, or begins with one as a choice does.
_LINE = re.compile(
    rf"^{_OPEN}([A-Z])(?:{_CLOSE}[.,]?{_CLOSE}$|{_CLOSE}[.):]{_CLOSE}(?=\s)(?!\s+{_GOES_ON}))", re.MULTILINE
)
_MARKED = re.compile(r"(?<!not )(?:\(([A-Z])\)|\*\*\(?([A-Z])[).:]?\*\*)")
_LONE = re.compile(rf"(?<![A-Za-z'’-])(?<!not )(?<!not \()([A-HJ])(?![A-Za-z'’-]|{_ARTICLE})")


def choice(text: str, count: int = len(LETTERS)) -> str | None:
    r"""The letter that a reply to a question with `count` choices names, as one of A … J.

    Looked for in this order: in the last box; where the reply says that it is the answer (the last time it
    does); as a line, or the start of one; in brackets or bold; alone in the text. In the last three only
    where it is one letter: of several that stand side by side none is the answer. A letter that is named and
    is no choice is none either.
    """
    letter = _of_box(boxed(text))
    text = re.sub(r"(\s)\s+", r"\1", _FONT.sub("", spoken(text)))
    stated = list(_STATED.finditer(text))
    if letter is None and stated:
        letter = "".join(part for part in stated[-1].groups() if part).upper()
    for pattern in (_LINE, _MARKED, _LONE):
        if letter is None:
            found = dict.fromkeys(
                "".join(part for part in m.groups() if part) for m in pattern.finditer(text)
            )
            letter = "".join(found) or None
    return letter if letter and letter in LETTERS[:count] and len(letter) == 1 else None


def _of_box(content: str | None) -> str | None:
    """Of `B`, `(b)`, `\\text{B}`, `B. a text`; more than one letter: all of them, which is no choice."""
    if content is None:
        return None
    plain = re.sub(rf"^(?i:{_NAMED})", "", _FONT.sub("", content).strip("{}$ *_"))
    if found := re.match(rf"{_OPEN}([A-Za-z])(?:{_CLOSE}\.?$|{_CLOSE}[.):])", plain):
        return found[1].upper()
    letters = dict.fromkeys(re.findall(r"(?<![A-Za-z'’])([A-Z])(?![A-Za-z'’])", plain))
    return "".join(letters) or None
