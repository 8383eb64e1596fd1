"""What is computed for every architecture, beside plain transformers: `python -m tests.models.matrix` makes
docs/models.md.

A tiny random model of each (`architectures`) is held in fp64. Three documents go through it in one packed
row, in the same row with padding, and one a row; loss and every gradient must be those of transformers' own
forward over each document alone, within 1e-6 of the largest gradient (some architectures compute their
softmax or norms in fp32 whatever they are held in).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.utils import logging

from repsft_fast.data.packing import Apart, pack
from repsft_fast.errors import ModelError
from repsft_fast.models import Lengths, check_no_leak, load_model, save_pretrained
from repsft_fast.models.merge import check_merge, merged_state
from repsft_fast.row import Row
from tests.helpers import tiny
from tests.helpers.architectures import NAMES, VOCABULARY, tiny_config

LENGTHS = (5, 13, 4)  # longer and shorter than the windows of `tiny_config`
WITHIN = 1e-6
ADAPTED = 1e-5
RESULTS = Path(__file__).with_name("results.json")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
FP32 = dict.fromkeys(("inkling2_text", "xlnet", "xglm"), torch.float32)  # their own code takes no fp64
LARGEST = 5_000_000  # parameters; an architecture for which no small configuration is known is not tried
COLUMNS = ("packed", "padded", "one a row", "tied", "checkpointed", "exported", "LoRA", "merged")

Outcome = dict[str, str]


def outcome(kind: str) -> Outcome:
    """Column → exact, or the words that refuse it; `not tried` alone where no tiny model can be made."""
    try:
        config = tiny_config(kind)
        with torch.device("meta"):
            size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
        if size > LARGEST:
            raise ValueError(f"the smallest configuration known here has {size:,} parameters")
    except Exception as error:
        return {"not tried": _line(error)}
    documents = tiny.documents(LENGTHS, vocabulary=VOCABULARY)
    found: Outcome = {}
    attempts: dict[str, Callable[[], None]] = {
        "packed": lambda: _same(_model(config), _rows(config, documents), documents),
        "padded": lambda: _same(_model(config), _rows(config, documents, length=32), documents),
        "one a row": lambda: _same(
            _model(config, packed=False),
            [tiny.row([d], denominator=4.0, length=16) for d in documents],
            documents,
        ),
    }
    for name, attempt in attempts.items():
        found[name] = _tried(attempt)
    packed = found["packed"] == "exact"
    if not packed and found["one a row"] != "exact":
        return found
    rows = _rows(config, documents) if packed else [tiny.row([d], denominator=4.0) for d in documents]
    tied = getattr(config.get_text_config(), "tie_word_embeddings", False)
    other = None
    with contextlib.suppress(Exception):  # some know one way alone
        other = tiny_config(kind, tie_word_embeddings=not tied)
    if other is not None:
        found["tied"] = _tried(lambda: _same(_model(other, packed=packed), rows, documents))
    options = {"packed": packed}
    found["checkpointed"] = _tried(
        lambda: _same(_model(config, activation_checkpointing="full", **options), rows, documents)
    )
    found["exported"] = _tried(lambda: _exported(_model(config, **options)))
    found["LoRA"] = _tried(lambda: _adapted(_model(config, lora={"rank": 2}, **options), rows))
    if found["LoRA"] == "exact":
        found["merged"] = _tried(lambda: _merged(_model(config, lora={"rank": 2}, **options)))
    return found


def _rows(config: PreTrainedConfig, documents: list[list[int]], length: int | None = None) -> list[Row]:
    """As the trainer packs them for this model."""
    lengths = Lengths.of(config)
    sizes = np.array([len(document) - 1 for document in documents])
    (bins,) = pack(sizes, sum(LENGTHS), apart=Apart(lengths.apart, lengths.alone_above))
    return [tiny.row([documents[n] for n in row], denominator=4.0, length=length) for row in bins]


def _tried(attempt: Callable[[], None]) -> str:
    try:
        attempt()
    except ModelError as error:
        return f"refused: {error}"
    except Exception as error:  # a traceback in a user's face: what this table is made to find
        return f"FAILS: {type(error).__name__}: {_line(error)}"
    return "exact"


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]


def _model(config: PreTrainedConfig, **options: Any) -> Any:
    torch.manual_seed(0)
    model = load_model(config, param_dtype=FP32.get(config.model_type, torch.float64), **options)
    check_no_leak(model, longest=max(LENGTHS) + 1)
    return model


def _plain(model: Any) -> Any:
    """The same weights in transformers' own hands, its own attention and all."""
    plain = _twin(model)
    plain.load_state_dict(model.state_dict())
    return plain.train()


