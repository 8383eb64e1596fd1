"""The trial that decides about captured rows, what is kept of it, and whole runs either way."""

import json
import sys
from dataclasses import replace
from functools import partial
from itertools import cycle
from types import SimpleNamespace

import pytest
import torch

from repsft_fast.config import Config
from repsft_fast.errors import ConfigError
from repsft_fast.training import decided, graph_choice
from repsft_fast.training.build import build
from repsft_fast.training.trainer import train
from tests.helpers import runs
from tests.helpers.fake_capture import FakeCapture, FakeGraph

FASTER, SLOWER = (3.0, 2.0), (2.0, 2.0)  # seconds of a plain update and a captured one


def parts_of(folder, asked="auto", **changes):
    batch = {"batch__samples": 8, "batch__row_tokens": 64, "batch__bucket_tokens": 64}
    parts = build(
        Config.of(runs.settings(folder, samples=40, **{"model__cuda_graphs": asked, **batch, **changes}))
    )
    on_the_device(parts)
    return parts


def on_the_device(parts):
    parts.model.loss_settings = replace(parts.model.loss_settings, attention="mask")


def clock(durations):
    """Every second reading is later by the next of `durations`."""
    now, steps = 0.0, cycle([None, *[x for d in durations for x in (d, None)]][:-1])

    def seconds():
        nonlocal now
        now += next(steps) or 0.0
        return now

    return seconds


def begin(parts, durations=FASTER, capture=FakeCapture, tell=print):
    return graph_choice.begin(parts, tell, capture=capture, clock=clock(durations))


def standing(parts):
    left = [p.detach().clone() for p in parts.model.parameters()]
    left += [torch.get_rng_state(), parts.ledger._tables.clone(), parts.ledger._scalars.clone()]
    assert all(p.grad is None for p in parts.model.parameters())
    return left


def test_equal_and_faster_is_on(tmp_path):
    parts = parts_of(tmp_path)
    before = standing(parts)
    (said,) = begin(parts)
    assert said.startswith("model.cuda_graphs: on, 1 shapes of rows captured in ")
    assert all(map(torch.equal, standing(parts), before))
    assert parts.graphs.counts.replayed == 0
    assert parts.graphs.counts.captured == 1
    assert graph_choice.now(parts) == {"shapes": [[64, 64]], "borders": 9, "longest": 128}
    assert json.loads(json.dumps(graph_choice.now(parts))) == graph_choice.now(parts)


def test_no_faster_is_off(tmp_path):
    parts = parts_of(tmp_path)
    assert begin(parts, SLOWER) == [
        "model.cuda_graphs: off, because an update takes 2000.00 ms captured and 2000.00 ms without"
    ]
    assert graph_choice.now(parts) == "off"
    assert parts.graphs is None
    standing(parts)


class Wrong(FakeCapture):
    """A replay that goes wrong in one way."""

    def __init__(self, how):
        super().__init__()
        self.how = how

    def __call__(self, function):
        graph = super().__call__(function)
        made, how = graph, self.how

        def replay():
            FakeGraph.replay(made)
            stats, table = made.outputs
            how(stats, table, made)

        graph.replay = replay
        return graph


def last_gradient(graph):
    """The buffer that the capture added into last."""
    return [args[0] for func, args, _, _ in graph.calls if func._schema.name == "aten::add_"][-1]


@pytest.mark.parametrize(
    "how",
    [
        lambda stats, table, graph: last_gradient(graph).mul_(1 + 2**-20),
        lambda stats, table, graph: stats.loss.mul_(1 + 2**-20),
        lambda stats, table, graph: table.add_(1),
        lambda stats, table, graph: last_gradient(graph).fill_(float("nan")),
    ],
    ids=["gradient", "loss", "sums", "nan"],
)
def test_other_bits_are_off(tmp_path, how):
    parts = parts_of(tmp_path)
    (said,) = begin(parts, capture=partial(Wrong, how))
    assert "off, because a captured pass has other bits than the same pass without a graph" in said
    assert graph_choice.now(parts) == "off"
    standing(parts)


