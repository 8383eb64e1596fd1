"""Functions of the user's own, by name: never run unasked, never one of Python's own library, and tried
before data is read."""

import sys

import pytest

from repsft_fast.config import Config, checks
from repsft_fast.errors import ConfigError, TrainingError
from repsft_fast.evaluate.answers import EXTRACTORS, find_extractor

LEAST = {"run.folder": "r", "model.path": "m", "data.train": "a.jsonl", "budget.epochs": 3}
MINE = """
import functools, json, os
from builtins import eval as evaluate
from os import system

IMPORTED.append(1)
def good(text): return text.strip() or None
cached = functools.lru_cache(good)
part = functools.partial(good)
class Kind:
    def __call__(self, text): return text or None
    def method(self, text): return text
    @classmethod
    def of_class(cls, text): return text
instance, bound, of_class = Kind(), Kind().method, Kind.of_class
renamed = json.loads
hidden = functools.partial(os.system)
wrapped = functools.wraps(os.system)(lambda text: None)
strip, joined, kind = str.strip, ",".join, str
number = 3
def two(text, other): return text
def raises(text): raise KeyError("x")
def counts(text): return len(text)
def first_word(text): return text.split()[0]
def yields(text): yield text
def leaves(text): raise SystemExit(0)
def late(text):
    if "odd" in text: raise ValueError("an odd one")
    return 3 if "three" in text else None
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module of the user's own, and what has been imported of it."""
    imported = []
    monkeypatch.setattr("builtins.IMPORTED", imported, raising=False)
    (tmp_path / "my_answers.py").write_text(MINE)
    (tmp_path / "my_quitter.py").write_text("import sys\nsys.exit(0)\n")
    (tmp_path / "my_broken.py").write_text("def f(:\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield imported
    for name in ("my_answers", "my_quitter", "my_broken"):
        sys.modules.pop(name, None)


def refused(name, trusted=True):
    with pytest.raises(ConfigError) as caught:
        find_extractor(name, trusted=trusted)
    assert str(caught.value).startswith("mixture.extractor: ")
    return str(caught.value)


@pytest.mark.parametrize("name", ["good", "cached", "part", "instance", "bound", "of_class"])
def test_an_own_function_of_any_kind_works(mine, name):
    assert find_extractor(f"my_answers:{name}", trusted=True)("four") == "four"


@pytest.mark.parametrize("name", ["my_answers:good", "my_quitter:f", "no_such_module:f"])
def test_nothing_is_imported_unasked(mine, name):
    assert "set model.trust_remote_code to true" in refused(name, trusted=False)
    with pytest.raises(ConfigError, match="names code, which is not run unasked"):
        Config.of(LEAST, {"mixture.extractor": name})
    assert (
        Config.of(LEAST, {"mixture.extractor": name, "model.trust_remote_code": True}).mixture.extractor
        == name
    )
    assert mine == []
    assert not {"my_answers", "my_quitter"} & set(sys.modules)


STANDARD = [
    "os:system", "os.path:join", "posix:system", "subprocess:getoutput", "builtins:eval", "shutil:rmtree", "pathlib:Path",
    "importlib:import_module", "runpy:run_path", "pickle:loads", "sys:exit", "_io:open", "this:f", "antigravity:f",
]  # fmt: skip


@pytest.mark.parametrize("name", STANDARD)
@pytest.mark.parametrize("trusted", [True, False])
def test_python_s_own_library_is_refused_by_its_name(name, trusted):
    with pytest.raises(ConfigError, match="of Python's own library"):
        Config.of(LEAST, {"mixture.extractor": name, "model.trust_remote_code": trusted})
    if trusted:
        assert "of Python's own library" in refused(name)


@pytest.mark.parametrize(
    "name", ["system", "evaluate", "renamed", "hidden", "wrapped", "strip", "joined", "kind"]
)
def test_and_by_where_a_function_was_written(mine, name):
    assert "of Python's own library" in refused(f"my_answers:{name}")


@pytest.mark.parametrize("name", ["torch.os:system", "numpy.os:system", "repsft_fast.os:system"])
def test_and_through_modules_that_import_it(name):
    assert "cannot be imported (ModuleNotFoundError" in refused(name)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("my_answers:nothing", "has no attribute"),
        ("my_answers:number", "is not a function"),
        ("no_such_module:f", "PYTHONPATH"),
        ("my_quitter:f", "cannot be imported (SystemExit: 0)"),
        ("my_broken:f", "cannot be imported (SyntaxError"),
        ("my_answers:two", "missing 1 required positional argument"),
        ("my_answers:raises", "failed (KeyError: 'x')"),
        ("my_answers:counts", "returned int"),
        ("my_answers:first_word", "failed (IndexError: list index out of range) on ''"),
        ("my_answers:yields", "returned generator"),
        ("my_answers:leaves", "failed (SystemExit: 0)"),
        ("my_answers:", "names no function"),
        (":good", "names no function"),
        ("my_answers:good.real", "names no function"),
        ("my_answers:good:more", "names no function"),
        ("../my_answers:good", "names no function"),
        (".my_answers:good", "names no function"),
    ],
)
def test_what_does_not_work_is_said_at_start(mine, name, said):
    assert said in refused(name)


def test_what_goes_wrong_later_is_said_with_the_reply(mine):
    extract = find_extractor("my_answers:late", trusted=True)
    assert extract("even") is None
    with pytest.raises(
        TrainingError,
        match=r"my_answers:late failed \(ValueError: an odd one\) on a reply, got an odd reply; let it",
    ):
        extract("an odd reply")
    with pytest.raises(TrainingError, match="returned int on a reply"):
        extract("three")


def test_the_names_in_the_settings_are_those_there_are():
    assert set(checks.EXTRACTORS) == set(EXTRACTORS)
    with pytest.raises(ConfigError, match="did you mean hashes"):
        Config.of(LEAST, {"mixture.extractor": "hashs"})


def test_it_is_tried_before_data_is_read(mine, tmp_path):
    """The data named is not there, and the function is what is told of."""
    from repsft_fast.training.build import build

    values = {
        "run.folder": str(tmp_path / "r"), "model.config": {"model_type": "llama"}, "model.path": None, "budget.epochs": 1,
        "data.train": {"a": "nowhere.jsonl"}, "data.validation": "nowhere.jsonl", "data.format": "input_ids",
        "mixture.policy": "sft", "mixture.metric": "answer", "mixture.extractor": "my_answers:counts",
        "tokenizer.path": "nowhere", "model.trust_remote_code": True,
    }  # fmt: skip
    with pytest.raises(ConfigError, match="my_answers:counts returned int"):
        build(Config.of(values))
