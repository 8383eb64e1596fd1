"""What is seen while a model answers: a line every half minute where there is no terminal."""

from repsft_fast.commands import evaluate_progress
from repsft_fast.commands.evaluate_progress import EVERY_S, Progress
from repsft_fast.evaluate.asked import Generation, Request


def told(progress, count, tokens, finished=True):
    for number in range(count):
        progress.told(Request(number, 0, (1,)), Generation([5] * tokens, finished))


def test_the_line_counts_replies_tokens_and_what_is_left(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(evaluate_progress.time, "monotonic", lambda: now[0])
    with Progress() as progress:
        progress.begin("model: gsm\x1b[2J", 200)
        told(progress, 49, 100)
        assert capsys.readouterr().err == ""  # not yet
        now[0] += EVERY_S + 10
        told(progress, 1, 100, finished=False)
    expected = "model: gsm\\x1b[2J  50/200 replies  49 ended  5,000 tokens  125 tok/s  about 2:00 left\n"
    assert capsys.readouterr().err == expected


def test_ranks_that_do_not_tell_print_nothing(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(evaluate_progress.time, "monotonic", lambda: now[0])
    with Progress(enabled=False) as progress:
        progress.begin("x", 1)
        now[0] += 1000
        told(progress, 1, 1)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
