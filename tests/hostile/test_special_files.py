"""No file that a path leads to is waited for or read without end: pipes, devices, sockets, folders, links to
them, /proc."""

import contextlib
import json
import os
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

from repsft_fast.config import Config
from repsft_fast.config.yaml_file import read_settings_file
from repsft_fast.data import cache
from repsft_fast.data.arrow import open_saved
from repsft_fast.data.card import read_card
from repsft_fast.data.filetypes import open_bytes
from repsft_fast.data.sources import list_sources, open_rows
from repsft_fast.data.template import find_template
from repsft_fast.errors import ConfigError, DataError, ModelError, RepsftError, open_plain
from repsft_fast.models.adapter_folder import AdapterFolder
from repsft_fast.models.folder import check_model_files, check_tokenizer_files
from repsft_fast.models.foreign_files import other_file

SECONDS = 20  # of a busy machine; what is refused takes milliseconds
WORDS = r"it is a|Is a directory|Too many levels|No such file"
KERNELS = "/proc/self/status"  # regular, of no length by stat, and not empty


def pipe(path):
    os.mkfifo(path)


def listener(path):
    with socket.socket(socket.AF_UNIX) as made:
        os.chdir(path.parent)  # a socket's name is short
        made.bind(path.name)


MAKE = {
    "a pipe": pipe,
    "a link to a pipe": lambda path: (os.mkfifo(path.with_name("elsewhere")), path.symlink_to("elsewhere")),
    "a socket": listener,
    "an endless device": lambda path: path.symlink_to("/dev/zero"),
    "a silent device": lambda path: path.symlink_to("/dev/ptmx"),
    "a folder": lambda path: path.mkdir(),
    "a loop of links": lambda path: path.symlink_to(path.name),
    "a file of the kernel": lambda path: path.symlink_to(KERNELS),
}
SPECIAL = pytest.mark.parametrize("kind", [kind for kind in MAKE if kind != "a folder"])
WAITING = pytest.mark.parametrize(
    "kind", ["a pipe", "a link to a pipe", "a socket", "an endless device", "a silent device"]
)


@pytest.fixture(autouse=True)
def in_time(monkeypatch, tmp_path):
    """The alarm interrupts an open that waits."""
    monkeypatch.chdir(tmp_path)

    def late(*_):
        raise AssertionError(f"waited for {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("kind", MAKE)
def test_opening_is_an_error_in_words(tmp_path, kind):
    MAKE[kind](tmp_path / "file")
    with pytest.raises(OSError, match=WORDS) as caught:
        open_plain(tmp_path / "file")
    assert caught.value.strerror


def test_files_are_opened_and_nothing_stays_open(tmp_path):
    (tmp_path / "file").write_bytes(b"some")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "link").symlink_to("file")
    pipe(tmp_path / "pipe")
    before = len(os.listdir("/proc/self/fd"))
    for name, content in (("file", b"some"), ("empty", b""), ("link", b"some")):
        with open_plain(tmp_path / name) as file:
            assert file.read() == content
    for name in ("pipe", "none", "/proc/self/status", "/dev/zero"):
        with pytest.raises(OSError, match=WORDS):
            open_plain(tmp_path / name)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_packed_file_is_closed_too(tmp_path):
    import gzip

    (tmp_path / "r.jsonl.gz").write_bytes(gzip.compress(b"{}\n"))
    before = len(os.listdir("/proc/self/fd"))
    stream = open_bytes(tmp_path / "r.jsonl.gz")
    assert stream.readline() == b"{}\n"
    stream.close()
    assert len(os.listdir("/proc/self/fd")) == before


class TestSettings:
    @SPECIAL
    def test_a_settings_file(self, tmp_path, kind):
        MAKE[kind](tmp_path / "run.yaml")
        with pytest.raises(ConfigError, match=r"run\.yaml: (cannot be read \(it is a|no such settings file)"):
            Config.of(tmp_path / "run.yaml")

    def test_what_a_command_writes_is_read(self, tmp_path):
        """repsft train --config <(envsubst < settings.yaml)"""
        pipe(tmp_path / "pipe")

        def write():
            with open(tmp_path / "pipe", "w") as file:
                for line in ("run:\n", "  folder: r\n"):
                    file.write(line)
                    file.flush()
                    time.sleep(0.2)

        writer = threading.Thread(target=write)
        writer.start()
        assert read_settings_file(tmp_path / "pipe")[0] == {"run": {"folder": "r"}}
        writer.join()

    def test_a_writer_that_says_nothing_or_too_much(self, tmp_path, monkeypatch):
        monkeypatch.setattr("repsft_fast.config.yaml_file.PIPE_SECONDS", 0.3)
        reading, writing = os.pipe()
        with pytest.raises(ConfigError, match="a pipe that does not end: save it to a file first"):
            read_settings_file(Path(f"/proc/self/fd/{reading}"))
        monkeypatch.setattr("repsft_fast.config.yaml_file.PIPE_SECONDS", 10.0)

        def write_on():
            with contextlib.suppress(BrokenPipeError):
                while True:
                    os.write(writing, b"#" * 65536)

        endless = threading.Thread(target=write_on)
        endless.start()
        with pytest.raises(ConfigError, match="too large for a settings file"):
            read_settings_file(Path(f"/proc/self/fd/{reading}"))
        os.close(reading)
        endless.join()
        os.close(writing)


