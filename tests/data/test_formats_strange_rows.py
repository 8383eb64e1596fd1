"""Rows as other trainers' users write them: trained as they are meant, or refused with a way out."""

import json

import pytest

from repsft_fast.data.load import DataSettings, load
from repsft_fast.errors import DataError
from tests.helpers.chat_tokenizers import CHATML, QWEN3, byte_level, trained_text
from tests.helpers.turn_makers import ai, message_of, read, refusal, user

END = "<|im_end|>"
THINK = "<think>\nwhy\n</think>\n\n"
# As harmony's: reasoning has a field and a place of its own, and <think> in the text is text like any other.
CHANNELS = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}{% if message.thinking %}{{"
    " '[why: ' + message.thinking + ']' }}{% endif %}{{ message.content + '<|im_end|>\n' }}{% endfor %}{% if"
    " add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Qwen's: arguments that are text already are written as they are.
CALLS = CHATML.replace(
    "message.content +",
    '(message.content or \'\') + ((\'{"name": "\' + message.tool_calls[0].function.name + \'", "arguments":'
    " ' + (message.tool_calls[0].function.arguments if message.tool_calls[0].function.arguments is string"
    " else message.tool_calls[0].function.arguments | tojson) + '}') if message.tool_calls else '') +",
)


@pytest.fixture
def one(tmp_path):
    """one(row, template, **settings) → (what is trained, the account of loading)."""

    def run(row, template=CHATML, **settings):
        path = tmp_path / "rows.jsonl"
        path.write_text(json.dumps(row) + "\n", encoding="utf-8")
        tokenizer = byte_level(template)
        loaded = load(str(path), tokenizer, DataSettings(**settings))
        (sample,) = loaded.samples
        return trained_text(sample, tokenizer), loaded

    return run


def refused(one, row, *words, **settings):
    with pytest.raises(DataError) as caught:
        one(row, **settings)
    message = str(caught.value)
    assert [word for word in words if word not in message] == [], message


def chat(*turns, **columns):
    return {"messages": list(turns), **columns}


# Turns.


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("tool-response", "tool"),
        ("Tool Output", "tool"),
        ("function-result", "tool"),
        (" Function_Output", "tool"),
        ("GPT", "assistant"),
        ("Chat-GPT", None),
        ("agent", None),
        ("environment", None),
    ],
)
def test_roles_are_spelled_in_several_ways_and_not_guessed(name, role):
    turn = {"role": name, "content": "x"}
    if role is None:
        assert "is not a role" in refusal([turn])
    else:
        assert read(turn).messages == [{"role": role, "content": "x"}]


@pytest.mark.parametrize("role", ["function-call", "Function Calls", "tool-calls"])
def test_a_call_is_one_however_its_role_is_spelled(role):
    turn = {"from": role, "value": '{"name": "f", "arguments": {}}'}
    assert read(turn).messages[0]["tool_calls"][0]["function"]["name"] == "f"


@pytest.mark.parametrize(
    "text",
    [
        THINK,
        "why\n</think>\n\n",
        "[THINK]why[/THINK]",
        "<seed:think>why</seed:think>\n",
        " <thought> why </thought>",
    ],
)
def test_reasoning_that_stands_in_the_field_and_in_the_text_is_one_thing(one, text):
    """It was trained twice: <think>why</think> in front of the text, and once more in the text."""
    row = chat(user(), ai(text + "a", reasoning="why"))
    assert one(row, QWEN3)[0] == f"·{THINK}a{END}"
    assert one(row, CHANNELS)[0] == f"·[why: why]a{END}"
    if text == THINK:  # a template without a place for it writes it with the text
        assert one(row, CHATML)[0] == f"·{THINK}a{END}"
    else:
        refused(one, row, "turn 2")


def test_reasoning_that_differs_from_the_texts_is_refused_and_a_mark_in_the_answer_is_none():
    assert "another in its field" in refusal([ai(THINK + "a", reasoning="therefore")])
    assert "another in its field" in refusal([ai("<think>\n\n</think>\n\na", reasoning="therefore")])
    assert message_of(ai("</think> closes it", reasoning="why"))["content"] == "</think> closes it"
    assert (
        message_of(ai("it ends with </think>, mostly", reasoning="why"))["content"]
        == "it ends with </think>, mostly"
    )


