"""Rows laid out as public projects lay them out: what each trains is worked out here from the file, by other
means."""

import json
import re
from pathlib import Path

import pytest

from repsft_fast.data.load import DataSettings, load
from tests.helpers.chat_tokenizers import END, byte_level

LAYOUTS = Path(__file__).parent / "layouts"
# ChatML with tools, calls and reasoning, as Hermes and Qwen write them; every turn is kept as it is.
TEMPLATE = (
    "{%- if tools %}{{- '<|im_start|>tools\n' }}{%- for tool in tools %}{{- tool | tojson + '\n' }}{%- endfor"
    " %}{{- '<|im_end|>\n' }}{%- endif %}{%- for message in messages %}{{- '<|im_start|>' + message.role +"
    " '\n' }}{%- if message.reasoning_content %}{{- '<think>\n' + message.reasoning_content +"
    " '\n</think>\n\n' }}{%- endif %}{{- message.content }}{%- for call in message.tool_calls or [] %}{{-"
    " '\n<tool_call>\n' }}{{- call.function | tojson }}{{- '\n</tool_call>' }}{%- endfor %}{{- '<|im_end|>\n'"
    " }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)


def rows(name):
    return [json.loads(line) for line in (LAYOUTS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def loaded(name, tokenizer=None, **settings):
    return load(str(LAYOUTS / f"{name}.jsonl"), tokenizer or byte_level(TEMPLATE), DataSettings(**settings))


def stretches(sample, tokenizer, trained=True):
    """The text of every unbroken stretch of (un)trained tokens."""
    found, ids = [], []
    for token, flag in [*zip(sample.ids, sample.trained, strict=True), (None, not trained)]:
        if flag == trained:
            ids.append(token)
        elif ids:
            found.append(tokenizer.decode(ids))
            ids = []
    return found


def call(function, arguments):
    """A call as it must be trained: its arguments an object, and no string that holds one."""
    return {"name": function, "arguments": arguments}


def turns_with_calls(row):
    """(role, text, calls) of every turn, from either of the two ways to write them."""
    for turn in row.get("messages") or row["conversations"]:
        role, text = turn.get("role") or turn["from"], turn.get("content") or turn.get("value") or ""
        if role == "function_call":
            written = json.loads(text)
            yield "assistant", "", [call(written["name"], written["arguments"])]
        else:
            functions = [called["function"] for called in turn.get("tool_calls", [])]
            yield role, text, [call(f["name"], json.loads(f["arguments"])) for f in functions]


def check_turns(row, sample, tokenizer):
    """Every assistant turn is trained with its end, calls as JSON objects, and no turn of anyone else's
    is."""
    turns = list(turns_with_calls(row))
    said = [(text, calls) for role, text, calls in turns if role in ("assistant", "gpt")]
    found = stretches(sample, tokenizer)
    assert len(found) == len(said)
    for trained, (text, calls) in zip(found, said, strict=True):
        assert trained.endswith(END)
        assert trained.startswith(text)
        written = re.findall(r"<tool_call>\n(.*?)\n</tool_call>", trained, re.DOTALL)
        assert [json.loads(one) for one in written] == calls
        assert re.sub(r"\n<tool_call>\n.*?\n</tool_call>", "", trained, flags=re.DOTALL) == text + END
    not_trained = "".join(stretches(sample, tokenizer, trained=False))
    for role, text, _ in turns:
        if role not in ("assistant", "gpt"):
            assert text in not_trained


def test_every_layout_has_rows_enough():
    names = {path.stem for path in LAYOUTS.glob("*.jsonl")}
    assert names == {
        "alpaca", "sharegpt", "openai_chat", "openai_tools", "glaive_tools", "reasoning", "prompt_completion",
        "llamafactory_history",
    }  # fmt: skip
    assert all(len(rows(name)) >= 20 for name in names)


def test_alpaca_trains_the_output_and_its_rendered_twin_is_named_as_unused():
    tokenizer, found = byte_level(TEMPLATE), loaded("alpaca")
    assert len(found.samples) == len(rows("alpaca"))
    for row, sample in zip(rows("alpaca"), found.samples, strict=True):
        assert stretches(sample, tokenizer) == [row["output"] + END]
        (prompt,) = stretches(sample, tokenizer, trained=False)
        assert row["instruction"] in prompt
        assert row["input"] in prompt
        assert "### Response" not in prompt
    assert found.columns_unused == {"text": len(found.samples)}


def test_sharegpt_trains_every_turn_of_gpt():
    tokenizer, found = byte_level(TEMPLATE), loaded("sharegpt")
    for row, sample in zip(rows("sharegpt"), found.samples, strict=True):
        check_turns(row, sample, tokenizer)
        begins = "system" if row["conversations"][0]["from"] == "system" else "user"
        assert tokenizer.decode(sample.ids).startswith(f"<|im_start|>{begins}\n")


def test_sharegpt_last_only():
    tokenizer, found = byte_level(TEMPLATE), loaded("sharegpt", train_on="last")
    for row, sample in zip(rows("sharegpt"), found.samples, strict=True):
        assert stretches(sample, tokenizer) == [row["conversations"][-1]["value"] + END]


def test_openais_weights_are_obeyed():
    tokenizer, found = byte_level(TEMPLATE), loaded("openai_chat")
    for row, sample in zip(rows("openai_chat"), found.samples, strict=True):
        wanted = [
            m["content"] + END for m in row["messages"] if m["role"] == "assistant" and m.get("weight", 1)
        ]
        assert stretches(sample, tokenizer) == wanted
        not_trained = "".join(stretches(sample, tokenizer, trained=False))
        assert all(m["content"] in not_trained for m in row["messages"] if m.get("weight") == 0)


@pytest.mark.parametrize("name", ["openai_tools", "glaive_tools"])
def test_calls_are_trained_as_objects_and_results_are_not_trained(name):
    tokenizer, found = byte_level(TEMPLATE), loaded(name)
    for row, sample in zip(rows(name), found.samples, strict=True):
        check_turns(row, sample, tokenizer)
        tools = json.loads(row["tools"]) if isinstance(row["tools"], str) else row["tools"]
        start = tokenizer.decode(sample.ids).partition("<|im_end|>")[0]
        for tool in tools:
            function = tool.get("function", tool)
            assert json.dumps(function["name"]) in start
        if not tools:
            assert start.startswith("<|im_start|>user\n")


def test_a_reasoning_trace_is_trained_before_its_answer():
    """The row's parts stand beside its messages once more: named as not used, and refused where they say
    something else."""
    tokenizer, found = byte_level(TEMPLATE), loaded("reasoning")
    assert found.columns_unused["developer"] == len(rows("reasoning"))
    for row, sample in zip(rows("reasoning"), found.samples, strict=True):
        assert stretches(sample, tokenizer) == [
            f"<think>\n{row['analysis']}\n</think>\n\n{row['final']}{END}"
        ]
        (prompt,) = stretches(sample, tokenizer, trained=False)
        assert row["developer"] in prompt
        assert row["user"] in prompt


def test_prompt_and_completion_stand_as_they_are_written():
    tokenizer, found = byte_level(TEMPLATE), loaded("prompt_completion")
    for row, sample in zip(rows("prompt_completion"), found.samples, strict=True):
        assert stretches(sample, tokenizer) == [row["completion"] + END]
        assert "".join(stretches(sample, tokenizer, trained=False)).endswith(row["prompt"])


def test_history_stands_before_the_question_and_its_answers_are_trained():
    """As the format's own trainer does it: history answers are answers."""
    tokenizer, found = byte_level(TEMPLATE), loaded("llamafactory_history")
    for row, sample in zip(rows("llamafactory_history"), found.samples, strict=True):
        assert stretches(sample, tokenizer) == [answer + END for _, answer in row["history"]] + [
            row["output"] + END
        ]
        text = tokenizer.decode(sample.ids)
        places = [text.index(question) for question, _ in row["history"]] + [text.index(row["instruction"])]
        assert places == sorted(places)
        assert row["system"] in text.partition("<|im_end|>")[0]
        assert text.startswith("<|im_start|>system" if row["system"] else "<|im_start|>user")
