"""Sources that are laid out or written in ways nobody planned for: what they mean is read, what may mean two
things refused."""

import json
import shutil

import pytest

from repsft_fast.cli import main
from repsft_fast.config import Config
from repsft_fast.data.load import DataSettings, load
from repsft_fast.data.sources import list_sources, open_rows
from repsft_fast.errors import ConfigError, DataError
from tests.helpers import runs
from tests.helpers.chat_tokenizers import byte_level

pytestmark = pytest.mark.timeout(60)
CARD = "---\nconfigs:\n- config_name: default\n{}---\n"


def row(text):
    return {"prompt": "q", "completion": text}


@pytest.fixture
def put(tmp_path, monkeypatch):
    """put("d/a.jsonl", …): files here, each with one row that says its place; put(**{"x.json": …}): with what
    is given."""
    monkeypatch.chdir(tmp_path)

    def make(*places, **contents):
        for place, content in {
            **{place: json.dumps(row(place)) + "\n" for place in places},
            **contents,
        }.items():
            file = tmp_path / place
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")

    return make


def read(spec, split="train", **options):
    """What the rows complete with, in order."""
    rows = [row for source in list_sources(spec, split, **options) for row, _ in open_rows(source, split)[0]]
    if bad := next((row for row in rows if isinstance(row, DataError)), None):
        raise bad
    return [row["completion"] for row in rows]


def notes(spec, split="train"):
    return " ".join(note for source in list_sources(spec, split) for note in source.notes)


A, B = row("a"), row("b")
TURNS = [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "One."}]


@pytest.mark.parametrize(
    ("content", "split", "expected"),
    [
        ({"version": 2, "data": [A, B], "tags": ["x"]}, "train", [A, B]),
        ({"train": [A], "test": [B]}, "train", [A]),
        ({"train": [A], "test": [B]}, "test", [B]),
        ({"Train": [A], "dev": [B], "test": []}, "validation", [B]),
        ({"train": "of 2020", "data": [B]}, "train", [B]),
        ({"messages": TURNS}, "train", [{"messages": TURNS}]),
        ({"conversation": TURNS}, "train", [{"conversation": TURNS}]),
        ({"prompt": TURNS[:1], "completion": "x"}, "train", [{"prompt": TURNS[:1], "completion": "x"}]),
        ({**A, "tools": [{"name": "f"}]}, "train", [{**A, "tools": [{"name": "f"}]}]),
        ({**A, "sources": [{"text": "x"}]}, "train", [{**A, "sources": [{"text": "x"}]}]),
        (
            {"segments": [{"label": True, "text": "x"}]},
            "train",
            [{"segments": [{"label": True, "text": "x"}]}],
        ),
    ],
)
def test_an_object_is_a_row_or_holds_the_rows_of_the_split(put, content, split, expected):
    put(**{"r.json": content})
    assert [row for row, _ in open_rows(*list_sources("r.json", split), split)[0]] == expected


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"test": [A]}, r"r.json: has no split train, expected test"),
        ({"train_a": [A], "train_b": [B]}, r"holds several arrays, expected one, got 'train_a', 'train_b'"),
        ({"train": [A], "train_more": [B]}, r"holds several arrays"),
        ({"data": [A], "errors": [B]}, r"holds several arrays, expected one, got 'data', 'errors'"),
        ({"text": "about the rows", "rows": [A]}, r"is a row itself and holds rows in 'rows'"),
        ({**A, "examples": [B]}, r"is a row itself and holds rows in 'examples'"),
    ],
)
def test_an_object_that_could_mean_several_things_is_refused(put, content, words):
    put(**{"r.json": content})
    with pytest.raises(DataError, match=words):
        read("r.json")


def test_the_only_split_of_an_object_is_read_for_validation(put):
    put(**{"r.json": {"test": [A]}})
    assert read("r.json", "validation", beside=[]) == ["a"]


@pytest.mark.parametrize("name", ["r.jsonl", "r.json"])
def test_one_name_with_two_values_is_refused(put, name):
    put(
        **{
            name: (
                '{"prompt": "q", "completion": "a", "completion": "a"}\n{"prompt": "q", "completion": "b"}\n'
            )
        }
    )
    assert read(name) == ["a", "b"]
    for torn in (
        '{"prompt": "q", "completion": "a", "completion": "b"}',
        '{"prompt": "q", "m": [{"x": 1, "x": null}]}',
    ):
        put(**{name: torn})
        with pytest.raises(DataError, match=r"names '(completion|x)' twice, with two values"):
            read(name)


@pytest.mark.parametrize(
    "files",
    [
        ["train-0-of-3.jsonl", "train-2-of-3.jsonl"],
        ["train.00000-of-00002.jsonl"],
        ["train_00000_of_00002.jsonl"],
        ["train-1-of-2.jsonl", "train-3-of-2.jsonl"],
        ["00001-of-00002.jsonl"],
        ["train-00000-of-00002-0123abcd.jsonl"],
    ],
)
def test_a_shard_that_is_missing_is_seen_however_it_is_spelled(put, files):
    put(*[f"d/{name}" for name in files])
    with pytest.raises(DataError, match=r"does not hold the shards of .* once each"):
        list_sources("d")


