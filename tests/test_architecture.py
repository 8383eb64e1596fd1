"""docs/architecture.md says what the code is: its letters, its files, its floors, and the names it points at."""

import ast
import functools
import importlib
import io
import re
import tokenize
from pathlib import Path

import pytest

from tests import test_floors

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
LETTER = re.compile(r"[A-Z](?:_[a-z]+)?['′]*|[a-z]")
# [N', H], [V, 1]; not what a name is subscripted with
SHAPE = re.compile(r"(?<![\w\])])\[([^\[\]\n]+)\]")
NUMBER_OR_WORD = re.compile(r"\d+|[a-z]{3,}|\.\.\.|…")


def section(heading: str) -> str:
    """The page's text below a heading, up to the next of its level or above."""
    level = len(heading.split(" ")[0])
    return re.split(rf"^#{{1,{level}}} ", PAGE.split(f"\n{heading}\n")[1], flags=re.MULTILINE)[0]


def rows(heading: str) -> list[list[str]]:
    lines = [line for line in section(heading).splitlines() if line.startswith("|") and "---" not in line]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


LETTERS = {letter.strip() for row in rows("### Letters")[1:] for letter in row[0].split(",")}


@functools.cache
def said(path: Path) -> str:
    """Docstrings and comments of a source: where shapes stand."""
    text = path.read_text(encoding="utf-8")
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(n) or "" for n in ast.walk(ast.parse(text)) if isinstance(n, kinds)]
    found += [
        t.string for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type == tokenize.COMMENT
    ]
    return "\n".join(found)


def unknown_letters(text: str, letters: set[str]) -> set[str]:
    """Letters that stand as dimensions and are not in the table; a bracket without any capital is no shape."""
    found = set()
    for shape in SHAPE.findall(text):
        parts = [part.strip() for part in re.split(r"[,+*·×−-]", shape)]
        named = [part for part in parts if not NUMBER_OR_WORD.fullmatch(part)]
        if all(LETTER.fullmatch(part) for part in named) and any(part[0].isupper() for part in named):
            found |= {part.partition("_")[0].replace("′", "'") for part in named} - letters
    return found


@pytest.mark.parametrize("path", test_floors.modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_every_dimension_is_a_letter_of_the_table(path):
    assert unknown_letters(said(path), LETTERS) == set()


def test_dimensions_are_found_and_other_brackets_are_not():
    text = "x [N', Q] fp32, list[str], [R] int64, x[P], [B, A_kv, T, D_v], [a, b], [N, longest, 1], {X}, [see there]"
    assert unknown_letters(text, {"N'", "B", "A", "T", "D", "N"}) == {"Q", "R"}


def test_every_letter_is_used():
    used = {letter for path in test_floors.modules() for letter in unknown_letters(said(path), set())}
    assert LETTERS - used == set()


def test_every_file_of_the_large_rooms_is_on_the_page():
    lives = section("## Where a thing lives")
    named = set(re.findall(r"`(\w+)`", lives))
    for room in (
        "data",
        "models",
        "distributed",
        "training",
        "rundir",
        "optim",
        "ops",
        "policies",
        "memory",
        "sizing",
        "selftest",
    ):
        files = {p.stem for p in (ROOT / "repsft_fast" / room).glob("*.py")} - {"__init__"}
        assert files - named - {"bounds", "statistics", "explain"} == set(), room


def test_the_trainers_floors_are_the_tests():
    table = [row for row in rows("## Where a thing lives") if row[0] in dict(_floors())]
    assert [set(re.findall(r"`(\w+)`", row[1])) for row in table] == [
        set(floor) for floor in test_floors.TRAINING
    ]


def _floors() -> list[tuple[str, str]]:
    text = section("## Where a thing lives").split("| floor | files |")[1]
    return [(line.split("|")[1].strip(), line) for line in text.splitlines() if line.startswith("| ")]


def test_every_room_has_its_floor_on_the_page():
    named = set(re.findall(r"`(\w+)`", section("## Floors (`tests/test_floors.py` reads the imports)")))
    assert set(test_floors.FLOORS) | {"training", "cli"} <= named


def names_pointed_at() -> list[str]:
    """Dotted names in the third column of the words, and in the types rooms meet at."""
    found = [name for row in rows("## Words") for name in re.findall(r"`([\w.]+)`", row[-1]) if len(row) == 3]
    met = section("## The types rooms meet at")
    return found + re.findall(r"^- `(?!model\.)(\w+\.[\w.]+)", met, re.MULTILINE)


@pytest.mark.parametrize("name", sorted(set(names_pointed_at())))
def test_every_name_that_is_pointed_at_is_there(name):
    """A module, or an attribute of one; of a class also one that instances have (a field)."""
    at, *rest = name.split(".")
    found = importlib.import_module(f"repsft_fast.{at}")
    for part in rest:
        path = f"{found.__name__}.{part}" if hasattr(found, "__path__") else ""
        if (
            path
            and importlib.util.find_spec(path) is not None
            and not isinstance(getattr(found, part, None), type)
        ):
            found = importlib.import_module(path)
            continue
        fields = getattr(found, "__dataclass_fields__", {})
        assert hasattr(found, part) or part in fields, f"{name}: {found!r} has no {part}"
        found = getattr(found, part, found)