def test_reasoning_of_white_space_is_no_fault(one):
    assert one(chat(user(), ai(reasoning="\n\n")), QWEN3)[0] == f"·<think>\n\n</think>\n\na{END}"
    assert one(chat(user(), ai("<think>  </think>a")), QWEN3)[0] == f"·<think>\n  \n</think>\n\na{END}"


@pytest.mark.parametrize(
    ("key", "no", "yes"),
    [
        ("prefill", False, True),
        ("frozen", False, True),
        ("end_turn", True, False),
        ("keep", 1, 0),
        ("is_selected", True, False),
    ],
)
def test_a_field_that_says_no_to_the_turn_is_refused_and_its_usual_value_is_named(key, no, yes):
    assert f"messages[0].{key}'" in refusal([ai(**{key: yes})])
    assert read(ai(**{key: no})).unknown == (key,)


@pytest.mark.parametrize("key", ["cot", "scratchpad", "parts", "observation", "long_cot"])
def test_a_field_that_holds_text_under_another_name_is_refused(key):
    assert f"messages[0].{key}'" in refusal([ai(**{key: "more"})])


# What a chat template makes of them.


def test_reasoning_in_the_text_goes_where_the_template_has_a_place_for_it(one):
    """It was trained as a part of the answer."""
    expected = f"·[why: why]a{END}"
    assert one(chat(user(), ai("a", reasoning="why")), CHANNELS)[0] == expected
    assert one(chat(user(), ai(THINK + "a")), CHANNELS)[0] == expected
    # no place: it stays where it is
    assert one(chat(user(), ai(THINK + "a")), CHATML)[0] == f"·{THINK}a{END}"


def test_an_empty_thinking_is_none_where_thinking_has_a_place_of_its_own(one):
    assert one(chat(user(), ai("<think>\n\n</think>\n\na")), CHANNELS)[0] == f"·a{END}"
    assert one(chat(user(), ai("<think>\n\n</think>\n\na")), CHATML)[0] == f"·<think>\n\n</think>\n\na{END}"


def test_thinking_that_is_only_closed_has_no_place_beside_a_field(one):
    refused(
        one, chat(user(), ai("why\n</think>\n\na")), "turn 2", "write <think> in front", template=CHANNELS
    )
    assert one(chat(user(), ai("why\n</think>\n\na")), QWEN3)[0] == f"·{THINK}a{END}"


def test_an_answer_that_mentions_a_mark_of_thinking_is_not_made_reasoning(one):
    """Templates that look for </think> anywhere: the first half of the answer was trained as thinking."""
    row = chat(user(), ai("write </think> behind it"))
    refused(one, row, "turn 2", "for reasoning", template=QWEN3)
    for template in (CHATML, CHANNELS):
        assert one(row, template)[0] == f"·write </think> behind it{END}"
    assert (
        one(chat(user(), ai("write </think> behind it", reasoning="why")), QWEN3)[0]
        == f"·{THINK}write </think> behind it{END}"
    )


def test_a_place_that_is_for_last_turns_only_is_not_gone_round(one):
    """Earlier turns would train <think> as text, and the last one would not."""
    last_only = CHANNELS.replace("if message.thinking", "if message.thinking and loop.last")
    row = chat(user(), ai(THINK + "a"), user(), ai(THINK + "b"))
    refused(one, row, "turn 2", "train_on: last", template=last_only)
    assert one(row, last_only, train_on="last")[0] == f"·[why: why]b{END}"


@pytest.mark.parametrize("arguments", ["Ulm", "print(1)", "[1, 2"])
def test_arguments_that_are_no_json_are_not_written_into_the_json_of_a_call(one, arguments):
    call = {"function": {"name": "f", "arguments": arguments}}
    refused(one, chat(user(), ai("", tool_calls=[call])), "not JSON", arguments, template=CALLS)


