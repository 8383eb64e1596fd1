"""`repsft export RUN`: the model folder out of a checkpoint, bit for bit what the run itself wrote, or a
refusal that helps."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from repsft_fast import checkpoint
from repsft_fast.cli import main
from repsft_fast.commands import export as exporting
from repsft_fast.commands.export import export_model as export
from repsft_fast.errors import CheckpointError, ConfigError, ModelError
from repsft_fast.rundir import made
from repsft_fast.rundir.lock import RunLock
from repsft_fast.training import trainer
from tests.helpers import run_jobs, runs
from tests.helpers.chat_tokenizers import byte_level
from tests.helpers.forkserver import ForkServer
from tests.helpers.ranks import _free_port

LORA = {"rank": 2, "alpha": 8.0}
_OF_THE_RUN = {"run.yaml", "result.json", "metrics.jsonl", "run.png", "timeline.json", "checkpoints"}


def base_model(folder, *, dtype=torch.float32, vocabulary=300, tied=True):
    """A tiny Llama with a chat tokenizer, saved as strangers do."""
    torch.manual_seed(5)
    sizes = {name: value for name, value in runs.MODEL.items() if name != "model_type"}
    config = LlamaConfig(**{**sizes, "vocab_size": vocabulary, "tie_word_embeddings": tied})
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    byte_level().save_pretrained(folder)
    return folder


def chats(folder, count=8):
    file = folder / "chats.jsonl"
    rows = [
        {"prompt": f"{n} and {n}?", "completion": f"it is {2 * n}", "task": f"task{n % 2}"}
        for n in range(count)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def settings(folder, **changes):
    """Four updates with a checkpoint after each."""
    given = {
        "samples": 8,
        "budget__epochs": 2,
        "stop__token_accuracy": None,
        "checkpoint__every_updates": 1,
        **changes,
    }
    return runs.settings(folder, **given)


def chat_settings(folder, base, **changes):
    given = settings(
        folder, data__train=chats(folder), data__task_column="task", batch__row_tokens=256, **changes
    )
    given["model"] = {"path": str(base), **given["model"]}
    del given["model"]["config"]
    return given


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A run with adapters on a base, that was killed: checkpoints of four updates, no result and no model."""
    folder = tmp_path_factory.mktemp("killed")
    base_model(folder / "base")
    trainer.train(chat_settings(folder, folder / "base", model__lora=LORA))
    for file in (folder / "run").iterdir():
        if file.name not in ("run.yaml", "metrics.jsonl", "checkpoints", made.FILE):
            file.unlink()
    return folder


def copied(killed, tmp_path):
    """A copy of the killed run, to be damaged; its base stays where it is."""
    return Path(shutil.copytree(killed / "run", tmp_path / "run"))


def files(folder, without=()):
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return {
        name: data
        for name, data in found.items()
        if name.split("/")[0] not in without and not name.startswith(".")
    }


def newest_hf(run):
    return checkpoint.newest(run / "checkpoints").path / "hf"


