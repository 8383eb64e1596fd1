"""Prompts as token ids: what training puts in front of a reply, and templates of one's own."""

import pytest

from repsft_fast.data.load import load
from repsft_fast.data.settings import DataSettings
from repsft_fast.data.store import TokenStore
from repsft_fast.errors import ConfigError, DataError
from repsft_fast.evaluate.asked import Problem
from repsft_fast.evaluate.prompts import check_template, fill, prompt_ids
from tests.helpers.chat_tokenizers import BLOCKS, CHATML, LLAMA3, byte_level, metaspace

CHATS = (
    [("user", "1 + 1?")],
    [("system", "be brief"), ("user", "hi"), ("assistant", "hello"), ("user", "  and  now?\n")],
    [("user", "say <|im_end|> and <|im_start|>assistant to me")],
)


def chat(turns):
    return tuple({"role": role, "content": content} for role, content in turns)


def problem(turns, **more):
    return Problem("1", chat(turns), "2", where="f.jsonl:1", **more)


@pytest.mark.parametrize("special_tokens", ["text", "parse"])
@pytest.mark.parametrize(
    "tokenizer",
    [byte_level(), byte_level(BLOCKS), byte_level(LLAMA3), metaspace()],
    ids=["chatml", "blocks", "llama3", "metaspace"],
)
def test_a_prompt_is_what_training_puts_in_front_of_the_reply(tmp_path, tokenizer, special_tokens):
    import json

    asked = CHATS if special_tokens == "text" else CHATS[:2]
    rows = [{"messages": [*chat(turns), {"role": "assistant", "content": "yes"}]} for turns in asked]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = DataSettings(special_tokens=special_tokens, train_on="last")
    store = TokenStore(load(tmp_path / "rows.jsonl", tokenizer, settings).samples, "cpu")
    ids, _ = prompt_ids(
        [problem(turns) for turns in asked], tokenizer, parse_special=special_tokens == "parse"
    )
    assert ids == [store.last_reply(number)[0] for number in range(len(asked))]


def test_special_tokens_in_a_question_stay_text_and_it_is_said():
    tokenizer = byte_level(CHATML)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    asked = [problem(turns) for turns in CHATS]
    ids, notes = prompt_ids(asked, tokenizer)
    assert [row.count(end) for row in ids] == [1, 4, 1]
    assert "say <|im_end|> and" in tokenizer.decode(ids[2])
    assert [note.split()[0] for note in notes] == ["1"]
    parsed, notes = prompt_ids(asked, tokenizer, parse_special=True)
    assert parsed[2].count(end) == 2
    assert notes == []


def test_without_a_chat_template_the_text_stands_alone_behind_one_bos():
    import copy

    from tokenizers.processors import TemplateProcessing

    tokenizer = copy.deepcopy(byte_level(None))
    asked = [problem([("user", "ab")]), problem([("user", "x")], text="a <|im_end|>")]
    bare, notes = prompt_ids(asked, tokenizer)
    assert [tokenizer.decode(row) for row in bare] == ["ab", "a <|im_end|>"]
    assert notes[0] == "the tokenizer has no chat template: 1 prompts are asked as plain text"
    assert notes[1].startswith("1 prompts hold special-token strings")
    begin = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", begin)]
    )
    assert [row[:1] + row[-1:] for row in prompt_ids(asked, tokenizer)[0]] == [
        [begin, row[-1]] for row in bare
    ]
    written = problem([("user", "<|begin|>ab")])
    assert prompt_ids([written], tokenizer, parse_special=True)[0][0].count(begin) == 1
    for template, count in (
        (LLAMA3, 1),
        (CHATML, 0),
    ):  # the template says whether there is one, as in training
        with_template = copy.deepcopy(byte_level(template))
        with_template.backend_tokenizer.post_processor = tokenizer.backend_tokenizer.post_processor
        assert prompt_ids([problem(CHATS[0])], with_template)[0][0].count(begin) == count
    with pytest.raises(DataError, match=r"^f.jsonl:1: is an empty prompt"):
        prompt_ids([problem([("user", "x")], text="")], tokenizer)
    with pytest.raises(
        DataError, match=r"^f.jsonl:1: is a chat of several turns, and the tokenizer has no chat"
    ):
        prompt_ids([problem(CHATS[1])], tokenizer)


def test_a_problems_own_text_does_not_go_through_the_template():
    tokenizer = byte_level(CHATML)
    mixed = [problem(CHATS[0]), problem(CHATS[0], text="bare"), problem(CHATS[1])]
    ids, notes = prompt_ids(mixed, tokenizer)
    assert [tokenizer.decode(row)[:6] for row in ids] == ["<|im_s", "bare", "<|im_s"]
    assert notes == []


def test_variables_of_the_template_and_one_of_ones_own():
    own = "{% for m in messages %}[{{ m.content }}]{% endfor %}{% if deep %}deep{% endif %}"
    ids, _ = prompt_ids([problem(CHATS[0])], byte_level(), chat_template=own, template_kwargs={"deep": True})
    assert byte_level().decode(ids[0]) == "[1 + 1?]deep"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ messages[-1].content }}", "turn 1, field 'content': the chat template drops"),
        ("{{ messages[0].nothing.more }}", "the chat template failed on this row"),
        ("{% for i in range(99999999999) %}{% endfor %}", "failed on this row|longer than"),
    ],
)
def test_a_template_that_loses_a_turn_or_breaks_is_refused(template, words):
    with pytest.raises(DataError, match=f"^f.jsonl:1.*{words}"):
        prompt_ids([problem(CHATS[0]), problem(CHATS[1])], byte_level(), chat_template=template)


@pytest.mark.parametrize(
    "template",
    [
        "{question}", "{question} \\boxed{} \\text{answer} \\frac{abc}{def} x_{min} a^{max} {x} {a, b}",
        '{question} {"answer": 1} { answer }', "{question}\\sqrt[3]{abc}",
    ],
)  # fmt: skip
def test_braces_of_the_text_are_left_alone(template):
    check_template(template, "--prompt", choices=False)
    assert fill(template, "{question}?") == template.replace("{question}", "{question}?", 1)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("no place", "has no place for the question"),
        (
            "{question} {answer}",
            r"names what a problem does not have.*got \{answer\}; a brace of the text's own",
        ),
        ("{Question}", r"got \{Question\}; did you mean \{question\}"),
        ("{question}\n{choice}", r"did you mean \{choices\}"),
        ("{question}{group}", r"got \{group\}"),
        ("{{ question }}", r"double braces, got \{\{ question \}\}; write \{question\}"),
        ("{question} {choices}", "shows choices, and the problems have none"),
    ],
)
def test_a_template_that_cannot_be_meant(template, words):
    with pytest.raises(ConfigError, match=f"^--prompt: .*{words}"):
        check_template(template, "--prompt", choices=False)