@pytest.mark.parametrize("arguments", ["[1, 2]", '{"a": "Ulm"}', '"Ulm"', {"a": "Ulm"}])
def test_arguments_that_are_json_are_written(one, arguments):
    call = {"function": {"name": "f", "arguments": arguments}}
    written = arguments if isinstance(arguments, str) else json.dumps(arguments)
    trained, _ = one(chat(user(), ai("", tool_calls=[call])), CALLS)
    assert trained == f'·{{"name": "f", "arguments": {written}}}{END}'


def test_speakers_that_the_template_does_not_name_are_said(one):
    row = chat(user(name="Bob"), ai(name="Amy"))
    assert any("speakers" in warning for warning in one(row)[1].warnings)
    named = CHATML.replace("message.role +", "message.role + (' ' + message.name if message.name else '') +")
    assert not any("speakers" in warning for warning in one(chat(user(name="Bob"), ai()), named)[1].warnings)
    assert not any("speakers" in warning for warning in one(chat(user(), ai()))[1].warnings)


@pytest.mark.parametrize(
    ("answer", "said"), [("hi", False), ("in", False), ("end", False), (THINK + "hi", False)]
)
def test_no_opener_is_said_to_be_trained_where_an_answer_stands_in_a_mark_by_chance(one, answer, said):
    assert (
        any("generation prompt" in warning for warning in one(chat(user(), ai(answer)), QWEN3)[1].warnings)
        is said
    )


def test_an_opener_that_is_trained_is_said(one):
    loose = CHATML.replace("{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}", "")
    assert any("generation prompt" in warning for warning in one(chat(user(), ai()), loose)[1].warnings)


@pytest.mark.parametrize("tail", [END, END + "\n"])
def test_an_end_of_turn_that_row_and_template_both_write_is_refused(one, tail):
    row = chat(user(), ai("a" + tail), user(), ai("b"))
    refused(one, row, END, "writes it again", special_tokens="parse")
    assert one(chat(user(), ai("a")), special_tokens="parse")[0] == f"·a{END}"


# Columns.


@pytest.mark.parametrize("value", ["false", "True", " FALSE "])
def test_a_truth_value_in_quotes_is_refused(one, value):
    """Templates take any text for true."""
    refused(
        one,
        chat(user(), ai(), chat_template_kwargs={"enable_thinking": value}),
        "enable_thinking",
        "without quotes",
    )
    with pytest.raises(DataError, match="without quotes"):
        DataSettings(template_kwargs={"enable_thinking": value})


def test_a_variable_that_is_a_part_of_a_longer_name_is_not_read(one):
    template = CHATML + "{{ enable_thinking }}"
    row = chat(user(), ai(), chat_template_kwargs={"enable_thinkin": False, "enable_thinking": ""})
    assert any("does not read" in warning for warning in one(row, template)[1].warnings)
    row = chat(user(), ai(), chat_template_kwargs={"enable_thinking": ""})
    assert not any("does not read" in warning for warning in one(row, template)[1].warnings)


@pytest.mark.parametrize(
    "name",
    [
        "reasoning_effort",
        "thinking_mode",
        "model_identity",
        "enable_thinking",
        "keep_past_thinking",
        "noThinking",
    ],
)
def test_a_column_that_templates_read_as_a_variable_is_refused_with_its_place(one, name):
    refused(one, chat(user(), ai(), **{name: "high"}), repr(name), "chat_template_kwargs", "ignore_columns")
    assert one(chat(user(), ai(), **{name: None}))[0] == f"·a{END}"


@pytest.mark.parametrize("name", ["continue_final_message", "last_turn_only", "target_turn", "documents"])
def test_other_columns_that_decide_are_refused(one, name):
    refused(one, chat(user(), ai(), **{name: [1]}), repr(name))


