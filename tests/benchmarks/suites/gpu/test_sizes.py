"""Part D: the other sizes with C's fastest layers, as far as time and memory allow, and what is said where
they do not."""

import time
from types import SimpleNamespace

import pytest

from benchmarks.suites.gpu import goals, sizes, step, training
from benchmarks.suites.gpu import session as session_module
from benchmarks.suites.gpu.session import LEFT_OUT, RECORDS, read_lines
from tests.benchmarks.suites.gpu.toys import fed, session_at
from tests.benchmarks.suites.gpu.workers import Here, without_processes


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("D")
    with pytest.MonkeyPatch.context() as monkeypatch:
        without_processes(monkeypatch, Here)
        sizes.run(session_at(folder, "D"))
    return folder


def of_part_c(session, variant, row_ms, until_s, **more):
    """A record as C leaves it."""
    made = {"row_ms": row_ms, "until_s": until_s, **more}
    session.record(
        "update", variant, [2 * row_ms], {"model": step.MODEL, "rows": 2}, dtype="bfloat16", **made
    )


def asked(tmp_path, monkeypatch, *, left_s=300.0, red=(), memory=80e9, records=(), spent_s=0.0):
    """(name, variant, rows, limit) of what is measured, as on a GPU."""
    seen = []

    class Told(Here):
        def measure(self, session, wanted, limit_s):
            seen.append((wanted.name, wanted.variant, wanted.row_tokens, limit_s))
            session.ends -= spent_s
            return True

    before = session_at(tmp_path, "C")
    before.rehearsal = False
    for record in records:
        of_part_c(before, *record)
    without_processes(monkeypatch, Told)
    monkeypatch.setattr(step, "memory_bytes", lambda session: int(memory))
    # points alone take time
    monkeypatch.setattr(session_module, "time", SimpleNamespace(monotonic=lambda: 0.0))
    session = session_at(tmp_path, "D")
    session.rehearsal, session.red, session.ends = False, frozenset(red), left_s
    sizes.run(session)
    return seen


