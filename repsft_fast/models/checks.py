"""Checks at start: the head computes what the fused head does, no document of a row sees another, what is
saved can be read."""

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

from repsft_fast.distributed import of_the_wire
from repsft_fast.errors import ModelError, describe
from repsft_fast.models.guards import quiet
from repsft_fast.models.lengths import Lengths
from repsft_fast.models.loss import Head, backbone_of
from repsft_fast.ops.attention import NAME
from repsft_fast.row import Row

# Lengths of the probe's documents: the watched one lies between two others.
_PROBE = (5, 9, 4)
# Largest difference, relative to the spread of the losses, that rounding may explain when a document moves
# inside a row. A leak shows as 0.1 and more; bf16 keeps 8 bits, so its rounding alone reaches a few percent.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.15}


def check_head(model: PreTrainedModel, head: Head) -> None:
    """ModelError unless the model's own logits are those `head` describes: a transform nobody named would
    train something else than what is generated. Costs one forward over four tokens; under FSDP2 every rank
    must call it."""
    tokens = (
        torch.arange(4, device=next(model.parameters()).device)[None]
        % model.config.get_text_config().vocab_size
    )
    found: list[Tensor] = []

    def of_the_head(backbone: Any, arguments: Any, output: Any) -> None:
        # inside the model's forward, where FSDP2 has gathered the head
        hidden, weight = replace(head, softcap=None).inputs(
            output.last_hidden_state[0], model.get_output_embeddings()
        )
        found.append(hidden @ weight.T)

    was_training = model.training
    model.eval()
    hook = backbone_of(model).register_forward_hook(of_the_head)
    try:
        with torch.no_grad(), quiet():  # some advise a mask for what they take for padding
            expected = model(input_ids=tokens, use_cache=False).logits[0].double()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if of_the_wire(error):
            raise  # another rank is gone
        if model.config._attn_implementation == NAME:  # with its own it may be able to
            raise no_packed_rows(type(model).__name__, _stopped_by(error)) from error
        wrong = f"{type(model).__name__} cannot compute four tokens ({_first_line(error)})"
        raise ModelError(describe("model", wrong, expected="a causal language model")) from error
    finally:
        hook.remove()
        model.train(was_training)
    if not found:
        wrong = f"{type(model).__name__} does not make its logits of its backbone's last hidden states"
        raise ModelError(describe("model", wrong, expected="logits = hidden @ head.T"))
    if not expected.isfinite().all():
        raise _not_finite(type(model).__name__, "logits")
    logits = found[0].double()
    if logits.shape != expected.shape:
        wrong = (
            f"{type(model).__name__} gives {expected.shape[-1]} logits where its head has {logits.shape[-1]}"
            " rows"
        )
        raise ModelError(describe("model", wrong, expected="logits = hidden @ head.T"))
    if head.softcap is not None:
        logits = torch.tanh(logits / head.softcap) * head.softcap
    off = (logits - expected).abs().max() / expected.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    if not off < TOLERANCE[found[0].dtype]:
        wrong = f"{type(model).__name__} transforms its logits in a way the fused head does not know"
        raise ModelError(
            describe("model", wrong, expected="logits = hidden @ head.T", got=f"relative error {off:.2g}")
        )


def check_no_leak(model: Any, *, longest: int | None = None, seed: int = 0) -> None:
    """ModelError when a document of a row is not computed as it is alone: another one changes it, or the row
    misplaces it.

    Three forward passes over at most 18 tokens, and three more over about 2 n for every length n of
    `Lengths.borders` below `longest`, the positions of the longest sample: what a model does past its window,
    say, shows in such documents alone. Without packing (`batch.pack: false`) what is checked is that no
    position sees those behind it. Under FSDP2 every rank must call it.
    """
    vocabulary = model.config.get_text_config().vocab_size
    draw = torch.Generator().manual_seed(seed)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            if not model.loss_settings.packed:
                _check_causal(model, _documents((_PROBE[1],), vocabulary, draw)[0])
                return
            if (why := _why_not_packed(backbone_of(model))) is not None:
                raise no_packed_rows(type(model).__name__, why)
            # The same row again with every token of the others changed: nothing of the watched one may move.
            documents = _documents(_PROBE, vocabulary, draw)
            changed = [documents[0], documents[1], documents[2]]
            changed[0], changed[2] = (
                [(token + 1) % vocabulary for token in d] for d in (documents[0], documents[2])
            )
            for row in _rows_of(documents, Lengths.of(model.config)):
                _check_row(
                    model,
                    [documents[n] for n in row],
                    [changed[n] for n in row],
                    [row.index(1)] if 1 in row else [],
                )
            # Past its window a model computes in another way, which short documents never show.
            for border in Lengths.of(model.config).borders:
                if longest is not None and border < longest:
                    documents = _documents((border, border + 1, _PROBE[2]), vocabulary, draw)
                    for row in _rows_of(documents, Lengths.of(model.config)):
                        _check_row(
                            model, [documents[n] for n in row], None, [row.index(n) for n in row if n < 2]
                        )
    finally:
        model.train(was_training)


