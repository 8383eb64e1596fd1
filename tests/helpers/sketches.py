"""Pictures of runs as sketches: what was drawn in words and numbers, under a PNG's signature.

Laying out letters and filling 1,500 × 630 pixels is most of what a tiny run computes. Everything of ours is run
and looked at (records read, figure made, file written whole); only matplotlib's own pass over the figure is left
out. tests/report and whoever takes the fixture `real_pictures` draw pixels.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from repsft_fast.report import mixture_picture, picture

_REAL = picture.save
_FACTS = (
    "get_text", "get_xydata", "get_array", "get_offsets", "get_verts", "get_xlim", "get_ylim",
)  # fmt: skip


def sketch(figure: Any) -> bytes:
    """Equal where the pictures are: every artist, its place in the figure, words, points and colours."""
    lines = []
    for artist in _shown(figure):
        facts = [repr(getattr(artist, fact)()) for fact in _FACTS if hasattr(artist, fact)]
        colour = artist.get_color() if hasattr(artist, "get_color") else ""
        if hasattr(artist, "get_major_locator"):
            places = artist.get_major_locator()
            given = list(getattr(places, "locs", ()))
            facts += [
                type(places).__name__,
                repr(given),
                repr(artist.get_major_formatter().format_ticks(given)),
            ]
        lines.append(f"{type(artist).__name__} {colour} {' '.join(facts)}")
    return b"\x89PNG\r\n\x1a\n" + "\n".join(lines).encode()


def _shown(artist: Any) -> Iterator[Any]:
    """Everything in it but ticks, which matplotlib lays out anew for each size: where ours are, an axis says."""
    yield artist
    if hasattr(artist, "get_major_locator"):
        yield artist.label
        return
    for part in artist.get_children():
        yield from _shown(part)


def save(figure: Any, folder: Path) -> Path:
    """As `picture.save`."""
    return picture.write_whole(folder / picture.FILE, sketch(figure))


def install(real: bool = False) -> None:
    """From here on this process, and what it forks, sketches, or draws again."""
    picture.save = mixture_picture.save = _REAL if real else save
