"""Text that came from elsewhere (rows, file names, task names, templates, models' answers), made fit to be
shown.

Such text is data: a terminal must not obey it, and a reader must see all of it. So what has no picture of its
own (control characters, escape sequences, marks that turn the direction of writing, zero-width ones, spaces
that are not the space, halves of surrogate pairs) is spelled as Python spells it, and what is printed is the
same on a terminal and in a file.
"""

import sys
from collections.abc import Sequence
from functools import cache
from typing import Any, TextIO

NEW_LINE = "⏎\n"  # a new line of the text is seen and made
TAB = "⇥"
# Without a picture although Unicode calls them letters or marks: fillers, joiners, vowels that are never
# drawn.
_BLANK = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u3164\uffa0")


def visible(text: str, new_line: str = NEW_LINE, *, also: str = "") -> str:
    """The text with everything that could not be seen spelled: ESC as \\x1b, U+202E as \\u202e; a tab as ⇥.

    new_line: what stands for one. also: characters that mean something where this is shown, spelled too.
    """
    shown = text if text.isascii() and text.isprintable() else "".join(map(_shown, text))
    for character in also:
        shown = shown.replace(character, _escape(character))
    return shown.replace("\n", new_line)


def one_line(text: str) -> str:
    """As `visible`, for names and sentences: new lines are seen and not made."""
    return visible(text, "⏎")


def padded(text: str, width: int) -> str:
    """Filled up with spaces to `width` columns; a character of East Asian scripts takes two."""
    return text + " " * (width - columns(text))


def columns(text: str) -> int:
    from rich.cells import cell_len

    return cell_len(text)


def aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """Columns side by side, each as wide as it must be, two spaces between them."""
    widths = [max(map(columns, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(padded(cell, width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]


def console(stream: TextIO | None = None, *, terminal: bool | None = None) -> Any:
    """A rich console for data: no markup, no emoji, nothing coloured by guessing. None = standard output."""
    from rich.console import Console

    escaping(stream)
    return Console(file=stream, markup=False, emoji=False, highlight=False, force_terminal=terminal)


def show(to: Any, text: Any, style: str = "") -> None:
    """Print a str or a rich Text whole, whatever the width: broken in two it could not be copied, nor be the
    same in a file."""
    from rich.text import Text

    to.print(text if isinstance(text, Text) else Text(text, style=style), soft_wrap=True)


def escaping(stream: TextIO | None = None) -> None:
    """Where the stream cannot write a character (an ASCII terminal, a pipe under LANG=C), let it spell it and
    go on."""
    stream = stream if stream is not None else sys.stdout
    encoding = (getattr(stream, "encoding", None) or "utf-8").lower().replace("-", "").replace("_", "")
    if encoding not in ("utf8", "utf16", "utf32") and hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")


@cache
def _shown(character: str) -> str:
    if character == "\n":
        return character
    if character == "\t":
        return TAB
    # Python calls controls, formats, surrogates, private and unassigned ones, and spaces but for the one, not
    # printable.
    return character if character.isprintable() and character not in _BLANK else _escape(character)


def _escape(character: str) -> str:
    number = ord(character)
    return (
        f"\\x{number:02x}"
        if number < 0x100
        else f"\\u{number:04x}"
        if number < 0x10000
        else f"\\U{number:08x}"
    )
