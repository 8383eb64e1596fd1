"""An update that raised on the way, and the next one: FSDP2 stands as if it had never begun, or the run is
told it cannot."""

from types import SimpleNamespace

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from repsft_fast import distributed
from repsft_fast.config import Config
from repsft_fast.distributed import reset, shard
from repsft_fast.models import load_model
from repsft_fast.training import build as building
from repsft_fast.training import spikes, step
from repsft_fast.training.build import build
from repsft_fast.training.snapshots import closed_list
from tests.helpers import ranks, runs, tiny

MODEL = {**runs.MODEL, "tie_word_embeddings": False}
SETTINGS = {
    "model__config": MODEL,
    "model__compute_dtype": "bfloat16",
    "batch__samples": 8,
    "batch__row_tokens": 32,
}
ANYWHERE = ("row", "forward", "layer forward", "backward", "layer backward", "between two products")
# of four; the last row is where gradients meet FSDP2
PLACES = [(place, row) for place in ANYWHERE for row in (1, 3)]
PLACES += [("gather", 1), ("between two products", 4), ("reduce", 4), ("norm", 4)]


@pytest.fixture(autouse=True)
def one_rank_under_fsdp(monkeypatch):
    monkeypatch.setattr(building, "ONE_RANK_FSDP", True)
    yield
    ranks.leave_group()


def made(folder, **changes):
    parts = build(Config.of(runs.settings(folder, **{**SETTINGS, **changes})))
    assert isinstance(parts.model, FSDPModule) == building.ONE_RANK_FSDP
    return parts, next(update for update in parts.plan.epoch(0, 0) if len(update.ranks[0]) == 4)


def gradients(parts):
    return {name: distributed.full_tensor(p.grad).clone() for name, p in parts.optimizer.names.items()}


def made_again(parts, update, monkeypatch):
    """(gradients, weights and moments after it) of the update, in whatever state the model is."""
    found = []
    with monkeypatch.context() as patch:
        norm = spikes.grad_norm
        patch.setattr(
            spikes, "grad_norm", lambda parameters: (found.append(gradients(parts)), norm(parameters))[1]
        )
        step.train_step(parts, update)
    return found[0], {name: t.clone() for name, t in closed_list(parts).tensors().items()}


