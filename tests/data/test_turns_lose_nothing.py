"""Random turns, each of whose strings is one of a kind: refused, kept, or in a field that is named as
unused."""

import json
import random

from repsft_fast.data.turns import REASONING_KEYS
from repsft_fast.errors import DataError
from tests.helpers.turn_makers import read

KEYS = [
    *(
        "content",
        "value",
        *REASONING_KEYS,
        "tool_calls",
        "function_call",
        "name",
        "tool_call_id",
        "id",
        "emotion",
        "meta",
    ),
    *(
        "refusal",
        "images",
        "text",
        "prefix",
        "output",
        "documents",
        "parts",
        "note",
        "Reasoning",
        "thought_text",
    ),
]


class Sentinels:
    def __init__(self, seed):
        self.draw = random.Random(seed)
        self.made = []

    def word(self):
        self.made.append(f"s{len(self.made)}e")
        return self.made[-1]

    def value(self, key):
        draw = self.draw.random()
        if key in ("tool_calls", "function_call"):
            calls = [self.call() for _ in range(self.draw.choice((0, 1, 1, 2)))]
            value = calls if key == "tool_calls" else (calls or [None])[0]
            return json.dumps(value) if draw < 0.3 else value
        if draw < 0.4 and key in ("content", "value"):
            return [self.part() for _ in range(self.draw.choice((0, 1, 2)))]
        return self.draw.choice(
            (self.word, self.word, self.word, lambda: None, lambda: "", lambda: [self.word()])
        )()

    def part(self):
        kind = self.draw.choice(("text", "text", "text", "thinking", "image", None))
        part = {"type": kind, kind or "text": self.word()}
        if self.draw.random() < 0.2:
            part[self.draw.choice(("note", "caption", "text", "thinking"))] = self.word()
        return self.draw.choice((part, part, self.word()))

    def call(self):
        arguments = {self.word(): self.draw.choice((self.word(), None, [{"x": self.word()}]))}
        function = {"name": self.word(), self.draw.choice(("arguments", "parameters")): arguments}
        if self.draw.random() < 0.3:
            function["arguments"] = json.dumps(arguments)
        if self.draw.random() < 0.1:
            function[self.draw.choice(("result", "input", "index"))] = self.word()
        return (
            function
            if self.draw.random() < 0.5
            else {"id": self.word(), "type": "function", "function": function}
        )

    def turn(self):
        turn = {
            self.draw.choice(("role", "from")): self.draw.choice(
                ("user", "gpt", "assistant", "tool", "function_call")
            )
        }
        for key in ("content", *self.draw.sample(KEYS, self.draw.choice((0, 1, 1, 2, 3)))):
            turn[key] = self.value(key)
        return turn


def named(turn, unknown):
    """The strings of the fields that the reader says it did not use."""
    parts = [part for key in ("content", "value") for part in turn.get(key) or () if isinstance(part, dict)]
    fields = [turn[key] for key in unknown if key in turn]
    return json.dumps(
        [fields, [part.get(key.removeprefix("content[].")) for part in parts for key in unknown]]
    )


def test_no_string_of_a_turn_is_lost_in_silence():
    accepted = 0
    for seed in range(4_000):
        sentinels = Sentinels(seed)
        turn = sentinels.turn()
        try:
            found = read(turn)
        except DataError:
            continue
        accepted += 1
        kept = json.dumps(found.messages) + named(turn, found.unknown)
        lost = [word for word in sentinels.made if word in json.dumps(turn) and word not in kept]
        assert lost == [], (seed, turn, found)
    assert 1_000 < accepted < 3_500, "the trial tries too little"


def test_nothing_but_an_error_of_ours_comes_of_whatever_stands_in_a_turn():
    bottomless: object = "x"
    for _ in range(50_000):
        bottomless = [bottomless]
    strange = [
        bottomless,
        {"x": bottomless},
        10**5000,
        -(10**5000),
        float("inf"),
        b"x",
        object(),
        {1: 2},
        {None: 3},
        "\ud800",
        1j,
    ]
    strange += [[value] for value in strange] + [{"name": "f", "arguments": value} for value in strange]
    strange += [[{"name": "f", "arguments": value}] for value in strange] + [
        [{"type": value, "text": "x"}] for value in strange
    ]
    refused = []
    for key in ("role", "from", "weight", "ignore", "labels", "id", "\ud800", 7, *KEYS):
        for value in strange:
            try:
                found = read({"role": "assistant", "content": "a", key: value})
            except DataError as error:
                refused.append(str(error))
            else:
                assert key in (*found.unknown, "name", "tool_call_id"), (key, type(value))
    assert len(refused) > 500
    assert max(len(message.encode("utf-8")) for message in refused) < 2_000, (
        "no place to print a row, nor half a character"
    )
