"""Files, folders, globs: what is read is what was meant, and everything else is refused or said."""

import bz2
import gzip
import json
import lzma
import os
import threading
from pathlib import Path

import pytest

from repsft_fast.data import filetypes, folder_walk, text_rows
from repsft_fast.data.sources import list_sources, open_rows
from repsft_fast.errors import DataError

pytestmark = pytest.mark.timeout(60)


def row(text):
    return json.dumps({"text": text}).encode() + b"\n"


@pytest.fixture
def lay(tmp_path, monkeypatch):
    """lay("a/b.jsonl", …): a folder `d` here, each file with one row that says its place."""
    monkeypatch.chdir(tmp_path)

    def make(*places, **contents):
        (tmp_path / "d").mkdir(exist_ok=True)
        for place in places:
            file = tmp_path / "d" / place
            file.parent.mkdir(parents=True, exist_ok=True)
            if place.lower().endswith(".parquet"):
                import datasets

                datasets.Dataset.from_list([{"text": place}]).to_parquet(str(file))
            elif place.lower().endswith(".csv"):
                file.write_text(f"text\n{place}\n")
            else:
                file.write_bytes(row(place))
        return tmp_path / "d"

    return make


def read(spec, split="train", **options):
    """The texts of every row, in order."""
    return [
        row["text"]
        for source in list_sources(spec, split, **options)
        for row, _ in open_rows(source, split)[0]
    ]


def notes(spec, split="train"):
    return " ".join(note for source in list_sources(spec, split) for note in source.notes)


SHARDS = [f"data/train-{n:05d}-of-00002.parquet" for n in range(2)]


@pytest.mark.parametrize(
    ("files", "split", "expected"),
    [
        (["train.jsonl", "test.jsonl"], "train", ["train.jsonl"]),
        (["train.jsonl", "test.jsonl"], "test", ["test.jsonl"]),
        (["Train.JSONL", "TEST.jsonl"], "train", ["Train.JSONL"]),
        (["training.jsonl", "dev.jsonl"], "train", ["training.jsonl"]),
        (["training.jsonl", "dev.jsonl"], "validation", ["dev.jsonl"]),
        (["training.jsonl", "val.jsonl"], "dev", ["val.jsonl"]),
        (["a.train.jsonl", "a.eval.jsonl"], "test", ["a.eval.jsonl"]),
        (["my_train_file.csv", "validation.json"], "train", ["my_train_file.csv"]),
        (["train_0.jsonl", "train_1.jsonl", "test_0.jsonl"], "train", ["train_0.jsonl", "train_1.jsonl"]),
        (["train1.jsonl", "test1.jsonl"], "train", ["train1.jsonl"]),
        (["trainset.jsonl", "testset.jsonl"], "train", ["trainset.jsonl"]),
        (["trainData.jsonl", "testData.jsonl"], "train", ["trainData.jsonl"]),
        (["train.jsonl", "held_out.jsonl", "holdout.jsonl"], "train", ["train.jsonl"]),
        (["train.jsonl", "rest.jsonl"], "train", ["train.jsonl"]),
        ([*SHARDS, "data/test-00000-of-00001.parquet"], "train", SHARDS),
        (["data/train.jsonl", "data/test.jsonl"], "train", ["data/train.jsonl"]),
        (["train/a.jsonl", "train/b.jsonl", "test/a.jsonl"], "train", ["train/a.jsonl", "train/b.jsonl"]),
        (["split=train/a.jsonl", "split=test/a.jsonl"], "train", ["split=train/a.jsonl"]),
        (["default/train/a.jsonl", "default/test/a.jsonl"], "train", ["default/train/a.jsonl"]),
        (
            ["data/train_sft-00000-of-00001.parquet", "data/test_sft-00000-of-00001.parquet"],
            "test_sft",
            ["data/test_sft-00000-of-00001.parquet"],
        ),
        (
            ["data/sft-00000-of-00001.jsonl", "data/dpo-00000-of-00001.jsonl"],
            "sft",
            ["data/sft-00000-of-00001.jsonl"],
        ),
        (
            ["data-00000-of-00002.jsonl", "data-00001-of-00002.jsonl"],
            "train",
            ["data-00000-of-00002.jsonl", "data-00001-of-00002.jsonl"],
        ),
        (["data/data-00000-of-00001.jsonl"], "train", ["data/data-00000-of-00001.jsonl"]),
        (["a.jsonl", "b.csv"], "train", ["a.jsonl", "b.csv"]),
        (
            ["latest.jsonl", "contest.jsonl", "devil.jsonl"],
            "train",
            ["contest.jsonl", "devil.jsonl", "latest.jsonl"],
        ),
        (["x.parquet/part-0.jsonl"], "train", ["x.parquet/part-0.jsonl"]),
        (
            ["a.jsonl", ".hidden.jsonl", ".cache/b.jsonl", "_delta_log/0.json", "a.jsonl.lock", "_SUCCESS"],
            "train",
            ["a.jsonl"],
        ),
        (
            ["a.jsonl", "dataset_info.json", "state.json.bak", ".gitattributes", "README.md"],
            "train",
            ["a.jsonl"],
        ),
    ],
)
def test_a_folder_gives_the_files_of_its_split(lay, files, split, expected):
    lay(*files)
    assert read("d", split) == expected
    assert read("d/", split) == expected
    assert [source.name for source in list_sources("d/", split)] == [f"d/{name}" for name in expected]


