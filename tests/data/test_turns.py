"""A list of turns: every field is used, refused or named; nothing of a row is passed over in silence."""

import json
import time

import pytest

from repsft_fast.data.turns import MARKS, REASONING_KEYS, ROLES, Turns, read_turns
from tests.helpers.turn_makers import CALL, ai, message_of, read, refusal, user

TOOL = {"type": "function", "function": {"name": "f"}}

# Roles and order.


@pytest.mark.parametrize(
    ("names", "role"),
    [
        (["system", "developer", "System"], "system"),
        (["user", "User", " USER\n", "human", "prompter"], "user"),
        (["assistant", "gpt", "chatgpt", "model", "bot", "ai", "AI"], "assistant"),
        (
            [
                "tool",
                "ipython",
                "function",
                "observation",
                "tool_response",
                "tool_result",
                "function_response",
            ],
            "tool",
        ),
    ],
)
def test_roles_have_many_names(names, role):
    for name in names:
        assert read({"role": name, "content": "x"}) == read({"from": name, "value": "x"})
        assert read({"role": name, "content": "x"}) == Turns([{"role": role, "content": "x"}])


@pytest.mark.parametrize("role", ["narrator", "", None, 1, ["user"]])
def test_an_unknown_role_is_refused_with_the_known_ones(role):
    message = refusal([user(), {"role": role, "content": "x"}])
    assert "messages[1].role" in message
    assert all(name in message for name in ROLES)


def test_the_order_of_turns_is_the_templates_to_judge():
    roles = ["assistant", "tool", "user", "user", "system", "assistant", "assistant", "user"]
    assert [
        message["role"] for message in read(*({"role": role, "content": "x"} for role in roles)).messages
    ] == roles


@pytest.mark.parametrize("turns", [[], (), None, "hi", {"role": "user"}, ["hi"], [None], [[user()]]])
def test_what_is_no_list_of_turns_is_refused(turns):
    refusal(turns)


def test_both_pairs_of_names_may_stand_in_one_list_but_not_disagree_in_one_turn():
    mixed = read(
        {"from": "human", "value": "q"}, ai(), {"role": "user", "value": "r"}, {"from": "gpt", "content": "b"}
    )
    assert mixed.messages == [user(), ai(), user("r"), ai("b")]
    assert read({"role": "user", "from": "human", "content": "q", "value": "q"}) == read(user())
    assert read({"role": "user", "from": None, "content": "q", "value": None}) == read(user())
    assert "role and from" in refusal([user(**{"from": "gpt"})])
    assert "content and value" in refusal([user(value="other")])
    own = read_turns(
        [{"speaker": "user", "said": "q"}], "turns", "f:7", role_key="speaker", content_key="said"
    )
    assert own.messages == [user()]


# Content.


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("", ""),
        ([{"type": "text", "text": "a "}, {"type": "text", "text": " b"}], "a  b"),
        (
            [{"type": "input_text", "text": "a"}, {"type": "output_text", "text": "b", "annotations": []}],
            "ab",
        ),
        (["a", {"text": "b"}, {"type": None, "text": "c", "image": None}], "abc"),
    ],
)
def test_text_parts_are_joined_as_they_stand(content, text):
    assert message_of(user(content)) == {"content": text}


