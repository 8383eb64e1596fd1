"""What several ranks gather stays from row to row where they are told so: the same numbers, fewer messages;
and when gathers are sent."""

from collections import Counter

import pytest
import torch
from torch.distributed.tensor import DTensor

from repsft_fast import distributed
from repsft_fast.distributed import begin_row, decoder_layers, gathered_stay, keep_gathered, shard
from repsft_fast.models import load_model
from repsft_fast.sizing.rehearsal import Messages
from tests.helpers import ranks, tiny

LENGTHS = (9, 4, 17, 6, 5, 8)
ROWS = 3  # of a rank


def build(architecture="llama", **options):
    torch.manual_seed(1)
    model = load_model(tiny.config(architecture), **options)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zeros, before which no gradient reaches A
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def mine(world):
    return [tiny.row([d], denominator=len(LENGTHS)) for d in tiny.documents(LENGTHS)][
        world.rank :: world.size
    ]


def update(model, rows):
    """Gradients of an update, as the trainer makes them, whole; and what is sharded between its rows."""
    model.zero_grad()
    between = []
    for number, row in enumerate(rows, 1):
        if number in (1, len(rows)):
            begin_row(model, last=number == len(rows))
        model.loss(row)[0].backward()
        between.append(all(isinstance(p, DTensor) for p in model.parameters()))
    names = dict(model.named_parameters())
    return {n: p.grad.full_tensor().clone() for n, p in names.items() if p.grad is not None}, between


def of_a_rank(world, cases):
    """For every case gradients are those without `keep_gathered`; the messages of both."""
    found = []
    for architecture, options, mesh_ranks in cases:
        answers = []
        for stay in (False, True):
            model = build(architecture, **options)
            shard(model, world, mesh=distributed.mesh_of(world, mesh_ranks))
            keep_gathered(model, stay)
            assert gathered_stay(model) is stay
            update(model, mine(world))
            with Messages() as messages:
                gradients, between = update(model, mine(world))
            assert between == [not stay] * (ROWS - 1) + [True], "after the last row weights are sharded"
            with torch.no_grad():
                losses = model.loss(mine(world)[0])[1].loss.tolist()
                assert all(isinstance(p, DTensor) for p in model.parameters()), "and after an evaluation"
            model.loss(mine(world)[0])[0].backward()  # nothing said: a row of its own
            assert all(isinstance(p, DTensor) for p in model.parameters())
            answers.append((gradients, losses, counted(messages)))
        (left, losses, sent), (right, losses_kept, sent_kept) = answers
        assert left.keys() == right.keys()
        assert losses == losses_kept
        found.append((all(torch.equal(left[n], right[n]) for n in left), sent, sent_kept))
    return found


def counted(messages):
    times = Counter()
    for message, count in messages.found.items():
        times[message.operation] += count
    return dict(times)


LAYERS = tiny.config("llama").num_hidden_layers
CASES = [
    ("llama", {}, None),
    ("llama-tied", {"compute_dtype": "bfloat16"}, None),
    ("qwen3", {"activation_checkpointing": "full"}, None),
    ("llama", {"lora": {"rank": 4}, "compute_dtype": "bfloat16"}, None),
    ("llama", {"compute_dtype": "bfloat16"}, 1),  # two copies of the weights
]


def test_the_same_gradients_and_fewer_messages():
    """R rows of L layers: R (2 L + 1) gathers, the root's once a row, or L + 1 in all; every row is reduced
    either way."""
    for found in ranks.run_ranks(of_a_rank, CASES):
        for (name, options, mesh_ranks), (equal, sent, kept) in zip(CASES, found):
            assert equal, (name, options)
            if mesh_ranks == 1:  # each rank has a whole copy: gradients alone travel, once an update
                assert sent["all_reduce"] == kept["all_reduce"] == LAYERS + 1
                continue
            reduced = LAYERS + ("lora" not in options)  # a frozen root has no gradient
            assert sent["reduce_scatter"] == kept["reduce_scatter"] == ROWS * reduced, (name, options)
            assert sent["all_gather"] == ROWS * (2 * LAYERS + 1), (name, options)
            assert kept["all_gather"] == LAYERS + 1, (name, options)


def weights_written(world):
    """An update that is given up, weights written in place: the next pass sees them."""
    model, seen = build(), []
    shard(model, world)
    keep_gathered(model, True)
    row = mine(world)[0]
    for _ in range(2):
        begin_row(model, last=False)
        model.loss(row)[0].backward()
        assert distributed.abort_pass(model)
        model.zero_grad()
        with torch.no_grad():
            for parameter in model.parameters():
                distributed.local(parameter).mul_(0.5)
            seen.append(model.loss(row)[0].item())
        update(model, mine(world))
    fresh = build()
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.mul_(0.25)
        return seen, fresh.loss(row)[0].item()


def test_nothing_gathered_outlives_an_update_that_was_given_up():
    for seen, expected in ranks.run_ranks(weights_written):
        assert seen[1] == pytest.approx(expected, rel=1e-5)
        assert seen[0] != pytest.approx(expected, rel=1e-3)


def order_of_gathers(world):
    """When a layer begins to compute, how many gathers have been sent."""
    model, sent = build(), []
    shard(model, world)
    model.loss(mine(world)[0])[0].backward()
    with Messages() as messages:
        for layer in decoder_layers(model):
            layer.self_attn.q_proj.register_forward_pre_hook(
                lambda *_: sent.append(counted(messages).get("all_gather", 0))
            )
        model.loss(mine(world)[0])[0].backward()
        total = counted(messages)["all_gather"]
    return sent, total


def test_a_gather_is_sent_before_the_layer_in_front_computes():
    for sent, total in ranks.run_ranks(order_of_gathers):
        assert sent == [min(n + 3, LAYERS + 1) for n in range(LAYERS)], "the root's, this one's and the next"
        assert total == 2 * LAYERS + 1, "and none is sent twice"


def test_one_process_alone_is_left_as_it_is():
    model = build()
    keep_gathered(model, True)
    assert not gathered_stay(model)
