"""Going on from a folder of adapters: taken whole, by this model, or refused; on several ranks and after a
resumption too."""

import json
import os
import random
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from repsft_fast.distributed import full_state, shard
from repsft_fast.errors import ModelError
from repsft_fast.models import load_model, save_pretrained
from repsft_fast.models.lora import lora_said
from repsft_fast.training.trainer import train
from tests.helpers import ranks, runs, tiny
from tests.helpers.architectures import tiny_config

POINTER = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 12345\n"
)


def build(kind="llama", **options):
    torch.manual_seed(1)
    return load_model(tiny_config(kind), packed=False, **options)


@pytest.fixture
def trained(tmp_path):
    """(base folder, adapter folder, the adapted model)."""
    build().save_pretrained(tmp_path / "base")
    model = tiny.filled(
        load_model(
            tmp_path / "base", lora={"rank": 2, "alpha": 6.0, "target_modules": ["q_proj", "down_proj"]}
        )
    )
    save_pretrained(model, None, tmp_path / "adapters")
    return tmp_path / "base", tmp_path / "adapters", model


class TestFrom:
    def test_rank_alpha_layers_and_weights_are_the_folders(self, trained):
        base, folder, before = trained
        model = load_model(base, lora={"from": str(folder)})
        assert model.state_dict().keys() == before.state_dict().keys()
        assert all(
            torch.equal(value, before.state_dict()[name]) for name, value in model.state_dict().items()
        )
        layer = model.model.layers[0].mlp.down_proj
        assert (layer.scaling["default"], layer.r["default"]) == (3.0, 2)
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)
        (said,) = lora_said(model)
        assert "goes on from" in said
        assert "rank 2, alpha 6" in said

    def test_the_loss_is_the_one_it_had_and_it_trains(self, trained):
        base, folder, before = trained
        row = tiny.row(tiny.documents((7, 12)))
        model = load_model(base, lora={"from": str(folder)})
        loss = model.loss(row)[0]
        assert torch.equal(loss, before.loss(row)[0])
        loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)

    def test_the_dropout_is_the_settings(self, trained):
        base, folder, _ = trained
        model = load_model(base, lora={"from": str(folder), "dropout": 0.25})
        assert model.model.layers[0].mlp.down_proj.lora_dropout["default"].p == 0.25

    @pytest.mark.parametrize(
        "setting",
        [{"rank": 4}, {"alpha": 7.0}, {"target_modules": ["q_proj"]}],
        ids=lambda given: next(iter(given)),
    )
    def test_settings_that_say_otherwise_are_refused(self, trained, setting):
        base, folder, _ = trained
        with pytest.raises(
            ModelError, match=rf"model\.lora\.{next(iter(setting))}: .*model\.lora\.from.*drop it"
        ):
            load_model(base, lora={"from": str(folder), **setting})

    def test_settings_that_agree_are_not(self, trained):
        base, folder, _ = trained
        load_model(
            base,
            lora={"from": str(folder), "rank": 2, "alpha": 6.0, "target_modules": ["down_proj", "q_proj"]},
        )

    def test_another_base_is_told(self, trained, tmp_path):
        base, folder, _ = trained
        shutil.copytree(base, tmp_path / "other")
        said = " ".join(lora_said(load_model(tmp_path / "other", lora={"from": str(folder)})))
        assert f"trained beside {base}" in said
        assert str(tmp_path / "other") in said

    @pytest.mark.parametrize("change", ["missing", "unexpected", "misspelt", "shape", "nan", "int"])
    def test_weights_are_whole_or_refused(self, trained, change):
        base, folder, _ = trained
        file = folder / "adapter_model.safetensors"
        weights = load_file(file)
        name = sorted(weights)[0]
        match change:
            case "missing":
                del weights[name]
            case "unexpected":
                weights["base_model.model.model.layers.9.mlp.down_proj.lora_A.weight"] = torch.zeros(2, 48)
            case "misspelt":
                weights[name + "s"] = weights.pop(name)
            case "shape":
                weights[name] = weights[name][:1].clone()
            case "nan":
                weights[name][0, 0] = float("nan")
            case "int":
                weights[name] = weights[name].to(torch.int32)
        save_file(weights, file, metadata={"format": "pt"})
        with pytest.raises(ModelError, match=r"model\.lora\.from"):
            load_model(base, lora={"from": str(folder)})

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"use_dora": True}, "use_dora is not understood"),
            ({"bias": "all"}, "bias is not understood"),
            ({"modules_to_save": ["lm_head"]}, "modules_to_save is not understood"),
            ({"something_new": 3}, "something_new is not understood"),
            ({"init_lora_weights": "pissa"}, "base's own weights"),
            ({"peft_type": "IA3"}, "expected peft_type LORA, got IA3"),
            ({"r": 4}, "another shape"),
            ({"r": 0}, "above 0"),
            ({"r": 10**12}, "more than its weights have"),
            ({"r": "2"}, "above 0"),
            ({"r": True}, "above 0"),
            ({"lora_alpha": None}, "above 0"),
            ({"lora_alpha": float("inf")}, "above 0"),
            ({"alpha_pattern": {"q_proj": -1}}, "above 0"),
            ({"rank_pattern": 3}, "no mapping"),
            ({"rank_pattern": {"q_proj": 10**12}}, "more than its weights have"),
            ({"target_modules": "(a+)+$"}, "repeats too much"),
            ({"exclude_modules": ".*.*.*.*.*.*.*.*x"}, "repeats too much"),
            ({"target_modules": ["q_proj"]}, "belong to no layer"),
            ({"target_modules": ["q_proj", "down_proj", "up_proj"]}, "are missing"),
            ({"target_modules": ["nothing"]}, "peft refuses"),
            ({"target_modules": 5}, "neither text nor a list"),
            ({"target_modules": [["q_proj"]]}, "neither text nor a list"),
            ({"rank_pattern": {"(a+)+b": 2}}, "repeats too much"),
            ({"alpha_pattern": {"(": 4}}, "peft refuses: .*unterminated"),
            ({"use_rslora": "no"}, "neither true nor false"),
            ({"layers_to_transform": [7]}, "peft refuses"),
            ({"rank_pattern": {"q_proj": 4}}, "another shape"),
            ({"rank_pattern": {"q_proj": 1}}, "another shape"),
        ],
    )
    def test_settings_of_the_folder(self, trained, change, words):
        base, folder, _ = trained
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
        with pytest.raises(ModelError, match=rf"model\.lora\.(from|target_modules).*({words})"):
            load_model(base, lora={"from": str(folder)})

    @pytest.mark.parametrize("count", [30, pytest.param(300, marks=pytest.mark.slow)])
    def test_a_mutated_folder_is_refused_or_means_the_same(self, trained, count):
        base, folder, before = trained
        file, draw = folder / "adapter_config.json", random.Random(count)
        right = json.loads(file.read_text())
        values = [
            None,
            True,
            "",
            "q_proj",
            -1,
            0,
            3,
            10**18,
            1.5,
            float("nan"),
            [],
            {},
            [1],
            {"a": 1},
            [[[]]],
            "(.*)*",
            "x" * 9999,
        ]
        for _ in range(count):
            wrong = dict(right)
            name = draw.choice([*sorted(wrong), "new"])
            match draw.randrange(3):
                case 0:
                    wrong.pop(name, None)
                case 1:
                    wrong[name + "s"] = wrong.pop(name, 1)
                case 2:
                    wrong[name] = draw.choice(values)
            file.write_text(json.dumps(wrong))
            try:
                model = load_model(base, lora={"from": str(folder)})
            except ModelError:
                continue
            for name, value in model.state_dict().items():
                assert torch.equal(value, before.state_dict()[name]), (name, wrong)
            row = tiny.row(tiny.documents((5,)))
            assert (
                torch.equal(model.loss(row)[0], before.loss(row)[0])
                or wrong.get("lora_alpha") != 6.0
                or (wrong.get("use_rslora") or wrong.get("alpha_pattern"))
            ), wrong

    def test_every_weight_misspelt_dropped_or_reshaped(self, trained):
        base, folder, _ = trained
        file = folder / "adapter_model.safetensors"
        right = load_file(file)
        for name in right:
            for change in ("misspelt", "dropped", "reshaped"):
                wrong = dict(right)
                value = wrong.pop(name)
                if change != "dropped":
                    wrong[name[:-1] if change == "misspelt" else name] = (
                        value if change == "misspelt" else value.T.contiguous()
                    )
                save_file(wrong, file, metadata={"format": "pt"})
                with pytest.raises(ModelError, match=r"model\.lora\.from"):
                    load_model(base, lora={"from": str(folder)})

    def test_what_is_no_folder_of_adapters(self, trained, tmp_path):
        base, folder, _ = trained
        for given, words in (
            (tmp_path / "none", "no such folder"),
            (base, "holds a model, no adapters"),
            (tmp_path, "holds no adapter_config.json"),
        ):
            with pytest.raises(ModelError, match=rf"model\.lora\.from: {words}"):
                load_model(base, lora={"from": str(given)})
        (folder / "adapter_config.json").write_text("[1")
        with pytest.raises(ModelError, match=r"model\.lora\.from adapter_config\.json: is no JSON"):
            load_model(base, lora={"from": str(folder)})
        (folder / "adapter_config.json").write_text("[1]")
        with pytest.raises(ModelError, match=r"adapter_config\.json: holds a list, expected an object"):
            load_model(base, lora={"from": str(folder)})

    @pytest.mark.parametrize(
        ("file", "content", "words"),
        [
            ("adapter_config.json", b'{"a":' * 9000 + b"1" + b"}" * 9000, "nested"),
            ("adapter_config.json", b"", "is empty"),
            ("adapter_config.json", b"null", "holds a NoneType"),
            ("adapter_config.json", b"\xef\xbb\xbf{}", "byte-order mark"),
            ("adapter_config.json", b'{"r": 2, "r": 4}', "r is there twice"),
            ("adapter_config.json", b'{"r": ' + b"9" * 5000 + b"}", "is no JSON"),
            ("adapter_config.json", POINTER, "is a pointer of Git LFS"),
            ("adapter_model.safetensors", POINTER, "is a pointer of Git LFS"),
            ("adapter_model.safetensors", b"<!DOCTYPE html>", "is a web page"),
            ("adapter_model.safetensors", b"", "is empty"),
            ("adapter_model.safetensors", None, "is a named pipe"),
            ("adapter_config.json", None, "is a named pipe"),
        ],
    )
    def test_what_stands_in_place_of_a_file(self, trained, file, content, words):
        base, folder, _ = trained
        (folder / file).unlink()
        if content is None:
            os.mkfifo(folder / file)
        else:
            (folder / file).write_bytes(content)
        with pytest.raises(ModelError, match=rf"model\.lora\.from {re.escape(file)}: .*{words}"):
            load_model(base, lora={"from": str(folder)})

    def test_an_enormous_config(self, trained):
        base, folder, _ = trained
        with open(folder / "adapter_config.json", "r+b") as file:
            file.truncate(1 << 33)  # a hole, no bytes
        with pytest.raises(ModelError, match=r"adapter_config\.json: is too large to be one"):
            load_model(base, lora={"from": str(folder)})

    def test_pickles_are_not_read(self, trained):
        base, folder, _ = trained
        (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
        with pytest.raises(ModelError, match=r"as adapter_model\.bin, a pickle, which is not read"):
            load_model(base, lora={"from": str(folder)})

    def test_damaged_weights(self, trained):
        base, folder, _ = trained
        file = folder / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(
            ModelError, match=r"model\.lora\.from adapter_model\.safetensors: .*fetch it again"
        ):
            load_model(base, lora={"from": str(folder)})

    @pytest.mark.parametrize("kind", ["gpt2", "gpt_oss"])
    def test_transposed_layers_and_experts(self, kind, tmp_path):
        targets = (
            ["all-linear", "experts.down_proj", "experts.gate_up_proj"] if kind == "gpt_oss" else "all-linear"
        )
        before = tiny.filled(build(kind, lora={"rank": 2, "target_modules": targets}))
        save_pretrained(before, None, tmp_path)
        model = build(kind, lora={"from": str(tmp_path), "merge": True})
        found = {name: value for name, value in model.state_dict().items() if ".lora_" in name}
        assert found
        assert all(torch.equal(value, before.state_dict()[name]) for name, value in found.items())


def test_going_on_from_a_run_and_resuming(tmp_path):
    """The second run starts where the first ended; killed and resumed it ends as when it is left alone."""
    base = tmp_path / "base"
    load_model(runs.MODEL).save_pretrained(base)
    changes = {"checkpoint__every_updates": 2}
    lora = {"path": str(base), "lora": {"rank": 2}}
    train(runs.settings(tmp_path / "first", budget__epochs=1, **changes) | {"model": lora})
    first = tmp_path / "first" / "run"
    start = load_file(first / "adapter_model.safetensors")
    assert any(value.abs().max() > 0 for name, value in start.items() if "lora_B" in name)
    lora = {"path": str(base), "lora": {"from": str(first)}}

    def interrupt(work):
        if work.updates >= 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(
            runs.settings(tmp_path / "broken", budget__epochs=1, **changes) | {"model": lora},
            on_update=interrupt,
        )
    train(runs.settings(tmp_path / "broken", budget__epochs=1, **changes) | {"model": lora}, resume=True)
    train(runs.settings(tmp_path / "whole", budget__epochs=1, **changes) | {"model": lora})
    broken, whole = (
        load_file(tmp_path / n / "run" / "adapter_model.safetensors") for n in ("broken", "whole")
    )
    assert whole.keys() == start.keys()
    assert all(torch.equal(broken[name], value) for name, value in whole.items())
    assert not any(torch.equal(start[name], value) for name, value in whole.items())
    losses = [runs.metrics(tmp_path / name, "update")[0]["loss"] for name in ("first", "whole")]
    assert losses[1] < losses[0], "it goes on"


def from_on_ranks(world, base, folder):
    place = "cpu" if world.is_main else "meta"  # rank 0 reads, the other is sent its part
    model = load_model(base, weights_on=place, lora={"from": folder, "merge": True})
    shard(model, world, arriving=True)
    return {name: value.numpy() for name, value in full_state(model, world).items()}


def test_two_ranks_go_on_from_a_folder(trained):
    base, folder, before = trained
    found, _ = ranks.run_ranks(from_on_ranks, str(base), str(folder))
    assert found.keys() == before.state_dict().keys()
    assert all(
        torch.equal(torch.from_numpy(found[name]), value) for name, value in before.state_dict().items()
    )


def wrong_folder_on_ranks(world, base, folder):
    try:
        load_model(base, weights_on="cpu" if world.is_main else "meta", lora={"from": folder})
    except ModelError as error:
        return str(error)
    return "nothing"


def test_every_rank_sees_that_a_folder_is_another_models(trained):
    base, folder, _ = trained
    file = folder / "adapter_model.safetensors"
    save_file(dict(list(load_file(file).items())[1:]), file, metadata={"format": "pt"})
    assert all(
        "1 weights are missing" in said
        for said in ranks.run_ranks(wrong_folder_on_ranks, str(base), str(folder))
    )