def no_packed_rows(model: str, why: str) -> ModelError:
    """The one wording for every architecture whose layers cannot keep the documents of a row apart."""
    todo = (
        "set batch.pack: false (one sample a row, exact for every causal model); docs/models.md lists what"
        " was tried"
    )
    return ModelError(describe("model", f"{model} does not take packed rows ({why})", todo=todo))


def _not_finite(model: str, what: str) -> ModelError:
    """For weights that are finite, as reading them made sure, and whose products are not."""
    wrong = f"the {what} of {model} are not finite, before any training"
    todo = (
        "look for weights far too large, or lower model.lora.alpha; a base of such weights has to be fetched"
        " or made again"
    )
    return ModelError(describe("model", wrong, expected="finite numbers for a few tokens", todo=todo))


def _why_not_packed(backbone: nn.Module) -> str | None:
    """What can be told without computing, whatever the weights are: in bf16 a probe sees large differences
    alone."""
    if any(isinstance(module, nn.Conv1d) for module in backbone.modules()):
        # Mamba, gated delta rule, LFM2 and their hybrids
        return "a convolution carries tokens of one document into the next"
    if "position_ids" not in inspect.signature(type(backbone).forward).parameters:
        return "its code takes no positions: inside a row no document could begin at 0"
    return None


def check_loads_again(model: PreTrainedModel) -> None:
    """ModelError where `AutoModelForCausalLM` could make this model and could not read the folder it is saved
    to: it makes the text part alone, whose configuration stands in no table of causal models (Llama 3.2
    Vision, Emu3)."""
    kind: Any = type(model.config)
    if getattr(model.config, "auto_map", None) or kind in MODEL_FOR_CAUSAL_LM_MAPPING:
        return
    wrong = (
        f"{type(model).__name__} would be saved as {model.config.model_type}, which AutoModelForCausalLM"
        " cannot read again"
    )
    raise ModelError(
        describe(
            "model", wrong, expected="a model of text alone", todo="train a text model of the same family"
        )
    )


def _check_row(
    model: Any, documents: list[list[int]], changed: list[list[int]] | None, watched: list[int]
) -> None:
    """That the watched documents are the same in their row, alone, and where the others are changed."""
    device = next(model.parameters()).device
    tolerance = TOLERANCE[getattr(model, "compute_dtype", torch.float32)]
    name = type(model).__name__
    for number in watched:
        try:
            packed = _losses(model, documents, number, device)
            alone = _alone(model, documents[number], device)
            others = packed if changed is None else _losses(model, changed, number, device)
        except torch.OutOfMemoryError:
            raise
        # whatever an architecture's own code makes of a mask and keywords it does not know
        except Exception as error:
            if of_the_wire(error):
                raise
            raise no_packed_rows(name, _stopped_by(error)) from error
        if not alone.isfinite().all():
            raise _not_finite(name, "losses")
        # Losses of random weights lie close together, so the difference is measured by their spread.
        spread = packed.std().clamp_min(1e-6) if len(packed) > 1 else packed.abs().clamp_min(1e-6)
        for other, what in (
            (others, "changes with its neighbours"),
            (alone, "differs from the document alone"),
        ):
            difference = ((packed - other).abs().max() / spread).item()
            if not difference < tolerance:
                how = (
                    f"a document of {len(documents[number]) - 1} positions {what}: relative error"
                    f" {difference:.2g}"
                )
                attention = f"{model.config._attn_implementation}/{model.loss_settings.attention}"
                raise no_packed_rows(name, f"{how}, {attention} attention")


