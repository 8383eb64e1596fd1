"""Rows of part M: four tasks for a pretrained model that are to overfit at different times, made here from
a seed.

Fast: `larger` and `mood` ask what the model nearly knows, but a share of their training replies is wrong. The
rule is to be learnt within an epoch; then only the wrong replies are left to learn, which harms. Slow:
`backward` and `sum` are exact skills whose training replies are all right. Replies of validation and test are
right in all.

Measured at this size: nothing yet. On a cut-down deal, the real weights by plain SFT in fp32 on a CPU (seed
0; 48 training and 40 validation rows a task, batches of 16, a system prompt of one word, five epochs of 12
updates; one look an epoch, the standard error of exact match is up to 8 %):

          exact match, %                        nll
epoch         0     1     2     3     4     5       0     1     2     3     4     5
larger      0.0  75.0  80.0  77.5  75.0  72.5    4.48  0.19  0.13  0.15  0.16  0.17
mood        0.0  87.5  35.0  85.0  77.5  90.0    6.14  0.22  0.50  0.26  0.24  0.21
backward    0.0  35.0  37.5  57.5  72.5  57.5    4.03  0.62  0.34  0.47  0.16  0.32
sum         0.0   7.5  17.5  20.0  20.0  30.0    3.80  1.02  0.84  1.35  1.04  1.25

So the fast ones are there after an epoch, and the slow ones are not. `larger` falls from the second epoch on,
in nll at every look; in exact match by no more than the noise of 40 rows. `mood` swings, and does not fall in
five epochs. `backward` and `sum` rise with swings; with seven times the rows an epoch `backward` may be fast,
and how far `sum` gets is not known. Whether whole runs have head-room is for part M to say: it has lines for
it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

Pair = tuple[str, str]  # prompt, reply

SIZES = {"train": 350, "validation": 300, "test": 300}  # rows of a task
WRONG = {"larger": 0.3, "mood": 0.3}  # share of training replies that are wrong


def larger(draw: random.Random) -> tuple[Pair, str]:
    a, b = draw.sample(range(100, 1000), 2)
    return (f"Which is larger, {a} or {b}?", str(max(a, b))), str(min(a, b))


MOODS = {
    "good": ("wonderful", "excellent", "delightful", "great", "lovely", "superb", "perfect", "charming"),
    "bad": ("awful", "terrible", "disgusting", "poor", "horrible", "dreadful", "broken", "boring"),
}
THINGS = ("soup", "film", "hotel", "book", "concert", "garden", "lesson", "journey", "coffee", "game")
OWNERS = (
    "my brother",
    "the teacher",
    "a neighbour",
    "our guide",
    "the doctor",
    "her friend",
    "the mayor",
    "an artist",
)


def mood(draw: random.Random) -> tuple[Pair, str]:
    right, wrong = draw.sample(sorted(MOODS), 2)
    word, thing, owner = draw.choice(MOODS[right]), draw.choice(THINGS), draw.choice(OWNERS)
    return (f"The {thing} of {owner} was {word}. Good or bad?", right), wrong


def backward(draw: random.Random) -> tuple[Pair, str]:
    letters = [draw.choice("bdfgklmnprstaeiou") for _ in range(draw.randint(4, 5))]
    return ("Write the letters backward: " + " ".join(letters), " ".join(reversed(letters))), ""


def sum_(draw: random.Random) -> tuple[Pair, str]:
    a, b = draw.randrange(100, 1000), draw.randrange(100, 1000)
    return (f"What is {a} + {b}?", str(a + b)), ""


TASKS: dict[str, Callable[[random.Random], tuple[Pair, str]]] = {
    "larger": larger, "mood": mood, "backward": backward, "sum": sum_,
}  # fmt: skip


def deal(task: str, seed: int, sizes: dict[str, int] = SIZES) -> dict[str, list[Pair]]:
    """{part: rows} of a task. No prompt lies in two parts or twice in one; the share of wrong replies is
    exact."""
    draw = random.Random(f"{task} {seed}")
    rows: dict[str, tuple[str, str]] = {}
    while len(rows) < sum(sizes.values()):
        (prompt, reply), wrong = TASKS[task](draw)
        rows.setdefault(prompt, (reply, wrong))
    made, found = list(rows.items()), {}
    for part, count in sizes.items():
        here, made = made[:count], made[count:]
        harmed = round(WRONG.get(task, 0.0) * count) if part == "train" else 0
        found[part] = [(prompt, replies[n < harmed]) for n, (prompt, replies) in enumerate(here)]
    return found


def write(folder: Path, seed: int, sizes: dict[str, int] = SIZES) -> dict[str, dict[str, str]]:
    """The rows of a seed as files: {part: {task: file}}, as `data.train` and its like take them."""
    files: dict[str, dict[str, str]] = {part: {} for part in sizes}
    for task in TASKS:
        for part, rows in deal(task, seed, sizes).items():
            path = folder / part / f"{task}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps({"messages": messages(*row)}) + "\n" for row in rows))
            files[part][task] = str(path)
    return files


def messages(prompt: str, reply: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]
