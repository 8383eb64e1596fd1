"""Before the first message: which rank this is, where rank 0 listens, and who is let in."""

import json
import os
import socket
import struct
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from repsft_fast import cli, distributed
from repsft_fast.config import environment_layer
from repsft_fast.distributed import (
    LaunchError,
    World,
    check_groups,
    handshake,
    launch,
    listening,
    meeting,
    rank_from_environment,
    watch,
)
from repsft_fast.distributed.hub import _STRANGERS, Hub
from repsft_fast.distributed.lifecycle import _gpu
from repsft_fast.errors import ConfigError, TrainingError
from repsft_fast.report import told
from repsft_fast.report.told import print_error
from repsft_fast.selftest import kill_and_resume

OMPI = {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
SLURM = {"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1"}
PMI = {"PMI_RANK": "2", "PMI_SIZE": "4"}


class TestPlace:
    @pytest.mark.parametrize(
        ("environment", "expected"),
        [
            ({}, (0, 1, 0)),
            ({"RANK": "", "WORLD_SIZE": " "}, (0, 1, 0)),
            ({"RANK": "0", "WORLD_SIZE": "1"}, (0, 1, 0)),
            ({"WORLD_SIZE": "1"}, (0, 1, 0)),
            ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, (3, 8, 1)),
            (OMPI, (2, 4, 1)),
            ({**PMI, "MPI_LOCALRANKID": "1"}, (2, 4, 1)),
            ({**OMPI, "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}, (0, 1, 0)),
            (SLURM, (2, 4, 1)),
            ({**SLURM, **PMI}, (2, 4, 1)),  # srun --mpi=pmi2
            # mpirun's own step
            ({**OMPI, "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0"}, (2, 4, 1)),
            ({**SLURM, "WORLD_SIZE": "4"}, (2, 4, 1)),  # scripts that export the size alone
            ({**SLURM, "RANK": "2"}, (2, 4, 1)),
            # torchrun, one a node
            ({**SLURM, "WORLD_SIZE": "16", "RANK": "9", "LOCAL_RANK": "1"}, (9, 16, 1)),
            ({**SLURM, "WORLD_SIZE": "1"}, (0, 1, 0)),  # four runs of their own, said in so many words
            ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, (0, 1, 0)),  # a batch script is no step
        ],
    )
    def test_what_launchers_say(self, environment, expected):
        assert rank_from_environment(environment) == expected

    @pytest.mark.parametrize(
        ("environment", "words"),
        [
            (
                {"RANK": "5", "WORLD_SIZE": "2"},
                "RANK: is not one of the ranks, expected 0 to 1, for WORLD_SIZE is 2, got 5",
            ),
            ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK: is not one of the ranks"),
            ({"RANK": "1", "WORLD_SIZE": "1"}, "RANK: is not one of the ranks, expected 0 to 0"),
            (
                {"RANK": "-1", "WORLD_SIZE": "2"},
                "RANK: cannot be read, expected a whole number, 0 to 65536, got -1",
            ),
            ({"RANK": "1.0", "WORLD_SIZE": "2"}, "RANK: cannot be read"),
            ({"RANK": "1_0", "WORLD_SIZE": "20"}, "RANK: cannot be read"),
            ({"RANK": "٣", "WORLD_SIZE": "20"}, "RANK: cannot be read"),
            ({"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE: cannot be read"),
            (
                {"RANK": "0", "WORLD_SIZE": "0"},
                "WORLD_SIZE: cannot be read, expected a whole number, 1 to 65536, got 0",
            ),
            ({"RANK": "0", "WORLD_SIZE": "9" * 5000}, "WORLD_SIZE: cannot be read"),
            ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "x"}, "LOCAL_RANK: cannot be read"),
            ({"WORLD_SIZE": "2"}, "RANK: is not set, and WORLD_SIZE is 2"),
            ({"RANK": "0"}, "WORLD_SIZE: is not set, and RANK is 0"),
            (
                {**SLURM, "WORLD_SIZE": "8"},
                "WORLD_SIZE: contradicts the launcher, expected SLURM_STEP_NUM_TASKS (4), got 8",
            ),
            (
                {**OMPI, "RANK": "0"},
                "RANK: contradicts the launcher, expected OMPI_COMM_WORLD_RANK (2), got 0; unset RANK",
            ),
            ({"SLURM_STEP_NUM_TASKS": "x", "SLURM_PROCID": "0"}, "SLURM_STEP_NUM_TASKS: cannot be read"),
            ({"SLURM_STEP_NUM_TASKS": "2"}, "SLURM_PROCID: is not set"),
            ({**SLURM, "SLURM_PROCID": "4"}, "SLURM_PROCID: is not one of the ranks"),
        ],
    )
    def test_what_contradicts_itself_is_refused_in_words(self, environment, words):
        with pytest.raises(LaunchError) as caught:
            rank_from_environment(environment)
        assert str(caught.value).startswith(words)
        assert caught.value.exit_code == 2
        assert "; " in str(caught.value), "nothing is said of what to do"

    def test_a_rank_says_itself_what_it_alone_knows(self, monkeypatch, capsys):
        for name in [name for names in (launch._OURS, *launch._LAUNCHERS) for name in names]:
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("RANK", "5")
        print_error(ConfigError("there is nobody else"))
        assert capsys.readouterr().err == "error (rank 5)\n  there is nobody else\n"
        monkeypatch.setenv("WORLD_SIZE", "8")
        print_error(ConfigError("known to all"))
        assert capsys.readouterr().err == ""
        print_error(LaunchError("known to one"))
        assert capsys.readouterr().err == "error (rank 5)\n  known to one\n"
        monkeypatch.setenv("RANK", "x")
        print_error(LaunchError("no number"))
        assert capsys.readouterr().err == "error\n  no number\n"

    def test_all_who_name_launchers_name_the_same(self):
        tables = (launch._OURS, *launch._LAUNCHERS)
        assert set(told._RANKS) == {names[0] for names in tables}
        assert set(told._SIZES) == {names[1] for names in tables} == cli._LAUNCHED
        assert set(kill_and_resume._RANKS) == {name for names in tables for name in names}

    def test_a_job_of_several_tasks_without_srun_is_said(self):
        assert "this Slurm job has 4 tasks and this process trains alone" in launch.says_alone(
            {"SLURM_NTASKS": "4"}
        )
        for quiet in (
            {},
            {"SLURM_NTASKS": "1"},
            {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"},
            {"SLURM_NTASKS": "x"},
        ):
            assert launch.says_alone(quiet) is None

    def test_a_place_among_several_gpus_must_be_said(self, monkeypatch):
        """Else all ranks of a node would train on its first."""
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        with pytest.raises(LaunchError, match="LOCAL_RANK: is not set, and this rank sees 2 GPUs"):
            _gpu(None)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        assert _gpu(None) == 0

    @pytest.mark.parametrize(
        ("size", "groups", "words"),
        [
            (1, 3, "this run has one rank, got 3; set it to null"),
            (4, 3, "4 ranks do not divide into groups of this size, got 3"),
            (4, 8, "4 ranks do not divide into groups of this size, got 8"),
        ],
    )
    def test_groups_that_do_not_fit(self, size, groups, words):
        with pytest.raises(ConfigError, match=words):
            check_groups(size, groups)
        for fits in (None, 1, size):
            check_groups(size, fits)


@pytest.fixture
def alone(monkeypatch):
    """The environment of rank 0 of 2, on this host."""
    for name in (
        "LOCAL_WORLD_SIZE",
        "SLURM_STEP_NUM_NODES",
        "REPSFT_LISTEN",
        "REPSFT_SECRET",
        "TORCHELASTIC_USE_AGENT_STORE",
    ):
        monkeypatch.delenv(name, raising=False)
    set_all(
        monkeypatch,
        RANK="0",
        WORLD_SIZE="2",
        LOCAL_RANK="0",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(free_port()),
    )
    return monkeypatch


def set_all(monkeypatch, **values):
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


def where(port):
    """Addresses at which this host listens on a port: of the kernel's own table."""
    found = set()
    for path, size in ((Path("/proc/net/tcp"), 8), (Path("/proc/net/tcp6"), 32)):
        if path.exists():
            for line in path.read_text().splitlines()[1:]:
                (address, hexed), state = line.split()[1].split(":"), line.split()[3]
                if state == "0A" and int(hexed, 16) == port:
                    words = struct.pack(
                        f"={size // 8}I", *(int(address[n : n + 8], 16) for n in range(0, size, 8))
                    )
                    found.add(socket.inet_ntop(socket.AF_INET if size == 8 else socket.AF_INET6, words))
    return found


class TestListening:
    def test_one_interface_for_the_store_and_for_the_meeting(self, alone):
        port = int(os.environ["MASTER_PORT"])
        store = meeting._store("127.0.0.1", port, 0, 2, 5.0, meeting._Wait(0, 5.0))
        assert where(port) == {"127.0.0.1"}
        store.set("key", "value")
        other = meeting._store("127.0.0.1", port, 1, 2, 5.0, meeting._Wait(1, 5.0))
        assert other.get("key") == b"value"
        listens, addresses = listening.of_the_meeting("127.0.0.1", port)
        with listens:
            assert addresses == ["127.0.0.1"]
            assert where(listens.getsockname()[1]) == {"127.0.0.1"}

    @pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6")
    def test_version_6(self, alone):
        try:
            socket.create_server(("::1", 0), family=socket.AF_INET6).close()
        except OSError:
            pytest.skip("no IPv6 address here")
        store = meeting._store("::1", port := free_port(), 0, 2, 5.0, meeting._Wait(0, 5.0))
        assert where(port) == {"::1"}
        meeting._store("::1", port, 1, 2, 5.0, meeting._Wait(1, 5.0)).set("key", "value")
        assert store.get("key") == b"value"

    def test_a_second_run_of_a_process_finds_the_store_of_the_first(self, alone):
        wait = meeting._Wait(0, 5.0)
        first = meeting._store("127.0.0.1", port := free_port(), 0, 2, 5.0, wait)
        first.set("key", "value")
        assert meeting._store("127.0.0.1", port, 0, 2, 5.0, wait).get("key") == b"value"

    def test_a_port_that_another_process_has(self, alone):
        words = r"MASTER_PORT: is taken by another process.*one alone may be rank 0"
        with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(LaunchError, match=words):
            meeting._store("127.0.0.1", taken.getsockname()[1], 0, 2, 5.0, meeting._Wait(0, 5.0))

    def test_an_address_of_another_host(self, alone):
        words = (
            r"^MASTER_ADDR: is no address of this host \(.*got 192\.0\.2\.99; .*export"
            r" REPSFT_LISTEN=0\.0\.0\.0"
        )
        with pytest.raises(LaunchError, match=words):
            meeting._store("192.0.2.99", free_port(), 0, 2, 5.0, meeting._Wait(0, 5.0))

    def test_an_address_that_others_see_and_this_host_does_not_have(self, alone):
        alone.setenv("REPSFT_LISTEN", "0.0.0.0")
        listens, _ = listening.of_the_store("192.0.2.99", 0)
        with listens:
            assert where(listens.getsockname()[1]) <= {"0.0.0.0", "::"}

    def test_a_name_that_nobody_knows(self, alone):
        alone.setattr(meeting, "NAME_S", 0.3)
        with pytest.raises(LaunchError, match=r"MASTER_ADDR: is not known here, got no\.such\.host\.invalid"):
            meeting._store("no.such.host.invalid", 29500, 0, 2, 5.0, meeting._Wait(0, 5.0))
        with pytest.raises(
            TrainingError,
            match=r"rank 0 has not come to no\.such\.host\.invalid:29500 within 0\.2 s, a name that is not",
        ):
            meeting._store("no.such.host.invalid", 29500, 1, 2, 5.0, meeting._Wait(1, 0.2))

    def test_a_name_behind_the_loopback_listens_everywhere_and_says_so(self, alone, capsys):
        """A line `127.0.1.1 node001` in /etc/hosts: to the other hosts the name is another address."""
        plain = listening.addresses
        alone.setattr(
            listening, "addresses", lambda host: ["127.0.1.1"] if host == "node001" else plain(host)
        )
        listens, address = listening.of_the_store("node001", 0)
        with listens:
            assert address == "node001"
            assert where(listens.getsockname()[1]) <= {"0.0.0.0", "::"}
        assert (
            "rank 0 listens on all interfaces: node001 is 127.0.1.1 on its own host"
            in capsys.readouterr().err
        )
        for name, value in {
            "LOCAL_WORLD_SIZE": "2",
            "SLURM_STEP_NUM_NODES": "1",
            "REPSFT_LISTEN": "127.0.0.1",
        }.items():
            with alone.context() as inner:  # nobody is elsewhere, or the user has said where
                inner.setenv(name, value)
                listens, address = listening.of_the_store("node001", 0)
                with listens:
                    assert where(listens.getsockname()[1]) == {address}
        assert capsys.readouterr().err == ""

    def test_the_names_of_the_meeting_are_no_settings(self):
        assert environment_layer(
            {"REPSFT_SECRET": "s", "REPSFT_LISTEN": "::", "REPSFT_OPTIM__LR": "1"}
        ).values == {"optim": {"lr": 1}}

    @pytest.mark.parametrize(
        ("name", "value"),
        [("MASTER_ADDR", ""), ("MASTER_PORT", "0"), ("MASTER_PORT", "７"), ("MASTER_PORT", "x")],
    )
    def test_an_address_that_is_none(self, name, value, alone):
        alone.setenv(name, value)
        with pytest.raises(LaunchError, match=f"{name}: is not"), distributed.lifecycle("cpu"):
            pass


@pytest.fixture
def hub(alone):
    found = Hub(2, {"of": 0}, "token", socket.create_server(("127.0.0.1", 0)))
    yield found
    found.leave()


def call(hub):
    return socket.create_connection(("127.0.0.1", hub.port), timeout=5)


def hello(connection, token="token", rank=1, size=2, facts=None, **more):
    asked = handshake._line(connection)["question"]
    proof = handshake.proof(token, asked, rank, size)
    return {
        "rank": rank,
        "size": size,
        "proof": proof,
        "facts": {"of": rank} if facts is None else facts,
        **more,
    }


def answer(hub, **said):
    """What a caller hears who says this; None where it hears nothing more."""
    with call(hub) as stranger:
        stranger.sendall(json.dumps(hello(stranger, **said)).encode() + b"\n")
        try:
            return handshake._line(stranger)
        except OSError:
            return None


def comes(hub, rank=1):
    member = watch.Member(rank, hub.size, {"of": rank}, "token", call(hub))
    assert hub.met.wait(5)
    assert member.met.wait(5)
    assert member.facts == hub.facts == {0: {"of": 0}, 1: {"of": 1}}
    member.leave()


class TestStrangers:
    @pytest.mark.parametrize(
        "data",
        [
            b"\xff\n",
            b"[1]\n",
            b"[" * 9999 + b"\n",
            b"{}\n",
            b"x" * (1 << 17),
            b"9" * 60_000 + b"\n",
            b"GET / HTTP/1.1\r\n\r\n",
            b"",
        ],
    )
    def test_noise_is_dropped_and_the_meeting_goes_on(self, data, hub):
        with call(hub) as stranger:
            stranger.sendall(data)
            stranger.shutdown(socket.SHUT_WR)  # a scanner connects and leaves
            try:
                while stranger.recv(1 << 16):
                    pass
            except ConnectionResetError:
                pass
        assert hub.lost is None
        comes(hub)

    @pytest.mark.parametrize(
        "said",
        [
            {"token": "other"},
            {"rank": 0.0},
            {"rank": True},
            {"rank": "1"},
            {"size": "2"},
            {"facts": [1]},
            {"proof": "ü"},
            {"proof": 1},
        ],
    )
    def test_who_cannot_prove_it_is_told_and_dropped(self, said, hub):
        assert "REPSFT_SECRET: is not that of rank 0, or of another launch" in answer(hub, **said)["refused"]
        assert hub.missing() == [1]
        assert hub.lost is None
        comes(hub)

    def test_an_answer_is_to_one_question(self, hub):
        with call(hub) as first, call(hub) as second:
            said = hello(first)
            handshake._line(second)
            second.sendall(json.dumps(said).encode() + b"\n")
            assert "refused" in handshake._line(second)
        assert hub.missing() == [1]

    def test_a_secret_of_the_launch_is_asked_for_and_travels_nowhere(self, hub, monkeypatch):
        monkeypatch.setenv("REPSFT_SECRET", "ours")
        with call(hub) as stranger:
            asked = handshake._line(stranger)["question"]
            monkeypatch.setenv("REPSFT_SECRET", "theirs")
            proof = handshake.proof("token", asked, 1, 2)
            monkeypatch.setenv("REPSFT_SECRET", "ours")
            stranger.sendall(json.dumps({"rank": 1, "size": 2, "proof": proof, "facts": {}}).encode() + b"\n")
            assert "REPSFT_SECRET" in handshake._line(stranger)["refused"]
        with call(hub) as stranger:
            assert b"ours" not in json.dumps(hello(stranger)).encode()
        comes(hub)

    @pytest.mark.parametrize(
        ("said", "words"),
        [
            ({"rank": 0}, "RANK: two processes say that they are rank 0"),
            ({"rank": 2}, "RANK: is not one of the ranks, expected 0 to 1, got 2"),
            ({"rank": -1}, "RANK: is not one of the ranks"),
            ({"rank": 3, "size": 4}, "WORLD_SIZE: is 4 on rank 3 and 2 on rank 0"),
        ],
    )
    def test_a_process_of_the_launch_that_does_not_fit_ends_the_start(self, said, words, hub):
        assert answer(hub, **said)["refused"].startswith(words)
        assert hub.wait_for_news(5).code == watch.REFUSED
        error = meeting._given_up(hub, hub.lost)
        assert isinstance(error, ConfigError)
        assert str(error).startswith(words)

    def test_after_the_start_it_changes_nothing(self, hub):
        member = watch.Member(1, 2, {"of": 1}, "token", call(hub))
        assert hub.met.wait(5)
        assert answer(hub)["refused"].startswith("RANK: two processes say that they are rank 1")
        time.sleep(0.05)
        assert hub.lost is member.lost is None
        member.leave()

    def test_a_member_is_refused_in_rank_0s_words_and_tries_again_where_nobody_answers(self, hub):
        with pytest.raises(LaunchError, match="WORLD_SIZE: is 3 on rank 2 and 2 on rank 0"):
            meeting._introduced(2, 3, {}, "token", call(hub))
        with socket.create_server(("127.0.0.1", 0)) as silent:
            threading.Thread(target=lambda: silent.accept()[0].close(), daemon=True).start()
            assert (
                meeting._introduced(1, 2, {}, "token", socket.create_connection(silent.getsockname())) is None
            )

    def test_who_says_nothing_is_dropped_in_time_and_byte_by_byte_does_not_help(self, hub, monkeypatch):
        monkeypatch.setattr("repsft_fast.distributed.hub.HELLO_S", 0.4)
        with call(hub) as slow, call(hub) as silent:
            began = time.monotonic()
            for stranger in (slow, silent):
                handshake._line(stranger)
            with suppress(ConnectionError):
                while time.monotonic() - began < 5:
                    slow.sendall(b"x")
                    time.sleep(0.05)
            assert silent.recv(1) == b""
            assert 0.3 < time.monotonic() - began < 4
        comes(hub)

    def test_hundreds_that_stay_cost_a_bounded_number_of_descriptors_and_a_rank_comes_through(self, hub):
        crowd = [call(hub) for _ in range(_STRANGERS * 4)]
        try:
            deadline = time.monotonic() + 5
            while time.monotonic() < deadline and len(hub._buffers) > hub.size + _STRANGERS:
                time.sleep(0.01)
            assert len(hub._buffers) <= hub.size + _STRANGERS + 1
            assert len(hub._asked) <= hub.size + _STRANGERS + 1
            comes(hub)
        finally:
            for stranger in crowd:
                stranger.close()

    def test_what_a_rank_says_that_is_no_message_changes_nothing(self, hub):
        member = watch.Member(1, 2, {"of": 1}, "token", call(hub))
        for line in (b"\xff\n", b'{"loss": 1}\n', b'{"loss": null}\n', b"[]\n", b'{"other": {}}\n'):
            member._connection.sendall(line)
        assert hub.wait_for_news(0.3) is None
        member.tell("its own words")
        assert str(hub.wait_for_news(5)) == "rank 1: its own words"
        member.leave()


def test_many_missing_ranks_are_named_in_short():
    assert meeting._some(list(range(1, 4))) == "1, 2, 3"
    assert meeting._some(list(range(100))).endswith("14, 15 and 84 more")


def test_alone_needs_no_meeting(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    with distributed.lifecycle("cpu") as world:
        assert world == World(0, 1, 0, torch.device("cpu"))


def test_an_address_of_another_host_is_not_taken_for_all_of_this_ones(monkeypatch):
    monkeypatch.setenv(listening.LISTEN, "203.0.113.7")  # of no host: RFC 5737 keeps it for documents
    with pytest.raises(LaunchError, match=f"{listening.LISTEN}: is no address of this host"):
        listening.of_the_meeting("127.0.0.1", 29500)
