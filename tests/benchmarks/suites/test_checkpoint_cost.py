"""What a checkpoint costs, rehearsed at a tiny size: every way saves and loads, records are whole, falsehoods
are refused."""

import pytest
import torch

from benchmarks.harness import records
from benchmarks.suites import checkpoint_cost, end_to_end
from repsft_fast import checkpoint
from repsft_fast.errors import CheckpointError

WAYS = {
    "ours": checkpoint_cost.Ours,
    "torch.save": checkpoint_cost.TorchSave,
    "dcp async": checkpoint_cost.DcpAsync,
}
MEASURED = {(f"checkpoint {what}", way) for what in ("stall", "durable", "resume") for way in WAYS} | {
    ("checkpoint resume, unverified", "ours")
}


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """The state of a model of 3,000 parameters; records go to a file of the test's own."""
    plain = checkpoint_cost.made_state
    monkeypatch.setattr(checkpoint_cost, "made_state", lambda: plain(width=12, layers=2, vocabulary=50))
    monkeypatch.setattr(checkpoint_cost, "PATH", tmp_path / "records.jsonl")
    here = {**dict.fromkeys(records.REQUIRED[:7], "here"), "commit": "0" * 40}
    monkeypatch.setattr(checkpoint_cost.machine, "environment", lambda device: here)
    return tmp_path / "records.jsonl"


def test_a_rehearsal_leaves_a_record_of_everything_it_measured(tiny, capsys):
    checkpoint_cost.main(["2", "--record"])
    made = records.read(tiny)
    held = sum(t.numel() * 4 for t in checkpoint_cost.made_state().values())
    assert {(r["op"], r["implementation"]) for r in made} == MEASURED
    assert len(made) == len(MEASURED)
    for record in made:
        assert record["shape"] == {"bytes": held}
        assert len(record["rounds_ms"]) == 2, "the round that warms up is not kept"
        assert record["bytes_per_s"] == pytest.approx(held / (record["p50_ms"] / 1e3))
        assert record["device"] == "here"
    printed = capsys.readouterr().out
    assert f"{held / 1e6:.0f} MB of state, 2 rounds" in printed
    assert all(f"{op.removeprefix('checkpoint '):20s} {way:12s}" in printed for op, way in MEASURED)


def test_without_the_flag_nothing_is_recorded(tiny):
    checkpoint_cost.main(["1"])
    assert not tiny.exists()


@pytest.mark.parametrize("nonsense", [["0"], ["-3"], ["1.5"], ["1e3"], ["two"], ["--recrod"], ["3", "3"]])
def test_nonsense_is_refused_before_anything_is_measured(nonsense, tiny, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint_cost, "measure", None)
    with pytest.raises(SystemExit) as ended:
        checkpoint_cost.main(nonsense)
    assert ended.value.code == 2
    assert nonsense[0] in capsys.readouterr().err
    assert not tiny.exists()


def test_ways_take_turns_and_stalls_are_a_part_of_durable(tiny, tmp_path, monkeypatch):
    order = []
    for way, kind in WAYS.items():
        plain = kind.save
        monkeypatch.setattr(
            kind, "save", lambda self, way=way, plain=plain: (order.append(way), plain(self))[1]
        )
    found = checkpoint_cost.measure(checkpoint_cost.made_state(), tmp_path, 1)
    turn = list(WAYS)
    assert order in ([*turn, *turn[::-1]], [*turn[::-1], *turn])
    for way in WAYS:
        assert all(
            0 < stall <= durable
            for stall, durable in zip(found["stall", way], found["durable", way], strict=True)
        )


@pytest.mark.parametrize("way", WAYS)
def test_a_way_that_loads_something_else_ends_the_measurement(way, tiny, tmp_path, monkeypatch):
    def resume(self):
        for tensor in self.live.values():
            tensor.fill_(1.0)
        return {"resume": 1.0}

    monkeypatch.setattr(WAYS[way], "resume", resume)
    with pytest.raises(RuntimeError, match=f"{way}: what was loaded is not what was saved"):
        checkpoint_cost.measure(checkpoint_cost.made_state(), tmp_path, 1)


def test_a_save_that_failed_is_no_time(tiny, tmp_path):
    ours = checkpoint_cost.Ours(checkpoint_cost.made_state(), tmp_path / "taken")
    ours.folder = tmp_path / "a file" / "and no folder"
    ours.folder.parent.write_text("")
    with pytest.raises(RuntimeError, match="the save failed"):
        ours.save()
    ours.pool.close()


def test_ours_verifies_and_its_other_figure_does_not(tiny, tmp_path):
    live = checkpoint_cost.made_state()
    ours = checkpoint_cost.Ours(live, tmp_path / "ours")
    ours.save()
    ours.pool.close()
    assert ours.resume()["resume"] > 0
    (path,) = (tmp_path / "ours" / "gen-00000000").glob("*.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="is damaged"):
        ours.resume()
    last = list(live)[-1]
    before = live[last].clone()
    assert ours.resume_unverified()["resume, unverified"] > 0
    assert not torch.equal(live[last], before), "the damaged byte was loaded"
    with pytest.raises(CheckpointError, match="is damaged"):
        checkpoint.resume(tmp_path / "ours", live)


class TestShare:
    @pytest.fixture
    def small(self, tiny, monkeypatch):
        config = {
            **end_to_end.model_config(),
            "hidden_size": 24,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
        }
        rows = end_to_end.samples()[:8]
        monkeypatch.setattr(end_to_end, "model_config", lambda: config)
        monkeypatch.setattr(end_to_end, "samples", lambda: rows)
        monkeypatch.setattr(checkpoint_cost, "SHARE_UPDATES", 5)
        monkeypatch.setattr(checkpoint_cost, "SHARE_EVERY", 2)
        return tiny

    def test_whole_runs_leave_two_records(self, small, capsys):
        checkpoint_cost.main(["1", "--share", "--record"])
        made = {r["implementation"]: r for r in records.read(small)}
        assert set(made) == {"with checkpoints", "without"}
        (stall,) = made["with checkpoints"]["stall_share"]
        assert 0 < stall < 1
        assert made["without"]["stall_share"] == []
        for record in made.values():
            assert (record["op"], len(record["rounds_ms"])) == ("checkpointed run", 1)
            assert (record["shape"]["updates"], record["shape"]["every"]) == (5, 2)
        assert "stalls are" in capsys.readouterr().out

    def test_a_run_that_saved_another_number_of_times_is_refused(self, small, monkeypatch, tmp_path):
        import repsft_fast

        plain = repsft_fast.train
        monkeypatch.setattr(
            repsft_fast,
            "train",
            lambda settings, **more: plain(
                {**settings, "checkpoint": {"every_updates": 4, "keep_extendable": False}}, **more
            ),
        )
        with pytest.raises(RuntimeError, match="1 checkpoints were made"):
            checkpoint_cost.run_seconds(tmp_path / "run", 2)
