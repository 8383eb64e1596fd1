"""Law 12 of the head's chunks: decided when a run begins, on all ranks alike, and taken from there by every
resumption."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from repsft_fast.config import Config
from repsft_fast.distributed import World
from repsft_fast.models import load_model
from repsft_fast.ops import row_pass
from repsft_fast.optim import masters
from repsft_fast.state import state_hash
from repsft_fast.training import chunks, saver, trainer
from repsft_fast.training.build import build
from repsft_fast.training.chunks import decide
from repsft_fast.training.step import OutOfMemory
from repsft_fast.training.trainer import train
from tests.helpers import ranks, runs

FEW, MANY = 1 << 20, 300  # bytes of logits: all of a row in one chunk, one position a chunk
H100 = 85_017_755_648


@pytest.fixture
def machine(monkeypatch):
    """What the next processes decide, and where they are killed; every run's weights at the end."""

    class Machine:
        decides = FEW
        kill_after = None

        def train(self, folder, *, resume=False, kill_after=None, decides=None, **changes):
            self.decides, self.kill_after = decides, kill_after
            few = {"checkpoint__every_updates": 3, "stop__token_accuracy": None, "budget__epochs": 2}
            settings = runs.settings(folder, **{**few, **changes})
            if kill_after is None:
                assert train(settings, resume=resume).success
                return self.weights
            with pytest.raises(RuntimeError, match="killed"):
                train(settings, resume=resume, on_update=self.after_update)

        def after_update(self, work):
            if work.updates == self.kill_after:
                raise RuntimeError("killed")

    made = Machine()
    plain, finish = chunks.decide, trainer.finish

    def deciding(config, world, model):
        return made.decides if config.loss.chunk_bytes is None else plain(config, world, model)

    def finished(run):
        made.weights = state_hash(dict(run.parts.model.named_parameters()), {})
        return finish(run)

    monkeypatch.setattr(chunks, "decide", deciding)
    monkeypatch.setattr(trainer, "finish", finished)
    monkeypatch.setattr("repsft_fast.report.pictures.draw", lambda folder, **more: None)
    return made


def written(folder):
    return yaml.safe_load((folder / "run" / "run.yaml").read_text())["loss"]["chunk_bytes"]


def saved(folder):
    run = folder / "run" / "checkpoints"
    generation = json.loads((run / "LATEST").read_text())["generation"]
    return json.loads((run / f"gen-{generation:08d}" / "values-00000-of-00001.json").read_text())["decided"][
        "chunk_bytes"
    ]


def said(folder, word="chunk_bytes"):
    return [line["text"] for line in runs.metrics(folder, "note") if word in line["text"]]


def test_the_number_of_chunks_can_be_seen_in_the_weights(machine, tmp_path):
    """Without this the tests below would prove nothing."""
    assert machine.train(tmp_path / "few", decides=FEW) != machine.train(tmp_path / "many", decides=MANY)


@pytest.mark.parametrize(("first", "later"), [(FEW, MANY), (MANY, FEW), (MANY, None)])
def test_a_resumed_run_keeps_what_the_first_process_decided(first, later, machine, tmp_path):
    expected = machine.train(tmp_path / "whole", decides=first)
    assert written(tmp_path / "whole") == first
    machine.train(tmp_path, decides=first, kill_after=5)
    assert (written(tmp_path), saved(tmp_path), said(tmp_path)) == (first, first, [])
    machine.train(tmp_path, decides=later, kill_after=8, resume=True)
    assert (written(tmp_path), saved(tmp_path)) == (first, first)
    assert machine.train(tmp_path, decides=later, resume=True) == expected
    notes = said(tmp_path)
    assert len(notes) == 2
    assert all(
        f"loss.chunk_bytes stays {first:,} bytes" in note and "begun now it would be" in note
        for note in notes
    )


def test_nothing_is_said_where_the_same_is_decided(machine, tmp_path):
    machine.train(tmp_path, decides=MANY, kill_after=5)
    machine.train(tmp_path, decides=MANY, resume=True)
    assert said(tmp_path) == []


def test_a_run_killed_before_its_first_checkpoint_begins_anew_as_it_began(machine, tmp_path):
    expected = machine.train(tmp_path / "whole", decides=MANY)
    machine.train(tmp_path, decides=MANY, kill_after=1)
    machine.train(tmp_path, decides=FEW, kill_after=2, resume=True)
    assert written(tmp_path) == MANY
    assert machine.train(tmp_path, decides=FEW, resume=True) == expected
    assert written(tmp_path) == MANY


