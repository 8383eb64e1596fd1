"""Optimizers by name: the same numbers as torch, vetoes without a host read, a closed list of state."""

import copy
import sys
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch
from torch import nn

from repsft_fast.config.sections import Optim
from repsft_fast.errors import ConfigError
from repsft_fast.optim import (
    NAMES,
    OPTIMIZERS,
    build_optimizer,
    masters,
    materialise,
    reset,
    state_bytes,
    state_tensors,
)
from tests.helpers.ranks import run_ranks

TORCH_NAMES = ("adamw", "sgd")


def small_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(16, 256, bias=True), nn.Tanh(), nn.LayerNorm(256), nn.Linear(256, 16, bias=False)
    )


def give_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


@torch.no_grad()
def copy_back(model, optimizer, kept_weights, kept_state) -> None:
    for name, tensor in state_tensors(optimizer).items():
        tensor.copy_(kept_state[name])
    for parameter, value in zip(model.parameters(), kept_weights):
        parameter.copy_(value)


@pytest.fixture(params=["adamw", "sgd", "sgd-momentum"])
def torch_kind(request):
    momentum = 0.9 if request.param == "sgd-momentum" else 0.0
    return request.param.split("-")[0], momentum


def build(model, kind, **settings):
    name, momentum = kind
    return build_optimizer(model, name, lr=1e-2, momentum=momentum, **settings)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_same_bits_as_plain_torch(torch_kind, weight_decay):
    model, other = small_model(), small_model()
    optimizer = build(model, torch_kind, weight_decay=weight_decay, decay="all")
    name, momentum = torch_kind
    settings = {"momentum": momentum} if name == "sgd" else {"betas": (0.9, 0.999)}
    kind = torch.optim.SGD if name == "sgd" else torch.optim.AdamW
    plain = kind(other.parameters(), lr=1e-2, weight_decay=weight_decay, fused=True, **settings)
    for update in range(5):
        lr = 1e-2 / (update + 1)
        give_gradients(model, update)
        give_gradients(other, update)
        optimizer.step(lr)
        plain.param_groups[0]["lr"] = lr
        plain.step()
    for ours, theirs in zip(weights(model), weights(other)):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_weight_of_half_precision_moves_on_a_cpu(torch_kind, dtype):
    """torch's fused SGD leaves whole vectors of such weights as they were, so it is not taken for them."""
    model = nn.Linear(67, 1, bias=False).to(dtype)
    nn.init.ones_(model.weight)
    optimizer = build(model, torch_kind)
    for _ in range(2):
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step(0.25, torch.zeros(()), torch.ones(()))
    assert len(model.weight.unique()) == 1
    expected = 0.5 if torch_kind == ("sgd", 0.0) else 0.275 if torch_kind[0] == "sgd" else 0.5
    assert model.weight.max().item() == pytest.approx(expected, abs=0.01)
    assert optimizer.vetoes_on_device == (torch_kind[0] == "adamw" or dtype == torch.float32)


def test_a_veto_changes_nothing(torch_kind):
    model = small_model()
    optimizer = build(model, torch_kind, weight_decay=0.1)
    give_gradients(model, 0)
    optimizer.step(1e-2, torch.zeros(()))
    before = weights(model)
    state = {name: t.clone() for name, t in state_tensors(optimizer).items()}
    give_gradients(model, 1)
    next(model.parameters()).grad[0, 0] = float("nan")
    optimizer.step(1e-2, torch.ones(()))
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model)))
    assert all(torch.equal(state[name], t) for name, t in state_tensors(optimizer).items())
    give_gradients(model, 2)
    optimizer.step(1e-2, torch.zeros(()))  # the veto is not remembered
    assert not torch.equal(before[0], weights(model)[0])


def test_a_vetoed_run_equals_one_that_never_saw_the_update(torch_kind):
    results = []
    for vetoed in (True, False):
        model = small_model()
        optimizer = build(model, torch_kind)
        for update in range(4):
            give_gradients(model, update)
            if update == 2:
                if vetoed:
                    optimizer.step(1e-2, torch.ones(()))
                continue
            optimizer.step(1e-2, torch.zeros(()))
        results.append(weights(model))
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_clip_scales_the_gradient(torch_kind):
    model, other = small_model(), small_model()
    clipped, plain = build(model, torch_kind), build(other, torch_kind)
    give_gradients(model, 0)
    give_gradients(other, 0)
    clipped.step(1e-2, torch.zeros(()), torch.tensor(0.25))
    for parameter in other.parameters():
        parameter.grad *= 0.25
    plain.step(1e-2)
    # 0.25 and its reciprocal are exact
    assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(other)))


