"""Which modules and parameters adapters go on: `all-linear` is our own list, and names mean what they match.

`all-linear` is every linear layer of the backbone, without
- routers: what feeds a top-k is trained by the experts' auxiliary loss or not at all, and adapting it moves tokens between
  experts. Found by the class's name, by the source of the class (it calls topk), and by as many outputs as there are experts;
- layers whose weight the model's code reads instead of calling them (Mamba's fused path): an adapter would be passed over;
- linear layers that compute something of their own (DeepSeek-V4's grouped one), for which W x + B A x is not what is trained;
- layers that peft takes for a renamed part of the experts (`gate_proj` of Qwen3-MoE, DeepSeek's shared experts): it would put
  their adapters elsewhere, when a folder is loaded too;
- experts kept as one 3-D parameter: named, they are adapted (`experts.gate_up_proj`), and at rank × experts each.
"""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from repsft_fast.errors import ModelError, describe, did_you_mean
from repsft_fast.models.loss import backbone_of
from repsft_fast.models.merge import copied

ALL_LINEAR = "all-linear"
WHERE = "model.lora.target_modules"
_ROUTER_CLASS = re.compile(r"Router|Indexer|Top_?[kK]|TokenChoice|Gating$|MoE\w*Gate$")
_ROUTER_NAME = re.compile(r"router(_?gate)?|gate|wg|shared_expert_gate")
_ASKED: dict[type, bool] = {}  # classes of linear layers with a forward of their own → whether it is a plain product
_FEW = 8  # outputs of a layer that is asked
_UNUSED_NAME = re.compile(r"(?:^|\.)(?:pooler|encoder_attn|crossattention|cross_attn)(?:\.|$)")
_PARTS_OF_EXPERTS = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")  # where each expert is a layer
_REPEATED_GROUP, _REPEATS, _MOST_REPEATS = re.compile(r"\)[*+{]"), re.compile(r"[*+]|\{\d*,\}"), 5
_TOP_K = re.compile(r"\btopk\(")
_READS_WEIGHT = r"\bself\.{name}\.(?:weight|bias)\b(?!\.(?:dtype|device|shape|size|ndim|data_ptr))"


@dataclass(frozen=True)
class Targets:
    """What is adapted, by whole names, and what `all-linear` leaves out and why."""

    modules: tuple[str, ...]
    parameters: tuple[str, ...] = ()
    left_out: dict[str, tuple[str, ...]] = field(default_factory=dict)  # reason → names

    def said(self) -> list[str]:
        """Sentences for the start of a run."""
        return [f"{WHERE}: {ALL_LINEAR} leaves out {_leaves(names)}: {why}" for why, names in self.left_out.items()]


_ROUTES = "what routes between experts stays as it is"
_UNUSED = "a language model does not use them"
_READ = "the model reads their weights itself, so an adapter would be passed over"
_OWN = "they compute more than W x, which adapters do not follow"
_RENAMED = "peft takes these names for the experts' of this architecture"
_STACKED = "experts in one parameter get adapters only where they are named, such as experts.down_proj"


def choose(model: PreTrainedModel, given: str | Sequence[str], renames: Callable[[str], bool]) -> Targets:
    """What `given` means in this model: `all-linear`, a regular expression, or names (each the end of modules' or
    parameters' names; `all-linear` may be one of them).

    renames: whether peft takes this last part of a name for another. ModelError where a name means nothing or nothing that
    can be adapted.
    """
    modules: dict[str, None] = {}
    parameters: dict[str, None] = {}
    left_out: dict[str, tuple[str, ...]] = {}
    linear, stacked = dict(model.named_modules()), _stacked(model)
    for one in [given] if isinstance(given, str) else given:
        if one.lower() == ALL_LINEAR:
            found, left_out = all_linear(model, renames)
            modules.update(dict.fromkeys(found))
            continue
        pattern = isinstance(given, str)
        if pattern and endless(one):
            todo = "repeat no group and little else, or give a list of names"
            raise ModelError(describe(WHERE, "repeats too much to be matched", got=given, todo=todo))
        here = [name for name in linear if name and _means(one, name, pattern)]
        stacks = [name for name in stacked if _means(one, name, pattern)]
        if not here and not stacks:
            raise ModelError(_nothing(model, one, pattern))
        modules.update(dict.fromkeys(here))
        parameters.update(dict.fromkeys(stacks))
    named = {*modules, *parameters}
    left_out = {why: rest for why, names in left_out.items() if (rest := tuple(n for n in names if n not in named))}
    chosen = Targets(tuple(modules), tuple(parameters), left_out)
    if not modules and not parameters:
        raise ModelError(describe(WHERE, "there is nothing to adapt", got=given, todo="name the layers"))
    _refuse(model, chosen, given, renames)
    return chosen


