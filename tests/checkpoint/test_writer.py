"""A generation on disk: exact, whole, readable by others, on any number of ranks; LATEST follows the
branch."""

import json
import threading

import pytest
import torch
from safetensors.torch import load_file

from repsft_fast.checkpoint import (
    BackgroundWriter,
    ForeignCheckpoint,
    Piece,
    clean,
    generations,
    load,
    move_latest,
    newest,
    next_generation,
    prune,
    read_latest,
    read_manifest,
    resume,
    save,
    verify,
)
from repsft_fast.errors import CheckpointError
from repsft_fast.snapshot import SnapshotPool
from repsft_fast.state import state_hash
from tests.helpers.toy_state import Toy


def tensors_of(seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        "model/weight": torch.randn(7, 3, generator=g),
        "model/bf16": torch.randn(5, generator=g).bfloat16(),
        "optimizer/step": torch.tensor(3.0),
        "optimizer/m8": torch.randint(0, 255, (4, 6), generator=g, dtype=torch.uint8).t(),
        "flags": torch.tensor([True, False]),
        "none": torch.zeros(0, 4),
        "thin": torch.zeros(4, 0),
        "fp8": torch.randn(3, 4, generator=g).to(torch.float8_e4m3fn),
    }


def cleared(tensors):
    return {n: torch.zeros_like(t) for n, t in tensors.items()}


def equal(a, b):
    return state_hash(a, {}) == state_hash(b, {})


def test_every_dtype_and_value_comes_back_bit_for_bit(tmp_path):
    saved, values = tensors_of(), {"cursor": [1, 2, 3], "best": float("nan"), "rng": "00ff"}
    path = save(tmp_path, 0, saved, values)
    live = cleared(saved)
    got = load(path, live)
    assert equal(live, saved)
    assert got.values["cursor"] == [1, 2, 3]
    assert got.values["best"] != got.values["best"]
    assert not got.resharded
    assert verify(path) == []


def test_a_toy_run_resumes_to_the_same_losses_and_hash(tmp_path):
    toy = Toy()
    toy.step(5)
    save(tmp_path, 0, toy.state.tensors(), toy.state.values())
    here = toy.state.hash()
    expected = (toy.step(7), toy.state.hash())
    other = Toy(seed=99)
    other.state.load_values(resume(tmp_path, other.state.tensors()).values)
    assert other.state.hash() == here
    assert (other.step(7), other.state.hash()) == expected


def test_the_library_reads_our_shards(tmp_path):
    saved = tensors_of()
    path = save(tmp_path, 4, saved, {})
    found = load_file(path / "state-00000-of-00001.safetensors")
    assert equal(
        {n: found[n] for n in saved if saved[n].numel()}, {n: t for n, t in saved.items() if t.numel()}
    )


def test_what_lies_in_a_generation(tmp_path):
    path = save(tmp_path, 12, tensors_of(), {"a": 1}, parent=7, score=0.5, identity={"model": "toy"})
    assert path.name == "gen-00000012"
    assert sorted(p.name for p in path.iterdir()) == [
        "MANIFEST.json", "state-00000-of-00001.safetensors", "values-00000-of-00001.json"
    ]  # fmt: skip
    manifest = read_manifest(path)
    assert (manifest.generation, manifest.parent, manifest.score, manifest.world_size) == (12, 7, 0.5, 1)
    assert manifest.versions["torch"] == torch.__version__
    assert manifest.tensors["model/weight"].shape == (7, 3)
    assert json.loads((path / "values-00000-of-00001.json").read_text()) == {"a": 1}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["LATEST", "LATEST.backup", "gen-00000012"]


