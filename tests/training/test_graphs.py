"""Captured passes of rows: bit for bit the run without them, and nothing stale.

Where no shape is filled up the run beside is the plain one; where one is, the same pass over the same buffers
without a capture, because a product of another shape may round otherwise (tests/training/test_static_row.py holds
a filled-up row to the row).
"""

import gc
import json
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from repsft_fast.config import Config
from repsft_fast.distributed import held_parameters
from repsft_fast.metrics import SampleStats
from repsft_fast.models.compiled import compiled_layers
from repsft_fast.ops import row_pass
from repsft_fast.optim import reset as reset_optimizer
from repsft_fast.selftest.syncs import SyncCounter
from repsft_fast.state import state_hash
from repsft_fast.training.build import build
from repsft_fast.training.graphs import CaptureFailed, RowGraphs, Shapes
from repsft_fast.training.refusals import check_gradients
from repsft_fast.training.snapshots import Snapshots, closed_list
from repsft_fast.training.static_row import Shape
from repsft_fast.training.step import OutOfMemory, forward_backward, train_step
from repsft_fast.training.warm_up import warm_up
from tests.helpers import runs
from tests.helpers.fake_capture import Again, FakeCapture

T = 64
LENGTH = 16  # of every sample where every row has the same N'
SHAPES = Shapes((Shape(T, 24), Shape(T, 48)), borders=9, longest=128)
EXACT = Shapes((Shape(T, T // LENGTH * (LENGTH // 2)),), borders=9, longest=128)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def parts_of(folder, *, even=False, attention="mask", **changes):
    """Parts whose rows have T slots and, where `even`, the same N'; their attention reads borders on the device."""
    folder.mkdir(exist_ok=True)
    if even:
        draw = np.random.default_rng(0)
        lines = []
        for number in range(64):
            ids = draw.integers(3, runs.VOCABULARY, LENGTH + 1).tolist()
            labels = [-100] * (LENGTH // 2 + 1) + ids[LENGTH // 2 + 1 :]
            lines.append(json.dumps({"input_ids": ids, "labels": labels, "task": f"task{number % 2}"}))
        (folder / "train.jsonl").write_text("\n".join(lines))
    batch = {"batch__samples": 8, "batch__row_tokens": T, "batch__bucket_tokens": T}
    parts = build(Config.of(runs.settings(folder, samples=64, tasks=2, **{**batch, **changes})))
    parts.model.loss_settings = replace(parts.model.loss_settings, attention=attention)
    return parts


def graphs_of(parts, shapes=SHAPES, capture=None, **more):
    capture = FakeCapture() if capture is None else capture
    return RowGraphs(
        parts.model, shapes, capture, num_tasks=parts.num_tasks, device=parts.world.device, **more
    )


def updates_of(parts, count):
    """Whole ones."""
    planned = (update for epoch in range(count) for update in parts.plan.epoch(0, epoch))
    return list(islice((update for update in planned if len(update.samples) == 8), count))


def made(parts, updates):
    """Everything the updates leave: records and the weights' hash after each."""
    left = []
    for update in updates:
        train_step(parts, update)
        parts.progress.updates += 1
        (record,) = parts.ledger.read()
        weights = state_hash({n: p.detach() for n, p in held_parameters(parts.model)}, {})
        left.append((record.loss, record.grad_norm, record.tasks.table.tolist(), weights))
    return left


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optim__name": "adamw8bit"},
        {"model__lora": {"rank": 4}},
        {"model__compute_dtype": "bfloat16"},  # masters
        {"model__compute_dtype": "bfloat16", "optim__name": "sgd"},
    ],
    ids=str,
)
def test_twenty_updates_of_two_rows_are_the_plain_ones(tmp_path, changes):
    """Tied embeddings, gradients of two rows added; every row another one."""
    plain, ours = (parts_of(tmp_path, even=True, **changes) for _ in range(2))
    ours.graphs = graphs_of(ours, EXACT)
    updates = updates_of(plain, 20)
    assert all(len(update.ranks[0]) == 2 for update in updates)
    assert made(ours, updates) == made(plain, updates)
    assert vars(ours.graphs.counts) == {"captured": 1, "replayed": 40, "fell_back": 0}


def test_a_row_is_not_replayed_into_buffers_that_nobody_reads(tmp_path):
    """Before the update begins, and where a gradient was taken away in its middle."""
    parts = parts_of(tmp_path, even=True)
    graphs = graphs_of(parts, EXACT)
    row, *_ = parts.rows(updates_of(parts, 1)[0])
    assert graphs(row, keep=False) is None, "nothing is lent yet"
    graphs.begin_update()
    assert graphs(row, keep=False) is not None
    next(iter(parts.optimizer.names.values())).grad = None
    assert graphs(row, keep=False) is None
    assert vars(graphs.counts) == {"captured": 1, "replayed": 1, "fell_back": 2}


def test_captured_rows_pass_compiled_layers_together(tmp_path, monkeypatch):
    """Where a capture begins with compiled layers it holds their graphs and nothing around them."""
    make = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **o: make(function, backend="aot_eager", **o))
    changes = {"model__compile": True, "batch__row_lengths": [T], "batch__bucket_tokens": "auto"}
    changes |= {"model__compute_dtype": "bfloat16"}
    plain, ours = (parts_of(tmp_path, even=True, **changes) for _ in range(2))
    for parts in (plain, ours):
        warm_up(parts, lambda text: None)
    stack = compiled_layers(ours.model).stack
    compiled_layers(plain.model).stack._plans.clear()
    lengths = ours.plan.row_lengths
    shapes = Shapes(EXACT.shapes, borders=lengths.segments + 1, longest=lengths.max_seqlen(T))
    ours.graphs = graphs_of(ours, shapes)
    # one says what is reached, four are the capture's
    assert vars(stack.counts) == {"stacked": 5, "at_once": 5, "apart": 0}
    updates = updates_of(plain, 6)
    assert made(ours, updates) == made(plain, updates)
    assert ours.graphs.counts.replayed == 12
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "changes", [{}, {"optim__name": "sgd"}, {"model__activation_checkpointing": "full"}], ids=str
)
def test_twenty_updates_of_rows_that_are_filled_up(tmp_path, changes):
    """Two capacities, replayed in turn out of one pool."""
    plain, ours = (parts_of(tmp_path, **changes) for _ in range(2))
    plain.graphs, ours.graphs = graphs_of(plain, capture=Again()), graphs_of(ours)
    updates = updates_of(plain, 20)
    assert made(ours, updates) == made(plain, updates)
    graphs = ours.graphs.counts
    assert graphs.replayed >= 36
    assert graphs.fell_back == 0
    capture = {shape: captured.replays for shape, (_, captured) in ours.graphs._rows.items()}
    assert all(times > 5 for times in capture.values())