@pytest.mark.parametrize(
    ("files", "split", "words"),
    [
        (["test.jsonl", "validation.jsonl"], "train", r"d: has no split train, expected test \| validation"),
        (["train.jsonl"], "test", r"has no split test, expected train"),
        (["train.jsonl"], "extra", r"has no split extra, expected train"),
        (["a.jsonl"], "test", r"has no split test: no file of it names a split.*set data.split: train"),
        (["a.jsonl"], "train[:10%]", r"data.split: is not the name of a split of d"),
        (["train_test.jsonl"], "train", r"names two\), expected test or train"),
        (["train/test.jsonl"], "train", r"names two\)"),
        (["eval/train.jsonl"], "train", r"names two\)"),
        (
            ["data/train_sft-00000-of-00001.jsonl", "data/train_gen-00000-of-00001.jsonl"],
            "train",
            r"several splits that could be train, expected train_gen \| train_sft",
        ),
        (
            ["train_sft-00000-of-00001.jsonl", "train_gen-00000-of-00001.jsonl"],
            "train",
            r"several sets of shards: train_gen, train_sft",
        ),
        (
            ["main/train.jsonl", "socratic/train.jsonl"],
            "train",
            r"several places: d/main, d/socratic.*name one \(d/socratic\)",
        ),
        (["a/x.jsonl", "b/y.jsonl"], "train", r"several places: d/a, d/b"),
        (["train.jsonl", "old/train.jsonl"], "train", r"several places: d, d/old"),
        (["train.jsonl", "train/a.jsonl"], "train", r"several places: d, d/train"),
        (["a.jsonl", "data/b.jsonl"], "train", r"several places"),
        (["a/b/x.jsonl"], "train", r"its data deeper: d/a/b; name d/a/b"),
        (["a/b/train/x.jsonl"], "train", r"its data deeper: d/a/b/train; name d/a/b"),
        (
            ["train.jsonl", "train.parquet"],
            "train",
            r"train.jsonl and train.parquet: the same rows in two forms",
        ),
        (["train.jsonl", "train.json"], "train", r"two forms"),
        (["train.jsonl", "train-00000-of-00001.jsonl"], "train", r"train.jsonl and its shards"),
        (
            ["train-00000-of-00003.jsonl", "train-00001-of-00003.jsonl"],
            "train",
            r"shards of train once each, got 2 of 3",
        ),
        (
            ["train-00000-of-00003.jsonl", "train-00002-of-00003.jsonl"],
            "train",
            r"shards of train once each, got 2 of 3",
        ),
        (
            ["train-00000-of-00001.jsonl", "train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"],
            "train",
            r"once each, got 3 of 1 and 2",
        ),
        (["train-00000-of-00001-aa.jsonl", "train-00000-of-00001-bb.jsonl"], "train", r"once each"),
        (["README.md"], "train", r"folder without data.*\.jsonl"),
        (["notes.txt"], "train", r"d/notes.txt: is a kind of file we do not read.*one JSON object per line"),
        (["train.jsonl.zst"], "train", r"d/train.jsonl.zst.*not read.*unpack it"),
        (["train-a.jsonl", "train-b.jsonl.zst"], "train", r"train-b.jsonl.zst.*not read"),
    ],
)
def test_a_folder_that_could_mean_several_things_is_refused(lay, files, split, words):
    lay(*files)
    with pytest.raises(DataError, match=words) as caught:
        list_sources("d", split)
    assert ";" in str(caught.value)  # a way out