@pytest.mark.parametrize(
    ("name", "no", "yes"),
    [
        ("exclude", True, False),
        ("skipped", 1, 0),
        ("isDeleted", True, False),
        ("keep", False, True),
        ("is_valid", 0, 1),
    ],
)
def test_a_row_that_says_no_to_itself_is_not_trained(one, name, no, yes, tmp_path):
    refused(one, chat(user(), ai(), **{name: no}), repr(name), "not to be trained", "ignore_columns")
    trained, loaded = one(chat(user(), ai(), **{name: yes}))
    assert trained == f"·a{END}"
    assert loaded.columns_unused == {name: 1}
    assert one(chat(user(), ai(), **{name: "of the usual kind"}))[0] == f"·a{END}"
    path = tmp_path / "both.jsonl"
    rows = chat(user(), ai("left out"), **{name: no}), chat(user(), ai("b"), **{name: yes})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    loaded = load(str(path), byte_level(), DataSettings(on_bad_row="drop"))
    assert [trained_text(sample, byte_level()) for sample in loaded.samples] == [f"·b{END}"]


def test_an_answer_that_is_labelled_for_preferences_is_refused(one):
    for name in ("kto_tag", "label", "is_desirable"):
        refused(one, {"prompt": "q", "completion": "bad", name: False}, repr(name))


def test_a_system_column_may_differ_from_the_turn_in_white_space(one):
    assert one(chat({"role": "system", "content": "s"}, user(), ai(), system=" s\n"))[0] == f"·a{END}"


# Rows of ids.

IDS = [72, 73, 74]


@pytest.mark.parametrize(
    "name",
    [
        "n_prompt",
        "num_prompt_tokens",
        "prompt_tokens",
        "promptLength",
        "response_start_idx",
        "len_prompt",
        "prompt_ids",
    ],
)
def test_beside_ids_the_prompts_length_decides_unless_a_mask_says_it(one, name):
    refused(one, {"input_ids": IDS, name: 2}, repr(name), "what is trained", template=None)
    trained, loaded = one({"input_ids": IDS, "labels": [-100, -100, 74], name: 2}, None)
    assert trained == "·k"
    assert loaded.columns_unused == {name: 1}
    assert one({"input_ids": IDS, "completion_mask": [0, 0, 1], name: 2}, None)[0] == "·k"


@pytest.mark.parametrize(
    "name", ["length", "num_tokens", "seq_len", "input_length", "n_tokens", "token_length"]
)
def test_a_rows_own_length_is_harmless_and_another_is_not(one, name):
    trained, loaded = one({"input_ids": IDS, name: 3}, None)
    assert trained == "·jk"
    assert loaded.columns_unused == {name: 1}
    refused(one, {"input_ids": IDS, name: 2}, repr(name), template=None)


def test_a_length_without_the_padding_is_the_rows_own(one):
    assert one({"input_ids": IDS, "attention_mask": [1, 1, 0], "length": 2}, None)[0] == "·j"
    refused(one, {"input_ids": IDS, "attention_mask": [1, 1, 0], "length": 1}, "'length'", template=None)


def test_token_types_that_divide_the_row_are_refused(one):
    refused(one, {"input_ids": IDS, "token_type_ids": [0, 0, 1]}, "token_type_ids", template=None)
    assert one({"input_ids": IDS, "token_type_ids": [0, 0, 0]}, None)[0] == "·jk"


@pytest.mark.parametrize("name", ["document_lengths", "sample_lens", "pack", "chunks"])
@pytest.mark.parametrize("value", [[2, 2], [0, 2, 4], [1, 1, 2]])
def test_lengths_or_borders_under_another_name_are_not_one_sample(one, name, value):
    row = {"input_ids": [5, 6, 7, 8], "labels": [-100, 6, -100, 8], name: value}
    with pytest.raises(
        DataError,
        match=rf"{name}.*: divides the ids into several samples.*rename it seq_lengths or cu_seqlens",
    ):
        one(row)
    assert one(row, ignore_columns=(name,))[1].samples[0].ids == [5, 6, 7, 8]


@pytest.mark.parametrize("value", [[4], [2, 3], [0, 3], [0, 4], [True, True], ["a", "b"], [0.5, 3.5]])
def test_other_lists_are_named_and_no_more(one, value):
    _, loaded = one({"input_ids": [5, 6, 7, 8], "labels": [-100, 6, -100, 8], "pack": value})
    assert loaded.columns_unused == {"pack": 1}
