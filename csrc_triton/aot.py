"""Compile every kernel for sm_80, sm_90 and sm_100 without a GPU and hold it to the committed table.

    python -m csrc_triton.aot             compare with aot_table.json; exit 1 on a difference, a spill or a
                                          narrow access
    python -m csrc_triton.aot --update    rewrite this Triton version's part of the table

Figures are keyed by (triton, arch), because they move between versions: registers, stack, spilled bytes and
shared memory from ptxas' own report, access widths and opcode classes counted in the disassembly. A kernel
module joins by listing `AOT_CASES`.
"""

import argparse
import collections
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import csrc_triton
from csrc_triton.launch import AotCase

ARCHITECTURES = (80, 90, 100)
TABLE = Path(__file__).with_name("aot_table.json")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
CLASSES = {  # opcode class → the opcodes counted in it
    "exponential": r"MUFU\.EX2",
    "other_special": r"MUFU\.(?!EX2)",
    "shuffle": r"SHFL|REDUX",
    "barrier": r"BAR",
    "local_memory": r"LDL|STL",
    "atomic": r"ATOM|ATOMG|RED(?!UX)",
}


def cases() -> list[AotCase]:
    """Every case of every module of this package, in the order of the modules' names."""
    found: list[AotCase] = []
    for module in sorted(pkgutil.iter_modules(csrc_triton.__path__), key=lambda m: m.name):
        if module.name != "aot":
            found += getattr(importlib.import_module(f"csrc_triton.{module.name}"), "AOT_CASES", [])
    return found


def measure(case: AotCase, arch: int) -> dict[str, int]:
    """Compile one case and read its figures."""
    names = case.kernel.arg_names
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in case.divisible}
    signature = {name: case.signature.get(name, "constexpr") for name in names}
    constexprs = {(names.index(name),): value for name, value in case.constexprs.items()}
    compiled = triton.compile(
        ASTSource(case.kernel, signature, constexprs, attributes),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": case.num_warps, "enable_fp_fusion": case.contraction},
    )
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        usage = _tool("cuobjdump", "--dump-resource-usage", str(binary))
        text = _tool("nvdisasm", "-c", "-ndf", str(binary))  # no data flow: no opcode is counted by it
    figures = {"shared_bytes": compiled.metadata.shared}
    for key, label in (("registers", "REG"), ("stack_bytes", "STACK"), ("local_bytes", "LOCAL")):
        match = re.search(rf"\b{label}:(\d+)", usage)
        if match is None:
            raise RuntimeError(f"csrc_triton.aot: {label} is missing from cuobjdump's report: {usage[-300:]}")
        figures[key] = int(match.group(1))
    return figures | opcode_counts(text)


def opcode_counts(disassembly: str) -> dict[str, int]:
    """Instructions in all, global loads and stores by bytes per thread, and the classes above."""
    counts: collections.Counter[str] = collections.Counter(instructions=0)
    for opcode in re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", disassembly):
        if opcode.startswith("NOP"):
            continue
        counts["instructions"] += 1
        access = re.match(r"(LDG|STG)\b", opcode)
        if access:
            width = re.search(r"\.(8|16|32|64|128|256)\b|\.[SU](8|16)\b", opcode)
            size = int(width.group(1) or width.group(2)) // 8 if width else 4
            counts[f"{'load' if access.group(1) == 'LDG' else 'store'}_{size}_bytes"] += 1
        for name, pattern in CLASSES.items():
            counts[name] += bool(re.match(rf"(?:{pattern})\b", opcode))
    return {name: count for name, count in sorted(counts.items()) if count}


def measure_all() -> dict[str, dict[str, dict[str, int]]]:
    """{"sm_90": {case: figures}} for every architecture and case."""
    listed = cases()
    return {f"sm_{arch}": {case.name: measure(case, arch) for case in listed} for arch in ARCHITECTURES}


def problems(table: dict, measured: dict, version: str) -> list[str]:
    """What must not be: spills, narrow accesses, and figures that differ from the committed ones (of the same
    Triton)."""
    return [*_slow_code(measured), *_moved_figures(table.get(version), measured)]


def _slow_code(measured: dict) -> list[str]:
    """What no Triton version may make of a kernel."""
    found = []
    wide = {case.name: {"load": case.load_bytes, "store": case.store_bytes} for case in cases()}
    for arch, by_case in measured.items():
        for name, figures in by_case.items():
            spilled = figures["stack_bytes"] + figures["local_bytes"] + figures.get("local_memory", 0)
            if spilled:
                found.append(f"{arch} {name}: spills to local memory ({figures})")
            for kind in ("load", "store"):
                moved = {
                    int(key.split("_")[1]): count
                    for key, count in figures.items()
                    if key.startswith(f"{kind}_")
                }
                if max(moved, default=0) < wide[name][kind]:
                    found.append(
                        f"{arch} {name}: the widest {kind} is {max(moved, default=0)} bytes, expected"
                        f" {wide[name][kind]}"
                    )
    return found


def _moved_figures(committed: dict | None, measured: dict) -> list[str]:
    """What another Triton may change, and the committed one may not: None is a version without figures."""
    if committed is None:
        return []
    found = []
    for arch in sorted(committed.keys() | measured.keys()):
        ours, theirs = measured.get(arch, {}), committed.get(arch, {})
        for name in sorted(ours.keys() | theirs.keys()):
            if ours.get(name) != theirs.get(name):
                found.append(
                    f"{arch} {name}: committed {theirs.get(name)}, measured {ours.get(name)}; see --update"
                )
    return found


def load_table() -> dict:
    return json.loads(TABLE.read_text()) if TABLE.exists() else {}


def _tool(name: str, *arguments: str) -> str:
    done = subprocess.run([str(TOOLS / name), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"csrc_triton.aot: {name} failed: {done.stderr[-300:]}")
    return done.stdout


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m csrc_triton.aot", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--update", action="store_true", help="rewrite this Triton version's part of the committed table"
    )
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("csrc_triton.aot: TRITON_INTERPRET=1 replaces the compiler; unset it", file=sys.stderr)
        return 2
    table, version, measured = load_table(), triton.__version__, measure_all()
    if options.update:
        table[version] = measured
        TABLE.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    elif version not in table:
        print(
            f"csrc_triton.aot: no committed figures for Triton {version}; only spills and access widths are"
            " checked"
        )
    found = problems(table, measured, version)
    for problem in found:
        print(problem, file=sys.stderr)
    for arch, by_case in measured.items():
        for name, figures in by_case.items():
            print(arch, name, json.dumps(figures))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
