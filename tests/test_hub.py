"""A hub that is not there costs seconds, not minutes; what is in the cache is read without it; a path is
never asked of it."""

import http.server
import json
import socket
import threading
import time

import pytest
from huggingface_hub import constants

from repsft_fast import hub
from repsft_fast.data.sources import list_sources, open_rows
from repsft_fast.errors import DataError, ModelError
from repsft_fast.models import config_of, load_model, load_tokenizer

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(autouse=True)
def nothing_asked_yet(monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "_asked", {})
    monkeypatch.setattr(hub, "_unreachable", [])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def silent(monkeypatch):
    """A hub that takes calls and never says a word; the list of who called."""
    server = socket.create_server(("127.0.0.1", 0))
    calls = []

    def accept():
        while True:
            try:
                calls.append(server.accept()[0])
            except OSError:
                return

    threading.Thread(target=accept, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
    monkeypatch.setattr(hub, "SECONDS", 1.0)
    yield calls
    server.close()
    for call in calls:
        call.close()


@pytest.fixture
def answering(monkeypatch):
    """answering(status, body) → the list of paths asked for."""
    servers = []

    def start(status, body=b"{}"):
        asked = []

        class Answer(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                asked.append(self.path)
                self.send_response(status)
                if status == 404:
                    self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_HEAD = do_GET

            def log_message(self, *words):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        return asked

    yield start
    for server in servers:
        server.shutdown()


DOORS = {
    "tokenizer": lambda name: load_tokenizer(name),
    "model": lambda name: load_model(name),
    "config": lambda name: config_of(name),
    "data": lambda name: open_rows(list_sources(name)[0], "train"),
}


@pytest.mark.parametrize("door", DOORS)
def test_a_silent_hub_is_waited_for_once_and_the_way_out_is_named(silent, door):
    began = time.monotonic()
    for _ in range(2):
        with pytest.raises((ModelError, DataError), match=r"no answer from http.*HF_HUB_OFFLINE=1") as caught:
            DOORS[door]("owner/name")
    assert time.monotonic() - began < 8  # one wait of 1 s, and what the libraries take to look into the cache
    assert len(silent) == 1
    assert "/owner/name)" in str(caught.value)  # the local path that was looked at


def test_the_wait_is_ten_seconds_in_all():
    assert hub.SECONDS == 10


def test_all_doors_share_one_wait(silent):
    began = time.monotonic()
    for number, door in enumerate(DOORS.values()):
        with pytest.raises((ModelError, DataError)):
            door(f"owner/name{number}")
    assert time.monotonic() - began < 10
    assert len(silent) == 1


def test_a_name_server_that_never_answers_is_bounded_too(monkeypatch):
    monkeypatch.setattr(hub, "SECONDS", 0.2)
    monkeypatch.setattr(constants, "ENDPOINT", "http://hub.invalid")
    ended = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: ended.wait(20))
    began = time.monotonic()
    assert hub.why_not_reached("owner/name", "model") == "no answer from http://hub.invalid within 0.2 s"
    assert time.monotonic() - began < 5
    ended.set()


@pytest.mark.parametrize("door", DOORS)
def test_a_name_that_the_hub_does_not_know(answering, door):
    asked = answering(404)
    kind = "dataset" if door == "data" else "model"
    with pytest.raises((ModelError, DataError), match=rf"the hub knows no {kind} of that name.*HF_TOKEN"):
        DOORS[door]("owner/name")
    assert asked == [f"/api/{kind}s/owner/name"]


@pytest.mark.parametrize("status", [500, 503])
def test_a_hub_in_trouble_is_not_asked_again(answering, status):
    asked = answering(status)
    with pytest.raises(ModelError, match=rf"no answer from .* but HTTP {status}"):
        load_tokenizer("owner/name")
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("variable", "doors"),
    [
        ("HF_HUB_OFFLINE", DOORS),
        ("HF_DATASETS_OFFLINE", ["data"]),
        ("TRANSFORMERS_OFFLINE", ["tokenizer", "model", "config"]),
    ],
)
def test_offline_asks_nothing(silent, monkeypatch, variable, doors):
    monkeypatch.setenv(variable, "1")
    for door in doors:
        with pytest.raises((ModelError, DataError), match=f"{variable} is set"):
            DOORS[door]("owner/name")
    assert not silent


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    "name", ["runs/typo", "./typo", "~/no-such-folder", "a/b/c", "typo/", "C:\\models\\x", "owner--name"]
)
def test_what_looks_like_a_path_is_said_at_once(silent, tmp_path, door, name):
    (tmp_path / "runs" / "type").mkdir(parents=True)
    with pytest.raises((ModelError, DataError), match=r"no such folder|does not exist") as caught:
        DOORS[door](name)
    assert not silent
    assert ("did you mean runs/type" in str(caught.value)) == (name == "runs/typo")


def test_a_name_of_the_hub_whose_owner_is_a_folder_here_is_read_from_the_cache(tmp_path):
    (tmp_path / "owner").mkdir()
    assert hub.why_local("owner/name") == "owner/ is a folder here"
    (tmp_path / "cache" / "models--owner--name").mkdir(parents=True)
    assert hub.why_local("owner/name") is None


@pytest.mark.parametrize(
    "name", ["gpt2", "Qwen/Qwen2.5-0.5B", "HuggingFaceTB/SmolLM2-135M", "owner/a_b.c-d1"]
)
def test_names_of_the_hub_are_asked(name):
    assert hub.why_local(name) is None


def test_a_cached_model_is_read_while_the_hub_is_silent(silent, tmp_path, monkeypatch):
    folder = tmp_path / "cache" / "models--owner--name"
    snapshot = folder / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("a" * 40)
    (snapshot / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 64}))
    import transformers.utils.hub

    for module in (transformers.utils.hub,):
        for flag in ("HF_HUB_CACHE", "TRANSFORMERS_CACHE"):
            if hasattr(module, flag):
                monkeypatch.setattr(module, flag, str(tmp_path / "cache"))
    began = time.monotonic()
    assert config_of("owner/name").hidden_size == 64
    assert time.monotonic() - began < 5
    assert len(silent) == 1


def test_a_data_set_out_of_reach_is_read_from_the_cache(silent, monkeypatch):
    import datasets

    def load_dataset(name, subset, split=None):
        assert constants.HF_HUB_OFFLINE
        assert datasets.config.HF_HUB_OFFLINE
        whole = {part: datasets.Dataset.from_list([{"text": part}]) for part in ("train_sft", "test_sft")}
        if split is not None and split not in whole:
            raise ValueError(f'Unknown split "{split}". Should be one of {list(whole)}.')
        return whole if split is None else whole[split]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = list_sources("owner/name:subset")[0]
    assert source.merged
    for split, expected in (("train", "train_sft"), ("test_sft", "test_sft"), ("test", "test_sft")):
        assert [row["text"] for row, _ in open_rows(source, split)[0]] == [expected]
    with pytest.raises(
        DataError,
        match=r"owner/name:subset: has no such split, expected train_sft \| test_sft, got validation",
    ):
        open_rows(source, "validation")
    assert not constants.HF_HUB_OFFLINE


def test_the_home_folder_and_a_file_in_place_of_a_folder(silent, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 64}))
    assert config_of("~/m").hidden_size == 64
    with pytest.raises(
        ModelError, match=r"tokenizer.path: is a file, got m/config.json; give the folder it is in: m"
    ):
        load_tokenizer("m/config.json")
    assert not silent
