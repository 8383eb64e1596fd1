"""A compiled layer's kernels are counted from the compiler's own programs, with no GPU at hand."""

import dataclasses
import json

import pytest
import torch

from benchmarks.harness import commands, lowering

# What the versions of a GPU machine and today's make of a layer, forward and backward. Fewer is better news and
# a new figure here, in benchmarks/baseline.json and in csrc_triton/README.md.
MOST = {"Qwen3-0.6B": 34, "SmolLM2-135M": 33}
SMALL = lowering.LAYERS["SmolLM2-135M"] | {
    "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96,
}  # fmt: skip


# What SmolLM2's graph is made for first: one for rows of every length is the one for rows of TOKENS.
LENGTHS = {"Qwen3-0.6B": [lowering.TOKENS], "SmolLM2-135M": [32768, 2048, 64]}


@pytest.fixture(scope="module")
def both():
    """The bytes are those of the first length."""
    qwen = lowering.compiled(lowering.LAYERS["Qwen3-0.6B"])
    found = lowering.lowered(lowering.LAYERS["SmolLM2-135M"], LENGTHS["SmolLM2-135M"])
    assert [is_backward for is_backward, _ in found] == [False, True], "a graph serves rows of every length"
    return {"Qwen3-0.6B": qwen, "SmolLM2-135M": tuple(program for _, program in found)}


@pytest.fixture(scope="module")
def alone():
    """Qwen3's in a deterministic run, by a row's length: one graph for each side of the border at which the
    compiler sums otherwise."""
    found = lowering.lowered(lowering.LAYERS["Qwen3-0.6B"], [8192, 6000, 512, 384], deterministic=True)
    assert [is_backward for is_backward, _ in found] == [False, True] * 2, (
        "two graphs serve rows of every length"
    )
    programs = [program for _, program in found]
    return {8192: programs[:2], 512: programs[2:]}


@pytest.mark.parametrize("name", lowering.LAYERS)
def test_a_layer_of_the_promise(both, name):
    forward, backward = both[name]
    assert (forward.products, forward.attention) == (7, 1)
    assert (backward.products, backward.attention) == (14, 1)
    assert forward.kernels == 13, (
        "norms, rotary embeddings together, gate, residual: a kernel each, and no copy"
    )
    assert forward.kernels + backward.kernels <= MOST[name]


@pytest.mark.parametrize("tokens", [8192, 512])
def test_shared_launches_move_no_more_bytes(both, alone, tokens):
    """Beside the compiler's own choice, which a deterministic run takes. The sums that it leaves to torch are
    not in its bytes."""
    config = lowering.LAYERS["Qwen3-0.6B"]
    together = both["Qwen3-0.6B"] if tokens == 8192 else lowering.compiled(config, tokens)
    assert sum(x.kernels for x in together) == 34
    assert sum(x.kernels for x in alone[tokens]) in ((44, 45) if tokens == 8192 else (41,))
    assert sum(x.bytes for x in together) < 1.016 * sum(x.bytes for x in alone[tokens])


def test_the_committed_counts_hold(both):
    known = json.loads(commands.BASELINE.read_text())["counted"]
    version = ".".join(torch.__version__.split(".")[:2])
    if version not in known:
        pytest.skip(f"the gate knows no torch {version}")
    for name, (forward, backward) in both.items():
        wanted = {"kernels": forward.kernels + backward.kernels, "kernels_forward": forward.kernels}
        assert known[version][f"compiled layer, {name}"] == wanted


@pytest.mark.parametrize("name", lowering.LAYERS)
def test_plain_layers_launch_four_times_as_many_and_move_twice_the_bytes(both, name):
    plain = lowering.plain(lowering.LAYERS[name], LENGTHS[name][0])
    assert plain[0].products == 7
    assert plain[1].products == 14
    assert sum(x.kernels for x in plain) > 3 * sum(x.kernels for x in both[name])
    assert sum(x.bytes for x in plain) > 1.8 * sum(x.bytes for x in both[name])


def test_bytes_of_plain_operators_are_their_tensors():
    watched = lowering._Dispatched()
    with watched:
        torch.ones(3, 4).add(torch.ones(4))
    assert watched.forward.by_name == {"ones": 2, "add": 1}
    assert watched.forward.bytes == 4 * (12 + 4 + (12 + 4 + 12))


def test_what_a_program_launches():
    program = """
def call(args):
    buf0 = empty_strided_cuda((2, 2), (2, 1), torch.bfloat16)
    extern_kernels.mm(a, b, out=buf0)
    triton_poi_fused_add_0.run(buf0, 4, stream=stream0)
    buf1 = torch.ops.torch_attn._varlen_attn.default(q, k)
    assert_size_stride(buf1[0], (2, 2), 'torch.ops.torch_attn._varlen_attn.default')
    buf2 = workspace_0[0 : 4].view(2, 2).sum(dim=0).to(torch.bfloat16)
    buf3 = torch.ops.aten.sort.stable(buf0)
    return (buf0, )
"""
    found = lowering._read(f"triton_poi_fused_add_0.run = None\ndef call(x): pass\n{program}")
    assert dataclasses.astuple(found)[:4] == (1, 1, 1, 3)
    assert found.kernels == 6


def test_a_graph_that_breaks_is_no_layer(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    with pytest.raises(RuntimeError, match="expected one graph forward and one backward"):
        lowering.compiled(SMALL, tokens=256)


def test_for_the_gate(both, monkeypatch):
    monkeypatch.setattr(lowering, "compiled", {"a": both["SmolLM2-135M"]}.__getitem__)
    forward, backward = both["SmolLM2-135M"]
    wanted = {"kernels": forward.kernels + backward.kernels, "kernels_forward": forward.kernels}
    assert lowering.counted({"small": "a"}) == {"compiled layer, small": wanted}
