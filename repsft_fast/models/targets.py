"""Which modules and parameters adapters go on: `all-linear` is our own list, and names mean what they match.

`all-linear` is every linear layer of the backbone, without
- routers: what feeds a top-k is trained by the experts' auxiliary loss or not at all, and adapting it moves
  tokens between experts. Found by the class's name, by the source of the class (it calls topk), and by as
  many outputs as there are experts;
- layers whose weight the model's code reads instead of calling them (Mamba's fused path): an adapter would be
  passed over;
- linear layers that compute something of their own (DeepSeek-V4's grouped one), for which W x + B A x is not
  what is trained;
- layers that peft takes for a renamed part of the experts (`gate_proj` of Qwen3-MoE, DeepSeek's shared
  experts): it would put their adapters elsewhere, when a folder is loaded too;
- experts kept as one 3-D parameter: named, they are adapted (`experts.gate_up_proj`), and at rank × experts
  each.
"""

from __future__ import annotations

import copy
import functools
import importlib
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from repsft_fast.errors import ModelError, describe, did_you_mean
from repsft_fast.models.layer_kinds import (
    can_be_adapted,
    is_linear,
    is_plain,
    reads_weight,
    routers,
    stacked_experts,
)
from repsft_fast.models.loss import backbone_of

ALL_LINEAR = "all-linear"
WHERE = "model.lora.target_modules"
_UNUSED_NAME = re.compile(r"(?:^|\.)(?:pooler|encoder_attn|crossattention|cross_attn)(?:\.|$)")
_PARTS_OF_EXPERTS = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")  # where each expert is a layer
_REPEATED_GROUP, _REPEATS, _MOST_REPEATS = re.compile(r"\)[*+{]"), re.compile(r"[*+]|\{\d*,\}"), 5


@dataclass(frozen=True)
class Targets:
    """What is adapted, by whole names, and what `all-linear` leaves out and why."""

    modules: tuple[str, ...]
    parameters: tuple[str, ...] = ()
    left_out: dict[str, tuple[str, ...]] = field(default_factory=dict)  # reason → names

    def said(self) -> list[str]:
        """Sentences for the start of a run."""
        return [
            f"{WHERE}: {ALL_LINEAR} leaves out {_leaves(names)}: {why}"
            for why, names in self.left_out.items()
        ]


_ROUTES = "what routes between experts stays as it is"
_UNUSED = "a language model does not use them"
_READ = "the model reads their weights itself, so an adapter would be passed over"
_OWN = "they compute more than W x, which adapters do not follow"
_RENAMED = "peft takes these names for the experts' of this architecture"
_STACKED = "experts in one parameter get adapters only where they are named, such as experts.down_proj"


def choose(model: PreTrainedModel, given: str | Sequence[str], renames: Callable[[str], bool]) -> Targets:
    """What `given` means in this model: `all-linear`, a regular expression, or names (each the end of
    modules' or parameters' names; `all-linear` may be one of them).

    renames: whether peft takes this last part of a name for another. ModelError where a name means nothing or
    nothing that can be adapted.
    """
    modules: dict[str, None] = {}
    parameters: dict[str, None] = {}
    left_out: dict[str, tuple[str, ...]] = {}
    linear, stacked = dict(model.named_modules()), stacked_experts(model)
    for one in [given] if isinstance(given, str) else given:
        if one.lower() == ALL_LINEAR:
            found, left_out = all_linear(model, renames)
            modules.update(dict.fromkeys(found))
            continue
        # Text alone may be a regular expression; of a list every item is a name.
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
    # What is named as well is not left out.
    named = {*modules, *parameters}
    left_out = {
        why: rest for why, names in left_out.items() if (rest := tuple(n for n in names if n not in named))
    }
    chosen = Targets(tuple(modules), tuple(parameters), left_out)
    if not modules and not parameters:
        raise ModelError(describe(WHERE, "there is nothing to adapt", got=given, todo="name the layers"))
    _refuse(model, chosen, given, renames)
    return chosen


def all_linear(
    model: PreTrainedModel, renames: Callable[[str], bool]
) -> tuple[list[str], dict[str, tuple[str, ...]]]:
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
        elif not is_plain(module):
            left.setdefault(_OWN, []).append(name)
        elif reads_weight(model, name):
            left.setdefault(_READ, []).append(name)
        elif renames(name.rpartition(".")[2]):
            left.setdefault(_RENAMED, []).append(name)
        else:
            chosen.append(name)
    if stacked := stacked_experts(model):
        left[_STACKED] = stacked
    return chosen, {why: tuple(names) for why, names in left.items()}


def shortest(names: Iterable[str], others: Iterable[str], parts: int = 1) -> list[str]:
    """Ends of names (of so many parts at least) that mean `names` and none of `others`, as short as they can
    be: `q_proj`, as readers of adapter folders know them."""
    names, taken = list(names), list(others)
    ends: Counter[str] = Counter(end for name in taken for end in _ends(name))
    return list(
        dict.fromkeys(next((end for end in _ends(name, parts) if not ends[end]), name) for name in names)
    )


