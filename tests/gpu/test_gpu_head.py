"""The fused head on the device: law 3 beside plain torch on the same rows, two chunks against one, frozen
parts, no rows."""

import pytest
import torch
import torch.nn.functional as F

from repsft_fast.ops import row_pass
from repsft_fast.ops.linear_cross_entropy import linear_cross_entropy
from repsft_fast.ops.reference import linear_cross_entropy_reference
from repsft_fast.row import IGNORE_INDEX
from tests.gpu.places import Law3, Place, anywhere, by_dtype

# numpy speaks up where the hardware computes inf and NaN
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
# rows, hidden size, vocabulary, share of untrained rows: at least 10⁴ elements in every output that is judged
# by its RMS
SHAPES = ((512, 64, 1000, 0.0), (300, 128, 4097, 0.5), (640, 160, 16384, 0.9))


def plain_head(hidden, head, targets):
    """(mean loss, hidden gradient, head gradient): the three products of a plain loop in the dtype of the
    operands, the loss in fp32. Its memory is laid out as ours: a product of rows that begin elsewhere takes
    another algorithm, of another error."""
    columns = head.shape[0]
    if row_pass.kernel_runs(hidden.device, hidden.dtype):
        logits = row_pass.padded_logits(hidden.shape[0], columns, hidden.dtype, hidden.device)
    else:
        logits = hidden.new_empty(hidden.shape[0], columns)
    leaf = torch.mm(hidden, head.T, out=logits).detach().requires_grad_()
    loss = F.cross_entropy(leaf.float(), targets)
    (gradient,) = torch.autograd.grad(loss, leaf)
    logits.copy_(gradient)
    return loss.detach(), torch.mm(logits, head), torch.mm(logits.T, hidden)


