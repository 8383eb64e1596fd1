import json
import os
from dataclasses import replace

import pytest
from safetensors import safe_open

from repsft_fast.data import cache, sample_builder
from repsft_fast.data.load import DataSettings, load, load_splits
from repsft_fast.data.sample_builder import SampleBuilder
from repsft_fast.errors import DataError
from tests.helpers.chat_tokenizers import BLOCKS, byte_level, trained_text

ROWS = [
    {"query": f"question {n}", "response": f"answer {n}", "level": n % 3, "share": 0.5 + n} for n in range(7)
]
IDS = [{"input_ids": list(range(5 + n)), "labels": [-100, -100, *range(2, 5 + n)]} for n in range(6)]


@pytest.fixture
def write(tmp_path):
    def write_rows(rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write_rows


def texts(loaded, tokenizer):
    return [trained_text(sample, tokenizer) for sample in loaded.samples]


def test_every_kind_of_source_gives_the_same_samples(tmp_path, write):
    import datasets

    tokenizer = byte_level()
    expected = load(write(ROWS), tokenizer).samples
    assert [sample.source.rpartition(":")[2] for sample in expected] == [str(n) for n in range(1, 8)]
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.to_parquet(tmp_path / "rows.parquet")
    dataset.save_to_disk(tmp_path / "arrow")
    datasets.DatasetDict({"train": dataset, "other": dataset.select([0])}).save_to_disk(tmp_path / "splits")
    (tmp_path / "rows.json").write_text(json.dumps(ROWS, indent=1))
    (tmp_path / "object.json").write_text(json.dumps({"version": 1, "data": ROWS}))
    (tmp_path / "lines.json").write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "folder").mkdir()
    for part, rows in (("a.jsonl", ROWS[:3]), ("b.ndjson", ROWS[3:])):
        (tmp_path / "folder" / part).write_text("\n".join(map(json.dumps, rows)))
    for name in ("rows.parquet", "arrow", "splits", "rows.json", "object.json", "lines.json", "folder"):
        loaded = load(tmp_path / name, tokenizer)
        assert [replace(sample, source="") for sample in loaded.samples] == [
            replace(s, source="") for s in expected
        ], name
        assert name in loaded.samples[0].source
    assert len(load(tmp_path / "splits", tokenizer, DataSettings(split="other")).samples) == 1


def test_reading_parquet_prints_nothing_where_nobody_watches(tmp_path, capfd):
    import datasets

    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "rows.parquet")
    capfd.readouterr()
    load(tmp_path / "rows.parquet", byte_level())
    assert "".join(capfd.readouterr()) == ""
    assert not datasets.are_progress_bars_disabled()


def test_turns_and_tools_survive_arrow(tmp_path, write):
    import datasets

    rows = [
        {
            "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
            "tools": None,
        },
        {
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "b"},
            ],
            "tools": [{"type": "function", "function": {"name": "f"}}],
        },
    ]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    from_arrow, from_lines = (load(path, byte_level()) for path in (tmp_path / "rows.parquet", write(rows)))
    assert [s.ids for s in from_arrow.samples] == [s.ids for s in from_lines.samples]
    assert from_arrow.warnings == from_lines.warnings == ["1 rows have tools that the chat template ignores"]


def test_tasks_by_source_or_by_column(write):
    tokenizer = byte_level()
    a, b = write(ROWS[:3], "a.jsonl"), write(ROWS[3:], "b.jsonl")
    assert [s.task for s in load({"x": a, "y": [b]}, tokenizer).samples] == ["x"] * 3 + ["y"] * 4
    assert {s.task for s in load([a, b], tokenizer).samples} == {"default"}
    assert [s.task for s in load([a, b], tokenizer, DataSettings(task_column="level")).samples] == list(
        "0120120"
    )
    with pytest.raises(DataError, match=r"a.jsonl:1, field 'kind'"):
        load(a, tokenizer, DataSettings(task_column="kind"))
    with pytest.raises(DataError, match="contradicts"):
        load({"x": a}, tokenizer, DataSettings(task_column="level"))