def _ends(name: str, least: int = 1) -> Iterator[str]:
    parts = name.split(".")
    for start in range(max(len(parts) - least, 0), -1, -1):
        yield ".".join(parts[start:])


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


def _refuse(model: PreTrainedModel, chosen: Targets, given: Any, renames: Callable[[str], bool]) -> None:
    """ModelError for what would be adapted in vain, or elsewhere."""
    ends = {id(module) for module in (model.get_output_embeddings(), model.get_input_embeddings())}
    routed = set(routers(model))
    for name in chosen.modules:
        module = model.get_submodule(name)
        if id(module) in ends:
            wrong = "names the embedding or the output head, which stay frozen"
            expected = "linear layers of the backbone"
        elif renames(name.rpartition(".")[2]):
            wrong = f"{name}: {_RENAMED}"
            expected = "other layers, or the experts by the name of their parameter"
        elif is_linear(module) and not is_plain(module):
            wrong, expected = f"{name}, a {type(module).__name__}: {_OWN}", "plain linear layers"
        elif is_linear(module) and reads_weight(model, name):
            wrong, expected = f"{name}: {_READ}", "layers that are called"
        elif name in routed:
            wrong, expected = f"{name} is a router: {_ROUTES}", "other layers"
        elif not can_be_adapted(module):
            wrong = f"{name} is a {type(module).__name__}"
            expected = "linear layers, embeddings or convolutions"
        else:
            continue
        raise ModelError(
            describe(WHERE, wrong, expected=expected, got=given, todo=f"drop it, or set {ALL_LINEAR}")
        )


def check_folders(
    model: PreTrainedModel, layers: Mapping[str, Any], routed: Collection[str], *, merge: bool
) -> list[str]:
    """What is to be said of layers that a folder of adapters names, not the settings: they are taken as peft
    takes them.

    routed: the model's routers, found before it had adapters.
    ModelError where that is not what would be trained: on the head, which the fused loss does not call;
    beside weights that the model reads itself; on layers that compute something else; merged into an
    embedding that is the head too.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    # Merged, adapters of an embedding change its weight, which may be the head's too.
    weights = [getattr(getattr(end, "base_layer", end), "weight", None) for end in (head, embedding)]
    tied = weights[0] is not None and weights[0] is weights[1]
    seen = []  # on routers: trained before, so they go on, and it is said
    for name, layer in layers.items():
        base = layer.get_base_layer()
        if hasattr(layer, "parameter_name"):
            continue
        if layer is head:
            wrong = f"its adapters are on the output head ({name}), which stays frozen here"
        elif is_linear(base) and not is_plain(base):
            wrong = f"its adapters are on {name}, a {type(base).__name__}: {_OWN}"
        elif is_linear(base) and reads_weight(model, name):
            wrong = f"its adapters are on {name}: {_READ}"
        elif merge and tied and layer is embedding:
            wrong = (
                f"its adapters are on {name}, whose weight the output head shares: merged, they would change"
                " the head too"
            )
        else:
            seen += [name] if name in routed else []
            continue
        todo = "merge them with peft into a model of its own, and train new ones beside that"
        raise ModelError(
            describe("model.lora.from", wrong, expected="linear layers of the backbone", todo=todo)
        )
    if not seen:
        return []
    return [f"model.lora.from: its adapters are on routers too, which go on being trained: {_leaves(seen)}"]


def _nothing(model: PreTrainedModel, given: str, pattern: bool) -> str:
    # Names that would mean something here, the head apart, which stays frozen.
    head = model.get_output_embeddings()
    linear = (name for name, module in model.named_modules() if is_linear(module) and module is not head)
    leaves = dict.fromkeys(name.rpartition(".")[2] for name in linear)
    stacks = dict.fromkeys(".".join(name.split(".")[-2:]) for name in stacked_experts(model))
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
    """Whether peft takes a layer's name for another: parts of experts were linear layers in transformers 4,
    and a folder's names are read as if they were of that time. `config`: a LoraConfig to try it on."""
    try:
        conversion: Any = importlib.import_module("peft.utils.transformers_weight_conversion")
    except ImportError:  # peft 0.18: transformers does it
        conversion = importlib.import_module("transformers.integrations.peft")

    @functools.cache
    def renames(leaf: str) -> bool:
        tried = copy.deepcopy(config)
        tried.target_modules, tried.target_parameters = {leaf}, None
        try:
            read = (
                conversion.convert_peft_config_for_transformers(tried, model=model, conversions=None) or tried
            )
        except ValueError:  # one half of a fused pair
            return True
        return set(read.target_modules) != {leaf}

    return renames
