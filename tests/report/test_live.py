"""The live view: calm on a terminal, plain lines without one, nothing where not enabled, no crash over a
missing figure."""

import io
import re

import pytest

from repsft_fast.report.live import Live
from repsft_fast.report.result import RunResult

INFO = {
    "folder": "runs/x",
    "model": "Llama",
    "parameters": 3_200_000,
    "samples": 480,
    "updates": 1200,
    "target": 0.97,
    "device": "cpu",
}
RECORD = {
    "kind": "update", "update": 120, "epoch": 4.0, "loss": 0.2134, "token_accuracy": 0.943, "grad_norm": 0.81, "lr": 1.8e-5,
    "tokens_per_second": 61234.0, "mfu": 0.41, "memory_bytes": 23.1 * 2**30, "data_wait_fraction": 0.003,
}  # fmt: skip
RESULT = RunResult(
    "token_accuracy", "token accuracy 97.21 % ≥ 97 %", "runs/x", 480, 16.0, 0.9721, 142.0, 10**6, 10**5, 42
)


def plain(**settings):
    stream = io.StringIO()
    return Live(stream=stream, terminal=False, **settings), stream


def screen_text(stream):
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())


@pytest.fixture
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "xterm-256color")


class TestWithoutATerminal:
    @pytest.mark.parametrize("more", [{}, {"spike": True}])
    def test_a_refused_update_is_one_skipped(self, more):
        live, stream = plain(every_seconds=0)
        live.start(INFO)
        live.update({**RECORD, "vetoed": True, **more})
        assert "  1 skipped" in stream.getvalue()

    def test_plain_lines_and_no_control_characters(self):
        live, stream = plain(every_seconds=0)
        live.start(INFO)
        live.update(RECORD)
        live.epoch({**RECORD, "kind": "epoch"})
        live.evaluation({"loss": 1.5, "token_accuracy": 0.5, "exact_match": 0.25})
        live.note("3 samples dropped")
        live.end(RESULT)
        text = stream.getvalue()
        assert "\x1b" not in text
        assert "\r" not in text
        for piece in (
            "Llama · 3.2M parameters", "stops at 97.0 %", "94.3 % of 97.0 %", "update 120/1,200", "epoch 4.00",
            "loss 0.213", "grad 0.810", "lr 1.8e-05", "61.2k tok/s", "MFU 41 %", "23.1 GiB", "wait 0.3 %", "exact match 25.0 %",
            "3 samples dropped",
            "✓ token accuracy 97.21 % ≥ 97 %", "480 updates", "2:22", "runs/x",
        ):  # fmt: skip
            assert piece in text, piece

    def test_updates_are_thinned_out_and_epochs_are_not(self):
        live, stream = plain(every_seconds=3600)
        live.start(INFO)
        before = len(stream.getvalue().splitlines())
        for update in range(50):
            live.update({**RECORD, "update": update})
        assert len(stream.getvalue().splitlines()) == before + 1
        live.epoch(RECORD)
        assert len(stream.getvalue().splitlines()) == before + 2

    def test_the_time_left_is_a_bound_where_a_rule_or_a_policy_may_end_the_run(self, monkeypatch):
        now = [0.0]
        monkeypatch.setattr("repsft_fast.report.live.time.monotonic", lambda: now[0])
        for info, words in (
            ({"target": None}, "ETA 1:35"),
            ({"target": 0.97}, "ETA ≤ 1:35"),
            ({"target": None, "ends_by_rule": True}, "ETA ≤ 1:35"),
        ):
            live, stream = plain(every_seconds=0)
            live.start({**INFO, "updates": 100, **info})
            for update in (1, 5):
                now[0] += 4.0 if update == 5 else 0.0
                live.update({**RECORD, "update": update})
            assert words in stream.getvalue()

    def test_an_evaluations_tasks_have_lines_of_their_own(self):
        live, stream = plain()
        tasks = {
            "math": {"loss": 1.25, "token_accuracy": 0.5},
            "longer_name": {"loss": 0.5, "token_accuracy": None},
        }
        live.epoch({**RECORD, "tasks": tasks})
        assert len(stream.getvalue().splitlines()) == 1, "an epoch is one line, however many tasks there are"
        live.evaluation({**RECORD, "tasks": tasks})
        lines = stream.getvalue().splitlines()[2:]
        assert [line.split()[0] for line in lines] == ["math", "longer_name"]
        assert "50.00 %" in lines[0]
        assert "–" in lines[1]

    def test_an_unsuccessful_end_and_a_dict_for_a_result(self):
        live, stream = plain()
        live.end(
            {
                "success": False,
                "reason": "loss is NaN",
                "updates": 3,
                "epochs": 0.1,
                "seconds": 2.0,
                "folder": "f",
            }
        )
        assert "✗ loss is NaN" in stream.getvalue()


