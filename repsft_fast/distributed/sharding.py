"""Sharded parameters (FSDP2, HSDP) and what is asked of them as a whole: their state, their gradients' norm.

Sums, not means: FSDP2 averages gradients over ranks by default, but the weights of a row already hold the one
denominator of the whole update over all ranks, so gradients are *added* (sum reduction, divide factor 1). The
trainer scales nothing by the world size.

A run on one rank comes here no more: it holds masters beside weights in the compute type (`optim.masters`),
and takes neither FSDP2 nor a group. `shard` still does it in a group of one, which is what the masters are
compared with (`training.build.ONE_RANK_FSDP`). Nothing travels there, so the copies in the compute type are
made once an update and not twice a row, and gradients of the rows are added in fp32 where they were made;
FSDP2 sees them on the last row (`begin_row`). Bytes that FSDP2 reads and writes for a parameter of a layer in
an update of R rows: 10 (a copy) + 22 (the first gradient, and what is left of a reduction) + 10 (R - 1), or
24 where R = 1; as several ranks do it, it were 20 R + 22 R + 12 (R - 1). The price is memory: 2 B a parameter
for the copies, from the first row to the last.
"""

import functools
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from repsft_fast.distributed.collectives import all_sum, broadcast_from_main, same_everywhere
from repsft_fast.distributed.lifecycle import start_alone
from repsft_fast.distributed.reset import reset
from repsft_fast.distributed.world import World
from repsft_fast.errors import ConfigError, ModelError, describe


def decoder_layers(model: Any) -> list[nn.Module]:
    """The repeated layers of a Hugging Face causal LM, in order. ModelError when they cannot be told."""
    backbone = getattr(model, getattr(model, "base_model_prefix", ""), model)
    count = model.config.get_text_config().num_hidden_layers
    for module in backbone.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return list(module)
    raise ModelError(describe("model", f"{type(model).__name__} has no list of its {count} decoder layers"))


def mesh_of(world: World, shard_ranks: int | None = None) -> DeviceMesh:
    """The ranks as FSDP2 sees them: one dimension, or copies × shards (HSDP) where fewer ranks share a copy.

    shard_ranks: neighbouring ranks that share one copy of the weights, normally those of a node, so that
    parameters travel inside it and gradients alone between nodes; None = all. ConfigError when the ranks do
    not divide by it.
    """
    kind = world.device.type
    check_groups(world.size, shard_ranks)
    if shard_ranks is None or shard_ranks == world.size:
        return dist.device_mesh.init_device_mesh(kind, (world.size,))
    shape = (world.size // shard_ranks, shard_ranks)
    return dist.device_mesh.init_device_mesh(kind, shape, mesh_dim_names=("replicate", "shard"))


def check_groups(ranks: int, shard_ranks: int | None) -> None:
    """ConfigError where so many ranks do not divide into such groups; one rank does not either, which would
    be no sharding."""
    if shard_ranks is not None and ranks % shard_ranks:
        wrong = (
            f"{ranks} ranks do not divide into groups of this size" if ranks > 1 else "this run has one rank"
        )
        todo = (
            "set it to the GPUs of a node, or to null"
            if ranks > 1
            else "set it to null, or start one process per GPU"
        )
        raise ConfigError(describe("distributed.shard_ranks", wrong, got=shard_ranks, todo=todo))


def copies(parameters: Iterable[Tensor]) -> int:
    """How many ranks hold the same part of a sharded parameter: 1, or the copies of HSDP."""
    for parameter in parameters:
        if type(parameter) is not nn.Parameter and isinstance(parameter, DTensor):
            sizes = zip(parameter.device_mesh.shape, parameter.placements)
            return math.prod(size for size, placement in sizes if placement.is_replicate())
    return 1


def shard(
    model: Any,
    world: World,
    *,
    compute_dtype: torch.dtype | None = None,
    mesh: DeviceMesh | None = None,
    arriving: bool = False,
) -> bool:
    """Shard `model` over the ranks with FSDP2, layer by layer, in place; `model.loss` becomes its forward.

    mesh: of `mesh_of`; None = one copy of the weights over all ranks.
    compute_dtype: None = `model.compute_dtype` where set, else the type the weights are held in. Where it
        differs from that, weights are cast on gather and gradients are reduced and kept in fp32, by one rank
        too (a group of one is made for it; frozen weights that are held in it are left as they are there).
    arriving: the weights are rank 0's, on its CPU, and the other ranks' models are on meta: they are sent
        group by group (a layer, then the rest), so that a device never holds more than its shards and one
        group, and the host of one rank the whole. ConfigError where the ranks' models differ.
    Returns whether the model was sharded; one rank with equal types is left as it is.
    """
    held = {p.dtype for p in model.parameters() if p.requires_grad}
    computed = compute_dtype or getattr(model, "compute_dtype", None) or next(iter(held))
    if world.size == 1:
        if held == {computed}:
            return False
        start_alone(world)
    mesh = mesh or mesh_of(world)
    reduced = torch.promote_types(torch.float32, computed)
    # Weights are cast and nothing else: not a row, whose weights hold the update's denominator, nor what an
    # architecture keeps in fp32 between its layers (rotary tables), as on one rank.
    policy = MixedPrecisionPolicy(param_dtype=computed, reduce_dtype=reduced, cast_forward_inputs=False)
    alone = mesh.size() == 1  # a gather is a cast then, which `begin_row` keeps from row to row
    # A frozen weight in the compute type needs neither cast nor gradient; gathering would only hold it twice.
    apart = {p for p in model.parameters() if not p.requires_grad and p.dtype == computed} if alone else None
    # models that differ would wait for different tensors: said before the first is sent
    if arriving:
        same_everywhere(
            world, "model", " ".join(f"{name} {tuple(t.shape)} {t.dtype}" for _, name, t in _tensors(model))
        )
    # one layer arrives and is cut before the next comes: only one is ever whole on a device
    for layer in decoder_layers(model):
        if arriving:
            _arrive(layer, world)
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=not alone, ignored_params=apart)
    if arriving:
        _arrive(model, world)
        # random weights were drawn where they were made
        stream = broadcast_from_main(world, torch.get_rng_state().tolist())  # 5 KB
        torch.set_rng_state(torch.tensor(stream, dtype=torch.uint8))
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False, ignored_params=apart)
    # the weights of a row hold the update's one denominator already: gradients are added, not averaged
    for module in model.modules():
        if isinstance(module, FSDPModule):
            if not alone:  # on one rank a factor, even 1, is a division of every gradient
                module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no pre-multiplied sum; NCCL is as fast
    if not alone:
        _prefetch(decoder_layers(model))
    model.sharded_over = mesh
    register_fsdp_forward_method(model, "loss")
    _forget_gathered_after_evaluation(model)
    return True


