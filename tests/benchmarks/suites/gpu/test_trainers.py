"""Part E: a rehearsal feeds every goal, numbers mean what they say, what a trainer's process does wrong is
named."""

import importlib.util
import math
import os
import sys
import time

import pytest

from benchmarks.harness import machine
from benchmarks.suites.gpu import trainers
from benchmarks.suites.gpu.goals import Card, Found
from benchmarks.suites.gpu.session import LEFT_OUT, RECORDS, Session, read_lines
from benchmarks.suites.gpu.trainer_jobs import Job

TRL = importlib.util.find_spec("trl") is not None
needs_trl = pytest.mark.skipif(not TRL, reason="trl is not installed")


def session_of(out, left_s=120.0, **more):
    environment = {**machine.environment("cpu"), "run": "r"}
    return Session(
        "E", out, "cpu", more.pop("rehearsal", True), time.monotonic() + left_s, environment, **more
    )


def left_out(session):
    return {line["what"]: line["why"] for line in read_lines(session.out / LEFT_OUT)}


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    session = session_of(tmp_path_factory.mktemp("out"))
    trainers.run(session)
    return session


def by_name(session):
    return {
        (line["implementation"], line["shape"]["model"]): line for line in read_lines(session.out / RECORDS)
    }


class TestRehearsal:
    def test_every_job_leaves_a_record_and_every_goal_reads_one(self, rehearsed):
        made, missing = (
            by_name(rehearsed),
            {job.what for job in trainers.JOBS if job.kind == "trl" and not TRL},
        )
        assert set(made) == {
            (job.implementation, job.model) for job in trainers.JOBS if job.what not in missing
        }
        assert set(left_out(rehearsed)) == missing
        assert all("No module named 'trl'" in why for why in left_out(rehearsed).values())
        found = Found(list(made.values()))
        for goal in trainers.GOALS:
            assert TRL or "TRL" in goal.name or goal.read(found) is not None, goal.name
            assert not TRL or goal.read(found) > 0, goal.name

    def test_rates_are_counts_over_seconds_and_the_updates_fill_the_window(self, rehearsed):
        for (name, _), line in by_name(rehearsed).items():
            assert line["tokens_per_s"] == pytest.approx(line["tokens"] / line["seconds"])
            assert line["updates_per_s"] == pytest.approx(line["updates"] / line["seconds"])
            assert line["tokens_per_update"] == pytest.approx(line["tokens"] / line["updates"])
            assert len(line["rounds_ms"]) == line["updates"] == 9
            assert sum(line["rounds_ms"]) / 1e3 == pytest.approx(line["seconds"], rel=0.02)
            assert line["trained_per_s"] < line["tokens_per_s"] <= line["slots_per_s"]
            assert line["dtype"] == "float32"
            assert math.isfinite(line["first_loss"]), name

    def test_an_update_holds_as_much_for_everybody_and_the_same_samples_where_it_is_one(self, rehearsed):
        made = by_name(rehearsed)
        for model in trainers.SIZES:
            ours, paper = made["ours, one sample", model], made["paper", model]
            assert (ours["samples_per_update"], paper["samples_per_update"]) == (1, 1)
            assert paper["tokens"] - ours["tokens"] == ours["updates"], (
                "ours leaves the last token of each sample out"
            )
            assert ours["trained_per_s"] * ours["seconds"] == pytest.approx(
                paper["trained_per_s"] * paper["seconds"]
            )
            batched = [
                made[name, model]["tokens_per_update"] for name in ("ours", "trl") if (name, model) in made
            ]
            assert all(0.9 * 256 < tokens <= 256 for tokens in batched), batched

    @needs_trl
    def test_what_trl_ran_with_is_said(self, rehearsed):
        line = by_name(rehearsed)["trl", "Qwen3-0.6B"]
        assert (line["attention"], line["leak"], line["tried"]) == ("sdpa", 0.0, [])
        assert line["moved"] > 0
        assert "gradient_checkpointing False" in line["setting"]
        assert "packing_strategy bfd" in line["setting"]
        assert by_name(rehearsed)["trl, bf16 weights", "Qwen3-0.6B"]["weights"] == "bfloat16"

    def test_ratios_divide_the_rates(self):
        def line(implementation, tokens_per_s, model="Qwen3-0.6B"):
            return {
                "op": "trainer",
                "implementation": implementation,
                "shape": {"model": model},
                "tokens_per_s": tokens_per_s,
            }

        goals = {goal.name: goal for goal in trainers.GOALS}
        found = Found(
            [line("ours", 30.0), line("trl", 10.0), line("trl", 1.0, "SmolLM2-135M"), line("paper", 5.0)]
        )
        assert goals["ours / TRL, tokens/s, Qwen3-0.6B"].read(found) == 3.0
        assert goals["ours / the paper's loop, tokens/s, Qwen3-0.6B"].read(found) == 6.0
        assert goals["ours / TRL, tokens/s, SmolLM2-135M"].read(found) is None
        assert goals["ours, tokens/s, Qwen3-0.6B"].predicted(Card("NVIDIA H100 80GB HBM3", {})) == 46_000