class TestData:
    @WAITING
    @pytest.mark.parametrize(
        "end", [".jsonl", ".json", ".csv", ".jsonl.gz", ".jsonl.xz", ".parquet", ".arrow"]
    )
    def test_a_file_of_rows(self, tmp_path, kind, end):
        MAKE[kind](tmp_path / f"rows{end}")
        for named in (f"rows{end}", "rows*", [f"rows{end}"], {"task": f"rows{end}"}, "."):
            with pytest.raises(
                DataError, match=rf"rows{end}: is a (named pipe|socket|device), expected a file; save it"
            ):
                list_sources(named)

    def test_a_file_of_the_kernel(self, tmp_path):
        (tmp_path / "rows.jsonl").symlink_to(KERNELS)
        with pytest.raises(DataError, match=r"it is a file of the kernel"):
            list(open_rows(*list_sources("rows.jsonl"), "train")[0])

    def test_a_file_that_became_a_pipe_after_it_was_looked_at(self, tmp_path):
        (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
        listed = list_sources("rows.jsonl")
        (tmp_path / "rows.jsonl").unlink()
        pipe(tmp_path / "rows.jsonl")
        with pytest.raises(DataError, match=r"cannot be read \(it is a named pipe"):
            open_rows(*listed, "train")

    @SPECIAL
    def test_the_card_of_a_folder(self, tmp_path, kind):
        (tmp_path / "data").mkdir()
        MAKE[kind](tmp_path / "data" / "README.md")
        with pytest.raises(DataError, match=r"README\.md: cannot be read"):
            read_card(tmp_path / "data", "data", [])

    @WAITING
    @pytest.mark.parametrize(
        "file", ["state.json", "dataset_dict.json", "dataset_info.json", "data-00000-of-00001.arrow"]
    )
    def test_a_saved_data_set(self, tmp_path, kind, file):
        folder = tmp_path / "saved"
        folder.mkdir()
        (folder / "state.json").write_text(
            json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]})
        )
        (folder / "dataset_info.json").write_text("{}")
        (folder / "data-00000-of-00001.arrow").write_bytes(b"")
        (folder / file).unlink(missing_ok=True)
        MAKE[kind](folder / file)
        with pytest.raises(DataError, match=r"is a (named pipe|socket|device)"):
            open_saved(folder, "saved", "train", False)
        with pytest.raises(DataError):
            [list(open_rows(source, "train")[0]) for source in list_sources("saved")]

    @SPECIAL
    def test_an_entry_of_the_cache_is_made_anew(self, tmp_path, kind):
        MAKE[kind](cache.path_of(tmp_path, "key"))
        loaded, damage = cache.read(tmp_path, "key")
        assert loaded is None
        assert "cannot be read" in damage

    @SPECIAL
    def test_a_chat_template(self, tmp_path, kind):
        MAKE[kind](tmp_path / "chat.jinja")
        with pytest.raises(
            DataError, match=r"tokenizer\.chat_template: is neither a template nor a readable file"
        ):
            find_template(None, str(tmp_path / "chat.jinja"))

    def test_an_enormous_chat_template(self, tmp_path):
        with open(tmp_path / "chat.jinja", "wb") as file:
            file.truncate(1 << 36)  # a hole, no bytes
        with pytest.raises(DataError, match=r"larger than 16777216 bytes"):
            find_template(None, str(tmp_path / "chat.jinja"))


class TestModels:
    @WAITING
    @pytest.mark.parametrize(
        "file",
        [
            "config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json", "adapter_config.json",
            "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
            "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "tekken.json", "qwen.tiktoken", "chat_template.jinja",
            "additional_chat_templates/tool_use.jinja", "processor_config.json", "preprocessor_config.json",
            "video_preprocessor_config.json", "tokenizer_config.4.0.0.json", "modeling_x.py",
        ],
    )  # fmt: skip
    def test_any_file_of_a_model_that_a_library_may_open(self, tmp_path, kind, file):
        folder = tmp_path / "model"
        (folder / file).parent.mkdir(parents=True)
        MAKE[kind](folder / file)
        for check in (check_model_files, check_tokenizer_files):
            with pytest.raises(
                ModelError,
                match=rf"where {Path(file).name}: is a (named pipe|socket|device), expected a file",
            ):
                check(folder, "where")

    def test_what_no_library_opens_may_be_anything(self, tmp_path):
        """A folder that people work in: a terminal multiplexer's socket, a link to nothing."""
        pipe(tmp_path / "mux")
        listener(tmp_path / "agent.sock")
        (tmp_path / "README.md").symlink_to("nowhere")
        (tmp_path / "notes.txt").symlink_to("nowhere")
        (tmp_path / "parts.json").mkdir()
        check_model_files(tmp_path, "where")
        check_tokenizer_files(tmp_path, "where")

    @WAITING
    @pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
    def test_adapters(self, tmp_path, kind, file):
        (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
        (tmp_path / file).unlink(missing_ok=True)
        MAKE[kind](tmp_path / file)
        with pytest.raises(ModelError, match=rf"{file}: is a (named pipe|socket|device)"):
            AdapterFolder.read(str(tmp_path))

    @pytest.mark.parametrize("kind", MAKE)
    def test_what_stands_in_place_of_a_file_is_not_waited_for(self, tmp_path, kind):
        MAKE[kind](tmp_path / "file")
        assert other_file(tmp_path / "file") is None


def test_the_errors_end_a_command_with_its_code():
    for error in (ConfigError, DataError, ModelError):
        assert issubclass(error, RepsftError)
        assert error.exit_code == 2
