"""What exactly is trained of a conversation: kinds of templates and rows that went wrong in trainers, each
with its report."""

import json
import time

import pytest

from repsft_fast.data import bounded, long_chats, spans
from repsft_fast.data.encode import Encoder
from repsft_fast.data.formats import Conversation
from repsft_fast.data.placeholders import Piece
from repsft_fast.data.template import NOTE_MARKED, ChatTemplate, Rendered
from repsft_fast.errors import DataError
from tests.helpers.chat_tokenizers import BLOCKS, CHATML, LLAMA3, QWEN3, byte_level

OPEN, END = "<|im_start|>", "<|im_end|>"
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Ulm", "days": 3}}}
TOOL = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {}}},
}


def user(text):
    return {"role": "user", "content": text}


def says(text="", **fields):
    return {"role": "assistant", "content": text, **fields}


def shown(template, messages, tokenizer=None, tools=None, trainable=None, row_kwargs=None, **settings):
    """(the rendered text with « » around what is trained, the notes)"""
    made = ChatTemplate(template, tokenizer or byte_level(template), **settings)
    rendered = made(Conversation(messages, tools, trainable, row_kwargs or {}), "rows.jsonl:1")
    if rendered is None:
        return None, ()
    return (
        "".join(f"«{piece.text}»" if piece.trained else piece.text for piece in rendered.pieces),
        rendered.notes,
    )


def trained(template, messages, **more):
    text, _ = shown(template, messages, **more)
    return [part.partition("»")[0] for part in text.split("«")[1:]]


def marked(block, opener=f"{OPEN}{{{{m.role}}}}\n", other=f"{{{{m.content}}}}{END}\n"):
    """A template with generation blocks: opener, then for the assistant the block, for others `other`."""
    body = f"{{% if m.role == 'assistant' %}}{block}{{% else %}}{other}{{% endif %}}"
    return (
        f"{{% for m in messages %}}{opener}{body}{{% endfor %}}{{% if add_generation_prompt"
        f" %}}{OPEN}assistant\n{{% endif %}}"
    )


FOUR = [user("u"), says("a1"), user("v"), says("a2")]


@pytest.mark.parametrize(
    "block",
    [
        # the turn's end and the new line inside
        f"{{% generation %}}{{{{m.content}}}}{END}\n{{% endgeneration %}}",
        f"{{% generation %}}{{{{m.content}}}}{END}{{% endgeneration %}}\n",
        f"{{% generation %}}{{{{m.content}}}}{{% endgeneration %}}{END}\n",  # the content alone
        f"{{% generation %}}{{{{m.content}}}}{END}{{% endgeneration %}}",  # the next opener right behind
        f"{{%- generation %}}{{{{m.content}}}}{{% endgeneration -%}}{END}",
    ],
)
def test_a_block_trains_its_turn_and_never_the_opener_of_the_next(block):
    """trl#5492, trl#5988, transformers#30650: the special token behind a block was taken for its end."""
    assert trained(marked(block), FOUR) == [f"a1{END}", f"a2{END}"]
    tool = [user("u"), says("a1"), {"role": "tool", "content": "r"}, says("a2")]
    assert trained(marked(block), tool) == [f"a1{END}", f"a2{END}"]


def test_a_block_without_an_end_of_turn_does_not_take_the_next_opener():
    template = marked("{% generation %}{{m.content}}{% endgeneration %}", other="{{m.content}}")
    text, notes = shown(template, FOUR)
    assert trained(template, FOUR) == ["a1", "a2"]
    assert any("will not learn to stop" in note for note in notes), text


def test_the_generation_prompt_inside_a_block_is_not_trained():
    whole = marked(
        f"{{% generation %}}{OPEN}assistant\n{{{{m.content}}}}{END}\n{{% endgeneration %}}", opener=""
    )
    whole = whole.replace("{% else %}{{m.content}}", f"{{% else %}}{OPEN}user\n{{{{m.content}}}}")
    assert trained(whole, FOUR) == [f"a1{END}", f"a2{END}"]


