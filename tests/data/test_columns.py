"""Whole rows, as strangers write them: every column is used, refused, or counted and named; bad rows are
counted."""

import json
import random

import pytest

from repsft_fast.data.bad_rows import BAD_ROW
from repsft_fast.data.column_names import kind_of
from repsft_fast.data.formats import parse
from repsft_fast.data.load import DataSettings, load, load_splits
from repsft_fast.errors import DataError
from tests.helpers.chat_tokenizers import CHATML, byte_level, trained_text

END = "<|im_end|>"
TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.fixture
def read(tmp_path):
    """read(rows, tokenizer, **settings) → Loaded."""

    def run(rows, tokenizer=None, name="rows.jsonl", **settings):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return load(str(path), tokenizer or byte_level(), DataSettings(**settings))

    return run


def whole(sample):
    return byte_level().decode(sample.ids)


def test_system_and_history_of_alpaca_rows_stand_in_the_prompt(read):
    """LlamaFactory#7592: both were dropped, and the template's own system prompt stood there."""
    row = {"system": "S", "history": [["q1", "a1"]], "instruction": "q2", "input": "", "output": "a2"}
    (sample,) = read([row]).samples
    turns = "system\nS", "user\nq1", "assistant\na1", "user\nq2", "assistant\na2"
    assert whole(sample) == "\n".join(f"<|im_start|>{turn}{END}" for turn in turns)
    assert trained_text(sample, byte_level()) == f"·a1{END}·a2{END}"
    (last,) = read([row], train_on="last").samples
    assert trained_text(last, byte_level()) == f"·a2{END}"
    with pytest.raises(
        DataError, match=r"rows.jsonl:1: holds a system prompt, history.*only a chat template can write"
    ):
        read([row], byte_level(None))


@pytest.mark.parametrize("kwargs", [{"mood": "glad"}, '{"mood": "glad"}'])
def test_template_variables_of_a_row_go_over_those_of_the_setting(read, kwargs):
    """LlamaFactory#10326: the column was ignored."""
    tokenizer = byte_level("{{ mood | default('none') }}" + CHATML)
    rows = [{"messages": TURNS, "chat_template_kwargs": kwargs}, {"messages": TURNS}]
    loaded = read(rows, tokenizer, template_kwargs={"mood": "calm"})
    assert [whole(sample).partition("<")[0] for sample in loaded.samples] == ["glad", "calm"]
    assert loaded.columns_used == {"messages": 2, "chat_template_kwargs": 1}
    for bad in (
        {"messages": []},
        {"add_generation_prompt": True},
        {"eos_token": "x"},
        {"tools": []},
        [1],
        "{",
        {"a b": 1},
    ):
        with pytest.raises(DataError, match=r"rows.jsonl:1, field 'chat_template_kwargs'"):
            read([{"messages": TURNS, "chat_template_kwargs": bad}])
    with pytest.raises(DataError, match=r"tokenizer.template_kwargs, 'tokenize'"):
        DataSettings(template_kwargs={"tokenize": True})
    assert "the chat template does not read mod" in str(
        read(rows, tokenizer, template_kwargs={"mod": 1}).warnings
    )


@pytest.mark.parametrize(
    "form", [{"text": "t"}, {"input_ids": [1, 2]}, {"segments": [{"label": 1, "text": "tu"}]}]
)
@pytest.mark.parametrize(
    "column",
    [
        {"chat_template_kwargs": {"a": 1}},
        {"system": "s"},
        {"tools": [{"name": "f"}]},
        {"history": [["q", "a"]]},
    ],
)
def test_what_a_form_has_no_place_for_is_refused(read, form, column):
    name = next(iter(column))
    with pytest.raises(DataError, match=rf"rows.jsonl:1, field '{name}'.*data.ignore_columns: \[{name}\]"):
        read([form | column])
    loaded = read([form | column], ignore_columns=(name,))
    assert loaded.columns_unused == {name: 1}


def test_a_system_column_that_contradicts_the_system_turn_is_refused(read):
    turns = [{"role": "system", "content": "S"}, *TURNS]
    assert len(read([{"messages": turns, "system": "S"}]).samples) == 1
    with pytest.raises(DataError, match="says another thing than the system turn"):
        read([{"messages": turns, "system": "T"}])
    (sample,) = read([{"messages": [*TURNS, TURNS[0], TURNS[1] | {"weight": 0}], "system": "S"}]).samples
    assert trained_text(sample, byte_level()) == f"·a{END}"  # marks move with their turns


