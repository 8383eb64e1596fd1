"""The Python blocks of the pages in docs/ run, in order, in one namespace per page."""

import importlib.util
import re
from pathlib import Path

import pytest

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
    with_code = {page.name for page in DOCS.glob("*.md") if any("import" in code for *_, code in blocks(page))}
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
