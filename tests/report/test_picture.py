"""run.png from files alone: what is on it, and what a damaged or short run gets."""

import json
import math
import os
import struct
from pathlib import Path

import pytest

from repsft_fast.errors import RepsftError
from repsft_fast.report import mixture_picture, picture
from repsft_fast.report.records import read_metrics


def run_of(folder, *, epochs=8, per_epoch=5, validation=True, decay=None, code="token_accuracy", target=0.97):
    records = []
    for update in range(1, epochs * per_epoch + 1):
        epoch, loss, accuracy = (
            update / per_epoch,
            3 * math.exp(-update / 10),
            1 - 0.9 * math.exp(-update / 10),
        )
        records.append(
            {"kind": "update", "update": update, "epoch": epoch, "loss": loss, "token_accuracy": accuracy}
        )
        if update == decay:
            records.append({"kind": "decay", "update": update, "reason": "saturated"})
        if update % per_epoch == 0:
            records.append(
                {"kind": "epoch", "update": update, "epoch": epoch, "loss": loss, "token_accuracy": accuracy}
            )
            if validation:
                records.append(
                    {
                        "kind": "evaluation",
                        "update": update,
                        "epoch": epoch,
                        "loss": 1.0,
                        "token_accuracy": 0.4,
                    }
                )
    write_records(folder, records)
    if code is not None:
        (folder / "result.json").write_text(
            json.dumps({"code": code, "reason": "the reason", "updates": 40, "seconds": 192.0})
        )
    (folder / "run.yaml").write_text(f"stop: {{token_accuracy: {'null' if target is None else target}}}\n")
    return records


def write_records(folder, records):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def lines(axes, colour):
    return [line for line in axes.get_lines() if line.get_color() == colour]


def words(axes):
    return [text.get_text() for text in axes.texts]


class TestWhatIsDrawn:
    def test_a_readable_png(self, tmp_path):
        run_of(tmp_path)
        content = picture.draw(tmp_path).read_bytes()
        assert content[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", content[16:24])
        assert width >= 1400
        assert 0.35 < height / width < 0.5

    def test_the_curves_are_the_records(self, tmp_path, drawn):
        records = run_of(tmp_path)
        picture.draw(tmp_path)
        left, right = drawn[0].axes
        for axes, name, colour in ((left, "loss", picture.LOSS), (right, "token_accuracy", picture.ACCURACY)):
            fine, coarse = lines(axes, colour)[:2]
            for line, kind in ((fine, "update"), (coarse, "epoch")):
                assert list(line.get_xdata()) == [r["epoch"] for r in records if r["kind"] == kind]
                assert list(line.get_ydata()) == [r[name] for r in records if r["kind"] == kind]
            assert list(lines(axes, picture.HELD_OUT)[0].get_ydata()) == [
                r[name] for r in records if r["kind"] == "evaluation"
            ]

    def test_target_decay_and_stop_are_marked_where_they_were(self, tmp_path, drawn):
        run_of(tmp_path, decay=33)
        picture.draw(tmp_path)
        left, right = drawn[0].axes
        assert words(right) == ["target 97.0 %", "decay", "stop"]
        assert list(lines(right, picture.FAINT)[0].get_ydata()) == [0.97, 0.97]
        for axes in (left, right):
            assert lines(axes, picture.DECAY)[0].get_xdata()[0] == pytest.approx(33 / 5)
        assert lines(right, picture.ACCURACY)[-1].get_xdata()[0] == 8.0
        assert drawn[0].get_suptitle() == "the reason · 40 updates · 3:12"

    def test_a_run_that_used_up_its_budget_was_not_stopped(self, tmp_path, drawn):
        run_of(tmp_path, code="budget", target=None)
        picture.draw(tmp_path)
        assert words(drawn[0].axes[1]) == []

    def test_an_unfinished_run_says_so(self, tmp_path, drawn):
        run_of(tmp_path, code=None)
        (tmp_path / "run.yaml").unlink()
        picture.draw(tmp_path)
        assert drawn[0].get_suptitle() == "unfinished run"
        assert words(drawn[0].axes[1]) == []

    def test_words_do_not_lie_on_each_other(self, tmp_path, drawn):
        run_of(tmp_path, decay=39)
        picture.draw(tmp_path)
        boxes = [text.get_window_extent() for text in drawn[0].axes[1].texts]
        assert len(boxes) == 3
        assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])

    def test_nothing_global_is_left_behind(self, tmp_path):
        import matplotlib.pyplot as plt

        run_of(tmp_path)
        picture.draw(tmp_path)
        assert plt.get_fignums() == []


def mixture_of(folder, *, epochs=8):
    scores = [{"a": i / epochs, "b": 0.5} for i in range(epochs)]
    records = [
        {
            "kind": "stage",
            "stage": 0,
            "epoch": 0.0,
            "done": 0,
            "active": ["a", "b"],
            "start": None,
            "weights": None,
        }
    ]
    records += [
        {"kind": "evaluation", "moment": f"0.{i}", "stage": 0, "epoch": i / 4, "done": i, "scores": of, "errors": {},
         "pooled": 0.1 * i} for i, of in enumerate(scores)
    ]  # fmt: skip
    write_records(folder, records)


