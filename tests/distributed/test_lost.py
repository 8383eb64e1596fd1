"""Ranks that never come, die or run out of memory: the others end in bounded time with the name. Real
processes."""

import json
import signal
import socket
import time

import pytest

from repsft_fast.checkpoint import newest
from repsft_fast.distributed import watch
from repsft_fast.distributed.hub import Hub
from tests.helpers import run_jobs, runs
from tests.helpers.ranks import _free_port

LONG = {"budget__epochs": 200, "stop__token_accuracy": None, "checkpoint__every_updates": 2}


class Job:
    """Ranks of one run, started one by one."""

    def __init__(self, server, size, job="come"):
        self.server, self.size, self.job = server, size, f"tests.helpers.rank_jobs:{job}"
        self.port = _free_port()
        self.began = time.monotonic()

    def rank(self, rank, **arguments):
        place = {"WORLD_SIZE": str(self.size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.port)}
        return self.server.spawn(self.job, arguments, {**place, "RANK": str(rank), "LOCAL_RANK": str(rank)})

    @property
    def seconds(self):
        return time.monotonic() - self.began


def ends_with(child, words, seconds=20):
    """It ends by itself, as an error does, and says so."""
    ended = child.wait(seconds)
    assert ended.exit_code == 1, ended.output
    assert words in ended.output, ended.output
    return ended


def until(path, seconds=30):
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path.name} never came"
        time.sleep(0.02)


