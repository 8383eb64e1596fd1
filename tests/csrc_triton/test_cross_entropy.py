"""The row kernel in Triton's CPU interpreter against the float64 reference: every output, odd shapes, hard
rows.

bf16 is left to the GPU suite: the interpreter truncates where the hardware rounds. Law 3 (errors beside plain
torch's) is in tests/laws/test_law3_kernel_error.py.
"""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from csrc_triton import cross_entropy as kernels
from csrc_triton.launch import padded_columns, row_block
from repsft_fast.ops import products, row_pass
from repsft_fast.ops.linear_cross_entropy import linear_cross_entropy
from repsft_fast.ops.reference import cross_entropy_rows, linear_cross_entropy_reference
from repsft_fast.row import IGNORE_INDEX
from tests.helpers.interpreter import interpret

# numpy speaks up where the hardware computes inf and NaN
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
FP32_ROUNDING = 3e-7  # of a whole gradient, as a norm: 1e-7 to 2e-7 over seeds
ORDER = ("loss", "entropy", "top1_probability", "margin", "log10_miss")


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    interpret(monkeypatch, "csrc_triton.cross_entropy")


class Rows:
    """Logits in a padded buffer whose padding, and whose outputs, start as NaN."""

    def __init__(self, logits, targets, weights=None, dtype=torch.float32):
        self.count, self.vocabulary = logits.shape
        self.buffer = torch.full((self.count, padded_columns(self.vocabulary)), math.nan, dtype=dtype)
        self.logits = self.buffer[:, : self.vocabulary]
        self.logits.copy_(logits)
        self.exact = self.logits.double()
        self.targets = targets
        self.weights = (
            torch.rand(self.count, generator=torch.Generator().manual_seed(9)) if weights is None else weights
        )
        self.table = torch.full((5, self.count + 3), math.nan)
        self.flags = torch.full((2, self.count + 3), 7, dtype=torch.uint8)

    def run(self, *, gradient=True, start=1, **options):
        kernels.cross_entropy_rows_fwd(
            self.logits,
            self.targets,
            self.weights,
            self.table,
            self.flags,
            start,
            gradient=gradient,
            **options,
        )
        inside = slice(start, start + self.count)
        outside = [i for i in range(self.count + 3) if not start <= i < start + self.count]
        assert self.table[:, outside].isnan().all()
        assert (self.flags[:, outside] == 7).all()
        return (
            dict(zip(ORDER, self.table[:, inside])),
            self.flags[0, inside].bool(),
            self.flags[1, inside].bool(),
        )

    def truth(self, **options):
        return cross_entropy_rows(self.exact, self.targets, self.weights.double(), **options)


def random_rows(count, vocabulary, dtype=torch.float32, spread=3.0):
    generator = torch.Generator().manual_seed(vocabulary)
    logits = spread * torch.randn(count, vocabulary, generator=generator)
    return Rows(logits, torch.randint(vocabulary, (count,), generator=generator), dtype=dtype)


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("vocabulary", [2, 3, 15, 16, 17, 127, 128, 129, 1000, 2048, 2049, 5003])
def test_every_output_and_the_gradient(vocabulary, dtype, softcap):
    rows = random_rows(7, vocabulary, dtype)
    numbers, correct, memorised = rows.run(softcap=softcap)
    _, stats, gradient = rows.truth(softcap=softcap)
    for name in ORDER:  # fp32 arithmetic on logits below 20: 20·2⁻²⁴ a logit, and rows of up to 5,003 sums
        torch.testing.assert_close(numbers[name].double(), getattr(stats, name), rtol=2e-6, atol=4e-6)
    assert torch.equal(correct, stats.correct)
    assert not memorised.any()
    one_rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(
        rows.logits.double(), gradient, rtol=one_rounding + 4e-6, atol=one_rounding * 1e-4
    )
    assert (rows.buffer[:, vocabulary:] == 0).all()


@pytest.mark.parametrize("count", [0, 1])
def test_no_row_and_one_row(count):
    rows = random_rows(count, 300)
    numbers, *_ = rows.run()
    assert numbers["loss"].shape == (count,)
    assert numbers["loss"].isfinite().all()


def test_without_gradient_the_logits_stay():
    rows = random_rows(5, 301)
    before = rows.buffer.clone()
    numbers, *_ = rows.run(gradient=False)
    assert torch.equal(rows.buffer.nan_to_num(7.0), before.nan_to_num(7.0))
    torch.testing.assert_close(numbers["loss"].double(), rows.truth()[1].loss, rtol=2e-6, atol=4e-6)


