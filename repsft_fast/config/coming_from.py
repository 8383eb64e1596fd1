"""docs/coming_from.md, made of the tables of `foreign` and `foreign_values`; a test keeps it equal."""

import re

from repsft_fast.config.foreign import NAMES
from repsft_fast.config.foreign_values import VALUES
from repsft_fast.config.names import setting_names

_ABOUT = """# Coming from another trainer

Names of settings in other trainers, and what is set here. They are never applied: what is no setting of
[settings.md](settings.md) is refused before anything is read, and the message says what is written here. \
Spelling and section
do not matter: `learningRate`, `training.learning_rate` and `--learning-rate` all lead to `optim.lr`.

Meanings are near, not the same. `batch.samples` is one optimizer step over all GPUs. Samples in a packed \
row never see each
other. A run stops when its data is memorised (`stop.token_accuracy: null` turns that off). With \
`loss.average: sample` every
sample weighs the same; `token` is what most others do. The default schedule is wsd, not linear or cosine.
"""


def coming_from_page() -> str:
    lines = [_ABOUT, "## Settings", "", "| there | here |", "|---|---|"]
    for here, names in NAMES.items():
        theirs = ", ".join(f"`{name}`" for name in names.split())
        lines.append(f"| {theirs} | {_ticked(here)} |")
    lines += ["", "## Values", "", "| setting | there | here |", "|---|---|---|"]
    for setting, values in VALUES.items():
        for here, words in values.items():
            word, comma, rest = here.partition(",")
            theirs = ", ".join(f"`{word}`" for word in words.split() if word != "-")
            lines.append(f"| `{setting}` | {theirs} | `{word}`{comma}{rest} |")
    return "\n".join(lines) + "\n"


def _ticked(sentence: str) -> str:
    known = set(setting_names())
    return re.sub(
        r"--[\w-]+|[a-z]+(?:\.[a-z_]+)+",
        lambda word: f"`{word[0]}`" if word[0][0] == "-" or word[0] in known else word[0],
        sentence,
    )


if __name__ == "__main__":
    print(coming_from_page(), end="")
