"""The checksum of host memory: the number csrc_triton.state_hash defines, in any blocks; and what is read is
what is summed."""

import os
import shutil
import threading

import numpy as np
import pytest
import torch

from csrc_triton.state_hash import GOLDEN, SALT, checksum, mix_int
from repsft_fast import checkpoint
from repsft_fast.checkpoint import hostsum, reader, shards
from repsft_fast.checkpoint.hostsum import HostChecksum, host_checksums
from repsft_fast.checkpoint.shards import READ_BLOCK_BYTES
from repsft_fast.errors import CheckpointError

WORDS = hostsum.CHUNK_WORDS


def definition(data: bytes) -> int:
    """The formula of state_hash's docstring on Python integers."""
    total = mix_int(len(data) ^ SALT)
    for i in range(0, len(data), 8):
        total += mix_int(int.from_bytes(data[i : i + 8].ljust(8, b"\0"), "little") + i // 8 * GOLDEN)
    return total % (1 << 64)


def random_bytes(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (n,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def summed(data: torch.Tensor, *cuts: int) -> str:
    """The sum of the bytes given in the blocks that begin at 0 and at the cuts."""
    found = HostChecksum()
    for start, stop in zip((0, *cuts), (*cuts, data.numel())):
        found.update(data[start:stop].numpy())
    return found.hexdigest()


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 15, 16, 17, 4096, 8191])
def test_it_equals_the_definition(n):
    data = random_bytes(n)
    assert summed(data) == f"{definition(bytes(data.numpy())):016x}"


@pytest.mark.parametrize("n", [8 * WORDS - 1, 8 * WORDS, 8 * WORDS + 1, 8 * (2 * WORDS + 3) + 5])
def test_it_is_the_number_of_the_device_s_checksum_over_many_chunks(n):
    data = random_bytes(n, seed=n)
    assert summed(data) == f"{checksum(data).item() % (1 << 64):016x}"


def test_blocks_do_not_show():
    data = random_bytes(8 * (WORDS + 7) + 3)
    whole = summed(data)
    for cuts in ((8,), (0,), (8 * WORDS,), (800, 8 * WORDS + 8), (8, 16, 24), (8 * WORDS + 56,)):
        assert summed(data, *cuts) == whole, cuts


def test_only_the_last_block_may_end_in_the_middle_of_a_word():
    found = HostChecksum()
    found.update(random_bytes(9).numpy())
    with pytest.raises(ValueError, match="middle of a word"):
        found.update(random_bytes(8).numpy())


@pytest.mark.parametrize("offset", [1, 4])
def test_memory_that_lies_askew_is_summed_alike(offset):
    data = random_bytes(8 * 100 + offset)
    assert summed(data[offset:]) == summed(data[offset:].clone())


DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int32, torch.bool, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_of_any_type_and_stride_are_summed_by_their_bytes(dtype):
    data = random_bytes(24 * 16).remainder(2).view(dtype).reshape(4, -1)
    tensors = [data, data.T, data[:, ::2], data[0, 0], data[:0], data[1:]]
    assert host_checksums(tensors) == [checksum(t).item() % (1 << 64) for t in tensors]


def test_threads_do_not_share_what_they_work_in():
    data = [random_bytes(8 * (3 * WORDS + 1), seed=n) for n in range(4)]
    expected, found = [summed(d) for d in data], {}

    def work(n):
        found[n] = [summed(data[n], 8 * WORDS) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {n: [one] * 3 for n, one in enumerate(expected)}


class TestBytesOfAFileLargerThanABlock:
    NUMEL = (2 * READ_BLOCK_BYTES + 24) // 4 + 1  # three blocks, the last word half full

    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory):
        folder = tmp_path_factory.mktemp("large")
        checkpoint.save(folder, 0, {"a": torch.ones(3), "w": torch.arange(self.NUMEL).float()}, {})
        return folder

    def live(self):
        return {"a": torch.zeros(3), "w": torch.zeros(self.NUMEL)}

    def shard(self, folder):
        (path,) = (folder / "gen-00000000").glob("*.safetensors")
        return path

    def test_they_come_back(self, folder):
        live = self.live()
        checkpoint.resume(folder, live)
        assert torch.equal(live["w"], torch.arange(self.NUMEL).float())
        assert checkpoint.verify(folder / "gen-00000000") == []

    @pytest.mark.parametrize(
        "at",
        [
            0,
            7,
            READ_BLOCK_BYTES - 1,
            READ_BLOCK_BYTES,
            2 * READ_BLOCK_BYTES - 8,
            2 * READ_BLOCK_BYTES,
            -9,
            -4,
            -1,
        ],
    )
    def test_one_bit_in_any_block_is_damage_and_nothing_is_loaded(self, folder, at):
        path = self.shard(folder)
        begins = os.path.getsize(path) - 4 * self.NUMEL
        data = np.memmap(path, np.uint8, "r+")
        where = begins + at if at >= 0 else len(data) + at
        data[where] ^= 1
        data.flush()
        try:
            live = self.live()
            with pytest.raises(CheckpointError, match="w: is damaged"):
                checkpoint.resume(folder, live)
            assert not live["w"].any()
            assert not live["a"].any()
            assert any("w: is damaged" in problem for problem in checkpoint.verify(folder / "gen-00000000"))
        finally:
            data[where] ^= 1
            data.flush()

    def test_two_blocks_exchanged_are_damage(self, folder):
        path = self.shard(folder)
        begins = os.path.getsize(path) - 4 * self.NUMEL
        data = np.memmap(path, np.uint8, "r+")
        one, two = (slice(begins + n * READ_BLOCK_BYTES, begins + (n + 1) * READ_BLOCK_BYTES) for n in (0, 1))
        before = data[one].copy(), data[two].copy()
        data[one], data[two] = before[1], before[0]
        data.flush()
        try:
            with pytest.raises(CheckpointError, match="w: is damaged"):
                checkpoint.resume(folder, self.live())
        finally:
            data[one], data[two] = before
            data.flush()

    def test_what_is_summed_is_the_memory_that_is_loaded(self, folder, monkeypatch):
        """A bit that flips between the disk and the tensor, in the read itself, is seen: the sum is of the
        tensor's memory."""
        plain = shards.read_exactly

        def flips(fd, into, offset, where):
            plain(fd, into, offset, where)
            if len(into) == READ_BLOCK_BYTES:
                into[12345] ^= 4

        monkeypatch.setattr(shards, "read_exactly", flips)
        live = self.live()
        with pytest.raises(CheckpointError, match="w: is damaged"):
            checkpoint.resume(folder, live)
        assert not live["w"].any()

    def test_a_look_at_a_generation_names_all_damage_in_the_order_of_the_manifest(self, folder, tmp_path):
        path = shutil.copytree(folder / "gen-00000000", tmp_path / "gen-00000000")
        (shard,) = path.glob("*.safetensors")
        (table,) = path.glob("values-*")
        table.write_bytes(bytes(len(table.read_bytes())))
        data = np.memmap(shard, np.uint8, "r+")
        begins = len(data) - 4 * self.NUMEL
        data[begins - 1] ^= 1
        data[begins + 9] ^= 1
        data.flush()
        told = checkpoint.verify(path)
        assert [t.split(": is damaged")[0] for t in told] == [
            f"gen-00000000/{table.name}", f"gen-00000000/{shard.name}: a", f"gen-00000000/{shard.name}: w"
        ]  # fmt: skip
        assert checkpoint.verify(path, deep=False) == []


def test_damage_between_the_look_and_the_load_is_an_error(tmp_path, monkeypatch):
    live = {"w": torch.ones(4, 3), "v": torch.ones(2)}
    checkpoint.save(tmp_path, 0, live, {})
    (path,) = (tmp_path / "gen-00000000").glob("*.safetensors")
    check = reader._Shards.check

    def checked_then_damaged(self, name, *span):
        check(self, name, *span)
        if name == "w":
            with path.open("r+b") as file:
                file.seek(-1, 2)
                last = file.read(1)[0]
                file.seek(-1, 2)
                file.write(bytes([last ^ 1]))

    monkeypatch.setattr(reader._Shards, "check", checked_then_damaged)
    with pytest.raises(CheckpointError, match="is damaged"):
        checkpoint.load(tmp_path / "gen-00000000", live)


@pytest.mark.parametrize("last", [torch.ones(50), torch.tensor(1.0)], ids=["rows", "scalar"])
def test_damage_that_is_there_changes_no_live_tensor(last, tmp_path):
    saved = {str(n): torch.full((50,), float(n)) for n in range(8)} | {"last": last}
    checkpoint.save(tmp_path, 0, saved, {})
    (path,) = (tmp_path / "gen-00000000").glob("*.safetensors")
    with path.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    live = {name: torch.zeros_like(tensor) for name, tensor in saved.items()}
    with pytest.raises(CheckpointError, match=r"last.*is damaged"):
        checkpoint.load(tmp_path / "gen-00000000", live)
    assert not any(tensor.any() for tensor in live.values())
    with pytest.raises(CheckpointError, match=r"last.*is damaged"):
        checkpoint.load(tmp_path / "gen-00000000", live, looked_at=True)


def test_tensors_in_pieces_are_loaded_too(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    checkpoint.save(tmp_path, 0, {"w": whole, "scalar": torch.tensor(7.0)}, {})
    live = {"w": torch.zeros(4, 3).T, "scalar": torch.tensor(0.0)}
    assert not live["w"].is_contiguous()
    checkpoint.load(tmp_path / "gen-00000000", live)
    assert torch.equal(live["w"], whole)
    assert live["scalar"] == 7.0


def test_memory_that_is_no_stretch_is_refused(tmp_path):
    """Reading into a copy of it would leave it as it was."""
    checkpoint.save(tmp_path, 0, {"w": torch.ones(2, 3)}, {})
    (path,) = (tmp_path / "gen-00000000").glob("*.safetensors")
    with path.open("rb") as file:
        stretch = shards.read_header(file.fileno(), "here")["w"]
        with pytest.raises(RuntimeError, match="view"):
            shards.read_summed(file.fileno(), stretch, "here", torch.zeros(3, 2).T)
