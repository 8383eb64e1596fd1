"""Replies in a file: what was written is found again, a torn end is dropped, another evaluation's is refused."""

import json

import pytest

from repsft_fast.errors import ConfigError, TrainingError
from repsft_fast.evaluate.asked import Generation, Request
from repsft_fast.evaluate.record import Record

IDENTITY = {"model": "a1", "prompts": "b2"}
REPLIES = {
    (0, 0): Generation([5, 6, 7], True, 0.25),
    (0, 1): Generation([], False),
    (1, 0): Generation([9], True, 1.5),
}


def record(path, identity=IDENTITY):
    return Record(path, identity, text_of=lambda reply: f"«{len(reply.ids)}» ü\n")


def filled(path):
    with record(path) as file:
        for (prompt, draw), reply in REPLIES.items():
            file.add(Request(prompt, draw, (1, 2)), reply)


def test_what_was_written_is_known_again(tmp_path):
    filled(tmp_path / "r.jsonl")
    with record(tmp_path / "r.jsonl") as again:
        assert again.known == REPLIES
    lines = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert lines[0] == {"kind": "evaluation", "version": 1, **IDENTITY}
    assert lines[1] == {
        "prompt": 0, "draw": 0, "ids": [5, 6, 7], "finished": True, "entropy": 0.25, "text": "«3» ü\n",
    }  # fmt: skip


def test_a_file_cut_at_any_byte_goes_on(tmp_path):
    """kill -9 in the middle of a line: what was whole stays, the rest is asked again."""
    filled(tmp_path / "whole.jsonl")
    data = (tmp_path / "whole.jsonl").read_bytes()
    for length in range(len(data) + 1):
        path = tmp_path / "cut.jsonl"
        path.write_bytes(data[:length])
        with record(path) as file:
            whole = data[:length].count(b"\n")
            assert len(file.known) == max(whole - 1, 0)
            assert file.known.items() <= REPLIES.items()
            for key in REPLIES.keys() - file.known.keys():
                file.add(Request(*key, (1, 2)), REPLIES[key])
        with record(path) as file:
            assert file.known == REPLIES


@pytest.mark.parametrize(
    "identity", [{"model": "a1", "prompts": "other"}, {"model": "a1"}, {**IDENTITY, "more": 1}]
)
def test_another_evaluation_is_refused_with_what_differs(tmp_path, identity):
    filled(tmp_path / "r.jsonl")
    before = (tmp_path / "r.jsonl").read_bytes()
    with pytest.raises(
        ConfigError, match=r"of another evaluation: (prompts|more) differs.*give another folder"
    ):
        record(tmp_path / "r.jsonl", identity)
    assert (tmp_path / "r.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("line", "damaged"),
    [
        (1, '{"prompt": 0}'), (1, '{"kind": "run"}'), (1, "[]"), (1, "7"), (1, ""), (1, "[" * 20_000),
        (2, "nonsense"), (2, "{}"), (2, '{"prompt": 0, "draw": 0}'), (2, "null"),
        (2, '{"prompt": 0, "draw": 0, "ids": 3, "finished": true, "entropy": null}'),
        (2, '{"prompt": 0, "draw": 0, "ids": [], "finished": "yes", "entropy": null}'),
        (3, '{"prompt": 0, "draw": 0, "ids": ["x"], "finished": true, "entropy": null}'),
    ],
)  # fmt: skip
def test_a_file_that_is_no_record_is_refused_and_left(tmp_path, line, damaged):
    path = tmp_path / "r.jsonl"
    filled(path)
    lines = path.read_text().splitlines(keepends=True)
    lines[line - 1] = damaged + "\n"
    path.write_text("".join(lines))
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=rf"r.jsonl line {line}: is no line of a record of replies"):
        record(path)
    assert path.read_bytes() == before


def test_somebodys_file_without_a_line_is_refused(tmp_path):
    (tmp_path / "r.jsonl").write_text("notes")
    with pytest.raises(ConfigError, match="is no record of replies"):
        record(tmp_path / "r.jsonl")
    assert (tmp_path / "r.jsonl").read_text() == "notes"


def test_a_finished_file_holds_its_lines_in_order_and_is_known_again(tmp_path):
    filled(tmp_path / "r.jsonl")
    lines = [
        {
            "prompt": p,
            "draw": d,
            "ids": r.ids,
            "finished": r.finished,
            "entropy": r.entropy,
            "verdict": "right",
        }
        for (p, d), r in sorted(REPLIES.items(), reverse=True)
    ]
    with record(tmp_path / "r.jsonl") as file:
        file.finish(lines)
    found = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert found[1:] == lines
    with record(tmp_path / "r.jsonl") as again:
        assert again.known == REPLIES


def test_a_place_that_cannot_be_written(tmp_path):
    with pytest.raises(ConfigError, match="cannot be written"):
        record(tmp_path / "no" / "r.jsonl")


@pytest.mark.skipif(not __import__("os").path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_says_how_to_go_on(tmp_path):
    file = record(tmp_path / "r.jsonl")
    file._file.close()
    file._file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115
    with pytest.raises(TrainingError, match="make room and start the same command again"):
        file.add(Request(0, 0, (1,)), Generation([1], True))
    file.close()
