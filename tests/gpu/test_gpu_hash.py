"""The state hash: the number of the device is that of the CPU, whatever the size, the type and the
strides."""

import pytest
import torch

from csrc_triton import state_hash
from csrc_triton.state_hash import BLOCK_WORDS, checksum, checksums
from tests.gpu.places import anywhere


def random_bytes(n: int) -> torch.Tensor:
    return torch.randint(0, 256, (n,), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))


@anywhere("state hash", on=None)
@pytest.mark.parametrize("n", [0, 1, 9, 8 * BLOCK_WORDS, 8 * BLOCK_WORDS + 8, 10_000_019])
def test_the_gpu_gives_the_number_of_the_cpu(place, n):
    data = random_bytes(n)
    there = data.to(place.device)
    assert checksum(there).item() == checksum(data).item() == checksum(there, plain=True).item()


@anywhere("state hash", on="interpreter")
def test_the_kernel_is_plain_torch(place, monkeypatch):
    monkeypatch.setattr(state_hash, "MAX_PROGRAMS", 2)  # so that a program loops over several blocks
    for n in (1, BLOCK_WORDS - 1, BLOCK_WORDS, 5 * BLOCK_WORDS + 5):
        words = random_bytes(8 * n).view(torch.int64)
        assert state_hash._sum_triton(words.to(place.device)).item() == state_hash._sum_plain(words).item(), n


@anywhere("state hash")
def test_every_type_stride_and_place_in_memory(place):
    """What a state holds: halves, bytes, a scalar, NaN, rows that are no whole words, views that begin in the
    middle."""
    data = random_bytes(3 * 8192 + 5)
    tensors = [
        data[:4096].view(torch.bfloat16), data[4096:8192].view(torch.float32).view(32, 32).t(), data[1:], data[3:4099],
        torch.tensor(7), torch.zeros(0), torch.full((1000,), float("nan")), data[:8192].view(torch.int64)[5::2],
    ]  # fmt: skip
    assert checksums([t.to(place.device) for t in tensors]) == checksums(tensors)
    moved = data.to(place.device)
    assert checksums([moved[1:], moved[3:4099]]) == checksums([data[1:], data[3:4099]])
