"""The damage matrix: whatever happens to the files is named, nothing is half loaded, the last whole
generation serves."""

import contextlib
import errno
import json
import os
import pickle
import resource
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from repsft_fast.checkpoint import (
    ForeignCheckpoint,
    Piece,
    clean,
    load,
    newest,
    next_generation,
    read_manifest,
    resume,
    save,
)
from repsft_fast.checkpoint import manifest as manifest_module
from repsft_fast.checkpoint.shards import read_header
from repsft_fast.checkpoint.writer import leftovers
from repsft_fast.errors import CheckpointError
from repsft_fast.state import state_hash
from tests.hostile.byte_doors import Index

SHARD = "state-00000-of-00001.safetensors"
VALUES = "values-00000-of-00001.json"


def state(n):
    g = torch.Generator().manual_seed(n)
    return {
        "w": torch.randn(9, 5, generator=g),
        "m": torch.randn(6, generator=g).bfloat16(),
        "step": torch.tensor(float(n)),
    }


def write_model(folder, tensors):
    (folder / "config.json").write_text(json.dumps({"model_type": "toy"}))


def fill(folder, upto=1, **more):
    for n in range(upto + 1):
        save(folder, n, state(n), {"n": n}, parent=n - 1 if n else None, write_model=write_model, **more)
    return folder / f"gen-{upto:08d}"


def stretches(path):
    with open(path / SHARD, "rb") as file:
        return read_header(file.fileno(), SHARD)


def same(a, b):
    return state_hash(a, {}) == state_hash(b, {})


def assert_falls_back(folder, naming, *, to=0, loads=True):
    """Generation 1 is refused by name, without touching the live tensors; generation `to` is used instead and
    that is said."""
    live = {name: torch.full_like(t, 7) for name, t in state(0).items()}
    before = {name: t.clone() for name, t in live.items()}
    found = newest(folder)
    assert found.number == to
    assert any(naming in problem for problem in found.problems), found.problems
    if loads:
        with pytest.raises(CheckpointError):
            load(folder / "gen-00000001", live)
        assert same(live, before)
        got = resume(folder, live)
        assert (got.values, got.generation.number) == ({"n": to}, to)
        assert same(live, state(to))
        assert any(naming in problem for problem in got.problems), got.problems


