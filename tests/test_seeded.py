"""Draws by key: the integers of the first version, so that no library and no change can move a sample."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest

from repsft_fast import seeded

STAGE = seeded.key_of(42, 0, 1)
SUBSET = seeded.key_of_text("42 subset")
PROBE = 42 | 7 << 64


def test_keys():
    assert STAGE == 95836711446639576447026857725670091940
    assert SUBSET == 125024295558080322982940482620219570791
    assert seeded.key_of(np.int64(42), np.int32(0), 1) == STAGE
    others = [seeded.key_of(*k) for k in ((42, 1, 0), (4, 20, 1), (42, 0, "1"), (42, 0), (42, "0, 1"))]
    assert len({STAGE, *others}) == 6


def test_words():
    assert seeded.words(STAGE, 3).tolist() == [4002292723457022935, 15334635360825542051, 7499176961802028575]
    assert seeded.words(STAGE, 3).dtype == np.uint64


def test_permutations():
    assert seeded.permutation(STAGE, 12).tolist() == [3, 8, 0, 10, 5, 2, 11, 7, 6, 4, 1, 9]
    assert seeded.permutation(SUBSET, 12).tolist() == [0, 8, 6, 11, 7, 5, 9, 2, 10, 1, 4, 3]
    assert seeded.permutation(STAGE, 0).tolist() == []
    assert sorted(seeded.permutation(SUBSET, 1000).tolist()) == list(range(1000))


def test_choices():
    assert seeded.choice(PROBE, 100, 8).tolist() == [3, 28, 30, 49, 54, 61, 84, 95]
    assert seeded.choice(PROBE, 20_000, 500)[:6].tolist() == [40, 175, 178, 195, 235, 247]
    drawn = hashlib.blake2b(digest_size=8)
    sizes = (
        (1, 1),
        (7, 3),
        (100, 100),
        (3000, 64),
        (10_000, 400),
        (10_001, 201),
        (20_000, 400),
        (20_000, 512),
    )
    for key in (PROBE, 1 << 64, 2**63 - 1 | (5 * 65536 + 2) << 64):
        for population, count in sizes:
            found = seeded.choice(key, population, count)
            assert len(set(found.tolist())) == count
            drawn.update(found.astype("<i8").tobytes())
    assert drawn.hexdigest() == "a49b8b2b246ca78a"


def test_a_refused_draw_is_drawn_again():
    """Bounds near 2^32 refuse every second number, which sizes that fit a test hardly ever do."""
    ours, bits = seeded._Halves(PROBE), np.random.Philox(key=PROBE)
    theirs = np.random.Generator(bits)
    for bound in (2**31 + 1, 3, 2**32 - 1, 1, 2**31 + 12345) * 20:
        assert ours.below(bound) == theirs.integers(0, bound)


@pytest.mark.parametrize("draw", ["words(9, 4)", "permutation(9, 4)", "choice(9, 40, 4)"])
def test_nothing_else_is_drawn_from_or_moved(draw):
    """The same in a process that has drawn other numbers, and numpy's own stream stays where it is."""
    code = (
        "import numpy as np; from repsft_fast import seeded; np.random.seed(5); a = np.random.get_state()[1:3];"
        f"x = seeded.{draw}; b = np.random.get_state()[1:3]; assert (a[0] == b[0]).all() and a[1] == b[1];"
        "print(x.tolist())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == str(eval(f"seeded.{draw}").tolist())
