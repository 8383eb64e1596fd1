"""Chat templates are code from strangers: each of these ends in a DataError that names the row, and soon."""

import json
import os
import resource
import signal
import time
from pathlib import Path

import pytest

from repsft_fast.data import bounded
from repsft_fast.data.load import DataSettings, load
from repsft_fast.errors import DataError
from tests.helpers.chat_tokenizers import CHATML, byte_level

CONTENT = "secret of the row"
ESCAPES = [
    "{{ ''.__class__.__mro__ }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ self.__init__.__globals__ }}",
    "{{ messages.append(1) }}",
    "{{ '{0.__class__}'.format(messages) }}{{ lipsum.__globals__['os'] }}",
    "{% set _ = messages.clear() %}",
]
BROKEN = {
    "range": ("{% for i in range(10**9) %}x{% endfor %}", "Range too big"),
    "memory": ("{{ 'x' * 10**11 }}", "memory"),
    "doubling": (
        (
            "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor"
            " %}{{ ns.s }}"
        ),
        "memory",
    ),
    "output": ("{{ 'x' * 3 * 10**6 }}", "output is larger"),
    "undefined printed": ("{{ missing }}", "missing"),
    "undefined used": ("{{ messages[0].nothing.more }}", "nothing"),
    "undefined added": ("{{ 'a' + missing }}", "missing"),
    "raises": ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    "divides": ("{{ 1 / 0 }}", "ZeroDivisionError"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "Recursion"),
    "include": ("{% include '/etc/passwd' %}", "no loader|TypeError"),
    "syntax": ("{% for %}", "TemplateSyntaxError"),
    "unknown tag": ("{% evil %}", "TemplateSyntaxError"),
}


@pytest.fixture
def attempt(tmp_path):
    def run(template, rows=1):
        row = {"messages": [{"role": "user", "content": CONTENT}, {"role": "assistant", "content": "answer"}]}
        path = tmp_path / "rows.jsonl"
        path.write_text((json.dumps(row) + "\n") * rows)
        return load(str(path), byte_level(), DataSettings(chat_template=template))

    return run


@pytest.fixture(autouse=True)
def _small_limits(monkeypatch):
    monkeypatch.setattr(bounded, "MAX_SECONDS", 2.0)
    monkeypatch.setattr(bounded, "MAX_MEMORY_BYTES", 300 * 2**20)
    monkeypatch.setattr(bounded, "MAX_OUTPUT_BYTES", 2**20)


@pytest.fixture(autouse=True)
def _no_child_is_left():
    before = _children()  # of libraries, which keep a server for tests that came before
    yield
    assert _children() <= before


def _children() -> set[str]:
    """Processes of this one, ended and not yet waited for among them."""
    return {
        one for task in Path("/proc/self/task").iterdir() for one in (task / "children").read_text().split()
    }


@pytest.mark.parametrize("template", ESCAPES)
def test_an_escape_from_the_sandbox_is_an_error(attempt, template):
    with pytest.raises(DataError, match=r"rows.jsonl:1: the chat template failed on this row"):
        attempt(template + CHATML)


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_template_is_named_in_bounded_time_and_memory(attempt, name):
    template, words = BROKEN[name]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.monotonic()
    with pytest.raises(DataError, match=rf"(?s)rows.jsonl:1: the chat template.*({words})"):
        attempt(template + CHATML)
    assert time.monotonic() - began < 20
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 100 * 2**20


@pytest.mark.parametrize(
    "loop",
    [
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{%"
            " endfor %}{% endfor %}"
        ),
        "{{ 7 ** (10 ** 9) }}",  # inside C code, where no Python signal handler runs
    ],
)
def test_an_endless_loop_ends(attempt, monkeypatch, loop):
    monkeypatch.setattr(bounded, "MAX_SECONDS", 0.5)
    began = time.monotonic()
    with pytest.raises(DataError, match=r"rows.jsonl:1: the chat template took longer than 0.5 s"):
        attempt(loop + CHATML)
    assert time.monotonic() - began < 10


def test_only_the_row_that_breaks_a_limit_is_named(attempt, monkeypatch, tmp_path):
    """A template may behave for a thousand rows: every row runs under the limits, not a first probe only."""
    monkeypatch.setattr(bounded, "MAX_SECONDS", 0.5)
    template = (
        "{% if 'loop' in messages[0].content %}{{ 7 ** (10 ** (5 + messages[0].content | length)) }}{%"
        " endif %}" + CHATML
    )
    rows = [
        {"messages": [{"role": "user", "content": f"row {n}"}, {"role": "assistant", "content": "a"}]}
        for n in range(50)
    ]
    rows[37]["messages"][0]["content"] = "loop"
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match=r"rows.jsonl:38: the chat template took longer"):
        load(str(path), byte_level(), DataSettings(chat_template=template))


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (
            CHATML.replace(
                "{{ '<|im_start|>' + message.role",
                "{% if message.role == 'user' %}{{ '<|im_start|>' + message.role",
            ).replace("{% endfor %}", "{% endif %}{% endfor %}"),
            "does not continue",
        ),
        (
            "{% for message in messages %}{{ message.role }}<|im_end|>{% endfor %}",
            "turn 2, field 'content': the chat template drops",
        ),
        ("{# #}constant<|im_end|>", "drops or changes"),
        (
            CHATML.replace("message.content", "message.content[:3]"),
            "drops or changes the assistant's text.*'answer'",
        ),
        (CHATML.replace("message.content", "message.content | upper"), "drops or changes"),
        ("{{ messages | length }}" + CHATML, "does not continue its generation prompt"),
    ],
)
def test_a_template_that_loses_or_rewrites_turns_says_which(attempt, template, words):
    with pytest.raises(DataError, match=rf"rows.jsonl:1.*{words}"):
        attempt(template)


def test_a_template_cannot_change_the_parent_or_later_rows(attempt):
    plain = attempt(CHATML, rows=3)
    sly = attempt("{% set ns = namespace(n=0) %}{% set ns.n = ns.n + 1 %}" + CHATML, rows=3)
    assert [sample.ids for sample in sly.samples] == [sample.ids for sample in plain.samples]


def test_the_limits_hold_for_any_work():
    def work(item):
        if item == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return item * 10

    got = []

    def consume():
        for value in bounded.bounded_map(work, [0, 1, 2, 3], lambda item: f"item {item}", "the work"):
            got.append(value)

    with pytest.raises(DataError, match=r"item 2: the work ended its process on this row .SIGKILL"):
        consume()
    assert got == [0, 10]


def test_a_caller_that_stops_early_leaves_no_child():
    answers = bounded.bounded_map(lambda item: time.sleep(item) or item, [0, 100], str, "the work")
    assert next(answers) == 0
    answers.close()


def test_without_fork_the_work_is_done_in_process(monkeypatch):
    monkeypatch.delattr(os, "fork")
    assert list(bounded.bounded_map(lambda item: item + 1, [1, 2], str, "the work")) == [2, 3]
    failed, good = bounded.bounded_map(lambda item: 1 // item, [0, 1], str, "the work")
    assert isinstance(failed, DataError)
    assert "0: the work failed on this row (ZeroDivisionError" in str(failed)
    assert good == 1
