"""The flash-attn packages: what each is handed, what it is trusted with, and FA4 inside a compiled layer."""

import pytest
import torch

from repsft_fast.errors import ModelError
from repsft_fast.ops import flash
from repsft_fast.ops.scores import Rule
from tests.helpers import fake_flash
from tests.ops.test_attention import DIM, HEADS, TOTAL, by_hand, call, gradients, inputs, packed


@pytest.fixture(autouse=True)
def in_any_order():
    """Whatever runs of other tests have set."""
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(was)


def in_a_fixed_order():
    torch.use_deterministic_algorithms(True)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("name", ["flash3", "flash4", "flash4 by its public name"])
def test_output_and_gradients(name, kv_heads, window, monkeypatch):
    module = fake_flash.fa3() if name == "flash3" else fake_flash.fa4(inner=name == "flash4")
    fake_flash.install(monkeypatch, module)
    tensors = inputs(kv_heads, dtype=torch.float32)
    output = call(tensors, packed(name.split()[0]), sliding_window=window)
    expected = by_hand(*tensors, DIM**-0.5, window)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-6)
    for got, want in zip(gradients(output, tensors), gradients(expected, tensors), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=2e-6)
    assert module.calls, "the package was not called"


@pytest.mark.parametrize("name", ["flash3", "flash4"])
def test_packages_are_told_of_a_fixed_order(name, monkeypatch):
    """torch's switch alone would leave their backward pass adding in any order."""
    module = fake_flash.fa3() if name == "flash3" else fake_flash.fa4()
    fake_flash.install(monkeypatch, module)
    in_a_fixed_order()
    tensors = inputs(dtype=torch.float32)
    gradients(call(tensors, packed(name)), tensors)
    assert [c["deterministic"] for c in module.calls if "deterministic" in c] == [True]


def test_one_that_cannot_add_in_a_fixed_order_refuses(monkeypatch):
    fake_flash.install(monkeypatch, fake_flash.fa3(deterministic=False))
    in_a_fixed_order()
    with pytest.raises(ModelError, match="this flash3 cannot add gradients in a fixed order"):
        call(inputs(dtype=torch.float32), packed("flash3"))


def test_wide_heads_of_fa4_are_refused(monkeypatch):
    fake_flash.install(monkeypatch, fake_flash.fa4())
    wide = [torch.randn(1, 2, TOTAL, 256) for _ in range(3)]
    with pytest.raises(ModelError, match=r"flash4 with heads of 256 crashes .* expected at most 128"):
        call(wide, packed("flash4"))


def test_fa4_is_one_operator_in_a_compiled_layer(monkeypatch):
    """fullgraph: one break would raise."""
    module = fake_flash.fa4()
    fake_flash.install(monkeypatch, module)
    where = packed("flash4")
    has = flash.kernels("flash4", 9)

    def layer(q, k, v):
        flat = [x.transpose(1, 2).squeeze(0).contiguous() for x in (q, k, v)]
        return flash.run(has, *flat, where.cu_seqlens, where.max_seqlen, Rule(DIM**-0.5, window=5)).mul(2)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=False)
    tensors = inputs(dtype=torch.float32)
    output, expected = compiled(*tensors), layer(*tensors)
    assert torch.equal(output, expected)
    for got, want in zip(gradients(output, tensors), gradients(expected, tensors), strict=True):
        assert torch.equal(got, want)
    torch._dynamo.reset()


def test_the_operators_are_what_they_say(monkeypatch):
    fake_flash.install(monkeypatch, fake_flash.fa4())
    flash.kernels("flash4", 9)
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(9, n, 8, generator=draw, requires_grad=True) for n in (4, 2, 2))
    borders = torch.tensor([0, 5, 9, 9], dtype=torch.int32)
    torch.library.opcheck(
        flash.flash4,
        (q, k, v, borders, 5, 0.3, 2, 0.0, False),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_static"),
    )


class TestWhatIsTrusted:
    def why(self, name, *, major=9, dim=64, value_dim=None, dtype=torch.bfloat16, rule=None, lacks=()):
        has = flash.Kernels(name, print, major, (), *(word not in lacks for word in WORDS))
        query = torch.empty(1, 2, 3, dim, dtype=dtype, device="meta")
        return flash.why_not_serve(
            has, query, torch.empty(1, 2, 3, value_dim or dim, device="meta"), rule or Rule(1.0)
        )

    def test_plain_calls_on_their_gpus(self):
        served = {
            name: [n for n in range(7, 13) if self.why(name, major=n) is None] for name in flash.PACKAGES
        }
        assert served == {"flash2": [8, 9, 10, 12], "flash3": [9], "flash4": [9, 10, 11]}
        assert self.why("flash3", major=None) == "compute capability None"

    @pytest.mark.parametrize(("name", "widest"), [("flash2", 256), ("flash3", 256), ("flash4", 128)])
    def test_heads(self, name, widest):
        assert [n for n in (64, 72, 128, 192, 256, 264) if self.why(name, dim=n) is None][-1] == widest
        assert self.why(name, dim=20) == "heads of 20 and 20"
        assert self.why(name, dim=128, value_dim=64) == "heads of 128 and 64"

    def test_types(self):
        assert self.why("flash3", dtype=torch.float16) is None
        assert self.why("flash3", dtype=torch.float32) == "type torch.float32"

    def test_what_a_layer_may_ask(self):
        def who(**rule):
            return [name for name in flash.PACKAGES if self.why(name, rule=Rule(1.0, **rule)) is None]

        assert who(window=5) == ["flash2", "flash3", "flash4"]
        assert who(softcap=30.0) == ["flash2", "flash3"]
        assert who(dropout=0.1) == ["flash2"]
        assert who(dropout=0.1, softcap=30.0) == []
        assert who(sinks=torch.zeros(2)) == []

    @pytest.mark.parametrize(("word", "rule"), [("window", {"window": 5}), ("softcap", {"softcap": 3.0}),
                                                ("dropout", {"dropout": 0.1})])  # fmt: skip
    def test_a_release_without_the_keyword(self, word, rule):
        assert self.why("flash2", rule=Rule(1.0, **rule)) is None
        assert self.why("flash2", rule=Rule(1.0, **rule), lacks=(word,)) is not None

    def test_in_a_fixed_order(self):
        in_a_fixed_order()
        assert self.why("flash3", dim=192) is None
        assert self.why("flash3", dim=200) == "run.deterministic"
        assert self.why("flash2", lacks=("deterministic",)) == "run.deterministic"


WORDS = ("window", "softcap", "dropout", "deterministic")


def test_every_package_is_asked_for_somewhere():
    assert set(flash.PREFERENCE) == set(flash.PACKAGES)
    assert HEADS * DIM  # the shapes of the attention's own tests