def test_two_names_of_one_thing_agree_or_are_refused(read):
    assert len(read([{"query": "q", "question": "q", "answer": "a"}]).samples) == 1
    for row in (
        {"query": "q", "question": "r", "answer": "a"},
        {"instruction": "i", "output": "a", "response": "b"},
    ):
        with pytest.raises(DataError, match="are one thing and say two"):
            read([row])


def test_a_question_that_would_be_lost_is_refused_and_a_second_whole_form_is_said(read):
    with pytest.raises(DataError, match=r"field 'context': looks like a part of the prompt"):
        read([{"question": "q", "context": "c", "answer": "a"}])
    loaded = read([{"instruction": "q", "output": "a", "text": "q a"}])
    assert loaded.columns_unused == {"text": 1}
    assert "1 rows are whole 'text' rows too, and read as 'alpaca' (data.format chooses)" in loaded.warnings


@pytest.mark.parametrize(
    "name",
    [
        "weight",
        "sample_weight",
        "Loss-Mask",
        "lossMask",
        "train",
        "label",
        "labels",
        "seq_lengths",
        "position_ids",
    ],
)
def test_columns_that_look_like_instructions_are_refused_with_a_way_out(read, name):
    row = {"messages": TURNS, name: 0}
    with pytest.raises(
        DataError, match=rf"field '{name}'.*may say what is trained.*data.ignore_columns: \[{name}\]"
    ):
        read([row])
    assert read([row | {name: None}]).columns_unused == {}
    assert read([row | {name: []}]).columns_unused == {}
    assert read([row], ignore_columns=(name,)).columns_unused == {name: 1}


def test_harmless_names_are_only_counted():
    for name in (
        "id",
        "source",
        "constraints",
        "language",
        "system_id",
        "num_tools",
        "parallel_tool_calls",
        "restrained",
    ):
        assert kind_of(name) is None, name
    for name in (
        "images",
        "videos",
        "audio",
        "history",
        "tools",
        "weights",
        "cu_seqlens",
        "chat_template",
        "thinking",
    ):
        assert kind_of(name), name


def test_used_and_unused_columns_are_counted_and_named_once(read):
    rows = [
        {"messages": [TURNS[0] | {"id": 3}, TURNS[1]], "id": n, "source": "s" if n else None, "w": 1.0}
        for n in range(4)
    ]
    loaded = read(rows, weight_column="w")
    assert loaded.columns_used == {"messages": 4, "w": 4}
    assert loaded.columns_unused == {"id": 4, "messages[].id": 4, "source": 3}
    assert loaded.warnings == ["columns not used: id (4 rows), messages[].id (4 rows), source (3 rows)"]
    assert list(loaded.files.values()) == [4]
    assert "no row has 'sourc'; did you mean source?" in str(
        read(rows, ignore_columns=("sourc",), weight_column="w").warnings
    )
    with pytest.raises(DataError, match=r"data.ignore_columns: names data.weight_column too"):
        DataSettings(weight_column="w", ignore_columns=("w",))


