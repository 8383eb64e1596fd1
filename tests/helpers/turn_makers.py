"""Turns for the tests of data, and what is read of them."""

import pytest

from repsft_fast.data.turns import read_turns
from repsft_fast.errors import DataError

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Ulm"}}}


def read(*turns, **options):
    return read_turns(list(turns), "messages", "f:7", **options)


def message_of(turn, **options):
    """The one turn's message, the role left out."""
    (message,) = read(turn, **options).messages
    return {key: value for key, value in message.items() if key != "role"}


def refusal(turns, **options):
    with pytest.raises(DataError) as caught:
        read_turns(turns, "messages", "f:7", **options)
    message = str(caught.value)
    assert message.startswith("f:7, field 'messages")
    assert "; " in message, "no way out is named"
    return message


def ai(content="a", **fields):
    return {"role": "assistant", "content": content, **fields}


def user(content="q", **fields):
    return {"role": "user", "content": content, **fields}