# Processes that are no trainers: what they say is scripted by the kind of the job.
FAKE = """
import json, os, sys, time
kind, log = sys.argv[1], sys.argv[2]
if kind == "absent":
    sys.exit(7)
print(json.dumps({"ready": kind}), flush=True)
for line in sys.stdin:
    before = [int(pid) for pid in open(log).read().split()] if os.path.exists(log) else []
    alive = [pid for pid in before if pid != os.getpid() and os.path.exists(f"/proc/{pid}")]
    open(log, "a").write(f"{os.getpid()} ")
    if kind == "dies":
        sys.exit(3)
    if kind == "sleeps":
        time.sleep(60)
    if kind == "raises":
        print(json.dumps({"error": "OutOfMemoryError: no words"}), flush=True)
        continue
    answer = {"seconds": 2.0, "updates": 4, "update_ms": [500.0] * 4, "samples_per_update": 2.0, "samples": 8, "tokens": 80,
              "trained": 40, "slots": 100, "peak_bytes": 5, "losses": [4.0, 3.0, 2.0, 1.0], "weights": "float32",
              "setting": "alone" if not alive else f"beside {alive}"}
    print(json.dumps(answer), flush=True)
"""


class TestProcesses:
    def run(self, monkeypatch, session, jobs):
        log = session.out / "pids"
        monkeypatch.setattr(
            trainers, "command_of", lambda kind, device: [sys.executable, "-c", FAKE, kind, str(log)]
        )
        monkeypatch.setattr(trainers, "JOBS", tuple(jobs))
        trainers.run(session)
        return {line["implementation"]: line for line in read_lines(session.out / RECORDS)}, left_out(session)

    def test_what_goes_wrong_is_named_and_the_next_is_measured(self, monkeypatch, tmp_path):
        names = ("good", "dies", "absent", "sleeps", "raises", "last")
        jobs = [Job(name, "m", 0.5 if name == "sleeps" else 5.0) for name in names]
        made, missing = self.run(monkeypatch, session_of(tmp_path, rehearsal=False), jobs)
        assert list(made) == ["good", "last"]
        assert missing.pop("dies on m") == "its process ended with 3; the log says why"
        assert missing.pop("absent on m") == "its process ended with 7; the log says why"
        assert missing.pop("sleeps on m") == "it was not done after 1 s"
        assert missing.pop("raises on m") == "OutOfMemoryError: no words"
        assert not missing
        assert {line["setting"] for line in made.values()} == {"alone"}, (
            "one process at a time touches the device"
        )
        assert (made["last"]["tokens_per_s"], made["last"]["first_loss"], made["last"]["last_loss"]) == (
            40.0,
            4.0,
            1.0,
        )
        assert made["last"]["loss_fell"] is True
        pids = (tmp_path / "pids").read_text().split()
        assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)

    def test_in_a_rehearsal_a_process_that_ended_is_not_asked_again(self, monkeypatch, tmp_path):
        jobs = [Job("dies", "m", 5), Job("dies", "n", 5), Job("trl", "m", 5)]
        made, missing = self.run(monkeypatch, session_of(tmp_path), jobs)
        assert list(made) == ["trl"], "a process of its own"
        assert missing["dies on n"] == "its process ended with 3; the log says why"

    def test_what_no_longer_fits_is_named_and_what_does_is_measured(self, monkeypatch, tmp_path):
        session = session_of(tmp_path, left_s=30, rehearsal=False)
        made, missing = self.run(monkeypatch, session, [Job("ours", "m", 500), Job("trl", "m", 5)])
        assert list(made) == ["trl"]
        assert list(missing) == ["ours on m"]
        assert missing["ours on m"].startswith("needs about 500 s")

    @pytest.mark.parametrize(
        ("operation", "dtype"), [("head", "float32"), ("train step", "any"), ("attention", "float32")]
    )
    def test_a_red_check_takes_out_ours_and_nobody_else(self, operation, dtype, monkeypatch, tmp_path):
        session = session_of(
            tmp_path, rehearsal=False, red=frozenset({(operation, dtype), ("head", "bfloat16")})
        )
        jobs = [Job(name, "m", 5) for name in ("ours, one sample", "trl", "paper")]
        made, missing = self.run(monkeypatch, session, jobs)
        assert list(made) == ["trl", "paper"]
        assert missing == {"ours, one sample on m": f"the check of {operation} in float32 is red"}

    def test_a_red_check_of_another_dtype_takes_out_nothing(self, monkeypatch, tmp_path):
        session = session_of(
            tmp_path, rehearsal=False, red=frozenset({("head", "bfloat16"), ("state hash", "any")})
        )
        assert list(self.run(monkeypatch, session, [Job("ours", "m", 5)])[0]) == ["ours"]

    def test_a_package_that_cannot_be_imported_is_said(self, monkeypatch, tmp_path):
        (tmp_path / "trl").mkdir()
        (tmp_path / "trl" / "__init__.py").write_text("raise RuntimeError('made for another torch')\n")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        with trainers.processes(session_of(tmp_path), [Job("trl", "Qwen3-0.6B", 5)]) as (process,):
            answer = process.do(Job("trl", "Qwen3-0.6B", 5), session_of(tmp_path))
        assert answer == {
            "error": "trl.trainer.sft_trainer cannot be imported: RuntimeError: made for another torch"
        }