def test_blocks_belong_to_turns_also_when_not_every_turn_has_one():
    some = marked(
        f"{{% if m.content != 'a1' %}}{{% generation %}}{{{{m.content}}}}{END}\n{{% endgeneration %}}"
        f"{{% else %}}{{{{m.content}}}}{END}\n{{% endif %}}"
    )
    with pytest.raises(DataError, match=r"rows.jsonl:1, turn 2: .*blocks leave this turn out"):
        shown(some, FOUR)
    assert trained(some, FOUR, trainable=(3,)) == [f"a2{END}"]
    assert trained(some, FOUR, train_on="last") == [f"a2{END}"]
    twice = marked(
        f"{{% generation %}}{{{{m.content}}}}{{% endgeneration %}}+{{% generation %}}{END}{{%"
        " endgeneration %}"
    )
    assert trained(twice, FOUR) == ["a1", END, "a2", END]
    eos = "{% if loop.last %}{% generation %}<|eot_id|>{% endgeneration %}{% endif %}"
    ended = marked(f"{{% generation %}}{{{{m.content}}}}{END}\n{{% endgeneration %}}" + eos)
    assert trained(ended, FOUR) == [f"a1{END}", f"a2{END}"]
    # As TRL's for Phi 3: every chat ends in that token, an answered one in a block of it.
    always = (
        "{% if add_generation_prompt %}{% elif messages[-1].role == 'assistant' %}"
        "{% generation %}<|eot_id|>{% endgeneration %}{% else %}<|eot_id|>{% endif %}"
    )
    ended = marked(f"{{% generation %}}{{{{m.content}}}}{END}\n{{% endgeneration %}}") + always
    assert trained(ended, FOUR) == [f"a1{END}", f"a2{END}"]
    assert trained(ended, FOUR, train_on="last") == [f"a2{END}"]


def test_answers_that_a_template_runs_together_are_refused():
    end = "{% if loop.last or loop.nextitem.role != 'assistant' %}<|im_end|>{% endif %}"
    runs = marked(
        f"{{% generation %}}{{{{m.content}}}}{end}{{% endgeneration %}}",
        opener=(
            "{% if loop.previtem is not defined or m.role != loop.previtem.role %}<|im_start|>{{m.role}}\n{%"
            " endif %}"
        ),
    )
    with pytest.raises(DataError, match="turn 2: the chat template merges this turn with the next"):
        shown(runs, [user("u"), says("a1"), says("a2")])
    assert trained(runs, FOUR) == [f"a1{END}", f"a2{END}"]


def test_a_call_before_a_trained_turn_that_the_template_drops_is_refused():
    chat = [user("u"), says("", tool_calls=[CALL]), {"role": "tool", "content": "r"}, says("a")]
    with pytest.raises(
        DataError, match=r"turn 2, field 'tool_calls\[0\]': the chat template drops the tool call's name"
    ):
        shown(CHATML, chat, train_on="last")


@pytest.mark.parametrize("template", [CHATML, BLOCKS, LLAMA3], ids=["chatml", "blocks", "llama3"])
@pytest.mark.parametrize("beside", ["", "Let me look."])
def test_a_template_that_loses_a_tool_call_is_refused(template, beside):
    """trl#5517: the end of turn alone was trained, and the model learned to answer nothing."""
    with pytest.raises(
        DataError,
        match=r"turn 2, field 'tool_calls\[0\]': the chat template drops the tool call's name.*'get_wea",
    ):
        shown(template, [user("u"), says(beside, tool_calls=[CALL])])
    names = template.replace(
        "message.content",
        "message.content + (message.tool_calls or [{'function': {'name': ''}}])[0].function.name",
    )
    with pytest.raises(DataError, match=r"drops the tool call's argument.*'city'"):
        shown(names, [user("u"), says(beside, tool_calls=[CALL])])