def full(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has …")


def gathered_bytes(model):
    groups = [m._get_fsdp_state()._fsdp_param_group for m in model.modules() if isinstance(m, FSDPModule)]
    parameters = [p for group in groups for p in group.fsdp_params]
    return sum(t.untyped_storage().size() for p in parameters for t in p.all_gather_outputs)


def memory_runs_out(place, row, parts, update, monkeypatch):
    """Once, in the `row`-th row of the update (from 1). What is raised is step.OutOfMemory."""
    layer, rows, loss, seen = parts.model.model.layers[0], parts.rows, parts.model.loss, []

    def hook(module, arguments, output):
        hidden = output[0] if isinstance(output, tuple) else output
        if len(seen) == row and place == "layer forward":
            full()
        if len(seen) == row and place == "layer backward":
            hidden.register_hook(full)

    # the MLP's weights have their gradients of this row, the attention's have not
    def inside(module, arguments, output):
        if len(seen) == row and place == "between two products":
            arguments[0].register_hook(full)

    def failing(given):
        seen.append(given)
        if len(seen) == row and place == "forward":
            full()
        # of the second parameter of a layer, when the first is there
        if len(seen) == row and place == "gather":
            parameters = layer._get_fsdp_state()._fsdp_param_group.fsdp_params
            patch.setattr(parameters[1], "init_all_gather_outputs", full)
        value, stats = loss(given)
        if len(seen) == row and place == "backward":
            value.register_hook(full)
        if len(seen) == row and place == "reduce":
            patch.setattr("torch.distributed.fsdp._fully_shard._fsdp_param_group.foreach_reduce", full)
        return value, stats

    def failing_rows(update):
        for number, given in enumerate(rows(update), 1):
            if place == "row" and number == row:
                full()
            yield given

    with monkeypatch.context() as patch:
        hooks = [layer.register_forward_hook(hook), layer.mlp.register_forward_hook(inside)]
        patch.setattr(parts.model, "loss", failing)
        patch.setattr(parts, "rows", failing_rows)
        if place == "norm":
            patch.setattr(spikes, "grad_norm", full)
        try:
            with pytest.raises(step.OutOfMemory) as raised:
                step.train_step(parts, update)
        finally:
            [handle.remove() for handle in hooks]
    return raised.value


@pytest.mark.parametrize(("place", "row"), [(place, 3) for place in ANYWHERE] + [("norm", 4)])
def test_the_same_update_again_with_masters(place, row, tmp_path, monkeypatch):
    monkeypatch.setattr(building, "ONE_RANK_FSDP", False)
    test_the_same_update_again_is_as_if_undisturbed(place, row, tmp_path, monkeypatch)


@pytest.mark.parametrize(("place", "row"), PLACES)
def test_the_same_update_again_is_as_if_undisturbed(place, row, tmp_path, monkeypatch):
    """Bit for bit: gradients, weights, moments, counts. Twice over, since the second time finds what the
    first has left."""
    parts, update = made(tmp_path)
    expected = made_again(parts, update, monkeypatch)
    ranks.leave_group()
    parts, update = made(tmp_path)
    before = closed_list(parts).hash()
    for _ in range(2):
        problem = memory_runs_out(place, row, parts, update, monkeypatch)
        assert not problem.torn
        assert closed_list(parts).hash() == before
        assert all(p.grad is None for p in parts.optimizer.names.values())
        assert gathered_bytes(parts.model) == 0
        with torch.no_grad():
            assert parts.model.loss(next(iter(parts.rows(update))))[0] > 0.0
    row_alone = next(iter(parts.rows(update)))
    parts.model.loss(row_alone)[0].backward()  # nobody says that a row is not the last
    assert all(p.grad is not None for p in parts.optimizer.names.values())
    parts.optimizer.zero_grad()
    found = made_again(parts, update, monkeypatch)
    for ours, undisturbed in zip(found, expected, strict=True):
        assert ours.keys() == undisturbed.keys()
        assert all(torch.equal(ours[name], undisturbed[name]) for name in undisturbed)


def test_the_optimizer_too_leaves_fsdp_whole(tmp_path, monkeypatch):
    parts, update = made(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(parts.optimizer, "step", full)
        with pytest.raises(step.OutOfMemory) as raised:
            step.train_step(parts, update)
    assert (raised.value.torn, raised.value.stuck) == (True, False)
    step.train_step(parts, update)
    assert parts.ledger.read()[0].grad_norm > 0.0


def without_a_way(patch, by_hand=()):
    """As a torch whose FSDP2 has no method for it."""
    patch.delattr(FSDPModule, "reset_iter_state", raising=False)
    patch.setattr(reset, "BY_HAND", by_hand)


class TestStuck:
    """A torch that offers no way back, or whose insides are not the ones that are known."""

    def test_is_torn_and_not_retried(self, tmp_path, monkeypatch):
        parts, update = made(tmp_path)
        without_a_way(monkeypatch)
        problem = memory_runs_out("backward", 2, parts, update, monkeypatch)
        assert (problem.torn, problem.stuck) == (True, True)

    def test_is_not_trusted_where_it_looks_whole(self, tmp_path, monkeypatch):
        parts, update = made(tmp_path)
        step.forward_backward(parts, update)
        assert reset.reset(parts.model)
        without_a_way(monkeypatch)
        assert not reset.reset(parts.model)

    def test_a_name_that_is_missing(self, tmp_path, monkeypatch):
        parts, update = made(tmp_path)
        without_a_way(monkeypatch, by_hand=(torch.__version__,))
        assert not memory_runs_out("backward", 2, parts, update, monkeypatch).torn
        group = parts.model.model.layers[1]._get_fsdp_state()._fsdp_param_group
        del group._reshard_after_forward_event
        assert not reset.reset(parts.model)

    def test_a_reset_that_does_nothing_is_noticed(self, tmp_path, monkeypatch):
        parts, update = made(tmp_path)
        without_a_way(monkeypatch, by_hand=(torch.__version__,))
        monkeypatch.setattr(reset, "_by_hand", lambda root, states: None)
        assert memory_runs_out("backward", 2, parts, update, monkeypatch).stuck

    def test_the_run_ends_with_the_reason_and_saves_nothing(self, tmp_path, monkeypatch):
        from repsft_fast import train
        from repsft_fast.errors import TrainingError
        from repsft_fast.training import trainer

        without_a_way(monkeypatch)
        plain, calls = trainer.train_step, []

        def second_fails(parts, update):
            calls.append(update)
            if len(calls) == 2:
                raise memory_runs_out("backward", 1, parts, update, monkeypatch)
            plain(parts, update)

        monkeypatch.setattr(trainer, "train_step", second_fails)
        settings = runs.settings(
            tmp_path, **SETTINGS, numbers__on_out_of_memory="retry", checkpoint__every_updates=100
        )
        pattern = (
            rf"update 2: out of memory .*no weight was changed, but FSDP2 of torch {torch.__version__[:4]}.*"
            r" lower batch"
        )
        with pytest.raises(TrainingError, match=pattern):
            train(settings)
        assert len(calls) == 2
        assert not list((tmp_path / "run").glob("checkpoints/gen-*"))


def test_nothing_has_to_be_put_back_before_the_first_pass():
    model = load_model(tiny.config("llama"), compute_dtype="bfloat16")
    assert reset.reset(model)
    assert shard(model, distributed.World(0, 1, 0, torch.device("cpu")))
    assert reset.reset(model)


def test_the_device_is_waited_for_before_anything_is_freed(tmp_path, monkeypatch):
    parts, _ = made(tmp_path)
    order = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: order.append(f"wait for {device}"))
    monkeypatch.setattr(reset, "_drop_gathered", lambda group: order.append("free"))
    monkeypatch.setattr(
        parts.model, "parameters", lambda: iter([SimpleNamespace(device=torch.device("cuda", 3))])
    )
    assert reset.reset(parts.model)
    assert order == ["wait for cuda:3", "free", "free", "free"]


ROWS = (9, 4, 17, 6)


def given_up(world):
    """Gradients of an update of two rows between copies, and again after one that was given up after its
    first row."""
    torch.manual_seed(1)
    model = load_model(tiny.config("llama"))
    shard(model, world, mesh=distributed.mesh_of(world, 1))
    mine = [tiny.row([document], denominator=4) for document in tiny.documents(ROWS)][2 * world.rank :][:2]
    found = []
    for broken in (False, True):
        if broken:
            distributed.begin_row(model, last=False)
            model.loss(mine[0])[0].backward()
            assert all(p.grad is None for p in model.parameters()), (
                "gradients of the first row do not wait for the last"
            )
            model.loss(mine[1])
            model.zero_grad()
            assert distributed.abort_pass(model)
        for number, row in enumerate(mine):
            distributed.begin_row(model, last=number == 1)
            model.loss(row)[0].backward()
        found.append([p.grad.full_tensor().tolist() for p in model.parameters()])
        model.zero_grad()
    return found


def test_an_update_given_up_leaves_no_gradient_waiting():
    first, second = ranks.run_ranks(given_up)
    assert first[0] == first[1] == second[0] == second[1]
