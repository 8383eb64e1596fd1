"""Parts F, G and H in rehearsal: every goal is fed, operands are what they are called, predictions are the
counted floors."""

import pytest
import torch

from benchmarks.harness import cases, peers
from benchmarks.suites.gpu import goals, heads
from benchmarks.suites.gpu.session import LEFT_OUT, RECORDS, read_lines
from repsft_fast.ops import row_pass
from tests.benchmarks.suites.gpu.toys import fail_check, fed, session_at
from tests.helpers.interpreter import interpret

H100 = goals.Card("NVIDIA H100 80GB HBM3", {"bytes_per_s": 3.0e12, "flops_per_s": 790e12})
PEERS_NOT_HERE = {"Liger default / ours"}  # named as left out where they do not import


class TestHeads:
    def test_every_goal_is_fed_and_absent_peers_are_named(self, tmp_path):
        heads.run(session_at(tmp_path, "F"))
        open_goals = {name for name, value in fed(heads.GOALS, tmp_path).items() if value is None}
        left = {line["what"] for line in read_lines(tmp_path / LEFT_OUT)}
        assert all(
            any(absent in name for absent in PEERS_NOT_HERE) or "32k" in name for name in open_goals
        ), open_goals
        if open_goals:
            assert any("Liger" in what for what in left)
        found = goals.Found(read_lines(tmp_path / RECORDS)).all(heads.OP, head=heads.LLAMA)
        assert {"ours", heads.BARE, heads.EAGER} <= set(found)
        assert all(record["flops_per_s"] > 0 and record["noise"] for record in found.values())

    def test_a_red_head_measures_nothing_and_says_so(self, tmp_path):
        fail_check(tmp_path, "head", "float32")
        heads.run(session_at(tmp_path, "F"))
        assert read_lines(tmp_path / RECORDS) == []
        assert [line["why"] for line in read_lines(tmp_path / LEFT_OUT)] == [
            "the check of head in float32 is red"
        ]

    def test_a_point_that_raises_is_named_and_the_next_is_measured(self, tmp_path, monkeypatch):
        real, calls = heads.measure, []

        def once(session, point, *more, **settings):
            calls.append(point.name)
            if len(calls) == 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return real(session, point, *more, **settings)

        monkeypatch.setattr(heads, "measure", once)
        heads.run(session_at(tmp_path, "F"))
        assert any(line["what"] == f"head {heads.LLAMA}" for line in read_lines(tmp_path / LEFT_OUT))
        assert goals.Found(read_lines(tmp_path / RECORDS)).one(heads.OP, "ours", head=heads.QWEN)

    def test_ours_is_one_chunk(self):
        for point in heads.POINTS:
            budget = heads.one_chunk(point, torch.bfloat16)
            assert len(row_pass.chunk_ranges(point.n, point.v, 2, budget)) == 1

    def test_the_peak_is_compared_with_the_chunk_and_the_head_gradient(self, tmp_path, monkeypatch):
        interpret(monkeypatch, "csrc_triton.cross_entropy")  # the torch path keeps its buffers between calls
        heads.peak(session_at(tmp_path, "F"), heads.Point("x", 24, 32, 2048), torch.float32)
        (record,) = read_lines(tmp_path / RECORDS)
        assert record["allowed_bytes"] == 4 * 24 * 2048 + 4 * 2048 * 32
        assert 0.95 < record["share_of_allowed"] < 1.1

    def test_the_floor_is_the_counted_one(self):
        assert heads.floor_ms(H100, heads.LLAMA) == pytest.approx(32.7 + 2.1, abs=0.1)
        assert heads.floor_ms(goals.Card("x", {}), heads.LLAMA) is None

    def test_peers_that_cannot_run_or_are_wrong_are_named(self, monkeypatch):
        def broken():
            raise ImportError("no such peer")

        wrong = peers.Peer(
            "wrong", lambda: lambda hidden, head, targets: 1.5 * peers.eager(hidden, head, targets)
        )
        fine, other = peers.Peer("fine", lambda: peers.eager), peers.Peer("other", lambda: peers.eager)
        slow = peers.Peer("slow", lambda: peers.eager, compiles=True)
        monkeypatch.setattr(peers, "PEERS", (wrong, fine, slow, peers.Peer("absent", broken), other))
        operands = cases.head_operands(64, 16, 100, masked=0.25)
        calls, reasons = peers.usable(*operands, compiling=False, names=("wrong", "fine", "slow", "absent"))
        assert list(calls) == ["fine"]
        assert "wrong here" in reasons["wrong"]
        assert "no such peer" in reasons["absent"]
        assert "compiles" in reasons["slow"]
        assert set(peers.usable(*operands, compiling=False)[0]) == {"fine", "other"}
