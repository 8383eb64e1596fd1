"""How a capture is made on a GPU, as the calls say, and what it is refused beside."""

import gc
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from repsft_fast.errors import ConfigError
from repsft_fast.training import capture
from repsft_fast.training.capture import CudaCapture, allocator_conflict, refuse_inductor_graphs


@pytest.fixture
def calls(monkeypatch):
    """torch.cuda, as far as a capture asks it, and what was asked in order."""
    seen = []

    class Stream:
        def __init__(self, name="side"):
            self.name = name

        def wait_stream(self, other):
            seen.append(f"{self.name} waits for {other.name}")

    @contextmanager
    def stream(side):
        seen.append(f"on {side.name}")
        yield
        seen.append(f"off {side.name}")

    @contextmanager
    def graph(made, *, pool, stream, capture_error_mode):
        seen.append(f"capture in pool {pool} on {stream.name}, {capture_error_mode}")
        yield
        seen.append("captured")

    here = Stream("here")
    for name, value in {
        "Stream": lambda device: Stream(),
        "graph_pool_handle": lambda: 7,
        "current_stream": lambda device: here,
        "stream": stream,
        "graph": graph,
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: seen.append("replayed")),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return seen


def test_three_passes_on_a_side_stream_then_the_capture(calls):
    made = CudaCapture(torch.device("cuda"))
    captured = made(lambda: calls.append("passed") or "outputs")
    once = ["side waits for here", "on side", "passed", "passed", "passed", "off side", "here waits for side"]
    once += ["capture in pool 7 on side, thread_local", "passed", "captured"]
    assert calls == once
    made(lambda: calls.append("passed"))
    assert calls == once * 2  # the same pool and the same stream
    captured.replay()
    assert calls[-1] == "replayed"
    assert captured.outputs == "outputs"


@pytest.mark.parametrize("collects", [True, False])
def test_no_collection_in_the_middle(calls, collects):
    found, before = [], gc.isenabled()
    try:
        (gc.enable if collects else gc.disable)()
        CudaCapture(torch.device("cuda"))(lambda: found.append(gc.isenabled()))
        assert gc.isenabled() == collects
        assert found[-1] is False
        with pytest.raises(ValueError, match="inside"):
            CudaCapture(torch.device("cuda"))(lambda: (_ for _ in ()).throw(ValueError("inside")))
        assert gc.isenabled() == collects
    finally:
        (gc.enable if before else gc.disable)()


@pytest.mark.parametrize("name", capture.ALLOCATOR)
@pytest.mark.parametrize(
    ("asked", "conflict"),
    [
        ("expandable_segments:True", True),
        ("max_split_size_mb:64, expandable_segments : true", True),
        ("expandable_segments:False", False),
        ("max_split_size_mb:64", False),
        ("", False),
    ],
)
def test_expandable_segments_stand_against_it(monkeypatch, name, asked, conflict):
    for other in capture.ALLOCATOR:
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, asked)
    found = allocator_conflict()
    assert (found is not None) == conflict
    assert not conflict or name in found


@pytest.mark.parametrize("loaded", [True, False])
def test_inductor_may_not_capture_compiled_layers(monkeypatch, loaded):
    """Whether torch.compile has read the variable already or will."""
    inductor = SimpleNamespace(triton=SimpleNamespace(cudagraphs=loaded))
    modules = {"torch._inductor.config": inductor} if loaded else {}
    monkeypatch.setattr(capture, "sys", SimpleNamespace(modules=modules))
    monkeypatch.setenv(capture.INDUCTOR, "0" if loaded else "1")
    refuse_inductor_graphs(compiled=False)
    with pytest.raises(ConfigError, match=r"TORCHINDUCTOR_CUDAGRAPHS.*without a word.*unset it"):
        refuse_inductor_graphs(compiled=True)
    inductor.triton.cudagraphs = False
    monkeypatch.setenv(capture.INDUCTOR, "1" if loaded else "0")  # what was read counts
    refuse_inductor_graphs(compiled=True)


def test_inductor_keeps_it_there():
    from torch._inductor import config

    assert config.triton.cudagraphs is False
    assert sys.modules["torch._inductor.config"] is config
