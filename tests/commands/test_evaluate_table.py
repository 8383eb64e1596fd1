"""The table of `repsft eval`, from figures that were set by hand."""

from repsft_fast.commands.evaluate_table import lines_of
from repsft_fast.evaluate.asked import Sampling, Task
from repsft_fast.evaluate.scores import Draw, Judged, score
from repsft_fast.suite.results import TaskResult


def result(name, verdicts, *, finished=True, undecided=()):
    """verdicts: of each problem one word a draw: r(ight), w(rong), n(o answer), u(ndecided)."""
    words = {"r": "right", "w": "wrong", "n": "no answer", "u": "undecided"}
    problems = tuple(
        Judged(str(i), tuple(Draw(words[letter], finished, 10, 0.5) for letter in draws))
        for i, draws in enumerate(verdicts)
    )
    task = Task(name, (), sampling=Sampling(n=len(verdicts[0])))
    return TaskResult(task, problems, score(problems), 1.0, 100, undecided=list(undecided))


def row(lines, start):
    return " ".join(next(line for line in lines if line.startswith(start)).split())


def test_one_model_has_a_line_a_task_and_one_of_means():
    lines = lines_of(
        {"model": [result("gsm", ["rw", "ww"]), result("sums\x1b", ["r", "w"])]}, {"model": None}
    )
    assert row(lines, "task") == "task problems Acc@n Pass@n ended Acc if ended no answer tokens entropy"
    assert row(lines, "gsm").startswith("gsm 2 × 2 25.0 % (0.0–50.0) 50.0 % 100.0 % 25.0 % 0 % 10 0.500")
    assert row(lines, "sums").startswith(r"sums\x1b 2 50.0 % (0.0–100.0) 100.0 % 50.0 %")
    assert row(lines, "mean over tasks").startswith("mean over tasks 37.5 %")
    assert "model − base" not in "\n".join(lines)


def test_beside_a_base_every_task_has_its_difference():
    found = {"model": [result("gsm", ["rr", "rr"])], "base": [result("gsm", ["rr", "ww"])]}
    lines = lines_of(found, {"model": None, "base": None})
    assert row(lines, "gsm: ") == "gsm: model − base +50.0 points (+0.0 to +100.0)"
    assert [line.split()[1] for line in lines if line.startswith("gsm  ")] == ["model", "base"]


def test_what_the_figures_do_not_say_is_said_below():
    pair = {"got": "9!", "reference": "1", "why": "late"}
    found = [result("a", ["rn", "rw"], finished=False), result("b", ["u"], undecided=[pair])]
    text = "\n".join(lines_of({"model": found}, {"model": None}))
    assert "2 right answers are in replies that did not end by themselves; Acc@n counts them" in text
    assert "1 pairs of answers could not be decided" in text
    assert "a task of one problem has no interval" in text
    assert row(text.splitlines(), "a ").split("25 %")[0].endswith("0.0 % – ")  # nothing ended: no share of it


def test_rows_stand_in_a_table_of_their_own():
    figures = {"loss": 1.5, "token_accuracy": 0.75, "entropy": 0.4, "top1_probability": 0.8, "margin": 3.0,
               "exact_match": 0.25}  # fmt: skip
    rows = {"samples": 4, **figures, "tasks": {"x": figures | {"loss": 2.5}}}
    lines = lines_of({"model": []}, {"model": rows})
    assert row(lines, "rows") == "rows samples loss token accuracy entropy top-1 margin exact match"
    assert row(lines, "all") == "all 4 1.500 0.7500 0.4000 0.8000 3.000 0.2500"
    assert row(lines, "x").startswith("x 2.500")
