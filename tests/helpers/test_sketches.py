"""A sketch is equal where the picture is, and nowhere else; whole runs are drawn in pixels here."""

import struct

import pytest

from repsft_fast import train
from repsft_fast.report import mixture_picture, picture
from tests.helpers import runs, sketches
from tests.report.test_picture import mixture_of, run_of

DRAWERS = {"run": (run_of, picture.draw), "mixture": (mixture_of, mixture_picture.draw)}


@pytest.mark.parametrize("kind", DRAWERS)
def test_what_moves_the_picture_moves_the_sketch(kind, tmp_path):
    write, draw = DRAWERS[kind]
    write(tmp_path)
    first = draw(tmp_path).read_bytes()
    assert first[:8] == b"\x89PNG\r\n\x1a\n"
    assert draw(tmp_path).read_bytes() == first
    seen = {first}
    metrics = (tmp_path / "metrics.jsonl").read_text()
    changed = {
        "run": [("2.456192259233945", "2.5"), ('"token_accuracy": 0.4', '"token_accuracy": 0.6')],
        "mixture": [('"b": 0.5', '"b": 0.6'), ('"a"', '"task a"')],
    }[kind]
    for old, new in changed:
        assert old in metrics
        (tmp_path / "metrics.jsonl").write_text(metrics.replace(old, new))
        seen.add(draw(tmp_path).read_bytes())
    (tmp_path / "metrics.jsonl").write_text(metrics)
    (tmp_path / "result.json").write_text('{"code": "plateau", "reason": "another reason"}')
    seen.add(draw(tmp_path).read_bytes())
    assert len(seen) == 4


def test_ticks_are_told_by_their_axis():
    figure = picture.new_figure(4, 3)
    axes = figure.subplots()
    seen = {sketches.sketch(figure)}
    axes.set_yticks([0.0, 1.0], ["a", "b"])
    seen.add(sketches.sketch(figure))
    axes.set_yticks([0.0, 1.0], ["a", "c"])
    seen.add(sketches.sketch(figure))
    axes.set_yticks([0.5, 1.0], ["a", "c"])
    seen.add(sketches.sketch(figure))
    axes.set_xscale("log")
    seen.add(sketches.sketch(figure))
    assert len(seen) == 5


@pytest.mark.parametrize("tasks", [1, 2])
def test_a_whole_run_in_pixels(tasks, tmp_path, real_pictures):
    changes = {"mixture__policy": "sft", "data__validation_fraction": 0.25} if tasks > 1 else {}
    train(runs.settings(tmp_path, tasks=tasks, budget__epochs=2, stop__token_accuracy=None, **changes))
    content = (tmp_path / "run" / "run.png").read_bytes()
    assert content[12:16] == b"IHDR"
    assert struct.unpack(">I", content[16:20])[0] >= 1400


def test_elsewhere_it_is_a_sketch_and_the_real_one_comes_back(tmp_path):
    run_of(tmp_path)
    for real in (False, True, False):
        sketches.install(real)
        assert (picture.draw(tmp_path).read_bytes()[12:16] == b"IHDR") is real
        assert mixture_picture.save is picture.save