def beside_plain_torch(place, dtype, count, width, vocabulary, untrained):
    """Law 3 for both gradients and a bound for the loss. Plain torch is given the rows that are trained and
    no others: a product of 64 rows takes another algorithm than one of 6, with five times its error."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(count, width, generator=generator).to(dtype)
    head = (torch.randn(vocabulary, width, generator=generator) / width**0.5).to(dtype)
    targets = torch.randint(vocabulary, (count,), generator=generator)
    targets[torch.randperm(count, generator=generator)[: round(untrained * count)]] = IGNORE_INDEX
    rows = (targets != IGNORE_INDEX).nonzero()[:, 0]
    weights = (targets != IGNORE_INDEX).float() / len(rows)
    truth, _, *exact = linear_cross_entropy_reference(
        hidden.double(), head.double(), targets, weights.double(), rows
    )

    there = [x.to(place.device) for x in (hidden, head, targets, weights, rows)]
    plain_loss, plain_hidden, plain_weight = plain_head(there[0][there[4]], there[1], there[2][there[4]])
    ours = [x.clone().requires_grad_() for x in there[:2]]
    loss, _ = linear_cross_entropy(*ours, *there[2:])
    loss.backward()

    assert not ours[0].grad[there[2] == IGNORE_INDEX].any(), "rows that are not trained have a gradient"
    # fp32's own rounding of sums of up to 16,384
    law, floor = Law3(), 1e-6 if dtype == torch.float32 else Law3.FLOOR
    law.add("hidden gradient", ours[0].grad[there[4]].cpu(), plain_hidden.cpu(), exact[0][rows], floor=floor)
    law.add("head gradient", ours[1].grad.cpu(), plain_weight.cpu(), exact[1], floor=floor)
    law.hold()
    bound = 1e-5 if dtype == torch.float32 else 4e-3  # one number is no RMS: bf16's own step
    allowed = max(1.5 * abs(float(plain_loss) - float(truth)), bound * float(truth))
    assert abs(float(loss.detach()) - float(truth)) <= allowed


@by_dtype("head", here=[torch.float32])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"N{s[0]}-V{s[2]}-untrained{s[3]:.0%}")
def test_the_error_is_that_of_plain_torch_on_the_same_rows(place, dtype, shape):
    beside_plain_torch(place, dtype, *shape)


@pytest.mark.parametrize("wrong", ["loss", "gradient"])
def test_the_law_sees_a_wrong_head(wrong, monkeypatch):
    right = linear_cross_entropy

    def off(*operands):
        loss, stats = right(*operands)
        return (loss * 1.0001 if wrong == "loss" else loss.detach() + 1.0001 * (loss - loss.detach())), stats

    monkeypatch.setitem(globals(), "linear_cross_entropy", off)
    with pytest.raises(AssertionError):
        beside_plain_torch(Place("cpu"), torch.float32, *SHAPES[0])


class Head:
    """A head whose operands are of `dtype`, its truth in float64 on the CPU."""

    def __init__(self, place, dtype):
        rows = place.pick(12, 640)
        width, vocabulary = place.pick((16, 100), (64, 1000))
        generator = torch.Generator().manual_seed(5)
        self.place = place
        self.hidden = torch.randn(rows, width, generator=generator).to(dtype)
        self.head = (torch.randn(vocabulary, width, generator=generator) / 4).to(dtype)
        self.targets = torch.randint(vocabulary, (rows,), generator=generator)
        self.targets[::3] = IGNORE_INDEX
        self.weights = torch.rand(rows, generator=generator)
        self.rows = torch.nonzero(self.targets != IGNORE_INDEX)[:, 0]
        self.truth = linear_cross_entropy_reference(
            self.hidden.double(), self.head.double(), self.targets, self.weights.double(), self.rows
        )

    def run(self, scale=1.0, *, chunks=1, frozen=(), **options):
        """(loss, statistics, hidden gradient, head gradient), on the CPU; the loss is multiplied by `scale`
        before backward."""
        there = self.place.device
        hidden, head = (x.to(there, copy=True).requires_grad_() for x in (self.hidden, self.head))
        for name, tensor in (("hidden", hidden), ("head", head)):
            tensor.requires_grad_(name not in frozen)
        head.grad_dtype = torch.float32
        size = head.shape[0] * head.element_size()
        budget = size * (-(-len(self.rows) // chunks)) * 5 // 4 + size  # a fifth is the torch path's own
        cut = row_pass.chunk_ranges(len(self.rows), head.shape[0], head.element_size(), budget)
        assert len(cut) == chunks or not len(self.rows), cut
        loss, stats = linear_cross_entropy(
            hidden,
            head,
            self.targets.to(there),
            self.weights.to(there),
            self.rows.to(there),
            chunk_bytes=budget,
            **options,
        )
        (loss * scale).backward()
        return loss.detach().cpu(), stats, hidden.grad, head.grad


@by_dtype("head", on="interpreter")
def test_two_chunks_are_one(place, dtype):
    """Sums in another order: neither errs more than the other by law 3's bound, or twice where one bf16
    rounding more is made: in one chunk the head's gradient is finished in backward, where a scale of 1/3
    reaches it through the hidden states."""
    head = Head(place, dtype)
    one, two = head.run(1 / 3), head.run(1 / 3, chunks=2)
    _, truth, *exact = head.truth
    tight = truth.margin > 1e-2  # above the rounding of logits in half precision
    for stats in (one[1], two[1]):
        assert torch.equal(stats.correct.cpu()[tight], truth.correct[tight])
    least = place.pick(100, 10_000)
    for first, second in ((one, two), (two, one)):
        law = Law3(at_least=least)
        for name, a, b, wanted in zip(("hidden gradient", "head gradient"), first[2:], second[2:], exact):
            # In fp32 products of other sizes take other algorithms: what is held is the rounding of a sum of
            # 1,000.
            floor = 2e-6 if dtype == torch.float32 else Law3.FLOOR
            law.add(
                name,
                a.cpu(),
                b.cpu(),
                wanted / 3,
                factor=2.0 if dtype == torch.bfloat16 else 1.5,
                floor=floor,
            )
        law.hold()
        rounding = 8 * torch.finfo(dtype).eps
        torch.testing.assert_close(first[1].loss.cpu().double(), truth.loss, rtol=rounding, atol=rounding)
        assert abs(float(first[0]) - float(head.truth[0])) <= rounding * float(head.truth[0])


@anywhere("head", dtype="bfloat16", on=None)
def test_a_bf16_parameter_gets_the_gradient_that_autograd_would_cast(place):
    """Finished in backward, in bf16 at once: one rounding of the fp32 gradient, as where autograd casts
    it."""
    head = Head(place, torch.bfloat16)
    wide = head.run()[3]
    hidden, weight = head.hidden.to(place.device), head.head.to(place.device).requires_grad_()
    loss, _ = linear_cross_entropy(
        hidden, weight, *(x.to(place.device) for x in (head.targets, head.weights, head.rows))
    )  # fmt: skip
    loss.backward()
    assert weight.grad.dtype == torch.bfloat16
    assert float((weight.grad.float() - wide).norm()) <= 2.0**-9 * float(wide.norm())


@anywhere("head", dtype="float32", on="interpreter")
def test_what_is_frozen_and_no_rows(place):
    whole = Head(place, torch.float32)
    full = whole.run()
    for name, left in (("hidden", 3), ("head", 2)):
        part = whole.run(frozen=(name,))
        assert part[5 - left] is None
        assert float((part[left] - full[left]).norm()) <= 1e-6 * float(full[left].norm())
    none = Head(place, torch.float32)
    none.rows = none.rows[:0]
    loss, stats, *gradients = none.run()
    assert float(loss) == 0.0
    assert stats.loss.numel() == 0
    assert all(not gradient.any() for gradient in gradients)
