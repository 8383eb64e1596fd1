"""A file carried in pieces is the file that was cut, or an error that says which piece to bring again."""

import hashlib
import json

import pytest

from benchmarks.suites.gpu import pieces
from benchmarks.suites.gpu.pieces import PiecesError, join, split

CONTENT = bytes(range(256)) * 10 + b"end"  # 2,563 bytes


@pytest.fixture
def cut(tmp_path, monkeypatch):
    """The folder with the four pieces of a file, read in blocks far smaller than a piece."""
    monkeypatch.setattr(pieces, "BLOCK", 100)
    file = tmp_path / "model.gguf"
    file.write_bytes(CONTENT)
    split(file, tmp_path / "cut", limit=700)
    return tmp_path / "cut"


def piece(folder, number):
    return folder / f"model.gguf.{number}of4"


@pytest.mark.parametrize(
    ("size", "limit", "count"),
    [(0, 10, 1), (1, 10, 1), (10, 10, 1), (11, 10, 2), (2 * 2**20 + 5, 2**20, 3), (7, 1, 7)],
)
def test_put_together_is_what_was_cut(tmp_path, size, limit, count):
    file = tmp_path / "a.bin"
    file.write_bytes((CONTENT * (1 + size // len(CONTENT)))[:size])
    listed = split(file, tmp_path / "cut", limit)
    made = sorted(p.stat().st_size for p in listed.parent.iterdir() if p != listed)
    assert len(made) == count
    assert made[-1] <= limit
    assert made[-1] - made[0] <= 1  # a last piece of a few bytes would cost a whole transfer
    assert (
        join(listed.parent, tmp_path / "made" / "deep" / "b.bin")
        == hashlib.sha256(file.read_bytes()).hexdigest()
    )
    assert (tmp_path / "made" / "deep" / "b.bin").read_bytes() == file.read_bytes()
    assert [p.name for p in (tmp_path / "made" / "deep").iterdir()] == ["b.bin"]


def test_a_packaged_model_is_three_pieces_that_fit_a_transfer_with_the_wheels():
    assert -(-98_362_432 // pieces.LIMIT) == 3
    assert pieces.LIMIT < 48 * 2**20


def test_every_missing_and_torn_piece_is_named_at_once(cut, tmp_path):
    piece(cut, 2).unlink()
    piece(cut, 4).write_bytes(piece(cut, 4).read_bytes()[:-1])
    with pytest.raises(
        PiecesError,
        match=r"cut: model.gguf.2of4 is missing, model.gguf.4of4 is torn \(640 of 641 bytes\); bring",
    ):
        join(cut, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_swapped_pieces_are_named_with_what_they_hold(cut, tmp_path):
    second, third = piece(cut, 2).read_bytes(), piece(cut, 3).read_bytes()
    assert len(second) == len(third)
    piece(cut, 2).write_bytes(third)
    piece(cut, 3).write_bytes(second)
    with pytest.raises(
        PiecesError, match=r"model.gguf.2of4: holds the bytes of model.gguf.3of4, expected SHA-256 .*; bring"
    ):
        join(cut, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_one_changed_byte_is_found_and_the_older_file_stays(cut, tmp_path, number):
    out = tmp_path / "out"
    out.write_bytes(b"older")
    damaged = bytearray(piece(cut, number).read_bytes())
    damaged[-1] ^= 1
    piece(cut, number).write_bytes(damaged)
    with pytest.raises(PiecesError, match=rf"model.gguf.{number}of4: is damaged"):
        join(cut, out)
    assert out.read_bytes() == b"older"
    assert not list(tmp_path.glob("*.partial"))


def test_a_list_whose_order_was_changed_does_not_make_the_whole(cut, tmp_path):
    listed = cut / "model.gguf.pieces.json"
    made = json.loads(listed.read_text())
    made["pieces"][0], made["pieces"][1] = made["pieces"][1], made["pieces"][0]
    listed.write_text(json.dumps(made))
    with pytest.raises(PiecesError, match=r"pieces.json: its pieces do not make its whole"):
        join(cut, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-20],
        lambda text: "[]",
        lambda text: text.replace("sha256", "sha"),
        lambda text: text.replace('"model.gguf.2of4"', '"../model.gguf"'),
        lambda text: text.replace('"bytes": 2563', '"bytes": 2562'),
    ],
)
def test_a_damaged_list_is_named(cut, tmp_path, damage):
    listed = cut / "model.gguf.pieces.json"
    listed.write_text(damage(listed.read_text()))
    with pytest.raises(PiecesError, match=r"model.gguf.pieces.json: is damaged"):
        join(cut, tmp_path / "out")


def test_none_or_two_lists_are_refused(cut, tmp_path):
    (cut / "other.pieces.json").write_text("{}")
    with pytest.raises(
        PiecesError,
        match=r"cut: does not say what its pieces make, expected one \*.pieces.json, got \[.*other",
    ):
        join(cut, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(PiecesError, match=r"expected one \*.pieces.json, got \[\]"):
        join(tmp_path / "empty", tmp_path / "out")


def test_cut_again_leaves_no_piece_of_before_and_nothing_of_others(cut, tmp_path):
    (cut / "model.gguf.notes").write_text("mine")
    split(tmp_path / "model.gguf", cut, limit=2000)
    assert sorted(p.name for p in cut.iterdir()) == [
        "model.gguf.1of2", "model.gguf.2of2", "model.gguf.notes", "model.gguf.pieces.json",
    ]  # fmt: skip
    join(cut, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == CONTENT


def test_the_command_line(cut, tmp_path, capsys):
    assert (
        pieces.main(["split", str(tmp_path / "model.gguf"), str(tmp_path / "again"), "--limit", "1000"]) == 0
    )
    assert "3 pieces of at most 855 bytes" in capsys.readouterr().out
    assert pieces.main(["join", str(tmp_path / "again"), str(tmp_path / "out")]) == 0
    assert hashlib.sha256(CONTENT).hexdigest() in capsys.readouterr().out
    (tmp_path / "again" / "model.gguf.3of3").unlink()
    assert pieces.main(["join", str(tmp_path / "again"), str(tmp_path / "out")]) == 1
    assert "model.gguf.3of3 is missing" in capsys.readouterr().err
    assert pieces.main(["split", str(tmp_path / "model.gguf"), str(tmp_path / "again"), "--limit", "0"]) == 1
