"""Rows left out without asking how many: against the full products with zeros in them, in Triton's
interpreter."""

import math

import pytest
import torch

from csrc_triton import kept_rows
from repsft_fast.ops import products
from repsft_fast.ops.linear_cross_entropy import linear_cross_entropy
from repsft_fast.selftest.syncs import SyncCounter
from tests.helpers.interpreter import interpret

# numpy speaks up where the hardware computes inf and NaN
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
N, H, V = 90, 24, 77
TAU = 2.0**-6


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    interpret(monkeypatch, "csrc_triton.cross_entropy", "csrc_triton.kept_rows")
    monkeypatch.setattr(products, "CAPACITY_STEP", 1)


def operands(dtype=torch.float32, memorised=0.6):
    """Row i is memorised or not at random; its 1 − p is far from the threshold either way."""
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(V, H, generator=generator)
    targets = torch.randint(V, (N,), generator=generator)
    hidden = 0.2 * torch.randn(N, H, generator=generator)
    peaked = torch.rand(N, generator=generator) < memorised
    hidden[peaked] += 3.0 * head[targets[peaked]]
    weights = torch.rand(N, generator=generator) + 0.5
    return [hidden.to(dtype).requires_grad_(), head.to(dtype).requires_grad_(), targets, weights], peaked


def run(share, *, chunk=N, dtype=torch.float32, memorised=0.6, change=None, frozen=()):
    (hidden, head, targets, weights), _ = operands(dtype, memorised)
    head.grad_dtype = torch.float32
    if change is not None:
        change(hidden, targets)
    for name, tensor in (("hidden", hidden), ("head", head)):
        tensor.requires_grad_(name not in frozen)
    size = chunk * V * dtype.itemsize * 5 // 4 + 64
    loss, stats = linear_cross_entropy(
        hidden, head, targets, weights, torch.arange(N), skip_below=TAU, kept_share=share, chunk_bytes=size
    )
    loss.backward()
    return loss.detach(), stats, hidden.grad, head.grad


def test_the_operands_are_partly_memorised():
    _, stats, *_ = run(1.0)
    _, peaked = operands()
    assert torch.equal(stats.log10_miss < math.log10(TAU), peaked)
    assert 30 < int(peaked.sum()) < 70


@pytest.mark.parametrize(
    ("share", "memorised", "chunk"),
    [
        (0.0, 0.0, N),
        (0.0, 0.6, 40),
        (0.2, 0.6, N),
        (0.2, 0.0, 40),
        (0.2, 1.0, N),
        (0.38, 0.6, 40),
        (0.9, 0.6, N),
        (0.9, 0.0, 40),
    ],
)
def test_any_share_gives_the_gradients_of_the_full_products(share, memorised, chunk):
    """Too small, just right, too large: what differs is the order of fp32 sums."""
    loss, stats, grad_hidden, grad_head = run(share, chunk=chunk, memorised=memorised)
    full_loss, full_stats, full_hidden, full_head = run(1.0, chunk=chunk, memorised=memorised)
    assert torch.equal(loss, full_loss)
    assert torch.equal(stats.entropy, full_stats.entropy)
    assert (grad_hidden - full_hidden).norm() <= 1e-6 * full_hidden.norm()
    assert (grad_head - full_head).norm() <= 1e-6 * full_head.norm()
    assert torch.equal(grad_hidden == 0, full_hidden == 0)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5])
def test_half_precision_is_as_near_to_float64_as_the_full_products(share):
    (hidden, head, targets, weights), peaked = operands(torch.float16)
    logits = hidden.detach().double() @ head.detach().double().T
    gradient = weights.double()[:, None] * (logits.softmax(1) - torch.nn.functional.one_hot(targets, V))
    gradient[peaked] = 0.0
    truth = gradient @ head.detach().double(), gradient.T @ hidden.detach().double()
    ours, full = run(share, dtype=torch.float16)[2:], run(1.0, dtype=torch.float16)[2:]
    for exact, a, b in zip(truth, ours, full):
        assert (a.double() - exact).norm() <= 1.5 * (b.double() - exact).norm()


