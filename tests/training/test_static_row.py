"""A row at fixed addresses: nothing of the row before is left in it, and what is filled up adds exactly nothing."""

from dataclasses import fields, replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from repsft_fast.models.loss import Head, LossSettings, attach_loss
from repsft_fast.ops.attention import register
from repsft_fast.row import IGNORE_INDEX
from repsft_fast.training.static_row import Shape, StaticRow
from tests.helpers import tiny

CPU = torch.device("cpu")
T, TASKS = 48, 2


def static_row(trained=48, borders=12, longest=128) -> StaticRow:
    return StaticRow(Shape(T, trained), borders=borders, longest=longest, spare_task=TASKS, device=CPU)


def make_row(lengths, seed=0, prompt=2):
    row = tiny.row(tiny.documents(lengths, seed), length=T, prompt=prompt, denominator=len(lengths))
    return replace(row, position_tasks=row.position_segments % TASKS)


def model_of(name, dtype=torch.float32, **settings):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny.config(name), attn_implementation=register()).to(dtype)
    head = replace(Head.of(model), softcap=settings.pop("softcap", None))
    attach_loss(model, LossSettings(head, attention="mask"))
    return model


def passed(model, row, tasks):
    """Loss, statistics, sums and gradients."""
    model.zero_grad()
    loss, stats = model.loss(row)
    loss.backward()
    return (
        loss.detach(),
        stats,
        stats.sum_by(row.position_tasks, tasks).table,
        [p.grad for p in model.parameters()],
    )


@pytest.mark.parametrize("lengths", [[5, 9, 12], [48], [3], [8] * 6, []])
def test_it_is_the_row_and_nothing_of_the_one_before(lengths):
    static = static_row()
    static.take(
        make_row([6] * 7, seed=9, prompt=0)
    )  # more borders, segments and trained positions than the next
    row = make_row(lengths)
    static.take(row)
    ours, n = static.row, row.trained_positions.numel()
    assert torch.equal(ours.tokens, row.tokens)
    assert torch.equal(ours.positions, row.positions)
    assert torch.equal(ours.targets[:T], row.targets)
    assert torch.equal(ours.weights[:T], row.weights)
    assert ours.weights[T] == 0.0
    assert ours.targets[T] != IGNORE_INDEX
    for name, spare in (("trained_positions", T), ("position_tasks", TASKS), ("position_segments", 12)):
        assert torch.equal(getattr(ours, name)[:n], getattr(row, name))
        assert (getattr(ours, name)[n:] == spare).all()
    borders = row.cu_seqlens.numel()
    assert torch.equal(ours.cu_seqlens[:borders], row.cu_seqlens)
    assert (ours.cu_seqlens[borders:] == T).all()


def test_it_stays_where_it_is_and_copies_twice():
    static, seen = static_row(), []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if not func._schema.name.startswith(("aten::view", "aten::slice", "aten::detach")):
                seen.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    names = [f.name for f in fields(static.row) if isinstance(getattr(static.row, f.name), torch.Tensor)]
    addresses = {name: getattr(static.row, name).data_ptr() for name in names}
    row = make_row([5, 9])
    with Seen():
        static.take(row)
    assert seen == ["aten::copy_", "aten::_foreach_copy_"]
    assert addresses == {name: getattr(static.row, name).data_ptr() for name in names}
    assert all(address % 64 == static._memory.data_ptr() % 64 for address in addresses.values())


def test_what_does_not_fit():
    static = static_row(trained=12, borders=6, longest=16)
    row = replace(make_row([6, 6], prompt=0), max_seqlen=16)
    assert static.fits(row)
    assert not static.fits(make_row([6, 7], prompt=0))  # 13 trained
    assert not static.fits(replace(row, max_seqlen=32))
    assert not static.fits(replace(row, segment_lengths=(6, 6)))  # its padding is no segment
    assert not static.fits(replace(row, cu_seqlens=torch.tensor([0, 1, 2, 3, 4, 5, 48], dtype=torch.int32)))
    assert not static.fits(replace(row, targets=row.targets[:-1]))


