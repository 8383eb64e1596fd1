"""How many kernels a compiled decoder layer launches on an H100, counted without one.

torch's compiler is asked for a layer, forward and backward, as `models.compiled` asks it, a row's length left
open. The graphs it makes are lowered for `cuda` with an H100's properties in the place of a card's, and what
would be launched is read from the programs that come out: generated kernels, products, attention, and what
the programs call beside them. Nothing is launched and no kernel is compiled, so a torch without CUDA counts
too. Tensors are fakes: they are traced as a CPU's and become a GPU's before they are lowered, for C++ asks a
device for streams where gradients are made.

Not counted: what a product or the attention launches inside (one each), and copies between devices. What the
compiler decides by timing on a card, it decides here by its own rules.

    python -m benchmarks.harness.lowering      the table of csrc_triton/README.md
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._dynamo import device_interface
from torch._inductor import compile_fx as inductor
from torch._inductor import config as settings
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from repsft_fast.models.compiler_options import TOGETHER, known

GPU = torch.device("cuda", 0)
H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, total_memory=80 << 30, multi_processor_count=132,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, regs_per_multiprocessor=65536,
    warp_size=32, L2_cache_size=50 << 20, shared_memory_per_block=49152, shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472, gcnArchName="",
)  # fmt: skip
TOKENS, DOCUMENTS = 8192, 4
# One layer of each, as its config.json has it.
LAYERS: Mapping[str, dict[str, Any]] = {
    "Qwen3-0.6B": {
        "model_type": "qwen3", "hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 8,
        "head_dim": 128, "intermediate_size": 3072, "rms_norm_eps": 1e-6,
    },
    "SmolLM2-135M": {
        "model_type": "llama", "hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3,
        "intermediate_size": 1536, "rms_norm_eps": 1e-5,
    },
}  # fmt: skip


@dataclass
class Launched:
    """What one pass of a layer launches. `bytes`: of every launch's tensors, read and written, each counted
    once a launch."""

    generated: int = 0  # Triton kernels that the compiler wrote; of plain layers, elementwise and reductions
    products: int = 0
    attention: int = 0
    others: int = 0  # sums and casts that the compiler leaves to torch
    bytes: int = 0
    by_name: Counter[str] = field(default_factory=Counter)

    @property
    def kernels(self) -> int:
        return self.generated + self.products + self.attention + self.others


def counted(models: Mapping[str, dict[str, Any]] = LAYERS) -> dict[str, dict[str, int]]:
    """For the gate: by layer, kernels of both passes and the compiler's graphs."""
    found = {}
    for name, config in models.items():
        forward, backward = compiled(config)
        found[f"compiled layer, {name}"] = {
            "kernels": forward.kernels + backward.kernels, "kernels_forward": forward.kernels
        }  # fmt: skip
    return found


def compiled(
    config: Mapping[str, Any], tokens: int = TOKENS, *, deterministic: bool = False
) -> tuple[Launched, Launched]:
    """(forward, backward) of one layer in bf16, compiled with the options of such a run."""
    programs = lowered(config, [tokens], deterministic=deterministic)
    kinds = [is_backward for is_backward, _ in programs]
    if kinds != [False, True]:
        raise RuntimeError(f"lowering: expected one graph forward and one backward, got {kinds}")
    return programs[0][1], programs[1][1]


def lowered(
    config: Mapping[str, Any], lengths: Sequence[int], *, deterministic: bool = False
) -> list[tuple[bool, Launched]]:
    """(is backward, what it launches) of every graph that the compiler makes for rows of these lengths, one
    after another: two where one graph serves them all."""
    programs: list[tuple[bool, Launched]] = []
    options: dict[str, Any] = {} if deterministic else known(TOGETHER) or {}

    def backend(graph: Any, inputs: Any) -> Any:
        return inductor.compile_fx(graph, inputs, inner_compile=_lowering_into(programs))

    torch._dynamo.reset()
    # one thread: a pool of processes would be waited for at the end
    with settings.patch({"compile_threads": 1, "fx_graph_cache": False, **options}):
        _pass(
            config,
            lengths,
            lambda function: torch.compile(function, backend=backend, dynamic=False, fullgraph=True),
        )
    torch._dynamo.reset()
    return programs


def plain(config: Mapping[str, Any], tokens: int = TOKENS) -> tuple[Launched, Launched]:
    """(forward, backward) of the same layer as it dispatches."""
    watched = _Dispatched()
    _pass(config, [tokens], lambda function: function, between=watched)
    return watched.forward, watched.backward


