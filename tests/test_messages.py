"""What messages tell a user to set must exist: every dotted name in a message is a setting, a section or a
file."""

import ast
import re
from pathlib import Path

import repsft_fast
from repsft_fast.config import setting_names
from repsft_fast.config.reference import sections

PACKAGE = Path(repsft_fast.__file__).parent
FILES = ("yaml", "png", "html", "json", "jsonl", "safetensors")
# Keys of files, and arguments of our own classes that no setting reaches.
NO_SETTINGS = {"tokenizer.model", "tokenizer.ggml", "tokenizer.ggml.tokens", "optim.step"}
NO_SETTINGS |= {"optim.decay", "mixture.order", "schedule.decay_updates"}
WORD = re.compile(
    rf"(?<![\w.-])(?:{'|'.join(name for name in sections() if '.' not in name)})(?:\.[a-z_0-9]+)+"
)


def texts(tree):
    """(line, text) of every string that is no docstring."""
    documented = [n for n in ast.walk(tree) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)]
    skipped = {id(expression.value) for expression in documented}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
            yield node.lineno, node.value


def strangers(source):
    known = {*setting_names(), *sections(), *NO_SETTINGS}
    for line, text in texts(ast.parse(source)):
        for name in WORD.findall(text):
            if name not in known and name.rpartition(".")[2] not in FILES:
                yield line, name


def test_every_setting_that_a_message_names_exists():
    found = [
        f"{path.relative_to(PACKAGE)}:{line}: {name}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.name != "foreign.py"  # names of others; tests/config holds what they are led to
        for line, name in strangers(path.read_text(encoding="utf-8"))
    ]
    assert found == []


def test_the_search_finds_a_wrong_name_and_only_that():
    source = (
        '"""data.nonsense in a docstring"""\nraise E("set data.nonsense, optim.lr; see run.yaml",'
        ' f"data.more: {1}")'
    )
    assert list(strangers(source)) == [(2, "data.nonsense"), (2, "data.more")]
