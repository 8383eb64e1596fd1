"""Every draw that decides who trains on what: a pure function of its key, the same on every machine.

Random numbers are Philox4x64 (Salmon et al. 2011), read as raw 64-bit words: numpy promises that stream for
ever, and its `integers`, `permutation` and `choice` it does not. A key is 128 bits.
"""

from __future__ import annotations

import hashlib

import numpy as np

_HALF = 1 << 32


def key_of(*named: int | str) -> int:
    """128 bits for what names a draw. No two lists of names share one."""
    # numpy integers are spelled otherwise
    plain = tuple(part if isinstance(part, str) else int(part) for part in named)
    digest = hashlib.blake2b(repr(plain).encode(), digest_size=16, person=b"repsft plan").digest()
    return int.from_bytes(digest, "little")


def key_of_text(text: str) -> int:
    """128 bits for a text; the splits' keys, which are older than the plan's."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")


def words(key: int, count: int) -> np.ndarray:
    """[count] uint64."""
    return np.asarray(np.random.Philox(key=key).random_raw(count), dtype=np.uint64)


def permutation(key: int, count: int) -> np.ndarray:
    """[count] int64: 0 … count - 1 in the order of as many words."""
    return np.argsort(words(key, count), kind="stable")


def choice(key: int, population: int, count: int) -> np.ndarray:
    """[count] int64, ascending: `count` different numbers below `population`, each set as likely."""
    halves = _Halves(key)
    # Two ways, by the sizes, as in numpy's `Generator.choice` of 1.17 to 2.4: runs since then drew so.
    if population > 10_000 and count > population // 50:
        order = np.arange(population)
        for last in range(population - 1, max(population - count, 1) - 1, -1):
            other = halves.below(last + 1)
            order[last], order[other] = order[other], order[last]
        return np.sort(order[population - count :])
    chosen: set[int] = set()
    for last in range(population - count, population):  # Floyd's: a number drawn twice stands for the last
        drawn = halves.below(last + 1)
        chosen.add(last if drawn in chosen else drawn)
    return np.array(sorted(chosen), dtype=np.int64)


class _Halves:
    """The words of a key as numbers of 32 bits, the lower half first."""

    def __init__(self, key: int):
        self._words = np.random.Philox(key=key)
        self._upper: int | None = None

    def _next(self) -> int:
        if self._upper is not None:
            half, self._upper = self._upper, None
            return half
        word = int(self._words.random_raw())
        self._upper = word // _HALF
        return word % _HALF

    def below(self, bound: int) -> int:
        """A number from 0 to bound - 1, each as likely: multiply and reject (Lemire 2019). bound < 2^32."""
        if bound == 1:
            return 0  # costs no word
        product = self._next() * bound
        while product % _HALF < (_HALF - bound) % bound:
            product = self._next() * bound
        return product // _HALF