@pytest.mark.parametrize("name", ["llama-tied", "qwen3", "olmo3"])
@pytest.mark.parametrize("lengths", [[5, 9, 12], [20, 20], [48], [3], []])
def test_filled_up_is_the_row(name, lengths):
    """In float64, so that what remains is how a product of another shape rounds."""
    model, row, static = model_of(name, torch.float64), make_row(lengths), static_row(trained=48)
    static.take(row)
    n = row.trained_positions.numel()
    loss, stats, sums, gradients = passed(model, row, TASKS)
    ours, our_stats, our_sums, our_gradients = passed(model, static.row, TASKS + 1)
    torch.testing.assert_close(ours, loss, rtol=1e-14, atol=0)
    for field in fields(stats):
        torch.testing.assert_close(
            getattr(our_stats, field.name)[:n], getattr(stats, field.name), rtol=1e-13, atol=1e-14
        )
    assert torch.equal(our_sums[:TASKS, :3], sums[:, :3])  # counts, exactly
    assert (
        our_sums[:TASKS] - sums
    ).abs().max() <= 1  # the last of 32 bits behind the point, of another rounding
    assert our_sums[TASKS, 0] == 48 - n
    for a, b in zip(our_gradients, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-14)


def in_order(a, b, *, out=None):
    """A product that rounds alike whatever its shape: terms are added one after the other."""
    total = a.new_zeros(a.shape[0], b.shape[1])
    for k in range(a.shape[1]):
        total += a[:, k, None] * b[k]
    return total if out is None else out.copy_(total)


@pytest.mark.parametrize("name", ["llama-tied", "qwen3", "olmo3"])
@pytest.mark.parametrize("lengths", [[5, 9, 12], [20, 20], [48], [3], [2], []])
def test_filled_up_is_the_row_bit_for_bit(name, lengths, monkeypatch):
    """Where a product of another shape rounds alike: what is filled up adds exactly nothing."""
    monkeypatch.setattr(torch, "mm", in_order)
    model, row, static = model_of(name), make_row(lengths), static_row(trained=48)
    static.take(row)
    n = row.trained_positions.numel()
    loss, stats, sums, gradients = passed(model, row, TASKS)
    _, our_stats, our_sums, our_gradients = passed(model, static.row, TASKS + 1)
    assert torch.equal((our_stats.loss[:n] * row.weights[row.trained_positions]).sum(), loss)
    assert torch.equal(our_sums[:TASKS], sums)
    assert all(torch.equal(getattr(our_stats, f.name)[:n], getattr(stats, f.name)) for f in fields(stats))
    assert all(map(torch.equal, our_gradients, gradients))


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_what_stands_in_the_padding_changes_no_bit(softcap):
    """Another target, task or segment there, or as much of it again: no gradient, no sum and no row's statistics."""
    model, row = model_of("llama-tied", softcap=softcap), make_row([5, 9, 12])
    static, n = static_row(trained=48), row.trained_positions.numel()
    static.take(row)
    _, stats, sums, gradients = passed(model, static.row, TASKS + 1)
    gradients = [g.clone() for g in gradients]
    static.row.targets[T] = 41
    static.row.position_segments[n:] = 7
    static.row.targets[:T][row.targets == IGNORE_INDEX] = 5  # nobody may look at these either
    _, our_stats, our_sums, our_gradients = passed(model, static.row, TASKS + 1)
    assert torch.equal(our_sums[:TASKS], sums[:TASKS])
    assert all(torch.equal(getattr(our_stats, f.name)[:n], getattr(stats, f.name)[:n]) for f in fields(stats))
    assert all(map(torch.equal, our_gradients, gradients))


def test_the_head_with_a_bias_has_a_spare_place_too():
    model = model_of("llama")
    model.lm_head.bias = torch.nn.Parameter(torch.randn(tiny.VOCABULARY))
    attach_loss(model, LossSettings(Head.of(model), attention="mask"))
    row = make_row([9, 12, 14])
    static = static_row(trained=row.trained_positions.numel() + 5)
    static.take(row)
    *_, gradients = passed(model, row, TASKS)
    *_, ours = passed(model, static.row, TASKS + 1)
    for a, b in zip(ours, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1.2e-7, atol=1e-9)  # a unit in the last place


def test_attention_that_needs_lengths_of_the_host_raises():
    """A loop over segments would bake one row's lengths in: it is given none."""
    model, static = model_of("llama"), static_row()
    static.take(make_row([5, 9]))
    model.loss_settings = replace(model.loss_settings, attention="segments")
    with pytest.raises(RuntimeError):
        model.loss(static.row)