def _alone(model: Any, document: list[int], device: torch.device) -> Tensor:  # [n] fp64
    """The document's losses by the architecture's own masks and attention: what it computes for everybody
    else. Under our attention's name some leave out what they do under their own (MiniMax-M3's sparse
    layers)."""
    settings = model.loss_settings
    configs = {
        id(c): c for c in (model.config, model.config.get_text_config(), backbone_of(model).config)
    }.values()
    names = [config._attn_implementation for config in configs]
    model.loss_settings = replace(settings, packed=False)
    try:
        for config in configs:
            config._attn_implementation = model.get_correct_attn_implementation(None)
        return _losses(model, [document], 0, device)
    finally:
        model.loss_settings = settings
        for config, name in zip(configs, names, strict=True):
            config._attn_implementation = name


def _check_causal(model: Any, document: list[int]) -> None:
    """That the first half of a document is the same whatever stands in the second. (Not: with and without it.
    A model may choose its rotary frequencies by the length of the whole.)"""
    device = next(model.parameters()).device
    half = len(document) // 2
    vocabulary = model.config.get_text_config().vocab_size
    other = [*document[: half + 1], *((token + 1) % vocabulary for token in document[half + 1 :])]
    whole, changed = (_losses(model, [tokens], 0, device) for tokens in (document, other))
    if not whole.isfinite().all():
        raise _not_finite(type(model).__name__, "losses")
    error = ((whole[:half] - changed[:half]).abs().max() / whole.std().clamp_min(1e-6)).item()
    if not error < TOLERANCE[getattr(model, "compute_dtype", torch.float32)]:
        wrong = (
            f"{type(model).__name__} is not causal: its positions see those behind them (relative error"
            f" {error:.2g})"
        )
        raise ModelError(describe("model", wrong, expected="a causal language model"))


def _documents(lengths: Sequence[int], vocabulary: int, draw: torch.Generator) -> list[list[int]]:
    return [torch.randint(vocabulary, (n + 1,), generator=draw).tolist() for n in lengths]


def _rows_of(documents: Sequence[Sequence[int]], lengths: Lengths) -> list[list[int]]:
    """Numbers of the documents that may share a row, as packing puts them together."""
    rows: dict[tuple[int, int], list[int]] = {}
    for number, document in enumerate(documents):
        positions = len(document) - 1
        alone = lengths.alone_above is not None and positions > lengths.alone_above
        side = sum(positions > border for border in lengths.apart)
        rows.setdefault((side, number if alone else -1), []).append(number)
    return list(rows.values())


# [n] fp64
def _losses(model: Any, documents: Sequence[Sequence[int]], watched: int, device: torch.device) -> Tensor:
    """Loss per position of document number `watched` in the row of `documents`."""
    row = probe_row(documents, device)
    _, stats = model.loss(row)
    return stats.loss[row.position_segments == watched].double()


def _stopped_by(error: BaseException) -> str:
    """In our words, and in brackets what the architecture's own code said."""
    if isinstance(error, ModelError):
        return str(error).removeprefix("attention: ")
    return f"its own code stops at a row without a mask of its own: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def probe_row(documents: Sequence[Sequence[int]], device: torch.device) -> Row:
    """A row of token documents without padding, every position trained with weight 1."""
    lengths = tuple(len(document) - 1 for document in documents)
    total = sum(lengths)

    def integers(values: Sequence[int], dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    segments = integers([s for s, n in enumerate(lengths) for _ in range(n)])
    return Row(
        tokens=integers([t for d in documents for t in d[:-1]])[None],
        positions=integers([i for n in lengths for i in range(n)])[None],
        targets=integers([t for d in documents for t in d[1:]]),
        weights=torch.ones(total, device=device),
        trained_positions=torch.arange(total, device=device),
        position_tasks=torch.zeros_like(segments),
        position_segments=segments,
        cu_seqlens=integers([sum(lengths[:s]) for s in range(len(lengths) + 1)], torch.int32),
        segment_lengths=lengths,
        max_seqlen=max(lengths),
        samples=tuple(range(len(lengths))),
        real_tokens=total,
    )