@pytest.mark.parametrize(
    "files",
    [
        ["train-1-of-2.jsonl", "train-2-of-2.jsonl"],
        ["train_0_of_2.jsonl", "train_1_of_2.jsonl"],
        ["train.00000-of-00001.jsonl"],
        ["best-of-3.jsonl", "one.of.many.jsonl"],
    ],
)
def test_whole_shards_are_read(put, files):
    put(*[f"d/{name}" for name in files])
    assert read("d") == [f"d/{name}" for name in files]


@pytest.mark.parametrize(
    ("files", "split", "expected"),
    [
        (["mytrain.jsonl", "mytest.jsonl"], "train", ["mytrain.jsonl"]),
        (["mytrain.jsonl", "mytest.jsonl"], "test", ["mytest.jsonl"]),
        (
            ["gsm8ktrain1.jsonl", "gsm8ktrain2.jsonl", "gsm8ktest1.jsonl"],
            "train",
            ["gsm8ktrain1.jsonl", "gsm8ktrain2.jsonl"],
        ),
        (["mytest.jsonl", "myval.jsonl"], "validation", ["myval.jsonl"]),
        (["contest.jsonl", "protest.jsonl"], "train", ["contest.jsonl", "protest.jsonl"]),
        (["latest.jsonl", "restrain.jsonl"], "train", ["latest.jsonl", "restrain.jsonl"]),
    ],
)
def test_splits_named_within_a_word(put, files, split, expected):
    put(*[f"d/{name}" for name in files])
    assert read("d", split) == [f"d/{name}" for name in expected]


def test_every_file_that_a_card_names_is_there_and_read(put):
    put("d/a.jsonl", "d/c.jsonl.zst")
    for missing, words in (
        ("gone.jsonl", "not here, got gone.jsonl"),
        ("c.jsonl.zst", r"c.jsonl.zst: is a kind of file"),
    ):
        put(**{"d/README.md": CARD.format(f"  data_files: [a.jsonl, {missing}]\n")})
        with pytest.raises(DataError, match=words):
            list_sources("d")


def test_a_card_that_names_no_file_is_refused(put):
    put("d/a.jsonl", **{"d/README.md": CARD.format("  data_files: []\n")})
    with pytest.raises(DataError, match=r"README.md: its data_files name none"):
        list_sources("d")


def test_a_card_that_names_a_folder_leaves_its_splits_to_the_files_names(put):
    put(
        "d/a/train.jsonl",
        "d/a/test.jsonl",
        "d/train.jsonl",
        **{"d/README.md": CARD.format("  data_dir: a\n")},
    )
    assert read("d") == ["d/a/train.jsonl"]
    assert read("d", "test") == ["d/a/test.jsonl"]
    assert "a/test.jsonl (test), train.jsonl" in notes("d")
    put(**{"d/README.md": CARD.format("  data_dir: gone\n")})
    with pytest.raises(DataError, match=r"d/gone/: is a folder without data"):
        list_sources("d")


def test_what_a_card_says_of_reading_and_is_not_done_is_said(put):
    put("d/a.jsonl", **{"d/README.md": CARD.format("  data_files: a.jsonl\n  quotechar: x\n  field: data\n")})
    assert notes("d") == "d/README.md: how to read the files is not taken from it: field, quotechar"
    put(**{"d/README.md": CARD.format("  data_files: a.jsonl\n  drop_labels: true\n  default: true\n")})
    assert notes("d") == ""


def test_a_copy_is_the_same_rows_twice(put, tmp_path):
    put("d/train.jsonl", "d/more.jsonl")
    shutil.copy(tmp_path / "d/train.jsonl", tmp_path / "d/train (1).jsonl")
    with pytest.raises(DataError, match=r"d/train.jsonl: is a copy of d/train \(1\).jsonl, byte for byte"):
        load("d", byte_level())
    tasks = {"a": "d/train.jsonl", "b": ["d/train (1).jsonl", "d/more.jsonl"]}
    assert [sample.task for sample in load(tasks, byte_level()).samples] == ["a", "b", "b"]


@pytest.mark.parametrize("name", ["json", "text", "csv", "parquet", "text:x"])
def test_a_name_that_means_all_files_here_to_datasets_is_refused(put, monkeypatch, name):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    put("a.jsonl", "b.json", **{"c.txt": "x"})
    with pytest.raises(DataError, match=rf"{name}: is not a file here .* all files here; name the files"):
        load(name, byte_level())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("$DATA/a.jsonl", "variables are not filled in"),
        ("file:///data/a.jsonl", "write the path: /data/a.jsonl"),
        ("hf://datasets/owner/name/a.jsonl", "name the hub id: owner/name"),
        ("https://huggingface.co/datasets/owner/name", "name the hub id: owner/name"),
        ("s3://bucket/a.jsonl", "download it"),
    ],
)
def test_a_name_that_is_no_path_says_what_to_write(put, name, words):
    put()
    with pytest.raises(DataError, match=words):
        list_sources(name)


