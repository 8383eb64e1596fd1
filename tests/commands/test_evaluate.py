"""`repsft eval` on a tiny trained model: its table and files, going on after a kill, refusals."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from repsft_fast import cli, train
from repsft_fast.commands import evaluate
from repsft_fast.evaluate import decode, vllm_child
from tests.helpers import ranks, spelling


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(the run's folder, its settings): a model that knows six of eight words."""
    made = spelling.settings(tmp_path_factory.mktemp("spelling"))
    torch.manual_seed(0)
    result = train(made)
    assert result.token_accuracy == 1.0
    return Path(made["run"]["folder"]), made


def evaluated(run, tmp_path, *flags, tasks=None):
    """The exit code; the results, None where there are none."""
    folder, made = run
    tasks = json.dumps(spelling.tasks(made) if tasks is None else tasks)
    code = cli.main(["eval", str(folder), "--tasks", tasks, "--to", str(tmp_path / "out"), *flags])
    file = tmp_path / "out" / "results.json"
    return code, json.loads(file.read_text()) if file.exists() else None


def lines(tmp_path, model="model", task="words"):
    text = (tmp_path / "out" / model / f"{task}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_the_table_and_the_files_say_the_same(run, tmp_path, capsys):
    code, results = evaluated(run, tmp_path)
    assert code == 0
    words, choice = (results["model"]["tasks"][name] for name in ("words", "choice"))
    assert words["acc"]["value"] == spelling.TRAINED / len(spelling.WORDS)
    verdicts = [line["verdict"] for line in lines(tmp_path)[1:]]
    assert verdicts.count("right") == spelling.TRAINED
    assert words["lengths"]["replies"] == len(verdicts) == 8
    assert choice["problems"] == 3
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if line.startswith("words"))
    assert "75.0 %" in row
    assert f"{100 * choice['accuracy']['value']:.1f} %" in printed
    assert "in brackets: 95 % intervals over problems" in printed


def test_several_replies_are_drawn_at_the_papers_temperature(run, tmp_path, capsys):
    _, results = evaluated(run, tmp_path, "--replies", "4")
    words = results["model"]["tasks"]["words"]
    assert words["sampling"] == {"n": 4, "temperature": 0.6, "top_p": 0.95, "max_tokens": 8, "seed": 1}
    assert set(words["pass_at"]) == set(words["first"]) == {"1", "2", "4"}
    assert len(lines(tmp_path)) == 1 + 8 * 4
    assert "choice: compares choices by likelihood" in capsys.readouterr().out