def _tensors(module: nn.Module) -> list[tuple[dict[str, Any], str, Tensor]]:
    """(holder, name in it, tensor) of all parameters, buffers and plain tensors (a rotary embedding keeps
    one) that are not sharded yet, in the same order on every rank."""
    found = []
    for part in module.modules():
        for holder in (part._parameters, part._buffers, vars(part)):
            for name, tensor in sorted(holder.items()):
                if isinstance(tensor, Tensor) and not isinstance(tensor, DTensor):
                    found.append((holder, name, tensor))
    return found


def _arrive(module: nn.Module, world: World) -> None:
    """Rank 0's tensors of a module on every rank's device; what is one tensor stays one (tied weights)."""
    made: dict[int, Tensor] = {}
    for holder, name, tensor in _tensors(module):
        if id(tensor) not in made:
            value = (
                tensor.detach().to(world.device)
                if world.is_main
                else torch.empty_like(tensor, device=world.device)
            )
            value = value.contiguous()
            if value.numel():
                dist.broadcast(value.view(-1).view(torch.uint8), 0)  # as bytes: gloo does not know every type
            made[id(tensor)] = (
                nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
            )
        holder[name] = made[id(tensor)]


def reshard(model: nn.Module) -> None:
    """Drop gathered copies of parameters, so that `model.parameters()` are the sharded ones again.

    Needed only when a forward pass with gradients has had no backward (it raised) before parameters are
    written in place (a revert, a checkpoint): the gathered copies would be used once more. Does nothing to a
    model that is not sharded.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def begin_row(model: nn.Module, *, last: bool, first: bool = True) -> None:
    """Say whether the next forward and backward pass is of its update's first row and of its last. Unsaid,
    every row is both. To be said of the first, the second and the last.

    With masters gradients of later rows are added to those that are there as they come (`optim.masters`).
    Under FSDP2 nothing is done before the last row that the last would do again. In a group of one gathered
    parameters stay and gradients add up beside them, in the reduction's type, so that `p.grad` is None until
    the last row's backward pass. Between copies of the weights (HSDP) gradients are summed inside each copy
    and wait there for the last row. Parameters of several ranks stay where `keep_gathered` says so, and are
    dropped after every pass otherwise, for their memory. The same numbers are added in the same order, bit
    for bit. An update that is given up must be told by `abort_pass`.
    """
    masters: Any = getattr(model, "masters", None)
    if masters is not None:
        masters.add_gradients(not first)
    if not isinstance(model, FSDPModule):
        return
    mesh: DeviceMesh = model.sharded_over  # type: ignore[assignment]
    if mesh.size() == 1:
        model.set_requires_gradient_sync(last)
        model.set_reshard_after_backward(last)
        return
    if mesh.ndim == 2:
        model.set_requires_all_reduce(last)
    if gathered_stay(model):
        model.set_reshard_after_backward(last)


def keep_gathered(model: nn.Module, stay: bool) -> None:
    """Whether parameters that several ranks gathered for a row stay for its backward pass and for the next
    rows of the update: bytes of all of them in the compute type, for 2 R - 1 gathers less of every layer and
    R - 1 less of the root, in an update of R rows. Does nothing to a model that is not sharded over several.
    """
    if not isinstance(model, FSDPModule) or model.sharded_over.size() == 1:  # type: ignore[union-attr,operator]
        return
    for layer in decoder_layers(model):
        layer.set_reshard_after_forward(not stay, recurse=False)  # type: ignore[operator]
    model.set_reshard_after_backward(True)
    model.gathered_stay = stay  # type: ignore[assignment]


def gathered_stay(model: nn.Module) -> bool:
    """As `keep_gathered` was told last."""
    return bool(getattr(model, "gathered_stay", False))


def _prefetch(layers: list[Any]) -> None:
    """Each layer's gather is sent before the layer in front of it begins to compute, and not when the host
    comes to it: FSDP2 does so by itself in the backward pass alone. One layer ahead takes no more memory than
    the streams do anyway."""
    for layer, ahead in itertools.pairwise(layers):
        layer.set_modules_to_forward_prefetch([ahead])


def abort_pass(model: nn.Module) -> bool:
    """Forget an update that raised on the way: gathered parameters, gradients that wait for its last row.

    Gradients of the sharded parameters are the caller's. Returns whether the model stands where it stood
    before the update; if not (`reset`), nothing may be trained on it any more.
    """
    whole = reset(model)
    begin_row(model, last=True)
    return whole


def _forget_gathered_after_evaluation(model: Any) -> None:
    """The root keeps its gathered parameters after a forward pass until the backward pass, and the layers do
    on one rank; under no_grad there is none, so an update or a revert between two evaluations would go
    unseen."""
    train_loss = model.loss

    @functools.wraps(train_loss)
    def loss(*args: Any, **kwargs: Any) -> Any:
        output = train_loss(*args, **kwargs)
        if not torch.is_grad_enabled():
            reshard(model)
        return output

    model.loss = loss
    model.register_forward_hook(lambda module, *_: None if torch.is_grad_enabled() else reshard(module))


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor (its live storage), or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor; every rank must call it. A plain tensor is returned as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def held_parameters(model: Any) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every parameter as it is held: its master on one rank (`optim.masters`), its shards
    on several; tied ones once."""
    for name, parameter in model.named_parameters():
        yield name, _held(model, parameter)