def test_what_is_filled_up_trains_as_the_plain_run_to_rounding(tmp_path):
    plain, ours = parts_of(tmp_path, optim__name="sgd"), parts_of(tmp_path, optim__name="sgd")
    ours.graphs = graphs_of(ours)
    updates = updates_of(plain, 20)
    for (loss, norm, table, _), (loss_, norm_, table_, _) in zip(
        made(ours, updates), made(plain, updates), strict=True
    ):
        assert loss == pytest.approx(loss_, rel=1e-5)
        assert norm == pytest.approx(norm_, rel=1e-4)
        assert [line[0] for line in table] == [line[0] for line in table_]


def test_roll_back_reset_and_evaluation_between(tmp_path):
    """Weights are written in place by a snapshot's return, moments by a reset; evaluation runs plain."""
    both = [parts_of(tmp_path, even=True, data__validation_fraction=0.2) for _ in range(2)]
    both[1].graphs = graphs_of(both[1], EXACT)
    left = []
    for parts in both:
        snapshots = Snapshots(parts, closed_list(parts), 1, weights_only=False, whole=0)
        updates = updates_of(parts, 9)
        found = made(parts, updates[:3])
        snapshots.take("before")
        found += made(parts, updates[3:6])
        found.append(parts.validation(parts.model).stats.table.tolist())
        snapshots.restore("before")
        found += made(parts, updates[6:9])
        reset_optimizer(parts.optimizer)
        found += made(parts, updates[3:6])
        found.append(parts.validation(parts.model).stats.table.tolist())
        left.append(found)
        snapshots.close()
    assert left[0] == left[1]
    assert both[1].graphs.counts.fell_back == 0
    assert both[1].graphs.counts.replayed == 24


