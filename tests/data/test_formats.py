import pytest

from repsft_fast.data.formats import Conversation, Pair, Text, detect, parse, read_task, read_weight
from repsft_fast.data.pretokenised import Pretokenised
from repsft_fast.errors import DataError

TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    ("row", "form", "parsed"),
    [
        ({"messages": TURNS}, "messages", Conversation(TURNS)),
        ({"messages": [{"role": "developer", "content": "s"}, *TURNS]}, "messages", None),
        (
            {
                "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
                "system": "s",
            },
            "conversations",
            Conversation([{"role": "system", "content": "s"}, *TURNS]),
        ),
        ({"conversations": TURNS}, "conversations", Conversation(TURNS)),
        ({"prompt": "q", "completion": "a", "text": "x"}, "prompt", Pair("q", "a", chat=False)),
        ({"prompt": TURNS[:1], "completion": TURNS[1:]}, "prompt", Conversation(TURNS, trainable=(1,))),
        ({"instruction": "q", "input": "", "output": "a"}, "alpaca", Pair("q", "a", chat=True)),
        ({"instruction": "q", "input": "c", "output": "a"}, "alpaca", Pair("q\n\nc", "a", chat=True)),
        ({"instruction": "q", "output": "a"}, "alpaca", Pair("q", "a", chat=True)),
        ({"query": "q", "response": "a"}, "query", Pair("q", "a", chat=True)),
        ({"text": "t", "messages": None}, "text", Text("t")),
        ({"input_ids": [1, 2, 3]}, "input_ids", [Pretokenised([1, 2, 3], [True] * 3)]),
        (
            {"input_ids": [1, 2, 3], "labels": [-100, 2, -100]},
            "input_ids",
            [Pretokenised([1, 2, 3], [False, True, False])],
        ),
        (
            {"input_ids": [0, 0, 1, 2], "labels": [-100, -100, -100, 2], "attention_mask": [0, 0, 1, 1]},
            "input_ids",
            [Pretokenised([1, 2], [False, True])],
        ),
    ],
)
def test_each_format_is_found_by_its_keys_and_read(row, form, parsed):
    assert detect(row, "f:1") == form
    result = parse(row, form, "f:1")
    if parsed is None:
        assert [message["role"] for message in result.messages] == ["system", "user", "assistant"]
    else:
        assert result == parsed


