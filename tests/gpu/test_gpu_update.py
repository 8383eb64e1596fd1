"""One update on the device: nothing waits for the host, bf16 is fp32 within bf16, memory that runs out
changes nothing."""

import warnings
from contextlib import contextmanager

import pytest
import torch

from repsft_fast.distributed import decoder_layers
from repsft_fast.errors import TrainingError
from repsft_fast.ops import products
from repsft_fast.selftest.syncs import SyncCounter
from repsft_fast.training.step import OutOfMemory, train_step
from tests.gpu import small_runs
from tests.gpu.places import anywhere

NOT_DETERMINISTIC = {"run__deterministic": False}


@contextmanager
def no_sync(place):
    """On a GPU whatever waits raises where it stands; on a CPU what would wait is counted."""
    if place.on_gpu:
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
    else:
        with SyncCounter() as syncs:
            yield
        assert syncs.total == 0, syncs.found


@anywhere("train step", "head", "attention", "row kernel", dtype="bfloat16")
@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_an_update_does_not_wait(place, optimizer, tmp_path):
    """THE proof of law 8. Two updates come first: they compile kernels, make communicators and allocate."""
    parts = small_runs.parts_of(tmp_path, optim__name=optimizer, **NOT_DETERMINISTIC)
    small_runs.steps(parts, 2)
    place.wait()
    with no_sync(place):
        small_runs.steps(parts, 3)
    place.wait()
    found = small_runs.losses(parts)
    assert len(found) == 5
    assert found[-1] < found[0]


# a CPU reads how many there are, since it costs nothing
@anywhere("train step", "kept rows", dtype="bfloat16", on=None)
def test_an_update_that_leaves_memorised_rows_out_does_not_wait(place, tmp_path, monkeypatch):
    monkeypatch.setattr(products, "CAPACITY_STEP", 16)  # a row has 20 to 40 trained positions
    made, kept_gradients = [], products.kept_gradients
    monkeypatch.setattr(
        products, "kept_gradients", lambda *a, **k: (made.append(a[1]), kept_gradients(*a, **k))[1]
    )
    parts = small_runs.parts_of(tmp_path, loss__skip_below=0.3, **NOT_DETERMINISTIC)
    parts.progress.kept_guess = 0.25
    small_runs.steps(parts, 2)
    place.wait()
    with no_sync(place):
        small_runs.steps(parts, 1)
    assert len(small_runs.losses(parts)) == 3
    assert made, "no row was left out of the products"


@anywhere("train step", dtype="bfloat16")
def test_the_proof_can_fail(place, tmp_path):
    """A number that is read is seen; without this a mode that does nothing would pass for a proof."""
    parts = small_runs.parts_of(tmp_path, **NOT_DETERMINISTIC)
    small_runs.steps(parts, 1)
    with (
        pytest.raises((RuntimeError, AssertionError), match=r"called a synchronizing|_local_scalar_dense"),
        no_sync(place),
    ):
        float(parts.ledger.open_loss())


@anywhere("train step", "head", dtype="bfloat16")
def test_an_evaluation_waits_once_for_its_last_read(place, tmp_path):
    parts = small_runs.parts_of(tmp_path, data__validation_fraction=0.5, **NOT_DETERMINISTIC)
    assert len(parts.validation._rows) >= 3
    first = parts.validation(parts.model)  # compiles what a row without a gradient takes
    place.wait()
    if place.on_gpu:
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            again = parts.validation(parts.model)
        torch.cuda.set_sync_debug_mode("default")
        waits = [str(warning.message) for warning in told if "called a synchronizing" in str(warning.message)]
        assert len(waits) == 1, f"{len(waits)} waits for {len(parts.validation._rows)} rows"
    else:
        with SyncCounter() as syncs:
            again = parts.validation(parts.model)
        assert syncs.total == 0, syncs.found
    assert torch.equal(first.stats.table, again.stats.table)


