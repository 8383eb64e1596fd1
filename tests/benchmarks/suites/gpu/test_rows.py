"""Part H in rehearsal: masked and memorised rows are what they are called."""

import pytest

from benchmarks.harness import cases, peers
from benchmarks.suites.gpu import goals, heads, rows
from benchmarks.suites.gpu.session import RECORDS, read_lines
from tests.benchmarks.suites.gpu.toys import fail_check, fed, session_at

H100 = goals.Card("NVIDIA H100 80GB HBM3", {"bytes_per_s": 3.0e12, "flops_per_s": 790e12})


class TestRows:
    def test_every_goal_is_fed(self, tmp_path, monkeypatch):
        monkeypatch.setattr(rows, "INTERPRETED", heads.Point(heads.LLAMA, 64, 32, 999))
        session = session_at(tmp_path, "H")
        rows.run(session)
        assert [name for name, value in fed(rows.GOALS, tmp_path).items() if value is None] == [
            "90 % masked: ours / bare GEMMs"
        ]

    @pytest.mark.parametrize("share", [0.0, 0.5, 0.8, 0.95])
    def test_memorised_rows_are_below_the_threshold_and_the_others_are_not(self, share):
        hidden, head, targets = cases.head_operands(200, 64, 1000)
        peaked = rows.memorise(hidden, head, targets, share)
        p = (peaked @ head.T).softmax(-1).gather(1, targets[:, None])[:, 0]
        assert int((1 - p < rows.SKIP_BELOW).sum()) == round(share * 200)
        assert rows.guessed(share) >= 1 - share

    def test_masked_operands_have_the_share_asked_for(self):
        _, _, targets = cases.head_operands(200, 8, 100, masked=0.9)
        assert int((targets == peers.IGNORE).sum()) == 180

    def test_a_red_check_of_kept_rows_leaves_the_masked_ones(self, tmp_path, monkeypatch):
        fail_check(tmp_path, "kept rows")
        rows.run(session_at(tmp_path, "H"))
        measured = {record["op"] for record in read_lines(tmp_path / RECORDS)}
        assert measured == {rows.MASKED}

    def test_the_prediction_of_skipping_is_between_dense_and_a_perfect_guess(self):
        assert 1.8 < rows._skipped_floor(H100) < 6 / 2.8
