"""Whole settings files, drawn by a seed, and what hands, editors and other programs do to them.

`drawn(seed)` gives a valid file; `mutated(seed)` one that a mutation went over, and the mutation's name.
`said(text)` is what a file says, read by PyYAML's composer alone: the measure of whether a setting was lost.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import yaml

VALUES: dict[str, list[str]] = {
    "run.seed": ["7", "0", "9223372036854775807"],
    "run.deterministic": ["true", "false"],
    "model.init": ["auto", "pretrained"],
    "model.save_dtype": ["bfloat16", "auto"],
    "model.lora": ["{rank: 4, alpha: 8}", "null"],
    "tokenizer.path": ["t/tokenizer", "owner/name"],
    "tokenizer.chat_template": ['"{% for m in messages %}{{ m.content }}{% endfor %}"'],
    "tokenizer.template_kwargs": ["{enable_thinking: false, deep: [1, {a: b}]}"],
    "data.validation": ["v.jsonl", "[v.jsonl, w.jsonl]"],
    "data.samples": ["400", "4e2"],
    "data.ignore_columns": ["[system, id]", "[]"],
    "batch.samples": ["16", "1_024"],
    "batch.row_tokens": ["4096", "4.096e3"],
    "loss.average": ["token", "sample"],
    "optim.name": ["adamw", "adamw8bit"],
    "optim.lr": ["1e-5", "2.e-5", "0.0001"],
    "optim.betas": ["[0.9, 0.95]"],
    "optim.max_norm": ["null", "1.0"],
    "schedule.name": ["constant", "wsd"],
    "budget.updates": ["100"],
    "stop.token_accuracy": ["null", "0.99"],
    "log.trackers": ["[]", "[wandb]"],
    "checkpoint.every_updates": ["50"],
    "snapshot.disk_bytes": ["2GiB", "0"],
    "mixture.z": ["2.5"],
}
LEAST = {
    "run.folder": "runs/x",
    "model.path": "m",
    "data.train": "{a: a.jsonl, b: [b.jsonl, c.jsonl]}",
    "budget.epochs": "3",
}


def drawn(seed: int) -> str:
    draw = random.Random(seed)
    chosen = dict(LEAST) | {
        name: draw.choice(VALUES[name]) for name in draw.sample(sorted(VALUES), draw.randint(3, 14))
    }
    by_section: dict[str, dict[str, str]] = {}
    for name, value in chosen.items():
        section, _, key = name.partition(".")
        by_section.setdefault(section, {})[key] = value
    lines = []
    for section in draw.sample(sorted(by_section), len(by_section)):
        lines.append(f"{section}:")
        lines += [f"  {key}: {value}" for key, value in by_section[section].items()]
    return "\n".join(lines) + "\n"


def mutated(seed: int) -> tuple[str, bytes]:
    """(the mutation's name, the file)"""
    draw = random.Random(10_000 + seed)
    name = sorted(MUTATIONS)[seed % len(MUTATIONS)]
    text = MUTATIONS[name](drawn(seed), draw)
    return name, text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")


def said(text: str) -> dict[tuple[str, ...], Any]:
    """Every leaf of the file's mappings, at its dotted key; scalars as they are written. Raises
    yaml.YAMLError."""
    found: dict[tuple[str, ...], Any] = {}

    def walk(node: yaml.Node, above: tuple[str, ...]) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if key.value == "<<":
                    for merged in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                        walk(merged, above)
                else:
                    walk(value, (*above, *key.value.split(".")))
        else:
            found[above] = plain(node)

    def plain(node: yaml.Node) -> Any:
        if isinstance(node, yaml.MappingNode):
            return {key.value: plain(value) for key, value in node.value}
        return [plain(item) for item in node.value] if isinstance(node, yaml.SequenceNode) else node.value

    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if root is not None:
        walk(root, ())
    return found


def same(written: Any, held: Any) -> bool:
    """A scalar as it is written and the value that a Config holds."""
    if isinstance(written, list):
        return isinstance(held, list) and len(written) == len(held) and all(map(same, written, held))
    if isinstance(written, dict):
        return (
            isinstance(held, dict)
            and set(written) == set(held)
            and all(same(written[key], held[key]) for key in held)
        )
    if held is None:
        return written.lower() in ("", "~", "null")
    if isinstance(held, bool):
        return written.strip().lower() in (
            str(held).lower(),
            *(("1", "yes", "on", "y", "t") if held else ("0", "no", "off", "n", "f")),
        )
    if isinstance(held, int | float):
        number = written.strip().replace("_", "")
        units = {"kib": 2**10, "mib": 2**20, "gib": 2**30}
        unit = units.get(number[-3:].lower(), 1)
        try:
            return float(number[:-3] if unit > 1 else number) * unit == float(held)
        except ValueError:
            return False
    return written == held


def _line(text: str, draw: random.Random, change: Callable[[str], str]) -> str:
    """One of the lines with a setting, changed."""
    lines = text.splitlines(keepends=True)
    number = draw.choice([i for i, line in enumerate(lines) if line.startswith("  ")])
    lines[number] = change(lines[number])
    return "".join(lines)


def _value(text: str, draw: random.Random, value: str) -> str:
    return _line(text, draw, lambda line: f"{line.split(':')[0]}: {value}\n")


def _key(text: str, draw: random.Random, change: Callable[[str], str]) -> str:
    return _line(text, draw, lambda line: f"  {change(line.split(':')[0].strip())}:{line.partition(':')[2]}")


def _swapped(text: str, draw: random.Random) -> str:
    """The names of two settings of one file, exchanged."""
    lines = text.splitlines(keepends=True)
    a, b = draw.sample([i for i, line in enumerate(lines) if line.startswith("  ")], 2)
    (key_a, _, value_a), (key_b, _, value_b) = lines[a].partition(":"), lines[b].partition(":")
    lines[a], lines[b] = f"{key_b}:{value_a}", f"{key_a}:{value_b}"
    return "".join(lines)


def _cut(text: str, draw: random.Random) -> str:
    return text[: draw.randrange(len(text))]


def _without_one(text: str, draw: random.Random) -> str:
    at = draw.randrange(len(text))
    return text[:at] + text[at + 1 :]


def _quoted_with_spaces(text: str, draw: random.Random) -> str:
    return _line(text, draw, lambda line: f'{line.split(":")[0]}: "{line.split(":")[1].strip()} "\n')


def _twice(text: str, draw: random.Random) -> str:
    return _line(text, draw, lambda line: line + line)


def _section_again(text: str, draw: random.Random) -> str:
    return (
        text + draw.choice([line for line in text.splitlines() if not line.startswith(" ")]) + "\n  seed: 5\n"
    )


def _dotted_again(text: str, draw: random.Random) -> str:
    return text + draw.choice(["run.folder: other\n", "run.seed: 5\nrun:\n  seed: 6\n", "optim.lr: 1e-3\n"])


def _flat(text: str, draw: random.Random) -> str:
    """A setting taken out of its section."""
    return _line(text, draw, lambda line: "") + draw.choice(
        ["folder: x\n", "lr: 1e-3\n", "epochs: 3\n", "train: a.jsonl\n"]
    )


def _elsewhere(text: str, draw: random.Random) -> str:
    return text + draw.choice(
        ["log:\n  lr: 1\n", "schedule:\n  warmup_fraction: 0.1\n", "snapshot:\n  folder: x\n"]
    )


STRANGE = [
    *(
        ".nan",
        ".inf",
        "-.inf",
        "1e999",
        "-1",
        "0",
        "1" * 400,
        str(2**70),
        "1e-400",
        "0x10",
        "010",
        "1:30",
        "--1",
        "+",
        ".",
        "1e",
    ),
    "\u0663",  # a digit of another script
]
OTHER_TYPES = [
    *(
        "[]",
        "{}",
        "[[1]]",
        "{a: {b: {c: 1}}}",
        "''",
        "null",
        "true",
        "2026-11-21",
        "!!str 3",
        "!!int '3'",
        "!!set {a}",
    ),
    *("[1, 2, 3]", "? x"),
]
TAGGED = ["!!python/name:os.system", "!x 3", "!!binary aGk=", "!!float 3"]
CONTROLS = [
    "\\0",
    "\\a",
    "\\e[31m",
    "\\x7f",
    "\\x85",
    "\\u2028",
    "\\ud800",
    "\\U0010FFFF",
    "\\uFEFF",
    "\\r\\n",
]
UNICODE = ["é", "日本", "\u202e", "\u200b", "\u00a0", "１６", "ａｄａｍｗ", "🦊", "\ufeff", "ﬁ"]
MUTATIONS: dict[str, Callable[[str, random.Random], str | bytes]] = {
    "a strange number": lambda text, draw: _value(text, draw, draw.choice(STRANGE)),
    "another type": lambda text, draw: _value(text, draw, draw.choice(OTHER_TYPES)),
    "nested deep": lambda text, draw: _value(text, draw, "[" * 300 + "]" * 300),
    "a control character": lambda text, draw: _value(text, draw, f'"a{draw.choice(CONTROLS)}b"'),
    "a raw control character": lambda text, draw: _value(text, draw, f"a{draw.choice(chr(1) + chr(27) + chr(0))}b"),
    "unicode in a value": lambda text, draw: _value(text, draw, draw.choice(UNICODE) + draw.choice(["", "x", "1"])),
    "unicode in a key": lambda text, draw: _key(text, draw, lambda key: key + draw.choice(UNICODE)),
    "a long value": lambda text, draw: _value(text, draw, "x" * 100_000),
    "spaces behind": lambda text, draw: _line(text, draw, lambda line: line.rstrip("\n") + "   \n"),
    "quoted with spaces": _quoted_with_spaces,
    "no space after the colon": lambda text, draw: _line(text, draw, lambda line: line.replace(": ", ":", 1)),
    "a tab in front": lambda text, draw: _line(text, draw, lambda line: "\t" + line.strip() + "\n"),
    "a tab behind the colon": lambda text, draw: _line(text, draw, lambda line: line.replace(": ", ":\t", 1)),
    "a byte order mark": lambda text, draw: "\ufeff" + text,
    "utf-16": lambda text, draw: text.encode("utf-16"),
    "latin-1": lambda text, draw: _value(text, draw, "caf\xe9").encode("latin-1"),
    "lines of another system": lambda text, draw: text.replace("\n", draw.choice(["\r\n", "\r"])),
    "cut": _cut,
    "a character less": _without_one,
    "a setting twice": _twice,
    "a section twice": _section_again,
    "dotted and nested": _dotted_again,
    "out of its section": _flat,
    "in another section": _elsewhere,
    "names exchanged": _swapped,
    "capitals": lambda text, draw: _key(text, draw, str.upper),
    "dashes": lambda text, draw: _key(text, draw, lambda key: key.replace("_", "-") + "-x"),
    "an anchor and its alias": lambda text, draw: _value(text, draw, "&a {b: 1}") + "mixture.weights: *a\n",
    "a merge": lambda text, draw: text.replace("run:\n", "run:\n  <<: {seed: 5, folder: merged}\n"),
    "a merge of what is no setting": lambda text, draw: text.replace("run:\n", "run:\n  <<: {sead: 5}\n"),
    "an alias to nothing": lambda text, draw: _value(text, draw, "*nowhere"),
    "a tag": lambda text, draw: _value(text, draw, draw.choice(TAGGED)),
    "two documents": lambda text, draw: text + "---\n" + text,
    "a comment in the value": lambda text, draw: _line(text, draw, lambda line: line.replace(": ", ": # ", 1)),
    "a block of text": lambda text, draw: _value(text, draw, "|\n    first\n    second"),
    "a list of the file": lambda text, draw: "- " + text.replace("\n", "\n  "),
    "another trainer's": lambda text, draw: _key(text, draw, lambda key: draw.choice(["learning_rate", "bf16"])),
    "a question mark": lambda text, draw: _line(text, draw, lambda line: "  ? " + line.strip() + "\n"),
    "a key that is a number": lambda text, draw: _key(text, draw, lambda key: draw.choice(["1", "null", "true", "1.5", "''"])),
    "another seed's end": lambda text, draw: text[: len(text) // 2] + drawn(draw.randrange(1000))[len(text) // 2 :],
}  # fmt: skip