class TestNotEnabled:
    def test_prints_nothing_at_all(self):
        stream = io.StringIO()
        live = Live(enabled=False, stream=stream, terminal=True)
        live.start(INFO)
        live.update(RECORD)
        live.epoch(RECORD)
        live.evaluation(RECORD)
        live.note("x")
        live.end(RESULT)
        assert stream.getvalue() == ""


class TestOnATerminal:
    def test_one_line_that_is_replaced_and_epochs_that_stay(self, wide):
        stream = io.StringIO()
        with Live(stream=stream, terminal=True) as live:
            live.start(INFO)
            live.update(RECORD)
            live._screen.refresh()
            live.epoch(RECORD)
            live.end(RESULT)
        text = screen_text(stream)
        assert (
            "94.3 % of 97.0 %  update 120/1,200  epoch 4.00  loss 0.213  grad 0.810  lr 1.8e-05  61.2k tok/s"
            in text
        )
        assert "token accuracy 94.30 %" in text
        assert text.rstrip().endswith("runs/x")
        assert "\x1b[?25h" in stream.getvalue()  # the cursor is shown again

    @pytest.mark.parametrize("width", [20, 40, 60, 80, 100, 120, 160, 250])
    def test_the_line_fits_and_keeps_what_matters_most(self, width):
        live, _ = plain()
        live._info = INFO
        line = live._line(RECORD, width).plain
        assert len(line) <= width
        if width >= 40:
            assert "94.3 % of 97.0 %" in line
        if width >= 80:
            assert "loss 0.213" in line

    def test_the_bar_is_full_at_the_target_and_never_longer(self):
        live, _ = plain()
        live._info = INFO
        bars = {
            accuracy: live._line({**RECORD, "token_accuracy": accuracy}, 120).plain.split()[0]
            for accuracy in (0.0, 0.5, 0.97, 1.0)
        }
        filled = {accuracy: bar.count("━") + 0.5 * bar.count("╸") for accuracy, bar in bars.items()}
        length = len(bars[0.0])
        assert {len(bar) for bar in bars.values()} == {length}
        assert filled[0.0] == 0
        assert filled[0.97] == filled[1.0] == length
        # half a column is the bar's resolution
        assert filled[0.5] == pytest.approx(length * 0.5 / 0.97, abs=0.5)

    def test_without_a_target_the_bar_follows_the_budget(self):
        live, _ = plain()
        live._info = {**INFO, "target": None}
        line = live._line({**RECORD, "update": 600}, 120).plain
        bar = line.split()[0]
        assert bar.count("━") == len(bar) // 2

    def test_closing_twice_and_before_the_start_is_harmless(self, wide):
        live = Live(stream=io.StringIO(), terminal=True)
        live.close()
        live.start(INFO)
        live.close()
        live.close()
        live.note("after")


class TestRecordsWithHoles:
    @pytest.mark.parametrize("name", list(RECORD))
    @pytest.mark.parametrize("hole", ["missing", None, float("nan")])
    def test_any_figure_may_be_missing(self, name, hole):
        if name in ("kind", "update") and hole != "missing":
            return
        record = {key: value for key, value in RECORD.items() if key != name}
        if hole != "missing":
            record[name] = hole
        live, stream = plain(every_seconds=0)
        live.start(INFO)
        live.update(record)
        live.epoch(record)
        live.evaluation(record)
        live._line(record, 120)
        assert "None" not in stream.getvalue()

    def test_nothing_is_known(self):
        live, _ = plain(every_seconds=0)
        live.start({})
        live.update({})
        live.epoch({})
        live.end({})
        assert live._line({}, 80).plain