def test_an_evaluation_that_was_killed_goes_on_with_what_is_missing(run, tmp_path, monkeypatch):
    _, whole = evaluated(run, tmp_path, "--replies", "3")
    file = tmp_path / "out" / "model" / "words.jsonl"
    data, results = file.read_bytes(), whole["model"]["tasks"]["words"]
    file.write_bytes(data[: len(data) // 2])
    kept = data[: len(data) // 2].count(b"\n") - 1
    asked, generate = [], decode.Loop.generate

    def counted(self, requests, *arguments, **more):
        asked.extend(requests)
        generate(self, requests, *arguments, **more)

    monkeypatch.setattr(decode.Loop, "generate", counted)
    _, again = evaluated(run, tmp_path, "--replies", "3")
    assert len(asked) == 8 * 3 - kept
    texts = [line["text"] for line in lines(tmp_path)[1:]]
    assert texts == [json.loads(line)["text"] for line in data.splitlines()[1:]]
    same = {
        name: value
        for name, value in results.items()
        if name not in ("seconds", "generated_tokens", "entropy")
    }
    assert {name: again["model"]["tasks"]["words"][name] for name in same} == same
    asked.clear()
    evaluated(run, tmp_path, "--replies", "5")  # more of each go on from fewer
    assert {request.draw for request in asked} == {3, 4}


def test_kill_9_while_it_generates(run, tmp_path):
    folder, made = run
    command = [
        sys.executable, "-c", "from tests.commands.test_evaluate import killed; killed()", str(folder),
        json.dumps(spelling.tasks(made)), str(tmp_path / "out"),
    ]  # fmt: skip
    assert subprocess.run(command, cwd=Path(__file__).parents[2]).returncode == -9
    assert len(lines(tmp_path)) == 1 + 3
    code, results = evaluated(run, tmp_path)
    assert code == 0
    assert results["model"]["tasks"]["words"]["acc"]["value"] == 0.75
    assert len(lines(tmp_path)) == 1 + 8


def killed():
    """`repsft eval` that is killed behind its third reply."""
    import signal

    from repsft_fast.evaluate.record import Record

    add, folder, tasks, out = Record.add, *sys.argv[1:]

    def adding(self, *given):
        add(self, *given)
        if len(self.known) == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    Record.add = adding
    cli.main(["eval", folder, "--tasks", tasks, "--to", out, "--evaluate.batch_replies", "2"])


def test_replies_of_another_evaluation_are_not_taken_for_these(run, tmp_path, capsys):
    evaluated(run, tmp_path)
    before = lines(tmp_path)
    code, _ = evaluated(run, tmp_path, "--temperature", "0.5")
    assert code == 2
    said = capsys.readouterr().err
    assert "holds replies of another evaluation: temperature differs" in said
    assert "give another folder" in said
    assert lines(tmp_path) == before


def on_ranks(world, folder, tasks, rows, out):
    return cli.main(["eval", folder, "--tasks", tasks, "--rows", rows, "--replies", "2", "--to", out])


def test_ranks_share_the_prompts_and_find_what_one_finds(run, tmp_path):
    folder, made = run
    tasks, rows = json.dumps(spelling.tasks(made)), made["data"]["train"]
    found = []
    for name, size in (("two", 2), ("alone", 1), ("three", 3)):
        out = str(tmp_path / name)
        assert ranks.run_ranks(on_ranks, str(folder), tasks, rows, out, size=size) == [0] * size
        results = json.loads(Path(out, "results.json").read_text())
        texts = (Path(out) / "model" / "words.jsonl").read_text().splitlines()
        replies = [
            [json.loads(line)[key] for key in ("prompt", "draw", "ids", "verdict")] for line in texts[1:]
        ]
        assert results["ranks"] == size
        scores = results["model"]["tasks"]
        found.append((replies, scores["words"]["acc"], scores["words"]["pass_at"], scores["choice"]["accuracy"],
                      results["model"]["rows"]["loss"]))  # fmt: skip
        assert sorted(p.name for p in (Path(out) / "model").iterdir()) == ["words.jsonl"]
    assert found[0] == found[1] == found[2]


def test_ranks_go_on_from_what_any_of_them_had(run, tmp_path):
    folder, made = run
    tasks, rows = json.dumps(spelling.tasks(made)), made["data"]["train"]
    given = (str(folder), tasks, rows, str(tmp_path / "out"))
    ranks.run_ranks(on_ranks, *given)
    before = lines(tmp_path)
    assert ranks.run_ranks(on_ranks_that_generate_nothing, *given) == [0, 0]
    assert lines(tmp_path) == before


def test_fewer_ranks_go_on_from_the_files_of_more(run, tmp_path, monkeypatch):
    """Killed on three ranks, each of which had written its share."""
    evaluated(run, tmp_path, "--replies", "2")
    file = tmp_path / "out" / "model" / "words.jsonl"
    header, *replies = file.read_text().splitlines(keepends=True)
    for rank in range(3):
        name = "words.jsonl" if rank == 0 else f"words.rank{rank}.jsonl"
        file.with_name(name).write_text(header + "".join(replies[rank::3]))

    def fail(self, requests, *_, **__):
        raise AssertionError(f"{len(requests)} replies are asked again")

    monkeypatch.setattr(decode.Loop, "generate", fail)
    assert evaluated(run, tmp_path, "--replies", "2")[0] == 0
    assert [path.name for path in file.parent.iterdir()] == ["words.jsonl"]
    assert file.read_text() == "".join([header, *replies])


def on_ranks_that_generate_nothing(world, *given):
    def fail(self, requests, *_, **__):
        raise AssertionError(f"{len(requests)} replies are asked again")

    decode.Loop.generate = fail
    return on_ranks(world, *given)


def test_a_base_stands_beside_it_with_differences(run, tmp_path, capsys):
    _, made = run
    torch.manual_seed(1)
    other = train(made, {"run.folder": str(tmp_path / "other"), "budget.epochs": 1})
    code, results = evaluated(run, tmp_path, "--base", str(other.folder))
    assert code == 0
    mine, theirs = (results[name]["tasks"]["words"]["acc"]["value"] for name in ("model", "base"))
    assert results["differences"]["words"]["value"] == pytest.approx(mine - theirs)
    assert f"words: model − base {100 * (mine - theirs):+.1f} points" in capsys.readouterr().out
    assert len(lines(tmp_path, "base")) == 9


def test_rows_are_scored_without_generating(run, tmp_path, capsys):
    folder, made = run
    code = cli.main(["eval", str(folder), "--rows", made["data"]["train"], "--to", str(tmp_path / "out")])
    assert code == 0
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["model"]["rows"]
    assert (rows["samples"], rows["token_accuracy"], rows["exact_match"]) == (6, 1.0, 1.0)
    assert {"loss", "entropy", "top1_probability", "margin"} <= rows.keys()
    assert "token accuracy" in capsys.readouterr().out


def test_as_json_nothing_else_is_on_standard_output(run, tmp_path, capsys):
    _, results = evaluated(run, tmp_path, "--json")
    assert json.loads(capsys.readouterr().out) == results


def test_a_runs_own_tasks_are_asked_where_none_are_named(run, tmp_path):
    _, made = run
    folder = tmp_path / "run"
    train(made, {"run.folder": str(folder), "budget.epochs": 1, "evaluate.tasks": spelling.tasks(made)})
    assert cli.main(["eval", str(folder), "--to", str(tmp_path / "out")]) == 0
    assert set(json.loads((tmp_path / "out" / "results.json").read_text())["model"]["tasks"]) == {
        "words",
        "choice",
    }


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "--tasks: nothing is asked; name a task"),
        (["--tasks", "{x: {source: none.jsonl}}"], "none.jsonl"),
        (["--tasks", "{x: {source: none.jsonl, n: 2, temperature: 0}}"], "one reply 2 times"),
        (["--tasks", "none.jsonl", "--replies", "0"], "evaluate.tasks [none.n]: cannot be used"),
        (["--tasks", "none.jsonl", "--replies", "two"], "--replies: cannot be used"),
        (["--tasks", "none.jsonl", "--engine", "fast"], "evaluate.engine: cannot be used"),
        (["--tasks", "none.jsonl", "--base", "auto"], "--base: the run began with random weights"),
        (["--rows", "{}"], "--rows: names no source"),
        (["--taks", "x"], "--taks is not an option; did you mean --tasks?"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_refused(run, tmp_path, capsys, flags, words):
    code = cli.main(["eval", str(run[0]), "--to", str(tmp_path / "out"), *flags])
    assert code in (1, 2)
    assert words in capsys.readouterr().err.replace("\n    ", " ")
    assert not (tmp_path / "out" / "results.json").exists()


def test_a_folder_without_a_model_is_refused(tmp_path, capsys):
    assert (
        cli.main(["eval", str(tmp_path / "none"), "--tasks", "a.jsonl", "--to", str(tmp_path / "out")]) == 2
    )


STANDIN = Path(__file__).parents[1] / "helpers" / "vllm_standin"


class TestVllm:
    """Before the stand-in: its replies are made up, its log-probabilities too."""

    @pytest.fixture(autouse=True)
    def standin(self, monkeypatch):
        monkeypatch.setenv("PYTHONPATH", f"{STANDIN}{os.pathsep}{Path(__file__).parents[2]}")

    def test_one_that_holds_other_weights_is_refused_with_both_numbers(self, run, tmp_path, capsys):
        code, results = evaluated(run, tmp_path, "--engine", "vllm")
        assert code == 2
        assert results is None
        said = " ".join(capsys.readouterr().err.split())
        assert "engine vllm: does not compute with this model's weights" in said
        assert re.search(r"is -\d+\.\d+ there and -\d+\.\d+ here", said)

    def test_one_that_passes_the_probe_answers_and_its_entropies_are_ours(
        self, run, tmp_path, monkeypatch, capsys
    ):
        monkeypatch.setattr(vllm_child, "check_identity", lambda *_: (0.0, 0.0))
        code, results = evaluated(run, tmp_path, "--engine", "vllm")
        assert code == 0
        assert results["model"]["engine"] == "vllm"
        assert all(line["entropy"] > 0 for line in lines(tmp_path)[1:] if line["ids"])
        assert "never tried on a real engine" in capsys.readouterr().out


def test_a_runs_model_that_is_asked_in_another_form_than_it_learned_says_so(run, tmp_path, capsys):
    """The run was trained on texts without a template; a task is a chat unless it says otherwise."""
    _, made = run
    evaluated(run, tmp_path, tasks={"words": spelling.tasks(made, chat=True)["words"]})
    said = capsys.readouterr().out
    assert "is asked in another form than it learns (evaluate.tasks [words.chat])" in said
    evaluated(run, tmp_path / "text")
    assert "another form" not in capsys.readouterr().out


def test_what_flags_cannot_be_is_said_without_how_they_were_merged(run, tmp_path, capsys):
    assert evaluated(run, tmp_path, "--max-tokens", "0")[0] == 2
    said = capsys.readouterr().err
    assert "evaluate.tasks: cannot be used, expected greater than or equal to 1, got 0" in said
    assert "overrides" not in said


def test_lm_evals_own_tasks_stand_below_the_table_and_in_the_results(run, tmp_path, monkeypatch, capsys):
    asked = []

    def harness(model, tokenizer, tasks, **how):
        asked.append((tasks, how))
        metrics = {"acc": {"value": 0.25, "stderr": 0.125, "higher_is_better": True}}
        return {"lm_eval": "0.4.13", "tasks": {tasks[0]: {"version": 1, "samples": 4, "metrics": metrics}}}

    monkeypatch.setattr(evaluate, "run_lm_eval", harness)
    tasks = {"facts": {"source": "arc_easy", "layout": "lm_eval", "limit": 4}}
    code, results = evaluated(run, tmp_path, tasks=tasks)
    assert code == 0
    assert asked == [(["arc_easy"], {"limit": 4, "batch_size": 32, "where": "evaluate.tasks [facts]"})]
    assert results["model"]["lm_eval"]["facts"]["tasks"]["arc_easy"]["metrics"]["acc"]["value"] == 0.25
    assert "facts: lm-eval 0.4.13 arc_easy acc 0.250 ± 0.125 (standard error)" in capsys.readouterr().out