def with_calls(arguments, condition="m.tool_calls"):
    return (
        f"{{% for m in messages %}}<|im_start|>{{{{ m.role }}}}\n{{% if {condition} %}}{{% for c in"
        f" m.tool_calls %}}{{{{ c.function.name }}}}: {{{{ {arguments} }}}}{{% endfor %}}{{% elif m.content"
        " is not none %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}{% if"
        " add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


@pytest.mark.parametrize(
    "template",
    [
        with_calls("c.function.arguments | tojson"),
        with_calls("c.function.arguments"),  # as text: an object would be written in Python's form
        with_calls("'' + c.function.arguments"),
        with_calls(
            "c.function.arguments if c.function.arguments is string else c.function.arguments | tojson"
        ),
        with_calls("c.function.arguments | tojson", "m.role == 'assistant' and m.content is none"),
    ],
)
def test_arguments_are_json_whatever_form_the_template_wants(template):
    call = [user("u"), says("", tool_calls=[CALL])]
    assert trained(template, call) == [f'get_weather: {{"city": "Ulm", "days": 3}}{END}']


def test_arguments_that_a_template_would_encode_twice_are_refused():
    text = {"type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Ulm"}'}}
    with pytest.raises(DataError, match="encodes the arguments twice"):
        shown(with_calls("c.function.arguments | tojson"), [user("u"), says("", tool_calls=[text])])


@pytest.mark.parametrize(
    "value", ['say "a"\n<b>', "ä → \\", 3.5, True, [1, {"k": "v"}], {"deep": ["x"]}, None, ""]
)
def test_every_argument_is_found_however_json_writes_it(value):
    call = {"type": "function", "function": {"name": "f", "arguments": {"key": value}}}
    template = with_calls("c.function.arguments | tojson")
    assert trained(template, [user("u"), says("", tool_calls=[call])]) == [
        f"f: {json.dumps(call['function']['arguments'], ensure_ascii=False)}{END}"
    ]


THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% set content = m.content %}"
    "{% if m.role == 'assistant' %}{% set thought = FIELD or '' %}"
    "{% if not thought and '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].split('<think>')[-1].strip() %}"
    "{% set content = content.split('</think>')[-1].lstrip() %}{% endif %}"
    "<think>\n{{ thought }}\n</think>\n\n{% endif %}{{ content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize(
    "turn",
    [
        says("ANS", reasoning_content="WHY"),
        says("<think>\nWHY\n</think>\n\nANS"),
        says("<think>WHY</think>ANS"),
    ],
)
def test_reasoning_in_every_spelling_where_the_generation_prompt_begins_to_think(field, turn):
    """fw-ai/cookbook#378 and trl#5824: the field's names are one thing, and <think> may stand in the prompt
    already."""
    template = THINKS.replace("FIELD", f"m.{field}")
    assert trained(template, [user("u"), turn]) == [f"WHY\n</think>\n\nANS{END}"]


def test_a_template_that_reads_reasoning_from_the_text_alone_gets_it_there():
    template = THINKS.replace("FIELD", "''")
    assert trained(template, [user("u"), says("ANS", reasoning_content="WHY")]) == [
        f"WHY\n</think>\n\nANS{END}"
    ]


def test_reasoning_in_the_text_is_handed_over_where_a_template_reads_the_field_alone():
    field = THINKS.replace("FIELD", "m.reasoning_content").replace(
        "not thought and '</think>' in content", "false"
    )
    assert trained(field, [user("u"), says("<think>\nWHY\n</think>\n\nANS")]) == [
        f"WHY\n</think>\n\nANS{END}"
    ]


def test_reasoning_behind_thinking_that_is_closed_already_is_refused():
    closed = THINKS.replace("FIELD", "''").replace("not thought and '</think>' in content", "false")
    with pytest.raises(
        DataError, match=r"turn 2: the chat template closes the thinking before the row's reasoning"
    ):
        shown(closed, [user("u"), says("<think>\nWHY\n</think>\n\nANS")])


def test_an_opener_that_a_template_always_writes_is_not_trained():
    """As Command R7B's, which ends every chat with the opener of an answer."""
    always = CHATML.replace(
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}", "<|start_header_id|>"
    )
    always = always.replace("{{ '<|im_start|>' + message.role + '\n'", "{{ '<|start_header_id|>'")
    assert trained(always.replace("<|im_end|>\n", "<|im_end|>"), FOUR) == [f"a1{END}", f"a2{END}"]