@pytest.mark.parametrize(
    "turn",
    [
        ai([{"type": "thinking", "thinking": "why", "signature": "x"}, {"type": "text", "text": "a"}]),
        ai([{"type": "reasoning", "text": "why"}, "a"]),
        ai([{"type": "thinking", "thinking": [{"type": "text", "text": "w"}, "hy"], "closed": True}, "a"]),
    ],
)
def test_parts_that_think_are_reasoning(turn):
    assert message_of(turn) == {"content": "a", "reasoning_content": "why"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["content", "null"]),
        ([], ["content", "empty"]),
        (7, ["content", "int"]),
        ({"type": "text", "text": "x"}, ["content", "dict"]),
        ("\ud800", ["surrogate", "U+D800"]),
        (["\ud800"], ["content[0]", "surrogate"]),
        ([7], ["content[0]", "int"]),
        ([{"type": "text"}], ["content[0]", "null"]),
        ([{"type": "text", "text": None}], ["content[0]", "null"]),
        ([{"type": "text", "text": "x", "train": True}], ["content[0].train", "messages[].content[].train"]),
        ([{"type": "text", "text": "x", "image_url": "u"}], ["content[0].image_url"]),
        ([{"text": "x"}, {"type": "image"}], ["content[1]", "'image'"]),
        ([{"type": "input_audio", "input_audio": {}}], ["'input_audio'"]),
        ([{"type": "file", "file": {}}], ["'file'"]),
        ([{"type": "refusal", "refusal": "no"}], ["'refusal'"]),
        ([{"type": "tool_use", "name": "f", "input": {}}], ["'tool_use'", "tool_calls"]),
        ([{"type": ["text"], "text": "x"}], ["content[0]", "type"]),
        (["a", {"type": "thinking", "thinking": "late"}], ["content[1]", "behind"]),
        ([{"type": "thinking", "thinking": "open", "closed": False}], ["not closed"]),
        ([{"type": "reasoning", "summary": []}], ["no text"]),
        ([{"type": "thinking", "thinking": "a", "text": "b"}], ["two things"]),
    ],
)
def test_content_that_is_not_text_is_refused(content, words):
    message = refusal([user(), ai(content)])
    assert [word for word in ("messages[1]", *words) if word not in message] == []


def test_a_turn_without_content_calls_or_thinks():
    assert message_of(ai(None, tool_calls=[CALL])) == {"content": "", "tool_calls": [CALL]}
    assert message_of({"role": "assistant", "reasoning": "r"}) == {"content": "", "reasoning_content": "r"}
    for turn in (
        ai(None, tool_calls=[]),
        {"role": "assistant"},
        user(None),
        {"role": "tool", "content": None},
    ):
        assert ".content'" in refusal([turn])


# Reasoning: fw-ai/cookbook#378.


@pytest.mark.parametrize("key", REASONING_KEYS)
def test_reasoning_has_many_names_and_is_one_field(key):
    assert message_of(ai(**{key: "\nwhy"})) == {"content": "a", "reasoning_content": "\nwhy"}
    for nothing in (None, "", []):
        assert message_of(ai(**{key: nothing})) == {"content": "a"}
        assert read(user(**{key: nothing})) == read(user())
    assert key in refusal([user(**{key: "why"})])
    for other in (True, ["why"], 3):
        assert f"messages[0].{key}'" in refusal([ai(**{key: other})])


def test_reasoning_in_two_fields_must_be_the_same():
    assert message_of(ai(reasoning="r", reasoning_content="r", thinking="")) == {
        "content": "a",
        "reasoning_content": "r",
    }
    assert "reasoning_content and thinking" in refusal([ai(thinking="s", reasoning_content="r")])
    assert "two things" in refusal([ai([{"type": "thinking", "thinking": "s"}, "a"], reasoning="r")])
    assert "assistant" in refusal([user([{"type": "thinking", "thinking": "s"}, "q"])])
    assert "reasoning_details" in refusal([ai(reasoning_details=[{"type": "reasoning.text", "text": "r"}])])


# What is trained: axolotl#1702.


def test_without_marks_all_turns_may_be_trained():
    assert read(user(), ai(), user(), ai()).trainable is None
    assert read(user(), ai(weight=None, train=None)).trainable is None


@pytest.mark.parametrize("key", MARKS)
@pytest.mark.parametrize(("one", "zero"), [(1, 0), (True, False), (1.0, 0.0)])
def test_marks_say_which_turns_are_trained(key, one, zero):
    yes, no = (one, zero) if key != "masked" else (zero, one)
    turns = [user(), ai(**{key: no}), user(), ai(), {**user(), key: no}, ai(**{key: yes})]
    assert read(*turns) == Turns([user(), ai()] * 3, trainable=(3, 5))
    assert read(user(**{key: no}), ai()).trainable == (1,)
    assert read(user(), ai(**{key: no})).trainable == ()
    for role in ("user", "system", "tool"):
        message = refusal([{"role": role, "content": "x", key: yes}])
        assert f"messages[0].{key}'" in message
        assert "assistant" in message


@pytest.mark.parametrize("key", MARKS)
@pytest.mark.parametrize("value", [0.5, 2, -1, "1", "true", "", [], [1], {}, float("nan")])
def test_a_mark_in_between_or_of_another_kind_is_refused(key, value):
    assert f"messages[1].{key}': is no mark" in refusal([user(), ai(**{key: value})])