def test_state_is_whole_before_the_first_update(torch_kind):
    model = small_model()
    optimizer = build(model, torch_kind)
    before = {name: (t.shape, t.dtype, t.data_ptr()) for name, t in state_tensors(optimizer).items()}
    for update in range(3):
        give_gradients(model, update)
        optimizer.step(1e-2)
    materialise(optimizer)
    after = {name: (t.shape, t.dtype, t.data_ptr()) for name, t in state_tensors(optimizer).items()}
    assert before == after
    if torch_kind[0] == "adamw":
        assert set(before) == {"optim.step"} | {
            f"optim.{m}.{n}" for m in ("exp_avg", "exp_avg_sq") for n, _ in model.named_parameters()
        }
        assert state_tensors(optimizer)["optim.step"].tolist() == [3.0] * 5
    if torch_kind == ("sgd", 0.0):
        assert before == {}


def test_copying_the_state_back_repeats_the_updates(torch_kind):
    model = small_model()
    optimizer = build(model, torch_kind)

    def run(first: int) -> None:
        for update in range(first, first + 3):
            give_gradients(model, update)
            optimizer.step(1e-2)

    run(0)
    kept = {name: t.clone() for name, t in state_tensors(optimizer).items()}
    kept_weights = weights(model)
    run(3)
    once = weights(model)
    copy_back(model, optimizer, kept_weights, kept)
    run(3)
    assert all(torch.equal(a, b) for a, b in zip(once, weights(model)))
    assert not torch.equal(once[0], kept_weights[0])


def test_reset_equals_a_new_optimizer(torch_kind):
    model = small_model()
    optimizer = build(model, torch_kind)
    for update in range(3):
        give_gradients(model, update)
        optimizer.step(1e-2)
    other = copy.deepcopy(model)
    reset(optimizer)
    fresh = build(other, torch_kind)
    for update in range(3, 6):
        give_gradients(model, update)
        give_gradients(other, update)
        optimizer.step(1e-2)
        fresh.step(1e-2)
    assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(other)))


def test_decay_spares_vectors_unless_told_otherwise():
    for decay, moves in (("matrices", False), ("all", True)):
        model = small_model()
        optimizer = build_optimizer(model, "adamw", lr=1e-2, weight_decay=0.5, decay=decay)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        before = weights(model)
        optimizer.step(1e-2)
        matrices = [(a, b) for a, b in zip(before, weights(model)) if a.ndim == 2]
        bias_before, bias_after = before[1], weights(model)[1]
        assert all(not torch.equal(a, b) for a, b in matrices)
        assert torch.equal(bias_before, bias_after) is not moves


def test_frozen_and_tied_parameters_are_counted_once():
    model = small_model()
    model[0].weight.requires_grad_(False)
    model.register_parameter("alias", model[3].weight)
    optimizer = build_optimizer(model, "adamw", lr=1e-2)
    assert "0.weight" not in optimizer.names
    assert len(optimizer.names) == 4
    assert state_bytes(optimizer) == 4 * 4 + 2 * 4 * (256 * 3 + 256 * 16)


def test_wrapper_words_leave_state_names_alone():
    model = nn.ModuleDict({"_orig_mod": small_model()})
    assert "optim.exp_avg.0.weight" in state_tensors(build_optimizer(model, "adamw", lr=1e-3))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "adamw8bits"}, "did you mean adamw8bit?"),
        ({"lr": -1.0}, "optim.lr"),
        ({"lr": float("nan")}, "optim.lr"),
        ({"betas": (0.9, 1.0)}, "optim.betas[1]"),
        ({"weight_decay": float("inf")}, "optim.weight_decay"),
        ({"decay": "some"}, "optim.decay"),
        ({"momentum": 1.0}, "optim.momentum"),
    ],
)
def test_bad_settings_are_named(settings, words):
    with pytest.raises(ConfigError, match=None) as caught:
        build_optimizer(small_model(), **({"lr": 1e-3} | settings))
    assert words in str(caught.value)


def test_all_problems_at_once():
    with pytest.raises(ConfigError) as caught:
        build_optimizer([], "no", lr=-1)
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize(
    ("name", "module"), [("bnb_adamw8bit", "bitsandbytes"), ("torchao_adamw8bit", "torchao")]
)
def test_a_missing_package_says_what_to_install(monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, f"{module}.optim", None)
    with pytest.raises(ConfigError, match=f"pip install {module}"):
        build_optimizer(small_model(), name, lr=1e-3)


