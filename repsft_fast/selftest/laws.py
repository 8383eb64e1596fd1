"""The laws of docs/laws.md as checks on the parts of a real run: this machine, this model, these
samples.

Every check returns a figure and whether the law holds. None of them knows how the others went, and each puts
back what it changed. The tests hold the same laws far more closely, on tiny models; here the question is
whether they hold *here*.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from repsft_fast.checkpoint import load as load_checkpoint
from repsft_fast.checkpoint import save as save_checkpoint
from repsft_fast.checkpoint.manifest import MANIFEST
from repsft_fast.distributed import World, full_tensor
from repsft_fast.errors import RepsftError, SnapshotError
from repsft_fast.models import load_model
from repsft_fast.models.checks import TOLERANCE
from repsft_fast.ops.linear_cross_entropy import linear_cross_entropy
from repsft_fast.ops.reference import linear_cross_entropy_reference
from repsft_fast.report.format import number
from repsft_fast.selftest.passes import (
    gradients_of,
    in_float64,
    losses_of,
    next_updates,
    statistics,
    train,
    without_dropout,
)
from repsft_fast.selftest.syncs import SyncCounter
from repsft_fast.state import RunState, local, state_hash
from repsft_fast.stats import PositionStats
from repsft_fast.training.parts import Parts
from repsft_fast.training.policy import weights_are_enough
from repsft_fast.training.row_lengths import plan_of
from repsft_fast.training.snapshots import Snapshots, closed_list
from repsft_fast.training.step import train_step

# Law 2 in float64. In fp32 plain torch's own gradients of a pretrained model (SmolLM2-135M) are off by 2e-4
# in the norms of its last layers, so where float64 finds no room only the bounds of the start-up check can be
# held.
GRADIENT_ERROR = 1e-12
KERNEL_ERROR, KERNEL_FLOOR = 1.5, 1e-9  # law 3: against plain torch, and against the size of the truth
SMALL_TENSOR = 1e-4  # of the whole gradient's norm: below it a tensor is held to this norm and not to its own
REFERENCE_BYTES = 1 << 31  # law 3 holds this much in float64 at most
REFERENCE_LOGITS = 1 << 24
LOGITS_SPREAD = 3.0  # law 3's logits, by scaling the hidden states: about a trained model's


class Skipped(Exception):
    """A law that cannot be checked here; the message says why."""


@dataclass(frozen=True)
class Found:
    figure: str
    holds: bool


def packed_equals_unpacked(parts: Parts) -> Found:
    """Law 1. Losses of the samples of one row against each sample alone, and with the other samples
    exchanged."""
    if parts.plan.apart.alone_above == 0:
        raise Skipped("batch.pack is false: no samples share a row")
    first, second = (list(update.samples) for update in next_updates(parts, 2))
    with without_dropout(parts.model), torch.no_grad():
        packed = losses_of(parts, first)
        alone = [losses_of(parts, [sample])[0] for sample in first]
        among_others = [
            losses_of(parts, [*second[:n], sample, *second[n + 1 :]])[n] for n, sample in enumerate(first)
        ]
    spread = torch.cat(packed).std().clamp_min(1e-6)
    error = max(
        ((row - other).abs().max() / spread).item()
        for others in (alone, among_others)
        for row, other in zip(packed, others, strict=True)
    )
    bound = TOLERANCE[_computed(parts)]
    return Found(f"differ by {number(error, 2)} of their spread (allowed {bound:g})", error < bound)


def split_does_not_matter(parts: Parts) -> Found:
    """Law 2. Gradients of one update as one row, two, four, and padded, per tensor; in float64 where that
    finds room."""
    update = next_updates(parts, 1)[0]
    ids = list(update.samples)
    cuts = {"2 rows": (ids[::2], ids[1::2]), "4 rows": tuple([i] for i in ids), "a padded row": (ids,)}
    worst, where = 0.0, ""
    with without_dropout(parts.model), in_float64(parts) as exact:
        whole = gradients_of(parts, update, [ids])
        norm = torch.stack([g.norm().double() for g in whole.values()]).norm()
        for name, cut in cuts.items():
            got = gradients_of(parts, update, cut, pad=64 if "padded" in name else 1)
            for tensor, gradient in whole.items():
                size = gradient.norm().double().clamp_min(SMALL_TENSOR * norm)
                error = ((got[tensor] - gradient).norm().double() / size).item()
                if not error <= worst:  # NaN is the worst
                    worst, where = error, f"{tensor}, {name}"
    bound = GRADIENT_ERROR if exact else TOLERANCE[_computed(parts)]
    found = f"relative error {number(worst, 2)} (allowed {bound:g}{' in float64' if exact else ''})"
    return Found(found if worst <= bound else f"{found} in {where}", worst <= bound)


def head_is_as_exact_as_torch(parts: Parts) -> Found:
    """Law 3. The fused head and plain torch in the same type, each against float64: root of the mean square
    error."""
    # The model's own head, or as much of it as float64 finds room for.
    weight = full_tensor(parts.model.get_output_embeddings().weight.detach())
    columns = min(weight.shape[0], REFERENCE_BYTES // (16 * weight.shape[1]))
    head = weight[:columns].to(_computed(parts)).clone()
    hidden, targets = _drawn_for(head)
    cap = parts.model.loss_settings.head.softcap
    _, true_stats, *true_gradients = linear_cross_entropy_reference(
        hidden.double(), head.double(), targets, softcap=cap
    )

    # Both sides by the same way, each on leaves of its own.
    def gradients(loss_of: Callable[[Tensor, Tensor], tuple[Tensor, Any]]) -> tuple[Any, list[Tensor]]:
        leaves = [hidden.clone().requires_grad_(), head.clone().requires_grad_()]
        loss, more = loss_of(*leaves)
        loss.backward()
        return more, [leaf.grad for leaf in leaves if leaf.grad is not None]

    def plain(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        logits = (x @ w.T).float() if x.dtype != torch.float64 else x @ w.T
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        losses = F.cross_entropy(logits, targets, reduction="none")
        return losses.sum(), losses.detach()

    losses, their_gradients = gradients(plain)
    stats, our_gradients = gradients(lambda x, w: linear_cross_entropy(x, w, targets, softcap=cap))

    # Against torch's own error, since what a type can hold is no fault of the head; and against a share of
    # the truth's size, where torch's error happens to be next to none.
    worst, where = 0.0, "nothing"
    for name, ours, theirs, truth in (
        ("loss", stats.loss, losses, true_stats.loss),
        ("hidden gradient", our_gradients[0], their_gradients[0], true_gradients[0]),
        ("head gradient", our_gradients[1], their_gradients[1], true_gradients[1]),
    ):
        allowed = _rms(theirs - truth) + KERNEL_FLOOR / KERNEL_ERROR * _rms(truth)
        ratio = _rms(ours - truth) / allowed
        if not ratio <= worst:  # NaN is the worst
            worst, where = ratio, name
    of = where if columns == weight.shape[0] else f"{where}, first {columns:,} tokens"
    return Found(f"{number(worst, 2)} × torch's error (allowed {KERNEL_ERROR}), {of}", worst <= KERNEL_ERROR)


def _drawn_for(head: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states whose logits spread as a trained model's, and targets, half of them the likeliest."""
    columns = head.shape[0]
    count = min(max(REFERENCE_LOGITS // columns, 64), 4096)
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(count, head.shape[1], generator=draw).to(head.device, head.dtype)
    hidden = hidden * (LOGITS_SPREAD / (hidden @ head.T).float().std().clamp_min(1e-6)).to(head.dtype)
    likely = (hidden @ head.T).argmax(1)
    drawn = torch.randint(columns, (count,), generator=draw).to(likely.device)
    targets = torch.where((torch.rand(count, generator=draw) < 0.5).to(likely.device), likely, drawn)
    return hidden, targets


def snapshots_change_nothing(parts: Parts) -> Found:
    """Law 4. Two updates, then the same two with a snapshot between them. The way back is a plain copy."""
    state = closed_list(parts)
    copies, values = {n: local(t).clone() for n, t in state.tensors().items()}, state.values()
    plain, end = train(parts, 2), _hash(state)
    with torch.no_grad(), state.writing() as live:
        for name, tensor in live.items():
            local(tensor).copy_(copies[name])
    state.load_values(values)
    with _moments(parts, state) as snapshots:
        snapshots.take("start")
        watched = train(parts, 1)
        snapshots.take("between")
        watched += train(parts, 1)
        same = _hash(state) == end
    return _bit_equal(plain == watched and same, plain, watched, same)


def revert_is_as_if_never_left(parts: Parts) -> Found:
    """Law 5. Snapshot, two updates, back, the same two: losses, norms and the hash of the closed list of
    state."""
    state = closed_list(parts)
    with _moments(parts, state) as snapshots:
        snapshots.take("here")
        start = _hash(state)
        first, end = train(parts, 2), _hash(state)
        snapshots.restore("here")
        back = _hash(state) == start
        again = train(parts, 2)
        same = back and _hash(state) == end and end != start
    return _bit_equal(first == again and same, first, again, same)


def no_host_sync(parts: Parts) -> Found:
    """Law 8. Two updates after a first one; the counter sees what would make the host wait for the device.
    What the architecture's own layers wait for (which expert has how many tokens, a RoPE that asks for the
    longest position) is said."""
    if not parts.optimizer.vetoes_on_device:
        raise Skipped(f"{parts.optimizer.name} reads one number per update by its own construction")
    train(parts, 1)
    updates = next_updates(parts, 2)
    with SyncCounter() as counter:
        for update in updates:
            train_step(parts, update)
    parts.ledger.read()
    found = ", ".join(f"{n} × {name}" for name, n in counter.found.items())
    found += f"; {counter.theirs} in the architecture's own layers" if counter.theirs else ""
    figure = f"{counter.total} waits in {len(updates)} updates" + (f": {found}" if found else "")
    return Found(figure, counter.total == counter.theirs)


def every_sample_once(parts: Parts) -> Found:
    """Law 9. Every sample exactly once an epoch, over three epochs, for one rank and two, in long rows and
    short."""
    count = len(parts.data.train.index)
    longest = int(parts.data.train.index.lengths.max())
    wrong = checked = 0
    for ranks in (1, 2):
        for row_tokens in (longest, 4 * longest):
            plan = plan_of(
                parts.config,
                parts.data.train.index,
                World(0, ranks, 0, parts.world.device),
                row_tokens=row_tokens,
            )
            for epoch in range(3):
                rows = [row for update in plan.epoch(0, epoch) for of_rank in update.ranks for row in of_rank]
                seen = np.concatenate([row.samples for row in rows])
                wrong += int((np.bincount(seen, minlength=count) != 1).sum())
                checked += count
    return Found(f"{wrong} of {checked} samples missing or seen twice", wrong == 0)


def no_pickle_is_read(parts: Parts) -> Found:
    """Law 10. A pickle that makes a folder when it is read, in place of every file of a checkpoint and of a
    model."""
    with tempfile.TemporaryDirectory() as name:
        folder, sign = Path(name), Path(name, "was-read")
        attempts = _loads_of_pickles(folder, pickle_that_makes(sign))
        accepted = []
        for file, attempt in attempts.items():
            try:
                attempt()
            except RepsftError:
                continue
            except Exception:  # not refused by us: somebody went as far as to stumble over it
                accepted.append(file)
            else:
                accepted.append(file)
        read = sign.exists()
    figure = f"{len(attempts) - len(accepted)} of {len(attempts)} pickles refused"
    if accepted:
        figure += f", accepted: {', '.join(accepted)}"
    if read:
        figure += ", one was run"
    return Found(figure, not accepted and not read)


def _loads_of_pickles(folder: Path, pickle: bytes) -> dict[str, Callable[[], object]]:
    """By the file in whose place the pickle stands: a call that loads what the file belongs to."""
    attempts: dict[str, Callable[[], object]] = {}
    for file in ("state-00000-of-00001.safetensors", "values-00000-of-00001.json", MANIFEST):
        path = save_checkpoint(folder / file, 0, {"w": torch.zeros(3)}, {"n": 0})
        (path / file).write_bytes(pickle)
        attempts[file] = lambda path=path: load_checkpoint(path, {"w": torch.ones(3)})  # type: ignore[misc]
    model = folder / "model"
    model.mkdir()
    config = '{"model_type": "llama", "hidden_size": 8, "num_attention_heads": 1}'
    (model / "config.json").write_text(config)
    (model / "pytorch_model.bin").write_bytes(pickle)
    attempts["pytorch_model.bin"] = lambda: load_model(model)
    return attempts


def sums_do_not_depend_on_order(parts: Parts) -> Found:
    """Law 11. Sums per sample over the statistics of a real row: in its order, in another, and in two
    parts."""
    ids = [sample for update in next_updates(parts, 2) for sample in update.samples]
    with torch.no_grad():
        owner, stats = statistics(parts, ids)
    count = len(ids)
    order = torch.randperm(len(owner), generator=torch.Generator().manual_seed(1)).to(owner.device)
    half = len(order) // 2

    def part(index: Tensor) -> Any:
        taken = PositionStats(
            **{name: getattr(stats, name)[index] for name in PositionStats.__dataclass_fields__}
        )
        return taken.sum_by(owner[index], count)

    whole = stats.sum_by(owner, count).table
    different = int((part(order).table != whole).sum())
    different += int(((part(order[half:]) + part(order[:half])).table != whole).sum())
    return Found(f"{different} of {2 * whole.numel()} sums differ by a bit", different == 0)


def pickle_that_makes(folder: Path) -> bytes:
    """A pickle, written by hand since nothing here may import the module: reading it calls
    os.mkdir(folder)."""
    name = str(folder).encode()
    return b"\x80\x02cos\nmkdir\nX" + len(name).to_bytes(4, "little") + name + b"\x85R."


def _computed(parts: Parts) -> torch.dtype:
    return parts.model.compute_dtype


def _rms(values: Tensor) -> float:
    return values.double().square().mean().sqrt().item()


def _hash(state: RunState) -> str:
    """Of tensors, streams, schedule and cursor. The work done so far is a fact about the run, which no revert
    undoes."""
    values = state.values()
    cursor = {name: values["progress"][name] for name in ("stage", "epoch", "update", "updates")}
    return state_hash(state.tensors(), {**values, "progress": cursor})


def _bit_equal(holds: bool, first: list, second: list, same: bool) -> Found:
    steps = sum(a == b for a, b in zip(first, second, strict=True))
    return Found(f"{steps} of {len(first)} updates and {'' if same else 'not '}the state hash equal", holds)


@contextmanager
def _moments(parts: Parts, state: RunState) -> Iterator[Snapshots]:
    parts.folder.mkdir(parents=True, exist_ok=True)
    try:
        snapshots = Snapshots(parts, state, 2, weights_only=weights_are_enough(parts.config))
    except SnapshotError as error:
        raise Skipped(str(error)) from error
    try:
        yield snapshots
    finally:
        snapshots.close()