def _pass(
    config: Mapping[str, Any],
    lengths: Sequence[int],
    through: Callable[[Any], Any],
    between: _Dispatched | None = None,
) -> None:
    """A forward and a backward pass of each length through a layer whose tensors are fakes."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from repsft_fast.models.compiled import opened
    from repsft_fast.ops.attention import NAME, Packed, no_mask, register

    register()
    most = max(lengths)
    made = AutoConfig.for_model(**config, num_hidden_layers=1, vocab_size=128, max_position_embeddings=most)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16, attn_implementation=NAME)
        layer = model.model.layers[0].train()
        function = through(type(layer).forward)
        width = getattr(made, "head_dim", None) or made.hidden_size // made.num_attention_heads
        for tokens in lengths:
            hidden = torch.empty(1, tokens, made.hidden_size, dtype=torch.bfloat16, requires_grad=True)
            angles = tuple(torch.empty(1, tokens, width, dtype=torch.bfloat16) for _ in range(2))
            longest = tokens // DOCUMENTS
            borders = torch.empty(DOCUMENTS + 2, dtype=torch.int32)
            packed = Packed(borders, (longest,) * DOCUMENTS, longest, "varlen")
            given = {
                "attention_mask": no_mask(torch.device("cpu")), "past_key_values": None, "use_cache": False,
                "position_ids": torch.empty(1, tokens, dtype=torch.int64), "packed": packed,
                "position_embeddings": angles,
            }  # fmt: skip
            if between is None:
                given = opened(hidden, (), given)
            with between or contextlib.nullcontext():
                output = function(layer, hidden, **given)
                output = output[0] if isinstance(output, tuple) else output
                up = torch.empty_like(output)
                if between is not None:
                    between.turn()
                output.backward(up)


# Plain layers ---------------------------------------------------------------------------------------------


class _Dispatched(TorchDispatchMode):
    """Counts operators that do work: a kernel each, products and attention apart."""

    def __init__(self) -> None:
        super().__init__()
        self.forward, self.backward = Launched(), Launched()
        self._now = self.forward

    def turn(self) -> None:
        """What comes now is the backward pass."""
        self._now = self.backward

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[-1]
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not views and name not in _NO_KERNEL:
            now = self._now
            now.by_name[name] += 1
            now.bytes += _bytes([args, kwargs, found])
            if name in ("mm", "addmm", "bmm"):
                now.products += 1
            elif "varlen" in name:
                now.attention += 1
            else:
                now.generated += _KERNELS.get(name, 1)
        return found


_KERNELS = {"slice_backward": 2}  # a fill and a copy
_NO_KERNEL = ("device", "empty", "empty_like", "detach", "_unsafe_view", "empty_strided", "new_empty")


def _bytes(values: Any) -> int:
    tensors = {id(t): t for t in pytree.tree_leaves(values) if isinstance(t, Tensor)}
    return sum(t.numel() * t.element_size() for t in tensors.values())


# Compiled layers ------------------------------------------------------------------------------------------


class _Written(Exception):
    """A graph is lowered and its program read; nothing is to be made of it."""


def _lowering_into(programs: list[tuple[bool, Launched]]) -> Callable[..., Any]:
    """torch's inner compiler: the program of a graph is counted, and the graph itself is what runs."""

    def compile_inner(graph: Any, inputs: Any, **options: Any) -> Any:
        runs = copy.deepcopy(graph)

        def read(lowered: GraphLowering) -> Any:
            program = lowered.codegen()[0]
            launched = _read(program if isinstance(program, str) else program.value)
            launched.bytes = int(lowered.count_bytes()[0]) + _bytes_of_attention(on_gpu)
            programs.append((bool(options.get("is_backward")), launched))
            raise _Written

        with _h100(), mock.patch.object(GraphLowering, "compile_to_module", read):
            on_gpu, there = _moved(graph, inputs)
            try:
                inductor.compile_fx_inner(on_gpu, there, **options)
            except Exception as error:
                if not _is_written(error):
                    raise

        def call(arguments: list[Any]) -> Any:
            return runs(*arguments)

        call._boxed_call = True  # type: ignore[attr-defined]
        return call

    return compile_inner


def _is_written(error: BaseException | None) -> bool:
    while error is not None and not isinstance(error, _Written):
        error = error.__cause__ or error.__context__
    return error is not None


def _moved(graph: Any, inputs: Any) -> tuple[Any, list[Any]]:
    """The graph with tensors on the GPU, and such inputs."""
    graph = copy.deepcopy(graph)
    mode = next(x.fake_mode for x in inputs if isinstance(x, FakeTensor))
    for node in graph.graph.nodes:
        if node.kwargs.get("device") is not None:
            node.kwargs = {**node.kwargs, "device": GPU}
        node.meta = {key: value for key, value in node.meta.items() if key not in ("val", "tensor_meta")}
    with mode:
        there = [
            torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=GPU)
            if isinstance(x, Tensor)
            else x
            for x in inputs
        ]
    FakeTensorProp(graph, mode=mode).propagate_dont_convert_inputs(*there)
    return graph, there


