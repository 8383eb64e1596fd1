"""Files from hell: every one gets a DataError with its place, in bounded time and memory, or is read
exactly."""

import json
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from repsft_fast.data import text_rows
from repsft_fast.data.load import DataSettings, load
from repsft_fast.errors import DataError
from tests.helpers.chat_tokenizers import byte_level
from tests.hostile.byte_doors import GOOD_ROW as GOOD
from tests.hostile.byte_doors import Rows


@pytest.fixture
def attempt(tmp_path):
    """attempt(bytes) → Loaded, or the DataError's text."""

    def run(content, name="rows.jsonl", **options):
        path = tmp_path / name
        path.write_bytes(content)
        return load(str(path), byte_level(), DataSettings(**options))

    return run


@pytest.mark.parametrize(
    ("content", "place", "words"),
    [
        (GOOD + b'{"query": "q", "resp', "rows.jsonl:2", "torn"),
        (GOOD + b'{"query": "q", "response": \n' + GOOD, "rows.jsonl:2", "not JSON"),
        (GOOD + b'{"query": "\xff", "response": "a"}\n', "rows.jsonl:2", "not UTF-8.*0xff at byte 11"),
        (GOOD + b'{"query": "q\0", "response": "a"}\n', "rows.jsonl:2", "NUL byte at byte 12"),
        (GOOD + b"\0" * 4096, "rows.jsonl:2", "NUL"),
        (
            GOOD + rb'{"query": "\ud800", "response": "a"}' + b"\n",
            "rows.jsonl:2, field 'query'",
            r"surrogate.*U\+D800",
        ),
        (GOOD + b'["query", "response"]\n', "rows.jsonl:2", "not a row.*list"),
        (GOOD + b"17\n", "rows.jsonl:2", "not a row.*int"),
        (GOOD + b"null\n", "rows.jsonl:2", "not a row"),
        (GOOD + b'{"query": "q", "response": null}\n', "rows.jsonl:2, field 'response'", "null"),
        (
            GOOD + b'{"text": "t"}\n',
            "rows.jsonl:2, field 'query'",
            "missing.*'query' rows.*looks like 'text'",
        ),
        (GOOD + b'{"query": "q", "response": 1' + b"0" * 5000 + b"}\n", "rows.jsonl:2", "not JSON"),
        (GOOD + b"[" * 100_000 + b"\n", "rows.jsonl:2", "nested too deeply"),
        (GOOD + b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "rows.jsonl:2", "nested too deeply"),
        (GOOD.decode().encode("utf-16"), "rows.jsonl:1", "UTF-16"),
        (b"", "rows.jsonl", "is empty"),
        (b"\n \r\n\n", "rows.jsonl", "is empty"),
        (b"\xef\xbb\xbf", "rows.jsonl", "is empty"),
    ],
)
def test_a_damaged_line_is_named(attempt, content, place, words):
    with pytest.raises(DataError, match=words) as caught:
        attempt(content)
    assert f"{place}:" in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + GOOD,
        GOOD.replace(b"\n", b"\r\n") + b"\r\n",
        GOOD.rstrip(),
        b"\n\n" + GOOD,
        rb'{"query": "q", "response": "a", "other": "\ud800", "deep": [[[[1]]]]}',
        b'{"query": "q", "query": "q", "response": "a"}',
    ],
)
def test_harmless_oddities_are_read_exactly(attempt, content):
    assert [sample.ids for sample in attempt(content).samples] == [
        sample.ids for sample in attempt(GOOD).samples
    ]


def test_odd_but_valid_text_is_kept(attempt):
    text = "a\0b\u2028c\x85d\r\ne\U0001f600\ufeff"
    loaded = attempt(
        json.dumps({"prompt": "p", "completion": text}).encode()
        + b"\n"
        + GOOD.replace(b"query", b"prompt").replace(b"response", b"completion")
    )
    assert byte_level().decode(loaded.samples[0].ids) == f"p{text}<|im_end|>"
    assert loaded.samples[1].source.endswith(":2")  # no line break of Unicode splits a row