def test_a_field_that_messages_do_not_have_prints_nothing_and_a_name_that_nobody_set_is_an_error():
    """GLM 4 writes {{ message.metadata }}."""
    assert (
        trained(CHATML.replace("message.content +", "(message.metadata or '') + message.content +"), FOUR)[0]
        == f"a1{END}"
    )
    assert trained("{{ messages[0].metadata }}" + CHATML, FOUR)[0] == f"a1{END}"
    with pytest.raises(Exception, match="'metadata' is undefined"):
        shown("{{ metadata }}" + CHATML, FOUR)


def test_reasoning_that_is_nowhere_written_is_refused():
    with pytest.raises(
        DataError, match=r"turn 2, field 'reasoning_content': the chat template drops.*<think>"
    ):
        shown(CHATML, [user("u"), says("ANS", reasoning_content="WHY")])
    with pytest.raises(DataError, match=r"turn 2: the chat template rewrites this turn"):
        shown(QWEN3, [user("u"), says("a1", reasoning_content="WHY"), user("v"), says("a2")])


def test_earlier_turns_that_lose_nothing_are_trained_as_the_template_writes_them():
    text, notes = shown(QWEN3, FOUR)
    assert trained(QWEN3, FOUR) == [f"a1{END}", f"<think>\n\n</think>\n\na2{END}"]
    assert notes == (spans.NOTE_REWRITTEN,), text


def test_what_ends_the_text_only_is_not_part_of_the_turn():
    """A template that writes eos behind the whole chat: the model has stopped at the turn's own end
    before."""
    closing = CHATML.replace(
        "{% if add_generation_prompt %}", "{% if not add_generation_prompt %}<|eot_id|>{% else %}"
    )
    assert trained(closing, FOUR) == [f"a1{END}", f"a2{END}"]
    both = CHATML.replace("'<|im_end|>\n'", "'<|eot_id|><|im_end|>\n'")
    assert trained(both, FOUR) == [f"a1<|eot_id|>{END}", f"a2<|eot_id|>{END}"]


def test_the_template_decides_about_order():
    assert trained(CHATML, [says("a0"), user("u"), says("a1")]) == [f"a0{END}", f"a1{END}"]
    assert trained(CHATML, [user("u"), user("v"), says("a1"), says("a2")]) == [f"a1{END}", f"a2{END}"]
    assert trained(CHATML, [user("u"), {"role": "system", "content": "s"}, says("a1")]) == [f"a1{END}"]
    first = "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}" + CHATML
    with pytest.raises(Exception, match="user first"):
        shown(first, [says("a0"), user("u"), says("a1")])


def test_a_turn_of_the_prompt_that_the_template_drops_is_refused():
    deaf = CHATML.replace(
        "{% for message in messages %}", "{% for message in messages if message.role != 'system' %}"
    )
    chat = [{"role": "system", "content": "Be brief."}, *FOUR]
    with pytest.raises(
        DataError,
        match=r"turn 1, field 'content': the chat template drops or changes the system's text.*Be brief",
    ):
        shown(deaf, chat)
    assert "Be brief." in shown(CHATML, chat)[0]


def test_marks_of_turns_and_the_last_one_only():
    assert trained(CHATML, FOUR, trainable=(1,)) == [f"a1{END}"]
    assert "a2" not in shown(CHATML, FOUR, trainable=(1,))[0]
    assert shown(CHATML, FOUR, trainable=(), train_on="all") == (None, ())
    assert shown(CHATML, FOUR, trainable=(1,), train_on="last") == (None, ())
    text, notes = shown(CHATML, FOUR, trainable=(1, 3), train_on="last")
    assert text.count("«") == 1
    assert notes == (NOTE_MARKED,)


