"""A head sharded over two ranks is gathered once, its gradient is the sum over the ranks; the trainer's way
gathers no more."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from repsft_fast.distributed import shard
from repsft_fast.models import load_model
from repsft_fast.ops.linear_cross_entropy import linear_cross_entropy
from tests.helpers import ranks, tiny

N, H, V = 11, 8, 37  # 37 rows of the head over two ranks: shards of unequal size


def operands():
    generator = torch.Generator().manual_seed(0)
    hidden, head = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((N, H), (V, H))
    )
    return hidden, head, torch.randint(V, (N,), generator=generator)


def collectives(mode):
    return {str(name).rsplit(".", 1)[-1]: count for name, count in mode.get_comm_counts().items()}


def sharded(world):
    hidden, head, targets = operands()
    mine = slice(world.rank, None, world.size)
    hidden = hidden[mine].requires_grad_()
    head = distribute_tensor(head, init_device_mesh("cpu", (world.size,)), [Shard(0)]).requires_grad_()
    with CommDebugMode() as forward:
        loss, stats = linear_cross_entropy(hidden, head, targets[mine])
    with CommDebugMode() as backward:
        loss.backward()
    assert isinstance(head.grad, DTensor)
    assert head.grad.placements == (Shard(0),)
    counts = collectives(forward), collectives(backward)
    return loss.item(), int(stats.correct.sum()), hidden.grad.numpy(), head.grad.full_tensor().numpy(), counts


def test_a_sharded_head_is_gathered_once_and_its_gradient_summed():
    hidden, head, targets = operands()
    hidden.requires_grad_(), head.requires_grad_()
    loss, stats = linear_cross_entropy(hidden, head, targets)
    loss.backward()
    # far above what the comparison allows
    assert min(hidden.grad.norm(dim=1).min(), head.grad.norm(dim=1).min()) > 1e-6
    found = ranks.run_ranks(sharded)
    assert sum(each[0] for each in found) == pytest.approx(loss.item(), rel=1e-12)
    assert sum(each[1] for each in found) == int(stats.correct.sum())
    for rank, (_, _, grad_hidden, grad_head, counts) in enumerate(found):
        torch.testing.assert_close(torch.tensor(grad_hidden), hidden.grad[rank::2], rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(torch.tensor(grad_head), head.grad, rtol=1e-12, atol=1e-15)
        assert counts == ({"all_gather_into_tensor": 1}, {"reduce_scatter_tensor": 1})


def trained(world, tied):
    model = load_model({**tiny.config("llama").to_dict(), "tie_word_embeddings": tied})
    shard(model, world)
    counts = []
    for document in tiny.documents((9, 4)):
        row = tiny.row([document], denominator=2)
        with CommDebugMode() as forward:
            loss, _ = model.loss(row)
        with CommDebugMode() as backward:
            loss.backward()
        counts.append((collectives(forward), collectives(backward)))
    return len(model.model.layers), counts


@pytest.mark.parametrize("tied", [False, True])
def test_a_microbatch_of_the_trainer_gathers_the_head_once(tied):
    """Forward: every layer, and the root, which holds the head. Backward: only the layers again; each
    gradient once."""
    for layers, counts in ranks.run_ranks(trained, tied):
        for forward, backward in counts:
            assert forward == {"_allgather_base_": layers + 1}
            assert backward == {"_allgather_base_": layers, "_reduce_scatter_base_": layers + 1}


def over_two_dimensions(world):
    mesh = init_device_mesh("cpu", (1, world.size), mesh_dim_names=("replicas", "shards"))
    hidden, head, targets = operands()
    try:
        linear_cross_entropy(hidden, DTensor.from_local(head, mesh), targets)
    except ValueError as error:
        return str(error)


def test_a_mesh_of_several_dimensions_is_refused():
    for text in ranks.run_ranks(over_two_dimensions):
        assert "lm_head: is sharded over a mesh of several dimensions" in text