def test_tools_reasoning_and_tool_calls_come_along_and_arrow_nulls_do_not():
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": None}}}
    turns = [
        {"role": "user", "content": "1+1?", "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "I add."},
        {"role": "tool", "content": "2", "name": "add"},
        {"role": "assistant", "content": "2", "reasoning_content": None},
    ]
    parsed = parse({"messages": turns, "tools": '[{"name": "add"}]'}, "messages", "f:1", merged=True)
    assert parsed.tools == [{"type": "function", "function": {"name": "add"}}]
    assert parsed.messages == [
        {"role": "user", "content": "1+1?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}],
            "reasoning_content": "I add.",
        },
        {"role": "tool", "content": "2", "name": "add"},
        {"role": "assistant", "content": "2"},
    ]


def turn(role, content="x"):
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("row", "form", "words"),
    [
        ({"prompt": "q"}, "auto", ["field 'completion'", "missing"]),
        ({"prompt": "q", "completion": None}, "auto", ["field 'completion'", "null"]),
        ({"a": 1, "b": 2}, "auto", ["no format", "'a'", "'b'"]),
        ({}, "auto", ["no format"]),
        (["messages"], "messages", ["not a row", "list"]),
        ({"text": "t"}, "messages", ["field 'messages'", "missing", "looks like 'text'"]),
        ({"messages": None, "query": "q", "response": "a"}, "messages", ["null", "looks like 'query'"]),
        ({"messages": "hi"}, "messages", ["field 'messages'", "str"]),
        ({"messages": []}, "messages", ["empty"]),
        ({"messages": ["hi"]}, "messages", ["messages[0]", "str"]),
        ({"messages": [{"content": "x"}]}, "messages", ["messages[0].role"]),
        ({"messages": [turn(["user"])]}, "messages", ["messages[0].role"]),
        ({"messages": [turn("user"), turn("assistant", None)]}, "messages", ["messages[1].content", "null"]),
        ({"messages": [turn("user"), turn("assistant", 7)]}, "messages", ["messages[1].content", "int"]),
        ({"messages": [turn("user", "\ud800")]}, "messages", ["messages[0].content", "surrogate", "U+D800"]),
        ({"conversations": [{"from": "human"}]}, "conversations", ["conversations[0]", "null"]),
        ({"prompt": "q", "completion": [turn("assistant")]}, "prompt", ["two kinds"]),
        ({"prompt": 1, "completion": 2}, "prompt", ["neither", "int"]),
        ({"prompt": [turn("user")], "completion": []}, "prompt", ["one turn"]),
        ({"prompt": [turn("system")], "completion": [turn("user")]}, "prompt", ["assistant"]),
        ({"instruction": "q", "input": 3, "output": "a"}, "alpaca", ["field 'input'", "int"]),
        ({"query": "q", "response": ["a"]}, "query", ["field 'response'", "list"]),
        ({"text": b"t"}, "text", ["field 'text'", "bytes"]),
        ({"messages": [turn("user")], "tools": "{"}, "messages", ["field 'tools'", "JSON"]),
        ({"messages": [turn("user")], "tools": {"name": "f"}}, "messages", ["field 'tools'"]),
        ({"input_ids": "12"}, "input_ids", ["input_ids", "str"]),
        ({"input_ids": [1, 2.0]}, "input_ids", ["input_ids'[1]", "2.0"]),
        ({"input_ids": [1, True]}, "input_ids", ["input_ids'[1]", "True"]),
        ({"input_ids": [1, -1]}, "input_ids", ["input_ids[1]", "negative"]),
        ({"input_ids": [1, 2**31]}, "input_ids", ["input_ids'[1]"]),
        ({"input_ids": [1, 2], "labels": [1]}, "input_ids", ["labels", "length", "got 1"]),
        ({"input_ids": [1, 2], "labels": [1, 3]}, "input_ids", ["labels[1]", "got 3", "not shifted"]),
        ({"input_ids": [1, 2], "labels": [1, -1]}, "input_ids", ["labels[1]", "got -1"]),
        (
            {"input_ids": [1, 2], "labels": [1, 2], "attention_mask": [1, 0]},
            "input_ids",
            ["attention_mask hides"],
        ),
    ],
)
def test_a_bad_row_names_its_place_and_field(row, form, words):
    with pytest.raises(DataError) as caught:
        parse(row, detect(row, "data.jsonl:17") if form == "auto" else form, "data.jsonl:17")
    message = str(caught.value)
    assert message.startswith("data.jsonl:17")
    assert [word for word in words if word not in message] == []


def test_nesting_in_tools_is_bounded():
    deep: object = "x"
    for _ in range(200):
        deep = [deep]
    with pytest.raises(DataError, match="nested too deeply"):
        parse({"messages": TURNS, "tools": [{"x": deep}]}, "messages", "f:1")


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), "one", "", None, True, 10**400])
def test_a_weight_is_a_finite_number_not_below_zero(value):
    with pytest.raises(DataError, match="f:3, field 'w': is not a weight"):
        read_weight({"w": value}, "w", "f:3")


def test_weights_and_tasks_are_read():
    assert read_weight({"w": 2}, "w", "f:1") == 2.0
    assert read_task({"t": 4}, "t", "f:1") == "4"
    for value in (None, "", 1.5, True):
        with pytest.raises(DataError, match="f:1, field 't': is not a task"):
            read_task({"t": value}, "t", "f:1")