def _held(model: Any, tensor: Tensor) -> Tensor:
    masters = getattr(model, "masters", None)
    held: Tensor = tensor if masters is None else masters.of(tensor)
    return held


def full_state(model: nn.Module, world: World) -> dict[str, Tensor]:
    """`model.state_dict()` as it is held, whole and on the CPU, on rank 0; empty elsewhere. Every rank must
    call it.

    Gathered tensor by tensor, so a GPU needs room for one more. Tied weights stay one storage.
    """
    state: dict[str, Tensor] = {}
    gathered: dict[int, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in gathered:
            whole = full_tensor(_held(model, tensor).detach())
            gathered[id(tensor)] = whole.to("cpu") if world.is_main else whole.new_empty(0)
        if world.is_main:
            state[name] = gathered[id(tensor)]
    return state


def grad_norm(parameters: Iterable[nn.Parameter]) -> Tensor:  # [] fp64, on the device
    """Joint L2 norm of all gradients over all ranks; every rank must call it. No host sync.

    Every parameter must be sharded or the run has one rank. A gradient that is not finite makes a norm that
    is not.
    """
    parameters = list(parameters)
    gradients = present_gradients(parameters)
    if gradients:
        squares = torch.stack(torch._foreach_norm(gradients)).double().square().sum()
    else:
        squares = torch.zeros((), dtype=torch.float64, device=parameters[0].device if parameters else None)
    return (all_sum(squares) / copies(parameters)).sqrt()


def present_gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """The gradients that are there, this rank's part of each."""
    # plain tensors are passed on unasked: there are hundreds, in every update
    found = [p.grad for p in parameters]
    return [g if type(g) is Tensor else local(g) for g in found if g is not None]
