"""8-bit AdamW in plain torch: the update by its formula, resume and shards bit for bit."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributed import tensor

from repsft_fast.errors import ConfigError
from repsft_fast.optim import adamw8bit_reference as reference
from repsft_fast.optim import build_optimizer, reset, state_bytes, state_tensors
from repsft_fast.optim.adamw8bit import AdamW8bit, Shard
from repsft_fast.optim.masters import Masters
from repsft_fast.selftest.syncs import SyncCounter
from tests.helpers.interpreter import interpret

BLOCK = reference.BLOCK


def naive_first_update(w, g, lr, b1, b2, eps, decay):
    """AdamW's first update in float64 from the formula: moments start at zero, so codes play no part."""
    m, v = (1 - b1) * g, (1 - b2) * g * g
    return w - lr * decay * w - lr * (m / (1 - b1)) / ((v / (1 - b2)).sqrt() + eps)


def one_parameter(shape=(16, 512), dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    module = nn.Module()
    module.register_parameter("w", nn.Parameter(torch.randn(shape).to(dtype)))
    return module


def test_first_update_is_adamw():
    module = one_parameter()
    optimizer = build_optimizer(module, "adamw8bit", lr=1e-2, weight_decay=0.1)
    before = module.w.detach().double()
    module.w.grad = torch.randn_like(module.w)
    expected = naive_first_update(before, module.w.grad.double(), 1e-2, 0.9, 0.999, 1e-8, 0.1)
    optimizer.step(1e-2)
    # w is about 1, so fp32 rounds it to 6e-8; three operations on it.
    assert (module.w.double() - expected).abs().max() < 1e-6


def test_small_tensors_are_plain_adamw():
    module, other = one_parameter((8, 60)), one_parameter((8, 60))
    ours = build_optimizer(module, "adamw8bit", lr=1e-2, weight_decay=0.1)
    plain = build_optimizer(other, "adamw", lr=1e-2, weight_decay=0.1)
    for update in range(50):
        torch.manual_seed(update)
        module.w.grad = torch.randn_like(module.w)
        other.w.grad = module.w.grad.clone()
        ours.step(1e-2)
        plain.step(1e-2)
    assert (module.w - other.w).abs().max() < 1e-5  # 50 updates of 1e-2, each to fp32 rounding


def decoded(state) -> tuple[torch.Tensor, torch.Tensor]:
    """(m, v) of a parameter's state in float64."""
    if state["exp_avg"].dtype != torch.uint8:
        return state["exp_avg"].double(), state["exp_avg_sq"].double()
    rows = {
        key: value.view(-1, BLOCK) if "scale" not in key else value.view(-1) for key, value in state.items()
    }
    m = reference.decode_first(rows["exp_avg"], rows["exp_avg_scale"])
    root = reference.decode_second(rows["exp_avg_sq"], rows["exp_avg_sq_scale"])
    return m.double().view_as(state["exp_avg"]), root.double().square().view_as(state["exp_avg"])


@pytest.mark.parametrize("shape", [(16, 512), (8, 60)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_update_is_the_formula_on_the_moments_it_finds(shape, dtype):
    """Against float64: the weight from the moments as they were stored, and the stored moments within a
    code's step."""
    module = one_parameter(shape, dtype)
    beta1, beta2, eps, lr, decay = 0.8, 0.95, 1e-3, 1e-2, 0.1
    optimizer = build_optimizer(
        module, "adamw8bit", lr=1.0, betas=(beta1, beta2), eps=eps, weight_decay=decay
    )
    eight = shape[1] % BLOCK == 0
    for t in range(1, 6):
        w = module.w.detach().double()
        m, v = decoded(optimizer.inner.state[module.w])
        module.w.grad = torch.randn(shape, generator=torch.Generator().manual_seed(t)).to(dtype)
        g = 0.5 * module.w.grad.double()
        optimizer.step(lr, torch.zeros(()), torch.tensor(0.5))
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        step = m / (1 - beta1**t) / ((v / (1 - beta2**t)).sqrt() + eps)
        expected = w - lr * decay * w - lr * step
        error = (module.w.detach().double() - expected).abs()
        # fp32: three roundings of a number below 4; bf16: less than its step, and on average none
        assert (error < (1e-6 if dtype == torch.float32 else expected.abs() * 2.0**-7 + 1e-30)).all()
        if dtype == torch.bfloat16:
            drift = ((module.w.detach().double() - expected) / expected.abs()).mean()
            assert drift.abs() < 5 * 2.0**-8 / math.sqrt(expected.numel())
        m_after, v_after = decoded(optimizer.inner.state[module.w])
        largest = (
            m.abs()
            .view(-1, BLOCK if eight else shape[1])
            .amax(1, keepdim=True)
            .expand(-1, BLOCK if eight else shape[1])
        )
        tolerance = 2.0**-3 if eight else 1e-6
        assert ((m_after - m).abs() <= tolerance * m.abs() + largest.reshape(shape) * 2.0**-14).all()
        roots = (v_after.sqrt() - v.sqrt()).abs()
        assert (roots <= tolerance / 2 * v.sqrt() + v.sqrt().max() * 2.0**-14).all()


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.95), (0.9, 0.0)])
def test_bias_corrections_are_the_formula_and_finite_before_the_first_update(betas):
    for step in (1, 2, 3, 5, 17, 1000, 10**6):
        first, second = reference.corrections(*betas, torch.tensor(step))
        assert (first.dtype, second.dtype) == (torch.float32, torch.float32)
        exact = torch.tensor(
            [1 / (1 - betas[0] ** step), (1 - betas[1] ** step) ** -0.5], dtype=torch.float64
        )
        assert [first.item(), second.item()] == exact.float().tolist()  # rounded once
    assert all(value.isfinite() for value in reference.corrections(*betas, torch.tensor(0)))