def _twin(model: Any) -> Any:
    """Of the same class and type, with other weights and transformers' own attention."""
    config = type(model.config).from_dict(model.config.to_dict())
    config._experts_implementation = config.get_text_config()._experts_implementation = "eager"
    # FSDP2 and peft change the class or the modules; what a model was loaded as is named by its architecture.
    return type(model)._from_config(config, dtype=next(model.parameters()).dtype)


def _same(model: Any, rows: Iterable[Row], documents: list[list[int]]) -> None:
    """AssertionError unless loss and gradients are those of each document alone."""
    plain = _plain(model)
    loss = 0.0
    for row in rows:
        part, _ = model.loss(row)
        part.backward()
        loss += part.item()
    expected = 0.0
    for document in documents:
        ids = torch.tensor([document])
        logits = plain(input_ids=ids[:, :-1], use_cache=False).logits[0].double()
        weight = torch.tensor(0.25 / (len(document) - 1), dtype=torch.float32).double()  # as a row holds it
        part = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum") * weight
        part.backward()
        expected += part.item()
    within = WITHIN if plain.dtype == torch.float64 else 1e-4
    assert abs(loss - expected) <= within * abs(expected), f"loss {loss:.9g}, alone {expected:.9g}"
    given = dict(model.named_parameters())
    largest = max(p.grad.abs().max().item() for p in plain.parameters() if p.grad is not None)
    for name, parameter in plain.named_parameters():
        here = given[name].grad
        both = [torch.zeros_like(parameter) if g is None else g for g in (here, parameter.grad)]
        error = (both[0] - both[1]).abs().max().item() / largest
        assert error <= within, f"gradient of {name}: {error:.2g} of the largest"


def _exported(model: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, None, folder)
        config = AutoConfig.from_pretrained(folder)
        config._experts_implementation = config.get_text_config()._experts_implementation = "eager"
        loaded = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=next(model.parameters()).dtype
        )
    expected = _logits(_plain(model))
    torch.testing.assert_close(_logits(loaded), expected, rtol=0, atol=WITHIN * expected.abs().max().item())


def _adapted(model: Any, rows: Iterable[Row]) -> None:
    """Adapters get gradients, nothing else does, and peft's merge of one layer of each kind is ours."""
    for row in rows:
        model.loss(row)[0].backward()
    trained = {
        name: p.grad is not None and bool(p.grad.isfinite().all())
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    assert trained, "nothing is trained"
    assert all("lora_" in name for name in trained), "more than adapters are trained"
    assert any(trained.values()), "no adapter has a gradient"


def _merged(model: Any) -> None:
    """The plain model with our merged weights computes what peft's merged one does."""
    check_merge(model)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.1)
    if model.config.model_type not in FP32:
        model.double()  # adapters are fp32
    plain = _twin(model)
    plain.load_state_dict(merged_state(model, model.state_dict()))
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()
    expected = _logits(model)
    error = (_logits(plain) - expected).abs().max() / expected.abs().max()
    assert error <= ADAPTED, f"merged logits differ by {error:.2g}"


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    ids = torch.tensor([tiny.documents((9,), vocabulary=VOCABULARY)[0]])
    was = model.training
    model.eval()
    try:
        return model(input_ids=ids, use_cache=False).logits
    finally:
        model.train(was)