def test_masks_and_labels_hold_together(read):
    row = {"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8]}
    for mask, trained in (
        ([0, 0, 1, 1], [7, 8]),
        ([False, True, False, False], [6]),
        ([0.0, 1.0, 1.0, 0.0], [6, 7]),
    ):
        for name in ("completion_mask", "assistant_masks", "loss_mask"):
            (sample,) = read([row | {name: mask}]).samples
            assert [token for token, flag in zip(sample.ids, sample.trained) if flag] == trained
    (both,) = read([row | {"completion_mask": [0, 1, 1, 1], "assistant_masks": [0, 0, 1, 0]}]).samples
    assert both.ids == [5, 6, 7]
    for bad in ([0, 1], [0, 0.5, 1, 1], [0, 1, 2, 2], "0111", [[0, 1, 1, 1]]):
        for name in ("loss_mask", "attention_mask"):
            with pytest.raises(DataError, match=f"field '{name}'"):
                read([row | {name: bad}])
    with pytest.raises(DataError, match=r"field 'advantages': has a value for every token"):
        read([row | {"advantages": [0.1] * 4}])


@pytest.mark.parametrize(
    "packed",
    [
        {"seq_lengths": [2, 3]},
        {"cu_seqlens": [0, 2, 5]},
        {"position_ids": [0, 1, 0, 1, 2]},
        {"seq_lengths": [2, 3], "position_ids": [0, 1, 0, 1, 2]},
    ],
)
def test_packed_rows_are_split(read, packed):
    loaded = read([{"input_ids": [1, 2, 3, 4, 5]} | packed])
    assert [(s.ids, s.trained) for s in loaded.samples] == [
        ([1, 2], [False, True]),
        ([3, 4, 5], [False, True, True]),
    ]
    padded = {name: [*value, 0] if name == "position_ids" else value for name, value in packed.items()}
    if "position_ids" in packed and "seq_lengths" not in packed:
        loaded = read([{"input_ids": [1, 2, 3, 4, 5, 9], "attention_mask": [1] * 5 + [0]} | padded])
        assert [s.ids for s in loaded.samples] == [[1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    "packed",
    [
        {"seq_lengths": [2, 2]},
        {"seq_lengths": [6, -1]},
        {"cu_seqlens": [0, 2]},
        {"position_ids": [1, 2, 3, 4, 5]},
        {"position_ids": [0, 1, 3, 4, 5]},
        {"position_ids": [0, 1]},
        {"seq_lengths": [1, 4], "position_ids": [0, 1, 0, 1, 2]},
        {"seq_lengths": [1, 4], "cu_seqlens": [0, 2, 5]},
        {"input_ids": [[1, 2], [3]]},
    ],
)
def test_packed_rows_that_do_not_add_up_are_refused(read, packed):
    with pytest.raises(DataError, match=r"rows.jsonl:1, fields? '"):
        read([{"input_ids": [1, 2, 3, 4, 5]} | packed])


def test_bad_rows_are_all_counted_and_the_first_five_named(read):
    rows = [{"messages": TURNS if n % 2 else n, "id": n} for n in range(14)]
    with pytest.raises(DataError, match=r"^7 of 14 rows cannot be trained on; the first five:") as caught:
        read(rows)
    lines = str(caught.value).split("\n")
    assert [line.strip().partition(",")[0].rpartition(":")[2] for line in lines[1:6]] == [
        "1",
        "3",
        "5",
        "7",
        "9",
    ]
    assert lines[6:] == ["mend them, or set data.on_bad_row: drop"]
    loaded = read(rows, on_bad_row="drop")
    assert len(loaded.samples) == 7
    assert loaded.dropped == {BAD_ROW: 7}
    assert any(text.startswith("7 rows cannot be trained on and were dropped: ") for text in loaded.warnings)
    assert list(loaded.files.values()) == [14]
    with pytest.raises(DataError, match=r"rows.jsonl:2, field 'messages'.*\(or set data.on_bad_row: drop\)$"):
        read([{"messages": TURNS}, {"messages": 3}])
    with pytest.raises(
        DataError, match=r"none of its 2 rows is usable .2 × cannot be trained on.*the first bad row is"
    ):
        read([{"messages": 3}, {"messages": 4}], on_bad_row="drop", format="messages")


def test_rows_that_the_template_or_the_vocabulary_refuses_are_bad_rows(read, tmp_path):
    template = (
        "{% for m in messages %}{% if m.content == 'no' %}{{ raise_exception('no') }}{% endif %}{% endfor %}"
        + CHATML
    )
    rows = [{"messages": TURNS}, {"messages": [TURNS[0], {"role": "assistant", "content": "no"}]}]
    with pytest.raises(DataError, match=r"rows.jsonl:2.*data.on_bad_row: drop"):
        read(rows, byte_level(template))
    assert read(rows, byte_level(template), on_bad_row="drop").dropped == {BAD_ROW: 1}
    (tmp_path / "ids.jsonl").write_text(
        '{"input_ids": [1, 2]}\n{"input_ids": [1, 2, 3, 99], "seq_lengths": [2, 2]}\n'
    )
    loaded = load(tmp_path / "ids.jsonl", None, DataSettings(on_bad_row="drop"), vocab_size=50)
    assert [sample.ids for sample in loaded.samples] == [[1, 2]]  # nothing of a bad packed row is kept
    assert loaded.dropped == {BAD_ROW: 1}


def test_dropping_bad_rows_does_not_hide_a_torn_file_or_a_setting(read, tmp_path):
    (tmp_path / "torn.jsonl").write_text(json.dumps({"messages": TURNS}) + '\n{"messages": ')
    with pytest.raises(DataError, match=r"torn.jsonl:2: is torn"):
        load(tmp_path / "torn.jsonl", byte_level(), DataSettings(on_bad_row="drop"))
    with pytest.raises(DataError, match="no chat template"):
        read([{"messages": TURNS}], byte_level(None), on_bad_row="drop")


@pytest.mark.parametrize("eos", [END, "<|eot_id|>"])
@pytest.mark.parametrize("tail", ["", "\n", " \n"])
@pytest.mark.parametrize("form", ["text", "prompt"])
def test_rendered_chats_get_no_second_end_where_special_tokens_are_parsed(read, eos, tail, form):
    """OpenRLHF#1069, unsloth#2095."""
    tokenizer = byte_level(CHATML, eos=eos)
    row = {"text": f"hi{END}{tail}"} if form == "text" else {"prompt": "hi", "completion": f"yo{END}{tail}"}
    (parsed,) = read([row], tokenizer, special_tokens="parse").samples
    end = tokenizer.convert_tokens_to_ids(END)
    assert parsed.ids[-1] == end
    assert parsed.ids.count(end) == 1
    spelled = read([row], tokenizer)
    assert end not in spelled.samples[0].ids[:-1]
    assert spelled.samples[0].ids[-1] == tokenizer.eos_token_id
    assert "letter by letter" in str(spelled.warnings)
    assert "tokenizer.special_tokens: parse" in str(spelled.warnings)
    assert "letter by letter" not in str(read([{"text": "plain"}], tokenizer).warnings)


def test_segments_stand_as_they_are(read):
    row = {
        "segments": [
            {"label": False, "text": "ab"},
            {"label": True, "text": f"cd{END}"},
            {"label": 0, "text": "x"},
        ]
    }
    (sample,) = read([row], special_tokens="parse").samples
    assert trained_text(sample, byte_level()) == f"·cd{END}"
    open_ended = read([{"segments": [{"label": True, "text": "abc"}]}])
    assert "will not learn to stop" in str(open_ended.warnings)
    for bad in (
        [],
        "x",
        [{"text": "t"}],
        [{"label": 0.5, "text": "t"}],
        [{"label": 1}],
        [{"label": 1, "text": "t", "w": 2}],
    ):
        with pytest.raises(DataError, match="field 'segments"):
            read([{"segments": bad}])


def test_held_out_rows_are_in_the_account(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"query": name, "response": name, "id": 1}) + "\n")
    _, loaded = load_splits(tmp_path / "a.jsonl", byte_level(), validation=tmp_path / "b.jsonl")
    assert [name.rpartition("/")[2] for name in loaded.files] == ["a.jsonl", "b.jsonl"]
    assert [text for text in loaded.warnings if "columns" in text] == ["columns not used: id (2 rows)"]


