"""The pieces of the row pass: block maxima, the first arg-max, buffers and chunk sizes."""

import pytest
import torch

from repsft_fast.ops import row_pass


@pytest.mark.parametrize("columns", [2, 5, 127, 128, 129, 256, 300, 1000])
def test_first_and_second_are_those_of_a_sort_with_ties(columns):
    generator = torch.Generator().manual_seed(columns)
    # few values: ties within and across blocks
    x = torch.randint(-3, 4, (200, columns), generator=generator).float()
    x[::2] = torch.randn(100, columns, generator=generator)
    maxima = torch.full((200, -(-columns // row_pass.MAXIMA_BLOCK)), torch.nan)
    row_pass.block_maxima(x, out=maxima)
    block = maxima.argmax(1, keepdim=True)
    candidates = torch.full((200, row_pass.MAXIMA_BLOCK), torch.nan)
    row_pass.take_block(x, block, out=candidates)
    best, inside = candidates.max(dim=1, keepdim=True)
    second = row_pass.second_largest(maxima, block, candidates, inside)
    expected = x.sort(dim=1, descending=True).values
    assert torch.equal(best[:, 0], expected[:, 0])
    assert torch.equal(second, expected[:, 1])
    assert torch.equal((block * row_pass.MAXIMA_BLOCK + inside)[:, 0], x.argmax(1))


@pytest.mark.parametrize("rows", [0, 1, 7, 512, 1000, 8191])
@pytest.mark.parametrize("vocabulary", [2, 300, 8192, 151936])
@pytest.mark.parametrize("budget", [1, 1 << 20, 1 << 26])
def test_chunks_cover_every_row_once_within_the_budget(rows, vocabulary, budget):
    ranges = row_pass.chunk_ranges(rows, vocabulary, 4, budget)
    assert [row for low, high in ranges for row in range(low, high)] == list(range(rows))
    sizes = [high - low for low, high in ranges]
    assert all(size * vocabulary * 4 <= budget or size == 1 for size in sizes)
    if budget >= rows * vocabulary * 4 * 1.25 + row_pass.CACHE_BLOCK_BYTES:
        assert len(ranges) <= 1


def test_default_budget_on_a_cpu():
    cpu = torch.device("cpu")
    row = 49152 * 4
    assert row_pass.default_chunk_bytes(1024, 49152, 4, cpu) == 1024 * row // 4
    # below, the GEMMs lose more than the memory is worth
    assert row_pass.default_chunk_bytes(10, 49152, 4, cpu) == 128 * row
    assert row_pass.default_chunk_bytes(10**6, 49152, 4, cpu) == 64 << 20
    assert row_pass.default_chunk_bytes(10, 300, 4, cpu) == 10 << 20
    assert row_pass.default_chunk_bytes(1023, 8192, 4, cpu) == 10 << 20
    # from 32 MiB on a quarter of the full logits
    assert row_pass.default_chunk_bytes(1024, 8192, 4, cpu) == 8 << 20


@pytest.fixture
def h100(monkeypatch):
    """80 GB by its properties; nobody may ask what is free."""
    properties = type("Properties", (), {"total_memory": 85_017_755_648})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(
        torch.cuda, "mem_get_info", lambda *_: pytest.fail("what is free must not decide the rounding")
    )
    return torch.device("cuda")


@pytest.mark.parametrize(
    ("rows", "vocabulary", "chunks"),
    [(8_192, 128_256, 1), (32_768, 128_256, 7), (16_384, 151_936, 1), (20_000, 128_256, 1)],
)
def test_chunks_on_an_h100(rows, vocabulary, chunks, h100):
    """bf16: 2.1 GB, 8.4 GB, 5.0 GB and 5.1 GB of logits; 1/16 of the memory is 5.3 GB, 1/64 is 1.3."""
    budget = row_pass.default_chunk_bytes(rows, vocabulary, 2, h100)
    assert len(row_pass.chunk_ranges(rows, vocabulary, 2, budget)) == chunks
    if chunks > 1:
        assert budget == 85_017_755_648 // 64


@pytest.mark.parametrize("rows", [0, 1, 7, 8_192])
@pytest.mark.parametrize("vocabulary", [2, 300, 151_936, 3_000_000])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_one_chunk_is_enough_for_its_rows_and_all_fewer_ones(rows, vocabulary, itemsize):
    budget = row_pass.one_chunk_bytes(rows, vocabulary, itemsize)
    for fewer in {0, 1, rows // 2, rows}:
        assert len(row_pass.chunk_ranges(min(fewer, rows), vocabulary, itemsize, budget)) == min(
            fewer, rows, 1
        )
    assert budget <= (rows + 1) * vocabulary * itemsize + row_pass.CACHE_BLOCK_BYTES


def test_two_rooms_that_allow_one_chunk_give_one_value():
    one = row_pass.one_chunk_bytes(100, 50, 2)
    sizes = {"total_bytes": 64 * 777, "rows": 100, "vocabulary": 50, "itemsize": 2}
    assert {
        row_pass.gpu_chunk_bytes(room_bytes=room, **sizes) for room in (16 * one, 16 * one + 99, 10**12)
    } == {one}
    assert row_pass.gpu_chunk_bytes(room_bytes=16 * one - 1, **sizes) == 777
    assert row_pass.gpu_chunk_bytes(room_bytes=0, **{**sizes, "total_bytes": 3}) == 1, (
        "at least a byte: a row at a time"
    )


def test_logits_are_held_in_the_dtype_of_the_path(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for device, dtype, expected in (
        (cuda, torch.bfloat16, torch.bfloat16), (cuda, torch.float32, torch.float32), (cuda, torch.float64, torch.float64),
        (cpu, torch.bfloat16, torch.float32), (cpu, torch.float64, torch.float64),
    ):  # fmt: skip
        assert row_pass.logits_dtype(device, dtype) == expected


@pytest.mark.parametrize(("rows", "chunks"), [(1, 1), (256, 1), (257, 2), (512, 2), (1023, 4), (1024, 5)])
def test_small_heads_go_in_few_chunks_on_a_cpu(rows, chunks):
    """8,192 columns: 8 MiB of logits hold 256 rows, and the row pass's own 2 MiB do not shrink them."""
    budget = row_pass.default_chunk_bytes(rows, 8192, 4, torch.device("cpu"))
    assert len(row_pass.chunk_ranges(rows, 8192, 4, budget)) == chunks


def test_a_buffer_is_reused_and_grows():
    first = row_pass.workspace("a test", 4, 8, torch.float32, torch.device("cpu"))
    again = row_pass.workspace("a test", 2, 8, torch.float32, torch.device("cpu"))
    assert first.data_ptr() == again.data_ptr()
    larger = row_pass.workspace("a test", 9, 8, torch.float32, torch.device("cpu"))
    assert larger.shape == (9, 8)
    assert row_pass.workspace("a test", 4, 8, torch.float64, torch.device("cpu")).dtype == torch.float64


def test_a_buffer_born_in_inference_mode_can_be_trained_with():
    with torch.inference_mode():
        row_pass.workspace("born in inference", 2, 2, torch.float32, torch.device("cpu"))
    row_pass.workspace("born in inference", 2, 2, torch.float32, torch.device("cpu")).fill_(1.0)


def test_the_kernel_is_chosen_on_cuda_and_under_the_interpreter_only(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not row_pass.kernel_runs(torch.device("cpu"), torch.float32)
    assert row_pass.kernel_runs(torch.device("cuda"), torch.bfloat16)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert row_pass.kernel_runs(torch.device("cpu"), torch.float32)
    assert not row_pass.kernel_runs(torch.device("cpu"), torch.float64)
