"""Whatever becomes of the reader of standard output, nobody who prints hears of it, and the exit code is the
program's own."""

import errno
import io
import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest

from repsft_fast import cli
from repsft_fast.report import stream as streams
from repsft_fast.report.live import Live
from repsft_fast.report.stream import Stream

ROOT = Path(__file__).parents[2]
HELP = f"{sys.executable} -m repsft_fast --help"  # so little that Python keeps it to the end
# prints more than a pipe holds, and needs no torch
SETTINGS = f"{sys.executable} -m repsft_fast doctor --settings"


class Broken(io.StringIO):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, text):
        raise self.error

    flush = write


@pytest.mark.parametrize(
    "error",
    [
        BrokenPipeError(32, "Broken pipe"),
        OSError(5, "EIO"),
        OSError(28, "No space"),
        ValueError("I/O operation on closed file."),
    ],
)
def test_an_error_is_kept_and_not_raised(error):
    one = Stream(Broken(error))
    print("a line", file=one, flush=True)
    one.writelines(["b", "c"])
    one.flush()
    assert str(getattr(error, "strerror", None) or error) in one.trouble
    assert one.left == isinstance(error, BrokenPipeError)


def test_other_errors_are_not_of_the_stream():
    with pytest.raises(TypeError):
        Stream(io.StringIO()).write(3)


def test_where_there_is_none_nothing_is_written():
    one = Stream(None)
    print("a line", file=one, flush=True)
    assert (one.trouble, one.isatty(), one.encoding) == ("", False, "utf-8")
    with pytest.raises(OSError, match="no stream"):
        one.fileno()


def test_what_the_encoding_lacks_is_spelled():
    inner = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    print("✓ é", file=Stream(inner), flush=True)
    assert inner.buffer.getvalue() == b"\\u2713 \\xe9\n"


def test_a_stream_that_its_owner_made_non_blocking_is_not_broken():
    class Full(io.StringIO):
        def write(self, text):
            raise BlockingIOError(errno.EAGAIN, "would block")

    one = Stream(Full())
    one.write("x\n")
    assert one.trouble == ""


@pytest.fixture(params=["pipe", "terminal"])
def unread(request):
    """(what nobody reads, the other end)"""
    reader, writer = os.pipe() if request.param == "pipe" else pty.openpty()
    with open(writer, "w", encoding="utf-8") as inner:
        yield inner, reader
    os.close(reader)


def test_a_reader_that_does_not_read_is_waited_for_once_and_told_what_it_missed(unread):
    inner, reader = unread
    one = Stream(inner, patience_s=0.2)
    started = time.monotonic()
    for number in range(30_000):
        one.write(f"{number:09}\n")
    assert 0.2 <= time.monotonic() - started < 5, "one wait, and not one a line"
    assert os.get_blocking(inner.fileno()), "others who print there are not touched"
    os.set_blocking(reader, False)
    read = b""
    for _ in range(100):
        try:
            read += os.read(reader, 1 << 20)
        except BlockingIOError:
            one.write("again\n")
            if read.endswith((b"again\n", b"again\r\n")):
                break
    lines = read.decode().split()
    numbers = [line for line in lines if line.isdigit() and len(line) == 9]
    assert numbers == [f"{number:09}" for number in range(len(numbers))]
    assert (
        f"… {30_000 - len(numbers)} lines are left out here, which nobody was reading"
        in read.decode().replace("\r", "")
    )
    assert one.trouble == ""


def test_the_live_line_waits_for_no_reader(unread, monkeypatch):
    monkeypatch.setattr("repsft_fast.report.live.PATIENCE_S", 0.1)
    started = time.monotonic()
    with Live(stream=unread[0]) as live:
        live.start({"updates": 9})
        for number in range(300):
            live.note("x" * 300)
            live.update({"update": number})
        live.end({"reason": "done"})
    assert time.monotonic() - started < 10
    assert live.trouble == ""


class TestTheCommand:
    @pytest.mark.parametrize(
        ("shell", "code", "out", "err"),
        [
            ("{} | head -n 1; exit ${{PIPESTATUS[0]}}", 0, "# Settings\n", ""),
            (
                f"{HELP} > /dev/full",
                1,
                "",
                "standard output takes nothing any more (No space left on device)",
            ),
            ("{} >&- 2>&- <&-", 0, "", ""),
            ("{}x 2>&1 | head -n 1; exit ${{PIPESTATUS[0]}}", 2, "error\n", ""),
        ],
    )
    def test_exits_as_its_work_went(self, shell, code, out, err):
        buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
        done = subprocess.run(
            ["bash", "-c", shell.format(SETTINGS)],
            cwd=ROOT,
            env=buffered,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert (done.returncode, done.stdout) == (code, out)
        assert err in done.stderr if err else done.stderr == ""

    def test_a_descriptor_closed_at_start_is_not_the_next_files(self, tmp_path):
        program = (
            "import os, repsft_fast.report.stream as s\nwith s.standing():\n   "
            f" print(os.open({str(tmp_path / 'mine')!r}, os.O_CREAT | os.O_WRONLY), file=open('/dev/fd/9',"
            " 'w'))"
        )
        read, write = os.pipe()
        shell = f'"{sys.executable}" -c "$0" <&- >&- 2>&- 9>&{write}'
        subprocess.run(["bash", "-c", shell, program], cwd=ROOT, pass_fds=[write], timeout=60, check=True)
        os.close(write)
        with open(read) as answer:
            assert int(answer.read()) > 2

    def test_what_is_there_to_print_and_could_not_is_an_error_and_a_run_is_not(self, monkeypatch, capsys):
        for arguments, code in (
            (["doctor"], 1),
            (["train", "--dry-run"], 1),
            (["train"], 0),
            (["msft"], 0),
            (["export", "x"], 0),
        ):
            monkeypatch.setattr(cli, "run", lambda _: print("it works", flush=True) or 0)
            monkeypatch.setattr(sys, "stdout", Broken(OSError(28, "No space left on device")))
            assert cli.main(arguments) == code, arguments
            assert ("what was asked for is not all there" in capsys.readouterr().err) == bool(code)

    def test_streams_are_put_back(self, monkeypatch):
        before = sys.stdout, sys.stderr
        seen = []
        monkeypatch.setattr(cli, "run", lambda _: seen.append(sys.stdout) or 0)
        cli.main(["doctor"])
        assert isinstance(seen[0], streams.Stream)
        assert (sys.stdout, sys.stderr) == before

    @pytest.mark.parametrize("words", ["\x1b]8;;http://x\x07 \u202e", "plain"])
    def test_a_librarys_last_words_and_a_bugs_traceback_are_shown_and_not_obeyed(
        self, monkeypatch, capsys, words
    ):
        def leaves(_):
            sys.exit(words)

        monkeypatch.setattr(cli, "run", leaves)
        assert cli.main(["doctor"]) == 1
        said = capsys.readouterr().err
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)

        def breaks(_):
            raise ZeroDivisionError(words)

        monkeypatch.setattr(cli, "run", breaks)
        with pytest.raises(ZeroDivisionError) as caught:
            cli.main(["doctor"])
        sys.excepthook(caught.type, caught.value, caught.tb)
        said += capsys.readouterr().err
        assert "Traceback" in said
        assert "\x1b" not in said
        assert "\u202e" not in said
        assert said.count(words if words == "plain" else "\\x1b]8;;http://x\\x07 \\u202e") == 2