class TestMeeting:
    @pytest.mark.parametrize("stays", [0, 1])
    def test_all_come_and_leave_and_nobody_is_lost(self, stays, server):
        """One of them stays longer than the others, one calls from where another error is handled."""
        job = Job(server, 3)
        children = [job.rank(rank, stay_s=1.5 * (rank == stays), raises_first=rank == 2) for rank in range(3)]
        found = [child.wait(30) for child in children]
        assert [o.result for o in found] == [{"rank": rank, "loss": None, "facts": 3} for rank in range(3)], (
            found
        )

    def test_a_rank_that_never_comes_is_named_by_all_that_did(self, server):
        job = Job(server, 3)
        children = [job.rank(0, meeting_s=3.0), job.rank(1)]
        ended = ends_with(children[0], "TrainingError: start: rank 2 has not come within 3 s")
        assert "rank 0 waits for rank 2 to come to 127.0.0.1: " in ended.output
        ends_with(children[1], "rank 0: start: rank 2 has not come within 3 s")

    def test_rank_0_never_comes(self, server):
        job = Job(server, 2)
        words = f"start: rank 0 has not come to 127.0.0.1:{job.port} within 2 s"
        assert (
            f"rank 1 waits for rank 0 at 127.0.0.1:{job.port}: "
            in ends_with(job.rank(1, meeting_s=2.0), words).output
        )

    @pytest.mark.parametrize("dead", [0, 1])
    def test_a_rank_that_came_and_died_is_named_though_another_is_still_awaited(self, dead, server, tmp_path):
        job = Job(server, 3)
        children = [job.rank(rank, meeting_s=60.0, seen=str(tmp_path / f"{rank}")) for rank in range(2)]
        until(tmp_path / "0")
        killed = time.monotonic()
        children[dead].kill()
        ends_with(children[1 - dead], f"start: rank {dead} had come and is gone")
        assert time.monotonic() - killed < 5
        assert children[dead].wait().killed

    @pytest.mark.parametrize("dead", [0, 1])
    def test_a_rank_that_dies_before_the_group_is_made(self, dead, server):
        """The others wait for it inside the library, where nothing can be raised."""
        job = Job(server, 3)
        children = [job.rank(rank, die_at="group" if rank == dead else "") for rank in range(3)]
        for rank in {0, 1, 2} - {dead}:
            ends_with(children[rank], f"rank {dead} is gone")
        assert children[dead].wait().killed
        assert job.seconds < 15

    def test_a_child_left_behind_does_not_hide_the_end(self, server):
        job = Job(server, 2)
        stays, forks = job.rank(0, stay_s=3.0), job.rank(1, forks=True, die_at="joined")
        assert stays.wait(20).result["loss"] == "rank 1 is gone"
        assert forks.wait().killed

    def test_an_error_is_told_in_its_own_words(self, server):
        job = Job(server, 2)
        stays, fails = job.rank(0, stay_s=2.0), job.rank(1, fails="the reason")
        assert stays.wait(20).result["loss"] == "rank 1: RuntimeError: the reason"
        assert fails.wait().exit_code == 1

    @pytest.mark.parametrize("dead", [0, 1])
    def test_the_name_may_come_after_the_message_has_failed(self, dead, server):
        job = Job(server, 2)
        children = [
            job.rank(rank, **({"die_at": "joined"} if rank == dead else {"meets": True, "news_late_s": 1.0}))
            for rank in (0, 1)
        ]
        ended = ends_with(children[1 - dead], f"TrainingError: rank {1 - dead}: rank {dead} is gone, got ")
        assert "not every rank arrived" not in ended.output

    def test_a_rank_that_is_silent_is_not_gone(self, server):
        job = Job(server, 2)
        stays, silent = job.rank(0, stay_s=3.0), job.rank(1, stay_s=0.5)
        time.sleep(1.0)
        silent.kill(signal.SIGSTOP)
        assert stays.wait(20).result["loss"] is None
        silent.kill(signal.SIGCONT)
        silent.wait(20)

    def test_two_processes_of_one_rank(self, server):
        """All end at once: another rank will never come."""
        job = Job(server, 3)
        children = [job.rank(0), job.rank(1), job.rank(1)]
        for child in children:
            ends_with(child, "Error: RANK: two processes say that they are rank 1; give each its own")
        assert job.seconds < 15

    @pytest.mark.parametrize("blind", [0, 1])
    def test_ranks_with_and_without_a_gpu_are_refused_by_name(self, blind, server):
        job = Job(server, 2)
        for child in [job.rank(rank, gpus=0 if rank == blind else 1) for rank in range(2)]:
            words = (
                f"ConfigError: devices: torch.cuda.is_available() is false on rank {blind}"
                f" ({socket.gethostname()})"
            )
            assert f"rank {blind} is gone" not in ends_with(child, words).output
        assert job.seconds < 15

    def test_more_ranks_than_gpus_are_refused_before_the_group(self, server):
        job = Job(server, 3)
        first, _, last = [job.rank(rank, gpus=2) for rank in range(3)]
        ends_with(
            first,
            "ConfigError: rank 2: the launcher: rank 2 of this node has no GPU, expected at most 2 ranks",
        )
        ends_with(last, "ConfigError: the launcher: rank 2 of this node has no GPU")

    def test_a_host_that_vanishes_is_known_within_half_a_minute(self):
        """It closes nothing: the kernel probes, on both ends. With the time to end it is less than a
        minute."""
        hub = Hub(2, {}, "token", socket.create_server(("127.0.0.1", 0)))
        member = watch.Member(1, 2, {}, "token", socket.create_connection(("127.0.0.1", hub.port)))
        try:
            assert hub.met.wait(5)
            for end in (*hub._ranks, member._connection):
                ask = [
                    end.getsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_KEEP{what}"))
                    for what in ("IDLE", "INTVL", "CNT")
                ]
                assert end.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
                # a switch may start anew; the minute must not pass
                assert 15 <= ask[0] + ask[1] * ask[2] <= 28
                # unanswered messages count too
                assert end.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) <= 28_000
            assert 28 + watch.END_S < 60
        finally:
            member.leave()
            hub.leave()


def start(server, folder, *, changes=None, **more):
    """Two ranks of a whole run; rank0= and rank1= are what is planted in one."""
    settings = runs.settings(folder, **{**LONG, **(changes or {})})
    made = Job(server, 2, "train")
    return [made.rank(rank, settings=settings, **more.get(f"rank{rank}", {})) for rank in range(2)]


def result_of(folder):
    return json.loads((folder / "run" / "result.json").read_text())


