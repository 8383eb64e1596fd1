"""What the study of single rows' noise counts."""

import numpy as np
import pytest

from benchmarks.studies import item_noise
from repsft_fast.policies import History, NewStage, Score


def test_moves_by_hand():
    """Row 0 turns at look 1 and row 1 at look 3."""
    exact = np.array([[0, 0, 1, 1], [1, 0, 1, 1], [1, 0, 1, 1], [1, 1, 1, 1]], float)
    assert [item_noise.moved(exact, lag)[0] for lag in (1, 2, 3)] == [2 / 12, 2 / 8, 2 / 4]
    nll = np.array([[0.0, 0.0], [1.0, 3.0], [5.0, 7.0]])
    # Moves (1, 3) and (4, 4): 1 from their mean, and 0. That the second is larger as a whole counts nowhere.
    assert item_noise.moved(nll, 1)[1] == pytest.approx(0.5**0.5)
    assert item_noise.moved(nll, 2)[1] == 1.0


def test_the_table_names_each_task_and_the_range():
    exact = {"a": np.zeros((17, 4)), "b": np.tile([[0.0, 1.0, 1.0, 1.0]], (17, 1))}
    exact["b"][8:, 3] = 0.0
    nll = {task: np.arange(17.0)[:, None] * [0.0, 0.0, 0.1, 0.1] for task in exact}
    lines = item_noise.table(exact, nll).splitlines()
    assert lines[2] == "| a | 0.000 | 0.000 | 0.0 | 0.0 | 0.0 | 0.050 | 0.200 | 0.800 |"
    assert lines[3] == "| b | 0.750 | 0.500 | 1.6 | 7.7 | 25.0 | 0.050 | 0.200 | 0.800 |"
    assert lines[4].startswith("| all |  |  | 0.0 to 1.6 | 0.0 to 7.7 | 0.0 to 25.0 | 0.050 to 0.050 |")


def test_rows_come_from_the_history_look_by_look():
    history = History.start([("a", 3)])
    history.took(NewStage(None, ("a",)))
    for now, items in enumerate(([0.0, 1.0], [1.0, 1.0])):
        history.tick(now, now / 4, 0)
        history.evaluated(f"m{now}", {"a": Score.of(items)})
    assert item_noise.by_task(History.load(history.values()))["a"].tolist() == [[0.0, 1.0], [1.0, 1.0]]