def test_groups_keep_their_own_settings():
    """Each group's rate, betas, eps and decay, as torch's AdamW takes them."""
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(8, 60)) for _ in range(2)]
    plain = [nn.Parameter(p.detach().clone()) for p in ours]
    settings = [
        {"lr": 1e-2, "betas": (0.5, 0.9), "eps": 1e-2, "weight_decay": 0.3},
        {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0},
    ]
    shards = {p: Shard(f"p{i}", (8, 60), 0) for i, p in enumerate(ours)}
    optimizer = AdamW8bit([{"params": [p]} | s for p, s in zip(ours, settings)], shards, lr=1.0)
    other = torch.optim.AdamW([{"params": [p]} | s for p, s in zip(plain, settings)])
    for update in range(20):
        for index, (p, q) in enumerate(zip(ours, plain)):
            p.grad = torch.randn(8, 60, generator=torch.Generator().manual_seed(10 * update + index))
            q.grad = p.grad.clone()
        optimizer.step()
        other.step()
    for p, q in zip(ours, plain):
        assert (p - q).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 512), (3, 5, 512), (3, 701)])
def test_chunks_compute_the_bits_of_the_whole(monkeypatch, dtype, shape):
    """A chunk of 64 k elements is longer than these tensors: cut into chunks of 512, whose last is short,
    nothing changes."""
    results = []
    for blocks in (256, 2):
        monkeypatch.setattr(reference, "_CHUNK_BLOCKS", blocks)
        module = one_parameter(shape, dtype)
        optimizer = build_optimizer(module, "adamw8bit", lr=1e-3, seed=2)
        run(module, optimizer, 0, 3)
        results.append([module.w.detach(), *state_tensors(optimizer).values()])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_what_has_no_gradient_keeps_weight_and_moments():
    modules = one_parameter((16, 256)), one_parameter((16, 256))
    named = [(f"p{i}", module.w) for i, module in enumerate(modules)] + [
        ("empty", nn.Parameter(torch.zeros(0, 256)))
    ]
    optimizer = build_optimizer(named, "adamw8bit", lr=1e-2, weight_decay=0.5)
    before = modules[1].w.detach().clone()
    modules[0].w.grad = torch.ones(16, 256)
    named[2][1].grad = torch.zeros(0, 256)
    optimizer.step(1e-2)
    assert not torch.equal(modules[0].w, before)
    assert torch.equal(modules[1].w, before)
    assert not any(state.any() for state in optimizer.inner.state[modules[1].w].values())