def test_what_is_not_read_is_said(lay):
    lay("train.jsonl", "test.jsonl", "extra.jsonl", "notes.txt", "README.md")
    assert notes("d") == "split train of d: not read: extra.jsonl (no split), test.jsonl (test), notes.txt"
    lay(*(f"test{n}.jsonl" for n in range(20)))
    assert " and 18 more" in notes("d")


def test_validation_and_test_read_their_own_split_or_the_only_one(lay):
    lay("train.jsonl", "test.jsonl")
    assert read("d", "test", beside=()) == ["test.jsonl"]
    with pytest.raises(DataError, match=r"has no split validation, expected test \| train"):
        list_sources("d", "validation", beside=())
    (lay() / "test.jsonl").unlink()
    assert read("d", "validation", beside=()) == ["train.jsonl"]
    with pytest.raises(DataError, match="no split validation"):
        list_sources("d", "validation")


def test_the_same_rows_for_training_and_validation_are_refused(lay, tmp_path):
    import datasets

    folder = lay("train.jsonl", "validation.jsonl", "other.jsonl")
    train = list_sources("d")
    assert read("d", "validation", beside=train) == ["validation.jsonl"]
    os.link(folder / "train.jsonl", folder / "hard.jsonl")
    for same in ("d/train.jsonl", "d/hard.jsonl", str(folder / "train.jsonl")):
        with pytest.raises(
            DataError, match=r"is held out and read for training too \(d/train.jsonl\); .*validation_fraction"
        ):
            list_sources(same, "validation", beside=train)
    rows = datasets.Dataset.from_list([{"text": "t"}])
    rows.save_to_disk(tmp_path / "one")
    with pytest.raises(DataError, match="one: is held out and read for training too"):
        list_sources("one", "validation", beside=list_sources("one"))
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "many")
    with pytest.raises(DataError, match="has no such split, expected train, got validation"):
        read("many", "validation", beside=list_sources("many"))
    assert read("many", "validation", beside=train) == ["t"]
    assert not list_sources("o/n", "validation", beside=list_sources("o/n"))[0].held_out
    assert list_sources("o/n", "validation", beside=train)[0].held_out


def test_a_link_between_splits_is_refused(lay):
    folder = lay("test.jsonl")
    (folder / "train.jsonl").symlink_to("test.jsonl")
    with pytest.raises(DataError, match=r"train.jsonl is the same file as test.jsonl \(test\)"):
        list_sources("d")


def test_saved_folders_beside_each_other(lay, tmp_path):
    import datasets

    lay()
    for split in ("train", "test"):
        datasets.Dataset.from_list([{"text": split}]).save_to_disk(tmp_path / "d" / split)
    assert read("d") == ["train"]
    assert read("d", "test") == ["test"]
    whole = datasets.DatasetDict({"train_sft": datasets.Dataset.from_list([{"text": "sft"}])})
    whole.save_to_disk(tmp_path / "e")
    assert read("e", "train") == ["sft"]
    with pytest.raises(DataError, match="has no such split, expected train_sft"):
        read("e", "test")
    assert read("e", "test", beside=()) == ["sft"]


CARD = "---\nlicense: mit\nconfigs:\n- config_name: {name}\n  data_files:\n{files}---\n# text\n---\n"


