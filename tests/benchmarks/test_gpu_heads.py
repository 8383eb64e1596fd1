"""Parts F, G and H in rehearsal: every goal is fed, operands are what they are called, predictions are the counted floors."""

import pytest
import torch
from gpu_toys import fed, session_at
from interpreter import interpret

from benchmarks import cases, peers
from benchmarks.gpu import goals, heads, row_kernel, rows
from benchmarks.gpu.session import CHECKS, LEFT_OUT, RECORDS, append_line, read_lines
from repsft_fast.ops import functional, products

H100 = goals.Card("NVIDIA H100 80GB HBM3", {"bytes_per_s": 3.0e12, "flops_per_s": 790e12})
PEERS_NOT_HERE = {"Liger default / ours"}  # named as left out where they do not import


class TestHeads:
    def test_every_goal_is_fed_and_absent_peers_are_named(self, tmp_path):
        heads.run(session_at(tmp_path, "F"))
        open_goals = {name for name, value in fed(heads.GOALS, tmp_path).items() if value is None}
        left = {line["what"] for line in read_lines(tmp_path / LEFT_OUT)}
        assert all(any(absent in name for absent in PEERS_NOT_HERE) or "32k" in name for name in open_goals), open_goals
        if open_goals:
            assert any("Liger" in what for what in left)
        found = goals.Found(read_lines(tmp_path / RECORDS)).all(heads.OP, head=heads.LLAMA)
        assert {"ours", heads.BARE, heads.EAGER} <= set(found)
        assert all(record["flops_per_s"] > 0 and record["noise"] for record in found.values())

    def test_a_red_head_measures_nothing_and_says_so(self, tmp_path):
        append_line(tmp_path / CHECKS, {"test": "a", "proves": [["head", "float32"]], "outcome": "failed", "words": "off"})
        heads.run(session_at(tmp_path, "F"))
        assert read_lines(tmp_path / RECORDS) == []
        assert [line["why"] for line in read_lines(tmp_path / LEFT_OUT)] == ["the check of head in float32 is red"]

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
            assert len(functional.chunk_ranges(point.n, point.v, 2, budget)) == 1

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

        wrong = peers.Peer("wrong", lambda: lambda hidden, head, targets: 1.5 * peers.eager(hidden, head, targets))
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


class TestRowKernel:
    def test_every_goal_is_fed_where_the_kernel_runs(self, tmp_path, monkeypatch):
        interpret(monkeypatch, "csrc_triton.cross_entropy")
        row_kernel.run(session_at(tmp_path, "G"))
        assert read_lines(tmp_path / LEFT_OUT) == []
        assert None not in fed(row_kernel.GOALS, tmp_path).values()

    def test_without_the_kernel_what_needs_it_is_named(self, tmp_path):
        row_kernel.run(session_at(tmp_path, "G"))
        assert {line["what"] for line in read_lines(tmp_path / LEFT_OUT)} == {
            "statistics", "head finished in backward", "block candidates",
        }  # fmt: skip
        assert fed(row_kernel.GOALS, tmp_path)["grouped heads as they are / expanded"] > 0

    def test_a_red_check_takes_out_its_points_alone(self, tmp_path):
        append_line(tmp_path / CHECKS, {"test": "a", "proves": [["attention", "float32"]], "outcome": "failed", "words": "off"})
        row_kernel.run(session_at(tmp_path, "G"))
        assert {line["what"]: line["why"] for line in read_lines(tmp_path / LEFT_OUT)}["grouped heads"].endswith("is red")

    def test_a_candidate_block_reaches_the_launcher(self, tmp_path, monkeypatch):
        interpret(monkeypatch, "csrc_triton.cross_entropy")
        import csrc_triton.cross_entropy as module

        seen = []
        real = module.cross_entropy_rows_kernel

        class Seen:
            def __getitem__(self, grid):
                return lambda *a, **k: (seen.append((k["BLOCK_V"], k["num_warps"])), real[grid](*a, **k))[1]

        monkeypatch.setattr(module, "cross_entropy_rows_kernel", Seen())
        row_kernel.candidates(session_at(tmp_path, "G"), heads.INTERPRETED, torch.float32)
        assert {row_kernel.CANDIDATES[0], module.row_block(heads.INTERPRETED.v)} == set(seen)

    def test_grouped_and_expanded_heads_are_the_same_attention(self):
        torch.manual_seed(0)
        q, k, v = torch.randn(32, 4, 8), torch.randn(32, 2, 8), torch.randn(32, 2, 8)
        attend = row_kernel._plain(8)
        expanded = attend(q, k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1))
        assert torch.allclose(attend(q, k, v), expanded, atol=1e-6)

    def test_the_gradient_is_finished_where_it_says(self, monkeypatch):
        interpret(monkeypatch, "csrc_triton.cross_entropy")
        finish, finished = products.Unfinished.finish, []
        monkeypatch.setattr(
            products.Unfinished, "finish", lambda self, scale: (finished.append(scale is None), finish(self, scale))[1]
        )
        calls = row_kernel.finishing_calls("cpu", heads.Point("x", 4, 8, 20), torch.float32)
        for name, call in calls.items():
            finished.clear()
            call()
            assert bool(finished) == ("in backward" in name), name


class TestRows:
    def test_every_goal_is_fed(self, tmp_path, monkeypatch):
        monkeypatch.setattr(rows, "INTERPRETED", heads.Point(heads.LLAMA, 64, 32, 999))
        session = session_at(tmp_path, "H")
        rows.run(session)
        assert [name for name, value in fed(rows.GOALS, tmp_path).items() if value is None] == [
            "90 % masked: ours / bare GEMMs"
        ]

    @pytest.mark.parametrize("share", [0.0, 0.5, 0.8, 0.95])
    def test_memorised_rows_are_below_the_threshold_and_the_others_are_not(self, share):
        hidden, head, targets = cases.head_operands(200, 64, 1000)
        peaked = rows.memorise(hidden, head, targets, share)
        p = (peaked @ head.T).softmax(-1).gather(1, targets[:, None])[:, 0]
        assert int((1 - p < rows.SKIP_BELOW).sum()) == round(share * 200)
        assert rows.guessed(share) >= 1 - share

    def test_masked_operands_have_the_share_asked_for(self):
        _, _, targets = cases.head_operands(200, 8, 100, masked=0.9)
        assert int((targets == peers.IGNORE).sum()) == 180

    def test_a_red_check_of_kept_rows_leaves_the_masked_ones(self, tmp_path, monkeypatch):
        append_line(tmp_path / CHECKS, {"test": "a", "proves": [["kept rows", "any"]], "outcome": "failed", "words": "off"})
        rows.run(session_at(tmp_path, "H"))
        measured = {record["op"] for record in read_lines(tmp_path / RECORDS)}
        assert measured == {rows.MASKED}

    def test_the_prediction_of_skipping_is_between_dense_and_a_perfect_guess(self):
        assert 1.8 < rows._skipped_floor(H100) < 6 / 2.8