def test_keys_and_defaults_are_those_of_the_docstring():
    parameter = nn.Parameter(torch.ones(16, 256))
    optimizer = AdamW8bit([{"params": [parameter]}], {parameter: Shard("w", (16, 256), 0)}, lr=1e-2)
    assert optimizer.param_groups[0]["weight_decay"] == 0.0
    assert optimizer.keys[parameter] == reference.parameter_key(0, "w")


def test_a_strided_gradient_is_the_same_gradient():
    results = []
    gradient = torch.randn(512, 16, generator=torch.Generator().manual_seed(0)).t()
    for grad in (gradient, gradient.contiguous()):
        module = one_parameter((16, 512))
        optimizer = build_optimizer(module, "adamw8bit", lr=1e-2)
        module.w.grad = grad
        optimizer.step(1e-2)
        results.append(module.w.detach())
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_everything_stays_on_the_device_of_the_weights(dtype):
    """The meta device mixes with no other: a tensor made elsewhere is an error here as it would be on a
    GPU."""
    named = [
        (f"p{i}", nn.Parameter(torch.empty(shape, dtype=dtype, device="meta")))
        for i, shape in enumerate([(16, 256), (7,)])
    ]
    optimizer = build_optimizer(named, "adamw8bit", lr=1e-2)
    assert {value.device.type for value in state_tensors(optimizer).values()} == {"meta"}
    for found_inf, clip in ((None, None), (torch.zeros((), device="meta"), torch.ones((), device="meta"))):
        for _, parameter in named:
            parameter.grad = torch.empty_like(parameter)
        optimizer.step(1e-2, found_inf, clip)


def test_a_closure_is_refused():
    optimizer = build_optimizer(one_parameter(), "adamw8bit", lr=1e-2)
    with pytest.raises(ValueError, match=r"AdamW8bit\.step: takes no closure"):
        optimizer.inner.step(lambda: 0.0)


def test_veto_and_clip_are_never_read_by_the_host():
    module = one_parameter()
    optimizer = build_optimizer(module, "adamw8bit", lr=1e-2, weight_decay=0.1)
    module.w.grad = torch.randn_like(module.w)
    with SyncCounter() as syncs:
        optimizer.step(1e-2, torch.zeros(()), torch.tensor(0.5))
    assert syncs.found == {}


@pytest.mark.parametrize(
    ("shape", "eight"),
    [((16, 256), True), ((15, 256), False), ((64, 255), False), ((8192,), False), ((2, 8, 256), True)],
)
def test_which_tensors_get_8_bits(shape, eight):
    module = one_parameter(shape)
    optimizer = build_optimizer(module, "adamw8bit", lr=1e-2)
    assert (state_tensors(optimizer)["optim.exp_avg.w"].dtype == torch.uint8) is eight


def test_bytes_per_parameter():
    module = one_parameter((64, 1024))
    eight = state_bytes(build_optimizer(module, "adamw8bit", lr=1e-2))
    full = state_bytes(build_optimizer(module, "adamw", lr=1e-2))
    n = 64 * 1024
    assert eight == 8 + 2 * n + 2 * n // 256  # 2.008 bytes per parameter, and one step count
    assert full == 4 + 8 * n


def run(module, optimizer, first, updates, *, seed=0, veto_at=()):
    for update in range(first, first + updates):
        for name, parameter in module.named_parameters():
            generator = torch.Generator().manual_seed(hash((seed, update, len(name))) % 2**31)
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        optimizer.step(1e-3, torch.tensor(float(update in veto_at)), torch.tensor(0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(16, 512), (8, 100)])
def test_resumed_runs_repeat_every_bit(dtype, shape):
    module = one_parameter(shape, dtype)
    optimizer = build_optimizer(module, "adamw8bit", lr=1e-3, seed=7)
    run(module, optimizer, 0, 3)
    kept = {name: t.clone() for name, t in state_tensors(optimizer).items()}
    weight = module.w.detach().clone()
    run(module, optimizer, 3, 3)

    other = one_parameter(shape, dtype, seed=1)
    resumed = build_optimizer(other, "adamw8bit", lr=1e-3, seed=7)
    with torch.no_grad():
        other.w.copy_(weight)
        for name, tensor in state_tensors(resumed).items():
            tensor.copy_(kept[name])
    run(other, resumed, 3, 3)
    assert torch.equal(module.w, other.w)
    assert all(torch.equal(t, state_tensors(resumed)[name]) for name, t in state_tensors(optimizer).items())