def test_one_folder_may_hold_all_splits(tmp_path):
    for name in ("train", "validation", "test"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"query": name, "response": name}) + "\n")
    splits, loaded = load_splits(tmp_path, byte_level(), validation=str(tmp_path), test=str(tmp_path))
    for name in ("train", "validation", "test"):
        assert [trained_text(sample, byte_level()) for sample in getattr(splits, name)] == [f"·{name}{END}"]
    assert [name.rpartition("/")[2] for name in loaded.files] == [
        "train.jsonl",
        "validation.jsonl",
        "test.jsonl",
    ]


SURE = {
    "messages": TURNS,
    "prompt": "p",
    "completion": "c",
    "instruction": "i",
    "output": "o",
    "text": "some text",
}
EXTRA = {
    **dict.fromkeys(
        ("system", "system_prompt", "id", "source", "context", "input", "query", "response", "thinking"),
        "words",
    ),
    **{
        "tools": [{"name": "f"}],
        "functions": [{"name": "f"}],
        "history": [["q", "a"]],
        "chat_template_kwargs": {"mood": 1},
    },
    **{
        "weight": 1,
        "Weight": 0,
        "train": False,
        "loss_mask": [1],
        "labels": [1],
        "label": True,
        "position_ids": [0],
    },
    **{
        "images": ["x.png"],
        "audio": {"path": "x"},
        "score": 0.5,
        "seq_lengths": [1],
        "meta": {"a": [1]},
        "mask": 0,
    },
}


