"""What stands in MASTER_ADDR and who listens there: what can be no host is refused, and a silent stranger is
named."""

import socket

import pytest

from repsft_fast import distributed
from repsft_fast.distributed import LaunchError, launch, meeting
from repsft_fast.errors import ConfigError, TrainingError
from repsft_fast.training import trainer
from tests.helpers.ranks import context


@pytest.mark.parametrize(
    "host",
    [
        "node..x",
        "a" * 300,
        "node[001-004]",
        "node1,node2",
        "http://x",
        "host:29500",
        "[::1]",
        "a b",
        ".",
        "ä" * 60,
        "a/b",
        "\udcff",
    ],
)
def test_what_can_be_no_host_is_refused_at_once(monkeypatch, host):
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setenv("MASTER_ADDR", host)
    with pytest.raises(LaunchError) as caught:
        meeting.meet(1, 2, {}, timeout_s=0.1, store_timeout_s=1)
    assert str(caught.value).startswith("MASTER_ADDR: cannot be a host, expected a host's name or number")


@pytest.mark.parametrize(
    "host",
    [
        "node001",
        "node_1.cluster.",
        "10.0.0.1",
        "::1",
        "fe80::1%eth0",
        "::ffff:1.2.3.4",
        "bücher.example",
        "0.0.0.0",
        "a" * 63,
    ],
)
def test_what_may_be_one_is_asked_for(monkeypatch, host):
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setenv("MASTER_ADDR", f" {host} ")
    assert meeting._address() == (host, 29500)


def test_a_name_that_rank_0_gives_and_no_resolver_takes_is_tried_and_left():
    assert meeting._connect(["node..x", "a" * 300], 29500, 0.1) is None


def _told_by_a_stranger(pipe, port):
    told = []
    meeting.say, meeting.SPEAK_EVERY_S = told.append, 0.2
    try:
        meeting._store("127.0.0.1", port, 1, 2, 600.0, meeting._Wait(1, 0.5))
    except TrainingError as error:
        pipe.send([*told, str(error)])


def test_a_stranger_that_listens_and_says_nothing_is_named():
    """In a process of its own, for torch goes on listening to the stranger in a thread: it must end all the
    same."""
    receiver, sender = context.Pipe(duplex=False)
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        port = stranger.getsockname()[1]
        process = context.Process(target=_told_by_a_stranger, args=(sender, port))
        process.start()
        try:
            assert receiver.poll(90), "nothing is said"
            told = receiver.recv()
            process.join(10)
            assert process.exitcode == 0
        finally:
            process.kill()
    assert (
        f"rank 1 waits for an answer from 127.0.0.1, port {port}, where something listens and says"
        " nothing: 0 s" in told[0]
    )
    assert told[-1].startswith(
        f"start: what listens at 127.0.0.1, port {port}, has not answered within 0.5 s"
    )


def test_what_is_said_of_the_environment_is_spelled(capsys):
    launch.say("error\n  RANK: cannot be read, got 1\x1b[31m\u202e")
    assert capsys.readouterr().err == "error\n  RANK: cannot be read, got 1\\x1b[31m\\u202e\n"


def test_resume_on_one_rank_alone_is_refused_before_the_folder(monkeypatch, tmp_path):
    def differs(world, name, digest):
        raise ConfigError(f"{name} {digest}")

    monkeypatch.setattr(distributed, "same_everywhere", differs)
    settings = {
        "run.folder": str(tmp_path / "r"),
        "model.path": "m",
        "data.train": "a.jsonl",
        "budget.epochs": 1,
    }
    for resume in (False, True):
        with pytest.raises(ConfigError, match=f"^--resume {resume}$"):
            trainer.train(settings, resume=resume)
    assert not (tmp_path / "r").exists()