@pytest.mark.parametrize("softcap", [None, 4.0])
def test_without_statistics_loss_and_gradient_are_the_same_bits(softcap):
    whole, less = random_rows(5, 2100), random_rows(5, 2100)
    numbers, _, memorised = whole.run(softcap=softcap, skip_below=0.9)
    few, _, flags = less.run(softcap=softcap, skip_below=0.9, statistics=False)
    assert torch.equal(few["loss"], numbers["loss"])
    assert torch.equal(few["log10_miss"], numbers["log10_miss"])
    assert torch.equal(flags, memorised)
    assert torch.equal(less.buffer, whole.buffer)
    assert all(few[name].isnan().all() for name in ("entropy", "top1_probability", "margin"))  # not written


def test_memorised_tokens_keep_their_relative_precision():
    """p(target) up to 1 − e⁻⁸⁰: losses and gradients to a relative 1e-5, the rounding of d = M + log S − x_t
    ≈ −80."""
    leads = torch.tensor([5.0, 17.0, 30.0, 60.0, 80.0])
    logits = torch.zeros(5, 33)
    logits[:, 4] = leads
    rows = Rows(logits, torch.full((5,), 4))
    numbers, correct, _ = rows.run()
    _, stats, gradient = rows.truth()
    assert correct.all()
    torch.testing.assert_close(numbers["loss"].double(), stats.loss, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(numbers["entropy"].double(), stats.entropy, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(numbers["log10_miss"].double(), stats.log10_miss, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(rows.logits.double(), gradient, rtol=1e-5, atol=0.0)


def test_ties_go_to_the_first_also_across_blocks():
    vocabulary = 3 * row_block(10**6)[0]
    logits = torch.zeros(4, vocabulary)
    for column in (100, vocabulary // 2, vocabulary - 1):
        logits[:, column] = 5.0
    rows = Rows(logits, torch.tensor([100, vocabulary // 2, vocabulary - 1, 3]))
    numbers, correct, _ = rows.run()
    assert correct.tolist() == [True, False, False, False]
    assert numbers["margin"].tolist() == [0.0] * 4


def test_the_runner_up_may_be_anywhere():
    vocabulary = 2 * row_block(10**6)[0] + 5
    for best, second in ((0, 1), (1, 0), (vocabulary - 1, 0), (0, vocabulary - 1), (3, vocabulary - 2)):
        logits = torch.zeros(2, vocabulary)
        logits[:, best], logits[:, second] = 4.0, 2.5
        rows = Rows(logits, torch.tensor([best, second]))
        assert rows.run()[0]["margin"].tolist() == [1.5, 1.5]


def test_minus_infinity_has_no_mass():
    vocabulary = row_block(10**6)[0] + 40
    logits = torch.full((3, vocabulary), -math.inf)
    logits[0, 2], logits[0, vocabulary - 1] = 1.0, 2.0
    logits[1, vocabulary - 1] = 0.5  # the target alone has any mass
    logits[2, :5] = 1.0
    rows = Rows(logits, torch.tensor([2, vocabulary - 1, 7]))
    numbers, correct, _ = rows.run()
    assert numbers["loss"][0].item() == pytest.approx(math.log1p(math.e), rel=1e-6)
    assert numbers["loss"][1] == 0.0
    assert numbers["entropy"][1] == 0.0
    assert numbers["log10_miss"][1] == -math.inf
    assert numbers["loss"][2] == math.inf
    assert correct.tolist() == [False, True, False]
    assert rows.logits[:2].isfinite().all()
    torch.testing.assert_close(rows.logits[:2].double(), rows.truth()[2][:2], rtol=1e-6, atol=0.0)


def test_at_a_threshold_of_zero_nothing_is_memorised():
    """Not even a row whose 1 − p is exactly 0."""
    rows = random_rows(2, 40)
    rows.logits[0, rows.targets[0]] = 300.0
    numbers, _, memorised = rows.run(skip_below=0.0)
    assert numbers["loss"][0] == 0.0
    assert not memorised.any()


def test_a_target_without_mass_leaves_the_entropy_of_the_others():
    rows = random_rows(2, 40)
    rows.logits[0, rows.targets[0]] = -math.inf
    others = rows.logits[0, torch.arange(40) != rows.targets[0]].double().softmax(0)
    numbers, correct, _ = rows.run()
    assert numbers["loss"][0] == math.inf
    assert not correct[0]
    assert float(numbers["entropy"][0]) == pytest.approx(-float((others * others.log()).sum()), rel=2e-6)


# undefined at first; a chunk's gradient leaves zeros there
@pytest.mark.parametrize("padding", [math.nan, 0.0])
@pytest.mark.parametrize("target", [-1, IGNORE_INDEX, 40, 2**40, -(2**40)])
def test_a_target_out_of_range_is_nan_and_reads_nothing_outside(target, padding):
    rows = random_rows(3, 40)
    rows.buffer[:, 40:] = padding
    rows.targets[1] = target
    numbers, correct, memorised = rows.run(skip_below=0.5)
    assert numbers["loss"].isnan().tolist() == [False, True, False]
    assert not correct[1]
    assert not memorised[1]
    assert rows.logits[1].isnan().all()
    assert rows.logits[[0, 2]].isfinite().all()


@pytest.mark.parametrize("column", [3, 20])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_logit_that_is_not_a_number_spoils_its_row_only(value, column):
    rows = random_rows(3, 40)
    rows.targets[1] = 20
    rows.logits[1, column] = value
    numbers, correct, _ = rows.run()
    assert numbers["loss"].isfinite().tolist() == [True, False, True]
    assert not correct[1]
    assert rows.logits[[0, 2]].isfinite().all()


def test_memorised_rows_are_flagged_and_zeroed():
    logits = torch.zeros(6, 50)
    logits[:, 0] = torch.tensor([0.0, 4.0, 8.0, 12.0, 16.0, 20.0])
    rows = Rows(logits, torch.zeros(6, dtype=torch.int64))
    _, stats, gradient = rows.truth()
    expected = 10**stats.log10_miss < 2.0**-8
    numbers, _, memorised = rows.run(skip_below=2.0**-8)
    assert memorised.tolist() == expected.tolist() == [False, False, False, True, True, True]
    assert (rows.logits[memorised] == 0).all()
    torch.testing.assert_close(rows.logits[~memorised].double(), gradient[~memorised], rtol=1e-5, atol=0.0)
    torch.testing.assert_close(numbers["loss"].double(), stats.loss, rtol=1e-5, atol=0.0)


class TestContract:
    def test_unpadded_rows_are_refused(self):
        with pytest.raises(ValueError, match="rows padded to a multiple of 16 columns"):
            self.launch(logits=torch.zeros(2, 33))

    def test_misaligned_rows_are_refused(self):
        with pytest.raises(ValueError, match="aligned to 16 bytes"):
            self.launch(logits=torch.zeros(2 * 48 + 1)[1:].view(2, 48)[:, :33])

    @pytest.mark.parametrize(
        "change", [{"targets": torch.zeros(2)}, {"weights": torch.zeros(3)}, {"start": 3}]
    )
    def test_vectors_of_another_shape_or_place_are_refused(self, change):
        with pytest.raises(ValueError, match="csrc_triton: expected"):
            self.launch(**change)

    def launch(self, **change):
        arguments = {
            "logits": torch.zeros(2, 48)[:, :33],
            "targets": torch.zeros(2, dtype=torch.int64),
            "weights": torch.ones(2),
            "table": torch.zeros(5, 4),
            "flags": torch.zeros(2, 4, dtype=torch.uint8),
            "start": 0,
        } | change
        kernels.cross_entropy_rows_fwd(**arguments, gradient=True)


class TestHead:
    """The fused head through the kernel: the same interface, the same numbers."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    @pytest.mark.parametrize("vocabulary", [33, 300])
    def test_equals_the_reference(self, vocabulary, dtype):
        generator = torch.Generator().manual_seed(1)
        hidden = torch.randn(23, 8, generator=generator).to(dtype).requires_grad_()
        head = torch.randn(vocabulary, 8, generator=generator).to(dtype).requires_grad_()
        head.grad_dtype = torch.float32
        targets = torch.randint(vocabulary, (23,), generator=generator)
        targets[::4] = IGNORE_INDEX
        weights = torch.rand(23, generator=generator)
        loss, stats = linear_cross_entropy(hidden, head, targets, weights, chunk_bytes=vocabulary * 24)
        loss.backward()
        truth, truth_stats, grad_hidden, grad_head = linear_cross_entropy_reference(
            hidden.double(), head.double(), targets, weights.double()
        )
        rounding = 8 * torch.finfo(dtype).eps  # logits of size 8 in `dtype`, and gradients rounded to it
        assert loss.item() == pytest.approx(truth.item(), rel=rounding)
        torch.testing.assert_close(stats.loss.double(), truth_stats.loss, rtol=rounding, atol=rounding)
        torch.testing.assert_close(hidden.grad.double(), grad_hidden, rtol=rounding, atol=rounding)
        torch.testing.assert_close(head.grad.double(), grad_head, rtol=rounding, atol=rounding)
        assert head.grad.dtype == torch.float32

    def test_zero_tau_is_bit_equal_and_tau_zeroes_memorised_rows(self):
        logits = torch.zeros(4, 20)
        logits[torch.arange(4), torch.arange(4)] = torch.tensor([0.0, 5.0, 10.0, 20.0])
        head = torch.eye(20)
        gradients = []
        for tau in (0.0, 1e-45, 1e-3):
            hidden = logits.clone().requires_grad_()
            linear_cross_entropy(hidden, head, torch.arange(4), skip_below=tau)[0].backward()
            gradients.append(hidden.grad)
        assert torch.equal(gradients[0], gradients[1])
        assert gradients[2].any(1).tolist() == [True, True, False, False]

    def test_no_sync(self):
        from csrc_triton import launch
        from repsft_fast.selftest.syncs import SyncCounter

        hidden, head = torch.randn(5, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
        launches = []
        with pytest.MonkeyPatch.context() as patch, SyncCounter() as syncs:
            patch.setattr(kernels, "cross_entropy_rows_fwd", lambda *_, **options: launches.append(options))
            loss, _ = linear_cross_entropy(
                hidden, head, torch.arange(5), None, torch.arange(5), skip_below=0.01
            )
            loss.backward()
        assert syncs.found == {}
        assert len(launches) == 1
        assert launch.padded_columns(30) == 32


class TestFinishedInBackward:
    """One chunk: backward makes the product, with the scale in the hidden states."""

    N, H, V = 6, 8, 40

    def operands(self, seed=1, dtype=torch.float32):
        generator = torch.Generator().manual_seed(seed)
        hidden = torch.randn(self.N, self.H, generator=generator).to(dtype).requires_grad_()
        head = torch.randn(self.V, self.H, generator=generator).to(dtype).requires_grad_()
        head.grad_dtype = torch.float32
        return hidden, head, torch.randint(self.V, (self.N,), generator=generator)

    def gradients(self, scale, dtype=torch.float32, **options):
        hidden, head, targets = self.operands(dtype=dtype)
        loss, _ = linear_cross_entropy(hidden, head, targets, None, torch.arange(self.N), **options)
        (loss * scale).backward()
        return hidden.grad, head.grad

    @pytest.fixture
    def finished(self, monkeypatch):
        """The head gradients finished in backward: (rows, whether a scale came)."""
        found = []
        finish = products.Unfinished.finish

        def note(self, scale):
            found.append((len(self.hidden), scale is not None))
            return finish(self, scale)

        monkeypatch.setattr(products.Unfinished, "finish", note)
        return found

    @pytest.mark.parametrize("scale", [1.0, 0.5, -4.0])
    def test_the_bits_of_a_gradient_finished_at_once(self, scale, finished, monkeypatch):
        """A power of two commutes with every rounding."""
        waited = self.gradients(scale)
        assert finished == [(self.N, scale != 1.0)]
        monkeypatch.setattr(products, "may_wait", lambda *_: False)
        at_once = self.gradients(scale)
        assert len(finished) == 1
        assert all(torch.equal(a, b) for a, b in zip(waited, at_once))

    def test_any_scale_is_that_of_the_reference(self, finished):
        hidden, head, targets = self.operands()
        _, _, grad_hidden, grad_head = linear_cross_entropy_reference(hidden.double(), head.double(), targets)
        waited = self.gradients(1 / 3)
        assert finished
        for ours, exact in zip(waited, (grad_hidden / 3, grad_head / 3)):
            assert (ours - exact).norm() < FP32_ROUNDING * exact.norm()

    def test_two_calls_that_wait_do_not_share_a_chunk(self, finished):
        first, second = self.operands(1), self.operands(2)
        losses = [linear_cross_entropy(*case, None, torch.arange(self.N))[0] for case in (first, second)]
        (losses[0] + 3.0 * losses[1]).backward()
        assert len(finished) == 2
        for (hidden, head, targets), scale in ((first, 1.0), (second, 3.0)):
            _, _, _, grad_head = linear_cross_entropy_reference(hidden.double(), head.double(), targets)
            assert (head.grad - scale * grad_head).norm() < FP32_ROUNDING * (scale * grad_head).norm()

    def test_the_forward_pass_makes_no_head_gradient_and_backward_no_pass_over_it(self):
        hidden, head, targets = self.operands()
        made = []

        class Made(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                result = func(*args, **(kwargs or {}))
                if (
                    isinstance(result, torch.Tensor)
                    and result.shape == head.shape
                    and func is not torch.ops.aten.detach.default
                ):
                    made.append(func.overloadpacket.__name__)
                return result

        with Made():
            loss, _ = linear_cross_entropy(hidden, head, targets, None, torch.arange(self.N))
            assert made == []
            torch.autograd.grad(loss, (hidden, head), torch.tensor(0.25))
        assert made == ["new_empty", "mm"]

    @pytest.mark.parametrize(
        ("dtype", "options"),
        [
            (torch.float16, {}),
            (torch.float32, {"chunk_bytes": 3 * 48 * 4}),
            (torch.float32, {"skip_below": 0.5, "kept_share": 0.0}),
        ],
        ids=["fp16, where hidden · scale would overflow", "several chunks", "memorised rows left out"],
    )
    def test_what_does_not_wait(self, dtype, options, finished, monkeypatch):
        monkeypatch.setattr(products, "CAPACITY_STEP", 1)
        interpret(monkeypatch, "csrc_triton.kept_rows")
        gradients = self.gradients(2.0**15, dtype, **options)
        assert finished == []
        assert gradients[1].isfinite().all()

    @pytest.mark.parametrize("scale", [None, 1 / 3])
    def test_a_bf16_gradient_is_rounded_once(self, scale):
        """Its sum stays in fp32 up to the end, as if autograd had cast an fp32 one."""
        generator = torch.Generator().manual_seed(5)
        gradient, hidden = (torch.randn(64, n, generator=generator).bfloat16() for n in (40, 8))
        factor = None if scale is None else torch.tensor(scale)
        wide, narrow = (
            products.Unfinished(gradient, hidden.clone(), dtype).finish(factor)
            for dtype in (torch.float32, torch.bfloat16)
        )
        assert (wide.dtype, narrow.dtype) == (torch.float32, torch.bfloat16)
        exact = gradient.double().T @ hidden.double() * (scale or 1.0)
        # hidden · scale is rounded to bf16, nothing else
        allowed = FP32_ROUNDING if scale is None else 2.0**-9
        assert (wide - exact).norm() < allowed * exact.norm()
        # one rounding to bf16 is 0.8 of this, two are 1.1
        assert (narrow - wide).norm() < 2.0**-9 * wide.norm()

    def test_the_gradient_arrives_as_the_parameter_takes_it(self):
        head = torch.zeros(2, 2, dtype=torch.bfloat16, requires_grad=True)
        assert products.arriving_dtype(head) == torch.bfloat16
        assert products.arriving_dtype(head * 2) == torch.bfloat16
        head.grad_dtype = torch.float32
        assert products.arriving_dtype(head) == torch.float32
        assert products.arriving_dtype(head * 2) == torch.bfloat16
        head.grad_dtype = None
        assert products.arriving_dtype(head) == torch.float32
        wide = torch.zeros(2, 2, requires_grad=True)
        wide.grad_dtype = torch.bfloat16
        assert products.arriving_dtype(wide) == torch.float32, "a product of fp32 is fp32"

    def test_without_a_threshold_the_share_does_not_matter(self, finished):
        self.gradients(1.0, kept_share=0.0)
        assert len(finished) == 1

    @pytest.mark.parametrize("frozen", ["hidden", "head"])
    def test_what_is_frozen_costs_nothing(self, frozen, finished):
        hidden, head, targets = self.operands()
        {"hidden": hidden, "head": head}[frozen].requires_grad_(False)
        linear_cross_entropy(hidden, head, targets, None, torch.arange(self.N))[0].backward()
        assert len(finished) == (frozen == "hidden")

    def test_chunks_of_one_call_share_a_buffer_and_calls_do_not(self):
        passes = [
            row_pass.KernelRows(torch.arange(4), torch.ones(4), 40, softcap=None, skip_below=0.0)
            for _ in range(2)
        ]
        first, later = passes[0].buffer(4, torch.float32), passes[0].buffer(3, torch.float32)
        assert first.data_ptr() == later.data_ptr()
        assert later.shape == (3, 40)
        assert passes[1].buffer(4, torch.float32).data_ptr() != first.data_ptr()