class TestDamage:
    @pytest.mark.parametrize(
        ("name", "stride"), [(SHARD, 11), (VALUES, 1), ("MANIFEST.json", 61), ("hf/config.json", 3)]
    )
    def test_one_flipped_bit_anywhere(self, tmp_path, name, stride):
        path = fill(tmp_path) / name
        whole = path.read_bytes()
        places = sorted({*range(0, len(whole), stride), *range(min(16, len(whole))), len(whole) - 1})
        for i, place in enumerate(places):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << (i % 8)
            path.write_bytes(damaged)
            assert_falls_back(tmp_path, "gen-00000001", loads=not name.startswith("hf/"))
        path.write_bytes(whole)
        assert newest(tmp_path).number == 1

    def test_one_flipped_bit_in_every_tensor_is_named(self, tmp_path):
        path = fill(tmp_path)
        whole = (path / SHARD).read_bytes()
        for name, stretch in stretches(path).items():
            for place in (stretch.start, stretch.start + stretch.nbytes - 1):
                damaged = bytearray(whole)
                damaged[place] ^= 128
                (path / SHARD).write_bytes(damaged)
                assert_falls_back(tmp_path, f"gen-00000001/{SHARD}: {name}: is damaged")

    def test_one_flipped_bit_in_latest_loses_nothing(self, tmp_path):
        fill(tmp_path)
        for name in ("LATEST", "LATEST.backup"):
            whole = (tmp_path / name).read_bytes()
            for place in range(len(whole)):
                damaged = bytearray(whole)
                damaged[place] ^= 1 << (place % 8)
                (tmp_path / name).write_bytes(damaged)
                found = newest(tmp_path, deep=False)
                assert found.number == 1
                assert (name != "LATEST") or any("LATEST" in problem for problem in found.problems)
            (tmp_path / name).write_bytes(whole)

    def test_truncation_at_every_boundary(self, tmp_path):
        path = fill(tmp_path)
        whole = (path / SHARD).read_bytes()
        starts = [s.start for s in stretches(path).values()]
        for size in sorted({0, 1, 7, 8, 9, min(starts) - 1, *starts, len(whole) - 1}):
            (path / SHARD).write_bytes(whole[:size])
            assert_falls_back(tmp_path, SHARD)
        (path / SHARD).write_bytes(whole + b"\0")
        assert_falls_back(tmp_path, SHARD)
        (path / SHARD).write_bytes(whole)
        for name in (VALUES, "MANIFEST.json"):
            text = (path / name).read_bytes()
            for size in (0, 1, len(text) // 2, len(text) - 1):
                (path / name).write_bytes(text[:size])
                assert_falls_back(tmp_path, name)
            (path / name).write_bytes(text)

    @pytest.mark.parametrize("name", [SHARD, VALUES, "MANIFEST.json", "hf/config.json"])
    def test_a_missing_file(self, tmp_path, name):
        (fill(tmp_path) / name).unlink()
        assert_falls_back(tmp_path, name, loads=not name.startswith("hf/"))

    @pytest.mark.parametrize("name", [SHARD, VALUES])
    def test_a_file_of_another_generation(self, tmp_path, name):
        path = fill(tmp_path)
        shutil.copy(tmp_path / "gen-00000000" / name, path / name)
        assert_falls_back(tmp_path, f"gen-00000001/{name}")

    def test_the_manifest_of_another_generation(self, tmp_path):
        path = fill(tmp_path)
        shutil.copy(tmp_path / "gen-00000000" / "MANIFEST.json", path / "MANIFEST.json")
        assert_falls_back(tmp_path, "belongs to another generation, expected gen-00000001, got 0")

    def test_latest_that_points_nowhere(self, tmp_path):
        shutil.rmtree(fill(tmp_path))
        assert_falls_back(tmp_path, "LATEST points to gen-00000001, which is not there", loads=False)

    def test_everything_damaged_names_everything(self, tmp_path):
        fill(tmp_path)
        for n in (0, 1):
            (tmp_path / f"gen-0000000{n}" / SHARD).write_bytes(b"")
        with pytest.raises(
            CheckpointError, match=r"(?s)holds no whole checkpoint.*gen-00000001/state.*gen-00000000/state"
        ):
            newest(tmp_path)
        with pytest.raises(CheckpointError, match="holds no whole checkpoint"):
            resume(tmp_path, state(0))

    def test_shards_swapped_or_dropped_between_ranks(self, tmp_path):
        for n in range(2):
            for rank in (1, 0):
                rows = state(n)["w"][:8].chunk(2)[rank].clone()
                save(
                    tmp_path,
                    n,
                    {"w": Piece(rows, (8, 5), rank * 4)},
                    {"n": n},
                    rank=rank,
                    world_size=2,
                    attempt=f"t{n}",
                    timeout_s=5,
                )
        path = tmp_path / "gen-00000001"
        files = [path / f"state-0000{r}-of-00002.safetensors" for r in range(2)]
        data = [f.read_bytes() for f in files]
        for contents in ((data[1], data[0]), (data[0], data[0]), (data[0], b"")):
            for f, content in zip(files, contents):
                f.write_bytes(content)
            live = {"w": torch.zeros(8, 5)}
            assert resume(tmp_path, live).generation.number == 0
            assert torch.equal(live["w"], state(0)["w"][:8])


class TestForeign:
    @pytest.mark.parametrize(
        ("change", "naming"),
        [
            (
                lambda t: {**t, "w": torch.zeros(10, 5)},
                r"w: has another shape or dtype.*\(10, 5\).*\(9, 5\).*another model, vocabulary",
            ),
            (lambda t: {**t, "w": t["w"].double()}, "expected .*F64.*F32"),
            (lambda t: {**t, "lora": torch.zeros(1)}, "lacks .*lora"),
            (lambda t: {"w": t["w"]}, "unknown .*m.*step"),
        ],
    )
    def test_another_model_is_an_error_at_once_and_touches_nothing(self, tmp_path, change, naming):
        fill(tmp_path)
        live = change(state(5))
        before = state_hash(live, {})
        for call in (lambda: load(tmp_path / "gen-00000001", live), lambda: resume(tmp_path, live)):
            with pytest.raises(ForeignCheckpoint, match=naming):
                call()
        assert state_hash(live, {}) == before

    def test_a_newer_format_is_named_and_the_older_generation_used(self, tmp_path):
        edited(fill(tmp_path), lambda body: body.update(format=2))
        assert_falls_back(tmp_path, "was written by a newer version, expected format 1, got 2; upgrade")

    def test_numbers_that_are_not_finite_are_named(self, tmp_path):
        fill(tmp_path, upto=0)
        bad = state(1)
        bad["m"][2] = float("inf")
        bad["w"][0, :2] = float("nan")
        path = save(tmp_path, 1, bad, {"n": 1}, parent=0)
        manifest = read_manifest(path)
        assert {n: e.nonfinite for n, e in manifest.tensors.items()} == {"w": 2, "m": 1, "step": 0}
        assert_falls_back(tmp_path, "NaN or infinite")

    def test_large_finite_numbers_are_finite(self, tmp_path):
        path = save(tmp_path, 0, {"w": torch.full((4,), 3e38)}, {})  # their sum is not
        assert read_manifest(path).nonfinite == []


class Bomb:
    def __reduce__(self):
        return os.abort, ()


def edited(path, edit):
    body = json.loads((path / "MANIFEST.json").read_text())
    body.pop("hash")
    edit(body)
    (path / "MANIFEST.json").write_bytes(manifest_module._sealed(body))


class TestHostile:
    @pytest.mark.parametrize("name", [SHARD, VALUES, "MANIFEST.json", "LATEST"])
    @pytest.mark.parametrize("protocol", [2, 5])
    def test_a_pickle_is_never_read(self, tmp_path, name, protocol):
        path = fill(tmp_path)
        target = tmp_path / name if name == "LATEST" else path / name
        target.write_bytes(pickle.dumps(Bomb(), protocol=protocol))
        if name == "LATEST":
            assert any("LATEST: is a pickle" in p for p in newest(tmp_path).problems)
        else:
            assert_falls_back(tmp_path, name)
            torch.save({"w": torch.zeros(1)}, target)
            assert_falls_back(tmp_path, name)

    @pytest.mark.parametrize(
        "outside",
        [
            "../gen-00000000/" + SHARD,
            "/etc/hostname",
            "hf/../../x",
            "",
            ".",
            "a//b",
            "..",
            "x\0y",
            "é",
            5,
            None,
        ],
    )
    def test_an_index_cannot_point_outside(self, tmp_path, outside):
        path = fill(tmp_path)

        def edit(body):
            for entry in body["tensors"].values():
                entry["shards"][0]["file"] = outside
            body["files"][outside] = body["files"].pop(SHARD)

        edited(path, edit)
        assert_falls_back(tmp_path, "gen-00000001")

    def test_links_and_pipes_are_not_followed(self, tmp_path):
        path = fill(tmp_path)
        os.rename(path / SHARD, tmp_path / "elsewhere")
        (path / SHARD).symlink_to(tmp_path / "elsewhere")
        assert_falls_back(tmp_path, SHARD)
        (path / SHARD).unlink()
        os.mkfifo(path / SHARD)
        assert_falls_back(tmp_path, "is not a regular file")
        os.unlink(path / SHARD)
        os.rename(tmp_path / "elsewhere", path / SHARD)
        os.rename(path / "hf", tmp_path / "hf")
        (path / "hf").symlink_to(tmp_path / "hf")
        assert_falls_back(tmp_path, "hf/config.json", loads=False)
        os.unlink(path / "hf")
        os.rename(tmp_path / "hf", path / "hf")
        assert newest(tmp_path).number == 1
        os.rename(path, tmp_path / "moved")
        path.symlink_to(tmp_path / "moved")
        assert_falls_back(tmp_path, "which is not there", loads=False)

    @pytest.mark.parametrize("length", [0, 1, 2**31, 2**40, 2**63, 2**64 - 1])
    def test_header_lengths_are_bounded(self, tmp_path, length):
        path = fill(tmp_path)
        data = (path / SHARD).read_bytes()
        (path / SHARD).write_bytes(length.to_bytes(8, "little") + data[8:])
        assert_falls_back(tmp_path, SHARD)

    @pytest.mark.parametrize(
        "header",
        [
            b"[" * 100_000,
            b'{"w":' * 50_000,
            b"[]",
            b"null",
            b'{"w": 3}',
            b'{"w":{"dtype":"F32","shape":[9,5],"data_offsets":[0,180]},"w":{"dtype":"F32","shape":[9,5],"data_offsets":[0,180]}}',
            b'{"w":{"dtype":"F32","shape":[-9,-5],"data_offsets":[0,180]}}',
            b'{"w":{"dtype":"F32","shape":[9,5],"data_offsets":[180,0]}}',
            b'{"w":{"dtype":"F32","shape":[9,5],"data_offsets":[0]}}',
            b'{"w":{"dtype":"O","shape":[9,5],"data_offsets":[0,180]}}',
            b'{"w":{"dtype":"F32","shape":[true,5],"data_offsets":[0,20]}}',
            b'{"w":{"dtype":"F32","shape":[1e3],"data_offsets":[0,180]}}',
            b'{"w":{"dtype":"F32","shape":[%d,0],"data_offsets":[0,0]}}' % 2**70,
            b"\xff\xfe",
        ],
    )
    def test_headers_that_lie(self, tmp_path, header):
        path = fill(tmp_path)
        size = (path / SHARD).stat().st_size
        text = len(header).to_bytes(8, "little") + header
        (path / SHARD).write_bytes(text + bytes(max(0, size - len(text))))
        assert_falls_back(tmp_path, "gen-00000001")

    @pytest.mark.parametrize(
        "text", [b"[" * 100_000, b"{}", b"[]", b"3", b"\xff", b'{"a":1,"a":2}', b'{"format":1}', b"1" * 5000]
    )
    def test_manifests_that_are_none(self, tmp_path, text):
        (fill(tmp_path) / "MANIFEST.json").write_bytes(text)
        assert_falls_back(tmp_path, "gen-00000001/MANIFEST.json")

    def test_a_manifest_too_large_to_read_is_not_read(self, tmp_path):
        path = fill(tmp_path)
        os.truncate(path / "MANIFEST.json", manifest_module.MANIFEST_LIMIT_BYTES + 1)  # sparse
        assert_falls_back(tmp_path, "is too large")

    json_values = st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(2**70), 2**70)
        | st.floats()
        | st.text(max_size=5)
        | st.just("../x"),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=4,
    )

    @settings(
        max_examples=150,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
        derandomize=True,
    )
    @given(data=st.data())
    def test_any_edit_of_a_manifest_ends_in_words(self, fuzzed, data):
        """A manifest changed anywhere and hashed anew: verify answers, load gives the state saved or a
        CheckpointError."""
        body = json.loads(fuzzed.manifest)
        body.pop("hash")
        node = body
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            key = data.draw(st.sampled_from(keys))
            deeper = isinstance(node[key], dict | list) and len(node[key]) > 0
            if not deeper or data.draw(st.integers(0, 4)) == 0:
                break
            node = node[key]
        if isinstance(node, dict) and data.draw(st.booleans()):
            node.pop(key)
        else:
            node[key] = data.draw(self.json_values)
        fuzzed.as_manifest(manifest_module._sealed(body))

    @pytest.fixture
    def fuzzed(self, tmp_path):
        return Index(tmp_path)