@pytest.mark.parametrize(
    ("files", "split", "expected"),
    [
        (
            '  - split: train\n    path: "a.jsonl"\n  - split: test\n    path: "train.jsonl"\n',
            "train",
            ["a.jsonl"],
        ),
        ('  - split: train\n    path: ["a.jsonl", "x/**/*.jsonl"]\n', "train", ["a.jsonl", "x/b.jsonl"]),
        ("  - split: dpo\n    path: x/b.*\n", "dpo", ["x/b.jsonl"]),
        ("  - split: train\n    path: a.*\n  - split: test\n    path: not-fetched-*\n", "train", ["a.jsonl"]),
    ],
)
def test_the_card_says_which_file_is_which_split(lay, files, split, expected):
    folder = lay("a.jsonl", "train.jsonl", "x/b.jsonl")
    (folder / "README.md").write_text(CARD.format(name="default", files=files))
    assert read("d", split) == expected


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (
            CARD.format(name="x", files="  - split: train\n    path: gone-*\n"),
            r"README.md: names files of split train that are not here",
        ),
        (CARD.format(name="x", files="  - split: train\n    path: ../a.jsonl\n"), "leads out of the folder"),
        (
            CARD.format(
                name="x", files="  - split: test\n    path: a.jsonl\n  - split: train\n    path: '*.jsonl'\n"
            ),
            "says that a.jsonl is train and test",
        ),
        (
            CARD.format(name="x", files="  - split: test\n    path: a.jsonl\n"),
            "has no split train, expected test",
        ),
        (CARD.format(name="x", files="  - split: 7\n    path: a.jsonl\n"), "are no paths"),
        (
            (
                "---\nconfigs:\n- {config_name: a, data_files: a.jsonl}\n- {config_name: b, data_files:"
                " b.jsonl}\n---\n"
            ),
            r"several subsets.*a \| b",
        ),
        ("---\nconfigs: 7\n---\n", "no list of subsets"),
    ],
)
def test_a_card_that_contradicts_the_folder_is_refused(lay, head, words):
    (lay("a.jsonl", "b.jsonl") / "README.md").write_text(head)
    with pytest.raises(DataError, match=words):
        list_sources("d")


@pytest.mark.parametrize(
    "head",
    [
        "# no head",
        "---\nlicense: mit\n---\n",
        "---\nconfigs: [\n---\n",
        "---\nconfigs:\n- config_name: default\n---\n",
    ],
)
def test_a_card_that_says_nothing_of_files(lay, head):
    (lay("a.jsonl") / "README.md").write_text(head)
    assert read("d") == ["a.jsonl"]
    assert ("no YAML" in notes("d")) == ("[" in head)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("d/*.jsonl", ["a.jsonl", "test.jsonl"]),
        ("d/tes?.jsonl", ["test.jsonl"]),
        ("d/[!t]*.jsonl", ["a.jsonl"]),
        ("d/**/*.jsonl", ["a.jsonl", "test.jsonl", "x/part-1.jsonl", "x/y/part-2.jsonl"]),
        ("d/**/part-*.jsonl", ["x/part-1.jsonl", "x/y/part-2.jsonl"]),
        ("./d/x/*", ["x/part-1.jsonl"]),
        ("d/x*", ["x/part-1.jsonl"]),
        ("*/a.jsonl", ["a.jsonl"]),
    ],
)
def test_a_glob_reads_what_matches_in_the_order_of_names(lay, tmp_path, pattern, expected):
    lay("a.jsonl", "test.jsonl", "x/part-1.jsonl", "x/y/part-2.jsonl", ".hidden.jsonl")
    if pattern == "d/x*":
        (tmp_path / "d/x/y/part-2.jsonl").unlink()
    assert read(pattern) == expected
    assert read(str(tmp_path / pattern)) == expected
    assert all((tmp_path / source.name).is_file() for source in list_sources(pattern))


