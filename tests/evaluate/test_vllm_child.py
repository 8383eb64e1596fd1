"""vLLM as a child process, before a stand-in of the same names: replies, resuming, refusing, and nothing left
behind."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from repsft_fast.errors import ConfigError, ModelError, TrainingError
from repsft_fast.evaluate import vllm_child
from repsft_fast.evaluate.asked import Request, Sampling
from repsft_fast.evaluate.identity import EXACT
from repsft_fast.evaluate.vllm_child import VllmChild

STANDIN = Path(__file__).parents[1] / "helpers" / "vllm_standin"
API = json.loads((Path(__file__).parent / "vllm_0_33_0.json").read_text(encoding="utf-8"))
END = 7
PROBE = [(11, 12, 13), (14, 15)]
SAMPLING = Sampling(n=2, temperature=0.6, top_p=0.95, max_new_tokens=6, seed=3)


def standin():
    specification = importlib.util.spec_from_file_location("vllm_standin", STANDIN / "vllm.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a model in it, in a place whose name is no plain word; the child finds the stand-in."""
    monkeypatch.setenv("PYTHONPATH", str(STANDIN))
    monkeypatch.setenv("RANK", "1")
    folder = tmp_path / "räume und 空白"
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "weights").write_text("one")
    return folder


def engine(place, **changes):
    own = [standin().logprobs_of(list(ids)) for ids in PROBE]
    options = {"probe": PROBE, "own": own, "bound": EXACT, **changes}
    return VllmChild(place / "model", place / "work", **options)


def requests(count=5, n=2):
    return [Request(p, draw, (20 + p, 30, 40)) for p in range(count) for draw in range(n)]


def ask(place, asked, sampling=SAMPLING, **changes):
    found = {}
    ends = changes.pop("end_ids", [END])
    engine(place, **changes).generate(
        asked, sampling, end_ids=ends, on_reply=lambda request, reply: found.setdefault(request, reply)
    )
    return found


def wrong(monkeypatch, **what):
    monkeypatch.setenv("VLLM_STANDIN", json.dumps(what))


@pytest.fixture
def started(place, monkeypatch):
    """The parent's clock stands still until the child has said its first word: how long a Python takes to
    start is no matter here."""
    log, since = place / "work" / "child.log", []

    def now():
        if not since and log.exists() and b"loading" in log.read_bytes():
            since.append(time.monotonic())
        return time.monotonic() - since[0] if since else 0.0

    monkeypatch.setattr(vllm_child, "time", SimpleNamespace(monotonic=now, sleep=time.sleep))


def sent(place):
    return [json.loads(line) for line in (place / "work" / "requests.jsonl").read_text().splitlines()]


def test_every_request_is_answered_with_its_own_reply(place):
    asked = requests()
    found = ask(place, asked)
    assert set(found) == set(asked)
    for request, line in zip(asked, sent(place), strict=True):
        tokens, reason = standin().reply_of(list(request.ids), line["sampling"])
        assert found[request].ids == tokens
        assert found[request].finished == (reason == "stop")
        assert found[request].entropy is None
    assert {reply.finished for reply in found.values()} == {True, False}
    assert len({tuple(found[Request(0, draw, (20, 30, 40))].ids) for draw in range(2)}) == 2, "draws differ"


def test_a_reply_follows_from_its_seed_and_its_request_alone(place):
    asked = requests()
    found = ask(place, asked)
    (place / "work" / "replies.jsonl").unlink()
    assert ask(place, asked[7:4:-1]) == {request: found[request] for request in asked[5:8]}
    seeds = [line["sampling"]["seed"] for line in sent(place)]
    assert all(0 <= seed < 1 << 31 for seed in seeds)
    assert len(set(seeds)) == len(seeds)


def test_a_child_that_dies_is_told_with_its_last_words_and_its_replies_are_kept(place, monkeypatch):
    asked = requests()
    wrong(monkeypatch, dies=4)
    kept = {}
    with pytest.raises(TrainingError, match=r"(?s)6 replies missing.*the last words of the engine"):
        engine(place).generate(asked, SAMPLING, end_ids=[END], on_reply=kept.__setitem__)
    assert len(kept) == 4
    # a kill in the middle of a write
    with open(place / "work" / "replies.jsonl", "a") as file:
        file.write('{"id": "torn')
    wrong(monkeypatch)
    found = ask(place, asked)
    assert set(found) == set(asked)
    assert kept.items() <= found.items()
    assert len(sent(place)) == 6, "what is answered is not asked again"


def test_nothing_is_started_when_all_is_answered(place):
    asked = requests()
    found = ask(place, asked)
    assert ask(place, asked, executable="/no/python/here") == found


