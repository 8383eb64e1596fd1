"""What a run and its resumption must have in common, and what else decides bits: by content, never by the
spelling of a path.

identity   refused where it differs: tokens, the model's configuration, weights that no checkpoint holds or
           that the run began with, adapters gone on from, the chat template, and every setting that says what
           is computed
deciders   said where they differ: how it is computed, on what, with which versions. The run goes on, with
           other bits
budget     apart from both: a larger one extends the run (`training.resume`)
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from repsft_fast import checkpoint
from repsft_fast.checkpoint.hostsum import host_checksums
from repsft_fast.config import Config
from repsft_fast.config.unused import OF_THE_TESTED_RULE
from repsft_fast.data.cache import tokenizer_fingerprint
from repsft_fast.distributed import World, broadcast_from_main
from repsft_fast.errors import describe, open_plain
from repsft_fast.models.paths import locate
from repsft_fast.models.readable import model_form, weights_were_read

# Settings that decide bits and not what is computed: told where they differ.
_DECIDERS = (
    "model.attention", "model.layer_kernels", "model.activation_checkpointing", "model.compile",
    "batch.row_tokens", "batch.bucket_tokens",
    "numbers.on_nonfinite", "numbers.on_out_of_memory", "numbers.on_spike", "distributed.shard_ranks",
)  # fmt: skip
# Settings whose values `training.decided` keeps and says; some stand above too, for older versions to read.
DECIDED_ONCE = (
    "loss.chunk_bytes", "model.attention", "model.compile", "model.cuda_graphs", "batch.row_tokens",
    "batch.row_lengths",
)  # fmt: skip
# Settings that say how fast, where or what is told, not what is computed.
_FREE = (
    *_DECIDERS,
    *DECIDED_ONCE,
    "run.folder", "model.trust_remote_code", "model.save_dtype", "model.lora.merge", "tokenizer",
    "numbers", "log", "checkpoint", "distributed", "snapshot",
    "evaluate.generate_samples", "evaluate.generate_tokens",
    "evaluate.tasks", "evaluate.tasks_every_epochs", "evaluate.engine", "evaluate.batch_replies",
)  # fmt: skip
# Settings that say where content lies, which has digests of its own.
_PLACES = ("model.path", "model.gguf_file", "model.lora.from", "data", "tokenizer")
BUDGET = "budget"
# Settings of msft's rule "tested", which say nothing where another decides.
_GONE = ("min_progress",)  # an older version's
_OF_THE_TESTED_RULE = (*OF_THE_TESTED_RULE, *(f"mixture.{name}" for name in _GONE))
DECAY_AT = "stop.decay_token_accuracy"  # says nothing where no accuracy triggers a decay
_SPELL = ("transformers", "tokenizers")  # what a tokenizer is written down by
# In a config.json, what does not say how the model computes.
_SAID_BY_THE_LIBRARY = (
    "_name_or_path",
    "transformers_version",
    "torch_dtype",
    "dtype",
    "architectures",
    "use_cache",
)
_OF_ADAPTERS = (
    "base_model_name_or_path",
    "revision",
    "peft_version",
    "inference_mode",
    "auto_mapping",
    "runtime_config",
)
_BITS = 62  # of a digest: what checkpoints are told by stays as it is
_OTHER_TOKENIZER = "resume with the one it was written with, or start another run in another folder"
_OTHER_RUN = "resume with what it was written with, or start another run in another folder"
_WORDS = {
    "data": "the training, validation or test data, as tokens",
    "model": "the model's configuration",
    "weights": "the base model's weights",
    "adapters": "the adapters of model.lora.from",
    "template": "the chat template",
}


def identity(
    config: Config, tokenizer: Any, base: Mapping[str, str], data_digest: str | None
) -> dict[str, Any]:
    """Digests and settings by name, as JSON; what a checkpoint is told by.

    base         digests of what the run begins with, by `base_of`
    data_digest  of the tokens of every split
    """
    known = {"data": data_digest, "template": template_of(tokenizer, config), **base}
    return known | {n: v for n, v in flat(config) if not (is_free(n) or is_place(n) or _starts(n, (BUDGET,)))}


def is_free(name: str) -> bool:
    return _starts(name, _FREE)


def is_place(name: str) -> bool:
    return _starts(name, _PLACES)


def _starts(name: str, beginnings: tuple[str, ...]) -> bool:
    return any(name == beginning or name.startswith(f"{beginning}.") for beginning in beginnings)


def flat(config: Config) -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every setting, by name; a model's own configuration is one value."""

    def walk(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in values.items():
            name = f"{prefix}{key}"
            if isinstance(value, Mapping) and name not in (
                "model.config",
                "data.train",
                "data.validation",
                "data.test",
            ):
                yield from walk(value, f"{name}.")
            else:
                yield name, list(value) if isinstance(value, tuple) else value

    yield from sorted(walk(config.to_dict(), ""))


def base_of(model: Any, config: Config, world: World) -> dict[str, str]:
    """Digests of what the run begins with: {"model", "weights", "adapters"}. All ranks call it, before
    weights are sharded.

    Weights are counted where they were read from files, and frozen ones always: drawn ones follow from
    settings and seed. Only the main rank holds them yet; it tells the others.
    """
    found = {"model": 0, "weights": 0, "adapters": 0}
    if world.is_main and world.device.type != "meta":
        state = dict(model.state_dict(keep_vars=True))
        trained = {name for name, tensor in state.items() if tensor.requires_grad}
        adapters = trained if config.model.lora is not None else set()
        read = weights_were_read(model) and config.model.init != "random" and config.model.config is None
        source = getattr(config.model.lora, "from", None)
        kept = {n: t for n, t in state.items() if n not in adapters and (read or n not in trained)}
        found["model"] = _number(_model(model, config))
        found["weights"] = _number(_sums(kept))
        if source is not None:
            found["adapters"] = _number(
                {"settings": _adapter_settings(source), **_sums({n: state[n] for n in sorted(adapters)})}
            )
    told: dict[str, str] = broadcast_from_main(world, {n: f"{value:016x}" for n, value in found.items()})
    return told


def _model(model: Any, config: Config) -> Any:
    """The configuration as its file has it, so that another version of the library finds the same; and code
    beside it."""
    if config.model.config is not None:
        return "in the settings"
    said = model_form(model).config or model.config.to_dict()
    code = {}
    if config.model.trust_remote_code and config.model.path is not None:
        folder = Path(locate(config.model.path)[0])
        for file in sorted(folder.glob("*.py")):
            with open_plain(file) as opened:
                code[file.name] = _hex(opened.read())
    return {"config": {k: v for k, v in said.items() if k not in _SAID_BY_THE_LIBRARY}, "code": code}


def _sums(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    if any(isinstance(tensor, FakeTensor) for tensor in tensors.values()):  # a rehearsal: there is no content
        return {}
    sums = host_checksums([tensor.detach() for tensor in tensors.values()])
    return {n: [str(t.dtype), list(t.shape), s] for (n, t), s in zip(tensors.items(), sums, strict=True)}


def _adapter_settings(source: str) -> Any:
    try:
        with open_plain(Path(source).expanduser() / "adapter_config.json") as file:
            said = json.loads(file.read())
    except (OSError, ValueError):
        return None
    return {k: v for k, v in said.items() if k not in _OF_ADAPTERS} if isinstance(said, dict) else said


def template_of(tokenizer: Any, config: Config) -> str:
    """Digest of the chat template and its variables; of nothing without a tokenizer."""
    template = getattr(tokenizer, "chat_template", None)
    return _hex(_text([template, config.tokenizer.template_kwargs, config.tokenizer.special_tokens]))


def check_tokenizer(
    where: str, decided: Mapping[str, Any], tokenizer: Any, *, todo: str = _OTHER_TOKENIZER
) -> str | None:
    """ForeignCheckpoint for another tokenizer than the run began with, which the saved model would be given.
    What is to be said where other versions of the libraries may spell the same one otherwise."""
    before, now = decided.get("tokenizer"), tokenizer_fingerprint(tokenizer)
    if before is None or before == now:
        return None
    versions, here = decided.get("deciders", {}), software()
    if any(versions.get(name) != here.get(name) for name in _SPELL):
        return (
            "the tokenizer looks other than at the checkpoint, which other versions of its libraries may be"
            " the reason of"
        )
    raise checkpoint.ForeignCheckpoint(
        describe(where, "is another run's: the tokenizer is another", todo=todo)
    )


def deciders(config: Config, world: World) -> dict[str, Any]:
    """What changes bits without changing what is computed, as JSON."""
    settings = dict(flat(config))
    known = {name: settings[name] for name in _DECIDERS if name in settings}
    return known | {"ranks": world.size, "device": world.device.type, **software()}


def software() -> dict[str, str]:
    found = {}
    for name in ("repsft-fast", "torch", "triton", "transformers", "tokenizers", "peft"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def other_deciders(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The sentence that says what decides bits otherwise now; None: nothing."""
    changed = [
        f"{name} is {_short(now.get(name))} and was {_short(before.get(name))}"
        for name in sorted((before.keys() | now.keys()) - set(DECIDED_ONCE))
        if before.get(name) != now.get(name)
    ]
    if not changed:
        return None
    return (
        f"{'; '.join(changed)}: from here on sums may be rounded otherwise than in a run that was not"
        " interrupted"
    )


def check(
    where: str, saved: Mapping[str, Any], now: Mapping[str, Any], *, todo: str = _OTHER_RUN
) -> str | None:
    """ForeignCheckpoint naming everything in which a checkpoint is another run's; what is to be said where it
    is the same.

    An older version wrote no digests of the base: of its checkpoints the settings that both know are
    compared.
    """
    old = "weights" not in saved
    saved, now = _as_it_was(saved), dict(now)
    if not (_is_tested(saved) or _is_tested(now)):
        # null is none there, as it stood in older checkpoints.
        for each in (saved, now):
            each["mixture.rehearsal"] = each.get("mixture.rehearsal") or 0.0
    names = saved.keys() & now.keys() if old else saved.keys() | now.keys()
    if not (_is_tested(saved) or _is_tested(now)):
        names = names - set(_OF_THE_TESTED_RULE)
    if not (_triggers_decay(saved) or _triggers_decay(now)):
        names = names - {DECAY_AT}
    found = [
        _difference(name, saved.get(name), now.get(name))
        for name in sorted(names)
        if saved.get(name) != now.get(name)
    ]
    if found:
        raise checkpoint.ForeignCheckpoint(
            describe(where, f"is another run's: {'; '.join(found)}", todo=todo)
        )
    if old:
        return (
            "an older version wrote the checkpoint, without digests of model, weights and template: they were"
            " not compared"
        )
    return None


def _as_it_was(saved: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint says, and what its version did where it had no setting yet."""
    saturation = saved.get("mixture.policy") == "msft" and saved.get("mixture.exclude_on") == "saturation"
    older = {
        "mixture.pool": "items",
        "mixture.keep": "best" if saturation else None,
        DECAY_AT: saved.get("stop.token_accuracy"),
    }
    return older | dict(saved)


def _triggers_decay(settings: Mapping[str, Any]) -> bool:
    by_accuracy = settings.get("stop.token_accuracy") is not None
    return settings.get("schedule.name") == "wsd" and settings.get("mixture.policy") is None and by_accuracy


def _is_tested(settings: Mapping[str, Any]) -> bool:
    wanted = {"mixture.policy": "msft", "mixture.rule": "tested", "mixture.exclude_on": "overfit"}
    return all(settings.get(name) == value for name, value in wanted.items())


def _difference(name: str, saved: Any, now: Any) -> str:
    if name in _WORDS:
        return f"{_WORDS[name]} is another"
    return f"{name} was {_short(saved)} and is {_short(now)}"


def _short(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def _number(value: Any) -> int:
    return int(_hex(_text(value)), 16) % (1 << _BITS)


def _text(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, default=str).encode()


def _hex(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
