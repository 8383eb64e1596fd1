"""Calls and tools in every form that rows hold them in are one form; what cannot be kept whole is refused."""

import json

import pytest

from repsft_fast.data.tool_calls import LEVELS, read_tools
from repsft_fast.data.turns import Turns
from repsft_fast.errors import DataError
from tests.helpers.turn_makers import CALL, ai, message_of, read, refusal, user


@pytest.mark.parametrize(
    "turn",
    [
        ai(tool_calls=[CALL]),
        ai(tool_calls=(CALL,)),
        ai(tool_calls=[{"name": "weather", "arguments": {"city": "Ulm"}}]),
        ai(tool_calls=[{"name": "weather", "parameters": {"city": "Ulm"}}]),
        ai(
            tool_calls=[
                {"type": None, "id": None, "function": {"name": "weather", "arguments": '{"city": "Ulm"}'}}
            ]
        ),
        ai(tool_calls=[{**CALL, "id": "", "index": 0}]),
        ai(tool_calls=json.dumps([CALL])),
        ai(tool_calls=[json.dumps(CALL)]),
        ai(tool_calls=[{"function": json.dumps(CALL["function"])}]),
        ai(tool_calls=[{"name": "weather", "arguments": json.dumps(json.dumps({"city": "Ulm"}))}]),
        ai(tool_calls=None, function_call={"name": "weather", "arguments": '{"city": "Ulm"}'}),
        ai(tool_calls=[CALL], function_call={"name": "weather", "arguments": {"city": "Ulm"}}),
        ai(function_call=json.dumps(CALL["function"])),
    ],
)
def test_every_way_to_write_a_call_is_one_call(turn):
    assert message_of(turn) == {"content": "a", "tool_calls": [CALL]}


@pytest.mark.parametrize(
    "value", [CALL["function"], [CALL["function"]], json.dumps(CALL["function"]), json.dumps([CALL])]
)
def test_a_turn_from_function_call_is_the_assistants_call(value):
    read_as = read(
        {"from": "function_call", "value": value, "weight": 0}, {"from": "tool_call", "value": value}
    )
    assert read_as == Turns([ai("", tool_calls=[CALL])] * 2, trainable=(1,))


@pytest.mark.parametrize(
    "value", ["I call weather", "[]", "", None, '{"name": "weather", "arguments": {"city": "Ulm"}', "3"]
)
def test_a_turn_from_function_call_without_a_call_is_refused(value):
    assert "messages[0].value'" in refusal([{"from": "function_call", "value": value}])


@pytest.mark.parametrize(  # oumi#2599: text of an object, rendered as text, is encoded twice
    ("written", "read_as"),
    [
        ('{"city": "Ulm"}', {"city": "Ulm"}),
        (' {"a": {"b": [1, null]}} ', {"a": {"b": [1, None]}}),
        ("{}", {}),
        (None, {}),
        ("", {}),
        (" ", {}),
        ({}, {}),
        ([], []),
        ([1, "2"], [1, "2"]),
        (0, 0),
        (False, False),
        ("print(1)", "print(1)"),
        ("[1]", "[1]"),
        ('"x"', '"x"'),
        ('"x', '"x'),
        ({"code": '{"a": 1}'}, {"code": '{"a": 1}'}),
    ],
)
def test_arguments(written, read_as):
    for call in ({"name": "f", "arguments": written}, {"function": {"name": "f", "arguments": written}}):
        (found,) = message_of(ai(tool_calls=[call]))["tool_calls"]
        assert found == {"type": "function", "function": {"name": "f", "arguments": read_as}}
        assert type(found["function"]["arguments"]) is type(read_as)


# vllm#30648: an empty list beside an answer
@pytest.mark.parametrize("nothing", [None, [], (), "", "[]", "null"])
def test_no_calls_are_no_field_in_any_turn(nothing):
    for turn in (ai(), user(), {"role": "tool", "content": "x"}):
        assert read({**turn, "tool_calls": nothing, "function_call": None}) == read(turn)
    assert read(ai(function_call={}), ai(function_call={"name": None, "arguments": None})) == read(ai(), ai())