def _bytes_of_attention(graph: Any) -> int:
    """The compiler counts none for an operator that it knows nothing of."""
    nodes = [n for n in graph.graph.nodes if "varlen" in str(n.target)]
    found = sum(_bytes([n.meta.get("val"), [a.meta.get("val") for a in n.all_input_nodes]]) for n in nodes)
    # A row's length is open in the graph: what it is here.
    return found if isinstance(found, int) else int(found.node.hint)


def _read(program: str) -> Launched:
    """What a program launches. Its last function is `call`; every line of it is one statement."""
    body = program[program.rindex("def call(") :]
    found = Launched()
    for name in re.findall(r"^\s*(\w+)\.run\(", body, re.M):
        found.by_name[name] += 1
        found.generated += 1
    found.products = len(re.findall(r"\bextern_kernels\.\w+\(", body))
    found.attention = len(re.findall(r"\btorch\.ops\.torch_attn\.\w+", body.replace("'torch.ops", "'")))
    # sums of the parts that a kernel left in its workspace, and their cast
    found.others = len(re.findall(r"\.sum\(dim=", body)) + len(
        re.findall(r"^\s*\w+ = .*\)\.to\(torch\.", body, re.M)
    )
    others = re.findall(r"= torch\.ops\.(?!torch_attn)([\w.]+)\(|= (aten\.[\w.]+)\(", body)
    found.others += len(others)
    found.by_name.update("".join(names) for names in others)
    return found


class _NoDevice:
    def __init__(self, *_: Any, **__: Any) -> None: ...
    def __enter__(self) -> _NoDevice:
        return self

    def __exit__(self, *_: Any) -> None: ...


@contextlib.contextmanager
def _h100() -> Iterator[None]:
    """Whatever the compiler asks of the card is answered by an H100's properties."""
    cuda, interface = torch.cuda, device_interface.CudaInterface
    properties = staticmethod(lambda *_, **__: H100)
    answers: list[tuple[Any, str, Any]] = [
        (cuda, "is_available", lambda: True),
        (cuda, "device_count", lambda: 1),
        (cuda, "current_device", lambda: 0),
        (cuda, "get_device_capability", lambda *_, **__: (9, 0)),
        (cuda, "get_device_properties", lambda *_, **__: H100),
        (cuda, "get_rng_state", lambda *_, **__: torch.zeros(16, dtype=torch.uint8)),
        (cuda, "device", _NoDevice),
        *((cuda, name, lambda *_, **__: None) for name in ("set_rng_state", "_lazy_init", "synchronize")),
        (interface, "get_device_properties", properties),
        (interface.Worker, "get_device_properties", properties),
        (interface, "get_compute_capability", staticmethod(lambda *_, **__: 90)),
        (interface, "is_available", staticmethod(lambda: True)),
        (torch._subclasses.fake_tensor, "init_gpu_context", lambda device: None),
    ]
    # What else stands between a graph and its program: is there a Triton, of which build, and the shape of a
    # copy, which C++ would ask the device for.
    by_name = {
        "torch._inductor.scheduler.has_triton": lambda: True,
        "torch.utils._triton.has_triton": lambda: True,
        "torch.utils._triton.triton_hash_with_backend": lambda: "H100",
        "torch._inductor.fx_passes.reinplace._inplace_generalized_scatter": lambda into, *_: into,
    }
    with contextlib.ExitStack() as patches:
        for owner, name, answer in answers:
            patches.enter_context(mock.patch.object(owner, name, answer))
        for name, answer in by_name.items():
            patches.enter_context(mock.patch(name, answer))
        yield


def table() -> str:
    """Markdown, for csrc_triton/README.md."""
    lines = [
        "| layer | | generated | products | attention | sums, casts | kernels | GB |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, config in LAYERS.items():
        ways = {
            "plain": plain(config),
            "compiled": compiled(config),
            "deterministic": compiled(config, deterministic=True),
        }
        for what, both in ways.items():
            for direction, found in zip(("forward", "backward"), both, strict=True):
                figures = (found.generated, found.products, found.attention, found.others, found.kernels)
                cells = [name, f"{what}, {direction}", *map(str, figures), f"{found.bytes / 1e9:.2f}"]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(f"torch {torch.__version__}, a layer at {TOKENS:,} tokens in bf16\n\n{table()}")