def page(results: dict[str, Outcome]) -> str:
    """docs/models.md, whole."""
    tried = {kind: found for kind, found in results.items() if "not tried" not in found}
    exact = [kind for kind, found in tried.items() if found["packed"] == "exact"]
    apart = [
        kind for kind, found in tried.items() if found["packed"] != "exact" and found["one a row"] == "exact"
    ]
    refused = [kind for kind in tried if kind not in exact and kind not in apart]
    notes: dict[str, int] = {}
    rest = [column for column in COLUMNS if column not in ("packed", "padded", "one a row")]
    lines = [
        "# Models", "",
        "Which architectures train in packed rows, which one sample a row (`batch.pack: false`), which are refused, in what",
        "words. Made by `make models-matrix`: a tiny random model of each, in fp64, beside plain transformers. A dozen rows",
        "are made again in every CI run, all of them by the slow tests.", "",
        "✓: loss and every gradient are those of each document alone, to 1e-6 of the largest gradient (1e-4 where an",
        "architecture takes no fp64); *tied*: with embeddings tied where they were not, or untied; *exported*: the saved",
        "folder's logits; *merged*: our merged weights beside peft's, within 1e-5.", "",
        f"{len(tried)} architectures: {len(exact)} in packed rows, {len(apart)} one sample a row, {len(refused)} refused.", "",
        "## In packed rows", "",
        "| architecture | " + " | ".join(COLUMNS) + " |", "|---|" + "---|" * len(COLUMNS),
        *(_row(kind, [tried[kind].get(column) for column in COLUMNS], notes) for kind in exact), "",
        "## One sample a row: `batch.pack: false`", "",
        "The error at the start offers it. Layers that carry state from token to token do not know where a document begins,",
        "and some architectures' own code takes neither our attention nor a mask that is ready. Padding is never computed.", "",
        "| architecture | why not packed | one a row | " + " | ".join(rest) + " |", "|---|---|---|" + "---|" * len(rest),
        *(
            _row(f"{kind} | {_reason(tried[kind]['packed'])}", [tried[kind].get(c) for c in ("one a row", *rest)], notes)
            for kind in apart
        ), "",
        "## Refused", "", "| architecture | in these words |", "|---|---|",
        *(f"| {kind} | {_words(tried[kind]['one a row'])} |" for kind in refused), "",
    ]  # fmt: skip
    if notes:
        lines += ["## Notes to the tables", "", *(f"{number}. {text}" for text, number in notes.items()), ""]
    lines += ["## Not tried", "", "No small model of these is known here, or transformers makes none.", ""]
    lines += ["| architecture | why |", "|---|---|"]
    lines += [
        f"| {kind} | {_words(found['not tried'])} |"
        for kind, found in sorted(results.items())
        if "not tried" in found
    ]
    lines.append("")
    return "\n".join(lines)


def _row(name: str, cells: list[str | None], notes: dict[str, int]) -> str:
    marks = [
        "–" if c is None else "✓" if c == "exact" else f"[{notes.setdefault(_words(c), len(notes) + 1)}]"
        for c in cells
    ]
    return f"| {name} | {' | '.join(marks)} |"


# What the error says in brackets → in a table.
_REASONS = {
    "a convolution carries": "a convolution carries tokens into the next document",
    "changes with its neighbours": "state goes from document to document",
    "differs from the document alone": "a document is computed otherwise than alone",
    "its code takes no positions": "its code takes no positions",
    "do not call transformers' attention interface": (
        "its layers do not call transformers' attention interface"
    ),
    "stops at a row without a mask": "its own code needs a mask of its own",
    "not causal by itself": "its layers are causal by their mask alone",
    "place in the row": "attention is scaled by the place in the row",
}


def _reason(words: str) -> str:
    inside = words.partition(" (")[2].partition("); set batch.pack")[0]
    passed = inside.partition(" passes ")[2].partition(", which")[0]
    if passed:
        return f"its attention takes {passed} besides"
    return next((said for part, said in _REASONS.items() if part in inside), inside)


def _words(found: str) -> str:
    return found.removeprefix("refused: ").replace("|", "\\|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", help="architectures; none: all, and the page is written")
    chosen = parser.parse_args().kinds
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for kind in chosen or NAMES:
        results[kind] = outcome(kind)
        print(kind, json.dumps({k: v for k, v in results[kind].items() if v != "exact"}), flush=True)
    with contextlib.suppress(FileNotFoundError):
        RESULTS.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")
    PAGE.write_text(page(results))


if __name__ == "__main__":
    main()