def test_the_model_writer_gets_whole_tensors_and_its_files_are_hashed(tmp_path):
    saved = tensors_of()

    def write_model(folder, tensors):
        assert set(tensors) == set(saved)
        assert all(equal({"x": tensors[n]}, {"x": saved[n].contiguous()}) for n in saved)
        (folder / "config.json").write_text("{}")
        (folder / "deep").mkdir()
        (folder / "deep" / "model.bin").write_bytes(b"12345")

    path = save(tmp_path, 0, saved, {}, write_model=write_model)
    assert read_manifest(path).files["hf/deep/model.bin"].bytes == 5
    assert verify(path) == []
    (path / "hf/config.json").write_text("{ }")
    assert any("hf/config.json" in problem for problem in verify(path))


class TestRanks:
    def split(self, tensors, ranks, rank):
        """torch.chunk's rows, as FSDP2 shards them."""
        pieces = {}
        for name, t in tensors.items():
            if t.dim() == 0:
                pieces[name] = Piece(t, (), 0, rank == 0)
                continue
            chunks = torch.chunk(t, ranks) if t.shape[0] else (t,)
            size = chunks[0].shape[0]
            local = chunks[rank].clone() if rank < len(chunks) else t[:0].clone()
            pieces[name] = Piece(local, tuple(t.shape), min(rank * size, t.shape[0]))
        return pieces

    def save_ranks(self, folder, generation, tensors, ranks, **more):
        errors = []

        def one(rank):
            try:
                pieces = self.split(tensors, ranks, rank)
                save(
                    folder,
                    generation,
                    pieces,
                    {"rank": rank},
                    rank=rank,
                    world_size=ranks,
                    attempt="a1",
                    timeout_s=20,
                    **more,
                )
            except CheckpointError as error:
                errors.append(error)

        threads = [threading.Thread(target=one, args=(r,)) for r in range(ranks)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        return errors

    @pytest.mark.parametrize(("wrote", "reads"), [(1, 3), (2, 1), (2, 3), (3, 2), (4, 4), (5, 2), (2, 9)])
    def test_written_by_some_read_by_others(self, tmp_path, wrote, reads):
        whole = {n: t for n, t in tensors_of().items() if n != "thin"}
        assert self.save_ranks(tmp_path, 0, whole, wrote) == []
        path = newest(tmp_path).path
        assert read_manifest(path).world_size == wrote
        for rank in range(reads):
            expected = self.split(whole, reads, rank)
            live = {
                n: Piece(torch.zeros_like(p.local), p.shape, p.start, p.writes) for n, p in expected.items()
            }
            got = load(path, live, rank=rank, world_size=reads)
            assert equal({n: p.local for n, p in live.items()}, {n: p.local for n, p in expected.items()})
            assert got.values == {"rank": rank % wrote}
            assert got.resharded == (wrote != reads)
        alone = cleared(whole)
        load(path, alone)
        assert equal(alone, whole)

    def test_the_model_writer_sees_all_ranks_rows(self, tmp_path):
        seen = {}
        whole = {n: t for n, t in tensors_of().items() if n != "thin"}
        self.save_ranks(
            tmp_path, 0, whole, 3, write_model=lambda folder, t: seen.update({n: t[n] for n in t})
        )
        assert equal({n: seen[n] for n in whole}, {n: t.contiguous() for n, t in whole.items()})

    def test_a_rank_that_fails_is_named_and_nothing_stays(self, tmp_path, monkeypatch):
        from repsft_fast.checkpoint import writer

        real = writer.write_shard

        def fail(path, *more):
            if "00001-of" in path.name:
                raise OSError(28, "No space left on device")
            return real(path, *more)

        monkeypatch.setattr(writer, "write_shard", fail)
        errors = self.save_ranks(tmp_path, 0, {"w": torch.randn(4, 2)}, 2)
        assert len(errors) == 2
        assert any(
            "rank 1: could not write its part, got No space left" in str(e) or "[Errno 28]" in str(e)
            for e in errors
        )
        assert list(tmp_path.iterdir()) == []

    def test_a_rank_that_never_comes_is_named(self, tmp_path):
        with pytest.raises(CheckpointError, match=r"waited 0.1 s for the parts of ranks \[1\]"):
            save(tmp_path, 0, {"w": torch.ones(2)}, {}, world_size=2, attempt="x", timeout_s=0.1)
        assert list(tmp_path.iterdir()) == []
        with pytest.raises(CheckpointError, match="attempt name"):
            save(tmp_path, 0, {"w": torch.ones(2)}, {}, world_size=2)

    def test_ranks_that_disagree_are_refused(self, tmp_path):
        kwargs = {"world_size": 2, "attempt": "x", "timeout_s": 5}
        save(tmp_path, 0, {"w": Piece(torch.ones(1, 2), (3, 2), 2)}, {}, rank=1, **kwargs)
        with pytest.raises(
            CheckpointError, match=r"state w: is not whole over the ranks.*missing or twice at 1"
        ):
            save(tmp_path, 0, {"w": Piece(torch.ones(1, 2), (3, 2), 0)}, {}, rank=0, **kwargs)
        save(tmp_path, 0, {"v": torch.ones(2)}, {}, rank=1, **kwargs)
        with pytest.raises(CheckpointError, match="differs between ranks"):
            save(tmp_path, 0, {"w": torch.ones(2)}, {}, rank=0, **kwargs)


class TestBranches:
    def fill(self, folder, parents, scores=None):
        for n, parent in parents.items():
            save(
                folder,
                n,
                {"w": torch.full((2,), float(n))},
                {"n": n},
                parent=parent,
                score=(scores or {}).get(n),
            )

    def test_latest_follows_the_branch_not_the_number(self, tmp_path):
        self.fill(tmp_path, {0: None, 1: 0, 2: 1})
        move_latest(tmp_path, 0)
        assert newest(tmp_path).number == 0
        self.fill(tmp_path, {3: 0})
        latest, problems = read_latest(tmp_path)
        assert (latest.generation, latest.branch, problems) == (3, (0,), [])
        (tmp_path / "gen-00000003" / "MANIFEST.json").unlink()
        found = newest(tmp_path)
        assert found.number == 0  # not 2, which the run had left
        assert "gen-00000003/MANIFEST.json: cannot be opened" in found.problems[0]

    def test_the_backup_serves_when_latest_is_damaged(self, tmp_path):
        self.fill(tmp_path, {0: None, 1: 0})
        move_latest(tmp_path, 0)
        (tmp_path / "LATEST").write_bytes(b"\x00" * 40)
        found = newest(tmp_path)
        assert found.number == 0
        assert "LATEST: is not JSON" in found.problems[0]
        (tmp_path / "LATEST.backup").unlink()
        found = newest(tmp_path)
        assert found.number == 1
        assert "LATEST.backup is missing" in found.problems

    def test_a_number_is_never_written_twice(self, tmp_path):
        self.fill(tmp_path, {0: None})
        with pytest.raises(CheckpointError, match="would write a generation twice"):
            self.fill(tmp_path, {0: None})
        assert next_generation(tmp_path) == 1
        assert next_generation(tmp_path / "nothing") == 0

    def test_nothing_to_resume(self, tmp_path):
        for folder in (tmp_path, tmp_path / "missing"):
            words = (
                "holds no whole checkpoint; copy a whole one back, or start the run anew in another folder\n "
                " no gen"
            )
            with pytest.raises(CheckpointError, match=words):
                newest(folder)
            with pytest.raises(CheckpointError, match="holds no whole checkpoint"):
                resume(folder, {"w": torch.zeros(2)})

    def test_keep_last_and_best_on_the_branch(self, tmp_path):
        scores = {0: 0.1, 1: 0.9, 2: 0.2, 3: float("nan"), 4: 0.3}
        self.fill(tmp_path, {0: None, 1: 0, 2: 1, 3: 1, 4: 3}, scores)  # 2 was abandoned
        assert prune(tmp_path, keep_last=2, keep_best=1) == [0, 2]
        assert generations(tmp_path) == [1, 3, 4]
        assert prune(tmp_path, keep_last=1, protect=[3]) == [1]
        assert newest(tmp_path).number == 4

    def test_nothing_is_deleted_unless_the_newest_is_whole(self, tmp_path):
        self.fill(tmp_path, {0: None, 1: 0, 2: 1})
        shard = tmp_path / "gen-00000002" / "state-00000-of-00001.safetensors"
        shard.write_bytes(shard.read_bytes()[:-1])
        assert prune(tmp_path, keep_last=1) == []
        shard.unlink()
        assert prune(tmp_path, keep_last=1) == []
        move_latest(tmp_path, 1)
        assert prune(tmp_path, keep_last=1) == [0]  # and 2, which is newer, stays
        assert generations(tmp_path) == [1, 2]

    def test_clean_removes_what_crashes_left(self, tmp_path):
        self.fill(tmp_path, {0: None})
        (tmp_path / ".writing-gen-00000001-abc").mkdir()
        (tmp_path / ".writing-gen-00000001-abc" / "x").write_text("")
        (tmp_path / ".trash-gen-00000000").mkdir()
        (tmp_path / ".LATEST.77.tmp").write_text("")
        assert len(clean(tmp_path)) == 3
        assert verify(tmp_path / "gen-00000000") == []
        assert sorted(p.name for p in tmp_path.iterdir()) == ["LATEST", "LATEST.backup", "gen-00000000"]


def test_kept_moments_lie_beside_the_live_state(tmp_path):
    live, moment = {"w": torch.ones(2)}, {"w": torch.zeros(2)}
    path = save(tmp_path, 0, {**live, **{f"moment/a/{n}": t for n, t in moment.items()}}, {"moments": ["a"]})
    for t in (live["w"], moment["w"]):
        t.fill_(9)
    load(path, live, ignore=["moment/"])
    load(path, moment, prefix="moment/a/")
    assert (live["w"].tolist(), moment["w"].tolist()) == ([1, 1], [0, 0])
    with pytest.raises(ForeignCheckpoint, match="moment/a/w"):
        load(path, live)


class TestBackground:
    def test_a_frozen_snapshot_is_written_while_the_run_goes_on(self, tmp_path):
        toy = Toy()
        pool = SnapshotPool(toy.state.tensors(), device_bytes=1 << 30, pinned_bytes=0, keep=1)
        writer = BackgroundWriter(tmp_path, keep_last=2)
        hashes = {}
        for n in range(4):
            toy.step(2)
            values = toy.state.values()
            hashes[n] = state_hash(toy.state.tensors(), values)
            writer.wait()
            pool.take(f"save {n}", values)
            writer.submit(
                n,
                pool.hold(f"save {n}"),
                values,
                done=lambda n=n: (pool.unhold(f"save {n}"), pool.release(f"save {n}")),
            )
            values["losses"].append("changed after submit")
            toy.step(1)
        outcomes = writer.close()
        assert [o.generation for o in outcomes] == [0, 1, 2, 3]
        assert all(o.error is None for o in outcomes)
        assert generations(tmp_path) == [2, 3]
        assert pool.free_slots == 1
        assert read_manifest(tmp_path / "gen-00000003").parent == 2
        other = Toy(seed=3)
        other.state.load_values(resume(tmp_path, other.state.tensors()).values)
        assert other.state.hash() == hashes[3]
        assert writer.waited_seconds > 0

    def test_a_failed_save_is_an_outcome_and_the_next_one_goes_on(self, tmp_path):
        writer = BackgroundWriter(tmp_path)
        called = []

        def fail(folder, tensors):
            raise RuntimeError("tokenizer lost")

        writer.submit(0, {"w": torch.ones(1)}, {}, write_model=fail, done=lambda: called.append(1))
        writer.wait()
        (outcome,) = writer.poll()
        assert (
            "save of gen-00000000: failed, got RuntimeError: tokenizer lost; earlier generations are intact"
            in str(outcome.error)
        )
        assert called == [1]
        assert list(tmp_path.iterdir()) == []
        writer.submit(next_generation(tmp_path), {"w": torch.ones(1)}, {})
        assert writer.close()[0].path == tmp_path / "gen-00000000"