@pytest.mark.parametrize(
    ("calls", "words"),
    [
        ("nonsense", ["tool_calls'", "JSON"]),
        ('{"name": "f"}', ["tool_calls'", "list"]),
        ({"name": "f"}, ["tool_calls'", "list"]),
        ([3], ["tool_calls'[0]", "int"]),
        ([None], ["tool_calls'[0]"]),
        ([{}], ["tool_calls'[0].name"]),
        ([{"name": " ", "arguments": {}}], ["[0].name"]),
        ([{"name": 3, "arguments": {}}], ["[0].name"]),
        ([CALL, {"type": "custom", "custom": {"name": "f", "input": "x"}}], ["[1].type", "custom"]),
        ([{"name": "f", "input": {"a": 1}}], ["[0].input"]),
        ([{**CALL, "weight": 0}], ["[0].weight"]),
        ([{**CALL, "name": "other"}], ["[0].name"]),
        ([{"function": {**CALL["function"], "result": "sunny"}}], ["[0].result"]),
        ([{"name": "f", "arguments": {"a": 1}, "parameters": {"a": 2}}], ["arguments and parameters"]),
        ([{"name": "f", "arguments": "{'a': 1}"}], ["[0].arguments", "JSON"]),
        ([{"name": "f", "arguments": '{"a": '}], ["[0].arguments", "JSON"]),
        ([{"name": "f", "arguments": '{"a": 1, "a": 2}'}], ["[0].arguments", "twice"]),
        ([{"name": "f", "arguments": '{"a": NaN}'}], ["[0].arguments", "NaN"]),
        ([{"name": "f", "arguments": '{"a": 1e999}'}], ["arguments.a", "finite", "inf"]),
        ([{"name": "f", "arguments": {"a": float("nan")}}], ["arguments.a", "finite", "nan"]),
        ([{"name": "f", "arguments": {"a": "\ud800"}}], ["arguments.a", "surrogate"]),
        ([{"name": "f", "arguments": '{"a": "\\ud800"}'}], ["arguments.a", "surrogate"]),
        ([{"name": "f", "arguments": {"a": b"x"}}], ["arguments.a", "bytes"]),
        ([{"name": "f", "arguments": {3: "x"}}], ["arguments", "int"]),
        ([{**CALL, "id": 3.5}], ["[0].id", "float"]),
    ],
)
def test_a_call_that_cannot_be_kept_whole_is_refused(calls, words):
    message = refusal([ai(None, tool_calls=calls)])
    assert [word for word in words if word not in message] == []


def test_calls_are_the_assistants_and_the_same_wherever_they_stand():
    for role in ("user", "system", "tool"):
        assert "assistant" in refusal([{"role": role, "content": "x", "tool_calls": [CALL]}])
        assert "assistant" in refusal([{"role": role, "content": "x", "function_call": CALL["function"]}])
    assert "tool_calls and function_call" in refusal([ai(tool_calls=[CALL], function_call={"name": "other"})])
    assert "tool_calls and value" in refusal(
        [{"from": "function_call", "value": '{"name": "g"}', "tool_calls": [CALL]}]
    )


def test_ids_and_names_come_along():
    turns = [
        ai("", tool_calls=[{**CALL, "id": "c1"}, {**CALL, "id": 2}]),
        {"role": "tool", "content": "x", "tool_call_id": "c1", "name": "weather"},
        {"role": "tool", "content": "y", "tool_call_id": 2, "name": ""},
    ]
    call, first, second = read(*turns).messages
    assert [made["id"] for made in call["tool_calls"]] == ["c1", "2"]
    assert first == turns[1]
    assert second == {"role": "tool", "content": "y", "tool_call_id": "2"}
    assert "messages[0].name'" in refusal([user(name=3)])
    assert "messages[0].tool_call_id'" in refusal([{"role": "tool", "content": "x", "tool_call_id": [1]}])


def nested(levels):
    value: object = "x"
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize("as_text", [False, True])
def test_nesting_is_bounded(as_text):
    def call(levels):
        arguments = {"a": nested(levels)}
        return ai(tool_calls=[{"name": "f", "arguments": json.dumps(arguments) if as_text else arguments}])

    assert message_of(call(LEVELS - 4))["tool_calls"][0]["function"]["arguments"] == {"a": nested(LEVELS - 4)}
    assert "nested too deeply" in refusal([call(LEVELS + 1)])
    bottomless = '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"
    assert "arguments" in refusal([ai(tool_calls=[{"name": "f", "arguments": bottomless}])])