def test_marks_agree():
    assert read(user(), ai(weight=1, train=True, masked=False)).trainable == (1,)
    assert "weight and train" in refusal([ai(weight=1, train=False)])
    assert "loss_mask and masked" in refusal([ai(loss_mask=1, masked=True)])


@pytest.mark.parametrize("key", ["mask", "ignore"])
@pytest.mark.parametrize("value", [0, 1, True, False, [0, 1]])
def test_marks_that_trainers_use_for_both_meanings_are_refused(key, value):
    message = refusal([ai(**{key: value})])
    assert f"messages[0].{key}'" in message
    assert "weight: 0" in message


# Fields that are not ours.


def test_harmless_fields_are_named():
    turns = [
        user(id=3, timestamp="t"),
        ai(id=4, lang="en", finish_reason="stop", images=[], audio=None, refusal=""),
    ]
    assert read(*turns).unknown == ("id", "timestamp", "lang", "finish_reason", "images", "refusal")
    assert read(user([{"type": "text", "text": "x", "cache_control": {"type": "e"}}])).unknown == (
        "content[].cache_control",
    )
    assert read(user(message_id="m", token_count=3, has_image=False)).unknown == (
        "message_id",
        "token_count",
        "has_image",
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train_detail", [{"begin_offset": 0, "end_offset": 1, "train": False}]),
        ("loss_scale", 0.5),
        ("Weight", 0),
        ("should_train", False),
        ("loss_masks", 0),
        ("label", 1),
        ("labels", [1]),
        ("chat_template_kwargs", {"enable_thinking": False}),
        ("enable_thinking", False),
        ("think", "why"),
        ("reasoningText", "why"),
        ("prefix", True),
        ("partial", True),
        ("add_eos", False),
        ("tools", [TOOL]),
        ("functions", [TOOL]),
        ("toolCalls", [CALL]),
        ("tool_name", "f"),
        ("arguments", "{}"),
        ("images", ["x.png"]),
        ("audio", {"id": 1}),
        ("video", "x"),
        ("text", "other"),
        ("Content", "other"),
        ("message", "other"),
        ("output", "other"),
        ("refusal", "I cannot"),
        ("documents", [{"text": "x"}]),
        ("channel", "analysis"),
        ("recipient", "functions.f"),
        ("system_prompt", "s"),
    ],
)
def test_fields_that_speak_and_are_not_read_are_refused_with_the_way_out(key, value):
    for turn in (ai(**{key: value}), ai(None, **{key: value})):
        message = refusal([user(), turn])
        assert f"messages[1].{key}'" in message
        assert f'data.ignore_columns: ["messages[].{key}"]' in message
    assert read(ai(**{key: value}), ignored=frozenset([key])) == read(ai())


def test_what_the_user_ignores_is_passed_over_whatever_it_is():
    turn = ai([{"type": "text", "text": "a", "text_hash_of": "x"}], weight=0, mask=1, reasoning_details=[1])
    ignored = frozenset(["weight", "mask", "reasoning_details", "content[].text_hash_of"])
    assert read(turn, ignored=ignored) == read(ai())
    refusal([turn], ignored=ignored - {"content[].text_hash_of"})


def test_a_fields_name_is_valid_unicode():
    assert "surrogate" in refusal([user(**{"x\ud800": 1})])
    assert "int" in refusal([{**user(), 3: 1}])


def test_the_row_is_left_as_it_was_and_shares_nothing_with_the_messages():
    turn = ai(tool_calls=[{"id": "c", "function": {"name": "f", "arguments": {"a": [1]}}}], weight=0)
    before = json.dumps(turn)
    (message,) = read(turn).messages
    message["tool_calls"][0]["function"]["arguments"]["a"].append(2)
    assert json.dumps(turn) == before


def test_many_turns_cost_as_much_as_few_of_them():
    call = {"name": "f", "arguments": '{"a": {"b": [1, 2]}}'}
    turns = [user("q" * 100), ai("a" * 100, tool_calls=[call], weight=1, reasoning="r", id=3)]

    def seconds(pairs):
        def once():
            start = time.process_time()
            read(*turns * pairs)
            return time.process_time() - start

        return min(once() for _ in range(5))

    few, many = seconds(500), seconds(5_000)
    assert few < 0.2, "1,000 turns"  # measured: 0.02
    assert many < 30 * few, "ten times the turns"
