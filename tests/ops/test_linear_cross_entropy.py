"""The fused head as its callers see it: gradients, rows, scales, refusals, compilation, memory and syncs."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from repsft_fast.ops import products, row_pass
from repsft_fast.ops.linear_cross_entropy import linear_cross_entropy
from repsft_fast.ops.reference import linear_cross_entropy_reference
from repsft_fast.row import IGNORE_INDEX
from repsft_fast.selftest.syncs import SyncCounter
from tests.helpers.peak import peak_bytes

N, H, V = 37, 16, 301
FIELDS = ("loss", "correct", "entropy", "top1_probability", "margin", "log10_miss")
EXACT = 1e-12  # relative, float64


class Case:
    """Float64 inputs, so that what differs is wrong and not rounded."""

    def __init__(self, seed=0, dtype=torch.float64, n=N, masked=0.3):
        generator = torch.Generator().manual_seed(seed)
        self.hidden = torch.randn(n, H, generator=generator, dtype=dtype).requires_grad_()
        self.head = torch.randn(V, H, generator=generator, dtype=dtype).requires_grad_()
        self.targets = torch.randint(V, (n,), generator=generator)
        self.targets[torch.rand(n, generator=generator) < masked] = IGNORE_INDEX
        self.weights = torch.rand(n, generator=generator, dtype=dtype)
        self.rows = torch.nonzero(self.targets != IGNORE_INDEX)[:, 0]

    def call(self, **options):
        return linear_cross_entropy(self.hidden, self.head, self.targets, self.weights, self.rows, **options)

    def truth(self, **options):
        return linear_cross_entropy_reference(
            self.hidden, self.head, self.targets, self.weights, self.rows, **options
        )


def close(ours, truth):
    torch.testing.assert_close(ours, truth, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("chunk_bytes", [1, V * 8 * 5, None])
def test_equals_the_reference_at_any_chunk_size(chunk_bytes, softcap):
    case = Case()
    loss, stats = case.call(chunk_bytes=chunk_bytes, softcap=softcap)
    loss.backward()
    truth, truth_stats, grad_hidden, grad_head = case.truth(softcap=softcap)
    close(loss.detach(), truth)
    close(case.hidden.grad, grad_hidden)
    close(case.head.grad, grad_head)
    for name in FIELDS:
        close(getattr(stats, name), getattr(truth_stats, name))
        assert not getattr(stats, name).requires_grad


def test_rows_are_found_when_not_given_and_weights_default_to_one():
    case = Case()
    found, stats = linear_cross_entropy(case.hidden, case.head, case.targets)
    given, given_stats = linear_cross_entropy(case.hidden, case.head, case.targets, torch.ones(N), case.rows)
    assert torch.equal(found, given)
    assert torch.equal(stats.loss, given_stats.loss)


def test_the_row_order_given_is_the_order_of_the_statistics():
    case = Case()
    _, stats = case.call()
    order = torch.randperm(case.rows.numel(), generator=torch.Generator().manual_seed(1))
    _, shuffled = linear_cross_entropy(case.hidden, case.head, case.targets, case.weights, case.rows[order])
    close(shuffled.loss, stats.loss[order])


def test_two_forwards_before_one_backward():
    a, b = Case(seed=1), Case(seed=2)
    b.head = a.head
    (a.call(chunk_bytes=V * 40)[0] + 3.0 * b.call(chunk_bytes=V * 40)[0]).backward()
    _, _, hidden_a, head_a = a.truth()
    _, _, hidden_b, head_b = b.truth()
    close(a.hidden.grad, hidden_a)
    close(b.hidden.grad, 3 * hidden_b)
    close(a.head.grad, head_a + 3 * head_b)


def test_tied_embeddings_add_up():
    case = Case()
    tokens = torch.arange(N) % V
    hidden = torch.tanh(case.head[tokens])
    loss, _ = linear_cross_entropy(hidden, case.head, case.targets, case.weights, case.rows)
    loss.backward()
    check = case.head.detach().clone().requires_grad_()
    logits = torch.tanh(check[tokens]) @ check.T
    expected = torch.nn.functional.cross_entropy(
        logits, case.targets, reduction="none", ignore_index=IGNORE_INDEX
    )
    (expected * case.weights).sum().backward()
    close(case.head.grad, check.grad)


def test_backward_hands_over_once():
    loss, _ = Case().call()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward ran twice"):
        loss.backward()


@pytest.mark.parametrize("frozen", ["head", "hidden", "both"])
def test_what_is_frozen_gets_no_gradient(frozen):
    case = Case()
    case.head.requires_grad_(frozen == "hidden")
    case.hidden.requires_grad_(frozen == "head")
    loss, _ = case.call()
    truth, _, grad_hidden, grad_head = case.truth()
    close(loss.detach(), truth)
    assert loss.requires_grad == (frozen != "both")
    if frozen != "both":
        loss.backward()
    for tensor, gradient in ((case.head, grad_head), (case.hidden, grad_hidden)):
        if tensor.requires_grad:
            close(tensor.grad, gradient)
        else:
            assert tensor.grad is None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_computes_no_gradient(mode, monkeypatch):
    case = Case()
    expected, _ = case.call()
    monkeypatch.setattr(
        products, "add_head_gradient", lambda *_, **__: pytest.fail("a gradient under no_grad")
    )
    with mode():
        loss, stats = case.call()
    assert torch.equal(loss, expected.detach())
    assert not loss.requires_grad
    assert stats.loss.isfinite().all()


@pytest.mark.parametrize("n", [0, 1, 5])
def test_nothing_trained_is_exactly_zero(n):
    hidden = torch.randn(n, H, requires_grad=True)
    head = torch.randn(V, H, requires_grad=True)
    for rows in (None, torch.empty(0, dtype=torch.int64)):
        loss, stats = linear_cross_entropy(hidden, head, torch.full((n,), IGNORE_INDEX), torch.ones(n), rows)
        loss.backward()
        assert loss.item() == 0.0
        assert torch.equal(hidden.grad, torch.zeros_like(hidden))
        assert torch.equal(head.grad, torch.zeros_like(head))
        assert stats.sum_by(torch.empty(0, dtype=torch.int64), 2).total.tolist() == [0, 0]


@pytest.mark.parametrize("target", [-1, -(2**40), V, 2**40])
def test_a_target_out_of_range_is_nan_and_counted(target):
    case = Case(masked=0.0)
    case.targets[3] = target
    loss, stats = case.call()
    loss.backward()
    assert loss.isnan()
    assert stats.loss.isnan().nonzero().tolist() == [[3]]
    assert not stats.correct[3]
    assert stats.sum_by(torch.zeros(N, dtype=torch.int64), 1).nonfinite.tolist() == [1]
    assert case.hidden.grad[3].isnan().all()
    assert case.head.grad.isnan().any()


@pytest.mark.parametrize(("rows", "chunks"), [(1, 20), (5, 5), (12, 2), (25, 1)])
def test_the_bytes_given_decide_the_chunks(rows, chunks):
    """One product of logits a chunk; a fifth of the bytes is the row pass's own, where that is a row or
    more."""
    case = Case(n=20, masked=0.0)

    class Products(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += function.overloadpacket is torch.ops.aten.mm
            return function(*args, **(kwargs or {}))

    with torch.no_grad(), Products() as products:
        case.call(chunk_bytes=rows * V * 8)
    assert products.count == chunks


@pytest.mark.parametrize("trained", ["hidden", "head", "both"])
def test_without_gradients_one_product_is_all(trained):
    """Parameters that want gradients get none computed under no_grad: 2·N'·H·V FLOPs."""
    case = Case()
    case.hidden.requires_grad_(trained != "head")
    case.head.requires_grad_(trained != "hidden")
    with torch.no_grad(), FlopCounterMode(display=False) as flops:
        case.call()
    assert flops.get_total_flops() == 2 * case.rows.numel() * H * V


