"""SIGTERM and SIGINT: the update is finished, the state saved, the code told; twice leaves at once; the run goes on."""

import json
import signal
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(HERE / "crash")]

import run_jobs  # noqa: E402
import runs  # noqa: E402
from forkserver import ForkServer  # noqa: E402

from repsft_fast.checkpoint import newest  # noqa: E402


@pytest.fixture(scope="module")
def server():
    started = ForkServer(run_jobs.PRELOAD, [str(HERE), str(HERE.parent)])
    yield started
    started.close()


@pytest.mark.parametrize(("number", "code", "exit_code"), [("SIGTERM", "terminated", 143), ("SIGINT", "interrupted", 130)])
@pytest.mark.parametrize("every", [None, 3])
def test_a_signal_saves_and_the_run_goes_on_as_if_it_had_not_come(number, code, exit_code, every, server, tmp_path):
    expected = server.run("run_jobs:train", {"settings": runs.settings(tmp_path / "whole")}).result
    settings = runs.settings(tmp_path / "left", checkpoint__every_updates=every)
    left = server.run("run_jobs:train", {"settings": settings, "signal_after": 8, "number": getattr(signal, number)})
    assert left.result["code"] == code, left.output
    assert (left.result["exit_code"], left.result["updates"]) == (exit_code, 8)
    written = json.loads((tmp_path / "left" / "run" / "result.json").read_text())
    found = newest(tmp_path / "left" / "run" / "checkpoints")
    assert written["code"] == code
    assert f"{number} after update 8: saved; --resume goes on from {found.path.name}" in written["reason"]
    resumed = server.run("run_jobs:train", {"settings": settings, "resume": True})
    assert resumed.result == expected, resumed.output
    again = server.run("run_jobs:train", {"settings": settings, "resume": True})
    assert again.result["updates"] == expected["updates"], "an ended run is not run again"
    assert "hash" not in again.result


def test_the_second_signal_ends_the_process_at_once_and_the_last_checkpoint_is_whole(server, tmp_path):
    settings = runs.settings(tmp_path, checkpoint__every_updates=2, budget__epochs=50, stop__token_accuracy=None)
    arguments = {"settings": settings, "signal_after": 9, "again": True}
    ended = server.run("run_jobs:train", arguments)
    assert ended.exit_code == 143
    assert ended.result is None
    assert newest(tmp_path / "run" / "checkpoints").number >= 2
    assert not (tmp_path / "run" / "result.json").exists()


def test_the_command_line_exits_by_the_signals_code(server, tmp_path):
    settings = runs.settings(tmp_path)
    ended = server.run("run_jobs:command_line", {"settings": settings, "folder": str(tmp_path), "signal_after": 5})
    assert ended.exit_code == 143, ended.output
    resumed = server.run("run_jobs:command_line", {"settings": settings, "folder": str(tmp_path), "resume": True})
    assert resumed.exit_code == 0, resumed.output


def test_nothing_can_be_saved_on_a_folder_that_became_a_file_and_the_result_says_so(server, tmp_path):
    settings = runs.settings(tmp_path)
    (tmp_path / "run").mkdir()
    ended = server.run("run_jobs:train", {"settings": settings, "signal_after": 5, "block_checkpoints": True})
    assert ended.result["code"] == "terminated", ended.output
    assert "could not be saved" in ended.result["reason"]
