"""The checksum equals its definition word by word, in plain torch and in the kernel, and sees what an XOR
does not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from csrc_triton import state_hash
from csrc_triton.state_hash import CHUNK_WORDS, GOLDEN, SALT, checksum, checksums, mix_int, wrap


def definition(data: bytes) -> int:
    """The formula of the docstring on Python integers."""
    total = mix_int(len(data) ^ SALT)
    for i in range(0, len(data), 8):
        total += mix_int(int.from_bytes(data[i : i + 8].ljust(8, b"\0"), "little") + i // 8 * GOLDEN)
    return wrap(total)


def random_bytes(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (n,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 15, 16, 17, 4096, 8191])
def test_plain_equals_the_definition(n):
    data = random_bytes(n)
    assert checksum(data).item() == definition(bytes(data.numpy()))


def test_chunks_do_not_show():
    data = random_bytes(8 * (2 * CHUNK_WORDS + 3))
    parts = [
        state_hash._sum_plain(w, first=f)
        for w, f in ((data[:800].view(torch.int64), 0), (data[800:].view(torch.int64), 100))
    ]
    whole = state_hash._sum_plain(data.view(torch.int64))
    assert (parts[0] + parts[1]).item() == whole.item()


INTERPRETED = """
import torch
from csrc_triton import state_hash
from csrc_triton.state_hash import BLOCK_WORDS
state_hash.MAX_PROGRAMS = 2  # so that a program loops over several blocks
for n in [1, 2, BLOCK_WORDS - 1, BLOCK_WORDS, 5 * BLOCK_WORDS + 5]:
    words = torch.randint(-(2**63), 2**63 - 1, (n,), generator=torch.Generator().manual_seed(n))
    assert state_hash._sum_triton(words).item() == state_hash._sum_plain(words).item(), n
print("equal")
"""


def test_the_kernel_equals_plain_torch():
    """In a process of its own: Triton reads TRITON_INTERPRET once, when the kernel is defined."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    run = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=env, capture_output=True, text=True, timeout=120
    )
    assert run.stdout == "equal\n", run.stderr


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int32, torch.bool, torch.float8_e4m3fn]
)
def test_every_single_bit_counts(dtype):
    data = torch.zeros(24, dtype=torch.uint8)
    seen = {checksum(data.view(dtype)).item()}
    for byte in range(24):
        for bit in range(8):
            changed = data.clone()
            changed[byte] = 1 << bit
            seen.add(checksum(changed.view(dtype)).item())
    assert len(seen) == 1 + 24 * 8


def test_swaps_paired_sign_flips_and_lengths_are_seen():
    x = torch.arange(1.0, 65.0)
    swapped = x.clone()
    swapped[[2, 40]] = swapped[[40, 2]]
    flipped = x.clone()
    flipped[[1, 3]] *= -1  # the top bit of two words: a plain multiply-and-add cancels these
    sums = checksums([x, swapped, flipped, x[:-1], torch.zeros(3), torch.zeros(4), torch.zeros(0)])
    assert len(set(sums)) == len(sums)
    assert all(0 <= s < 2**64 for s in sums)


def test_strides_and_offsets_do_not_count_only_content_does():
    x = torch.randn(6, 10)
    assert checksum(x.t()).item() == checksum(x.t().contiguous()).item()
    half = torch.randn(33).bfloat16()
    assert checksum(half[1:]).item() == checksum(half[1:].clone()).item()  # an odd start in memory