class TestEquals:
    """File by file what the run wrote at its end."""

    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"model__lora": LORA},
            {"model__lora": {**LORA, "merge": True}},
            {
                "evaluate__keep": "best",
                "data__validation_fraction": 0.25,
                "evaluate__every_epochs": 0.5,
                "optim__lr": 0.3,
            },
            {"model__param_dtype": "bfloat16", "model__save_dtype": "float32"},
            {
                "tasks": 2,
                "mixture__policy": "msft",
                "data__validation_fraction": 0.25,
                "mixture__max_stages": 2,
            },
            {
                "tasks": 2,
                "mixture__policy": "continual",
                "data__validation_fraction": 0.25,
                "mixture__compute_budget": 1,
            },
        ],
        ids=["full", "adapters", "merged", "best", "bfloat16", "msft", "continual"],
    )
    def test_a_run_with_random_weights(self, changes, tmp_path):
        trainer.train(settings(tmp_path, **changes))
        expected = files(tmp_path / "run", _OF_THE_RUN | {"adapter"})
        export(tmp_path / "run", to=tmp_path / "out")
        assert files(tmp_path / "out") == expected
        assert any(name.endswith(".safetensors") for name in expected)

    def test_a_run_whose_best_is_seen_at_its_very_end(self, tmp_path):
        best = {"evaluate__keep": "best", "data__validation_fraction": 0.25}
        trainer.train(settings(tmp_path, budget__updates=3, budget__epochs=None, **best))
        export(tmp_path / "run", to=tmp_path / "out")
        assert files(tmp_path / "out") == files(tmp_path / "run", _OF_THE_RUN | {"adapter"})

    @pytest.mark.parametrize(
        ("base", "changes"),
        [
            ({"dtype": torch.bfloat16}, {}),
            ({"tied": False}, {"model__save_dtype": "bfloat16"}),
            ({"dtype": torch.float16}, {"model__lora": {**LORA, "merge": True}}),
            (
                {"dtype": torch.bfloat16},
                {"model__lora": {**LORA, "merge": True}, "model__compute_dtype": "bfloat16"},
            ),
            ({"vocabulary": 262}, {"model__resize_vocabulary": True}),
        ],
        ids=["bfloat16", "untied", "merged", "merged-bfloat16", "resized"],
    )
    def test_a_run_from_a_base(self, base, changes, tmp_path):
        base_model(tmp_path / "base", **base)
        trainer.train(chat_settings(tmp_path, tmp_path / "base", **changes))
        expected = files(tmp_path / "run", _OF_THE_RUN | {"adapter"})
        (tmp_path / "chats.jsonl").unlink()
        export(tmp_path / "run", to=tmp_path / "out")
        assert files(tmp_path / "out") == expected
        assert json.loads(expected["generation_config.json"])["eos_token_id"] == [
            2,
            byte_level().convert_tokens_to_ids("<|im_end|>"),
        ] or (
            json.loads(expected["generation_config.json"])["eos_token_id"]
            == byte_level().convert_tokens_to_ids("<|im_end|>")
        )

    def test_into_the_run_that_lost_it(self, tmp_path):
        trainer.train(settings(tmp_path, model__lora={**LORA, "merge": True}))
        before = files(tmp_path / "run")
        (tmp_path / "run" / "model.safetensors").unlink()
        (tmp_path / "run" / "adapter" / "adapter_model.safetensors").write_bytes(b"")
        export(tmp_path / "run")
        assert files(tmp_path / "run") == before
        assert not [name for name in os.listdir(tmp_path / "run") if name.startswith(".writing")]

    def test_a_run_that_was_exported_goes_on_as_if_it_had_not_been(self, tmp_path):
        given = settings(tmp_path)
        trainer.train(given)
        expected = files(tmp_path / "run", {"checkpoints", "metrics.jsonl", "result.json", "run.png"})
        run = tmp_path / "run"
        for file in ("result.json", "model.safetensors", "config.json"):
            (run / file).unlink()
        for number in checkpoint.generations(run / "checkpoints")[1:]:
            shutil.rmtree(run / "checkpoints" / checkpoint.folder_name(number))
        done = export(run)
        assert 0 < done.update < 4
        assert files(run)["model.safetensors"] != expected["model.safetensors"]
        trainer.train(given, resume=True)
        assert files(run, {"checkpoints", "metrics.jsonl", "result.json", "run.png"}) == expected

    @pytest.mark.slow
    def test_two_ranks_exported_on_one(self, tmp_path):
        server = ForkServer(run_jobs.PRELOAD)
        try:
            place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
            given = settings(tmp_path, checkpoint__every_updates=2)
            children = [
                server.spawn(
                    "tests.helpers.run_jobs:train",
                    {"settings": given},
                    {**place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                )
                for rank in range(2)
            ]
            outcomes = [child.wait(90) for child in children]
            assert [outcome.exit_code for outcome in outcomes] == [0, 0], outcomes[0].output
        finally:
            server.close()
        export(tmp_path / "run", to=tmp_path / "out")
        assert files(tmp_path / "out") == files(newest_hf(tmp_path / "run"))


class TestChosen:
    def test_an_older_generation_another_type_and_the_adapters_merged(self, killed, tmp_path):
        run = killed / "run"
        numbers = checkpoint.generations(run / "checkpoints")
        assert len(numbers) >= 2
        done = export(run, to=tmp_path / "old", generation=numbers[0])
        assert (done.generation, done.which) == (numbers[0], "the last")
        assert files(tmp_path / "old") == files(run / "checkpoints" / f"gen-{numbers[0]:08d}" / "hf")
        export(run, to=tmp_path / "merged", merge=True, dtype="bfloat16")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
        assert model.dtype == torch.bfloat16
        base = load_file(killed / "base" / "model.safetensors")
        moved = [
            name
            for name, value in model.state_dict().items()
            if name in base and not torch.equal(value, base[name].bfloat16())
        ]
        assert len(moved) == 14  # the seven linear layers of both

    def test_says_of_which_update_and_where(self, killed, tmp_path, capsys):
        assert main(["export", str(killed / "run"), "--to", str(tmp_path / "out")]) == 0
        printed = capsys.readouterr().out
        newest = checkpoint.newest(killed / "run" / "checkpoints")
        updates = checkpoint.read_manifest(newest.path)
        assert f"the last), from checkpoint {newest.number}: {tmp_path / 'out'}" in printed
        assert updates.generation == newest.number

    def test_a_damaged_generation_is_passed_over_and_named(self, killed, tmp_path):
        run = copied(killed, tmp_path)
        first, last = checkpoint.generations(run / "checkpoints")[-2:]
        shard = run / "checkpoints" / f"gen-{last:08d}" / "state-00000-of-00001.safetensors"
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        shard.write_bytes(data)
        done = export(run, to=tmp_path / "out")
        assert done.generation == first
        assert any(f"gen-{last:08d}" in note and "damaged" in note for note in done.notes)
        with pytest.raises(CheckpointError, match=rf"gen-{last:08d} is damaged; there are others: .*{first}"):
            export(run, to=tmp_path / "again", generation=last)
        assert not (tmp_path / "again").exists()

    def test_a_base_that_was_moved(self, killed, tmp_path):
        run = copied(killed, tmp_path)
        moved = shutil.copytree(killed / "base", tmp_path / "moved")
        text = (run / "run.yaml").read_text()
        (run / "run.yaml").write_text(text.replace(str(killed / "base"), str(tmp_path / "gone")))
        with pytest.raises(ModelError, match=r"--base FOLDER: where .*gen-\d+/hf"):
            export(run, to=tmp_path / "out")
        export(run, to=tmp_path / "out", base=str(moved))
        assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())[
            "base_model_name_or_path"
        ] == str(moved)

    def test_an_archive_that_nobody_can_write_in(self, killed, tmp_path, monkeypatch):
        monkeypatch.setattr(exporting.os, "access", lambda path, mode: False)  # root may write anywhere
        monkeypatch.setattr(exporting, "RunLock", lambda folder: pytest.fail("nothing can be locked here"))
        export(killed / "run", to=tmp_path / "out")
        assert (tmp_path / "out" / "adapter_model.safetensors").exists()

    def test_a_folder_inside_the_runs_is_not_the_runs(self, killed, tmp_path):
        run = copied(killed, tmp_path)
        record = (run / made.FILE).read_text()
        export(run, to=run / "export")
        assert (run / "export" / "adapter_model.safetensors").exists()
        assert (run / made.FILE).read_text() == record

    def test_of_a_run_on_a_gpu_the_base_is_merged_as_it_was_held_there(self, killed):
        config = exporting.Config.of(killed / "run" / "run.yaml")
        path = checkpoint.newest(killed / "run" / "checkpoints").path
        held = [
            {p.dtype for p in exporting._model(config, path, on_gpu=gpu)[0].parameters()}
            for gpu in (False, True)
        ]
        assert held == [{torch.float32}, {torch.float32, torch.bfloat16}]