def test_weights(write):
    path = write([row | {"share": n * 0.5} for n, row in enumerate(ROWS)])
    loaded = load(path, byte_level(), DataSettings(weight_column="share"))
    assert [s.weight for s in loaded.samples] == [0.5, 1.0, 1.5, 2.0, 2.5, 3.0]
    assert loaded.dropped == {"weight 0": 1}
    with pytest.raises(DataError, match=r"none of its 2 rows is usable .2 × weight 0"):
        load(
            write([row | {"share": 0} for row in ROWS[:2]]), byte_level(), DataSettings(weight_column="share")
        )


def test_weights_that_sum_to_infinity(write):
    path = write([row | {"share": 1e308} for row in ROWS])
    with pytest.raises(DataError, match=r"data.weight_column: the weights sum to infinity"):
        load(path, byte_level(), DataSettings(weight_column="share"))


def test_pretokenised_rows_need_no_tokenizer_and_are_cut_after_the_last_target(write):
    rows = [*IDS, {"input_ids": [7, 8, 9, 9], "labels": [7, 8, -100, -100]}]
    loaded = load(write(rows), None, vocab_size=50)
    assert loaded.samples[0].ids == [0, 1, 2, 3, 4]
    assert loaded.samples[0].trained == [False, False, True, True, True]
    assert loaded.samples[-1].ids == [7, 8]
    assert loaded.samples[-1].trained == [False, True]  # nothing predicts the first token


def test_over_long_rows_at_the_border(write):
    path = write(IDS)  # 4, 5, … 9 positions
    kept = load(path, None, DataSettings(max_tokens=6))
    assert [s.positions for s in kept.samples] == [4, 5, 6]
    assert kept.dropped == {"over-long": 3}
    cut = load(path, None, DataSettings(max_tokens=6, overlong="truncate"))
    assert [s.positions for s in cut.samples] == [4, 5, 6, 6, 6, 6]
    assert cut.samples[5].ids == list(range(7))
    assert cut.warnings == ["3 over-long rows truncated to 6 positions"]
    with pytest.raises(DataError, match=r"rows.jsonl:4: is over-long, expected at most 6 positions, got 7"):
        load(path, None, DataSettings(max_tokens=6, overlong="raise"))


def test_truncation_that_leaves_no_target_is_a_drop(write):
    rows = [{"input_ids": list(range(9)), "labels": [-100] * 5 + [5, 6, 7, 8]}, IDS[0]]
    loaded = load(write(rows), None, DataSettings(max_tokens=4, overlong="truncate"))
    assert len(loaded.samples) == 1
    assert loaded.dropped == {"over-long, and truncation leaves no target": 1}
    assert [
        s.positions for s in load(write(rows), None, DataSettings(max_tokens=5, overlong="truncate")).samples
    ] == [5, 4]


def test_rows_with_nothing_to_train_on_are_dropped_and_counted(write):
    user = {"role": "user", "content": "q"}
    chats = [
        {"messages": [user]},
        {"messages": [user, {"role": "assistant", "content": " "}]},
        {"messages": [user, {"role": "assistant", "content": "<|im_end|>\n<|im_end|>"}]},
        {"messages": [user, {"role": "assistant", "content": "a"}]},
    ]
    for template in (None, BLOCKS):
        loaded = load(write(chats), byte_level(), DataSettings(chat_template=template))
        assert (len(loaded.samples), dict(loaded.dropped)) == (1, {"no assistant turn to train on": 3})
    text = load(write([{"text": t} for t in ("", " \n", "<|im_end|><|begin|>", "words")]), byte_level())
    assert (len(text.samples), dict(text.dropped)) == (1, {"no text, or only special tokens": 3})
    masked = [
        {"input_ids": [1, 2], "labels": [-100, -100]},
        {"input_ids": [], "labels": []},
        {"input_ids": [3]},
        IDS[0],
    ]
    loaded = load(write(masked), None)
    assert dict(loaded.dropped) == {"no trained token": 2, "no text, or only special tokens": 1}


