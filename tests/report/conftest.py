import pytest


@pytest.fixture(autouse=True)
def in_pixels(real_pictures):
    """What is drawn is looked at here."""


@pytest.fixture
def drawn(monkeypatch):
    """Every figure that gets saved, to look at its axes and words."""
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))[1]
    )
    return figures
