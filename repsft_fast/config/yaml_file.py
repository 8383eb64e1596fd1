"""Settings files: YAML read by the 1.2 core rules, with line numbers, and bounded against hostile files.

PyYAML follows YAML 1.1, where `1e-5` is text, `off` is false, `010` is 8, `1:30` is 90 and `2026-11-21` is a
date. Here they are a number, a word, 10, text and text.
"""

import errno
import os
import re
import select
import time
from pathlib import Path
from typing import Any

import yaml

from repsft_fast.errors import ConfigError, describe, open_plain, spelled

MAX_BYTES = 1 << 20  # a settings file is a few kilobytes
PIPE_SECONDS = 5.0  # in which a pipe's writer says all
MAX_NODES = 100_000  # after aliases are followed: a file of a few lines can mean 10⁹ values

Lines = dict[tuple[str, ...], int]


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # noqa: RUF012 (PyYAML's own table, emptied)


# Dates, sets and binary data are no settings: their tags are refused like any other foreign tag.
_KNOWN_TAGS = {
    None,
    *(f"tag:yaml.org,2002:{tag}" for tag in ("null", "bool", "int", "float", "str", "seq", "map")),
}
_Loader.yaml_constructors = {
    tag: make for tag, make in yaml.SafeLoader.yaml_constructors.items() if tag in _KNOWN_TAGS
}
_NOTHING = ("", "~", "null")
_CORE = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9][0-9_]*", list("-+0123456789")),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    "merge": (r"<<", ["<"]),
}
for _tag, (_pattern, _first) in _CORE.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)


def _whole_number(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node).replace("_", ""))


_Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)


class _Dumper(yaml.SafeDumper):
    """Quotes what either set of rules would take for something other than text: `1e5` is text to YAML 1.1 and
    a number here."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (PyYAML's own table, joined with ours)
        first: [
            *yaml.SafeDumper.yaml_implicit_resolvers.get(first, []),
            *_Loader.yaml_implicit_resolvers.get(first, []),
        ]
        for first in {*yaml.SafeDumper.yaml_implicit_resolvers, *_Loader.yaml_implicit_resolvers}
    }


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # YAML folds these line breaks into spaces; only between double quotes are they written as escapes.
    style = '"' if any(mark in text for mark in "\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def write_settings(values: dict[str, Any]) -> str:
    """The settings as YAML that this module and other YAML readers read back alike."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def parse_value(text: str) -> Any:
    """The value of a flag or an environment variable: `3`, `1e-5`, `null`, `[a, b]`, `{task: file}`, else the
    text itself.

    Text that is not quoted is as it was typed: YAML would end it at ` #` and fold its lines, a chat
    template's too.
    """
    try:
        value = _construct(text, "value")[0]
    except ConfigError:
        return text
    typed = text.strip()
    lost = isinstance(value, str) and not typed.startswith(('"', "'", "!")) and value != typed
    return text if lost or (value is None and typed.lower() not in _NOTHING) else value


def read_settings_file(path: Path) -> tuple[dict[str, Any], Lines]:
    """A settings file's mapping, and the line of every key. Raises ConfigError naming file and line."""
    try:
        if path.is_fifo():  # repsft train --config <(envsubst < settings.yaml)
            raw = _read_pipe(path)
        else:
            with open_plain(path) as file:
                raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(describe(str(path), f"cannot be read ({error.strerror or error})")) from error

    # Somebody may have given another file by mistake: the data, a model.
    if len(raw) > MAX_BYTES:
        raise ConfigError(
            describe(str(path), "is too large for a settings file", expected=f"at most {MAX_BYTES} bytes")
        )
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            describe(
                str(path), "is not UTF-8 text", got=f"byte {raw[error.start]:#x} at offset {error.start}"
            )
        ) from error

    # An empty file is the defaults; what is no mapping would be none of any setting.
    value, lines = _construct(text, str(path))
    if value is None:
        return {}, {}
    if not isinstance(value, dict):
        raise ConfigError(
            describe(
                str(path),
                "is not a mapping",
                expected="sections such as `optim:` with settings below",
                got=type(value).__name__,
            )
        )
    return value, lines


def _read_pipe(path: Path) -> bytes:
    """All that a pipe's writer writes. OSError when nobody writes to it, or nothing comes for a while."""
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        ready, read, begun = select.poll(), b"", time.monotonic()
        ready.register(number, select.POLLIN)
        while len(read) <= MAX_BYTES:
            events = ready.poll(100)
            try:
                piece = os.read(number, MAX_BYTES)
                if not piece and (read or events):
                    return read
                read += piece
                limit = PIPE_SECONDS if piece else 1.0  # nothing at all: it has no writer
            except BlockingIOError:
                limit = PIPE_SECONDS
            if time.monotonic() - begun > limit:
                raise OSError(errno.ETIMEDOUT, "it is a pipe that does not end: save it to a file first")
        return read
    finally:
        os.close(number)


def _construct(text: str, where: str) -> tuple[Any, Lines]:
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            lines: Lines = {}
            if node is not None:
                _check_size(node, where)
                _check_keys(node, (), lines, where)
            return (None if node is None else loader.construct_document(node)), lines
        finally:
            loader.dispose()
    except ConfigError:  # ours, and a ValueError
        raise
    except RecursionError:
        raise ConfigError(describe(where, "is nested too deeply")) from None
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(describe(f"{where}{line}", f"is not valid YAML ({error.problem})")) from None
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise ConfigError(describe(where, f"is not valid YAML ({str(error).splitlines()[0]})")) from None


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [child for pair in node.value for child in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []


def _check_size(root: yaml.Node, where: str) -> None:
    """Counts the values the document means, every alias followed, without following any twice."""
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()

    def size(node: yaml.Node) -> int:
        if id(node) in open_nodes:
            raise ConfigError(
                describe(f"{where} line {node.start_mark.line + 1}", "an anchor contains itself")
            )
        if id(node) not in sizes:
            open_nodes.add(id(node))
            sizes[id(node)] = 1 + sum(size(child) for child in _children(node))
            open_nodes.discard(id(node))
        return sizes[id(node)]

    if size(root) > MAX_NODES:
        raise ConfigError(
            describe(
                where, "means too many values once its aliases are followed", expected=f"at most {MAX_NODES}"
            )
        )


def _check_keys(node: yaml.Node, path: tuple[str, ...], lines: Lines, where: str) -> None:
    """Notes every key's line. YAML lets the last of two equal keys win silently; here they are an error."""
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigError(describe(f"{where} line {line}", "a key is not a word"))
        if key.value == "<<":
            continue
        if key.value in seen:
            name = spelled(".".join((*path, key.value)))
            raise ConfigError(
                describe(
                    f"{where} line {line}", f"{name} is set twice", got=f"also on line {seen[key.value]}"
                )
            )
        seen[key.value] = line
        lines[(*path, key.value)] = line
        _check_keys(value, (*path, key.value), lines, where)
