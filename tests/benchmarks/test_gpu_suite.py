"""The suite prints no number over a red check, its peaked rows are peaked, and its predictions are the stated floors."""

import re

import pytest
import torch

from benchmarks import cases, checks, gpu_suite, harness, peers, predictions, records
from repsft_fast.ops import functional


def test_a_red_check_prints_no_number(monkeypatch, capsys):
    monkeypatch.setattr(gpu_suite, "red_checks", lambda device: ["head: off"])
    monkeypatch.setattr(gpu_suite.harness, "ceilings", lambda *_, **__: pytest.fail("measured although red"))
    assert gpu_suite.main(["--rehearse"]) == 1
    out = capsys.readouterr().out
    assert "RED head: off" in out
    assert " ms" not in out


def test_checks_are_green_and_see_a_wrong_head(monkeypatch):
    assert checks.red_checks("cpu") == []
    true = peers.ours()
    monkeypatch.setattr(peers, "ours", lambda: lambda *operands: true(*operands) * 1.0001)
    red = checks.red_checks("cpu")
    assert any("hidden gradient" in line for line in red)
    assert any("loss" in line for line in red)


def test_checks_see_an_optimizer_that_differs(monkeypatch):
    import repsft_fast.optim as optim

    real, built = optim.build_optimizer, []

    def second_is_off(*arguments, **settings):
        built.append(1)
        return real(*arguments, **(settings | ({"seed": 2} if len(built) % 2 == 0 else {})))

    monkeypatch.setattr(optim, "build_optimizer", second_is_off)
    assert any("adamw8bit torch.bfloat16" in line for line in checks.red_checks("cpu"))


@pytest.mark.parametrize("share", [0.0, 0.5, 0.8, 0.95])
def test_memorised_rows_are_below_the_threshold_and_the_others_are_not(share):
    hidden, head, targets = cases.head_operands(200, 64, 1000)
    peaked = gpu_suite.memorise(hidden, head, targets, share)
    p = (peaked @ head.T).softmax(-1).gather(1, targets[:, None])[:, 0]
    assert int((1 - p < gpu_suite.SKIP_BELOW).sum()) == round(share * 200)


def test_masked_operands_have_the_share_asked_for():
    _, _, targets = cases.head_operands(200, 8, 100, masked=0.9)
    assert int((targets == peers.IGNORE).sum()) == 180


def test_predictions_are_the_stated_floors():
    dense = predictions.head_ms(8192, 4096, 128256)
    assert dense == pytest.approx(32.7 + 1.47, abs=0.1)
    assert predictions.head_ms(8192, 4096, 128256, masked=0.5) == pytest.approx(dense / 2)
    assert predictions.head_ms(8192, 4096, 128256, memorised=0.8) == pytest.approx(dense * (2 + 4 * 0.2) / 6, rel=0.02)
    assert predictions.adamw8bit_ms(10**9) == pytest.approx(2.33, abs=0.01)
    assert predictions.snapshot_ms(28 * 10**9) == pytest.approx(13, abs=0.1)  # 7B, bf16 weights and 8-bit moments


def test_peers_that_cannot_run_or_are_wrong_are_named(monkeypatch):
    def broken():
        raise ImportError("no such peer")

    wrong = peers.Peer("wrong", lambda: lambda hidden, head, targets: 1.5 * peers.eager(hidden, head, targets))
    fine = peers.Peer("fine", lambda: peers.eager)
    slow = peers.Peer("slow", lambda: peers.eager, compiles=True)
    monkeypatch.setattr(peers, "PEERS", (wrong, fine, slow, peers.Peer("absent", broken)))
    calls, reasons = peers.usable(*cases.head_operands(64, 16, 100, masked=0.25), compiling=False)
    assert list(calls) == ["fine"]
    assert "wrong here" in reasons["wrong"]
    assert "no such peer" in reasons["absent"]
    assert "compiles" in reasons["slow"]


def test_a_point_leaves_a_record_of_every_implementation(capsys):
    sizes = gpu_suite.Sizes({"tiny": (16, 100)}, (32,), 32, 1 << 10, 8, 0.1, 60.0, torch.float32)
    ceilings = {"bytes_per_s": 1e9, "flops_per_s": 1e9}
    session = gpu_suite.Session("cpu", sizes, False, harness.environment("cpu"), ceilings)
    calls, times = gpu_suite._head_point(session, "head", "tiny", (32, 16, 100))
    assert {record["implementation"] for record in session.made} == set(calls) == set(times) - {harness.NOISE_NAME}
    for record in session.made:
        records.check(record)
        assert record["flops_per_s"] > 0
        assert {"noise", "verdict", "ratio", "share_of_flops_per_s"} <= set(record)
    assert "ours" in capsys.readouterr().out


def test_the_deadline_names_what_it_leaves_out():
    sizes = gpu_suite.Sizes({"tiny": (16, 100)}, (32,), 32, 1 << 10, 8, 0.1, 0.0, torch.float32)
    session = gpu_suite.Session("cpu", sizes, False, {}, {})
    gpu_suite.head_grid(session, ["tiny"])
    gpu_suite.snapshots(session)
    assert session.made == []
    assert session.named == [
        "head tiny N=32: left out, the session's time is over",
        "snapshots: left out, the session's time is over",
    ]


def tiny_session():
    sizes = gpu_suite.Sizes({"tiny": (16, 100)}, (32,), 32, 1 << 10, 8, 0.1, 60.0, torch.float32)
    return gpu_suite.Session("cpu", sizes, False, harness.environment("cpu"), {"bytes_per_s": 1e9, "flops_per_s": 1e9})


def test_the_cost_of_statistics_is_measured_where_the_kernel_runs(monkeypatch, capsys):
    from interpreter import interpret

    session = tiny_session()
    gpu_suite.statistics_cost(session)
    assert session.table == []
    assert "statistics cost" in session.named[0]
    interpret(monkeypatch, "csrc_triton.cross_entropy")
    gpu_suite.statistics_cost(session)
    assert [name for name, *_ in session.table] == ["statistics: their cost / our whole head"]
    assert {record["implementation"] for record in session.made} == {"all statistics", "loss only", "whole head"}


def test_every_goal_of_the_table_is_asked_somewhere():
    source = "".join((harness.ROOT / "benchmarks" / f"{name}.py").read_text() for name in ("gpu_suite", "gpu_run"))
    for goal in predictions.PREDICTIONS:
        assert re.sub(r"^N=\d+", "N={n}", goal) in source


def test_the_peak_is_compared_with_the_chunk_and_the_head_gradient():
    functional._local.__dict__.clear()  # buffers kept from other tests would not be seen
    share = gpu_suite._peak_share(tiny_session(), (512, 64, 16384))
    assert 0.85 < share < 1.1  # chunks of equal size do not fill the budget
