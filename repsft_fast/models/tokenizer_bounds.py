"""A tokenizer's files before a library reads them: nothing in them makes it work without end, or fill the
memory.

Each of these is legal and no tokenizer's: a rule that doubles every letter, sixty times over; a billion extra
tokens by one number. Patterns need no bound of ours: the engine gives up a match after ten million steps,
which is said where it happens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from repsft_fast.errors import ModelError, describe

# times longer a text gets by all normalizers together; public ones give "▁" for " ", 3 bytes for one
MOST_GROWTH = 100
MOST_ADDED = 50_000  # tokens added one by one: 10 s for 30,000; those of speech have so many
# listed as special besides, which takes a library 27 s for 30,000, and four times that for twice as many
MOST_SPECIAL = 15_000
MOST_PIECES = 1_000  # of a template around every text, and rules in a row
# ids that no entry has: a library looks at each, 0.1 s for so many, and makes a model's rows of them
MOST_HOLES = 10_000_000
_COUNTS = ("extra_ids", "offset")  # settings by which older classes make so many tokens up
_TODO = "fetch it again, or take another tokenizer"


def check_bounds(file: Mapping[str, Any], settings: Mapping[str, Any], where: str) -> None:
    """ModelError for work without end. file: tokenizer.json. settings: tokenizer_config.json. Either may be
    empty."""
    place = f"{where} tokenizer.json"
    # Each rule works on what the one before it made, so their factors multiply.
    growth, rules = 1.0, 0
    for rule in _rules(file.get("normalizer"), "normalizers"):
        rules += 1
        growth *= max(1.0, _growth(rule))
        if growth > MOST_GROWTH:
            wrong = f"its normalizers make a text over {MOST_GROWTH} times longer"
            raise ModelError(describe(place, wrong, got=rule.get("type"), todo=_TODO))
    # Every part is gone through for every text.
    for name, many in (
        ("normalizer", rules),
        ("pre_tokenizer", sum(1 for _ in _rules(file.get("pre_tokenizer"), "pretokenizers"))),
        ("post_processor", _longest_template(file.get("post_processor"))),
    ):
        if many > MOST_PIECES:
            expected = f"at most {MOST_PIECES}"
            raise ModelError(
                describe(
                    f"{place} {name}", "has more parts than any tokenizer has", expected=expected, got=many
                )
            )
    _check_model(file.get("model"), place)
    # Listed tokens are added one by one, which takes the square of their number.
    for name, holder in (("tokenizer.json", file), ("tokenizer_config.json", settings)):
        for key in (
            "added_tokens",
            "added_tokens_decoder",
            "additional_special_tokens",
            "extra_special_tokens",
        ):
            most = MOST_ADDED if key.startswith("added") else MOST_SPECIAL
            if isinstance(listed := holder.get(key), list | dict) and len(listed) > most:
                wrong = f"{key} are more than any tokenizer has"
                raise ModelError(
                    describe(
                        f"{where} {name}", wrong, expected=f"at most {most}", got=len(listed), todo=_TODO
                    )
                )
    for key in _COUNTS:
        if isinstance(value := settings.get(key), int | float) and value > MOST_SPECIAL:
            place, expected = f"{where} tokenizer_config.json", f"at most {MOST_SPECIAL}"
            wrong = f"{key} is more than any tokenizer has"
            raise ModelError(describe(place, wrong, expected=expected, got=value, todo="correct it"))


def _check_model(model: Any, place: str) -> None:
    if not isinstance(model, dict):
        return
    vocab = model.get("vocab")
    ids = [number for number in vocab.values() if isinstance(number, int)] if isinstance(vocab, dict) else []
    if ids and max(ids) > len(ids) + MOST_HOLES:
        wrong = f"its vocab has {len(ids)} entries, and an id far beyond that"
        raise ModelError(
            describe(place, wrong, expected=f"below {len(ids) + MOST_HOLES}", got=max(ids), todo=_TODO)
        )
    dropout = model.get("dropout")
    if isinstance(dropout, int | float) and dropout > 0 and model.get("type") != "Unigram":  # which has none
        wrong = "its dropout cuts a text by chance, another way each time, and from no seed of the run"
        todo = 'write "dropout": null into it'
        raise ModelError(describe(place, wrong, expected="null or 0", got=dropout, todo=todo))


def _rules(value: Any, inside: str) -> Iterator[dict[str, Any]]:
    """A rule, or all rules of a sequence of them, however deep."""
    if not isinstance(value, dict):
        return
    listed = value.get(inside)
    if isinstance(listed, list):
        for one in listed:
            yield from _rules(one, inside)
    else:
        yield value


def _growth(rule: dict[str, Any]) -> float:
    """How many times longer a text of a hundred letters gets."""
    if rule.get("type") == "Prepend":
        return 1 + _length(rule.get("prepend")) / 100
    if rule.get("type") != "Replace":
        return 1.0
    pattern = rule.get("pattern")
    # else an expression, which may match one letter
    found = pattern.get("String") if isinstance(pattern, dict) else None
    return _length(rule.get("content")) / max(1, _length(found))


def _length(text: Any) -> int:
    return len(text) if isinstance(text, str) else 0


def _longest_template(value: Any) -> int:
    parts = [part for rule in _rules(value, "processors") for part in (rule.get("single"), rule.get("pair"))]
    return max((len(part) for part in parts if isinstance(part, list)), default=0)