def test_a_line_of_100_megabytes_is_refused_without_reading_it(tmp_path, monkeypatch):
    assert text_rows.MAX_LINE_BYTES < 100 * 2**20
    monkeypatch.setattr(text_rows, "MAX_LINE_BYTES", 2**20)
    path = tmp_path / "rows.jsonl"
    with path.open("wb") as stream:
        stream.write(GOOD)
        stream.truncate(100 * 2**20)  # one line of NUL bytes, none of them on disk
    tokenizer = byte_level()
    load_settings = DataSettings()
    tracemalloc.start()
    try:
        with pytest.raises(
            DataError, match=r"rows.jsonl:2: is too long a line, expected at most 1048576 bytes"
        ):
            load(str(path), tokenizer, load_settings)
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"[]", "is empty"),
        (b"[1]", r"rows.json:1: is not a row"),
        (b"17", "holds no rows"),
        (b'[{"query": "q", "response": "a"}', "not JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"data": [], "more": 1}', "no format"),
        (b"\xff\xfe[]", "UTF-16"),
        (b'[{"query": "q", "response": "a"}, {"query": "q"}]', r"rows.json:2, field 'response'"),
        (b'{"query": "q", "response": "a"}\n{"query": "q", "respo', r"rows.json:2: is torn"),
    ],
)
def test_json_files(attempt, content, words):
    with pytest.raises(DataError, match=words):
        attempt(content, "rows.json")


def test_a_json_file_past_its_limit_is_refused(attempt, monkeypatch):
    monkeypatch.setattr(text_rows, "MAX_JSON_BYTES", 10)
    with pytest.raises(DataError, match=r"too large.*write it as .jsonl"):
        attempt(b"[" + GOOD + b"]", "rows.json")


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + b"\0" * 100 + b"PAR1", b"\x80\x04N."])
def test_a_damaged_parquet_file(attempt, content):
    with pytest.raises(DataError, match=r"rows.parquet: cannot be read as parquet"):
        attempt(content, "rows.parquet")


def test_a_damaged_or_foreign_arrow_folder(tmp_path):
    import datasets

    datasets.Dataset.from_list([{"query": "q", "response": "a"}]).save_to_disk(tmp_path / "arrow")
    file = next((tmp_path / "arrow").glob("*.arrow"))
    whole = file.read_bytes()
    for content in (b"", whole[: len(whole) // 3], b"\xff" * 64):
        file.write_bytes(content)
        with pytest.raises(DataError, match="arrow: cannot be read as arrow"):
            load(tmp_path / "arrow", byte_level())
    (tmp_path / "arrow" / "state.json").write_text('{"_data_files": [{"filename": "../../x.arrow"}]}')
    with pytest.raises(
        DataError, match=r"arrow: cannot be read as arrow: state.json points outside its folder"
    ):
        load(tmp_path / "arrow", byte_level())


def test_an_empty_arrow_data_set_and_a_missing_split(tmp_path):
    import datasets

    empty = datasets.Dataset.from_dict({"query": [], "response": []})
    datasets.DatasetDict({"train": empty}).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match="saved: is empty"):
        load(tmp_path / "saved", byte_level())
    with pytest.raises(DataError, match="has no such split, expected train, got test"):
        load(tmp_path / "saved", byte_level(), DataSettings(split="test"))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("row.jsonl", "does not exist; did you mean rows.jsonl"),
        ("rows.jsonll", "does not exist; did you mean rows.jsonl"),
        ("./nowhere/rows.jsonl", "does not exist"),
        ("rows.xls", "kind of file we do not read"),
        ("folder", "folder without data"),
        ("a\0b.jsonl", "does not exist"),
        ("x" * 5000 + ".jsonl", "does not exist"),
        ("", "not a source"),
        (7, "not a source"),
        ([], "names no source"),
        ({}, "names no source"),
        ("owner/name", "could not be had from the hub"),
    ],
)
def test_sources_that_are_not_there(tmp_path, monkeypatch, source, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_bytes(GOOD)
    (tmp_path / "rows.xls").write_bytes(b"query,response\nq,a\n")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=words):
        load([source] if isinstance(source, int) else source, byte_level())


