"""The Python blocks of the pages in docs/ run, in order, in one namespace per page."""

import ast
import importlib.util
import inspect
import re
import signal
from pathlib import Path

import pytest

from repsft_fast import errors
from repsft_fast.report.result import EXIT_CODES
from repsft_fast.signals import CODES

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = ("library.md",)
BLOCK = re.compile(r"(?:<!-- needs: (?P<needs>\w+) -->\n)?```python\n(?P<code>.*?)```", re.DOTALL)


def blocks(page: Path) -> list[tuple[int, str | None, str]]:
    """(first line, package it needs, code) of every block."""
    text = page.read_text(encoding="utf-8")
    return [(text.count("\n", 0, m.start("code")) + 1, m["needs"], m["code"]) for m in BLOCK.finditer(text)]


@pytest.mark.parametrize("name", PAGES)
def test_the_code_of_the_page_runs(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    import torch

    torch.manual_seed(0)
    namespace: dict[str, object] = {"__name__": "__main__"}
    ran = 0
    for line, needs, code in blocks(DOCS / name):
        if needs is not None and importlib.util.find_spec(needs) is None:
            continue
        exec(compile("\n" * (line - 1) + code, str(DOCS / name), "exec"), namespace)
        ran += 1
    assert ran >= 4
    assert "right of" in capsys.readouterr().out


def test_every_page_that_imports_the_package_is_run():
    with_code = {
        page.name for page in DOCS.glob("*.md") if any("import" in code for *_, code in blocks(page))
    }
    assert with_code == set(PAGES)


def test_the_head_of_the_page_equals_the_plain_loss():
    """The three lines give the loss a plain loop would have."""
    import torch

    namespace: dict[str, object] = {}
    torch.manual_seed(0)
    exec(blocks(DOCS / "library.md")[0][2], namespace)
    model, inputs, targets = namespace["model"], namespace["inputs"], namespace["targets"]
    ours = model.lm_head.weight.grad.clone()
    model.zero_grad()
    logits = model(input_ids=inputs).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    assert (ours - model.lm_head.weight.grad).norm() <= 1e-5 * ours.norm()


ERRORS = (DOCS / "errors.md").read_text(encoding="utf-8")


def rows(heading: str) -> list[list[str]]:
    """The cells of every table below a heading, up to the next of its level."""
    level = heading.split(" ")[0]
    text = ERRORS.split(f"\n{heading}\n")[1].split(f"\n{level} ")[0]
    lines = [line for line in text.splitlines() if line.startswith("|") and not line.startswith("|---")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_every_exit_code_has_its_line():
    told = {row[0] for row in rows("## Exit codes")}
    codes = {
        cls.exit_code
        for _, cls in inspect.getmembers(errors, inspect.isclass)
        if issubclass(cls, errors.RepsftError)
    }
    signals = {128 + number for number in (*CODES, signal.SIGKILL)}
    assert {str(code) for code in {0, *codes, *signals, *EXIT_CODES.values()}} <= told


def test_every_code_of_a_result_has_its_line():
    told = {row[0].strip("`"): row[1] for row in rows("## Exit codes")}
    for code, number in EXIT_CODES.items():
        assert str(number) in told[code].split(" or "), code


def test_every_class_of_errors_has_its_section_and_exit_code():
    for name, cls in inspect.getmembers(errors, inspect.isclass):
        if issubclass(cls, errors.RepsftError):
            assert f"Exit code {cls.exit_code}." in ERRORS.split(f"\n### {name}\n")[1].split("\n#")[0], name


def texts_of(path: Path) -> str:
    """Every string of a source, also one that is written in pieces over several lines."""
    pieces = [
        node
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.JoinedStr | ast.Constant)
    ]
    values = [node.values if isinstance(node, ast.JoinedStr) else [node] for node in pieces]
    return "\n".join("".join(str(getattr(part, "value", "")) for part in parts) for parts in values)


def test_every_quoted_error_is_one_of_ours():
    """A phrase that is no longer said is no longer looked up."""
    said = "\n".join(texts_of(path) for path in (DOCS.parent / "repsft_fast").rglob("*.py"))
    quoted = [row[0].strip("`") for row in rows("## Errors you may meet") if row[0].startswith("`")]
    assert len(quoted) >= 60
    parts = [part.strip() for phrase in quoted for part in phrase.split("…") if part.strip()]
    assert [part for part in parts if part not in said] == []