@anywhere("train step", "head", "attention", "row kernel", dtype="bfloat16")
def test_bf16_is_fp32_within_bf16(place, tmp_path):
    """Losses of six updates and the weights they lead to. bf16's step is 2⁻⁸ = 4e-3."""
    ends = []
    for dtype in ("float32", "bfloat16"):
        parts = small_runs.parts_of(tmp_path / dtype, model__compute_dtype=dtype, **NOT_DETERMINISTIC)
        start = [p.detach().clone() for p in map(small_runs.local, parts.optimizer.names.values())]
        small_runs.steps(parts, 6)
        moved = [
            small_runs.local(p).detach() - old
            for p, old in zip(parts.optimizer.names.values(), start, strict=True)
        ]
        ends.append((small_runs.losses(parts), torch.cat([m.flatten() for m in moved]).double()))
    (wide, wide_moved), (narrow, narrow_moved) = ends
    assert wide[-1] < 0.9 * wide[0]
    assert max(abs(a - b) / a for a, b in zip(wide, narrow, strict=True)) < 0.01, (wide, narrow)
    assert float((wide_moved - narrow_moved).norm()) < 0.1 * float(wide_moved.norm())


def run_out_of_memory(parts, place, *, row):
    """In the backward pass of the `row`-th row of the next update, when the last layer's is over and the
    first's is not."""
    seen = []

    def full(gradient):
        if place.on_gpu:
            total = torch.cuda.get_device_properties(place.device).total_memory
            # the allocator's own error, from its own thread
            torch.empty(2 * total, dtype=torch.uint8, device=place.device)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has …")

    def watch(module, arguments, output):
        seen.append(output)
        if len(seen) == row:
            torch.rand(3, device=place.device)  # dropout would draw from this stream
            output.register_hook(full)

    return decoder_layers(parts.model)[0].mlp.register_forward_hook(watch)


@anywhere("train step", dtype="bfloat16")
@pytest.mark.parametrize("row", [1, 2])
def test_out_of_memory_in_backward_then_the_same_update(place, row, tmp_path):
    """Nothing is changed by it, and the update made again is that of a run which never met it, bit for
    bit."""
    undisturbed = small_runs.parts_of(tmp_path / "undisturbed", optim__name="adamw8bit")
    small_runs.steps(undisturbed, 4)
    parts = small_runs.parts_of(tmp_path / "disturbed", optim__name="adamw8bit")
    small_runs.steps(parts, 2)
    before = small_runs.state_of(parts)
    assert len(small_runs.updates_of(parts)[2].ranks[0]) >= 2
    hook = run_out_of_memory(parts, place, row=row)
    with pytest.raises(OutOfMemory) as caught:
        train_step(parts, small_runs.updates_of(parts)[2])
    hook.remove()
    assert not caught.value.torn, "the state is whole, so the run can go on"
    assert small_runs.state_of(parts) == before
    assert all(p.grad is None for p in parts.model.parameters())
    del caught
    small_runs.steps(parts, 2)
    assert small_runs.losses(parts) == small_runs.losses(undisturbed)
    assert small_runs.state_of(parts) == small_runs.state_of(undisturbed)


@anywhere("train step", dtype="bfloat16")
def test_an_update_that_leaves_no_gradient_is_an_error(place, tmp_path, monkeypatch):
    """A run would go on silently without training: norm 0.0, no veto, weights that stand still."""
    parts = small_runs.parts_of(tmp_path)
    small_runs.steps(parts, 1)
    loss = parts.model.loss
    loose = torch.zeros((), device=place.device, requires_grad=True)

    def reaches_nothing(row):
        with torch.no_grad():
            value, stats = loss(row)
        return value + loose, stats

    monkeypatch.setattr(parts.model, "loss", reaches_nothing)
    with pytest.raises(TrainingError, match=r"update 2: .*no gradient"):
        train_step(parts, small_runs.updates_of(parts)[1])