def test_between_updates_no_gradient_is_there(tmp_path):
    """A snapshot in the middle of an update is refused, so it sees that none is; nor does one alias a buffer."""
    parts = parts_of(tmp_path)
    parts.graphs = graphs_of(parts)
    assert all(p.grad is None for p in parts.model.parameters())
    train_step(parts, updates_of(parts, 1)[0])
    assert all(p.grad is None for p in parts.model.parameters())
    buffers = {g.untyped_storage().data_ptr() for g in parts.graphs._gradients.values()}
    assert not buffers & {t.untyped_storage().data_ptr() for t in closed_list(parts).tensors().values()}


def test_gradients_start_from_zero_and_add_up(tmp_path):
    parts = parts_of(tmp_path)
    update, other = updates_of(parts, 2)
    forward_backward(parts, update)
    plain = {n: p.grad.clone() for n, p in parts.model.named_parameters()}
    parts.optimizer.zero_grad()
    parts.ledger.drop_open()
    parts.graphs = graphs_of(parts)
    forward_backward(parts, other)  # leaves something in the buffers
    parts.optimizer.zero_grad()
    forward_backward(parts, update)
    check_gradients(parts, update)
    for name, parameter in parts.model.named_parameters():
        torch.testing.assert_close(parameter.grad, plain[name], rtol=1e-4, atol=1e-6)


def test_rows_of_another_shape_take_the_plain_pass_into_the_same_gradients(tmp_path):
    plain, ours = parts_of(tmp_path), parts_of(tmp_path)
    small = Shapes((Shape(T, 24),), borders=9, longest=128)
    plain.graphs, ours.graphs = graphs_of(plain, small, Again()), graphs_of(ours, small)
    updates = updates_of(plain, 12)
    assert made(ours, updates) == made(plain, updates)
    counts = ours.graphs.counts
    assert counts.captured == 1
    assert counts.replayed > 5
    assert counts.fell_back > 5


def test_results_are_copied_out(tmp_path):
    """Another row's replay changes neither loss nor sums, nor statistics that are kept."""
    parts = parts_of(tmp_path)
    graphs = graphs_of(parts)
    first, second = (next(iter(parts.rows(update))) for update in updates_of(parts, 2))
    graphs.begin_update()
    loss, stats, sums = graphs(first, keep=True)
    before = loss.clone(), stats.loss.clone(), sums.table.clone()
    graphs(second, keep=True)
    for _, captured in graphs._rows.values():
        captured.poison()
    assert all(map(torch.equal, (loss, stats.loss, sums.table), before))
    assert stats.loss.numel() == first.trained_positions.numel()


def test_statistics_of_samples_are_those_of_the_plain_run(tmp_path):
    tables = []
    for captured in (False, True):
        parts = parts_of(tmp_path, even=True)
        parts.sample_stats = SampleStats(len(parts.data.train.index), parts.world.device)
        parts.graphs = graphs_of(parts, EXACT) if captured else None
        for update in updates_of(parts, 4):
            forward_backward(parts, update)
            parts.optimizer.zero_grad()
            parts.ledger.drop_open()
        tables.append(parts.sample_stats.read().table)
    assert torch.equal(*tables)