def test_template_kwargs_of_the_settings_and_of_the_row():
    """LlamaFactory#10326"""
    asks, off = "{{ '/no ' if thinks is defined and thinks is false else '' }}" + CHATML, f"/no {OPEN}"
    assert not shown(asks, FOUR)[0].startswith(off)
    assert shown(asks, FOUR, template_kwargs={"thinks": False})[0].startswith(off)
    assert shown(asks, FOUR, row_kwargs={"thinks": False})[0].startswith(off)
    assert not shown(asks, FOUR, row_kwargs={"thinks": True}, template_kwargs={"thinks": False})[
        0
    ].startswith(off)
    assert any("does not read" in note for note in shown(CHATML, FOUR, row_kwargs={"thinks": True})[1])
    for name in ("messages", "tools", "add_generation_prompt", "eos_token"):
        with pytest.raises(DataError, match=f"tokenizer.template_kwargs, '{name}': is not a variable to set"):
            shown(CHATML, FOUR, template_kwargs={name: 1})


def long_chat(turns, gap=" "):
    return [
        {
            "role": ("user", "assistant")[n % 2],
            "content": f"{gap * (n % 3 == 0)}turn {n} {'w' * (n % 40)}{gap * (n % 5 == 0)}",
        }
        for n in range(turns)
    ]


@pytest.mark.parametrize(
    "template", [CHATML, LLAMA3, QWEN3, BLOCKS], ids=["chatml", "llama3", "qwen3", "blocks"]
)
def test_long_chats_are_masked_as_short_ones_are_in_linear_time(template, monkeypatch):
    chat = long_chat(160)
    quick = shown(template, chat)
    monkeypatch.setattr(spans, "MANY_TURNS", 10**9)
    assert quick == shown(template, chat)
    monkeypatch.undo()
    assert quick[0].count("«") == 80
    rendered = []
    real = ChatTemplate.render
    monkeypatch.setattr(ChatTemplate, "render", lambda *a, **k: rendered.append(1) or real(*a, **k))
    shown(template, long_chat(1000))
    assert len(rendered) <= 2 * long_chats.EXAMPLES + 4


def test_a_long_chat_with_a_turn_that_the_template_loses_is_refused():
    chat = long_chat(200)
    chat[101]["content"] = "LOSE this"
    losing = CHATML.replace("message.content", "message.content.replace('LOSE', '')")
    with pytest.raises(DataError, match=r"turn 102, field 'content': the chat template drops"):
        shown(losing, chat)


def test_a_thousand_turns_take_a_fraction_of_a_second():
    began = time.process_time()
    text, _ = shown(LLAMA3, long_chat(1000))
    assert text.count("«") == 500
    # CPU seconds: 0.07 on an idle machine, 1.5 with every prefix rendered
    assert time.process_time() - began < 1


def test_limits_count_processor_time(monkeypatch):
    monkeypatch.setattr(bounded, "MAX_SECONDS", 0.3)
    slow = bounded.bounded_map(lambda item: time.sleep(0.9) or item, [1], str, "the work")
    assert list(slow) == [1]
    monkeypatch.setattr(bounded, "WALL_FACTOR", 1)
    with pytest.raises(DataError, match=r"1: the work was stuck on this row for 0.3 s"):
        list(bounded.bounded_map(lambda item: time.sleep(5), [1], str, "the work"))


def test_white_space_that_an_added_token_swallows_does_not_come_back_at_a_cut():
    """Phi's <|end|>: the new line behind it is part of the token when the next prompt is read."""
    from tokenizers import AddedToken, Tokenizer
    from transformers import PreTrainedTokenizerFast

    plain = byte_level(CHATML)
    greedy = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(plain.backend_tokenizer.to_str()))
    greedy.add_special_tokens(
        {"additional_special_tokens": [AddedToken("<|stop|>", rstrip=True, special=True)]}
    )
    row = Rendered(
        (
            Piece("u<|stop|>", False),
            Piece("a<|stop|>", True),
            Piece("\n\nv<|stop|>", False),
            Piece("\nb", True),
        )
    )
    ids, flags = Encoder(greedy)([row.pieces])[0]
    whole = greedy("u<|stop|>a<|stop|>\n\nv<|stop|>", add_special_tokens=False)["input_ids"]
    assert ids[: len(whole)] == whole
    assert greedy.decode(ids[len(whole) :]) == "\nb"
    assert sum(flags) == 4