def test_a_glob_that_matches_nothing_and_a_name_with_wildcards(lay):
    lay("a[1].jsonl", "b.txt", "c.jsonl")
    assert read("d/a[1].jsonl") == ["a[1].jsonl"]
    assert read("d/a[[]1].jsonl") == ["a[1].jsonl"]
    assert "not read: b.txt" in notes("d/*")
    for pattern, words in (
        ("d/z*.jsonl", "matches no file"),
        ("d/c[2].jsonl", r"\[ and \] are part of the pattern"),
        ("e/*.jsonl", "matches no file; there is no folder e"),
        ("d/*.txt", "kind of file we do not read"),
    ):
        with pytest.raises(DataError, match=words):
            list_sources(pattern)


PACKERS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}


@pytest.mark.parametrize("packed", PACKERS)
@pytest.mark.parametrize(
    ("name", "content", "places"),
    [
        ("r.jsonl", row("a") + b"\n" + row("b"), [1, 3]),
        ("r.json", b'[{"text": "a"}, {"text": "b"}]', [1, 2]),
        ("r.json", row("a") + row("b"), [1, 2]),
        ("r.csv", b"text\na\nb\n", [2, 3]),
        ("R.TSV", b"text\tmore\r\na\t\r\nb\t1\r\n", [2, 3]),
        ("r.NDJSON", row("a") + row("b"), [1, 2]),
    ],
)
def test_packed_files_are_read_as_the_files_in_them(lay, tmp_path, packed, name, content, places):
    lay()
    plain, file = (
        tmp_path / "d" / name,
        tmp_path / "d" / f"{name}.{packed.upper() if name.isupper() else packed}",
    )
    plain.write_bytes(content)
    file.write_bytes(PACKERS[packed](content))
    for source in list_sources([str(plain), str(file)]):
        rows, _ = open_rows(source, "train")
        assert [(row["text"], where) for row, where in rows] == [
            (t, f"{source.name}:{n}") for t, n in zip("ab", places)
        ]


