"""Signals: the update is finished, the state saved, the code told; twice leaves at once; the run goes on."""

import faulthandler
import hashlib
import json
import os
import signal
import threading
import time

import pytest

from repsft_fast.checkpoint import newest
from repsft_fast.signals import CODES, SAME_S, Signals
from tests.helpers import runs
from tests.helpers.ranks import _free_port

WARNINGS = ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")


@pytest.mark.parametrize(
    ("number", "code", "exit_code"), [("SIGTERM", "terminated", 143), ("SIGINT", "interrupted", 130)]
)
@pytest.mark.parametrize("every", [None, 3])
def test_a_signal_saves_and_the_run_goes_on_as_if_it_had_not_come(
    number, code, exit_code, every, server, tmp_path
):
    expected = server.run(
        "tests.helpers.run_jobs:train", {"settings": runs.settings(tmp_path / "whole")}
    ).result
    settings = runs.settings(tmp_path / "left", checkpoint__every_updates=every)
    left = server.run(
        "tests.helpers.run_jobs:train",
        {"settings": settings, "signal_after": 8, "number": getattr(signal, number)},
    )
    assert left.result["code"] == code, left.output
    assert (left.result["exit_code"], left.result["updates"]) == (exit_code, 8)
    written = json.loads((tmp_path / "left" / "run" / "result.json").read_text())
    found = newest(tmp_path / "left" / "run" / "checkpoints")
    assert written["code"] == code
    assert f"{number} after update 8: saved; --resume goes on from {found.path.name}" in written["reason"]
    resumed = server.run("tests.helpers.run_jobs:train", {"settings": settings, "resume": True})
    assert resumed.result == expected, resumed.output
    again = server.run("tests.helpers.run_jobs:train", {"settings": settings, "resume": True})
    assert again.result["updates"] == expected["updates"], "an ended run is not run again"
    assert "hash" not in again.result


@pytest.mark.parametrize("name", WARNINGS)
def test_a_warning_ends_the_run_as_sigterm_does_and_the_exit_code_says_which(name, server, tmp_path):
    number = getattr(signal, name)
    ended = server.run(
        "tests.helpers.run_jobs:train",
        {"settings": runs.settings(tmp_path), "signal_after": 4, "number": number, "again": 0.0},
    )
    assert ended.result["code"] == "terminated", ended.output
    assert (ended.result["exit_code"], ended.result["updates"]) == (128 + number, 4)
    assert ended.result["reason"].startswith(f"{name} after update 4: saved; --resume goes on from gen-")
    newest(tmp_path / "run" / "checkpoints")