@contextlib.contextmanager
def file_size_limit(size):
    """No file may grow beyond `size`: what a full disk does, without being root. Python ignores the
    signal."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def assert_failed_cleanly(folder, kept=(0,)):
    """Nothing temporary, the earlier generation intact, and the next save works."""
    assert list(leftovers(folder)) == []
    found = newest(folder)
    assert found.number in kept
    live = {n: torch.zeros_like(t) for n, t in state(0).items()}
    load(found, live)
    assert same(live, state(found.number))
    after = next_generation(folder)
    save(folder, after, state(2), {"n": 2}, parent=found.number)
    assert newest(folder).number == after
    assert clean(folder) == []


class TestFailingDisks:
    def test_disk_full_at_every_64_kb(self, tmp_path):
        large = {"w": torch.randn(160, 1024)}  # 640 kB
        save(tmp_path, 0, large, {})
        failed = []
        for limit in [0, 1, 7, 8, 100, 150, 1000, *range(65536, 655360 + 65536 * 2, 65536)]:
            with file_size_limit(limit):
                try:
                    save(tmp_path, 1, {"w": torch.randn(160, 1024)}, {}, parent=0)
                except CheckpointError as error:
                    failed.append((limit, "File too large" in str(error)))
            if failed[-1][0] == limit:
                assert list(leftovers(tmp_path)) == []
                live = {"w": torch.zeros(160, 1024)}
                assert resume(tmp_path, live).generation.number == 0
                assert torch.equal(live["w"], large["w"])
        assert failed == [
            (limit, True) for limit in (0, 1, 7, 8, 100, 150, 1000, *range(65536, 655360 + 1, 65536))
        ]
        assert newest(tmp_path).number == 1

    @pytest.mark.parametrize("what", ["open", "write", "fsync", "rename", "replace", "mkdir"])
    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
    def test_an_error_of_any_single_call(self, tmp_path, monkeypatch, what, code):
        real = getattr(os, what)
        state_of = {"calls": 0, "fail_at": -1}

        def counted(*args, **kwargs):
            state_of["calls"] += 1
            if state_of["calls"] == state_of["fail_at"]:
                raise OSError(code, os.strerror(code))
            return real(*args, **kwargs)

        monkeypatch.setattr(os, what, counted)

        def second_save(folder):
            save(folder, 1, state(1), {"n": 1}, parent=0, write_model=write_model)

        fill(tmp_path / "count", upto=0)
        state_of["calls"] = 0
        second_save(tmp_path / "count")
        harmless = []
        for call in range(1, state_of["calls"] + 1):
            folder = tmp_path / f"{what}-{call}"
            fill(folder, upto=0)
            state_of.update(calls=0, fail_at=call)
            try:
                second_save(folder)
            except CheckpointError as error:
                state_of.update(fail_at=-1)
                assert_failed_cleanly(folder, kept=(0, 1) if (folder / "gen-00000001").exists() else (0,))
                saves = "save of gen-00000001: failed" in str(error)
                assert saves or "cannot be opened" in str(error)  # noqa: PT017 - some calls are harmless, see below
            else:
                state_of.update(fail_at=-1)
                assert newest(folder).number == 1
                harmless.append(call)
        # The parent's manifest cannot be read while LATEST is written: its branch is shorter, the save is
        # whole.
        assert len(harmless) <= {"open": 2}.get(what, 0), harmless
        assert state_of["calls"] > len(harmless)

    def test_a_model_writer_that_fails(self, tmp_path):
        fill(tmp_path, upto=0)

        def fail(folder, tensors):
            (folder / "half").write_text("x")
            raise ValueError("no such layer")

        with pytest.raises(CheckpointError, match="failed, got ValueError: no such layer"):
            save(tmp_path, 1, state(1), {"n": 1}, parent=0, write_model=fail)
        assert_failed_cleanly(tmp_path)

    def test_an_interrupt_leaves_nothing_behind(self, tmp_path):
        fill(tmp_path, upto=0)

        def interrupt(folder, tensors):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 1, state(1), {"n": 1}, parent=0, write_model=interrupt)
        assert_failed_cleanly(tmp_path)

    def test_what_safetensors_cannot_hold_and_values_that_are_not_json(self, tmp_path):
        fill(tmp_path, upto=0)
        with pytest.raises(CheckpointError, match="state c: has a dtype"):
            save(tmp_path, 1, {"c": torch.zeros(2, dtype=torch.complex64)}, {}, parent=0)
        with pytest.raises(CheckpointError, match=r"state value t\[1\]"):
            save(tmp_path, 1, state(1), {"t": {1: 2}}, parent=0)
        assert_failed_cleanly(tmp_path)