def test_samples_are_a_nested_subset(write):
    path = write(IDS)
    small, large = (
        {s.source for s in load(path, None, DataSettings(samples=n, seed=5)).samples} for n in (2, 4)
    )
    assert len(small) == 2
    assert small < large
    with pytest.raises(DataError, match="more than there is, expected at most 6, got 7"):
        load(path, None, DataSettings(samples=7))


def test_one_sample_is_enough(write):
    assert len(load(write(ROWS[:1]), byte_level()).samples) == 1


def test_chunks_do_not_show(write, monkeypatch):
    rows = [row for pair in zip(ROWS, [{"query": "q", "response": ""}] * 7) for row in pair]
    whole = load(write(rows), byte_level())
    monkeypatch.setattr(sample_builder, "CHUNK_ROWS", 3)
    assert load(write(rows), byte_level()) == whole
    assert whole.dropped == {"no assistant turn to train on": 7}


def test_settings_are_checked():
    for bad in (
        {"format": "chat"},
        {"train_on": "some"},
        {"overlong": "cut"},
        {"max_tokens": 0},
        {"samples": 0},
    ):
        with pytest.raises(DataError, match=f"data.{next(iter(bad))}"):
            DataSettings(**bad)


def test_a_forced_format_wins_over_detection(write):
    rows = [{"prompt": "p", "completion": "c", "text": "whole"}]
    tokenizer = byte_level()
    assert texts(load(write(rows), tokenizer), tokenizer) == ["·c<|im_end|>"]
    assert texts(load(write(rows), tokenizer, DataSettings(format="text")), tokenizer) == ["·hole<|im_end|>"]