@pytest.mark.parametrize("moved", ["a weight", "another weight", "a buffer", "loss settings", "mode"])
def test_what_a_capture_has_baked_in_may_not_change(tmp_path, moved):
    parts, said = parts_of(tmp_path), []
    parts.graphs = graphs_of(parts, tell=said.append)
    update = updates_of(parts, 1)[0]
    match moved:
        case "a weight":
            weight = parts.model.model.norm.weight
            weight.data = weight.data.clone()
        case "another weight":
            parts.model.model.norm.weight = torch.nn.Parameter(parts.model.model.norm.weight.detach().clone())
        case "a buffer":
            rotary = parts.model.model.rotary_emb
            rotary.inv_freq = rotary.inv_freq.clone()
        case "loss settings":
            parts.model.loss_settings = replace(parts.model.loss_settings, chunk_bytes=4096)
        case "mode":
            parts.model.eval()
    forward_backward(parts, update)
    assert parts.graphs.counts.replayed == 0
    assert parts.graphs.counts.fell_back == len(update.ranks[0])
    assert len(said) == 1
    assert "off from here on" in said[0]
    assert not parts.graphs._rows
    assert not parts.graphs._gradients


def test_dropped_captures_leave_the_plain_run(tmp_path):
    plain, ours = parts_of(tmp_path, even=True), parts_of(tmp_path, even=True)
    ours.graphs = graphs_of(ours, EXACT)
    updates = updates_of(plain, 6)
    left = made(ours, updates[:3])
    ours.graphs.drop("of a test")
    assert left + made(ours, updates[3:]) == made(plain, updates)


def test_memory_that_runs_out_in_a_plain_row_drops_them(tmp_path, monkeypatch):
    parts = parts_of(tmp_path)
    parts.graphs = graphs_of(parts, Shapes((Shape(T, 24),), borders=9, longest=128))
    update, loss = updates_of(parts, 1)[0], parts.model.loss

    def full(row):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried")

    monkeypatch.setattr(parts.model, "loss", full)
    with pytest.raises(OutOfMemory):
        train_step(parts, update)
    assert "memory" in parts.graphs.off
    monkeypatch.setattr(parts.model, "loss", loss)
    train_step(parts, update)  # nothing is left of the half update
    (record,) = parts.ledger.read()
    assert int(record.tasks.total.sum()) == int(parts.data.train.index.trained[update.samples].sum())


# What cannot be captured --------------------------------------------------------------------------


def before_forward(parts, call):
    parts.model.model.register_forward_pre_hook(lambda *_: [call(), None][1])


def standing(parts):
    names = [n for n, p in parts.model.named_parameters() if p.grad is not None]
    weights = state_hash({n: p.detach() for n, p in parts.model.named_parameters()}, {})
    buffers = state_hash(dict(parts.model.named_buffers()), {})
    return names, weights, buffers, torch.get_rng_state().tolist()


def test_a_failed_capture_changes_nothing(tmp_path):
    parts = parts_of(tmp_path)
    before = standing(parts)
    with pytest.raises(
        CaptureFailed, match=r"RuntimeError: operation not permitted when stream is capturing$"
    ):
        graphs_of(parts, capture=FakeCapture(fail_at=2))
    assert standing(parts) == before


def test_neither_does_one_that_works(tmp_path):
    parts = parts_of(tmp_path)
    parts.model.register_buffer("counted", torch.zeros(()))
    before_forward(parts, lambda: parts.model.counted.add_(1))
    before = standing(parts)
    graphs_of(parts)
    assert standing(parts) == before


def test_dropout_is_seen_and_the_stream_put_back(tmp_path):
    parts = parts_of(tmp_path, model__lora={"rank": 4, "dropout": 0.5})
    before = standing(parts)
    with pytest.raises(CaptureFailed, match="random numbers"):
        graphs_of(parts)
    assert standing(parts) == before


def test_a_number_read_by_the_host_is_an_error(tmp_path):
    parts = parts_of(tmp_path)
    before_forward(parts, lambda: bool(parts.model.model.norm.weight.sum() > 0))
    with pytest.raises(CaptureFailed, match="_local_scalar_dense"):
        graphs_of(parts)


def test_lengths_of_the_host_are_an_error(tmp_path):
    """The loop over segments, the CPU's own attention."""
    with pytest.raises(CaptureFailed, match="split"):
        graphs_of(parts_of(tmp_path, attention="segments"))


