"""Every kernel compiled for three architectures without a GPU, against the committed table."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from csrc_triton import aot
from csrc_triton.cross_entropy import AOT_CASES

MEASURE = """
import dataclasses, json
from csrc_triton import aot
from csrc_triton.cross_entropy import AOT_CASES
found = {"sm_90": {case.name: aot.measure(case, 90) for case in aot.cases()}}
for arch in (80, 100):
    found[f"sm_{arch}"] = {case.name: aot.measure(case, arch) for case in aot.cases() if case.name in SOME}
unpadded = dataclasses.replace(AOT_CASES[0], divisible=("logits_ptr",))
print(json.dumps({"found": found, "unpadded": aot.measure(unpadded, 90)}))
"""
BY_KERNEL = {case.kernel.fn: case.name for case in reversed(aot.cases())}
ROWS = "cross_entropy_rows/bf16/block2048"
# Every case is compiled for sm_90, one of each kernel for the others: a third of a second each.
SOME = sorted({*BY_KERNEL.values(), f"{ROWS}/forward", f"{ROWS}/gradient"})


@pytest.fixture(scope="module")
def compiled():
    """In a process of its own: the interpreter, once used, leaves Triton unable to compile."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = str(Path(__file__).parents[2])
    run = subprocess.run(
        [sys.executable, "-c", f"SOME = {SOME}\n{MEASURE}"],
        env=env,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout)


@pytest.fixture
def measured(compiled):
    return compiled["found"]


def test_the_committed_table_holds(measured):
    """A change of a kernel edits the table in the same commit: `python -m csrc_triton.aot --update`."""
    committed = aot.load_table().get(triton.__version__)
    if committed is not None:
        assert committed.keys() == measured.keys()
        assert committed["sm_90"].keys() == committed["sm_80"].keys() == committed["sm_100"].keys()
        for arch in ("sm_80", "sm_100"):
            committed[arch] = {name: committed[arch][name] for name in SOME}
    assert aot.problems({triton.__version__: committed}, measured, triton.__version__) == []


@pytest.mark.slow
def test_the_whole_table_holds():
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "csrc_triton.aot"]
    done = subprocess.run(command, env=env, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_row_kernel_neither_spills_nor_narrows(measured):
    for arch in ("sm_80", "sm_90", "sm_100"):
        for case in (case for case in AOT_CASES if case.name in measured[arch]):
            figures = measured[arch][case.name]
            assert figures["stack_bytes"] == figures["local_bytes"] == figures.get("local_memory", 0) == 0
            assert figures["load_16_bytes"] > 0
            assert ("gradient" in case.name) == (figures.get("store_16_bytes", 0) > 0)


def test_one_exponential_per_logit_and_pass(measured):
    """A thread handles 16 logits of a 2,048-column block on 4 warps; two more per block and row: the
    rescaling, the loss."""
    for arch in measured.values():
        per_thread = 2048 // 128
        assert arch[f"{ROWS}/forward"]["exponential"] == per_thread + 2
        assert arch[f"{ROWS}/gradient"]["exponential"] == 2 * per_thread + 2


@pytest.mark.parametrize("figure", ["registers", "instructions", "shared_bytes"])
def test_a_changed_figure_is_named(measured, figure):
    table = {triton.__version__: copy.deepcopy(measured)}
    table[triton.__version__]["sm_90"][AOT_CASES[0].name][figure] += 1
    found = aot.problems(table, measured, triton.__version__)
    assert len(found) == 1
    assert AOT_CASES[0].name in found[0]


def test_a_vanished_case_is_named(measured):
    less = copy.deepcopy(measured)
    del less["sm_80"][AOT_CASES[1].name]
    assert len(aot.problems({triton.__version__: measured}, less, triton.__version__)) == 1


def test_a_spill_and_a_narrow_access_are_problems_without_a_table(measured):
    bad = copy.deepcopy(measured)
    bad["sm_90"][AOT_CASES[0].name]["stack_bytes"] = 8
    del bad["sm_100"][AOT_CASES[0].name]["load_16_bytes"]
    found = aot.problems({}, bad, "another version")
    assert len(found) == 2
    assert "spills" in found[0] or "spills" in found[1]


def test_forgetting_the_padding_is_seen(compiled):
    """With a row stride that is not a multiple of 16 the compiler must fall back to narrow accesses: the
    check has teeth."""
    assert "load_16_bytes" not in compiled["unpadded"]


def test_opcodes_are_counted_by_width_and_class():
    text = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/                   LDG.E.U16 R4, desc[UR4][R2.64] ;
        /*0030*/                   LDG.E R4, desc[UR4][R2.64] ;
        /*0040*/              @P1  STG.E.64 desc[UR4][R2.64], R4 ;
        /*0050*/                   MUFU.EX2 R0, R1 ;
        /*0060*/                   MUFU.RCP R0, R1 ;
        /*0070*/                   STL [R1], R0 ;
        /*0080*/                   NOP ;
    """
    assert aot.opcode_counts(text) == {
        "instructions": 8, "load_16_bytes": 1, "load_2_bytes": 1, "load_4_bytes": 1, "store_8_bytes": 1,
        "exponential": 1, "other_special": 1, "local_memory": 1,
    }  # fmt: skip


def test_the_command_refuses_the_interpreter(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert aot.main([]) == 2
    assert "unset it" in capsys.readouterr().err


def test_update_writes_what_was_measured(monkeypatch, tmp_path, measured):
    monkeypatch.setattr(aot, "TABLE", tmp_path / "table.json")
    monkeypatch.setattr(aot, "measure_all", lambda: measured)
    assert aot.main(["--update"]) == 0
    assert json.loads(aot.TABLE.read_text()) == {triton.__version__: measured}
    assert aot.main([]) == 0