def test_no_column_of_random_rows_is_passed_over_in_silence(read):
    draw = random.Random(9)
    accepted = refused = 0
    for _ in range(200):
        names = draw.sample(sorted(SURE), draw.randint(1, 3)) + draw.sample(sorted(EXTRA), draw.randint(0, 3))
        row = {name: draw.choice([(SURE | EXTRA)[name]] * 4 + [None, ""]) for name in names}
        loaded = outcome(read, [row])
        if isinstance(loaded, str):
            assert "rows.jsonl" in loaded
            refused += 1
            continue
        accepted += 1
        named = {*loaded.columns_used, *loaded.columns_unused}
        assert {name for name, value in row.items() if value not in (None, "")} <= named, row
        form = next(
            f
            for f in ("messages", "prompt", "alpaca", "query", "text")
            if not isinstance(outcome(parse, row, f, "f:1"), str)
        )
        for name in loaded.columns_used:  # what is used decides: another value gives another row, or an error
            if row[name] not in ("",) and isinstance(row[name], str):
                changed = outcome(parse, {**row, name: "other"}, form, "f:1")
                assert changed != outcome(parse, row, form, "f:1"), (name, row)
    assert accepted > 30
    assert refused > 30


def outcome(call, *arguments):
    """What it gives, or the text of its DataError."""
    try:
        return call(*arguments)
    except DataError as error:
        return str(error)


@pytest.mark.parametrize("prompt", ["You answer in one short word only.", "Brief."])
def test_a_part_of_the_prompt_that_stands_in_the_turns_already_is_named_and_one_that_does_not_is_refused(
    tmp_path, prompt
):
    """As HuggingFaceH4/Multilingual-Thinking keeps its system prompt: in a column, and inside messages."""
    turns = [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "One."}]
    row = {"developer": prompt, "messages": [{"role": "system", "content": prompt}, *turns]}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    assert load(str(path), byte_level()).columns_unused == {"developer": 1}
    path.write_text(json.dumps(row | {"messages": [{"role": "system", "content": "Say: one."}, *turns]}))
    with pytest.raises(DataError, match="'developer': may be a part of the text"):
        load(str(path), byte_level())
    path.write_text(json.dumps(row | {"developer": "One"}))  # it stands inside an answer by chance
    with pytest.raises(DataError, match="'developer': may be a part of the text"):
        load(str(path), byte_level())


def test_a_weight_may_be_the_text_of_a_number_as_csv_has_it(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("query,response,w\n1?,One.,0.5\n2?,Two.,0\n3?,Three.,1e0\n")
    loaded = load(str(path), byte_level(), DataSettings(weight_column="w"))
    assert [sample.weight for sample in loaded.samples] == [0.5, 1.0]
    for wrong in ("x", "nan", "-1", "inf"):
        path.write_text(f"query,response,w\n1?,One.,{wrong}\n")
        with pytest.raises(DataError, match="is not a weight"):
            load(str(path), byte_level(), DataSettings(weight_column="w"))


def test_the_first_bad_rows_are_named_in_the_order_of_the_file(read):
    """A row's form is looked at before its text: the second kind of error would come last."""
    deaf = CHATML.replace("message.content", "message.content.replace('LOSE', '')")
    lost = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "LOSE it"}]}
    rows = [
        lost,
        {"text": "x"},
        {"messages": TURNS},
        lost,
        {"text": "y"},
        {"text": "z"},
        lost,
        {"messages": TURNS},
    ]
    with pytest.raises(DataError, match="6 of 8 rows cannot") as caught:
        read(rows, byte_level(deaf))
    places = [line.strip().partition(",")[0] for line in str(caught.value).splitlines()[1:-1]]
    assert [place.rpartition(":")[2] for place in places] == ["1", "2", "4", "5", "6"]


def test_beside_token_ids_a_length_of_the_prompt_says_what_is_trained(read):
    for name in ("prompt_length", "source_len", "response_start", "answer_span", "inputLength"):
        with pytest.raises(DataError, match=f"'{name}': may say what is trained"):
            read([{"input_ids": [1, 2, 3], name: 1}])
        assert read([{"messages": TURNS, name: 1}]).columns_unused == {name: 1}
    assert read([{"input_ids": [1, 2, 3], "length": 3}]).columns_unused == {"length": 1}


def test_a_row_whose_turns_are_all_marked_as_not_trained_is_dropped_for_that(read):
    marked = {"messages": [TURNS[0], {**TURNS[1], "weight": 0}]}
    assert read([marked, {"messages": TURNS}]).dropped == {"no turn is marked as trained": 1}


def test_the_way_out_is_said_once(read):
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    with pytest.raises(DataError) as caught:
        read([{"messages": [TURNS[0], {"role": "assistant", "content": "", "tool_calls": [call]}]}])
    assert str(caught.value).count("data.on_bad_row") == 1