@pytest.mark.parametrize("damage", ["", "loss: [", "loss: {chunk_bytes: none at all}"])
def test_a_run_yaml_that_cannot_be_read_is_written_anew(damage, machine, tmp_path):
    machine.train(tmp_path, decides=MANY, kill_after=1)
    (tmp_path / "run" / "run.yaml").write_text(damage)
    machine.train(tmp_path, decides=FEW, resume=True)
    assert written(tmp_path) == FEW


def test_an_edited_run_yaml_does_not_win_over_the_checkpoint(machine, tmp_path):
    expected = machine.train(tmp_path / "whole", decides=MANY)
    machine.train(tmp_path, decides=MANY, kill_after=5)
    path = tmp_path / "run" / "run.yaml"
    path.write_text(path.read_text().replace(f"chunk_bytes: {MANY}", f"chunk_bytes: {FEW}"))
    assert written(tmp_path) == FEW
    assert machine.train(tmp_path, decides=FEW, resume=True) == expected
    assert written(tmp_path) == MANY


def test_one_that_is_asked_for_wins_and_is_said(machine, tmp_path):
    expected = machine.train(tmp_path / "whole", decides=MANY)
    machine.train(tmp_path, decides=MANY, kill_after=5)
    asked = machine.train(
        tmp_path, resume=True, loss__chunk_bytes=FEW, checkpoint__every_updates=2, kill_after=9
    )
    (note,) = said(tmp_path)
    assert f"loss.chunk_bytes is {FEW:,} bytes (1 MiB) as asked, and was {MANY} bytes (300 B)" in note
    assert "will not equal" in note
    assert (written(tmp_path), saved(tmp_path)) == (FEW, FEW)
    asked = machine.train(tmp_path, decides=MANY, resume=True)
    assert (written(tmp_path), asked != expected) == (FEW, True), "from then on it is the run's"


def test_the_same_asked_for_again_is_no_news(machine, tmp_path):
    machine.train(tmp_path, loss__chunk_bytes=MANY, kill_after=5)
    assert (written(tmp_path), saved(tmp_path)) == (MANY, MANY)
    machine.train(tmp_path, loss__chunk_bytes=MANY, resume=True)
    assert said(tmp_path) == []


def test_a_resumption_need_not_ask_again(machine, tmp_path):
    expected = machine.train(tmp_path / "whole", loss__chunk_bytes=MANY)
    machine.train(tmp_path, loss__chunk_bytes=MANY, kill_after=5)
    assert machine.train(tmp_path, resume=True) == expected


def test_a_checkpoint_of_an_older_version_names_none(machine, tmp_path, monkeypatch):
    values = saver.Saver._values
    with monkeypatch.context() as older:
        older.setattr(
            saver.Saver,
            "_values",
            lambda *a, **k: {n: v for n, v in values(*a, **k).items() if n != "decided"},
        )
        machine.train(tmp_path, decides=None, kill_after=5)
        machine.train(tmp_path, decides=None, kill_after=8, resume=True)
        assert said(tmp_path) == [], "by shape, as it was"
        machine.train(tmp_path, decides=MANY, resume=True)
    (note,) = said(tmp_path)
    assert note.endswith(
        f"an older version wrote the checkpoint, which names no loss.chunk_bytes: {MANY} bytes (300 B) from here on"
    )


def test_halved_rows_keep_it(machine, tmp_path, monkeypatch):
    """Memory runs out once: what the retried update is computed with is what the run began with."""
    seen, step = [], trainer.train_step

    def failing(parts, update):
        if parts.lasting.all_work.updates == 2 and parts.lasting.row_tokens is None:
            machine.decides = FEW
            raise OutOfMemory(torch.OutOfMemoryError("out of memory"), torn=False)
        seen.append((parts.lasting.row_tokens, parts.model.loss_settings.chunk_bytes))
        step(parts, update)

    monkeypatch.setattr(trainer, "train_step", failing)
    machine.train(tmp_path, decides=MANY, numbers__on_out_of_memory="retry", batch__samples=8)
    assert {row for row, _ in seen} == {None, 32}
    assert {chunk for _, chunk in seen} == {MANY}


def test_a_cpu_goes_by_shape(tmp_path):
    parts = build(Config.of(runs.settings(tmp_path)))
    assert chunks.now(parts) is None
    train(runs.settings(tmp_path / "run again"))
    assert written(tmp_path / "run again") is None