def all_linear(model: PreTrainedModel, renames: Callable[[str], bool]) -> tuple[list[str], dict[str, tuple[str, ...]]]:
    """(linear layers of the backbone that are adapted, reason → names of those that are not)."""
    backbone = backbone_of(model)
    inside = {id(module) for module in backbone.modules()}
    ends = {id(module) for module in (model.get_output_embeddings(), model.get_input_embeddings())}
    routed = set(routers(model))
    chosen: list[str] = []
    left: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if not is_linear(module) or id(module) not in inside or id(module) in ends:
            continue
        if _UNUSED_NAME.search(name):
            left.setdefault(_UNUSED, []).append(name)
        elif name in routed:
            left.setdefault(_ROUTES, []).append(name)
        elif not _is_plain(module):
            left.setdefault(_OWN, []).append(name)
        elif _is_read(model, name):
            left.setdefault(_READ, []).append(name)
        elif renames(name.rpartition(".")[2]):
            left.setdefault(_RENAMED, []).append(name)
        else:
            chosen.append(name)
    if stacked := _stacked(model):
        left[_STACKED] = stacked
    return chosen, {why: tuple(names) for why, names in left.items()}


def routers(model: PreTrainedModel) -> Iterator[str]:
    """Linear layers whose output feeds a top-k: the experts', and those of sparse attention's indexers."""
    named = dict(model.named_modules())
    for name, module in named.items():
        if not is_linear(module):
            continue
        above = [named[part] for part in _above(name)]
        if any(_ROUTER_CLASS.search(type(each).__name__) for each in (module, *above[-3:])):
            yield name
            continue
        leaf = name.rpartition(".")[2]
        experts = [count for each in above[-2:] if (count := _experts_of(each))]
        outputs = _outputs(module)
        decides = any(_TOP_K.search(_code(each)) for each in above[-2:])
        if (experts or decides) and ".experts." not in f".{name}." and (_ROUTER_NAME.fullmatch(leaf) or outputs in experts):
            yield name


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def _is_plain(module: Any) -> bool:
    """Whether a linear layer computes W x + b and no more; a class with a product of its own is asked with numbers."""
    kind = type(module)
    if kind.forward in (nn.Linear.forward, Conv1D.forward):
        return True
    if kind not in _ASKED:
        rows = min(module.out_features, _FEW)
        draw = torch.Generator().manual_seed(0)
        weight = torch.randn(rows, module.in_features, generator=draw, device="cpu")
        bias = None if module.bias is None else torch.randn(rows, generator=draw, device="cpu")
        given = torch.randn(3, module.in_features, generator=draw, device="cpu")
        twin = copied(module)
        twin._parameters |= {"weight": nn.Parameter(weight), "bias": None if bias is None else nn.Parameter(bias)}
        try:
            with torch.no_grad(), torch.device("cpu"):
                _ASKED[kind] = torch.allclose(twin(given), F.linear(given, weight, bias), rtol=1e-4, atol=1e-4)
        except Exception:  # it wants other inputs, other sizes, gives more than one output …
            _ASKED[kind] = False
    return _ASKED[kind]


def shortest(names: Iterable[str], others: Iterable[str], parts: int = 1) -> list[str]:
    """Ends of names (of so many parts at least) that mean `names` and none of `others`, as short as they can be: `q_proj`, as
    readers of adapter folders know them."""
    names, taken = list(names), list(others)
    ends: Counter[str] = Counter(end for name in taken for end in _ends(name))
    return list(dict.fromkeys(next((end for end in _ends(name, parts) if not ends[end]), name) for name in names))


