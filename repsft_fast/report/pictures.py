"""The picture of a run, run.png: of a mixture its tasks, of any other run its curves."""

from __future__ import annotations

from pathlib import Path

FILE = "run.png"


def draw(folder: Path | str, *, mixture: bool) -> None:
    """Draw run.png into the run's folder; of a mixture timeline.json too. Raises RepsftError when there is
    nothing to draw."""
    # Here, because matplotlib takes half a second that a run without a picture need not wait for.
    if mixture:
        from repsft_fast.report import mixture_picture, timeline

        timeline.write(folder)
        mixture_picture.draw(folder)
        return
    from repsft_fast.report import picture

    picture.draw(folder)
