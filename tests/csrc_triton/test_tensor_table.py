"""The tables of addresses: made once, followed where gradients move, made anew where anything else does."""

import pytest
import torch

from csrc_triton import tensor_table
from csrc_triton.tensor_table import Line, Tables

GRAD, FIRST_TILE, SIZE = 2, 6, 5


class Made:
    """Tensors, and how often their lines were asked for."""

    def __init__(self, sizes, kinds=None, aligned=16):
        self.fixed = [torch.zeros(max(size, 1)) for size in sizes]
        self.gradients = [torch.zeros(max(size, 1)) for size in sizes]
        self.sizes, self.kinds, self.aligned = sizes, kinds or ["one"] * len(sizes), aligned
        self.tables, self.asked = Tables(FIRST_TILE, GRAD), 0

    def lines(self):
        self.asked += 1
        return [
            Line(
                kind,
                {0: fixed.data_ptr(), GRAD: g.data_ptr(), SIZE: size},
                -(-size // 8),
                number,
                self.aligned,
            )
            for number, (kind, fixed, g, size) in enumerate(
                zip(self.kinds, self.fixed, self.gradients, self.sizes)
            )
        ]

    def plans(self):
        return self.tables.of(self.fixed, self.gradients, self.lines)

    def check(self):
        for plan in self.plans():
            assert plan.table[:, GRAD].tolist() == [self.gradients[n].data_ptr() for n in plan.gradients]
            assert plan.table[:, 0].tolist() == [self.fixed[n].data_ptr() for n in plan.gradients]
            assert torch.equal(plan.table, plan.host)


def test_programs_find_their_tensor():
    made = Made([20, 0, 8, 9])
    (plan,) = made.plans()
    assert plan.tiles.tolist() == [0, 0, 0, 2, 3, 3]  # of no elements: a line and no program
    assert plan.table[:, FIRST_TILE].tolist() == [0, 3, 3, 4]
    assert plan.table[:, SIZE].tolist() == [20, 0, 8, 9]
    assert (plan.table.dtype, plan.tiles.dtype) == (torch.int64, torch.int32)
    assert plan.table.shape == (4, 16)


def test_kinds_have_tables_of_their_own():
    made = Made([20, 8, 9], kinds=["a", "b", "a"])
    plans = made.plans()
    assert [plan.kind for plan in plans] == ["a", "b"]
    assert [plan.gradients for plan in plans] == [[0, 2], [1]]
    made.check()


def test_nothing_is_made_twice():
    made = Made([20, 8])
    first = made.plans()
    assert made.plans() is first
    assert (made.asked, made.tables.built, made.tables.moved) == (1, 1, 0)


def test_gradients_that_moved_are_followed_in_place():
    made = Made([20, 8], kinds=["a", "b"])
    first = [plan.table.data_ptr() for plan in made.plans()]
    old = made.gradients
    for _ in range(2):
        made.gradients = [torch.zeros(32), *made.gradients[1:]]
        made.check()
    assert [plan.table.data_ptr() for plan in made.plans()] == first
    assert (made.asked, made.tables.moved) == (1, 2)
    made.gradients = old  # and back
    made.check()


@pytest.mark.parametrize("aligned", [16, 1])
def test_a_promise_of_alignment_is_kept(aligned):
    made = Made([20, 8], aligned=aligned)
    made.plans()
    made.gradients[1] = torch.zeros(33)[1:]
    made.check()
    assert made.asked == (2 if aligned == 16 else 1)


def test_whatever_else_moved_is_asked_for_anew():
    made = Made([20, 8])
    made.plans()
    made.fixed[1] = torch.zeros(32)
    made.check()
    made.gradients[0] = made.gradients[0].view(torch.int32)  # another type at the same address
    made.check()
    assert made.asked == 3


def test_the_host_copy_is_pinned_only_for_a_gpu(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: asked.append(1) or tensor)
    host = torch.zeros(4)
    assert tensor_table.upload(host, torch.device("cpu")) is host
    assert not asked
    tensor_table.upload(host, torch.device("meta"))
    assert not asked
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device, non_blocking: (device.type, non_blocking))
    assert tensor_table.upload(host, torch.device("cuda")) == ("cuda", True)
    assert asked