class TestRemainingTime:
    def pace(self, monkeypatch, steps):
        now = [0.0]
        monkeypatch.setattr("repsft_fast.report.live.time.monotonic", lambda: now[0])
        live, _ = plain()
        live._info = INFO
        for update, at in steps:
            now[0] = at
            live.update({**RECORD, "update": update})
        return live

    def test_is_the_budgets_end_and_an_upper_bound_with_a_target(self, monkeypatch):
        live = self.pace(monkeypatch, [(0, 0.0), (10, 20.0), (20, 40.0)])
        assert live._fields({**RECORD, "update": 20})["eta"] == "ETA ≤ 39:20"  # 1180 updates at 2 s
        live._info = {**INFO, "target": None}
        assert live._fields({**RECORD, "update": 20})["eta"] == "ETA 39:20"

    def test_is_known_once_the_decay_has_begun_and_a_bound_again_when_it_is_taken_back(self, monkeypatch):
        live, _ = plain()
        live.start(INFO)
        now = [0.0]
        monkeypatch.setattr("repsft_fast.report.live.time.monotonic", lambda: now[0])
        for update, at in [(0, 0.0), (10, 20.0), (20, 40.0)]:
            now[0] = at
            live.update({**RECORD, "update": update})
        live.ends_at(25)
        fields = live._fields({**RECORD, "update": 20})
        assert (fields["eta"], fields["update"]) == ("ETA 0:10", "update 20/25")
        assert fields["target"] == "accuracy 94.3 %"
        assert live._done({**RECORD, "update": 20}) == 20 / 25
        live.ends_at(None)
        assert live._fields({**RECORD, "update": 20})["eta"] == "ETA ≤ 39:20"

    def test_is_not_guessed_from_one_reading_nor_negative(self, monkeypatch):
        assert "eta" not in self.pace(monkeypatch, [(5, 1.0)])._fields(RECORD)
        live = self.pace(monkeypatch, [(0, 0.0), (10, 20.0)])
        assert live._fields({**RECORD, "update": 5000})["eta"] == "ETA ≤ 0.0 s"

    def test_going_back_in_updates_does_not_break_the_pace(self, monkeypatch):
        live = self.pace(monkeypatch, [(0, 0.0), (10, 20.0), (4, 21.0), (5, 23.0)])
        assert live._pace.seconds_for(1) == pytest.approx(2.0)


HOSTILE = "[INST] hi [/INST] :smile: \x1b[31mred\x07\r\u202eabc\u200b\x00 $x^2$"
SPELLED = "[INST] hi [/INST] :smile: \\x1b[31mred\\x07\\r\\u202eabc\\u200b\\x00 $x^2$".replace("\\r", "\\x0d")


class TestDataIsShownAndNotObeyed:
    @pytest.mark.parametrize("terminal", [False, True])
    def test_names_of_tasks_and_words_of_data(self, terminal, wide):
        stream = io.StringIO()
        with Live(stream=stream, terminal=terminal, every_seconds=0) as live:
            live.start({**INFO, "folder": HOSTILE})
            tasks = {HOSTILE: {"loss": 1.0, "token_accuracy": 0.5}, "b": {"loss": 1.0, "token_accuracy": 0.5}}
            live.update(RECORD)
            live.evaluation({**RECORD, "tasks": tasks})
            live.note(f"dropped: 3 × {HOSTILE}")
            live.end({"success": False, "reason": HOSTILE, "folder": HOSTILE})
        text = stream.getvalue()
        assert text.count(SPELLED) == 5
        for character in ("\x1b[31m", "\x07", "\u202e", "\u200b", "\x00"):
            assert character not in text
        assert "\r" not in re.sub(r"\r(?=\x1b|$)", "", text)

    def test_a_mixtures_tasks(self, wide):
        name = "[INST]:smile:\x1b[31m\n"
        state = {"score": 0.5, "best": 0.6, "lowest": 0.1, "state": "active", "kept": None}
        standing = {"metric": "exact_match", "stage": 0, "tasks": {name: state, "b": state}}
        for terminal in (False, True):
            stream = io.StringIO()
            with Live(stream=stream, terminal=terminal) as live:
                live.start(INFO)
                live.mixture(standing)
                live.update(RECORD)
                if terminal:
                    live._screen.refresh()
                live.evaluation({"moment": "m", "scores": {name: 0.5, "b": 0.25}, "pooled": 0.5})
                live.end({"reason": "ended", "more": {}})
            assert stream.getvalue().count("[INST]:smile:\\x1b[31m⏎") >= 2
            assert "\x1b[31m" not in stream.getvalue()

    def test_a_stream_that_knows_ascii_only(self):
        raw = io.BytesIO()
        stream = io.TextIOWrapper(raw, encoding="ascii")
        live = Live(stream=stream, terminal=False)
        live.start({**INFO, "folder": "größe"})
        live.end(RESULT)
        stream.flush()
        assert b"gr\\xf6\\xdfe" in raw.getvalue()
