"""The floors of docs/architecture.md, read from the imports."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BASE = {"errors", "row", "stats", "csrc_triton", "hub"}
STORAGE = BASE | {"distributed"}
FLOORS = {
    "errors": set(),
    "row": set(),
    "stats": set(),
    "csrc_triton": set(),
    "hub": {"errors"},
    "data": STORAGE | {"data"},
    "snapshot": STORAGE | {"state"},
    "checkpoint": STORAGE | {"state", "checkpoint"},
    "state": STORAGE,
    "runlock": STORAGE,
    "metrics": STORAGE,
    "throughput": STORAGE,
    "trackers": STORAGE,
    "distributed": STORAGE,
    "policies": {"errors", "policies"},
    "schedule": {"errors"},
    "config": {"errors", "config"},
    "ops": BASE | {"ops"},
    "models": STORAGE | {"ops", "models"},
    "optim": STORAGE | {"ops"},
    "evaluate": STORAGE | {"ops", "data", "evaluate"},
    "report": {"errors", "report"},
    "integrations": STORAGE | {"ops", "models", "integrations"},
}
STANDARD_LIBRARY_ONLY = {"policies", "schedule"}
FORBIDDEN_THIRD_PARTY = {"config": {"torch", "numpy", "transformers"}, "csrc_triton": {"transformers", "numpy"}}


def modules() -> list[Path]:
    return sorted(p for base in ("repsft_fast", "csrc_triton") for p in (ROOT / base).rglob("*.py"))


def room_of(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    return "csrc_triton" if parts[0] == "csrc_triton" else parts[1].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    """Dotted names of everything imported, also inside functions and under TYPE_CHECKING."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the full name"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_room_imports_only_what_its_floor_allows(path):
    room = room_of(path)
    ours = {
        n.split(".")[1] if n.startswith("repsft_fast.") else "csrc_triton"
        for n in imports_of(path)
        if n.startswith(("repsft_fast.", "csrc_triton"))
    }
    if room in FLOORS:
        own = {room} if (ROOT / "repsft_fast" / room).is_dir() or room == "csrc_triton" else set()
        assert ours <= FLOORS[room] | own, f"{path.name} in {room} imports {sorted(ours - FLOORS[room] - own)}"
    if room in STANDARD_LIBRARY_ONLY:
        import sys

        foreign = {n.split(".")[0] for n in imports_of(path)} - set(sys.stdlib_module_names) - {"repsft_fast"}
        assert not foreign, f"{path.name} in {room} is standard library only, imports {sorted(foreign)}"
    assert not {n.split(".")[0] for n in imports_of(path)} & FORBIDDEN_THIRD_PARTY.get(room, set())


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_under_400_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


def test_every_room_is_on_the_page():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rooms = {room_of(p) for p in modules()} - {"__init__", "__main__", "csrc_triton"}
    missing = sorted(room for room in rooms if f"`{room}`" not in page)
    assert not missing, f"docs/architecture.md names no floor for {missing}"
