"""FSDP2 put back to where it stands between two updates, after an update that raised on the way.

An error inside a forward or backward pass leaves FSDP2 in the middle: gathered parameters, gradients that
wait to be reduced, groups that believe their backward pass is running, a final callback that counts as queued
and will never come. The next update then trains some groups or none, without a word. torch 2.13 has a method
for it, which leaves behind the gradients of the group it was in; in 2.11 and 2.12 the same is done here by
hand. Whatever was done is looked at afterwards: a model that cannot be seen to be whole is not trained on.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

BY_HAND = ("2.11.", "2.12.")  # releases without FSDPModule.reset_iter_state whose insides are known


def reset(model: nn.Module) -> bool:
    """Forget the pass that raised. Returns whether the model is whole: sharded, idle, no gradient left
    inside.

    Gradients of the sharded parameters are the caller's. Waits for the device: what is freed may still be
    read there. False (and the model must not be trained on) where this torch's FSDP2 is another than the one
    that is known.
    """
    if not isinstance(model, FSDPModule):
        return True
    device = next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    try:
        root = model._get_fsdp_state()
        if root._is_root is None:  # no forward pass has ever begun
            return True
        states = list(_states(model))
        if hasattr(model, "reset_iter_state"):
            model.reset_iter_state()
        elif torch.__version__.startswith(BY_HAND):
            _by_hand(root, states)
        else:
            return False
        for group in _groups(states):
            _drop_gathered(group)
        return _is_whole(root, states)
    except (AttributeError, RuntimeError, TypeError):  # not the insides that were expected
        return False


def unfinished(model: nn.Module) -> bool:
    """Whether FSDP2 still waits for the end of a backward pass that is over: some of its gradients have not
    come.

    A look at the host, free. It reads FSDP2's insides; where they are not found it says no.
    """
    if not isinstance(model, FSDPModule):
        return False
    context = getattr(model._get_fsdp_state(), "_state_ctx", None)
    return bool(getattr(context, "post_backward_final_callback_queued", False))


def _by_hand(root: Any, states: list[Any]) -> None:
    """What `reset_iter_state` of torch 2.13 does, for the releases before it. AttributeError where something
    is missing."""
    _put(root._state_ctx, iter_forward_root=None, post_backward_final_callback_queued=False)
    _put(root._comm_ctx, all_gather_state=None)
    root._comm_ctx.post_forward_order.clear()
    if hasattr(root._comm_ctx, "reduce_scatter_states"):  # 2.12
        root._comm_ctx.reduce_scatter_states.clear()
    else:
        _put(root._comm_ctx, reduce_scatter_state=None)
    for state in states:
        state._modules_to_run_forward.clear()
        _put(state, _training_state=type(state._training_state).IDLE)
    for group in _groups(states):
        _put(
            group,
            _training_state=type(group._training_state).IDLE,
            _all_gather_result=None,
            _post_reduce_event=None,
            _reshard_after_forward_event=None,
            _partial_reduce_output=None,
            _all_reduce_state=None,
        )
        group._post_forward_indices.clear()


def _drop_gathered(group: Any) -> None:
    """Whole parameters and their gradients, also of a gather or a backward pass that stopped half way through
    the group."""
    for parameter in group.fsdp_params:
        if hasattr(parameter, "_unsharded_param"):  # from the first gather on
            parameter._unsharded_param.grad = None
        _put(parameter, unsharded_accumulated_grad=None)
        parameter.to_sharded()
    group.reshard()


def _is_whole(root: Any, states: list[Any]) -> bool:
    groups = _groups(states)
    return (
        root._state_ctx.iter_forward_root is None
        and root._state_ctx.post_backward_final_callback_queued is False
        and not root._comm_ctx.post_forward_order
        and all(part._training_state is type(part._training_state).IDLE for part in [*states, *groups])
        and all(
            group.is_sharded and not group._post_forward_indices and group._all_gather_result is None
            for group in groups
        )
    )


def _states(model: nn.Module) -> Iterator[Any]:
    """FSDP2's state of every module that it wraps."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            yield module._get_fsdp_state()


def _groups(states: list[Any]) -> list[Any]:
    """Their parameter groups; a state whose parameters are all someone else's has none."""
    found: list[Any] = []
    for state in states:
        several = getattr(state, "_fsdp_param_groups", None)  # from 2.12 on
        found += [state._fsdp_param_group] if several is None else several
    return [group for group in found if group is not None]


def _put(holder: Any, **values: Any) -> None:
    """Set attributes that are there. AttributeError for one that is not: it would be a new one that nobody
    reads."""
    for name, value in values.items():
        getattr(holder, name)
        setattr(holder, name, value)