def test_every_name_is_documented():
    import repsft_fast.optim.build as module

    assert all(f"| {name}" in module.__doc__ for name in NAMES)


def test_every_name_can_be_asked_for():
    assert set(get_args(Optim.model_fields["name"].annotation)) == set(NAMES)


def test_every_optimizer_knows_its_bytes_without_allocating(torch_kind):
    for name, momentum in (torch_kind, ("adamw8bit", 0.0)):
        model, kind = small_model().to(torch.bfloat16), OPTIMIZERS[name]
        real = build_optimizer(model, name, lr=1e-2, momentum=momentum)
        sized = [
            kind.moment_bytes(p.shape, p.shape, p.element_size(), momentum=momentum > 0.0)
            for p in model.parameters()
        ]
        assert sum(map(sum, sized)) + kind.step_count_bytes(len(sized)) == state_bytes(real)


class CountsInPython(torch.optim.Optimizer):
    """What `packages` sees of bitsandbytes: state made by `init_state`, a step count that is an int."""

    def __init__(self, groups, lr, betas, eps):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps})
        self.initialized = False

    def check_overrides(self):
        self.checked = True

    def init_state(self, group, parameter, group_index, index):
        assert self.checked
        assert self.param_groups[group_index]["params"][index] is parameter
        self.state[parameter] = {"step": 0, "state1": torch.zeros_like(parameter), "qmap1": torch.ones(256)}

    @torch.no_grad()
    def step(self):
        assert self.initialized
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state["step"] += 1
                state["state1"] += parameter.grad
                parameter -= group["lr"] / state["step"] * state["state1"]


class CountsInTensors(CountsInPython):
    """Of torchao: buffers by `_new_buffer`, a step count that is a host tensor, a rate that is a tensor."""

    def __init__(self, groups, lr, betas, eps, bf16_stochastic_round):
        super().__init__(groups, torch.tensor(lr), betas, eps)
        self.initialized = bf16_stochastic_round

    def _new_buffer(self, parameter, signed):
        return torch.zeros_like(parameter)

    def step(self):
        for state in self.state.values():
            state["state1"] = state["exp_avg"]
        super().step()
        for state in self.state.values():
            del state["state1"]


@pytest.fixture(params=["bnb_adamw8bit", "torchao_adamw8bit"])
def package(request, monkeypatch):
    kinds = {"bitsandbytes": CountsInPython, "torchao": CountsInTensors}
    for module, kind in kinds.items():
        monkeypatch.setitem(sys.modules, f"{module}", SimpleNamespace())
        monkeypatch.setitem(sys.modules, f"{module}.optim", SimpleNamespace(AdamW8bit=kind))
    return request.param


@pytest.mark.parametrize("name", NAMES)
def test_every_name_steps_on_masters(name, request):
    """The weights are bf16; what is stepped on, its moments and its gradient are what they are without them."""
    if name in ("bnb_adamw8bit", "torchao_adamw8bit"):
        for module, kind in (("bitsandbytes", CountsInPython), ("torchao", CountsInTensors)):
            request.getfixturevalue("monkeypatch").setitem(sys.modules, module, SimpleNamespace())
            request.getfixturevalue("monkeypatch").setitem(
                sys.modules, f"{module}.optim", SimpleNamespace(AdamW8bit=kind)
            )
    model, plain = small_model(), small_model()
    model.compute_dtype, model.get_output_embeddings = torch.bfloat16, lambda: None
    held = masters.beside(model)
    over = build_optimizer(model, name, lr=1e-2, seed=3, masters=held)
    alone = build_optimizer(plain, name, lr=1e-2, seed=3)
    for update in range(3):
        give_gradients(model, update)
        give_gradients(plain, update)
        for optimizer in (over, alone):
            optimizer.step(1e-2, torch.tensor(float(update == 1)), torch.tensor(0.5))
    for key, parameter in plain.named_parameters():
        assert torch.equal(held.held[key], parameter), key
        assert torch.equal(held.weights[key], parameter.bfloat16()), key
    ours, theirs = state_tensors(over), state_tensors(alone)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_package_counts_in_the_closed_list(package):
    """The counts that are copied back decide, not those the package remembers."""
    model = small_model()
    optimizer = build_optimizer(model, package, lr=1e-2)
    assert not optimizer.vetoes_on_device
    names = set(state_tensors(optimizer))
    moments = {"state1"} if package == "bnb_adamw8bit" else {"exp_avg", "exp_avg_sq"}
    assert names == {"optim.step"} | {f"optim.{m}.{n}" for m in moments for n, _ in model.named_parameters()}

    def run(first: int) -> None:
        for update in range(first, first + 3):
            give_gradients(model, update)
            optimizer.step(1e-2, torch.tensor(float(update == 1)), torch.tensor(0.5))

    run(0)
    assert state_tensors(optimizer)["optim.step"].tolist() == [2] * 5, "one of three was vetoed"
    kept, kept_weights = copy.deepcopy(state_tensors(optimizer)), weights(model)
    run(3)
    once = weights(model)
    copy_back(model, optimizer, kept_weights, kept)
    run(3)
    assert all(torch.equal(a, b) for a, b in zip(once, weights(model)))
    reset(optimizer)
    assert state_tensors(optimizer)["optim.step"].tolist() == [0] * 5