def _ends(name: str, least: int = 1) -> Iterator[str]:
    parts = name.split(".")
    for start in range(max(len(parts) - least, 0), -1, -1):
        yield ".".join(parts[start:])


def _above(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(len(parts))]


def endless(pattern: str) -> bool:
    """Whether a regular expression may take years to say no: it repeats a group, or repeats often."""
    return bool(_REPEATED_GROUP.search(pattern)) or len(_REPEATS.findall(pattern)) > _MOST_REPEATS


def _means(given: str, name: str, pattern: bool) -> bool:
    """A name alone is peft's regular expression, and as people write it the end of a name."""
    if pattern:
        try:
            if re.fullmatch(given, name):
                return True
        except re.error:
            pass
    return name == given or name.endswith(f".{given}")


def _stacked(model: PreTrainedModel) -> list[str]:
    """Experts that are one parameter of [experts, ., .]."""
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim == 3 and not isinstance(_holder(model, name), nn.Conv1d) and "expert" in _home(model, name)
    ]


def _home(model: nn.Module, name: str) -> str:
    """The words a parameter's place is known by: its name and its module's class."""
    return f"{name} {type(_holder(model, name)).__name__}".lower()


def _holder(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def _experts_of(module: nn.Module) -> int:
    """How many experts a module has right inside it; 0 for one that has none."""
    for name, child in module.named_children():
        if "expert" in name and "shared" not in name:
            if isinstance(child, nn.ModuleList):
                return len(child)
            stacked = [p.shape[0] for p in child.parameters(recurse=False) if p.ndim == 3]
            return stacked[0] if stacked else int(getattr(child, "num_experts", 0) or 0)
    return 0


def _outputs(module: Any) -> int:
    return int(module.nf if isinstance(module, Conv1D) else module.out_features)


def _is_read(model: nn.Module, name: str) -> bool:
    """Whether the class around a layer reads its weight, beside asking for its type or place."""
    above, _, leaf = name.rpartition(".")
    if getattr(model.get_submodule(above), "pretraining_tp", 0) == 1:  # BLOOM's, read for a slower, exacter product alone
        return False
    return re.search(_READS_WEIGHT.format(name=re.escape(leaf)), _code(model.get_submodule(above))) is not None


def _code(module: nn.Module) -> str:
    """The source of a module's class, where it is the architecture's."""
    kind: Any = type(module)
    return _source(kind)


@functools.cache
def _source(kind: Any) -> str:
    try:
        return inspect.getsource(kind) if kind.__module__.split(".")[0] not in ("torch", "peft") else ""
    except (OSError, TypeError):  # made while running: nothing to read
        return ""


def _refuse(model: PreTrainedModel, chosen: Targets, given: Any, renames: Callable[[str], bool]) -> None:
    """What would be adapted in vain, or elsewhere."""
    ends = {id(module) for module in (model.get_output_embeddings(), model.get_input_embeddings())}
    routed = set(routers(model))
    for name in chosen.modules:
        module = model.get_submodule(name)
        leaf = name.rpartition(".")[2]
        if id(module) in ends:
            wrong, expected = "names the embedding or the output head, which stay frozen", "linear layers of the backbone"
        elif renames(leaf):
            wrong, expected = f"{name}: {_RENAMED}", "other layers, or the experts by the name of their parameter"
        elif is_linear(module) and not _is_plain(module):
            wrong, expected = f"{name}, a {type(module).__name__}: {_OWN}", "plain linear layers"
        elif _is_read(model, name) and is_linear(module):
            wrong, expected = f"{name}: {_READ}", "layers that are called"
        elif name in routed:
            wrong, expected = f"{name} is a router: {_ROUTES}", "other layers"
        elif not _can_be_adapted(module):
            wrong, expected = f"{name} is a {type(module).__name__}", "linear layers, embeddings or convolutions"
        else:
            continue
        raise ModelError(describe(WHERE, wrong, expected=expected, got=given, todo=f"drop it, or set {ALL_LINEAR}"))


def check_folders(model: PreTrainedModel, layers: Mapping[str, Any], routed: Collection[str], *, merge: bool) -> list[str]:
    """What is to be said of layers that a folder of adapters names, not the settings: they are taken as peft takes them.

    routed: the model's routers, found before it had adapters.
    ModelError where that is not what would be trained: on the head, which the fused loss does not call; beside weights that
    the model reads itself; on layers that compute something else; merged into an embedding that is the head too.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    weights = [getattr(getattr(end, "base_layer", end), "weight", None) for end in (head, embedding)]
    tied = weights[0] is not None and weights[0] is weights[1]
    seen = []
    for name, layer in layers.items():
        base = layer.get_base_layer()
        if hasattr(layer, "parameter_name"):
            continue
        if layer is head:
            wrong = f"its adapters are on the output head ({name}), which stays frozen here"
        elif is_linear(base) and not _is_plain(base):
            wrong = f"its adapters are on {name}, a {type(base).__name__}: {_OWN}"
        elif is_linear(base) and _is_read(model, name):
            wrong = f"its adapters are on {name}: {_READ}"
        elif merge and tied and layer is embedding:
            wrong = f"its adapters are on {name}, whose weight the output head shares: merged, they would change the head too"
        else:
            seen += [name] if name in routed else []
            continue
        todo = "merge them with peft into a model of its own, and train new ones beside that"
        raise ModelError(describe("model.lora.from", wrong, expected="linear layers of the backbone", todo=todo))
    return [f"model.lora.from: its adapters are on routers too, which go on being trained: {_leaves(seen)}"] if seen else []


def _can_be_adapted(module: nn.Module) -> bool:
    return is_linear(module) or isinstance(module, nn.Embedding | nn.Conv1d | nn.Conv2d | nn.Conv3d)


def _nothing(model: PreTrainedModel, given: str, pattern: bool) -> str:
    head = model.get_output_embeddings()
    linear = (name for name, module in model.named_modules() if is_linear(module) and module is not head)
    leaves = dict.fromkeys(name.rpartition(".")[2] for name in linear)
    stacks = dict.fromkeys(".".join(name.split(".")[-2:]) for name in _stacked(model))
    names = [*leaves, *stacks]
    near = did_you_mean(given, names)
    wrong = "matches no layer" if pattern else "names no layer"
    todo = f"did you mean {near}?" if near else f"{ALL_LINEAR} takes every linear layer of the backbone"
    if stacks and given.rpartition(".")[2] in _PARTS_OF_EXPERTS:
        todo = f"the experts are whole parameters here: name {' and '.join(stacks)}, or drop it"
    elif pattern and "," in given and all(part.strip() in names for part in given.split(",")):
        todo = f"give a list: [{', '.join(part.strip() for part in given.split(','))}]"
    return describe(WHERE, wrong, expected=f"one of {', '.join(names)}", got=given, todo=todo)


def _leaves(names: Sequence[str]) -> str:
    """`mlp.gate (48)`: names as people say them, and how often."""
    counts = Counter(".".join(part for part in name.split(".")[-2:] if not part.isdigit()) for name in names)
    return ", ".join(f"{name} ({count})" for name, count in counts.items())


def renamed_by_peft(model: PreTrainedModel, config: Any) -> Callable[[str], bool]:
    """Whether peft takes a layer's name for another: parts of experts were linear layers in transformers 4, and a folder's
    names are read as if they were of that time. `config`: a LoraConfig to try it on."""
    try:
        conversion: Any = importlib.import_module("peft.utils.transformers_weight_conversion")
    except ImportError:  # peft 0.18: transformers does it
        conversion = importlib.import_module("transformers.integrations.peft")

    @functools.cache
    def renames(leaf: str) -> bool:
        tried = copy.deepcopy(config)
        tried.target_modules, tried.target_parameters = {leaf}, None
        try:
            read = conversion.convert_peft_config_for_transformers(tried, model=model, conversions=None) or tried
        except ValueError:  # one half of a fused pair
            return True
        return set(read.target_modules) != {leaf}

    return renames
