"""tests/ mirrors the package: a module's test is found by its name, and what has none of its own by this table."""

import ast
import functools
from pathlib import Path

import pytest

from tests import test_floors

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests"

# What is tested through others: module → the files that die with it, under tests/, by room.
THROUGH = {
    "": {
        "__main__": ["test_cli"],
        "metrics": ["report/test_records", "training/test_reporter"],
        "row": ["data/test_store"],
        "stats": ["laws/test_law11_reproducible_sums"],
        "throughput": ["training/test_trainer_model_kinds", "training/test_msft_report"],
    },
    "checkpoint": {
        "background": ["checkpoint/test_writer"],
        "files": ["hostile/test_checkpoints"],
        "manifest": ["hostile/test_checkpoints"],
        "pieces": ["training/test_trainer_ranks"],
        "reader": ["hostile/test_checkpoints", "checkpoint/test_writer"],
        "retention": ["checkpoint/test_writer"],
        "shards": ["hostile/test_checkpoints", "checkpoint/test_hostsum"],
    },
    "commands": {
        "bench": ["test_cli"],
        "demo": ["commands/test_verbs"],
        "doctor": ["commands/test_verbs"],
        "export_choice": ["commands/test_export"],
        "export_request": ["commands/test_export"],
        "inspect": ["commands/test_verbs"],
        "parser": ["test_cli"],
        "selftest": ["selftest/test_table"],
        "train": ["test_cli"],
    },
    "config": {
        "foreign": ["config/test_coming_from"],
        "foreign_values": ["config/test_coming_from"],
        "model_checks": ["config/test_checks"],
        "model_sections": ["config/test_loading"],
        "names": ["config/test_coming_from"],
        "reference": ["config/test_loading"],
        "section": ["config/test_loading"],
        "sections": ["config/test_loading"],
        "yaml_file": ["hostile/test_settings", "hostile/test_special_files"],
    },
    "data": {
        "arrow": ["data/test_sources", "hostile/test_data"],
        "bad_rows": ["data/test_columns"],
        "block_spans": ["data/test_encode"],
        "bounded": ["hostile/test_template_limits"],
        "cache": ["data/test_load"],
        "card": ["data/test_sources_strange"],
        "column_names": ["data/test_columns"],
        "csv_rows": ["data/test_sources"],
        "draws": ["data/test_plan"],
        "folder_checks": ["data/test_sources"],
        "folder_walk": ["data/test_sources"],
        "folders": ["data/test_sources_strange"],
        "kept": ["data/test_encode"],
        "long_chats": ["data/test_encode"],
        "placeholders": ["data/test_encode"],
        "plain": ["data/test_ends"],
        "planned": ["data/test_plan"],
        "pretokenised": ["data/test_formats"],
        "renders": ["data/test_encode"],
        "sample": ["data/test_inspect"],
        "sample_builder": ["data/test_load"],
        "settings": ["data/test_load"],
        "source": ["data/test_sources"],
        "spans": ["data/test_encode"],
        "split_names": ["data/test_sources"],
        "text_rows": ["hostile/test_data"],
        "turn_names": ["data/test_turns"],
    },
    "distributed": {
        "handshake": ["distributed/test_meeting"],
        "hub": ["distributed/test_meeting", "distributed/test_lost"],
        "listening": ["distributed/test_meeting"],
        "watch": ["distributed/test_lost"],
        "world": ["distributed/test_collectives"],
    },
    "evaluate": {
        "answered": ["evaluate/test_teacher_forced"],
        "asked": ["evaluate/test_record"],
        "generate": ["evaluate/test_teacher_forced"],
        "judge_worker": ["evaluate/test_judging"],
    },
    "models": {
        "configuration": ["models/test_load"],
        "folder": ["models/test_guards"],
        "layer_kinds": ["models/test_lora"],
        "layers": ["models/test_load"],
        "likely_cause": ["models/test_completeness"],
        "loss": ["models/test_load"],
        "paths": ["models/test_load"],
        "targets": ["models/test_lora"],
    },
    "ops": {
        "head_arguments": ["ops/test_linear_cross_entropy"],
        "head_pass": ["ops/test_linear_cross_entropy"],
        "products": ["csrc_triton/test_kept_rows"],
        "scores": ["ops/test_attention_sinks"],
    },
    "optim": {
        "base": ["optim/test_build"],
        "packages": ["optim/test_build"],
        "torch_fused": ["optim/test_build"],
    },
    "policies": {
        "bounds": ["policies/test_msft"],
        "explain": ["policies/test_history"],
        "protocol": ["policies/test_registry"],
        "records": ["policies/test_history"],
    },
    "report": {
        "live_mixture": ["training/test_msft_report"],
        "mixture_picture": ["report/test_picture", "training/test_msft_report"],
        "pictures": ["training/test_msft_report"],
        "timeline": ["training/test_msft_report"],
        "told": ["distributed/test_meeting"],
    },
    "rundir": {
        "fingerprints": ["rundir/test_folder"],
        "made": ["rundir/test_folder"],
        "place": ["hostile/test_run_folders"],
        "publish": ["rundir/test_folder"],
    },
    "selftest": {
        "kill_and_resume": ["selftest/test_table"],
        "laws": ["selftest/test_table"],
        "passes": ["selftest/test_table"],
    },
    "memory": {
        "activations": ["memory/test_model_size", "memory/test_peak"],
    },
    "sizing": {
        "known_models": ["memory/test_model_size"],
        "page": ["memory/test_model_size"],
    },
    "snapshot": {
        "slots": ["snapshot/test_pool"],
        "tiers": ["snapshot/test_pool"],
    },
    "training": {
        "account": ["training/test_msft_report"],
        "chunks": ["laws/test_law12_decided_once"],
        "finish": ["training/test_trainer", "models/test_lora_runs"],
        "parts": ["training/test_policy"],
        "probe": ["training/test_msft_report"],
        "resume": ["laws/test_law6_extend", "laws/test_law12_decided_once"],
        "run": ["training/test_trainer"],
        "samples": ["training/test_trainer_model_kinds"],
    },
    "csrc_triton": {"launch": ["csrc_triton/test_cross_entropy"]},
}
TABLE = {(room, name): files for room, names in THROUGH.items() for name, files in names.items()}