@pytest.mark.parametrize("packed", PACKERS)
@pytest.mark.parametrize("name", ["r.jsonl", "r.json", "r.csv"])
def test_torn_packed_files_name_the_file(lay, tmp_path, packed, name):
    lay()
    file = tmp_path / "d" / f"{name}.{packed}"
    whole = PACKERS[packed](b"text\n" + os.urandom(5000).hex().encode())
    for content in (whole[: len(whole) // 2], b"text\n", whole[:40] + b"\xff" * 40 + whole[80:]):
        file.write_bytes(content)
        with pytest.raises(DataError, match=rf"{name}.{packed}.*(is not whole {packed}|is not JSON)"):
            read(str(file))


def test_bombs_are_stopped_at_the_limits(lay, tmp_path, monkeypatch):
    lay()
    monkeypatch.setattr(text_rows, "MAX_LINE_BYTES", 2**16)
    monkeypatch.setattr(text_rows, "MAX_JSON_BYTES", 2**16)
    for name, content, words in (
        ("a.jsonl.gz", b" " * 2**20, "a.jsonl.gz:1: is too long a line"),
        ("b.json.gz", b" " * 2**20, "b.json.gz: is too large"),
        ("c.jsonl.gz", b"\n" * 2**20, "blank lines"),
        ("d.csv.gz", b'text\n"' + b"a\n" * 2**19, "d.csv.gz:2: is not csv .field larger than field limit"),
    ):
        (tmp_path / "d" / name).write_bytes(gzip.compress(content))
        with pytest.raises(DataError, match=words):
            read(f"d/{name}")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"\xef\xbb\xbftext,x\na,1\n", [{"text": "a", "x": "1"}]),
        (b'text,x\r\n"a\nb, ""c""",\r\n', [{"text": 'a\nb, "c"', "x": None}]),
        (b",text\n0,a\n", [{"Unnamed: 0": "0", "text": "a"}]),
        (b"text\na\n\nb", [{"text": "a"}, {"text": "b"}]),
        (b"text\n" + b"a" * 200_000, [{"text": "a" * 200_000}]),
        (b'text\n"{""a"": 1}"\n', [{"text": '{"a": 1}'}]),
        (b"text\n", []),
        (b"", []),
    ],
)
def test_csv(lay, tmp_path, content, expected):
    lay()
    (tmp_path / "d" / "r.csv").write_bytes(content)
    rows, _ = open_rows(*list_sources("d/r.csv"), "train")
    assert [row for row, _ in rows] == expected


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a,b\n1,2\n1,2,3\n", r"r.csv:3: has not a cell for each column, expected 2, got 3"),
        (b'a,b\n"x\ny",2\n1\n', r"r.csv:4: has not a cell for each column, expected 2, got 1"),
        (b"a,a\n1,2\n", r"r.csv:1: names a column twice: a"),
        (b"a;b\n1;2\n", r"r.csv:1: holds one column, expected ',', got a;b"),
        (b'a,b\n1,"2\n', r"r.csv:2: is not csv"),
        (b'a,b\n1,"2"3\n', r"r.csv:2: is not csv"),
        (b"a,b\n1,\0\n", r"r.csv:2: holds a NUL byte"),
        (b"a,b\n1,\xff\n", r"r.csv:2: is not UTF-8"),
        ("a,b\n1,2\n".encode("utf-16"), r"UTF-16"),
    ],
)
def test_a_damaged_csv_names_the_line(lay, tmp_path, content, words):
    lay()
    (tmp_path / "d" / "r.csv").write_bytes(content)
    with pytest.raises(DataError, match=words):
        list(open_rows(*list_sources("d/r.csv"), "train")[0])


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("r.jsonl", gzip.compress(row("a"), mtime=0), "is gzip, not what its name says"),
        ("r.json", b"PK\x03\x04....", "is a zip archive"),
        ("r.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer.*git lfs pull"),
        ("r.parquet", b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer.*git lfs pull"),
        ("r.csv", b"PAR1....", "is parquet"),
    ],
)
def test_a_file_that_is_not_what_its_name_says(lay, tmp_path, name, content, words):
    lay()
    (tmp_path / "d" / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        read(f"d/{name}")


@pytest.mark.parametrize(
    "name", ["a.txt", "a.jsonl.zst", "a.zip", "a.pkl", "a.xlsx", "a.parquet.gz", "a.xyz", "a"]
)
def test_kinds_that_are_not_read_name_the_way_out(lay, name):
    lay(name)
    with pytest.raises(DataError, match=rf"d/{name}: is a kind of file we do not read.*; \w") as caught:
        list_sources(f"d/{name}")
    assert ("unpack" in str(caught.value)) == name.endswith(("zst", "zip", "gz"))


def test_an_arrow_file(lay, tmp_path):
    import datasets

    lay()
    datasets.Dataset.from_list([{"text": "a"}]).save_to_disk(tmp_path / "saved")
    next((tmp_path / "saved").glob("*.arrow")).rename(tmp_path / "d" / "part.arrow")
    assert read("d") == ["a"]
    (tmp_path / "d" / "part.arrow").write_bytes(b"junk")
    with pytest.raises(DataError, match=r"part.arrow: cannot be read as arrow"):
        read("d")


def test_special_files_are_an_error_and_never_a_wait(lay, tmp_path):
    folder = lay()
    os.mkfifo(folder / "pipe.jsonl")
    (folder / "zero.jsonl").symlink_to("/dev/zero")
    (folder / "broken.jsonl").symlink_to("nowhere")
    (folder / "loop.jsonl").symlink_to("loop.jsonl")
    for name, words in (
        ("pipe", "is a named pipe"),
        ("zero", "is a device"),
        ("broken", "is a broken link"),
        ("loop", "cannot be read|is a broken link"),
    ):
        for spec in (f"d/{name}.jsonl", f"d/{name}*"):
            with pytest.raises(DataError, match=rf"d/{name}.jsonl: .*({words})"):
                list_sources(spec)
    for name in ("pipe", "zero", "broken", "loop"):
        for other in folder.iterdir():
            other.rename(tmp_path / other.name)
        (tmp_path / f"{name}.jsonl").rename(folder / f"{name}.jsonl")
        with pytest.raises(DataError, match=rf"d/{name}.jsonl: "):
            list_sources("d")


def test_a_loop_of_folders_and_an_endless_folder(lay, monkeypatch):
    folder = lay("a.jsonl")
    (folder / "again").symlink_to(folder)
    with pytest.raises(DataError, match="d/again: is a link to a folder above it"):
        list_sources("d")
    (folder / "again").unlink()
    monkeypatch.setattr(folder_walk, "MAX_ENTRIES", 3)
    lay("b.jsonl", "c.jsonl", "e.jsonl")
    with pytest.raises(DataError, match="more than 3 files and folders"):
        list_sources("d")


def test_what_may_not_be_read_is_an_error(lay, monkeypatch):
    lay("a.jsonl", "x/b.jsonl")

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(folder_walk.os, "scandir", refuse)
        with pytest.raises(DataError, match=r"d: cannot be read .Permission denied"):
            list_sources("d")
    source = list_sources("d/a.jsonl")[0]
    rows, _ = open_rows(source, "train")
    monkeypatch.setattr(text_rows, "open_bytes", refuse)
    with pytest.raises(DataError, match=r"a.jsonl:?.*: cannot be read .Permission denied"):
        list(rows)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("d/typo", "does not exist.*d/ is a folder here"),
        ("d/a.json", "did you mean d/a.jsonl"),
        ("./d2", "did you mean d"),
        ("~/no-such-folder-of-mine", "does not exist"),
        ("~nobody-of-that-name/x", "does not exist"),
        ("one/two/three", "does not exist"),
        ("new/", "does not exist"),
        ("C:\\data\\rows.jsonl", "does not exist"),
        ("data\\train", "does not exist"),
        ("rows.jsonll", "does not exist"),
        ("owner/rows.csv", "does not exist"),
        ("owner/my data", "does not exist"),
        ("owner--name", "does not exist"),
        ("https://host/rows.jsonl", "is a URL"),
        ("hf://datasets/owner/name", "is a URL"),
        ({"a": {"b": "d"}}, "is not a source"),
        (7, "is not a source"),
    ],
)
def test_what_looks_like_a_path_is_never_asked_of_the_hub(lay, monkeypatch, name, words):
    lay("a.jsonl")
    monkeypatch.setattr(threading.Thread, "start", lambda self: pytest.fail("asked"))
    with pytest.raises(DataError, match=words):
        list_sources(name)