def test_a_negative_target_is_not_taken_for_an_untrained_one():
    """Where the rows are found on the device, IGNORE_INDEX alone leaves one out."""
    case = Case(masked=0.0)
    case.targets[3], case.targets[5] = -1, IGNORE_INDEX
    loss, stats = linear_cross_entropy(case.hidden, case.head, case.targets)
    assert loss.isnan()
    assert stats.loss.isnan().nonzero().tolist() == [[3]]
    assert stats.loss.numel() == N - 1


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_not_finite_inputs_give_a_not_finite_loss(value):
    case = Case(masked=0.0)
    with torch.no_grad():
        case.hidden[2, 0] = value
    _, stats = case.call()
    assert stats.loss.isfinite().tolist() == [row != 2 for row in range(N)]
    assert not stats.correct[2]


def test_ties_go_to_the_first_as_in_argmax():
    """Equal logits within and across the blocks of 128 columns in which the maximum is sought."""
    logits = torch.zeros(6, 300)
    logits[:, [10, 11, 200]] = 3.0
    targets = torch.tensor([10, 11, 200, 9, 12, 0])
    _, stats = linear_cross_entropy(logits, torch.eye(300), targets)
    assert stats.correct.tolist() == [True, False, False, False, False, False]
    assert stats.margin.tolist() == [0.0] * 6