def test_filtered_to_nothing_names_the_source_and_the_reasons(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(GOOD * 3)
    (tmp_path / "b.jsonl").write_bytes(
        b'{"query": "q", "response": " "}\n' * 2 + GOOD.replace(b'"a"', b'"' + b"a" * 99 + b'"')
    )
    sources_given = {"a": tmp_path / "a.jsonl", "b": tmp_path / "b.jsonl"}
    with pytest.raises(
        DataError,
        match=r"b.jsonl: none of its 3 rows is usable .2 × no assistant turn to train on, 1 × over-long",
    ):
        load(sources_given, byte_level(), DataSettings(max_tokens=60))


@pytest.mark.parametrize("ids", [[1, 2, 50], [1, 50, 2], [50, 1, 1]])
def test_a_token_past_the_vocabulary_names_the_row(attempt, ids):
    row = json.dumps({"input_ids": ids}).encode() + b"\n"
    with pytest.raises(
        DataError,
        match=rf"rows.jsonl:2, token {ids.index(50)}: is out of range, expected less than 50.*got 50",
    ):
        load_with_vocabulary(attempt, b'{"input_ids": [1, 49]}\n' + row, 50)


def test_a_tokenizer_larger_than_the_model_is_found(attempt):
    with pytest.raises(DataError, match=r"rows.jsonl:1, token 0: is out of range"):
        load_with_vocabulary(attempt, GOOD, 200)


def load_with_vocabulary(attempt, content, size):
    attempt(GOOD)  # writes the file's folder
    path = attempt.__closure__[0].cell_contents / "rows.jsonl"
    path.write_bytes(content)
    return load(str(path), byte_level(), vocab_size=size)


@pytest.mark.parametrize("weight", ["-1", "NaN", "Infinity", "null", '"one"', "1e999", "true"])
def test_bad_weights_name_the_row(attempt, weight):
    content = GOOD.replace(b"}", b', "w": 1}') + GOOD.replace(b"}", b', "w": ' + weight.encode() + b"}")
    with pytest.raises(DataError, match=r"rows.jsonl:2, field 'w': is not a weight"):
        attempt(content, weight_column="w")


def outcome(call):
    """What it gives, or the text of its DataError. Any other exception is a failure."""
    try:
        return call()
    except DataError as error:
        return str(error)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "x"]), inner)
    ),
    max_leaves=8,
)
KEYS = [
    "messages",
    "conversations",
    "prompt",
    "completion",
    "query",
    "response",
    "text",
    "input_ids",
    "labels",
    "tools",
    "output",
]
TURNS = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "tool"]), "content": JSON}
    ),
    max_size=4,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.dictionaries(st.sampled_from(KEYS), JSON | TURNS, max_size=4), min_size=1, max_size=3))
def test_no_row_gives_a_traceback(attempt, rows):
    loaded = outcome(lambda: attempt("\n".join(map(json.dumps, rows)).encode()))
    if isinstance(loaded, str):
        assert "rows.jsonl" in loaded
        return
    assert len(loaded.samples) + sum(loaded.dropped.values()) == len(rows)
    for sample in loaded.samples:
        assert len(sample.ids) == len(sample.trained)
        assert sample.trained[-1]
        assert not sample.trained[0]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=40), st.integers(0, len(GOOD)))
def test_no_bytes_give_a_traceback(tmp_path, junk, at):
    Rows(tmp_path)(GOOD + GOOD[:at] + junk + GOOD[at:])