def test_the_home_folder_is_expanded(lay, monkeypatch):
    monkeypatch.setenv("HOME", str(lay("a.jsonl")))
    assert read("~/a.jsonl") == ["a.jsonl"]
    assert read("~/*.jsonl") == ["a.jsonl"]


def test_the_same_rows_twice(lay):
    folder = lay("a.jsonl", "b.jsonl")
    (folder / "link.jsonl").symlink_to("a.jsonl")
    for twice in (
        ["d/a.jsonl", "d/a.jsonl"],
        ["d/a.jsonl", str(folder / "a.jsonl")],
        ["d/b.jsonl", "d/b*"],
        "d",
        ["o/n", "o/n"],
    ):
        with pytest.raises(DataError, match="is named twice"):
            list_sources(twice)
    (folder / "link.jsonl").unlink()
    with pytest.raises(DataError, match=r"d/b.jsonl: is named twice"):
        list_sources(["d", "d/b.jsonl"])
    assert notes({"x": "d/a.jsonl", "y": "d/a.jsonl"}) == "d/a.jsonl is in task x and in y"


def test_merged_and_the_hash_of_what_is_read(lay, tmp_path):
    lay("a.jsonl", "b.csv", "c.parquet", "e.json")
    assert {source.name[2]: source.merged for source in list_sources("d")} == {
        "a": False,
        "b": True,
        "c": True,
        "e": False,
    }
    file = tmp_path / "d" / "f.jsonl.gz"
    digests = set()
    for text in ("one", "two"):
        file.write_bytes(gzip.compress(row(text)))
        digests.add(open_rows(*list_sources("d/f.jsonl.gz"), "train")[1])
    assert len(digests) == 2


def test_every_suffix_of_the_list_is_read():
    assert all(filetypes.kind_of(Path(f"rows{suffix}")) for suffix in filetypes.SUFFIXES)