class TestCache:
    @pytest.fixture
    def settings(self, tmp_path):
        return DataSettings(cache_folder=tmp_path / "cache")

    @pytest.fixture
    def builds(self, monkeypatch):
        """How often samples were built rather than read."""
        calls = []
        build = SampleBuilder.__call__

        def counted(self, sources):
            calls.append(1)
            return build(self, sources)

        monkeypatch.setattr(SampleBuilder, "__call__", counted)
        return calls

    def test_the_second_load_reads_and_equals_the_first(self, write, settings, builds):
        path = write(
            [*ROWS, {"query": "q<|im_end|>", "response": " "}, {"query": "q<|im_end|>", "response": "b"}]
        )
        settings = replace(settings, weight_column=None, max_tokens=50)
        plain = load(path, byte_level(), replace(settings, cache_folder=None))
        first, second = (load(path, byte_level(), settings) for _ in range(2))
        assert first == second == plain
        assert second.dropped
        assert second.warnings
        assert len(builds) == 2
        assert len(list(settings.cache_folder.iterdir())) == 1

    def test_samples_and_seed_share_one_entry(self, write, settings, builds):
        for count, seed in ((2, 1), (3, 1), (3, 2)):
            assert (
                len(load(write(ROWS), byte_level(), replace(settings, samples=count, seed=seed)).samples)
                == count
            )
        assert len(builds) == 1

    @pytest.mark.parametrize(
        "change",
        [
            "content",
            "template",
            "tokenizer",
            "train_on",
            "max_tokens",
            "weight",
            "vocab",
            "task",
            "special",
            "format",
        ],
    )
    def test_whatever_decides_the_samples_is_in_the_key(self, write, settings, builds, change):
        path = write(ROWS)
        load(path, byte_level(), settings)
        tokenizer, vocab, source = byte_level(), None, path
        match change:
            case "content":
                source = write([*ROWS[:-1], ROWS[-1] | {"response": "answer 7"}])
            case "template":
                tokenizer = byte_level(BLOCKS)
            case "tokenizer":
                tokenizer = byte_level(eos="<|eot_id|>")
            case "train_on":
                settings = replace(settings, train_on="last")
            case "max_tokens":
                settings = replace(settings, max_tokens=1000)
            case "weight":
                settings = replace(settings, weight_column="share")
            case "vocab":
                vocab = 5000
            case "task":
                source = {"t": path}
            case "special":
                settings = replace(settings, special_tokens="parse")
            case "format":
                settings = replace(settings, format="query")
        load(source, tokenizer, settings, vocab_size=vocab)
        assert len(builds) == 2

    def test_any_damage_is_found_said_and_mended(self, write, settings, builds):
        path = write(ROWS)
        good = load(path, byte_level(), settings)
        file = next(settings.cache_folder.iterdir())
        data = file.read_bytes()
        key = json.loads(safe_open(file, "np").metadata()["repsft"])["key"]
        step = max(1, len(data) // 60)
        damaged = [data[:n] for n in (0, 5, 8, 100, len(data) - 1)]
        damaged += [data[:n] + bytes([data[n] ^ 1]) + data[n + 1 :] for n in range(0, len(data), step)]
        damaged += [b"\x80\x04N.", b"\xff" * 8, data[:8] + b"[" * (len(data) - 8)]
        for number, content in enumerate(damaged):
            file.write_bytes(content)
            loaded = load(path, byte_level(), settings)
            assert loaded.samples == good.samples
            assert len(loaded.warnings) == 2, number  # the other names the columns that are not used
            assert "rebuilt" in loaded.warnings[0]
            assert cache.read(settings.cache_folder, key)[0] is not None
        assert len(builds) == 1 + len(damaged)

    def test_an_entry_under_another_name_is_refused(self, write, settings):
        load(write(ROWS), byte_level(), settings)
        first = next(settings.cache_folder.iterdir())
        kept, damage = cache.read(settings.cache_folder, "0" * 64)
        assert (kept, damage) == (None, None)
        first.rename(cache.path_of(settings.cache_folder, "0" * 64))
        kept, damage = cache.read(settings.cache_folder, "0" * 64)
        assert kept is None
        assert "another data set" in str(damage)

    def test_a_folder_that_cannot_be_written_is_a_warning_and_leaves_nothing(
        self, write, settings, tmp_path, monkeypatch
    ):
        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "replace", full)
        loaded = load(write(ROWS), byte_level(), settings)
        assert len(loaded.samples) == 7
        assert "No space left on device" in loaded.warnings[0]
        assert list(settings.cache_folder.iterdir()) == []


def test_load_splits_holds_out_before_it_draws_the_subset(write):
    path = write([{"input_ids": [n, n + 1, n + 2]} for n in range(40)])
    small, large = (
        load_splits(path, None, DataSettings(samples=n), validation=0.1, test=4)[0] for n in (8, 16)
    )
    assert (len(small.train), len(small.validation), len(small.test)) == (8, 4, 4)
    assert small.validation == large.validation
    assert {s.source for s in small.train} < {s.source for s in large.train}
    assert not {s.source for s in large.train} & {s.source for s in [*large.validation, *large.test]}


def test_load_splits_carves_without_leaks_and_says_where_copies_leave_a_split_short(write):
    splits, loaded = load_splits(write([{"input_ids": [n % 3, 1, 2]} for n in range(12)]), None, validation=5)
    assert (len(splits.train), len(splits.validation)) == (8, 4)
    assert not {tuple(s.ids) for s in splits.train} & {tuple(s.ids) for s in splits.validation}
    short = [
        "task 'default': 4 validation samples where 5 were asked for, because copies of a sample stay"
        " together"
    ]
    assert loaded.warnings == splits.warnings == short


def test_load_splits_with_sources_of_their_own_counts_shared_rows(write):
    train, validation = (
        write(IDS, "train.jsonl"),
        write([*IDS[:2], {"input_ids": [5, 5]}, {"input_ids": []}], "val.jsonl"),
    )
    splits, loaded = load_splits(train, None, validation=validation)
    assert len(splits.validation) == 3
    assert loaded.warnings == ["2 of 3 validation samples are also in train, token for token"]
    assert loaded.dropped == {"validation: no text, or only special tokens": 1}