def place_of(path: Path) -> tuple[str, str]:
    """(room, name) of a source: ("data", "plan"), ("", "files")."""
    room = str(path.parent.relative_to(ROOT)).removeprefix("repsft_fast").removeprefix("/")
    return room, path.stem


# Rooms' own files hand on what their modules define.
SOURCES = {place_of(path): path for path in test_floors.modules() if path.stem != "__init__"}


def own_tests(room: str, name: str) -> list[Path]:
    """test_plan.py, and beside it test_plan_*.py of its aspects."""
    folder = TESTS / room
    return [*folder.glob(f"test_{name}.py"), *folder.glob(f"test_{name}_*.py")]


def dotted(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__").removesuffix(".__main__")


@functools.cache
def nodes_of(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


@functools.cache
def imports_of(path: Path) -> set[str]:
    """Modules imported, or whose names are."""
    return {part for name in test_floors.imports_of(path) for part in (name, name.rpartition(".")[0])}


def public_names(path: Path) -> set[str]:
    """Of functions, classes and constants."""
    body = [node for node in nodes_of(path) if getattr(node, "col_offset", 1) == 0]
    names = {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    targets = [target for node in body if isinstance(node, ast.Assign) for target in node.targets]
    names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return {name for name in names if not name.startswith("_")}


def texts(path: Path) -> list[str]:
    return [n.value for n in nodes_of(path) if isinstance(n, ast.Constant) and isinstance(n.value, str)]


def phrases(path: Path) -> set[str]:
    """Of what a module may say: a whole text, or three words in a row of it."""
    found = {text.strip() for text in texts(path)}
    for words in (text.split() for text in texts(path)):
        found |= {" ".join(words[at : at + 3]) for at in range(len(words) - 2)}
    return {said for said in found if len(said) >= 12 and " " in said}


@functools.cache
def neighbours(module: str) -> set[str]:
    """Modules and rooms that import it."""
    return {dotted(path) for path in test_floors.modules() if module in imports_of(path)}


def is_mentioned(room: str, name: str, test: Path) -> bool:
    """Whether a test imports the module, uses a name or expects words of it, or imports what is next to it but
    one: the pieces of a room are often reached through its door alone."""
    path = SOURCES[room, name]
    used = {n.id for n in nodes_of(test) if isinstance(n, ast.Name)}
    used |= {n.attr for n in nodes_of(test) if isinstance(n, ast.Attribute)}
    near = neighbours(dotted(path))
    near = near.union({dotted(path)}, *(neighbours(module) for module in near))
    said = "\n".join(texts(test))
    return bool(near & imports_of(test) or used & public_names(path)) or any(p in said for p in phrases(path))


def test_every_module_has_a_test_of_its_name_or_a_line_in_the_table():
    missing = [place for place in SOURCES if not own_tests(*place) and place not in TABLE]
    assert missing == [], "write tests/<room>/test_<module>.py, or say in THROUGH who tests it"


def test_no_line_of_the_table_is_stale():
    assert [place for place in TABLE if place not in SOURCES] == [], "no such module"
    assert [place for place in TABLE if own_tests(*place)] == [], "has a test of its own name"


@pytest.mark.parametrize(("room", "name"), sorted(TABLE))
def test_the_files_of_a_line_are_about_its_module(room, name):
    files = [TESTS / f"{file}.py" for file in TABLE[room, name]]
    assert [file for file in files if not file.is_file()] == []
    assert [file for file in files if not is_mentioned(room, name, file)] == []


def test_rooms_define_nothing_in_their_own_file():
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    rooms = [p for p in test_floors.modules() if p.stem == "__init__" and p.parent != ROOT / "repsft_fast"]
    assert len(rooms) >= 15
    assert [path for path in rooms if any(isinstance(node, kinds) for node in nodes_of(path))] == []


def test_a_file_that_is_about_something_else_is_seen():
    assert not is_mentioned("data", "plan", TESTS / "test_schedule.py")
    assert not is_mentioned("models", "likely_cause", TESTS / "policies" / "test_msft.py")
    assert is_mentioned("", "errors", TESTS / "test_schedule.py")
