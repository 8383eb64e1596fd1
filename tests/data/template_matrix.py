"""Every chat template of tests/templates × every kind of conversation, against masks found by another way.

    python -m tests.data.template_matrix [NAME …] [--originals FOLDER] [--write] [--detail]

Prints a line per template: how many kinds are trained (exactly the asked turns, all they say, nothing else),
refused by name, dropped because nothing is asked for. Exit code 1 where a mask is wrong. --originals also
runs FOLDER/NAME.jinja, the public templates that the files of tests/templates are shortened from. --write
keeps what came out in tests/templates/results.json, so that a kind which is refused where it was trained is
seen.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from tests.helpers.independent_masks import Template, Verdict, judge
from tests.helpers.marked_chats import Case, answer, quoted, result, said, shared

ROOT = Path(__file__).resolve().parents[2]
TEMPLATES = ROOT / "tests" / "templates"
RESULTS = TEMPLATES / "results.json"

USER, ANSWER, SYSTEM = said("user"), answer(), said("system")
CALL = {shared("k", 0): "", shared("k", 1): ""}
OTHER_CALL = {shared("k", 2): ""}
THOUGHT, THINK = answer(reasoning="field"), answer(reasoning="think")
ONLY_CALL, BESIDE = answer(empty=True, calls=(CALL,)), answer(calls=(CALL,))
QUOTING = answer(f" a {quoted(0)} b {quoted(1)}{quoted(2)} c ", trail=f" {quoted(3)}")

KINDS: dict[str, Case] = {
    "one": Case((USER, ANSWER)),
    "several": Case((USER, ANSWER, USER, ANSWER, USER, ANSWER)),
    "system": Case((SYSTEM, USER, ANSWER)),
    "system, several": Case((SYSTEM, USER, ANSWER, USER, ANSWER)),
    "a user ends": Case((USER, ANSWER, USER)),
    "tools, no call": Case((USER, ANSWER), tools=2),
    "call alone": Case((USER, ONLY_CALL), tools=2),
    "call beside content": Case((USER, BESIDE), tools=2),
    "calls in parallel": Case((USER, answer(empty=True, calls=(CALL, OTHER_CALL))), tools=2),
    "call, result, answer": Case((SYSTEM, USER, ONLY_CALL, result(), ANSWER), tools=1),
    "calls, results, answer": Case(
        (USER, answer(empty=True, calls=(CALL, OTHER_CALL)), result(), result(1, 1), ANSWER, USER, ANSWER),
        tools=2,
    ),
    "call after call": Case((USER, ONLY_CALL, result(), ONLY_CALL, result(), ANSWER), tools=1),
    "call not offered": Case((USER, ONLY_CALL, result(), ANSWER)),
    "call without arguments": Case((USER, answer(empty=True, calls=(None,))), tools=1),
    "nested arguments": Case(
        (
            USER,
            answer(
                empty=True,
                calls=({shared("k", 0): {"deep": [1, 23456, {"er": ""}]}, shared("k", 1): ["", ""]},),
            ),
        ),
        tools=1,
    ),
    "numbers and null": Case(
        (
            USER,
            answer(
                empty=True,
                calls=({shared("k", 0): None, shared("k", 1): 98765.5, shared("k", 2): True, "text": ""},),
            ),
        ),
        tools=1,
    ),
    "arguments to escape": Case(
        (USER, answer(empty=True, calls=({shared("k", 0): ' "a"\n<b> für \\ 你好 '},))), tools=1
    ),
    "call with reasoning": Case(
        (USER, answer(empty=True, reasoning="field", calls=(CALL,)), result(), THOUGHT), tools=1
    ),
    "reasoning in its field": Case((USER, THOUGHT)),
    "reasoning in the content": Case((USER, THINK)),
    "reasoning in every turn": Case((USER, THOUGHT, USER, THOUGHT)),
    "reasoning in every content": Case((USER, THINK, USER, THINK)),
    "reasoning earlier": Case((USER, THOUGHT, USER, ANSWER)),
    "reasoning later": Case((USER, ANSWER, USER, THOUGHT)),
    "empty answer": Case((USER, answer(empty=True), USER, ANSWER)),
    "empty last answer": Case((USER, ANSWER, USER, answer(empty=True))),
    "only an empty answer": Case((USER, answer(empty=True))),
    "last only": Case((USER, ANSWER, USER, ANSWER), train_on="last"),
    "last only, reasoning": Case((USER, THOUGHT, USER, THOUGHT), train_on="last"),
    "last only, after a call": Case((USER, ONLY_CALL, result(), ANSWER), tools=1, train_on="last"),
    "first marked": Case((USER, ANSWER, USER, ANSWER, USER, ANSWER), trainable=(1,)),
    "middle marked": Case((USER, ANSWER, USER, ANSWER, USER, ANSWER), trainable=(3,)),
    "middle unmarked": Case((USER, ANSWER, USER, ANSWER, USER, ANSWER), trainable=(1, 5)),
    "none marked": Case((USER, ANSWER, USER, ANSWER), trainable=()),
    "assistant first": Case((ANSWER, USER, ANSWER)),
    "system, assistant first": Case((SYSTEM, ANSWER, USER, ANSWER)),
    "two users": Case((USER, USER, ANSWER)),
    "two assistants": Case((USER, ANSWER, ANSWER, USER, ANSWER)),
    "system in the middle": Case((USER, ANSWER, SYSTEM, USER, ANSWER)),
    "tool after user": Case((USER, result(), ANSWER)),
    "white space": Case(
        (USER, answer(lead="\n  ", trail=" \n\n"), USER, answer("\n\n  two\tthree \n", lead=" ", trail="\n"))
    ),
    "special tokens quoted": Case((said("user", f" {quoted(1)} x {quoted(0)}"), QUOTING, USER, QUOTING)),
    "unicode": Case(
        (
            said("user", " é "),
            answer(" für 你好 \U0001f600 \u202e e\u0301 \u200d "),
            USER,
            answer(" ß\u00a0\u2028ﬁ "),
        )
    ),
}
# past which prefixes are not all rendered
LONG = Case((SYSTEM, *(USER, ANSWER, USER, answer(lead="\n", trail=" \n")) * 18))
# In CI: the kinds at which templates and masks differ most.
FEW = (
    "several", "system", "call beside content", "calls, results, answer", "reasoning in every turn", "reasoning in the content",
    "middle marked", "white space", "special tokens quoted", "assistant first",
)  # fmt: skip

# End-of-turn tokens where the last turn of a chat does not show all of them.
ENDS: dict[str, tuple[str, ...]] = {
    "command_r7b_tools": ("<|END_OF_TURN_TOKEN|>",),  # <|START_OF_TURN_TOKEN|> behind it opens the next turn
    "diffusion_gemma_training": ("<turn|>", "<tool_call|>"),
    "gemma_4": ("<turn|>", "<|tool_response>"),  # <|"|> behind an argument closes the argument only
    # the next role's name ends a turn, inside its block
    "glm_4_5_training": ("<|user|>", "<|observation|>", "<|system|>"),
    "gpt_oss": ("<|return|>", "<|call|>", "<|end|>"),
    "gpt_oss_training": ("<|return|>", "<|call|>", "<|end|>"),  # <|end|> where more turns follow
}


def table() -> dict[str, dict[str, Any]]:
    """name → what is known of the template, from the parts of the table."""
    entries = [
        entry
        for part in sorted(TEMPLATES.glob("part_*.json"))
        for entry in json.loads(part.read_text(encoding="utf-8"))
    ]
    return {entry["name"]: entry for entry in sorted(entries, key=lambda entry: str(entry["name"]))}


def template_of(entry: dict[str, Any], folder: Path = TEMPLATES) -> Template:
    name = entry["name"]
    return Template(
        name,
        (folder / f"{name}.jinja").read_text(encoding="utf-8"),
        entry["bos"],
        entry["eos"],
        tuple(entry["special"]),
        tuple(entry["added_not_special"]),
        dict(entry["kwargs"] or {}),
        ENDS.get(name),
    )


def run(template: Template, kinds: dict[str, Case] = KINDS) -> dict[str, Verdict]:
    return {kind: judge(template, case) for kind, case in kinds.items()}


def summary(verdicts: dict[str, Verdict]) -> dict[str, Any]:
    """As results.json keeps it: every kind that is not trained, by name."""
    by_outcome: dict[str, Any] = {"dropped": [], "refused": [], "trained": 0}
    for kind, verdict in sorted(verdicts.items()):
        if verdict.outcome == "trained":
            by_outcome["trained"] += 1
        else:
            by_outcome.setdefault(verdict.outcome, []).append(kind)
    return by_outcome


def recorded() -> dict[str, Any]:
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}


def write(results: dict[str, Any]) -> None:
    """Sorted, a line per template."""
    lines = [
        f"{json.dumps(name)}: {json.dumps(result, sort_keys=True)}"
        for name, result in sorted(results.items())
    ]
    RESULTS.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="template_matrix", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="templates (all)")
    parser.add_argument("--originals", type=Path, help="a folder of public templates, NAME.jinja")
    parser.add_argument(
        "--write", action="store_true", help="keep the results in tests/templates/results.json"
    )
    parser.add_argument("--detail", action="store_true", help="why each kind is refused, and what is wrong")
    given = parser.parse_args(arguments)
    before, results, wrong = recorded(), {}, 0
    for name, entry in table().items():
        if given.names and name not in given.names:
            continue
        kept = before.get(name, {})
        runs = {"short": run(template_of(entry))}
        if given.originals and (given.originals / f"{name}.jinja").exists():
            found = hashlib.sha256((given.originals / f"{name}.jinja").read_bytes()).hexdigest()
            if found == entry["original_sha256"] or entry["original_sha256"] is None:
                runs["original"] = run(template_of(entry, given.originals))
            else:
                wrong += 1
                print(f"{name}: the original is not the one that the table names, its SHA-256 is {found}")
        results[name] = {"short": summary(runs["short"]), "original": kept.get("original")}
        if "original" in runs:
            results[name]["original"] = summary(runs["original"])
        wrong += _print(name, runs, kept, given.detail)
    if given.write:
        write(results if not given.names else before | results)
    print(f"{len(results)} templates × {len(KINDS)} kinds, {wrong} wrong")
    return 1 if wrong else 0


def _print(name: str, runs: dict[str, dict[str, Verdict]], kept: dict[str, Any], detail: bool) -> int:
    """One line, what changed and what is wrong; returns how many are wrong."""
    columns = []
    for which, verdicts in runs.items():
        counts = {
            outcome: [v.outcome for v in verdicts.values()].count(outcome)
            for outcome in ("trained", "refused", "dropped", "WRONG")
        }
        columns.append(f"{which}: " + ", ".join(f"{count:3} {outcome}" for outcome, count in counts.items()))
    print(f"{name:36} " + "  |  ".join(columns))
    if "original" in runs:
        for kind in KINDS:
            short, original = runs["short"][kind], runs["original"][kind]
            if short.outcome != original.outcome:
                print(
                    f"    {kind}: short {short.outcome} ({short.reason}), original {original.outcome}"
                    f" ({original.reason})"
                )
    wrong = 0
    for which, verdicts in runs.items():
        listed = {
            kind: outcome
            for outcome in ("refused", "dropped")
            for kind in (kept.get(which) or {}).get(outcome, [])
        }
        for kind, verdict in verdicts.items():
            was = listed.get(kind, "trained")
            if kept.get(which) and was != verdict.outcome:
                print(f"    {which}, {kind}: was {was}, is {verdict.outcome}")
            if verdict.outcome == "WRONG":
                wrong += 1
                print(f"    {which}, {kind}: WRONG: {verdict.reason}")
            if verdict.outcome == "WRONG" and detail:
                print(f"        given    {json.dumps(verdict.conversation, ensure_ascii=False)}")
                print(f"        expected {verdict.expected!r}\n        got      {verdict.got!r}")
            elif verdict.outcome != "trained" and detail:
                print(f"    {which}, {kind}: {verdict.outcome}: {verdict.reason}")
    return wrong


if __name__ == "__main__":
    sys.exit(main())