def test_a_signal_to_one_rank_ends_all_alike(server, tmp_path):
    settings = runs.settings(tmp_path, budget__epochs=400, stop__token_accuracy=None)
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    children = [
        server.spawn(
            "tests.helpers.run_jobs:train",
            {"settings": settings, "signal_after": 5 if rank == 1 else None, "number": signal.SIGUSR1},
            {**place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    first, second = (child.wait(100) for child in children)
    assert first.result is not None, first.output
    assert first.result == second.result, second.output
    assert (first.result["code"], first.result["exit_code"]) == ("terminated", 128 + signal.SIGUSR1)
    assert newest(tmp_path / "run" / "checkpoints").number == 0


def test_the_second_signal_ends_the_process_at_once_and_the_last_checkpoint_is_whole(server, tmp_path):
    settings = runs.settings(
        tmp_path, checkpoint__every_updates=2, budget__epochs=50, stop__token_accuracy=None
    )
    arguments = {"settings": settings, "signal_after": 9, "again": SAME_S + 0.1}
    ended = server.run("tests.helpers.run_jobs:train", arguments)
    assert ended.exit_code == 143
    assert ended.result is None
    assert newest(tmp_path / "run" / "checkpoints").number >= 2
    assert not (tmp_path / "run" / "result.json").exists()


def test_what_a_launcher_passes_on_a_moment_later_is_the_same_request(server, tmp_path):
    """torchrun sends its workers what the batch system has sent them already."""
    ended = server.run(
        "tests.helpers.run_jobs:train", {"settings": runs.settings(tmp_path), "signal_after": 4, "again": 0.2}
    )
    assert (ended.result["code"], ended.result["updates"]) == ("terminated", 4), ended.output


def test_the_command_line_exits_by_the_signals_code(server, tmp_path):
    settings = runs.settings(tmp_path)
    ended = server.run(
        "tests.helpers.run_jobs:command_line",
        {"settings": settings, "folder": str(tmp_path), "signal_after": 5},
    )
    assert ended.exit_code == 143, ended.output
    resumed = server.run(
        "tests.helpers.run_jobs:command_line", {"settings": settings, "folder": str(tmp_path), "resume": True}
    )
    assert resumed.exit_code == 0, resumed.output


def test_a_signal_while_the_model_is_written_changes_nothing(server, tmp_path):
    expected = server.run(
        "tests.helpers.run_jobs:train", {"settings": runs.settings(tmp_path / "whole")}
    ).result
    cut = {"settings": runs.settings(tmp_path / "cut"), "signal_at": "finish: before the model"}
    ended = server.run("tests.helpers.run_jobs:train", cut)
    assert ended.result == expected, ended.output
    assert (tmp_path / "cut" / "run" / "model.safetensors").exists()


def test_nothing_can_be_saved_on_a_folder_that_became_a_file_and_the_result_says_so(server, tmp_path):
    settings = runs.settings(tmp_path)
    (tmp_path / "run").mkdir()
    ended = server.run(
        "tests.helpers.run_jobs:train", {"settings": settings, "signal_after": 5, "block_checkpoints": True}
    )
    assert ended.result["code"] == "terminated", ended.output
    assert "could not be saved" in ended.result["reason"]


# The handlers alone ---------------------------------------------------------------------------------------


def as_it_was():
    return {number: signal.getsignal(number) for number in CODES}


@pytest.fixture
def plain():
    """Handlers as a fresh process has them, put back afterwards."""
    before = as_it_was()
    for number in CODES:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_caller_finds_its_handlers_again(plain):
    before = as_it_was()
    wakeup = signal.set_wakeup_fd(-1)
    with Signals() as signals:
        assert all(signal.getsignal(number) == signals._came for number in CODES)
    assert as_it_was() == before
    assert signal.set_wakeup_fd(wakeup) == -1


def test_what_is_ignored_stays_ignored_as_under_nohup(plain):
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    assert signals.received == 0


def test_a_handler_of_the_programs_own_keeps_its_warning_and_gives_up_sigterm(plain):
    heard = []
    signal.signal(signal.SIGUSR2, lambda number, frame: heard.append(number))
    signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGUSR2)
        assert (heard, signals.received) == ([signal.SIGUSR2], 0)
        os.kill(os.getpid(), signal.SIGTERM)
    assert (heard, signals.received) == ([signal.SIGUSR2], signal.SIGTERM)


def test_a_handler_that_python_does_not_know_of_stays(plain, tmp_path):
    with open(tmp_path / "stacks", "w") as file:
        faulthandler.register(signal.SIGUSR1, file=file)
        try:
            with Signals() as signals:
                os.kill(os.getpid(), signal.SIGUSR1)
            assert signals.received == 0
            assert "most recent call first" in (tmp_path / "stacks").read_text()
        finally:
            faulthandler.unregister(signal.SIGUSR1)


def test_a_pipe_that_closes_is_still_pythons(plain):
    before = signal.getsignal(signal.SIGPIPE)
    with Signals():
        assert signal.getsignal(signal.SIGPIPE) is before is signal.SIG_IGN


def test_outside_the_main_thread_nothing_is_touched(plain):
    before, seen = as_it_was(), []

    def run():
        with Signals():
            seen.append(as_it_was())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [before]


def stuck(again_s, number):
    """The main thread computes in C, where no handler of Python's runs; another sends the signals."""

    def send():
        time.sleep(0.3)
        os.kill(os.getpid(), number)
        time.sleep(again_s)
        os.kill(os.getpid(), number)

    with Signals():
        threading.Thread(target=send, daemon=True).start()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)


def test_the_second_is_heard_where_the_main_thread_is_stuck(server):
    ended = server.run(
        "tests.test_signals:stuck",
        {"again_s": SAME_S + 0.1, "number": signal.SIGTERM},
        timeout_s=15,
    )
    assert ended.exit_code == 143, ended.output


def test_a_forked_child_is_not_the_run(plain):
    """What it is sent ends it, and the parent hears nothing."""
    ready, told = os.pipe()
    with Signals() as signals:
        child = os.fork()
        if child == 0:
            os.write(told, b".")  # what is pending at a fork is forgotten in the child
            time.sleep(20)
            os._exit(7)
        os.read(ready, 1)
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 143
        time.sleep(0.1)
        assert signals._asked_at is None
    assert signals.received == 0
    os.close(ready)
    os.close(told)
