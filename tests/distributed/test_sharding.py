"""Sharded models against plain ones. Two gloo processes where it takes two."""

import os

import pytest
import torch
from torch.distributed.tensor import DTensor

from repsft_fast import distributed
from repsft_fast.distributed import World, full_state, shard
from repsft_fast.errors import ConfigError, ModelError
from repsft_fast.models import check_head, check_no_leak, load_model
from tests.helpers import peak, ranks, tiny

ALONE = World(0, 1, 0, torch.device("cpu"))
LENGTHS = (9, 4, 17, 6)


def build(architecture="llama", **options):
    torch.manual_seed(1)
    model = load_model(tiny.config(architecture), **options)
    # bf16 weights are not drawn as fp32 ones are: the same numbers for both, adapters' B too
    if "lora" in options:
        draw = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 2:
                    parameter.copy_(
                        (0.02 if "lora_B" in name else 0.2) * torch.randn(parameter.shape, generator=draw)
                    )
    return model


def rows():
    return [tiny.row([document], denominator=4) for document in tiny.documents(LENGTHS)]


def train(model, mine, steps=2, lr=0.5):
    """SGD with clipping; the norms before clipping."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=lr)
    norms = []
    for _ in range(steps):
        optimizer.zero_grad()
        for row in mine:
            model.loss(row)[0].backward()
        norm = distributed.grad_norm(parameters)
        torch._foreach_mul_(
            [distributed.local(p.grad) for p in parameters], (0.5 / (norm + 1e-6)).clamp(max=1.0).float()
        )
        norms.append(norm.item())
        optimizer.step()
    return norms


class TestAlone:
    def test_equal_types_are_left_as_they_are(self):
        assert not shard(build(), ALONE)

    def test_the_norm_is_torchs(self):
        model = build()
        for row in rows():
            model.loss(row)[0].backward()
        expected = torch.nn.utils.get_total_norm([p.grad.double() for p in model.parameters()])
        torch.testing.assert_close(distributed.grad_norm(model.parameters()), expected, rtol=1e-6, atol=0)

    def test_a_norm_that_is_not_finite_is_reported(self):
        model = build()
        model.loss(rows()[0])[0].backward()
        model.lm_head.weight.grad[0, 0] = float("inf")
        assert not distributed.grad_norm(model.parameters()).isfinite()
        assert distributed.grad_norm([]).item() == 0.0
        assert distributed.grad_norm(build().parameters()).item() == 0.0

    def test_layers_that_cannot_be_told(self):
        model = build()
        model.config.num_hidden_layers = 5
        with pytest.raises(ModelError, match="no list of its 5 decoder layers"):
            distributed.decoder_layers(model)


def numbers(tensor):
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def train_sharded(world, name, options):
    model = build(name, **options)
    assert shard(model, world)
    check_no_leak(model)
    norms = train(model, rows()[world.rank :: world.size])
    with torch.no_grad():
        losses = [model.loss(row)[0].item() for row in rows()]
    assert all(isinstance(p, DTensor) for p in model.parameters())
    return norms, losses, {n: numbers(t) for n, t in full_state(model, world).items()}


def gradient_in_bf16(world):
    model = build(compute_dtype="bfloat16")
    shard(model, world)
    model.loss(rows()[world.rank])[0].backward()
    return model.model.norm.weight.grad.full_tensor().numpy()


def loss_of_thirds(world):
    """Of a row whose weights no bf16 number holds."""
    model = build(compute_dtype="bfloat16")
    shard(model, world)
    loss, stats = model.loss(tiny.row(tiny.documents((9,)), denominator=3.0))
    return loss.item(), stats.loss.double().sum().item() / 27


def forget(world, sharded=True):
    """Evaluate, write the parameters in place, evaluate: the second sees what was written. Also plain forward
    calls."""
    model = build("llama")
    if sharded:
        shard(model, world)
    row, ids = rows()[0], torch.tensor([[5, 6, 7]])
    seen = []
    for _ in range(2):
        with torch.no_grad():
            seen.append((model.loss(row)[0].item(), model(input_ids=ids).logits.abs().sum().item()))
            for parameter in model.parameters():
                distributed.local(parameter).mul_(0.5)
    return seen


def revert_inside(world):
    """A forward pass with gradients whose backward never comes, then a write: `reshard` makes it seen."""
    model = build("llama")
    shard(model, world)
    parts = [distributed.local(parameter) for parameter in model.parameters()]
    model.loss(rows()[0])
    with torch.no_grad():
        for part in parts:
            part.zero_()
    distributed.reshard(model)
    with torch.no_grad():
        return model.loss(rows()[0])[1].loss.tolist()


class TestSharded:
    @pytest.mark.parametrize("size", [1, 2])
    @pytest.mark.parametrize("name", ["llama", "llama-tied"])
    def test_training_equals_the_plain_model(self, name, size):
        """Norms, losses and weights after clipped SGD steps: sums over ranks, not means."""
        plain = build(name)
        norms = train(plain, rows())
        with torch.no_grad():
            losses = [plain.loss(row)[0].item() for row in rows()]
        # compute_dtype float64 makes one rank shard too; every rank then computes wider than the plain model
        options = {"compute_dtype": torch.float64} if size == 1 else {}
        answers = ranks.run_ranks(train_sharded, name, options, size=size)
        for got_norms, got_losses, _ in answers:
            torch.testing.assert_close(got_norms, norms, rtol=1e-5, atol=0)
            torch.testing.assert_close(got_losses, losses, rtol=1e-5, atol=0)
        state = answers[0][2]
        assert state.keys() == plain.state_dict().keys()
        for key, value in plain.state_dict().items():
            assert (torch.from_numpy(state[key]) - value).norm() < 1e-6 * value.norm(), key
        assert all(answer[2] == {} for answer in answers[1:])

    def test_bf16_compute_keeps_fp32_weights_and_gradients(self):
        plain = build()
        norms = train(plain, rows())
        ((got_norms, _, state),) = ranks.run_ranks(
            train_sharded, "llama", {"compute_dtype": "bfloat16"}, size=1
        )
        assert got_norms != norms, "nothing was computed in bf16"
        # bf16 keeps 8 bits: a percent of a norm
        torch.testing.assert_close(got_norms, norms, rtol=0.02, atol=0)
        start = build().state_dict()
        for key, value in plain.state_dict().items():
            got = torch.from_numpy(state[key])
            assert got.dtype == torch.float32
            moved = value - start[key]
            assert (got - start[key] - moved).norm() < 0.1 * moved.norm(), key

    def test_the_weights_of_a_row_are_not_rounded_to_what_is_computed_in(self):
        """FSDP2 casts what its modules are given: the denominator of an update is nothing to cast."""
        for size in (1, 2):
            for loss, expected in ranks.run_ranks(loss_of_thirds, size=size):
                assert loss == pytest.approx(expected, rel=1e-5)

    def test_gradients_computed_in_bf16_are_added_in_fp32(self):
        for gradient in map(torch.from_numpy, ranks.run_ranks(gradient_in_bf16)):
            assert gradient.dtype == torch.float32
            assert (gradient != gradient.bfloat16().float()).any(), "every sum is a bf16 number"

    @pytest.mark.parametrize("compute", ["float32", "bfloat16"])
    def test_lora(self, compute):
        options = {"lora": {"rank": 4}, "compute_dtype": compute}
        plain = build(**{**options, "compute_dtype": "float32"})
        norms = train(plain, rows())
        answers = ranks.run_ranks(train_sharded, "llama", options)
        torch.testing.assert_close(answers[0][0], norms, rtol=1e-5 if compute == "float32" else 0.02, atol=0)
        state = answers[0][2]
        for key, value in build(**options).state_dict().items():
            assert torch.equal(torch.from_numpy(state[key]), torch.from_numpy(numbers(value))) == (
                "lora_" not in key
            ), key

    def test_evaluation_sees_what_was_written_since_the_last(self):
        expected = torch.tensor(forget(ALONE, sharded=False))
        assert not torch.allclose(expected[0], expected[1], rtol=1e-2)
        for seen in ranks.run_ranks(forget):
            torch.testing.assert_close(torch.tensor(seen), expected, rtol=1e-5, atol=0)

    def test_reshard_drops_gathered_parameters(self):
        expected = torch.full((LENGTHS[0],), float(tiny.VOCABULARY)).log()
        for losses in ranks.run_ranks(revert_inside):
            torch.testing.assert_close(torch.tensor(losses), expected, rtol=1e-6, atol=0)


ARRIVALS = {
    "llama": {},
    "llama-tied": {"param_dtype": "bfloat16"},
    "olmo3": {},
    "qwen2": {"lora": {"rank": 4}, "compute_dtype": "bfloat16"},
    "qwen3": {"random_weights": True},
}


def arrived(world, folder, shard_ranks, cases):
    """For every case the weights, buffers and a loss of the model that rank 0 alone has read, and of one that
    all have."""
    found = []
    for name, options in cases.items():
        sides = []
        for weights_on in ("cpu" if world.is_main else "meta", None):
            torch.manual_seed(1)  # of the adapters
            model = load_model(folder / name, weights_on=weights_on, **options)
            # as some models keep, no buffer
            model.model.rotary_emb.table = torch.arange(3.0, device=weights_on or "cpu")
            shard(model, world, mesh=distributed.mesh_of(world, shard_ranks), arriving=weights_on is not None)
            check_head(model, model.loss_settings.head)
            with torch.no_grad():
                loss = model.loss(rows()[0])[0].item()
            buffers = {key: value.tolist() for key, value in model.named_buffers()}
            stream = torch.get_rng_state().tolist()
            buffers["table"] = model.model.rotary_emb.table.tolist()
            state = {
                key: numbers(distributed.full_tensor(value).detach())
                for key, value in model.named_parameters()
            }
            sides.append((loss, buffers, stream, model.generation_config.to_dict(), state))
        found.append(sides)
    return found


def held_while_loading(world, options):
    def load():
        model = load_model(tiny.config("llama", **options), weights_on="cpu" if world.is_main else "meta")
        shard(model, world, arriving=True)
        return model

    load()  # what is made once
    return peak.peak_bytes(load)


def differ(world):
    model = load_model(
        tiny.config("llama" if world.is_main else "qwen3"), weights_on="cpu" if world.is_main else "meta"
    )
    with pytest.raises(ConfigError, match="model: ranks 1 differ from rank 0"):
        shard(model, world, arriving=True)
    return True


class TestArriving:
    @pytest.mark.parametrize(("size", "shard_ranks"), [(2, None), (4, 2)])
    def test_what_rank_0_has_read_is_what_all_would_have(self, size, shard_ranks, tmp_path):
        for name in ARRIVALS:
            model = build(name)
            model.generation_config.repetition_penalty = 1.5
            model.save_pretrained(tmp_path / name)
        cases = ARRIVALS if shard_ranks is None else {"llama-tied": {}}
        for found in ranks.run_ranks(arrived, tmp_path, shard_ranks, cases, size=size):
            for name, (sent, read) in zip(cases, found):
                assert sent[:4] == read[:4], name
                assert sent[4].keys() == read[4].keys()
                for key in read[4]:
                    assert (sent[4][key] == read[4][key]).all(), (name, key)

    def test_a_rank_never_holds_more_than_its_shards_and_a_group(self):
        wide = {"num_hidden_layers": 12, "hidden_size": 64, "intermediate_size": 128}
        sizes = load_model(tiny.config("llama", **wide), device="meta")
        whole = 4 * sum(p.numel() for p in sizes.parameters())
        layer = 4 * sum(p.numel() for p in sizes.model.layers[0].parameters())
        root = whole - 12 * layer
        _, peak_of_rank_1 = ranks.run_ranks(held_while_loading, wide)
        assert whole / 2 < peak_of_rank_1 < whole / 2 + 2 * max(layer, root)
        assert whole / 2 + 2 * max(layer, root) < 0.8 * whole

    def test_models_that_differ_are_refused(self):
        assert ranks.run_ranks(differ) == [True, True]


def die(world):
    if world.rank == 1:
        os._exit(1)


def test_a_dead_rank_is_noticed_by_the_harness():
    with pytest.raises(AssertionError, match="rank 1:\nthe process ended without an answer"):
        ranks.run_ranks(die)