def test_a_task_without_a_source_or_a_name_is_refused(put):
    put("a.jsonl")
    for spec in ({"a": [], "b": "a.jsonl"}, {" ": "a.jsonl"}):
        with pytest.raises(DataError, match=r"task '[a ]' has no (source|name)"):
            list_sources(spec)


def test_white_space_in_front_of_a_column_is_refused(put):
    put(**{"r.csv": 'prompt, completion\nq, "c"\n'})
    with pytest.raises(DataError, match=r"r.csv:1: has white space in front of column 'completion'"):
        read("r.csv")
    put(**{"r.csv": "\ufeff prompt,completion ,\nq, c,\n"})
    assert read("r.csv") == [" c"]


def test_arrow_files_in_both_forms_and_tables_without_rows(put, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    put()
    table = pa.table({"prompt": ["q"], "completion": pa.array(["c"], pa.large_string())})
    for name, writer in (("f.arrow", pa.ipc.new_file), ("s.arrow", pa.ipc.new_stream)):
        with writer(str(tmp_path / name), table.schema) as stream:
            stream.write_table(table)
        assert read(name) == ["c"]
    with pa.ipc.new_file(str(tmp_path / "e.arrow"), table.schema):
        pass
    pq.write_table(table.slice(0, 0), tmp_path / "e.parquet")
    for name in ("e.arrow", "e.parquet"):
        with pytest.raises(DataError, match=f"{name}: is empty"):
            load(name, byte_level())
    pq.write_table(
        pa.Table.from_arrays([pa.array(["a"])] * 2, names=["text", "text"]), tmp_path / "t.parquet"
    )
    with pytest.raises(
        DataError, match=r"t.parquet: cannot be read as parquet \((ArrowInvalid.*text|CastError)"
    ):
        load("t.parquet", byte_level())


def test_what_lies_in_a_saved_folder_and_is_not_read_is_said(put, tmp_path):
    import datasets

    rows = datasets.Dataset.from_list([A])
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "two")
    assert notes(tmp_path / "one") == ""
    put("one/extra.jsonl", "two/extra.csv")
    assert notes("one") == "one: not read: extra.jsonl"
    assert notes("two") == "split train of two: not read: extra.csv, test (split)"


def test_fields_of_turns_that_no_row_has_are_said(put):
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "1?", "lang": "en"}]},
        {**TURNS[1], "name": "n"},
    ]
    put(**{"r.jsonl": {"messages": turns}})

    def said(*ignored):
        return [
            text
            for text in load("r.jsonl", byte_level(), DataSettings(ignore_columns=ignored)).warnings
            if "no row" in text
        ]

    assert said("messages[].name", "messages[].content[].lang") == []
    assert said("messages[].nam") == [
        "data.ignore_columns: no row has 'messages[].nam'; did you mean messages[].name?"
    ]
    assert said("message[].x", "messages[].content[].x") == [
        "data.ignore_columns: no row has 'message[].x'",
        "data.ignore_columns: no row has 'messages[].content[].x'",
    ]


@pytest.mark.parametrize("setting", ["task_column", "weight_column"])
def test_a_slip_in_the_name_of_a_column_names_the_setting(put, setting):
    put(**{"r.jsonl": {**A, "level": 1}})
    with pytest.raises(
        DataError, match=rf"field 'levle': is missing, and data.{setting} names it; did you mean level\?"
    ):
        load("r.jsonl", byte_level(), DataSettings(**{setting: "levle"}))


def test_one_column_is_not_both_task_and_weight(tmp_path):
    with pytest.raises(ConfigError, match=r"data.weight_column: names data.task_column too"):
        Config.of(runs.settings(tmp_path, data__task_column="x", data__weight_column="x"))


def test_inspect_needs_neither_a_budget_nor_a_folder_and_writes_none(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    settings = runs.settings(tmp_path / "x", samples=9)
    del settings["run"], settings["budget"]
    (tmp_path / "run.yaml").write_text(json.dumps(settings))
    before = set(tmp_path.iterdir())
    assert main(["inspect", "--config", "run.yaml", "--show", "1"]) == 0
    assert "train.jsonl (9 rows)" in capsys.readouterr().out
    assert set(tmp_path.iterdir()) == before
    assert main(["train", "--config", "run.yaml", "--dry-run"]) == 2
    printed = capsys.readouterr().err
    assert "run.folder: is missing" in printed
    assert "budget: has no limit" in printed
    assert main(["inspect", "--config", "run.yaml", "--show", "-1"]) == 2