def test_another_seed_gives_other_bits():
    weights = []
    for seed in (0, 1):
        module = one_parameter(dtype=torch.bfloat16)
        run(module, build_optimizer(module, "adamw8bit", lr=1e-3, seed=seed), 0, 3)
        weights.append(module.w.detach().clone())
    assert not torch.equal(*weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("parts", [(8, 8), (5, 11), (1, 15), (16, 0)])
@pytest.mark.parametrize("columns", [512, 300])
def test_shards_compute_the_bits_of_the_whole(dtype, parts, columns):
    whole = one_parameter((16, columns), dtype)
    pieces = [nn.Parameter(t.clone()) for t in whole.w.detach().split(parts)]
    optimizer = build_optimizer(whole, "adamw8bit", lr=1e-3, seed=3)
    shards, first = {}, 0
    for piece in pieces:
        shards[piece] = Shard("w", (16, columns), first)
        first += piece.numel()
    split = AdamW8bit([{"params": pieces, "weight_decay": 0.0}], shards, lr=1e-3, seed=3)
    for update in range(3):
        torch.manual_seed(update)
        whole.w.grad = torch.randn(16, columns).to(dtype)
        for piece, grad in zip(pieces, whole.w.grad.split(parts)):
            piece.grad = grad.clone()
        optimizer.step(1e-3)
        split.step()
    assert torch.equal(whole.w, torch.cat([p.detach() for p in pieces]))
    for key, value in optimizer.inner.state[whole.w].items():
        assert torch.equal(value, torch.cat([split.state[p][key] for p in pieces])), key


class Split(SimpleNamespace):
    """What `Shard.of` reads of a DTensor, on one rank of a mesh of any size, without a process group."""

    def __init__(self, shape, placements, sizes, ranks):
        mesh = SimpleNamespace(
            size=lambda dimension: sizes[dimension], get_local_rank=lambda dimension: ranks[dimension]
        )
        super().__init__(shape=torch.Size(shape), placements=placements, device_mesh=mesh)


@pytest.mark.parametrize("rows", [1, 5, 16, 17])
@pytest.mark.parametrize("world", [1, 2, 4, 7])
@pytest.mark.parametrize("replicated", [None, 0, 1], ids=["FSDP", "HSDP", "HSDP, the other way round"])
def test_a_shard_begins_where_torch_cuts(rows, world, replicated):
    """Of 5 rows over 4 ranks the third holds one and the last none: as torch.chunk, whatever copies there
    are."""
    starts = [0, *torch.tensor([len(part) for part in torch.arange(rows).chunk(world)]).cumsum(0).tolist()]
    for rank in range(world):
        placements, sizes, ranks = [tensor.Shard(0)], [world], [rank]
        if replicated is not None:
            placements.insert(replicated, tensor.Replicate())
            sizes.insert(replicated, 3)
            ranks.insert(replicated, 2)
        shard = Shard.of("w", Split((rows, 3, 256), placements, sizes, ranks))
        assert shard == Shard("w", (rows, 3, 256), starts[min(rank, len(starts) - 1)] * 3 * 256)
        assert type(shard.shape) is tuple


def test_what_is_not_split_is_whole():
    assert Shard.of("w", torch.zeros(4, 256)) == Shard("w", (4, 256), 0)
    assert Shard.of("w", Split((4, 256), [tensor.Replicate()], [2], [1])) == Shard("w", (4, 256), 0)
    assert Shard.of("w", Split((), [tensor.Replicate()], [2], [1])) == Shard("w", (), 0)


@pytest.mark.parametrize("ranks", [(0, 0), (1, 0), (0, 1), (1, 1)])
@pytest.mark.parametrize(
    "placements",
    [
        (tensor.Shard(1),),
        (tensor.Partial(),),
        (tensor.Shard(0), tensor.Shard(0)),
        (tensor.Replicate(), tensor.Shard(1)),
    ],
    ids=str,
)
def test_other_splits_are_refused_by_name(placements, ranks):
    with pytest.raises(
        ConfigError, match=r"^optim.name: .* split of model.w, expected Shard\(0\) .*got \(.*use adamw$"
    ):
        Shard.of("model.w", Split((8, 256), placements, (2, 2), ranks))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_vetoed_run_equals_one_that_never_saw_the_update(dtype):
    results = []
    for updates in ([0, 1, 2, 3], [0, 1, 3]):
        module = one_parameter(dtype=dtype)
        optimizer = build_optimizer(module, "adamw8bit", lr=1e-3)
        for update in updates:
            run(module, optimizer, update, 1, veto_at=(2,))
        results.append([module.w.detach(), *state_tensors(optimizer).values()])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_a_vetoed_nan_gradient_changes_nothing_even_at_the_first_update():
    module = one_parameter()
    optimizer = build_optimizer(module, "adamw8bit", lr=1e-3)
    before = [t.clone() for t in (module.w.detach(), *state_tensors(optimizer).values())]
    module.w.grad = torch.full_like(module.w, float("nan"))
    optimizer.step(1e-3, torch.ones(()))
    assert all(
        torch.equal(a, b) for a, b in zip(before, (module.w.detach(), *state_tensors(optimizer).values()))
    )


def test_clip_is_a_factor_on_the_gradient():
    results = []
    for scale, clip in ((1.0, torch.tensor(0.25)), (0.25, None)):
        module = one_parameter()
        # eps makes Adam feel the gradient's size
        optimizer = build_optimizer(module, "adamw8bit", lr=1e-3, eps=1e-2)
        module.w.grad = torch.ones_like(module.w) * scale
        optimizer.step(1e-3, None, clip)
        results.append(module.w.detach())
    assert torch.equal(*results)


def test_reset_equals_a_new_optimizer():
    module = one_parameter()
    optimizer = build_optimizer(module, "adamw8bit", lr=1e-3)
    run(module, optimizer, 0, 3)
    other = one_parameter()
    with torch.no_grad():
        other.w.copy_(module.w)
    reset(optimizer)
    run(module, optimizer, 0, 3)
    run(other, build_optimizer(other, "adamw8bit", lr=1e-3), 0, 3)
    assert torch.equal(module.w, other.w)


def test_half_precision_weights_and_other_layouts_are_refused():
    with pytest.raises(
        ConfigError, match=r"^optim.name: .* update w, expected float32 or bfloat16 .*got torch.float16; "
    ):
        build_optimizer(one_parameter(dtype=torch.float16), "adamw8bit", lr=1e-3)
    module = nn.Module()
    module.register_parameter("w", nn.Parameter(torch.randn(512, 16).t()))
    with pytest.raises(ConfigError, match=r"^optim.name: .* needs w contiguous, got \(1, 16\)"):
        build_optimizer(module, "adamw8bit", lr=1e-3)


@pytest.mark.parametrize("kernel", [False, True])
def test_weights_are_written_with_their_masters(kernel, monkeypatch):
    """Masters move as fp32 weights do; their bf16 weights are torch's rounding of them."""
    sides = []
    for with_masters in (True, False):
        generator = torch.Generator().manual_seed(0)
        shapes = {"matrix": (16, 256), "vector": (48,)}
        held = {n: torch.nn.Parameter(torch.randn(s, generator=generator)) for n, s in shapes.items()}
        weights = (
            {n: torch.nn.Parameter(p.detach().bfloat16()) for n, p in held.items()} if with_masters else held
        )
        masters = Masters(weights, held, None) if with_masters else None
        optimizer = build_optimizer(weights.items(), "adamw8bit", lr=1e-2, weight_decay=0.1, masters=masters)
        if kernel and with_masters:
            interpret(
                monkeypatch,
                "csrc_triton.adamw8bit",
                "csrc_triton.adamw8bit_count",
                "csrc_triton.tensor_table",
            )
            optimizer.inner._by_kernel = True
        for update in range(3):
            for weight in weights.values():
                weight.grad = torch.randn(weight.shape, generator=generator)
            optimizer.step(1e-2, torch.tensor(float(update == 1)), torch.tensor(0.5))
        sides.append((weights, held, optimizer))
    (weights, held, ours), (plain, _, theirs) = sides
    assert all(torch.equal(held[name], parameter) for name, parameter in plain.items())
    assert all(torch.equal(weight, held[name].bfloat16()) for name, weight in weights.items())
    assert all(torch.equal(t, state_tensors(theirs)[name]) for name, t in state_tensors(ours).items())
