"""Part G in rehearsal: every goal is fed, a candidate block reaches the launcher."""

import torch

from benchmarks.suites.gpu import heads, row_kernel
from benchmarks.suites.gpu.session import LEFT_OUT, read_lines
from repsft_fast.ops import products
from tests.benchmarks.suites.gpu.toys import fail_check, fed, session_at
from tests.helpers import fake_flash
from tests.helpers.interpreter import interpret


class TestRowKernel:
    def test_every_goal_is_fed_where_the_kernel_runs(self, tmp_path, monkeypatch):
        interpret(monkeypatch, "csrc_triton.cross_entropy")
        row_kernel.run(session_at(tmp_path, "G"))
        assert read_lines(tmp_path / LEFT_OUT) == []
        unfed = {name for name, value in fed(row_kernel.GOALS, tmp_path).items() if value is None}
        assert unfed == {"attention, flash3 / varlen", "attention, flash4 / varlen"}, "no package is here"

    def test_without_the_kernel_what_needs_it_is_named(self, tmp_path):
        row_kernel.run(session_at(tmp_path, "G"))
        assert {line["what"] for line in read_lines(tmp_path / LEFT_OUT)} == {
            "statistics", "head finished in backward", "block candidates",
        }  # fmt: skip
        assert fed(row_kernel.GOALS, tmp_path)["grouped heads as they are / expanded"] > 0

    def test_a_red_check_takes_out_its_points_alone(self, tmp_path):
        fail_check(tmp_path, "attention", "float32")
        row_kernel.run(session_at(tmp_path, "G"))
        assert {line["what"]: line["why"] for line in read_lines(tmp_path / LEFT_OUT)}[
            "grouped heads"
        ].endswith("is red")

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
        torch.testing.assert_close(attend(q, k, v), expanded, rtol=0, atol=0)

    def test_packages_that_are_here_are_measured(self, monkeypatch):
        fake_flash.install(monkeypatch, fake_flash.fa3())
        monkeypatch.setattr(
            "repsft_fast.ops.attention_choice.why_not", lambda name, *_: None if name == "flash3" else ""
        )
        q, k, v = (torch.randn(32, heads, 8, requires_grad=True) for heads in (4, 2, 2))
        borders = torch.arange(0, 33, 8, dtype=torch.int32)
        calls = row_kernel.packages(q, k, v, torch.ones_like(q), borders, 8)
        assert list(calls) == ["flash3"]
        calls["flash3"]()
        found = [x.grad for x in (q, k, v)]
        wanted = torch.autograd.grad(row_kernel._plain(8)(q, k, v), (q, k, v), torch.ones_like(q))
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=3e-6)

    def test_the_gradient_is_finished_where_it_says(self, monkeypatch):
        interpret(monkeypatch, "csrc_triton.cross_entropy")
        finish, finished = products.Unfinished.finish, []
        monkeypatch.setattr(
            products.Unfinished,
            "finish",
            lambda self, scale: (finished.append(scale is None), finish(self, scale))[1],
        )
        calls = row_kernel.finishing_calls("cpu", heads.Point("x", 4, 8, 20), torch.float32)
        for name, call in calls.items():
            finished.clear()
            call()
            assert bool(finished) == ("in backward" in name), name