def test_logits_that_overflow_to_minus_infinity_have_no_mass():
    hidden = torch.tensor([[3e38, 0.0]], requires_grad=True)
    head = torch.tensor([[1.0, 0.0], [-3e38, 0.0], [0.5, 1.0]], requires_grad=True)
    loss, stats = linear_cross_entropy(hidden, head, torch.tensor([0]))
    assert loss == 0.0
    assert stats.entropy.tolist() == [0.0]
    assert stats.correct.tolist() == [True]


def test_memorised_rows_keep_their_gradient_in_fp32():
    """p(target) = 1 − 2e-18: a loss of −log(p) in fp32 is 0, and so is its gradient."""
    hidden = torch.tensor([[40.0]], requires_grad=True)
    head = torch.tensor([[1.0], [0.0], [0.0]], requires_grad=True)
    loss, stats = linear_cross_entropy(hidden, head, torch.tensor([0]))
    loss.backward()
    miss = 2 * math.exp(-40)
    assert loss.item() == pytest.approx(miss, rel=1e-5)  # fp32 with a logit of 40: exp amplifies 40·2⁻²⁴
    assert head.grad[0].item() == pytest.approx(-40 * miss, rel=1e-5)
    assert head.grad[1].item() == pytest.approx(20 * miss, rel=1e-5)
    assert stats.log10_miss.item() == pytest.approx(math.log10(miss), rel=1e-6)


