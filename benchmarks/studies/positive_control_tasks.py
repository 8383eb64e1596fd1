"""Two mixtures of made tasks whose best moments lie far apart: a task that training harms, one whose few rows
are partly wrong, one that needs long.

A prompt is a task's letter and four letters more, the reply is one letter: the entry of the task's own table
that one or two of the four letters name; the others are distractors. A task's pool (clean rows, for the warm
start) and its seeds' rows never share a prompt, nor do a seed's training, validation and test rows. `wrong`
is the share of a task's training rows whose reply is another letter, drawn at random; pool, validation and
test rows are clean.
"""

import random
from dataclasses import dataclass
from pathlib import Path

from benchmarks.studies.msft_tasks import Pair, write_rows

LETTERS = "abcdefghijklmnopqrstuvwxyz"
LENGTH = 4  # letters of a prompt after the task's own
HELD = 300  # rows to validate on, and as many to test on
RESERVE = 200  # rows more than a seed takes, so that seeds differ in their rows


@dataclass(frozen=True)
class Task:
    letters: int  # size of the alphabet, of prompts and replies
    places: tuple[int, ...]  # which of a prompt's letters name the table's entry
    pool: int  # rows of the warm start
    train: int  # rows to train on
    wrong: float = 0.0  # share of the training rows with a wrong reply

    def reply(self, name: str, prompt: str) -> str:
        entry = "".join(prompt[place] for place in self.places)
        return LETTERS[random.Random(f"{name} {entry}").randrange(self.letters)]


MIXTURES: dict[str, dict[str, Task]] = {
    "A": {
        "harmed": Task(12, (1,), pool=1000, train=60, wrong=0.5),
        "noisy": Task(12, (2,), pool=30, train=100, wrong=0.3),
        "slow": Task(10, (1, 3), pool=120, train=600),
    },
    "B": {
        "harmed": Task(14, (3,), pool=1000, train=70, wrong=0.5),
        "noisy": Task(10, (0,), pool=25, train=90, wrong=0.3),
        "slow": Task(8, (0, 2), pool=200, train=600),
    },
}


def marks(mixture: str) -> dict[str, str]:
    """The letter that each task's prompts begin with, other ones in each mixture."""
    first = "HNS" if mixture == "A" else "VXZ"
    return dict(zip(MIXTURES[mixture], first, strict=True))


def deal(mixture: str, task: str, seed: int) -> dict[str, list[Pair]]:
    """Rows of one task: pool (the same for all seeds), train, validation, test."""
    made = MIXTURES[mixture][task]
    mark, name = marks(mixture)[task], f"{mixture} {task}"
    wanted = made.pool + made.train + 2 * HELD + RESERVE
    draw = random.Random(f"prompts {name}")
    prompts: dict[str, None] = {}
    while len(prompts) < wanted:
        prompts["".join(draw.choices(LETTERS[: made.letters], k=LENGTH))] = None
    rows = [(mark + prompt, made.reply(name, prompt)) for prompt in prompts]

    draw = random.Random(f"seed {seed} {name}")
    own = draw.sample(rows[made.pool :], made.train + 2 * HELD)
    train = own[: made.train]
    for i in range(round(made.wrong * made.train)):
        prompt, right = train[i]
        train[i] = (prompt, draw.choice([x for x in LETTERS[: made.letters] if x != right]))
    held = own[made.train :]
    return {"pool": rows[: made.pool], "train": train, "validation": held[:HELD], "test": held[HELD:]}


def write(folder: Path, mixture: str, seed: int) -> dict[str, dict[str, str]]:
    """Files of a seed's rows under `folder`: split → task → path."""
    files: dict[str, dict[str, str]] = {}
    for task in MIXTURES[mixture]:
        for split, rows in deal(mixture, task, seed).items():
            path = folder / mixture / ("pool" if split == "pool" else f"{seed}/{split}") / f"{task}.jsonl"
            write_rows(path, rows)
            files.setdefault(split, {})[task] = str(path)
    return files