class TestRuns:
    @pytest.mark.parametrize("dead", [0, 1])
    @pytest.mark.parametrize("die_in", ["load", "sent", "checked"])
    def test_a_rank_dies_while_the_model_is_loaded(self, die_in, dead, server, tmp_path):
        children = start(server, tmp_path, **{f"rank{dead}": {"die_in": die_in}})
        ended = ends_with(children[1 - dead], f"rank {dead} is gone")
        assert "TrainingError" in ended.output
        assert children[dead].wait().killed

    @pytest.mark.parametrize("waits_in", ["load", "update"])
    def test_a_rank_that_waits_where_nothing_fails_is_ended_with_the_name(self, waits_in, server, tmp_path):
        """As NCCL does; and rank 0 may read a model for minutes."""
        # the save after 4 has waited for that after 2
        waits = {"waits_in": waits_in, "patience_s": 2.0, "at_update": 5}
        children = start(server, tmp_path, rank0=waits)
        until(tmp_path / "waits")
        children[1].kill()
        assert children[1].wait(30).killed
        began = time.monotonic()
        ended = ends_with(children[0], "error (rank 0)\n  rank 1 is gone; go on with --resume")
        assert time.monotonic() - began < 10
        assert "Traceback" not in ended.output
        if waits_in == "update":
            assert "rank 1 is gone" in result_of(tmp_path)["reason"]
            newest(tmp_path / "run" / "checkpoints")

    def test_a_rank_at_its_end_is_not_ended_for_another(self, server, tmp_path):
        """After the last update rank 0 still has the model to write: what dies now no longer matters to
        it."""
        changes = {"budget__epochs": 1}
        rank0 = {"waits_in": "end", "patience_s": 1.0}
        children = start(server, tmp_path, changes=changes, rank0=rank0, rank1={"waits_in": "end"})
        until(tmp_path / "at the end 1")
        children[1].kill()
        # it went on to where they meet
        ended = ends_with(children[0], "TrainingError: rank 0: rank 1 is gone")
        assert "Traceback" in ended.output, "it was ended from outside"

    @pytest.mark.parametrize("full_in", ["forward", "backward", "step"])
    @pytest.mark.parametrize("full", [0, 1])
    def test_memory_runs_out_on_one_rank_and_all_end_with_its_name_and_the_setting(
        self, full, full_in, server, tmp_path
    ):
        began = time.monotonic()
        children = start(server, tmp_path, **{f"rank{full}": {"full_in": full_in}})
        state = "half an update ahead" if full_in == "step" else "nothing was changed"
        words = "update 4: out of memory (CUDA out of memory); "
        todo = "; lower batch.row_tokens from 64 to 32"
        own = ends_with(children[full], f"TrainingError: {words}", 45)
        other = ends_with(children[1 - full], f"TrainingError: rank {full}: {words}", 45)
        for ended in (own, other):
            assert state in ended.output
            assert todo in ended.output
        assert time.monotonic() - began < 45
        written = result_of(tmp_path)
        assert (written["code"], written["success"]) == ("out_of_memory", False)
        assert written["reason"].startswith(words if full == 0 else f"rank 1: {words}")
        newest(tmp_path / "run" / "checkpoints")

    def test_a_retry_is_for_one_rank_and_says_so(self, server, tmp_path):
        changes = {"numbers__on_out_of_memory": "retry"}
        children = start(server, tmp_path, changes=changes, rank1={"full_in": "forward"})
        for child in children:
            ended = ends_with(child, "a retry works on one rank alone", 45)
            assert "lower batch.row_tokens from 64 to 32" in ended.output, "it was tried"


def test_after_the_loss_the_run_goes_on_bit_for_bit(server, tmp_path):
    """Memory ran out on one rank; resumed, it is the run that never met it."""
    changes = {"budget__epochs": 2}
    whole = [child.wait(60) for child in start(server, tmp_path / "whole", changes=changes)]
    for child in start(
        server, tmp_path / "broken", changes=changes, rank1={"full_in": "step", "at_update": 7}
    ):
        child.wait(45)
    again = start(
        server, tmp_path / "broken", changes=changes, rank0={"resume": True}, rank1={"resume": True}
    )
    assert [o.exit_code for o in whole] == [0, 0]
    assert [c.wait(60).result for c in again] == [o.result for o in whole]
    assert run_jobs.lines(tmp_path / "broken" / "run") == run_jobs.lines(tmp_path / "whole" / "run")