class TestMemorisedRows:
    def peaked(self, dtype=torch.float64):
        """Half of the rows nearly certain, their misses spread around the thresholds."""
        case = Case(seed=4, dtype=dtype, n=64, masked=0.1)
        trained = case.targets != IGNORE_INDEX
        with torch.no_grad():
            strength = torch.linspace(0.0, 2.0, 64, dtype=dtype)[:, None]
            case.hidden += strength * case.head[case.targets.clamp_min(0)] * trained[:, None]
        return case

    def misses(self, case):
        _, stats = case.call()
        return 10**stats.log10_miss

    @pytest.mark.parametrize("exponent", [4, 8, 12])
    def test_the_gradient_is_that_of_the_rows_kept_and_nothing_else_changes(self, exponent):
        tau = 2.0**-exponent
        case = self.peaked()
        kept = self.misses(case) >= tau
        assert 0 < int(kept.sum()) < kept.numel()
        loss, stats = case.call(skip_below=tau, chunk_bytes=V * 8 * 11)
        loss.backward()
        exact, exact_stats = case.call(chunk_bytes=V * 8 * 11)
        assert torch.equal(loss, exact)
        assert all(torch.equal(getattr(stats, name), getattr(exact_stats, name)) for name in FIELDS)
        rows = case.rows[kept]
        _, _, grad_hidden, grad_head = linear_cross_entropy_reference(
            case.hidden, case.head, case.targets, case.weights, rows
        )
        close(case.hidden.grad, grad_hidden)
        close(case.head.grad, grad_head)

    @pytest.mark.parametrize("tau", [2.0**-12, 2.0**-8, 0.1])
    @pytest.mark.parametrize("softcap", [None, 20.0])
    def test_a_dropped_logit_gradient_has_an_l1_norm_below_two_tau(self, tau, softcap):
        """An identity head makes the hidden gradient the logit gradient itself."""
        generator = torch.Generator().manual_seed(3)
        logits = torch.randn(400, 30, generator=generator, dtype=torch.float64)
        targets = torch.randint(30, (400,), generator=generator)
        logits[torch.arange(400), targets] += torch.linspace(0, 16, 400, dtype=torch.float64)
        head = torch.eye(30, dtype=torch.float64)
        gradients = []
        for skip_below in (0.0, tau):
            hidden = logits.clone().requires_grad_()
            linear_cross_entropy(hidden, head, targets, softcap=softcap, skip_below=skip_below)[0].backward()
            gradients.append(hidden.grad)
        lost = (gradients[0] - gradients[1]).abs().sum(1)
        assert 0 < lost.max() < 2 * tau
        if softcap is None:  # the bound is the norm itself, so it is nearly reached
            assert lost.max() > 1.5 * tau

    def test_zero_is_bit_equal_to_no_skipping(self):
        """Also for rows whose 1 − p is exactly 0 in fp32."""
        results = []
        for options in ({}, {"skip_below": 0.0}, {"skip_below": 1e-45}):
            case = self.peaked(torch.float32)
            with torch.no_grad():
                case.hidden[case.rows[0]] = 1000 * case.head[case.targets[case.rows[0]]]
            loss, stats = case.call(**options)
            assert stats.log10_miss[0] < -45
            loss.backward()
            results.append((loss.detach(), case.hidden.grad, case.head.grad))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other))

    def test_a_row_exactly_at_the_threshold_is_kept(self):
        hidden = torch.zeros(1, 2, requires_grad=True)  # two equal logits: 1 − p is exactly 1/2
        linear_cross_entropy(hidden, torch.eye(2), torch.tensor([0]), skip_below=0.5)[0].backward()
        assert hidden.grad.tolist() == [[-0.5, 0.5]]

    def test_all_memorised_leaves_zero_gradients(self):
        case = self.peaked()
        with torch.no_grad():
            case.head /= case.head.norm(dim=1, keepdim=True)
            case.hidden[case.rows] = 60 * case.head[case.targets[case.rows]]
        assert bool((self.misses(case) < 1e-3).all())
        case.call(skip_below=1e-3)[0].backward()
        assert torch.equal(case.head.grad, torch.zeros_like(case.head))
        assert torch.equal(case.hidden.grad, torch.zeros_like(case.hidden))


class TestPrecision:
    def test_autograd_casts_the_head_gradient_unless_the_parameter_takes_fp32(self):
        case = Case(dtype=torch.bfloat16)
        case.call()[0].backward()
        assert case.head.grad.dtype == torch.bfloat16
        wide = Case(dtype=torch.bfloat16)
        wide.head.grad_dtype = torch.float32
        wide.call()[0].backward()
        assert wide.head.grad.dtype == torch.float32
        assert torch.equal(wide.head.grad.bfloat16(), case.head.grad)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_inputs_are_computed_in_fp32_on_a_cpu(self, dtype):
        case = Case(dtype=dtype)
        loss, stats = case.call()
        assert loss.dtype == stats.loss.dtype == torch.float32
        truth, *_ = linear_cross_entropy_reference(
            case.hidden.double(), case.head.double(), case.targets, case.weights.double(), case.rows
        )
        assert loss.item() == pytest.approx(truth.item(), rel=1e-6)  # a sum of 26 fp32 losses

    def test_a_later_scale_is_exact(self):
        plain, scaled = Case(), Case()
        plain.call()[0].backward()
        (scaled.call()[0] * 0.5).backward()
        assert torch.equal(scaled.head.grad, plain.head.grad * 0.5)
        assert torch.equal(scaled.hidden.grad, plain.hidden.grad * 0.5)

    def test_stale_memory_does_not_matter(self):
        expected = Case().call(chunk_bytes=V * 8 * 9)
        row_pass.workspace("logits", 64, V, torch.float64, torch.device("cpu")).fill_(math.nan)
        case = Case()
        loss, stats = case.call(chunk_bytes=V * 8 * 9)
        loss.backward()
        assert torch.equal(loss, expected[0])
        assert torch.equal(stats.entropy, expected[1].entropy)
        assert case.hidden.grad.isfinite().all()
        assert case.head.grad.isfinite().all()