class TestOnAGpu:
    """The decision itself, with a device that is not there."""

    @pytest.fixture
    def gpu(self, monkeypatch):
        class Gpu:
            free, reserved, allocated, total = 70 * 10**9, 0, 0, H100

        gpu = Gpu()
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda _: type("P", (), {"total_memory": gpu.total})
        )
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (gpu.free, gpu.total))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: gpu.reserved)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: gpu.allocated)
        return gpu

    @pytest.fixture(scope="class")
    def model(self):
        """Llama-3's head on a small body; nothing of it has bytes."""
        shape = {**runs.MODEL, "vocab_size": 128_256, "tie_word_embeddings": False}
        return load_model(shape, device="meta", compute_dtype="bfloat16")

    def decide(self, model, **changes):
        config = Config.of(runs.settings(Path(self.folder), **changes))
        return decide(config, World(0, 1, 0, torch.device("cuda")), model)

    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path):
        self.folder = tmp_path

    @pytest.mark.parametrize(("row_tokens", "at_once"), [(8_192, True), (16_384, True), (32_768, False)])
    def test_one_chunk_where_it_fits(self, row_tokens, at_once, gpu, model):
        """2.1, 4.2 and 8.4 GB of logits against 1/16 of 70 GB, less the gradients."""
        found = self.decide(model, batch__row_tokens=row_tokens)
        assert len(row_pass.chunk_ranges(row_tokens, 128_256, 2, found)) == (1 if at_once else 7)
        assert found == (row_pass.one_chunk_bytes(row_tokens, 128_256, 2) if at_once else H100 // 64)

    def test_how_much_is_free_changes_nothing_while_it_fits(self, gpu, model):
        found = set()
        for gpu.free in (40 * 10**9, 55 * 10**9, 79 * 10**9):
            found.add(self.decide(model, batch__row_tokens=8_192))
        assert len(found) == 1
        gpu.free = 20 * 10**9
        assert self.decide(model, batch__row_tokens=8_192) == H100 // 64

    def test_the_allocators_own_is_free_and_the_gradients_to_come_are_not(self, gpu, model):
        device = torch.device("cuda")
        gradients = sum(4 * p.numel() for p in model.parameters())
        gpu.free, gpu.reserved, gpu.allocated = 10**9, 5 * 10**9, 2 * 10**9
        assert chunks.room_bytes(device, model) == 4 * 10**9 - gradients
        gpu.free, gpu.reserved = 0, gpu.allocated
        assert chunks.room_bytes(device, model) == 0
        frozen = load_model({**runs.MODEL, "vocab_size": 61}, device="meta", lora={"rank": 2})
        gpu.free = 10**9
        adapters = sum(4 * p.numel() for p in frozen.parameters() if p.requires_grad)
        assert chunks.room_bytes(device, frozen) == 10**9 - adapters
        for parameter in frozen.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        assert chunks.room_bytes(device, frozen) == 10**9, "they are there already"
        beside = load_model({**runs.MODEL, "vocab_size": 61}, device="meta", compute_dtype="bfloat16")
        gradients = sum(4 * p.numel() for p in beside.parameters())
        masters.beside(beside)
        assert chunks.room_bytes(device, beside) == 10**9 - gradients, "added up in fp32 beside bf16 weights"

    def test_fp32_logits_are_twice_as_large(self, gpu):
        model = load_model({**runs.MODEL, "vocab_size": 128_256}, device="meta", compute_dtype="float32")
        assert self.decide(model, batch__row_tokens=8_192) == row_pass.one_chunk_bytes(8_192, 128_256, 4)
        assert self.decide(model, batch__row_tokens=16_384) == H100 // 64

    def test_what_is_set_is_what_is_used(self, gpu, model, monkeypatch):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: pytest.fail("nobody needs to know"))
        assert self.decide(model, loss__chunk_bytes="4KiB") == 4096


def test_ranks_decide_alike_by_the_one_with_least(tmp_path):
    found = ranks.run_ranks(_decides, str(tmp_path))
    assert found == [(H100 - 1) // 64] * 2


def _decides(world, folder):
    """Of 50 GB on rank 0 and 20 on rank 1: 2.1 GB of logits are one chunk for the first alone."""
    torch.cuda.get_device_properties = lambda _: type("P", (), {"total_memory": H100 - world.rank})
    chunks.room_bytes = lambda *_: (50 if world.is_main else 20) * 10**9
    model = load_model({**runs.MODEL, "vocab_size": 128_256}, device="meta", compute_dtype="bfloat16")
    config = Config.of(runs.settings(Path(folder, str(world.rank)), batch__row_tokens=8_192))
    return decide(config, World(world.rank, world.size, world.rank, torch.device("cuda")), model)
