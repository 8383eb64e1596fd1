"""Goals read the records: met, missed, open and measured are told apart."""

import pytest

from benchmarks.suites.gpu import goals


class TestTable:
    def record(self, implementation, p50, **shape):
        return {"op": "head", "implementation": implementation, "p50_ms": p50, "shape": shape, "mfu": 0.4}

    def test_records_are_found_by_shape_and_field_and_the_newest_counts(self):
        found = goals.Found(
            [self.record("a", 5.0, N=1), self.record("a", 4.0, N=1), self.record("b", 2.0, N=1)]
        )
        assert found.ratio("head", "a", "b", N=1) == 2.0
        assert found.p50("head", "a", N=2) is None
        assert found.value("head", "b", "mfu", N=1) == 0.4
        assert found.value("head", "b", "none") is None
        assert found.ratio("head", "a", "c") is None

    def test_met_missed_open_and_measured_are_told_apart(self):
        found = goals.Found([self.record("a", 4.0), self.record("b", 2.0)])
        card = goals.Card("NVIDIA H100 80GB HBM3", {"bytes_per_s": 3e12, "flops_per_s": 8e14})

        def ratio(found):
            return found.ratio("head", "a", "b")

        asked = [
            ("F", goals.Goal("met", ratio, most=2.0)),
            ("F", goals.Goal("missed", ratio, least=2.5, predicted=lambda card: card.of_kind(H100=3.0))),
            (
                "F",
                goals.Goal("open", lambda found: None, most=1.0, predicted=lambda card: card.bytes_ms(3e9)),
            ),
            ("F", goals.Goal("known", ratio, predicted=lambda card: card.of_kind(H200=9.0))),
        ]
        head, *lines = goals.table(asked, found, card)
        assert "predicted" in head
        assert [line.split()[-1] for line in lines] == ["met", "MISSED", "open", "measured"]
        assert lines[1].split()[-3:-1] == ["2", "3"]
        assert lines[2].split()[-3:-1] == ["-", "1"]
        assert lines[3].split()[-2] == "-"  # nothing was predicted for this card

    @pytest.mark.parametrize(("bound", "value"), [("least", 0.5), ("most", -0.5)])
    def test_a_strict_goal_is_missed_on_its_bound(self, bound, value):
        strict, plain = (goals.Goal("g", lambda f: None, strict=s, **{bound: 0.0}) for s in (True, False))
        assert [goal.verdict(0.0) for goal in (strict, plain)] == ["MISSED", "met"]
        assert [goal.verdict(value) for goal in (strict, plain)] == ["met", "met"]
        assert [goal.verdict(-value) for goal in (strict, plain)] == ["MISSED", "MISSED"]
        assert [goal.aim for goal in (strict, plain)] == [
            {"least": "> 0", "most": "< 0"}[bound], {"least": "≥ 0", "most": "≤ 0"}[bound]
        ]  # fmt: skip