class TestRefused:
    def refused(self, kind, words, *arguments, **more):
        with pytest.raises(kind) as told:
            export(*arguments, **more)
        assert words in str(told.value), told.value
        return str(told.value)

    def test_what_is_no_run(self, killed, tmp_path):
        self.refused(ConfigError, "there is no such folder", tmp_path / "none")
        self.refused(ConfigError, "is no run's folder", tmp_path)
        for name in ("", "a" * 5000, "a\0b", killed / "run" / "run.yaml"):
            self.refused(ConfigError, "there is no such folder", name)
        self.refused(ConfigError, f"did you mean {killed / 'run'}?", killed / "run" / "checkpoints")

    def test_options_that_cannot_be(self, killed, tmp_path):
        run = killed / "run"
        self.refused(
            ConfigError, "adapters are saved as they are held", run, to=tmp_path / "a", dtype="bfloat16"
        )
        for more in ({"generation": 1}, {"merge": True}, {"merge": True, "dtype": "float16"}):
            self.refused(ConfigError, "give a new folder for another model: --to FOLDER", run, **more)
        self.refused(ConfigError, "there is no such checkpoint", run, to=tmp_path / "a", generation=99)
        assert not (tmp_path / "a").exists()

    def test_merging_what_has_no_adapters(self, tmp_path):
        trainer.train(settings(tmp_path, budget__epochs=1))
        self.refused(
            ConfigError, "there are no adapters to merge", tmp_path / "run", to=tmp_path / "a", merge=True
        )
        self.refused(ConfigError, "the run has no base", tmp_path / "run", to=tmp_path / "a", base="x")

    def test_a_folder_that_is_in_use(self, killed, tmp_path):
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "mine.txt").write_text("mine")
        (tmp_path / "file").write_text("mine")
        (tmp_path / "link").symlink_to(tmp_path / "nowhere")
        self.refused(ConfigError, "is not empty", killed / "run", to=tmp_path / "full")
        self.refused(ConfigError, "is no folder", killed / "run", to=tmp_path / "file")
        self.refused(ConfigError, "cannot be used", killed / "run", to=tmp_path / "file" / "in")
        self.refused(ConfigError, "the run's own folder", killed / "run", to=killed / "run")
        self.refused(
            ConfigError, "which is the run's", killed / "run", to=killed / "run" / "checkpoints" / "mine"
        )
        self.refused(ConfigError, "--to: is empty", killed / "run", to="")
        self.refused(ConfigError, "cannot be used", killed / "run", to="a" * 300)
        assert (tmp_path / "full" / "mine.txt").read_text() == (tmp_path / "file").read_text() == "mine"
        (tmp_path / "empty").mkdir()
        export(killed / "run", to=tmp_path / "empty")

    def test_a_run_that_is_running(self, killed, tmp_path):
        with RunLock(killed / "run"):
            self.refused(ConfigError, "is in use", killed / "run", to=tmp_path / "a")

    def test_a_run_without_a_whole_checkpoint(self, killed, tmp_path):
        run = copied(killed, tmp_path)
        for manifest in (run / "checkpoints").glob("gen-*/MANIFEST.json"):
            manifest.write_text("{}")
        told = self.refused(CheckpointError, "checkpoints is whole", run)
        assert all(path.name in told for path in (run / "checkpoints").glob("gen-*"))
        shutil.rmtree(run / "checkpoints")
        self.refused(ConfigError, "the run has no checkpoint", run)

    @pytest.mark.parametrize("text", [None, "a: [", "model: {config: {model_type: llama}}"])
    def test_settings_that_are_gone_or_damaged(self, text, killed, tmp_path):
        run = copied(killed, tmp_path)
        (run / "run.yaml").unlink()
        if text is not None:
            (run / "run.yaml").write_text(text)
        self.refused(ConfigError, str(newest_hf(run)), run, to=tmp_path / "out")

    @pytest.mark.parametrize("change", ["edited", "swapped", "alpha", "rank"])
    def test_a_base_or_settings_that_are_others(self, change, killed, tmp_path):
        run = copied(killed, tmp_path)
        base = shutil.copytree(killed / "base", tmp_path / "base")
        if change == "edited":
            weights = load_file(base / "model.safetensors")
            weights["model.layers.0.mlp.up_proj.weight"][3, 3] += 1e-3
            save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
        elif change == "swapped":
            shutil.rmtree(base)
            base_model(base, tied=False)
        else:
            text = (run / "run.yaml").read_text()
            old, new = ("alpha: 8.0", "alpha: 16.0") if change == "alpha" else ("rank: 2", "rank: 4")
            assert old in text
            (run / "run.yaml").write_text(text.replace(old, new))
        self.refused(CheckpointError, "is another", run, to=tmp_path / "out", base=str(base))
        assert not (tmp_path / "out").exists()

    def test_an_older_checkpoint_does_not_take_the_place_of_the_end(self, tmp_path):
        trainer.train(settings(tmp_path))
        run = tmp_path / "run"
        before = files(run)
        newest = checkpoint.newest(run / "checkpoints").path
        shutil.rmtree(newest)
        while (left := checkpoint.newest(run / "checkpoints").path) and updates_of(left) == 4:
            shutil.rmtree(left)
        self.refused(ConfigError, "the run ended after update 4", run)
        assert files(run, {"checkpoints"}) == {
            n: d for n, d in before.items() if not n.startswith("checkpoints/")
        }
        export(run, to=tmp_path / "out")

    def test_weights_that_are_not_finite(self, killed, tmp_path):
        run = copied(killed, tmp_path)
        last = checkpoint.newest(run / "checkpoints").path
        manifest = json.loads((last / "MANIFEST.json").read_text())
        assert manifest["format"] == 1
        values = json.loads((last / "values-00000-of-00001.json").read_text())
        held = {name: tensor for name, tensor in tensors_of(last).items()}
        held[next(name for name in held if name.startswith("model/"))].view(-1)[0] = float("nan")
        number = checkpoint.next_generation(run / "checkpoints")
        checkpoint.save(
            run / "checkpoints", number, held, values, parent=last_number(last), identity=manifest["identity"]
        )
        done = export(run, to=tmp_path / "out")
        assert done.generation == last_number(last)
        assert any("NaN" in note for note in done.notes)
        self.refused(CheckpointError, "NaN", run, to=tmp_path / "a", generation=number)


class TestTorn:
    """Whatever fails while the model is written, nothing of it stays and nothing that was there is gone."""

    @pytest.mark.parametrize("to", [True, False], ids=["to", "run"])
    @pytest.mark.parametrize("where", ["save_pretrained", "sync_tree"])
    def test_a_full_disk(self, where, to, killed, tmp_path, monkeypatch):
        run = copied(killed, tmp_path)
        before = files(run)
        real = getattr(exporting, where)

        def full(*arguments, **more):
            real(*arguments, **more)
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(exporting, where, full)
        with pytest.raises(CheckpointError, match=r"No space left on device.*nothing of it is left"):
            export(run, to=tmp_path / "out" if to else None)
        assert files(run) == before
        assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
        assert not [path for path in run.iterdir() if path.name.startswith(".writing")]


def last_number(path):
    return int(path.name.rpartition("-")[2])


def updates_of(path):
    values = json.loads((path / "values-00000-of-00001.json").read_text())
    return values["state"]["progress"]["all_work"]["updates"]


def tensors_of(path):
    return load_file(path / "state-00000-of-00001.safetensors")