def test_dtensor_parameters_take_vetoes_and_clips_too(torch_kind, tmp_path):
    """FSDP2 hands the optimizer DTensors; one rank over gloo runs the same code as many."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, plain = small_model(), small_model()
        fully_shard(model, mesh=dist.init_device_mesh("cpu", (1,)))
        sharded, unsharded = build(model, torch_kind), build(plain, torch_kind)
        data = torch.randn(8, 16)
        for update in range(3):
            for net, optimizer in ((model, sharded), (plain, unsharded)):
                (net(data).square().mean() * (update + 1)).backward()
                optimizer.step(1e-2, torch.tensor(float(update == 1)), torch.tensor(0.5))
                optimizer.zero_grad()
        for ours, theirs in zip(model.parameters(), plain.parameters()):
            assert torch.equal(ours.full_tensor(), theirs)
        reset(sharded)
        assert all(not t.any() for t in state_tensors(sharded).values())
    finally:
        dist.destroy_process_group()


def _two_ranks(world, name):
    """Gradients differ per rank and are averaged by FSDP2; returns the whole weights, and the whole state by
    name."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(16, 25), nn.Tanh(), nn.Linear(25, 256), nn.Tanh(), nn.Linear(256, 33, bias=False)
    )
    if world.size > 1:
        fully_shard(model, mesh=dist.init_device_mesh("cpu", (world.size,)))
    optimizer = build_optimizer(model, name, lr=1e-2, weight_decay=0.1, decay="all", seed=5)
    generator = torch.Generator().manual_seed(1)
    for update in range(4):
        model(torch.randn(4, 16, generator=generator)).square().mean().backward()
        # the same gradient bits on any number of ranks: only the update is tested
        for parameter in model.parameters():
            whole = torch.randn(parameter.shape, generator=generator)
            if world.size > 1:
                from torch.distributed.tensor import distribute_tensor

                parameter.grad = distribute_tensor(whole, parameter.device_mesh, parameter.placements)
            else:
                parameter.grad = whole
        optimizer.step(1e-2, torch.tensor(float(update == 1)), torch.tensor(0.5))
        optimizer.zero_grad()

    def full(tensor):
        return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

    weights = {key: full(value.detach()) for key, value in model.named_parameters()}
    return {
        key: value.numpy()
        for key, value in (weights | {k: full(t) for k, t in state_tensors(optimizer).items()}).items()
    }


@pytest.mark.parametrize("name", ["adamw", "sgd", "adamw8bit"])
def test_two_ranks_hold_the_bits_of_one(name):
    (one,) = run_ranks(_two_ranks, name, size=1)
    for rank in run_ranks(_two_ranks, name, size=2):
        assert rank.keys() == one.keys()
        for key, value in one.items():
            assert rank[key].shape == value.shape, key
            # torch's CPU kernel rounds the tail of an array otherwise than its vectors: last bits only
            if name == "adamw":
                np.testing.assert_allclose(rank[key], value, rtol=1e-6, atol=1e-9, err_msg=key)
            else:
                assert (rank[key] == value).all(), key


def test_state_that_cannot_be_split_is_refused():
    assert run_ranks(_refused, size=2) == [True, True]


def _refused(world) -> bool:
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    model = small_model()
    fully_shard(model, mesh=dist.init_device_mesh("cpu", (world.size,)))
    with pytest.raises(ConfigError, match="cannot be split over ranks"):
        build_optimizer(model, "bnb_adamw8bit", lr=1e-3)
    return True