def test_a_loss_that_reaches_nothing_is_an_error(tmp_path):
    parts = parts_of(tmp_path)
    loss = parts.model.loss
    parts.model.loss = lambda row: [
        x.detach().requires_grad_() if i == 0 else x for i, x in enumerate(loss(row))
    ]
    with pytest.raises(CaptureFailed, match="reaches no parameter"):
        graphs_of(parts)


def test_a_gradient_that_is_another_tensor_after_the_capture_is_an_error(tmp_path):
    """What is replayed would add into the one that nobody reads."""
    parts = parts_of(tmp_path)
    weight = parts.model.lm_head.weight

    class Replaces(FakeCapture):
        def __call__(self, function):
            made = super().__call__(function)
            weight.grad = weight.grad.clone()
            return made

    with pytest.raises(CaptureFailed, match="replaces gradients"):
        graphs_of(parts, capture=Replaces())


def test_gradients_of_an_update_are_not_thrown_away(tmp_path):
    parts = parts_of(tmp_path)
    forward_backward(parts, updates_of(parts, 1)[0])
    with pytest.raises(CaptureFailed, match="are there"):
        graphs_of(parts)
    assert any(p.grad is not None for p in parts.model.parameters())


def test_a_parameter_that_the_loss_does_not_reach_has_no_gradient(tmp_path):
    """Its step count and its weight decay wait for one, as without captures."""
    parts = parts_of(tmp_path)
    parts.model.unused = torch.nn.Parameter(torch.ones(3))
    graphs = graphs_of(parts)
    graphs.begin_update()
    graphs(next(iter(parts.rows(updates_of(parts, 1)[0]))), keep=False)
    assert parts.model.unused.grad is None
    assert parts.model.lm_head.weight.grad.abs().sum() > 0


def test_a_capture_reads_nothing_but_what_stays(tmp_path):
    """On a GPU a tensor that somebody frees after the capture would be read all the same."""
    parts, capture = parts_of(tmp_path), FakeCapture()
    graphs = graphs_of(parts, capture=capture)
    gc.collect()
    stays = [*parts.model.parameters(), *parts.model.buffers(), *graphs._gradients.values()]
    stays += [t for static, _ in graphs._rows.values() for t in static.tensors()]
    stays += row_pass._local.__dict__.values()  # the logits' buffer, which a GPU's allocator stands for
    known = {t.untyped_storage().data_ptr() for t in stays}
    assert len(capture.graphs) == 2
    for graph in capture.graphs:
        strange = [t for address, t in graph.foreign.items() if address and address not in known]
        assert not strange, [tuple(t.shape) for t in strange]


def test_a_row_costs_six_operators_and_its_replay(tmp_path):
    """Two copies, and what the loss is summed by. None of them waits."""
    parts = parts_of(tmp_path)
    graphs = graphs_of(parts, capture=Nothing())
    rows, seen = list(parts.rows(updates_of(parts, 1)[0])), []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if not func.is_view:
                seen.append(func._schema.name.removeprefix("aten::"))
            return func(*args, **(kwargs or {}))

    with Seen(), SyncCounter() as syncs:
        graphs.begin_update()
        graphs(rows[0], keep=False)
    assert syncs.total == 0, syncs.found
    seen = [name for name in seen if name != "detach"]
    assert seen == ["_foreach_zero_", "copy_", "_foreach_copy_", "index_select", "mul", "sum", "clone"]


class Nothing(Again):
    """A replay that costs nothing."""

    def __call__(self, function):
        made = Nothing(function)
        made.replay = lambda: None
        return made


def test_the_largest_shape_is_captured_first(tmp_path):
    parts, seen = parts_of(tmp_path), []

    class Watched(FakeCapture):
        def __call__(self, function):
            seen.append(function.__closure__[-1].cell_contents.shape)
            return super().__call__(function)

    graphs_of(parts, capture=Watched())
    assert seen == [Shape(T, 48), Shape(T, 24)]