def test_a_pass_that_is_not_the_rows_is_off(tmp_path, monkeypatch):
    """Equal to itself and wrong: a row that is filled up wrongly, captured or not."""
    from repsft_fast.training.static_row import StaticRow

    take = StaticRow.take

    def forgets(self, row):
        take(self, row)
        self.row.positions.zero_()

    monkeypatch.setattr(StaticRow, "take", forgets)
    parts = parts_of(tmp_path)
    (said,) = begin(parts)
    assert "leave another gradient of" in said


def test_a_pass_that_counts_others_is_off(tmp_path, monkeypatch):
    from repsft_fast.training.static_row import StaticRow

    take = StaticRow.take

    def counts_padding(self, row):
        take(self, row)
        self.row.position_tasks.zero_()

    monkeypatch.setattr(StaticRow, "take", counts_padding)
    assert "counts other positions" in begin(parts_of(tmp_path))[0]


def test_what_cannot_be_captured_is_off(tmp_path):
    parts = parts_of(tmp_path)
    (said,) = begin(parts, capture=lambda: FakeCapture(fail_at=1))
    assert said.endswith("off, because RuntimeError: operation not permitted when stream is capturing")
    assert begin(parts_of(tmp_path, loss__skip_below=0.1))[0].endswith("set it to 0")