@pytest.mark.parametrize("change", ["model", "sampling", "ends"])
def test_replies_of_another_question_are_not_taken(place, change):
    asked = requests(2, 1)
    ask(place, asked)
    sampling, ends = SAMPLING, [END]
    if change == "model":
        (place / "model" / "weights").write_text("another")
    elif change == "sampling":
        sampling = Sampling(temperature=0.7, max_new_tokens=6)
    else:
        ends = [8]
    with pytest.raises(ConfigError, match=r"engine vllm: cannot be started"):
        ask(place, asked, sampling, end_ids=ends, executable="/no/python/here")


def test_other_weights_are_refused_and_answer_nothing(place, monkeypatch):
    wrong(monkeypatch, weights=1)
    kept = {}
    with pytest.raises(ModelError, match=r"does not compute with this model's weights: over 3 fixed tokens"):
        engine(place).generate(requests(), SAMPLING, end_ids=[END], on_reply=kept.__setitem__)
    assert kept == {}
    path = place / "work" / "replies.jsonl"
    assert not path.exists() or path.read_text() == ""


@pytest.mark.parametrize("after", [-1, 3])
def test_a_child_that_hangs_is_ended(place, started, monkeypatch, after):
    wrong(monkeypatch, hangs=after)
    with pytest.raises(TrainingError, match=r"(?s)made no progress for 1 s; the end of its log.*loading"):
        ask(place, requests(), deadline_s=1.0)


def test_a_child_that_is_slow_and_goes_on_is_waited_for(place, started, monkeypatch):
    """Longer without a reply than the deadline."""
    wrong(monkeypatch, slow=6)
    assert len(ask(place, requests(), deadline_s=1.5)) == 10


@pytest.mark.parametrize("reason", ["abort", "length", "stop"])
def test_a_reply_that_ended_otherwise_than_asked_is_refused(place, monkeypatch, reason):
    wrong(monkeypatch, reason=reason)
    with pytest.raises(TrainingError, match=r"prompt \d: its reply ended for .*remove .*replies\.jsonl"):
        ask(place, requests())


def alive(number):
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
    return state != "Z"


def gone(number, seconds=10.0):
    until = time.monotonic() + seconds
    while alive(number) and time.monotonic() < until:
        time.sleep(0.02)
    return not alive(number)


@pytest.mark.parametrize("fails", [False, True])
def test_no_process_is_left_behind(place, started, monkeypatch, fails):
    path = place / "number"
    wrong(monkeypatch, starts=str(path), **({"hangs": 2} if fails else {}))
    if fails:
        with pytest.raises(TrainingError, match="no progress"):
            ask(place, requests(), deadline_s=2.0)
    else:
        ask(place, requests())
    assert gone(int(path.read_text()))


def test_the_child_and_its_own_end_with_a_killed_parent(place, monkeypatch):
    path = place / "number"
    wrong(monkeypatch, starts=str(path), hangs=1)
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); from tests.evaluate import test_vllm_child as t;"
        "from pathlib import Path; t.ask(Path(sys.argv[2]), t.requests())"
    )
    root = str(Path(__file__).parents[2])
    with subprocess.Popen([sys.executable, "-c", script, root, str(place)]) as parent:
        until = time.monotonic() + 60
        while not (place / "work" / "alive").exists():
            assert time.monotonic() < until
            time.sleep(0.05)
        assert alive(int(path.read_text()))
        parent.send_signal(signal.SIGKILL)
    assert gone(int(path.read_text()))


@pytest.mark.parametrize("temperature", [0.001, 2.5, -0.1])
def test_a_temperature_that_it_would_change_is_refused(place, temperature):
    with pytest.raises(ConfigError, match="engine vllm: temperature"):
        ask(place, requests(), Sampling(temperature=temperature))


def test_the_same_request_twice_is_refused(place):
    with pytest.raises(ValueError, match=r"requests: expected each \(prompt, draw\) once"):
        ask(place, [*requests(1, 1), *requests(1, 1)])


def test_the_child_is_told_what_vllm_knows(place):
    """Names against those of the wheel."""
    ask(place, requests(1, 1), arguments={"enforce_eager": True, "max_model_len": 4})
    told = json.loads((place / "work" / "engine.json").read_text())["arguments"]
    assert set(told) <= {*API["LLM"], *API["EngineArgs"]}
    assert told["enforce_eager"] is True
    assert told["max_model_len"] == 3 + 6, "as long as the longest request may get"
    assert told["skip_tokenizer_init"] is True
    (line,) = sent(place)
    assert set(line["sampling"]) <= set(API["SamplingParams"])
    assert line["sampling"]["ignore_eos"] is True, "else the folder's own ends would end replies"
    assert line["sampling"]["stop_token_ids"] == [END]
