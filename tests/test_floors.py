"""The floors of docs/architecture.md, read from the imports."""

import ast
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BASE = {"errors", "files", "seeded", "row", "stats", "csrc_triton", "hub"}
STORAGE = BASE | {"distributed"}
FLOORS = {
    "errors": set(),
    "files": {"errors"},
    "seeded": set(),
    "row": set(),
    "stats": {"csrc_triton"},
    "csrc_triton": set(),
    "hub": {"errors"},
    "data": STORAGE | {"data"},
    "snapshot": STORAGE | {"state"},
    "checkpoint": STORAGE | {"state", "checkpoint"},
    "state": STORAGE,
    "signals": set(),
    "rundir": STORAGE | {"checkpoint", "config", "data", "models", "report", "rundir"},
    "metrics": STORAGE,
    "throughput": STORAGE,
    "trackers": STORAGE,
    "distributed": STORAGE,
    "policies": {"errors", "policies"},
    "schedule": {"errors"},
    "config": {"errors", "config", "policies"},
    "ops": BASE | {"ops"},
    "models": STORAGE | {"ops", "models"},
    "optim": STORAGE | {"ops", "optim"},
    "evaluate": STORAGE | {"ops", "data", "evaluate"},
    "suite": STORAGE | {"config", "data", "evaluate", "suite"},
    "report": {"errors", "files", "policies", "report"},
    "memory": STORAGE | {"ops", "models", "optim", "snapshot", "memory"},
    "integrations": STORAGE | {"ops", "models", "integrations"},
}
BELOW_TRAINING = set(FLOORS)
FLOORS |= {
    "training": BELOW_TRAINING,
    "sizing": BELOW_TRAINING | {"training"},
    "selftest": BELOW_TRAINING | {"training"},
    "commands": BELOW_TRAINING | {"training", "sizing", "selftest"},
}
# Inside the trainer's room, from the ground up: a file imports from lower floors, and from its own without a circle.
TRAINING = (
    {"parts", "progress", "sizes", "spikes", "graphs", "capture", "static_row"},  # types
    # from settings to them
    {
        "build",
        "samples",
        "attention",
        "chunks",
        "compiled",
        "decided",
        "row_tokens",
        "row_lengths",
        "gathered",
        "graph_shapes",
        "graph_choice",
        "policy",
        "budget",
    },
    {
        "reporter",
        "account",
        "warm_up",
        "step",
        "refusals",
        "snapshots",
        "evaluation",
        "task_evaluation",
        "outcome",
        "probe",
        "garbage",
    },  # what is done with them
    {"conductor"},  # what is decided
    {"saver", "recovery"},  # what outlives an error
    {"run"},  # all of it together
    {"resume", "finish"},  # before the loop and after it
    {"trainer"},  # the loop
)
STANDARD_LIBRARY_ONLY = {"policies", "schedule"}
FORBIDDEN_THIRD_PARTY = {
    "config": {"torch", "numpy", "transformers"},
    "csrc_triton": {"transformers", "numpy"},
}


def modules() -> list[Path]:
    return sorted(p for base in ("repsft_fast", "csrc_triton") for p in (ROOT / base).rglob("*.py"))


def room_of(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    return "csrc_triton" if parts[0] == "csrc_triton" else parts[1].removesuffix(".py")


@functools.cache  # asked for hundreds of times a file
def imports_of(path: Path) -> frozenset[str]:
    """Dotted names of everything imported, also inside functions and under TYPE_CHECKING."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the full name"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(names)


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
        assert ours <= FLOORS[room] | own, (
            f"{path.name} in {room} imports {sorted(ours - FLOORS[room] - own)}"
        )
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


def graph() -> dict[str, set[str]]:
    """Module → the modules of ours that it imports, anywhere in its text."""
    names = {
        ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in modules()
    }
    found: dict[str, set[str]] = {}
    for name, path in names.items():
        asked = {(n if n in names else n.rpartition(".")[0]) for n in imports_of(path)}
        found[name] = (asked & set(names)) - {name}
    return found


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected modules (Tarjan), largest first."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(edges[node]):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(sorted(group))

    for node in sorted(edges):
        if node not in index:
            visit(node)
    return sorted(found, key=len, reverse=True)


def test_no_module_imports_itself_by_a_detour():
    assert circles(graph()) == []


def test_a_detour_is_seen():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]


def test_files_of_the_trainer_import_from_lower_floors():
    files = {p.stem for p in (ROOT / "repsft_fast" / "training").glob("*.py")} - {"__init__"}
    assert sorted(name for floor in TRAINING for name in floor) == sorted(files), "every file has one floor"
    assert len(files) <= 38
    height = {name: number for number, floor in enumerate(TRAINING) for name in floor}
    for name in files:
        for other in graph()[f"repsft_fast.training.{name}"]:
            if other.startswith("repsft_fast.training."):
                below = other.rpartition(".")[2]
                assert height[below] <= height[name], f"{name} imports {below}, which stands above it"


def test_no_import_hides_behind_type_checking():
    hidden = [str(p.relative_to(ROOT)) for p in modules() if "TYPE_CHECKING" in p.read_text(encoding="utf-8")]
    assert not hidden, f"an import for types alone is an import: {hidden}"
