"""`repsft selftest`: the laws on the user's own machine, model and data, as a table, in about a minute.

The model is the user's as the settings load it. The data is the first rows of theirs, cut to a few positions
around the first trained token, since a law holds for short samples or not at all. Without settings both are
built in and tiny.
"""

from __future__ import annotations

import gc
import itertools
import json
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from repsft_fast import distributed
from repsft_fast.config import Config
from repsft_fast.data.load import DataSettings, load
from repsft_fast.data.sample import Sample
from repsft_fast.errors import ConfigError, ModelError, RepsftError, describe
from repsft_fast.report import visible
from repsft_fast.report.format import count, size
from repsft_fast.row import IGNORE_INDEX
from repsft_fast.selftest import kill_and_resume, laws
from repsft_fast.selftest.laws import Found, Skipped
from repsft_fast.training.build import build, build_tokenizer, vocabulary_of
from repsft_fast.training.parts import Parts
from repsft_fast.training.samples import written_out
from repsft_fast.training.snapshots import closed_list
from repsft_fast.training.trainer import quiet_libraries

PER_UPDATE, UPDATES_PER_EPOCH = 4, 4
SAMPLES = PER_UPDATE * UPDATES_PER_EPOCH
POSITIONS, FEW_POSITIONS = 32, 16  # longest sample; and of a model of the user's on a CPU
ROWS = 64  # of each source that are read
LARGEST_CHECKPOINT_BYTES = 1 << 29  # of state; law 6 writes five of them, and fsyncs
VOCABULARY = 256
MODEL = {
    "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128, "tie_word_embeddings": True,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

CHECKS: tuple[tuple[int, str, Callable[[Parts], Found]], ...] = (
    (1, "packed = unpacked: losses", laws.packed_equals_unpacked),
    (2, "1, 2, 4 microbatches: gradients", laws.split_does_not_matter),
    (3, "the head against float64", laws.head_is_as_exact_as_torch),
    (4, "with snapshots = without", laws.snapshots_change_nothing),
    (5, "reverted = never left", laws.revert_is_as_if_never_left),
    (8, "no host sync in an update", laws.no_host_sync),
    (9, "every sample once an epoch", laws.every_sample_once),
    (10, "no pickle is read", laws.no_pickle_is_read),
    (11, "sums in any order of rows", laws.sums_do_not_depend_on_order),
)
CRASH = "kill -9 in an epoch, resumed"
LEFT_OUT = "Law 7 (all ranks decide alike) needs several ranks: it is a test of the source tree."


@dataclass(frozen=True)
class Line:
    """One row of the table. holds: None where the law could not be checked, for the reason in `figure`."""

    law: int
    what: str
    figure: str
    holds: bool | None
    seconds: float


@dataclass(frozen=True)
class Outcome:
    lines: tuple[Line, ...]
    sample: str = ""  # how much data the laws were checked on

    @property
    def exit_code(self) -> int:
        return 0 if all(line.holds is not False for line in self.lines) else 1


def selftest(config: Config | None = None) -> Outcome:
    """Check the laws and print the table. Raises ConfigError and DataError for settings and data that cannot
    be used."""
    if (ranks := distributed.rank_from_environment()[1]) > 1:
        raise ConfigError(describe("selftest", "runs in one process", got=f"{ranks} ranks"))
    quiet_libraries()
    console = visible.console()  # an error's words hold names and text that are not ours
    notes: list[str] = []
    with tempfile.TemporaryDirectory(prefix="repsft-selftest-") as name:
        folder = Path(name)
        settings = settings_of(config, folder, notes)
        try:
            checked, sample, state_bytes = _in_this_process(settings, config, console)
        except ModelError as error:  # the start-up check of packing is one of them
            sample = "no sample of the data was reached"
            lines = [Line(1, CHECKS[0][1], str(error), False, 0.0)]
        else:
            _free_memory()
            chosen = _small_enough(settings, state_bytes, folder, notes)
            with console.status(f"law 6: {CRASH}"):
                crash = _line(6, CRASH, lambda: kill_and_resume.killed_and_resumed(chosen, folder / "crash"))
            lines = [*checked, crash]
    outcome = Outcome(tuple(sorted(lines, key=lambda line: line.law)), sample)
    show(outcome, [*notes, LEFT_OUT], console)
    return outcome


def _in_this_process(
    settings: dict[str, Any], config: Config | None, console: Console
) -> tuple[list[Line], str, int]:
    """(the rows of every law but the sixth, how large the sample of the data was, bytes of the run's
    state)."""
    lines = []
    with distributed.lifecycle() as world:
        with console.status("loading"):
            parts = build(Config.of(settings), world=world)
        console.print(_heading(parts, config), style="dim")
        for law, what, check in CHECKS:
            with console.status(f"law {law}: {what}"):
                lines.append(_line(law, what, partial(check, parts)))
    state_bytes = sum(t.numel() * t.element_size() for t in closed_list(parts).tensors().values())
    return lines, _sample(parts, settings, config), state_bytes


def settings_of(config: Config | None, folder: Path, notes: list[str]) -> dict[str, Any]:
    """Settings of a run of a few short updates with this model (None: the built-in one), its data written
    under `folder`."""
    # A run as short as law 6 needs it, deterministic, with nothing that would end it early.
    made: dict[str, Any] = {
        "run": {"folder": str(folder / "run"), "seed": 1, "deterministic": True},
        "model": {"config": MODEL},
        "data": {"train": str(folder / "samples.jsonl"), "cache_folder": str(folder / "cache")},
        "batch": {"samples": PER_UPDATE, "row_tokens": PER_UPDATE * POSITIONS},
        "optim": {"lr": 1e-3, "warmup_fraction": 0.0},
        "schedule": {"name": "constant"},
        "budget": {"updates": kill_and_resume.UPDATES},
        "stop": {"token_accuracy": None},
        "evaluate": {"generate_samples": 0},
        "log": {"every_updates": 1},
        "checkpoint": {"every_updates": kill_and_resume.EVERY},
        "mixture": {"optimizer": "restore"},  # snapshots hold the optimizer too
    }
    if config is None:
        samples = _drawn()
    else:
        tokenizer = build_tokenizer(config)
        samples = _first_samples(config, tokenizer)

        # Theirs is what decides what an update computes: model, rows, optimizer. What is left out is said.
        model = config.model.model_dump()
        if model["compile"] is True or (model["compile"] == "auto" and torch.cuda.is_available()):
            notes.append(
                "model.compile is off here: the laws are about what is computed, and compiling takes minutes."
            )
        if config.loss.skip_below:
            notes.append("loss.skip_below is 0 here: what it leaves out is not rounding.")
        made["model"] = {**model, "compile": False}
        made["tokenizer"] = config.tokenizer.model_dump()
        if tokenizer is not None:  # read once: out of a GGUF file it takes seconds
            tokenizer.save_pretrained(folder / "tokenizer")
            made["tokenizer"]["path"] = str(folder / "tokenizer")
        made["loss"] = {"average": config.loss.average}
        made["batch"] |= {"bucket_tokens": config.batch.bucket_tokens, "pack": config.batch.pack}
        made["optim"] |= {"name": config.optim.name, "lr": config.optim.lr, "max_norm": config.optim.max_norm}
    _write(folder / "samples.jsonl", samples)
    return made


def _longest(config: Config | None) -> int:
    return POSITIONS if config is None or torch.cuda.is_available() else FEW_POSITIONS


def shortened(sample: Sample, positions: int) -> Sample:
    """At most `positions` of it, the first trained token in their middle."""
    first = sample.trained.index(True)
    start = max(0, min(first - positions // 2, len(sample.ids) - positions - 1))
    ids, trained = sample.ids[start : start + positions + 1], sample.trained[start : start + positions + 1]
    return Sample(ids, [False, *trained[1:]], sample.task, 1.0, sample.source)


def show(outcome: Outcome, notes: Iterable[str], console: Console) -> None:
    """The table, what was left out, and the verdict in words."""
    table = Table(
        "law", "checked", "found", "", "seconds", box=None, header_style="dim", title_justify="left"
    )
    table.title, table.title_style = outcome.sample, "dim"
    for line in outcome.lines:
        sign = {True: Text("✓", "green"), False: Text("✗", "bold red"), None: Text("–", "yellow")}[line.holds]
        table.add_row(str(line.law), line.what, visible.one_line(line.figure), sign, f"{line.seconds:.1f}")
    console.print(table)
    for note in notes:
        console.print(visible.one_line(note), style="dim")
    broken = [str(line.law) for line in outcome.lines if line.holds is False]
    unchecked = [str(line.law) for line in outcome.lines if line.holds is None]
    if broken:
        console.print(
            f"Broken here: law {', '.join(broken)}. Do not trust a run on this machine before it is"
            " understood."
        )
    else:
        console.print(f"All {len(outcome.lines) - len(unchecked)} checked laws hold here.")
    if unchecked:
        console.print(f"Not checked: law {', '.join(unchecked)}, for the reason in the table.")


def _line(law: int, what: str, check: Callable[[], Found]) -> Line:
    """The check's row. An error inside it is no proof that the law holds, so it counts as broken, in
    words."""
    started = time.perf_counter()
    holds: bool | None
    try:
        found = check()
        figure, holds = found.figure, found.holds
    except Skipped as reason:
        figure, holds = str(reason), None
    except RepsftError as error:
        figure, holds = str(error), False
    except Exception as error:
        figure, holds = f"{type(error).__name__}: {(str(error).strip() or 'no words').splitlines()[0]}", False
    return Line(law, what, figure, holds, time.perf_counter() - started)


def _heading(parts: Parts, config: Config | None) -> str:
    parameters = sum(p.numel() for p in parts.model.parameters())
    device = torch.cuda.get_device_name(parts.world.device) if parts.world.device.type == "cuda" else "CPU"
    whose = "a built-in model" if config is None else type(parts.model).__name__
    computed = str(parts.model.compute_dtype).removeprefix("torch.")
    return f"{whose}, {count(parameters)} parameters, {computed}, on {device}"


def _sample(parts: Parts, settings: Mapping[str, Any], config: Config | None) -> str:
    """How large the sample is that the laws were checked on. Rows repeated to fill it are said."""
    index = parts.data.train.index
    different = len(set(Path(settings["data"]["train"]).read_text(encoding="utf-8").splitlines()))
    whose = "generated samples" if config is None else f"samples from the first {ROWS} rows of each source"
    repeated = "" if different == len(index) else f", {different} of them different"
    return (
        f"Checked on {len(index)} {whose}{repeated}: {index.lengths.sum()} positions, {index.trained.sum()}"
        f" trained, at most {_longest(config)} a sample."
    )


def _small_enough(
    settings: dict[str, Any], state_bytes: int, folder: Path, notes: list[str]
) -> Mapping[str, Any]:
    """The settings, or those of the built-in model where writing this one's checkpoints would take too long
    or too much."""
    free = shutil.disk_usage(folder).free
    if state_bytes <= LARGEST_CHECKPOINT_BYTES and 6 * state_bytes <= free:
        return settings
    why = (
        "would take minutes"
        if state_bytes > LARGEST_CHECKPOINT_BYTES
        else f"does not fit into the {size(free)} free here"
    )
    notes.append(
        f"Law 6 was checked with the built-in model: writing {size(state_bytes)} of state several times"
        f" {why}."
    )
    return settings_of(None, folder, notes)


def _first_samples(config: Config, tokenizer: Any) -> list[Sample]:
    """The first usable rows of the training data, task after task in turn, shortened; repeated where there
    are too few."""
    data = config.data
    reading = DataSettings(
        format=data.format, train_on=data.train_on, task_column=data.task_column,
        weight_column=data.weight_column, split=data.split,
        ignore_columns=tuple(data.ignore_columns), on_bad_row=data.on_bad_row,
        special_tokens=config.tokenizer.special_tokens, template_kwargs=config.tokenizer.template_kwargs,
    )  # fmt: skip
    vocabulary = vocabulary_of(config, tokenizer)
    loaded = load(written_out(data.train, config), tokenizer, reading, vocab_size=vocabulary, first_rows=ROWS)
    by_task: dict[str, list[Sample]] = {}
    for sample in loaded.samples:
        by_task.setdefault(sample.task, []).append(shortened(sample, _longest(config)))
    turns = itertools.zip_longest(*by_task.values())
    in_turn = [sample for turn in turns for sample in turn if sample is not None]
    return list(itertools.islice(itertools.cycle(in_turn), SAMPLES))


def _drawn() -> list[Sample]:
    draw = random.Random(0)
    made = []
    for number in range(SAMPLES):
        length = draw.randint(POSITIONS // 2, POSITIONS)
        ids = [draw.randrange(3, VOCABULARY) for _ in range(length + 1)]
        made.append(Sample(ids, [n > length // 3 for n in range(length + 1)], f"task{number % 2}"))
    return made


def _write(path: Path, samples: Iterable[Sample]) -> None:
    rows = (
        {
            "input_ids": sample.ids,
            "labels": [
                token if trained else IGNORE_INDEX
                for token, trained in zip(sample.ids, sample.trained, strict=True)
            ],
        }
        for sample in samples
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _free_memory() -> None:
    """The children of law 6 need the device that the checks before it used."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
