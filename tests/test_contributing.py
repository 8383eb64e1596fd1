"""CONTRIBUTING.md, CHANGELOG.md and the hooks: every file, name, test and command they point at is there."""

import ast
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
CHANGES = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
LOG = (ROOT / "docs" / "LOG.md").read_text(encoding="utf-8")
PATH = re.compile(
    r"`((?:(?:repsft_fast|csrc_triton|benchmarks|tests|docs)/|\.pre|Makefile|pyproject)[\w./-]*)(::\w+)?`"
)
NAME_IN_FILE = re.compile(r"`(?:class )?(\w+)` (?:in|above|from) `([\w./]+\.py)`")


def there(name: str) -> bool:
    """A file or folder of the tree; of one that is still to be written, named in capitals, its folder."""
    path = ROOT / name
    return path.parent.is_dir() if "YOURS" in name else path.exists()


def functions(path: Path) -> set[str]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {
        node.name for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, kinds)
    }


def test_every_path_is_there():
    found = PATH.findall(PAGE)
    assert len(found) > 60
    assert [name for name, _ in found if not there(name)] == []


def test_every_test_that_is_named_is_one():
    named = [(path, test.removeprefix("::")) for path, test in PATH.findall(PAGE) if test]
    assert len(named) >= 6
    assert [(path, test) for path, test in named if test not in functions(ROOT / path)] == []


@pytest.mark.parametrize(("name", "path"), sorted(set(NAME_IN_FILE.findall(PAGE))))
def test_every_name_stands_in_its_file(name, path):
    text = (ROOT / path).read_text(encoding="utf-8")
    assert re.search(rf"^\s*(?:def|class) {name}\b|^{name}\b(?:: [^=]+)? = ", text, re.MULTILINE), (
        f"no {name} in {path}"
    )


def test_every_recipe_has_numbered_steps_with_files():
    recipes = PAGE.split("\n## Recipes\n")[1].split("\n## ")[0].split("\n### ")[1:]
    assert len(recipes) == 5
    for recipe in recipes:
        steps = re.split(r"^\d\. ", recipe, flags=re.MULTILINE)[1:]
        assert len(steps) >= 4
        assert all(PATH.search(step) for step in steps if "doctor" not in step), recipe.splitlines()[0]


def test_a_newcomer_finds_an_answer_in_one_look():
    table = PAGE.split("\n## A newcomer's questions\n")[1]
    rows = [line.strip("|").split(" | ") for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 12
    for question, answer in rows:
        assert question.strip().endswith("?")
        assert PATH.search(answer), question


def test_every_make_target_is_one():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    for page in (PAGE, CHANGES, LOG):
        assert set(re.findall(r"`make ([\w-]+)", page)) <= targets


def test_the_hooks_are_make_lint():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    recipe = re.search(r"^lint:.*\n\t(.+)$", makefile, re.MULTILINE)
    assert recipe is not None
    commands = [command.strip().removeprefix("$(BIN)/") for command in recipe[1].split("&&")]
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    assert [hook["entry"] for repo in hooks for hook in repo["hooks"]] == commands
    assert all(hook["pass_filenames"] is False for repo in hooks for hook in repo["hooks"])


def test_the_changelog_begins_with_what_is_not_released():
    headings = re.findall(r"^## (.+)$", CHANGES, re.MULTILINE)
    assert headings[0] == "[Unreleased]"
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security", "Moved modules"}
    assert set(re.findall(r"^### (.+)$", CHANGES, re.MULTILINE)) <= kinds


def test_what_moved_is_where_the_changelog_says():
    """Old modules are gone, and the new ones are there."""
    moved = re.findall(r"^\| `repsft_fast\.([\w.]+)` \| (.+) \|$", CHANGES, re.MULTILINE)
    assert len(moved) > 30
    for old, new in moved:
        names = re.findall(r"`repsft_fast\.([\w.]+)`", new)
        assert names or "gone" in new, old
        for name in names:
            assert _module(name), f"{old} → {name}"
        assert old in names or not (ROOT / "repsft_fast" / (old.replace(".", "/") + ".py")).exists(), (
            f"{old} is there"
        )


def _module(name: str) -> bool:
    path = ROOT / "repsft_fast" / name.replace(".", "/")
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def test_the_log_is_dated_and_in_order():
    dates = re.findall(r"^## (\d{4}-\d{2}-\d{2})", LOG, re.MULTILINE)
    assert dates
    assert dates == sorted(dates, reverse=True)
