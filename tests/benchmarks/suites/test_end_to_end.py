"""The CPU form of the comparison: the same trainers, its own records."""

import json
import os
import sys

import pytest
import torch

from benchmarks.harness import records
from benchmarks.suites import end_to_end
from benchmarks.suites.gpu import loops, trainer_jobs
from benchmarks.suites.gpu.loops import Window


class TestOnACpu:
    """`end_to_end`, the CPU form: the same trainers, its own records."""

    def test_a_worker_says_what_the_report_reads(self, monkeypatch, capsys):
        small = {
            **end_to_end.model_config(),
            "hidden_size": 24,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
        }
        monkeypatch.setattr(end_to_end, "model_config", lambda: small)
        monkeypatch.setitem(end_to_end.WORKERS, "paper", (1, 2, loops.run_paper_style))
        threads = str(torch.get_num_threads())
        monkeypatch.setattr(sys, "argv", ["end_to_end", "--worker", "paper", "--threads", threads])
        end_to_end.main()
        line = json.loads(capsys.readouterr().out.splitlines()[-1])
        rows = end_to_end.samples()
        assert line["tokens"] == sum(len(row["input_ids"]) for row in rows[1:3])
        assert line["updates"] == 2
        kept = {}
        monkeypatch.setattr(records, "append", lambda path, made: kept.update({path.name: list(made)}))
        end_to_end._report({name: [line] for name in end_to_end.WORKERS}, 0.0, 3)
        (made,) = kept.values()
        old = records.read(records.FOLDER / "end_to_end.jsonl")[-1]
        assert set(old) - set(made[0]) == set()
        assert {key for line in made for key in line} - set(old) <= {"source", "processor_rounds_ms"}
        assert [line["implementation"] for line in made] == ["ours_batched", "trl", "paper", "ours_single"]
        assert made[0]["shape"] == old["shape"]
        assert made[0]["tokens_per_second"] == pytest.approx(line["tokens"] / line["seconds"])
        cost = 1e6 * line["processor_seconds"] / line["tokens"]
        assert made[0]["processor_rounds_ms"] == [pytest.approx(cost, rel=1e-5)]
        assert {record["threads"] for record in made} == {3}, "a worker's, not this process's"

    def test_some_trainers_alone_are_compared_where_both_of_a_pair_are_there(self, monkeypatch, capsys):
        ran, kept = [], []

        def worker(name, threads):
            ran.append(name)
            if name == "leak":
                return {"leak": 0.0}
            seconds, used = {"ours_batched": (2.0, 2.0), "trl": (5.0, 4.4)}[name]
            rest = {"tokens": 100, "samples_per_update": 1, "peak_bytes": 1}
            return {"seconds": seconds, "processor_seconds": used, **rest}

        monkeypatch.setattr(end_to_end, "_worker", worker)
        monkeypatch.setattr(records, "append", lambda path, made: kept.extend(made))
        words = ["end_to_end", "--only", "ours_batched", "trl", "--rounds", "2", "--threads", "1"]
        monkeypatch.setattr(sys, "argv", words)
        end_to_end.main()
        assert ran == ["ours_batched", "trl", "trl", "ours_batched", "leak"]
        assert [record["implementation"] for record in kept] == ["ours_batched", "trl"]
        said = [line for line in capsys.readouterr().out.splitlines() if " × " in line]
        assert said == [
            "batched / TRL    2.50 × (from 2.50 to 2.50), pair by pair",
            "batched / TRL    2.20 × (from 2.20 to 2.20), pair by pair by processor time",
        ]

    def test_a_run_that_is_left_has_been_measured_and_has_saved_nothing(self, monkeypatch):
        seen = []

        class Kept(loops.tempfile.TemporaryDirectory):
            def __exit__(self, *error):
                seen.extend(os.listdir(os.path.join(self.name, "run")))
                super().__exit__(*error)

        monkeypatch.setattr(loops.tempfile, "TemporaryDirectory", Kept)
        task = trainer_jobs.given("SmolLM2-135M", "cpu", toy=True)
        window = Window("cpu", 3, 9)
        losses = loops.run_ours(task, window, {"tokens": 256}, leave=True)
        assert window.figures()["updates"] == 9
        assert len(losses) == 10, "as many as were read"
        assert "metrics.jsonl" in seen
        assert not any(name.endswith(".safetensors") for name in seen)
