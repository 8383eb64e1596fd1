"""A finished run's folder, read for a comparison, and folders that are none."""

import os

import pytest

from repsft_fast.errors import ConfigError
from repsft_fast.report import finished
from tests.helpers.finished_runs import write_run


def read(folder, metric=None, pool=None):
    run = finished.read(folder)
    return finished.finished(run, run.scored(metric, pool))


def test_a_mixtures_test_rows_are_its_score(tmp_path):
    run = read(write_run(tmp_path / "r", 3, 0.5))
    assert (run.seed, run.score, run.rows, run.tokens) == (3, 0.5, {"a": 40, "b": 40}, 3000)
    assert (run.gross, run.net) == (9e9, 4e9)
    assert read(tmp_path / "r", "loss").score == 0.5
    assert read(tmp_path / "r", "exact_match", "tasks").score == pytest.approx(0.55)


def test_without_test_rows_the_validation_of_the_result_is(tmp_path):
    folder = write_run(tmp_path / "r", 1, None)
    assert finished.read(folder).scored(None, None).words == "validation exact match"
    assert read(folder).score == 0.75
    assert read(folder, None, "tasks").score == pytest.approx(0.8)
    by_loss = write_run(tmp_path / "n", 1, None, metric="nll")
    assert finished.read(by_loss).scored(None, None).words == "validation nll"
    assert read(by_loss).score == -0.75, "lower is better"
    assert read(by_loss, "loss").score == 0.25, "over tokens, as plain runs have it"
    with pytest.raises(ConfigError, match="has no validation token accuracy; choose another"):
        read(folder, "token_accuracy")


def test_a_plain_run_is_compared_by_its_loss(tmp_path):
    run = read(write_run(tmp_path / "r", 1, 0.9, policy=None))
    assert (run.score, run.tokens, run.gross) == (pytest.approx(0.1), 2000, None)
    assert read(write_run(tmp_path / "v", 1, None, policy=None)).score == 0.25
    assert finished.read(tmp_path / "r").scored("exact_match", "tasks").words == (
        "test exact match, mean over tasks"
    )


def test_folders_of_runs_are_found(tmp_path):
    for name in ("b/2", "b/1", "a"):
        write_run(tmp_path / name, 1)
    write_run(tmp_path / "1/2/3/4/too-deep", 1)
    write_run(tmp_path / ".hidden", 1)
    (tmp_path / "c").symlink_to(tmp_path / "a")
    found = [str(path.relative_to(tmp_path)) for path in finished.runs_below(tmp_path)]
    assert found == ["a", "b/1", "b/2"]
    assert finished.runs_below(tmp_path / "a") == [tmp_path / "a"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="is no run and holds none"):
        finished.runs_below(tmp_path / "empty")
    with pytest.raises(ConfigError, match="there is no such folder"):
        finished.runs_below(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"run.yaml: is no folder"):
        finished.runs_below(tmp_path / "a" / "run.yaml")


def test_unfinished_and_damaged_runs_are_refused(tmp_path):
    folder = write_run(tmp_path / "r", 1, code="terminated")
    with pytest.raises(
        ConfigError, match=r"is no finished run, expected one that ended by its rule .*, got terminated"
    ):
        finished.read(folder)
    (folder / "result.json").unlink()
    with pytest.raises(ConfigError, match=r"it holds no result.json; let it end"):
        finished.read(folder)
    other = write_run(tmp_path / "o", 1)
    for text in ("- a", "run: [", "run: 3"):
        (other / "run.yaml").write_text(text)
        with pytest.raises(ConfigError, match=r"run.yaml: cannot be read"):
            finished.read(other)
    (other / "run.yaml").unlink()
    os.mkfifo(other / "run.yaml")
    with pytest.raises(ConfigError, match=r"run.yaml: cannot be read"):
        finished.read(other)
    (other / "result.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"result.json: cannot be read"):
        finished.read(other)


def test_test_rows_and_none_cannot_be_compared(tmp_path):
    run = finished.read(write_run(tmp_path / "r", 1))
    with pytest.raises(ConfigError, match="has test rows, the others have none"):
        finished.finished(run, finished.Scored("exact_match", "items", False))


def test_answer_and_nll_are_the_pooled_scores_of_runs_that_decided_by_them(tmp_path):
    assert read(write_run(tmp_path / "r", 1, 0.5, metric="answer")).score == 0.5
    assert read(write_run(tmp_path / "n", 1, 0.5, metric="nll")).score == -0.5
    other = write_run(tmp_path / "o", 1)
    for metric in ("answer", "nll"):
        with pytest.raises(ConfigError, match=f"has no test {metric}"):
            read(other, metric)


def test_a_mean_over_tasks_is_not_taken_for_one_over_rows(tmp_path):
    tested = write_run(tmp_path / "t", 1, 0.5, metric="answer", pool="tasks")
    validated = write_run(tmp_path / "v", 1, None, pool="tasks")
    for folder in (tested, validated):
        assert finished.read(folder).scored(None, None).pool == "tasks"
        with pytest.raises(ConfigError, match=r"has no (test answer|validation exact match); choose another"):
            read(folder, None, "items")
    assert read(validated).score == pytest.approx(0.8)
