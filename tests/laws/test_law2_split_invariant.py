"""Law 2, at the model: the gradient of an update is that of its samples, however they are cut into rows and
ranks."""

import copy

import pytest
import torch

from repsft_fast.distributed import full_tensor, shard
from repsft_fast.models import load_model
from tests.helpers import ranks, tiny

LENGTHS = tuple(torch.randint(2, 60, (16,), generator=torch.Generator().manual_seed(3)).tolist())
BOUND = {torch.float32: 2e-6, torch.float64: 1e-12}


def build(name, dtype):
    torch.manual_seed(1)
    return load_model(tiny.config(name), param_dtype=dtype)


def update(parts, *, length=None, average="sample"):
    """The rows of one update of all samples, cut into `parts` rows (some of unequal size), all with one
    denominator."""
    samples = tiny.documents(LENGTHS)
    denominator = len(samples) if average == "sample" else sum(n - 2 for n in LENGTHS)
    numbers = list(range(len(samples)))
    cut = [numbers[part::parts] for part in range(parts)]
    return [
        tiny.row(
            [samples[i] for i in part], denominator=denominator, prompt=1, length=length, average=average
        )
        for part in cut
    ]


def gradients(model, rows):
    model.zero_grad(set_to_none=True)
    for row in rows:
        model.loss(row)[0].backward()
    return {name: full_tensor(p.grad).clone() for name, p in model.named_parameters()}


def worst(got, expected):
    assert got.keys() == expected.keys()
    return max(
        ((got[n].double() - expected[n].double()).norm() / expected[n].double().norm()).item()
        for n in expected
    )


@pytest.mark.parametrize("name", tiny.NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("average", ["sample", "token"])
def test_rows_and_their_length_do_not_change_the_gradient(name, dtype, average):
    model = build(name, dtype)
    expected = gradients(model, update(1, average=average))
    for parts, length in ((2, None), (4, None), (8, None), (1, 1024), (8, 128)):
        error = worst(gradients(model, update(parts, length=length, average=average)), expected)
        assert error < BOUND[dtype], (parts, length)


@pytest.mark.parametrize("parts", [2, 8])
def test_weights_after_sgd_are_equal(parts):
    one = build("llama", torch.float32)
    many = copy.deepcopy(one)
    for model, rows in ((one, update(1)), (many, update(parts))):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            gradients(model, rows)
            optimizer.step()
    assert worst(dict(many.named_parameters()), dict(one.named_parameters())) < 1e-6


def test_recomputing_activations_does_not_change_the_gradient():
    expected = gradients(build("llama", torch.float64), update(2))
    for mode in ("selective", "full"):
        torch.manual_seed(1)
        model = load_model(tiny.config("llama"), param_dtype=torch.float64, activation_checkpointing=mode)
        assert worst(gradients(model, update(2)), expected) < 1e-12


def on_rank(world, name, dtype, parts):
    """Rank r takes the rows r, r + size, …; a rank with fewer rows gets empty ones, as the plan does."""
    model = build(name, dtype)
    assert shard(model, world)
    rows = update(parts)
    mine = rows[world.rank :: world.size]
    while len(mine) < -(-len(rows) // world.size):
        mine.append(tiny.row([], length=8))
    return {n: g.numpy() for n, g in gradients(model, mine).items()}


@pytest.mark.parametrize("name", ["llama", "llama-tied", "olmo3"])
@pytest.mark.parametrize(
    ("dtype", "parts"), [(torch.float32, 4), (torch.float64, 4), (torch.float64, 3), (torch.float64, 1)]
)
def test_two_ranks_do_not_change_the_gradient(name, dtype, parts):
    expected = gradients(build(name, dtype), update(1))
    for answer in ranks.run_ranks(on_rank, name, dtype, parts):
        got = {n: torch.from_numpy(g) for n, g in answer.items()}
        assert worst(got, expected) < BOUND[dtype]