class TestPart:
    def test_every_goal_is_fed_and_nothing_is_left_out(self, rehearsed):
        assert [name for name, value in fed(sizes.GOALS, rehearsed).items() if value is None] == []
        assert read_lines(rehearsed / LEFT_OUT) == []

    def test_goals_read_their_own_model_and_rows(self, rehearsed):
        read = fed(sizes.GOALS, rehearsed)
        for name, _, row_tokens, *_ in sizes.POINTS:
            (record,) = (
                r
                for r in read_lines(rehearsed / RECORDS)
                if r["op"] == "update" and r["shape"]["model"] == name
            )
            assert record["shape"]["row_tokens"] == row_tokens // 64
            assert read[f"{name}: ms a row"] == record["row_ms"]
            assert record["tokens_per_s"] == pytest.approx(1e3 * (row_tokens // 64) / record["row_ms"])
        kernels = {
            r["shape"]["model"] for r in read_lines(rehearsed / RECORDS) if r["op"] == "kernels of an update"
        }
        assert kernels == {sizes.SMALL, sizes.LARGE}

    def test_goals_follow_the_fastest_layers_of_a_point(self, tmp_path):
        session = session_at(tmp_path, "D")
        for variant, row_ms in (("plain", 9.0), ("liger", 5.0), ("compiled", 7.0)):
            shape = {"model": sizes.SMALL}
            session.record("update", variant, [2 * row_ms], shape, dtype="bfloat16", row_ms=row_ms)
            session.record("host of an update", variant, [1.0], shape, dtype="bfloat16", row_ms=row_ms / 2)
        read = fed(sizes.GOALS, tmp_path)
        assert (read[f"{sizes.SMALL}: ms a row"], read[f"{sizes.SMALL}: host ms a row"]) == (5.0, 2.5)

    def test_predictions_are_for_known_cards_only(self):
        for goal in sizes.GOALS:
            assert goal.predicted is None or goal.predicted(goals.Card("a card", {})) is None
            assert goal.predicted is None or goal.predicted(goals.Card("NVIDIA H200", {})) > 0


class TestWhichLayers:
    def test_plain_ones_where_c_has_measured_nothing(self, tmp_path, monkeypatch):
        seen = asked(tmp_path, monkeypatch)
        assert [(name, variant, rows) for name, variant, rows, _ in seen] == [
            (sizes.SMALL, "plain", 8192), (sizes.LARGE, "plain", 8192), (sizes.SHORT, "plain", 4096),
        ]  # fmt: skip

    def test_the_fastest_of_c_where_they_take_no_longer_than_there_is_time(self, tmp_path, monkeypatch):
        records = [("plain", 160.0, 15.0), ("liger", 100.0, 12.0), ("compiled", 90.0, 45.0)]
        seen = asked(tmp_path, monkeypatch, left_s=300, records=records)
        assert [variant for _, variant, *_ in seen] == ["compiled"] * 3
        assert read_lines(tmp_path / LEFT_OUT) == []

    def test_the_next_ones_where_a_compiler_would_cost_the_other_points(self, tmp_path, monkeypatch):
        records = [("plain", 160.0, 15.0), ("liger", 100.0, 12.0), ("compiled", 90.0, 45.0)]
        seen = asked(tmp_path, monkeypatch, left_s=70, records=records, spent_s=12)
        assert [variant for _, variant, *_ in seen] == ["liger", "liger", "compiled"], (
            "the last one has the rest"
        )
        whats = [line["what"] for line in read_lines(tmp_path / LEFT_OUT)]
        assert whats == [f"{sizes.SMALL}, layers compiled", f"{sizes.LARGE}, layers compiled"]
        assert all(limit < 70 for *_, limit in seen)

    def test_records_of_another_card_or_a_rehearsal_say_nothing(self, tmp_path):
        session = session_at(tmp_path, "C")
        of_part_c(session, "liger", 1.0, 1.0)
        session.rehearsal = False
        of_part_c(session, "compiled", 1.0, 1.0, device="another")
        of_part_c(session, "plain", 9.0, 3.0)
        session.part = "E"
        of_part_c(session, "liger", 1.0, 1.0)
        assert sizes.ways_of(session) == [sizes.Way("plain", 3.0)]

    def test_a_red_compiler_takes_its_layers_out_and_no_others(self, tmp_path, monkeypatch):
        records = [("liger", 100.0, 12.0), ("compiled", 90.0, 14.0)]
        red = {("compile", "float32")}  # of the dtype that is trained in here
        assert [v for _, v, *_ in asked(tmp_path, monkeypatch, records=records, red=red)] == ["liger"] * 3
        assert asked(tmp_path, monkeypatch, records=records, red={("attention", "float32")}) == []

    def test_what_comes_too_late_is_named_and_what_still_fits_is_measured(self, tmp_path, monkeypatch):
        seen = asked(tmp_path, monkeypatch, left_s=19, records=[("plain", 160.0, 16.0)])
        assert [name for name, *_ in seen] == [sizes.SMALL, sizes.SHORT]
        assert any(line["what"] == f"an update of {sizes.LARGE}" for line in read_lines(tmp_path / LEFT_OUT))


class TestMemory:
    def test_a_model_that_does_not_fit_is_refused_by_name_and_the_others_are_measured(
        self, tmp_path, monkeypatch
    ):
        seen = asked(tmp_path, monkeypatch, memory=40e9)
        assert [name for name, *_ in seen] == [sizes.SMALL, sizes.SHORT]
        (line,) = read_lines(tmp_path / LEFT_OUT)
        assert line["what"] == f"an update of {sizes.LARGE}"
        assert "rows of 8,192 do not fit 40 GB" in line["why"]
        assert "31 GB" in line["why"]

    def test_the_true_models_are_the_published_ones(self):
        small, large = (
            training.point("x", model, "plain", 8192, toy=False) for model in ("SmolLM2-135M", "Qwen3-1.7B")
        )
        names = (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
        )
        assert [small.config[n] for n in names] == [576, 1536, 30, 9, 3]
        assert small.config["rope_theta"] == 1e5
        assert [large.config[n] for n in names] == [2048, 6144, 28, 16, 8]
        assert (small.config["vocab_size"], large.config["vocab_size"], large.config["head_dim"]) == (
            49152,
            151936,
            128,
        )


class TestErrors:
    def test_a_point_that_raises_is_named_and_the_next_ones_are_measured(self, tmp_path, monkeypatch):
        real = step.size_of

        def breaks(point):
            if point.name == sizes.SMALL:
                raise RuntimeError("no sizing")
            return real(point)

        monkeypatch.setattr(step, "size_of", breaks)
        began = time.monotonic()
        seen = asked(tmp_path, monkeypatch)
        assert [name for name, *_ in seen] == [sizes.LARGE, sizes.SHORT]
        assert [line["why"] for line in read_lines(tmp_path / LEFT_OUT)] == ["RuntimeError: no sizing"]
        assert time.monotonic() - began < 60