class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                {"hidden": torch.zeros(2, 3, H)},
                r"hidden: has the wrong shape, expected two dimensions, got \(2, 3, 16\)",
            ),
            ({"hidden": torch.zeros(N, H, dtype=torch.int64)}, "hidden: has an unusable dtype"),
            (
                {"lm_head": torch.zeros(V, H)},
                "lm_head: has another dtype than hidden, expected torch.float64",
            ),
            (
                {"lm_head": torch.zeros(V, H + 1, dtype=torch.float64)},
                r"lm_head: has the wrong shape, expected \(V >= 2, 16\)",
            ),
            ({"lm_head": torch.zeros(1, H, dtype=torch.float64)}, "lm_head: has the wrong shape"),
            (
                {"targets": torch.zeros(N - 1, dtype=torch.int64)},
                r"targets: has the wrong shape or dtype, expected \(37,\) int64",
            ),
            ({"targets": torch.zeros(N)}, "targets: has the wrong shape or dtype"),
            ({"weights": torch.zeros(N - 1)}, "weights: has the wrong shape or dtype"),
            ({"weights": torch.zeros(N, requires_grad=True)}, "weights: requires grad"),
            ({"rows": torch.zeros(N)}, "rows: has the wrong shape or dtype"),
            ({"rows": torch.zeros(3, dtype=torch.int64, device="meta")}, "rows: is on another device"),
            ({"skip_below": 1.0}, "skip_below: is out of range"),
            ({"skip_below": math.nan}, "skip_below: is out of range"),
            ({"softcap": 0.0}, "softcap: is out of range"),
            ({"softcap": math.inf}, "softcap: is out of range"),
            ({"chunk_bytes": 0}, "chunk_bytes: is out of range"),
            ({"kept_share": 1.5}, "kept_share: is out of range"),
            ({"kept_share": math.nan}, "kept_share: is out of range"),
        ],
    )
    def test_an_argument_that_cannot_be_used_is_named(self, change, message):
        case = Case()
        arguments = {
            "hidden": case.hidden, "lm_head": case.head, "targets": case.targets, "weights": case.weights, "rows": case.rows,
        } | change  # fmt: skip
        with pytest.raises(ValueError, match=message):
            linear_cross_entropy(**arguments)

    def test_a_row_index_out_of_range_is_an_error_and_no_access(self):
        case = Case()
        case.rows = torch.tensor([0, N])
        with pytest.raises((IndexError, RuntimeError), match=r"(?i)index"):
            case.call()


class TestCounts:
    @pytest.mark.parametrize("n", [0, 37])
    @pytest.mark.parametrize("options", [{}, {"softcap": 5.0}, {"chunk_bytes": V * 8 * 7}])
    def test_no_sync_with_given_rows(self, n, options):
        case = Case(n=n)
        zero = torch.zeros(case.rows.numel(), dtype=torch.int64)
        with SyncCounter() as syncs:
            loss, stats = case.call(**options)
            loss.backward()
            stats.sum_by(zero, 3)
            with torch.no_grad():
                case.call(**options)
        assert syncs.found == {}

    def test_peak_memory_is_a_quarter_of_full_logits(self):
        """Above the head gradient, which every head has to make."""
        n, vocabulary = 1024, 8192
        hidden = torch.randn(n, H, requires_grad=True)
        head = torch.randn(vocabulary, H, requires_grad=True)
        targets = torch.randint(vocabulary, (n,))
        rows = torch.arange(n)

        row_pass._local.__dict__.clear()  # buffers kept from other tests would not be seen
        peak = peak_bytes(lambda: linear_cross_entropy(hidden, head, targets, None, rows)[0].backward())
        peak -= 4 * (head.numel() + 4 * hidden.numel())
        full = 4 * n * vocabulary
        assert full // 8 < peak <= full // 4 + full // 50  # 2 %: per-row vectors and block maxima
