"""Law 12 of the attention: decided by the first process for all ranks, taken again by every resumption or refused."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from repsft_fast.config import Config
from repsft_fast.distributed import World
from repsft_fast.errors import ConfigError, ModelError
from repsft_fast.models import load_model
from repsft_fast.ops import attention_choice, flash
from repsft_fast.rundir import identity
from repsft_fast.state import state_hash
from repsft_fast.training import attention, decided, trainer
from repsft_fast.training.trainer import train
from tests.helpers import ranks, runs

CUDA = torch.device("cuda", 0)


@pytest.fixture
def there(monkeypatch):
    """Packages that can be imported, and those of them that work."""
    found = SimpleNamespace(importable={"flash3", "flash4"}, works={"flash3", "flash4"}, asked=[])
    monkeypatch.setattr(flash, "importable", lambda name: name in found.importable)
    monkeypatch.setattr(flash, "major_of", lambda device: 9 if device.type == "cuda" else None)
    monkeypatch.setattr(flash, "kernels", lambda name, major: SimpleNamespace(name=name))

    def trial(has, device, width):
        found.asked.append((has.name, width))
        return None if has.name in found.works else f"{has.name} gives other results"

    monkeypatch.setattr(attention_choice, "_wrong", trial)
    return found


def model_of(dtype="bfloat16", **changes):
    return load_model({**runs.MODEL, **changes}, device="meta", compute_dtype=dtype)


class Parts:
    def __init__(self, folder, device=CUDA, model=None, **changes):
        self.config = Config.of(runs.settings(folder, **changes))
        self.world = World(0, 1, 0, device)
        self.model = model or model_of()
        self.row_tokens, self.row_lengths, self.cuda_graphs = self.config.batch.row_tokens, None, None

    def decide(self):
        backend, said = attention.decide(self.config, self.world, self.model)
        attention.set_attention(self.model, backend)
        return backend, said


class TestDecided:
    def test_the_fastest_that_works(self, there, tmp_path):
        assert Parts(tmp_path).decide() == ("auto:flash3", [])
        there.works = {"flash4"}
        backend, said = Parts(tmp_path).decide()
        assert backend == "auto:flash4"
        assert said == ["attention: flash3 is installed and is not taken: flash3 gives other results"]
        there.works = set()
        backend, said = Parts(tmp_path).decide()
        assert (backend, len(said)) == ("auto:varlen", 2)

    def test_without_packages_no_gpu_is_asked(self, there, tmp_path, monkeypatch):
        there.importable = set()
        monkeypatch.setattr(flash, "major_of", lambda device: pytest.fail("nobody needs to know"))
        assert Parts(tmp_path).decide() == ("auto:varlen", [])

    def test_the_trial_is_of_the_models_heads(self, there, tmp_path):
        Parts(tmp_path, model=model_of(head_dim=64)).decide()
        assert there.asked == [("flash3", 64)]

    def test_a_soft_cap(self, there, tmp_path):
        model = model_of(head_dim=64)
        model.config.attn_logit_softcapping = 30.0
        there.importable = there.works = {"flash4", "flash2"}
        assert Parts(tmp_path, model=model).decide()[0] == "auto:flash2"

    @pytest.mark.parametrize(
        ("device", "dtype"), [("cpu", "float32"), ("cpu", "bfloat16"), ("cuda", "float32")]
    )
    def test_where_no_kernel_serves(self, device, dtype, there, tmp_path):
        parts = Parts(tmp_path, torch.device(device), model_of(dtype))
        assert parts.decide() == ("sdpa", [])
        assert decided.as_settings(parts).get("model.attention") is None, "left open for another machine"
        assert there.asked == []

    def test_what_is_asked_for_is_what_is_used(self, there, tmp_path):
        assert Parts(tmp_path, model__attention="varlen").decide() == ("varlen", [])
        assert Parts(tmp_path, model__attention="auto:flash4").decide() == ("auto:flash4", [])
        there.works = set()
        with pytest.raises(ModelError, match=r"flash4 gives other results, got flash4; choose auto"):
            Parts(tmp_path, model__attention="flash4").decide()

    def test_rows_of_one_document_are_the_architectures_own(self, there, tmp_path):
        assert Parts(tmp_path, batch__pack=False).decide() == ("auto", [])

    def test_run_yaml_says_it(self, there, tmp_path):
        parts = Parts(tmp_path)
        parts.decide()
        assert decided.as_settings(parts)["model.attention"] == "auto:flash3"
        Config.of(runs.settings(tmp_path, model__attention="auto:flash3"))

    def test_ranks_take_what_all_have(self, tmp_path):
        assert ranks.run_ranks(_decides, str(tmp_path)) == [
            ("auto:flash4", ["attention: flash3 is installed and is not taken: not every rank has it"]),
            ("auto:flash4", []),
        ]


def _decides(world, folder):
    flash.importable = lambda name: name == "flash4" or (name == "flash3" and world.is_main)
    flash.major_of = lambda device: 9
    flash.kernels = lambda name, major: None
    attention_choice._wrong = lambda has, device, width: None
    config = Config.of(runs.settings(Path(folder, str(world.rank))))
    on_cuda = World(world.rank, world.size, 0, CUDA, world.control)
    return attention.decide(config, on_cuda, model_of())


class TestResumed:
    def resumed(self, tmp_path, saved, **changes):
        parts = Parts(tmp_path, **changes)
        parts.decide()
        said = decided.resume(
            parts, {"chunk_bytes": None, **({"choices": {"attention": saved}} if saved else {})}
        )
        return attention.now(parts), [text for text in said if "attention" in text]

    def test_the_same_again_is_no_news(self, there, tmp_path):
        assert self.resumed(tmp_path, "auto:flash3") == ("auto:flash3", [])

    def test_what_the_run_began_with_is_taken(self, there, tmp_path):
        now, (said,) = self.resumed(tmp_path, "auto:varlen")
        assert now == "auto:varlen"
        assert (
            said == "model.attention stays auto:varlen, as the run began; begun now it would be auto:flash3"
        )
        assert self.resumed(tmp_path, "auto:flash4")[0] == "auto:flash4"
        assert self.resumed(tmp_path, "sdpa")[0] == "sdpa"

    @pytest.mark.parametrize("lost", ["importable", "works"])
    def test_what_is_gone_is_refused_with_the_way_out(self, lost, there, tmp_path):
        setattr(there, lost, {"flash4"})
        with pytest.raises(ConfigError, match=r"the run began with auto:flash3, which cannot be had here \(.*; bring it"
                                              r" back, or set model.attention: auto:varlen to go on"):  # fmt: skip
            self.resumed(tmp_path, "auto:flash3")
        now, (said,) = self.resumed(tmp_path, "auto:flash3", model__attention="auto:varlen")
        assert now == "auto:varlen"
        assert "is auto:varlen as asked, and was auto:flash3 before" in said

    def test_on_a_cpu_a_gpus_run_needs_the_setting(self, there, tmp_path):
        with pytest.raises(ConfigError, match=r"set model.attention: sdpa to go on"):
            self.resumed(tmp_path, "auto:varlen", device=torch.device("cpu"), model=model_of("float32"))
        now, _ = self.resumed(
            tmp_path,
            "auto:varlen",
            device=torch.device("cpu"),
            model=model_of("float32"),
            model__attention="sdpa",
        )
        assert now == "sdpa"

    def test_older_versions_took_no_package(self, there, tmp_path):
        now, (said,) = self.resumed(tmp_path, None)
        assert now == "auto:varlen"
        assert "stays auto:varlen" in said
        there.importable = set()
        assert self.resumed(tmp_path, None) == ("auto:varlen", [])

    def test_of_a_later_version(self, there, tmp_path):
        with pytest.raises(ConfigError, match=r"began with auto:flash9, which cannot be had here"):
            self.resumed(tmp_path, "auto:flash9")


def test_it_is_told_once(tmp_path):
    """By its item, not again among the settings that decide bits, whichever version wrote those."""
    config = Config.of(runs.settings(tmp_path, model__attention="sdpa"))
    now = identity.deciders(config, World(0, 1, 0, torch.device("cpu")))
    assert now["model.attention"] == "sdpa", "for versions that look there"
    assert identity.other_deciders({**now, "model.attention": "auto"}, now) is None


def test_a_run_that_is_resumed_keeps_it_bit_for_bit(tmp_path, monkeypatch):
    """On a CPU, by a backend that rounds otherwise than the one it would take."""
    monkeypatch.setattr("repsft_fast.report.pictures.draw", lambda folder, **more: None)
    monkeypatch.setattr(attention, "written", lambda value: None)
    few = {"checkpoint__every_updates": 3, "stop__token_accuracy": None, "budget__epochs": 2}
    weights, finish, takes = {}, trainer.finish, []
    monkeypatch.setattr(attention, "decide", lambda *_: (takes[-1], []))

    def finished(run):
        weights["at the end"] = state_hash(dict(run.parts.model.named_parameters()), {})
        return finish(run)

    def whole(folder, backend, **more):
        takes.append(backend)
        train(runs.settings(folder, **few), **more)
        return weights.pop("at the end")

    def kill(work):
        if work.updates == 5:
            raise RuntimeError("killed")

    monkeypatch.setattr(trainer, "finish", finished)
    expected = whole(tmp_path / "whole", "mask")
    assert whole(tmp_path / "other", "sdpa") != expected, "or the rest would prove nothing"
    with pytest.raises(RuntimeError, match="killed"):
        whole(tmp_path, "mask", on_update=kill)
    assert whole(tmp_path, "sdpa", resume=True) == expected
    notes = [line["text"] for line in runs.metrics(tmp_path, "note") if "model.attention" in line["text"]]
    assert notes == ["--resume: model.attention stays mask, as the run began; begun now it would be sdpa"]


@pytest.mark.parametrize(("device", "says"), [("cpu", "cpu"), ("cuda:0", "cuda:0 · attention auto:flash3")])
def test_the_first_line_says_it(device, says, there, tmp_path):
    parts = Parts(tmp_path, torch.device(device))
    parts.decide()
    assert attention.device_facts(parts) == says