def test_memory_that_runs_out_in_the_trial_is_off(tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    monkeypatch.setattr(graph_choice, "_near", full)
    parts = parts_of(tmp_path)
    assert "out of memory" in begin(parts)[0]
    standing(parts)


def test_without_a_gpu_nothing_is_tried(tmp_path):
    parts = parts_of(tmp_path)
    assert graph_choice.begin(parts, print) == ["model.cuda_graphs: off, because they need a GPU"]
    parts = parts_of(tmp_path, "off")
    assert graph_choice.begin(parts, print, capture=FakeCapture) == []
    assert parts.graphs is None
    assert graph_choice.result(parts) == {}
    assert graph_choice.said(parts) == []


@pytest.mark.parametrize("asked", ["auto", "off"])
def test_inductor_may_not_capture_either_way(tmp_path, monkeypatch, asked):
    parts = parts_of(tmp_path, asked)
    model = parts.config.model.model_copy(update={"compile": True})
    parts.config = parts.config.model_copy(update={"model": model})
    parts.world = replace(parts.world, device=torch.device("cuda"))
    inductor = SimpleNamespace(triton=SimpleNamespace(cudagraphs=True))
    monkeypatch.setitem(sys.modules, "torch._inductor.config", inductor)
    with pytest.raises(ConfigError, match="TORCHINDUCTOR_CUDAGRAPHS"):
        graph_choice.begin(parts, print)


def test_the_trial_is_deterministic_and_then_no_longer(tmp_path, monkeypatch):
    seen, compare = [], graph_choice._compare

    def watched(*args):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return compare(*args)

    monkeypatch.setattr(graph_choice, "_compare", watched)
    parts = parts_of(tmp_path)
    was = torch.are_deterministic_algorithms_enabled()
    try:
        torch.use_deterministic_algorithms(False)
        begin(parts)
        assert seen
        assert all(seen)
        assert not torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(was)


# Kept ---------------------------------------------------------------------------------------------


def test_a_resumption_captures_what_the_run_captured(tmp_path):
    """Without a trial: the saved shapes, whatever the plan or the clock would say now."""
    parts = parts_of(tmp_path)
    saved = {"shapes": [[64, 40], [64, 64]], "borders": 17, "longest": 256}
    said = decided.resume(
        parts, {"chunk_bytes": None, "choices": {"cuda_graphs": saved, "attention": "mask"}}
    )
    assert said == [], "what a trial would say now is not known"
    begin(parts, SLOWER)
    assert graph_choice.now(parts) == saved
    assert parts.graphs.counts.captured == 2
    assert decided.record(parts)["choices"]["cuda_graphs"] == saved
    assert "model.cuda_graphs" not in decided.as_settings(parts)


def test_a_resumption_that_cannot_have_them_is_refused(tmp_path):
    parts = parts_of(tmp_path)
    graph_choice.use(parts, {"shapes": [[64, 64]], "borders": 9, "longest": 128})
    with pytest.raises(ConfigError, match=r"cannot be had here: RuntimeError.*or set model.cuda_graphs: off"):
        begin(parts, capture=lambda: FakeCapture(fail_at=1))
    with pytest.raises(ConfigError, match="need a GPU"):
        graph_choice.begin(parts, print)


@pytest.mark.parametrize(
    "saved",
    [{"chunk_bytes": None, "choices": {"cuda_graphs": "off", "attention": "mask"}}, {}],
    ids=["off", "older"],
)
def test_a_resumption_of_a_plain_run_stays_plain(tmp_path, saved):
    parts = parts_of(tmp_path)
    decided.resume(parts, saved)
    assert begin(parts) == []
    assert parts.graphs is None
    assert graph_choice.now(parts) == "off"
    assert decided.as_settings(parts)["model.cuda_graphs"] == "off"


def test_captures_that_were_dropped_are_off_for_the_next_checkpoint(tmp_path):
    parts = parts_of(tmp_path)
    begin(parts)
    assert decided.record(parts)["choices"]["cuda_graphs"] == parts.cuda_graphs != "off"
    parts.graphs.drop("memory ran out")
    assert graph_choice.now(parts) == "off"
    assert decided.record(parts)["choices"]["cuda_graphs"] == "off"
    assert decided.as_settings(parts)["model.cuda_graphs"] == "off"


def test_who_asks_for_none_is_told(tmp_path):
    parts = parts_of(tmp_path, "off")
    saved = {"shapes": [[64, 64]], "borders": 9, "longest": 128}
    (said,) = decided.resume(
        parts, {"chunk_bytes": None, "choices": {"cuda_graphs": saved, "attention": "mask"}}
    )
    assert "off as asked, and was captured in 1 shapes before" in said
    assert "not equal" in said


# Whole runs ---------------------------------------------------------------------------------------


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Runs of this process capture with a fake, and find it faster or not; their attention reads borders on the
    device."""
    plain_begin, plain_build = graph_choice.begin, graph_choice.__dict__
    del plain_build

    def use(durations=FASTER, capture=FakeCapture):
        def faked(parts, tell):
            on_the_device(parts)
            return plain_begin(parts, tell, capture=capture, clock=clock(durations))

        monkeypatch.setattr(graph_choice, "begin", faked)

    monkeypatch.setattr("repsft_fast.report.pictures.draw", lambda folder, **more: None)
    return use


SETTINGS = {
    "model__cuda_graphs": "auto",
    "batch__samples": 8,
    "batch__bucket_tokens": 64,
    "stop__token_accuracy": None,
    "budget__epochs": 2,
    "checkpoint__every_updates": 3,
}


def test_a_run_says_what_became_of_its_rows(tmp_path, on_a_gpu):
    on_a_gpu()
    result = train(runs.settings(tmp_path, samples=40, **SETTINGS))
    found = result.more["cuda_graphs"]
    assert found["captured"] == 1
    assert found["replayed"] > 10
    assert found["fell_back"] == 0
    notes = [line["text"] for line in runs.metrics(tmp_path, "note")]
    assert any(text.startswith("model.cuda_graphs: on") for text in notes)
    assert f"CUDA graphs: 1 shapes captured, {found['replayed']} rows replayed" in notes
    assert json.loads((tmp_path / "run" / "result.json").read_text())["more"]["cuda_graphs"] == found


def test_killed_and_resumed_equals_never_killed(tmp_path, on_a_gpu):
    """The resumption finds captures slower, and takes them all the same."""
    on_a_gpu()
    weights = {}
    for name in ("whole", "killed"):
        settings = runs.settings(tmp_path / name, samples=40, **SETTINGS)
        if name == "killed":
            with pytest.raises(RuntimeError, match="killed"):
                train(settings, on_update=kill_after(5))
            on_a_gpu(SLOWER)
            result = train(settings, resume=True)
            assert result.more["cuda_graphs"]["replayed"] > 0
        else:
            train(settings)
        weights[name] = (tmp_path / name / "run" / "model.safetensors").read_bytes()
    assert weights["whole"] == weights["killed"]


def kill_after(updates):
    def look(work):
        if work.updates == updates:
            raise RuntimeError("killed")

    return look