# Nulls inside values: what a merged schema put there goes, what the row says stays.


def test_nulls_in_calls_and_tools_go_only_where_a_merged_schema_put_them():
    arguments = {"city": "Ulm", "unit": None, "more": [{"a": None}, None]}
    tool = {"name": "f", "parameters": {"type": "object", "properties": {"unit": {"default": None}}}}

    def both(merged, encode=lambda value: value):
        call = {"name": "f", "arguments": encode(arguments)}
        (found,) = message_of(ai(tool_calls=[call]), merged=merged)["tool_calls"]
        (offered,) = read_tools(
            [{**tool, "parameters": encode(tool["parameters"])}], "f:7, field 'tools'", merged=merged
        )
        return found["function"]["arguments"], offered["function"]["parameters"]

    assert both(False) == (arguments, tool["parameters"])
    assert both(True) == ({"city": "Ulm", "more": [{}, None]}, {"type": "object", "properties": {"unit": {}}})
    # No schema reaches into text.
    assert both(True, json.dumps) == both(False, json.dumps) == (arguments, tool["parameters"])
    text = json.dumps([{"name": "f", "arguments": arguments}])
    assert message_of(ai(tool_calls=text), merged=True) == message_of(ai(tool_calls=text))
    assert read_tools(json.dumps([tool]), "f:7", merged=True) == read_tools([tool], "f:7")
    shared = {"from": "function_call", "value": json.dumps({"name": "f", "arguments": arguments})}
    assert message_of(shared, merged=True)["tool_calls"][0]["function"]["arguments"] == arguments


# Tools.

TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    "written",
    [
        [TOOL],
        (TOOL,),
        [TOOL["function"]],
        [{"type": None, "function": TOOL["function"]}],
        [{"type": "function", **TOOL["function"]}],
        [{**TOOL["function"], "parameters": '{"type": "object"}'}],
        [json.dumps(TOOL)],
        [{"function": json.dumps(TOOL["function"])}],
        json.dumps([TOOL]),
        json.dumps([TOOL["function"]]),
    ],
)
def test_every_way_to_write_tools_is_one(written):
    assert read_tools(written, "f:7, field 'tools'") == [TOOL]


@pytest.mark.parametrize("nothing", [None, [], (), "", " ", "[]", "null", {}])
def test_no_tools_are_none(nothing):
    assert read_tools(nothing, "f:7, field 'tools'") is None


def test_all_that_a_tool_says_is_kept():
    tool = {
        "type": "function",
        "function": {**TOOL["function"], "strict": True, "return": {"type": "string"}},
        "x": [1],
    }
    assert read_tools([tool], "f:7") == [tool]
    assert read_tools([{"name": "f", "strict": False}], "f:7") == [
        {"type": "function", "function": {"name": "f", "strict": False}}
    ]


@pytest.mark.parametrize(
    ("tools", "words"),
    [
        ("{", ["JSON"]),
        (TOOL, ["list"]),
        (3, ["list", "int"]),
        ([3], ["[0]", "int"]),
        (["f"], ["[0]", "JSON"]),
        ([TOOL, {"type": "web_search"}], ["[1].type", "web_search"]),
        ([{"description": "d"}], ["[0].name"]),
        ([{"type": "function", "function": {"name": ""}}], ["[0].name"]),
        ([{"name": "f", "parameters": "x: int"}], ["[0].parameters", "JSON"]),
        ([{"name": "f", "parameters": {"x": nested(100)}}], ["nested too deeply"]),
        ([{"name": "f", "parameters": {"x": float("inf")}}], ["[0].parameters.x", "finite"]),
    ],
)
def test_tools_that_cannot_be_kept_whole_are_refused(tools, words):
    with pytest.raises(DataError) as caught:
        read_tools(tools, "f:7, field 'tools'")
    message = str(caught.value)
    assert message.startswith("f:7, field 'tools'")
    assert "; " in message
    assert [word for word in words if word not in message] == []