@pytest.fixture(params=["run", "mixture"])
def kind(request):
    """(writes a run's records, draws them)."""
    return {"run": (run_of, picture.draw), "mixture": (mixture_of, mixture_picture.draw)}[request.param]


class TestWholeOrNotAtAll:
    """Whoever looks at run.png while it is drawn, or after a drawing that was cut short, sees a whole
    picture."""

    @pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()])
    def test_a_drawing_that_fails_leaves_the_one_before_it(self, kind, tmp_path, monkeypatch, error):
        from matplotlib.figure import Figure

        run_of, draw = kind
        run_of(tmp_path)
        before = draw(tmp_path).read_bytes()

        def fails(figure, target, **more):
            target.write(b"\x89PNG half a")
            raise error

        monkeypatch.setattr(Figure, "savefig", fails)
        with pytest.raises(type(error)):
            draw(tmp_path)
        assert (tmp_path / "run.png").read_bytes() == before
        assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []

    def test_the_old_one_is_there_until_the_new_one_is_whole(self, kind, tmp_path, monkeypatch):
        run_of, draw = kind
        run_of(tmp_path)
        before = draw(tmp_path).read_bytes()
        run_of(tmp_path, epochs=4)
        replace, seen = os.replace, []

        def watched(source, target):
            seen.append((Path(source).read_bytes(), Path(target).read_bytes()))
            replace(source, target)

        monkeypatch.setattr(os, "replace", watched)
        after = draw(tmp_path).read_bytes()
        assert seen == [(after, before)]
        assert after != before

    @pytest.mark.parametrize("left", [".run.png.part", f".run.png.{'0' * 32}"])
    def test_what_a_kill_left_is_in_nobodys_way(self, left, kind, tmp_path):
        run_of, draw = kind
        run_of(tmp_path)
        (tmp_path / left).write_bytes(b"half")
        before = set(os.listdir(tmp_path))
        assert draw(tmp_path).read_bytes()[:4] == b"\x89PNG"
        assert set(os.listdir(tmp_path)) - before <= {"run.png"}


class TestOddRuns:
    @pytest.mark.parametrize(
        "records",
        [
            [{"kind": "update", "update": 1, "epoch": 0.1, "loss": 2.0, "token_accuracy": 0.1}],
            [{"kind": "update", "update": 1, "epoch": 0.1, "loss": None, "token_accuracy": None}],
            [{"kind": "update", "update": 1, "loss": 2.0}],
            [{"kind": "epoch", "update": 1, "epoch": 1, "loss": 0.0, "token_accuracy": 1.0}],
            [{"kind": "update", "update": "x", "epoch": [], "loss": {}, "token_accuracy": True}],
            [{"kind": "decay", "update": 1}, {"kind": "update", "update": 1, "epoch": 1.0, "loss": 1.0}],
            [
                {"loss": 3},
                {"kind": "epoch", "epoch": 1.0, "loss": 1e-30, "token_accuracy": 0.5, "update": None},
            ],
        ],
    )
    def test_are_drawn(self, tmp_path, records):
        write_records(tmp_path, records)
        (tmp_path / "result.json").write_text('{"code": "token_accuracy", "updates": null}')
        assert picture.draw(tmp_path).stat().st_size > 1000

    @pytest.mark.parametrize("content", ["[1]", "{", ""])
    def test_a_damaged_result_or_settings_do_not_hide_the_curves(self, tmp_path, content):
        run_of(tmp_path)
        (tmp_path / "result.json").write_text(content)
        (tmp_path / "run.yaml").write_text(content + ":\n\t-")
        assert picture.draw(tmp_path).exists()

    def test_a_torn_last_line_is_left_out(self, tmp_path):
        records = run_of(tmp_path)
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('{"kind": "upd')
        found = read_metrics(tmp_path)
        assert (found.records, found.words) == (records, "")

    @pytest.mark.parametrize("content", ["", "\n", '{"kind": "note"}\n'])
    def test_nothing_to_draw_is_said(self, tmp_path, content):
        (tmp_path / "metrics.jsonl").write_text(content)
        with pytest.raises(RepsftError, match="holds no update"):
            picture.draw(tmp_path)

    def test_no_run_is_said(self, tmp_path):
        with pytest.raises(RepsftError, match="run's folder"):
            picture.draw(tmp_path)


def test_a_title_too_wide_for_a_line_takes_two_and_loses_no_figure():
    found = picture._title({"reason": "r" * 90, "saved_token_accuracy": 0.984, "updates": 726, "seconds": 56})
    assert found == ["r" * 90, "saved model 98.40 % · 726 updates · 0:56"]
    assert [len(line) for line in picture._title({"reason": "r" * 300, "updates": 3})] == [105, 9]
