"""Rows captured as CUDA graphs: the bits of the same passes without a graph, no wait, nothing random, one pool.

On a CPU a stand-in is captured that forgets what a graph forgets (tests/helpers/fake_capture.py).
"""

import threading
from dataclasses import replace

import pytest
import torch

from repsft_fast.training import graph_choice
from repsft_fast.training.capture import CudaCapture
from repsft_fast.training.graph_shapes import shapes_of, why_not
from repsft_fast.training.graphs import CaptureFailed, RowGraphs
from repsft_fast.training.static_row import Shape
from tests.gpu import small_runs
from tests.gpu.places import anywhere
from tests.gpu.test_gpu_update import no_sync
from tests.helpers.fake_capture import Again, FakeCapture


def parts_of(place, folder, **changes):
    """bf16 on a GPU; in fp32 here, with an attention that reads borders on the device."""
    here = {} if place.on_gpu else {"model__compute_dtype": "float32"}
    parts = small_runs.parts_of(folder, **{"batch__bucket_tokens": 64, **here, **changes})
    if not place.on_gpu:
        parts.model.loss_settings = replace(parts.model.loss_settings, attention="mask")
    if (why := why_not(parts)) is not None and "random" not in why:
        pytest.skip(why)
    return parts


def capture_of(place):
    return CudaCapture(place.device) if place.on_gpu else FakeCapture()


def graphs_of(place, parts, capture=None):
    shapes = shapes_of(parts)
    assert not isinstance(shapes, str)
    return RowGraphs(
        parts.model, shapes, capture or capture_of(place), num_tasks=parts.num_tasks, device=place.device
    )


@anywhere("graphs", "train step", dtype="bfloat16")
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_updates_of_several_rows_have_the_bits_of_the_passes_without_graphs(place, tied, tmp_path):
    config = {"model__config": small_runs.MODEL | {"tie_word_embeddings": tied}}
    left = []
    for capture in (Again(), None):
        parts = parts_of(place, tmp_path, **config)
        parts.graphs = graphs_of(place, parts, capture)
        small_runs.steps(parts, 12)
        assert parts.graphs.counts.replayed > 20
        assert parts.graphs.counts.fell_back == 0
        left.append((small_runs.losses(parts), small_runs.state_of(parts)))
    assert left[0] == left[1]


@anywhere("graphs", dtype="bfloat16")
def test_they_train_as_plain_rows_do(place, tmp_path):
    plain, ours = parts_of(place, tmp_path, optim__lr=1e-4), parts_of(place, tmp_path, optim__lr=1e-4)
    ours.graphs = graphs_of(place, ours)
    for parts in (plain, ours):
        small_runs.steps(parts, 8)
    assert small_runs.losses(ours) == pytest.approx(
        small_runs.losses(plain), rel=2e-2 if place.on_gpu else 1e-5
    )


@anywhere("graphs", "train step", dtype="bfloat16")
def test_a_captured_update_does_not_wait(place, tmp_path):
    parts = parts_of(place, tmp_path, run__deterministic=False)
    parts.graphs = graphs_of(place, parts)
    small_runs.steps(parts, 2)
    place.wait()
    with no_sync(place):
        small_runs.steps(parts, 3)
    place.wait()
    assert len(small_runs.losses(parts)) == 5
    assert parts.graphs.counts.fell_back == 0


@anywhere("graphs", dtype="bfloat16")
def test_dropout_is_seen(place, tmp_path):
    parts = parts_of(place, tmp_path, model__lora={"rank": 4, "dropout": 0.5})
    with pytest.raises(CaptureFailed, match="random numbers"):
        graphs_of(place, parts)
    small_runs.steps(parts, 1)


@anywhere("graphs", dtype="bfloat16")
def test_the_trial_decides_without_an_error(place, tmp_path):
    """What it decides depends on the card; that it found the same bits does not."""
    parts = parts_of(place, tmp_path, model__cuda_graphs="auto")
    faked = {} if place.on_gpu else {"capture": FakeCapture}
    (said,) = graph_choice.begin(parts, print, **faked)
    assert not [word for word in ("bits", "gradient", "positions") if word in said], said
    small_runs.steps(parts, 3)


@anywhere("graphs", dtype="bfloat16", on=None)
def test_a_smaller_shape_takes_its_memory_from_the_larger_ones(place, tmp_path):
    parts = parts_of(place, tmp_path)
    shapes = shapes_of(parts)
    reserved = []
    for some in (shapes.shapes[-1:], (*(Shape(64, n) for n in (16, 24, 32, 40)), *shapes.shapes[-1:])):
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        graphs = RowGraphs(
            parts.model,
            replace(shapes, shapes=some),
            CudaCapture(place.device),
            num_tasks=1,
            device=place.device,
        )
        torch.cuda.empty_cache()
        reserved.append(torch.cuda.memory_reserved() - before)
        graphs.drop("of a test")
        del graphs
    assert reserved[1] <= reserved[0] * 2 + (16 << 20)


@anywhere("graphs", dtype="bfloat16", on=None)
def test_another_thread_may_pin_and_copy_meanwhile(place, tmp_path):
    """The rows to come are made and sent by a thread: `thread_local` lets it."""
    parts, stop, wrong = parts_of(place, tmp_path), threading.Event(), []

    def send():
        try:
            side = torch.cuda.Stream()
            while not stop.is_set():
                with torch.cuda.stream(side):
                    torch.empty(1 << 16, dtype=torch.uint8, pin_memory=True).to(
                        place.device, non_blocking=True
                    )
        except RuntimeError as error:
            wrong.append(error)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        parts.graphs = graphs_of(place, parts)
    finally:
        stop.set()
        thread.join()
    assert not wrong
    small_runs.steps(parts, 2)