@pytest.mark.parametrize("frozen", ["hidden", "head"])
def test_what_is_frozen_costs_nothing(frozen, monkeypatch):
    name = {"hidden": "kept_hidden", "head": "kept_head"}[frozen]
    monkeypatch.setattr(kept_rows, name, lambda *_: pytest.fail("computed although frozen"))
    ours, full = run(0.3, frozen=(frozen,)), run(1.0, frozen=(frozen,))
    at = 3 if frozen == "hidden" else 2
    assert (ours[at] - full[at]).norm() <= 1e-6 * full[at].norm()


@pytest.mark.parametrize("share", [0.1, 0.9])
def test_a_row_that_is_not_a_number_spoils_what_it_spoils_otherwise(share):
    def spoil(hidden, targets):
        targets[N - 1] = -1

    for a, b in zip(run(share, change=spoil)[2:], run(1.0, change=spoil)[2:]):
        assert torch.equal(a.isnan(), b.isnan())
        assert a.isnan().any()


def test_nothing_is_read_and_no_shape_depends_on_the_count():
    shapes = []
    for memorised in (0.0, 0.6, 1.0):
        (hidden, head, targets, weights), _ = operands(memorised=memorised)
        rows = torch.arange(N)
        sizes: list[tuple[int, ...]] = []

        def note(gradient, other, order, count, room, out, sizes=sizes):
            sizes.append((*gradient.shape, room))

        with pytest.MonkeyPatch.context() as patch, SyncCounter() as syncs:
            # The interpreter itself copies operands to the host: what is counted is what stands around the
            # kernels.
            patch.setattr("csrc_triton.cross_entropy.cross_entropy_rows_fwd", lambda *_, **__: None)
            patch.setattr(kept_rows, "kept_hidden", note)
            patch.setattr(kept_rows, "kept_head", note)
            linear_cross_entropy(hidden, head, targets, weights, rows, skip_below=TAU, kept_share=0.4)[
                0
            ].backward()
        assert syncs.found == {}
        shapes.append(sizes)
    assert shapes[0] == shapes[1] == shapes[2]
    assert shapes[0][0] == (N, V, 36)


def test_without_a_threshold_the_share_is_not_used(monkeypatch):
    monkeypatch.setattr(products, "kept_gradients", lambda *_, **__: pytest.fail("rows left out at τ = 0"))
    (hidden, head, targets, weights), _ = operands()
    linear_cross_entropy(hidden, head, targets, weights, torch.arange(N), kept_share=0.1)[0].backward()


def test_where_all_rows_may_be_kept_nothing_is_sorted_or_copied(monkeypatch):
    monkeypatch.setattr(products, "kept_gradients", lambda *_, **__: pytest.fail("a copy of all rows"))
    run(1.0)


def test_capacity_is_in_steps_and_never_above_all(monkeypatch):
    monkeypatch.setattr(products, "CAPACITY_STEP", 256)
    assert [products.capacity(1000, share) for share in (0.0, 0.1, 0.256, 0.2565, 0.9, 1.0)] == [
        0, 256, 256, 512, 1000, 1000,
    ]  # fmt: skip


def test_wrong_operands_are_refused():
    gradient, head, order = torch.zeros(4, 16), torch.zeros(16, 8), torch.arange(4)
    with pytest.raises(ValueError, match="first inside the rows"):
        kept_rows.kept_hidden(gradient, head, order, torch.tensor([4]), 5, torch.zeros(4, 8))
    with pytest.raises(ValueError, match="count contiguous"):
        kept_rows.kept_hidden(gradient, head, order, torch.tensor(4), 0, torch.zeros(4, 8))
    with pytest.raises(ValueError, match="accumulator"):
        kept_rows.kept_head(
            gradient, torch.zeros(4, 8), order, torch.tensor([4]), 0, torch.zeros(16, 8).half()
        )