def test_a_template_of_its_own_for_chats_with_tools():
    """As Command R's: a tokenizer with several templates by name."""
    tokenizer = type(byte_level())(tokenizer_object=byte_level().backend_tokenizer, eos_token=END)
    tokenizer.chat_template = {
        "default": CHATML,
        "tool_use": "{{ tools[0].function.name }}" + with_calls("c.function.arguments | tojson"),
    }
    call = [user("u"), says("", tool_calls=[CALL])]
    text, notes = shown(CHATML, call, tokenizer=tokenizer, tools=[TOOL])
    assert text.startswith("get_weather<|im_start|>")
    assert "«get_weather: {" in text
    assert notes == ()
    assert shown(CHATML, FOUR, tokenizer=tokenizer)[0].startswith(OPEN)


def test_a_long_chat_whose_template_loses_one_call_is_refused():
    calls = with_calls("c.function.arguments | tojson").replace(
        "{% if m.tool_calls %}", "{% if m.tool_calls and HOLDS %}"
    )
    chat = [
        message
        for n in range(60)
        for message in (user(f"u{n}"), says(f"a{n}", tool_calls=[CALL]), {"role": "tool", "content": f"r{n}"})
    ]
    calls = calls.replace("{% endfor %}{% elif", "{% endfor %}{{ m.content }}{% elif")
    assert len(trained(calls.replace("HOLDS", "true"), chat)) == 60
    with pytest.raises(DataError, match=r"turn 95, field 'tool_calls\[0\]': the chat template drops"):
        shown(calls.replace("HOLDS", "loop.index0 != 94"), chat)


def test_a_long_chat_whose_openers_differ_is_masked_by_prefixes():
    space = "(' ' if NUMBER % 4 == 1 else '')"
    template = CHATML.replace(
        "'\n' + message.content", f"'\n' + {space.replace('NUMBER', 'loop.index0')} + message.content"
    )
    template = template.replace(
        "assistant\n'", "assistant\n' + " + space.replace("NUMBER", "messages | length")
    )
    assert trained(template, long_chat(100)) == trained(CHATML, long_chat(100))


def test_the_header_inside_a_block_is_given_whatever_the_turn_thinks():
    """As DeepSeek's training templates: the prompt begins to think, an answer may not; another header behind
    a result."""
    template = (
        "<|begin|>"  # transformers 5.0 does not see a block that begins the text
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
        "{{ '<|eot_id|>' if loop.index0 and loop.previtem.role == 'tool' else '<|start_header_id|>' }}{{"
        " m.content }}<|im_end|>"
        "{% endgeneration %}{% else %}<|im_start|>{{ m.content }}{% endif %}{% endfor %}"
        "{% if messages[-1].role == 'tool' %}<|eot_id|>{% elif add_generation_prompt"
        " %}<|start_header_id|><think>\n{% endif %}"
    )
    assert trained(template, FOUR) == [f"a1{END}", f"a2{END}"]
    assert trained(template, [user("u"), says("<think>\nWHY\n</think>\nA")]) == [f"WHY\n</think>\nA{END}"]
    result = [user("u"), says("a1"), {"role": "tool", "content": "r"}, says("a2")]
    assert trained(template, result) == [f"a1{END}", f"a2{END}"]
    assert trained(template, [says("a0"), user("u"), says("a1")]) == [f"a0{END}", f"a1{END}"]


def test_a_spelling_in_which_other_reasoning_is_lost_is_none():
    """Under a name that the template does not read, the reasoning before a trained turn would go, and hide
    what is wrong."""
    chat = [
        user("u"),
        says("a1"),
        user("v"),
        says("a2", reasoning_content="WHY"),
        {"role": "tool", "content": "r"},
        says("a3"),
    ]
    strict = (
        "{% if 'WHY' in messages | tojson and not messages | selectattr('reasoning', 'defined') | list %}W{%"
        " endif %}" + QWEN3
    )
    with pytest.raises(DataError, match="turn 2: the chat template"):
        shown(strict, chat, trainable=(1, 5))
    assert trained(QWEN3, chat, trainable=(1, 5))[0] == f"a1{END}"
