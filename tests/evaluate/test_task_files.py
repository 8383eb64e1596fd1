"""Files, folders, hub ids and generated tasks as tasks: which problems, under which names, asked how."""

import csv
import json
import sys
from types import ModuleType

import datasets
import pytest

from repsft_fast.data import arrow
from repsft_fast.errors import ConfigError, DataError
from repsft_fast.evaluate.asked import Sampling
from repsft_fast.evaluate.task_files import read_task
from tests.evaluate.test_layouts import GPQA, MMLU

AIME = [{"id": n, "problem": f"Find {n} in {{x}}.", "answer": f"{n:03d}", "url": "u"} for n in range(1, 31)]


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes rows under the test's folder, where names are looked up."""
    monkeypatch.chdir(tmp_path)

    def at(name, rows):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".csv"):
            with path.open("w", newline="", encoding="utf-8") as stream:
                csv.writer(stream).writerows(rows)
        elif name.endswith(".parquet"):
            datasets.Dataset.from_list(rows).to_parquet(path)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return name

    return at


def task_of(*arguments, **keywords):
    return read_task("t", *arguments, **keywords)[0]


def test_a_task_of_the_plain_format(write):
    rows = [
        {"prompt": "Say {hi}", "answer": "hi", "group": "easy", "note": "x"},
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}], "answer": 12.0},
    ]
    task, notes = read_task("mine", write("rows.jsonl", rows), sampling=Sampling(n=4), where="--tasks")
    first, second = task.problems
    assert (task.name, task.kind, task.extractor, task.sampling.n) == ("mine", "generate", "final", 4)
    assert first.messages == ({"role": "user", "content": "Say {hi}"},)
    assert (first.name, first.answer, first.group, first.where) == ("1", "hi", "easy", "rows.jsonl:1")
    assert [message["content"] for message in second.messages] == ["s", "u"]
    assert (second.name, second.answer, second.text) == ("2", "12", None)
    assert notes == ["rows.jsonl: read as plain, by its columns", "rows.jsonl: columns not used: note"]


def test_the_same_problems_from_every_kind_of_file(write):
    flat = [{"problem": row["problem"], "answer": int(row["answer"]), "id": str(row["id"])} for row in AIME]
    table = [list(flat[0]), *[list(row.values()) for row in flat]]
    found = [
        task_of(write(name, rows)).problems
        for name, rows in (("a.jsonl", flat), ("a.parquet", flat), ("a.csv", table))
    ]
    problems = [[(p.name, p.messages, p.answer) for p in of] for of in found]
    assert problems[0] == problems[1] == problems[2]
    assert problems[0][2] == (
        "3",
        (
            {
                "role": "user",
                "content": "Find 3 in {x}.\n\nWork it out step by step, and write the final answer alone into \\boxed{}.",
            },
        ),
        "3",
    )
    assert task_of("a.csv").extractor == "boxed"


def test_mmlu_as_its_authors_wrote_it_has_no_header_and_its_subject_in_the_files_name(write):
    rows = [["What, then?", "x", "y, z", "A", "0", "B"], ["question", "1", "2", "3", "4", "D"]]
    write("test/abstract_algebra_test.csv", rows)
    write("test/law_test.csv", [["Who?", "p", "q", "r", "s", "A"]])
    task, notes = read_task("mmlu", "test")
    assert [(p.answer, p.group, p.where) for p in task.problems] == [
        ("B", "abstract_algebra", "test/abstract_algebra_test.csv:1"),
        ("D", "abstract_algebra", "test/abstract_algebra_test.csv:2"),
        ("A", "law", "test/law_test.csv:1"),
    ]
    assert task.problems[0].choices == ("x", "y, z", "A", "0")
    assert task.problems[0].text == (
        "The following are multiple choice questions (with answers) about abstract algebra.\n\n"
        "What, then?\nA. x\nB. y, z\nC. A\nD. 0\nAnswer:"
    )
    assert task.problems[0].compared == ("A", "B", "C", "D")
    assert (task.kind, task.extractor, [n for n in notes if "not used" in n]) == ("choice", "choice", [])
    with_header = write("h.csv", [["question", "A", "B", "C", "D", "answer"], *rows])
    assert [p.answer for p in task_of(with_header).problems] == ["B", "D"]


def test_a_choice_that_the_model_writes(write):
    name = write("g.jsonl", [GPQA])
    problem = task_of(name).problems[0]
    assert problem.messages[0]["content"].startswith(
        f"Which?\n\nA) {problem.choices[0]}\nB) {problem.choices[1]}\n"
    )
    assert "\\boxed{}" in problem.messages[0]["content"]
    assert (problem.text, problem.compared, task_of(name).extractor) == (None, (), "choice")
    asked = task_of(write("m.jsonl", [MMLU]), kind="generate")
    assert (asked.kind, asked.problems[0].text) == ("generate", None)
    plain = write("p.jsonl", [{"prompt": "Sky?", "choices": ["red", "blue"], "answer": "blue"}])
    assert (
        task_of(plain)
        .problems[0]
        .messages[0]["content"]
        .startswith("Sky?\n\nA) red\nB) blue\n\nWrite the letter")
    )
    assert task_of(plain).extractor == "choice"


def test_a_choice_by_log_likelihood_compares_letters_that_are_shown_and_texts_where_none_are(write):
    rows = [{"prompt": "The sky is", "choices": ["red", "blue"], "answer": "blue", "group": "colour"}]
    plain = task_of(write("p.jsonl", rows), kind="choice").problems[0]
    assert (plain.text, plain.compared, plain.answer) == ("The sky is", ("red", "blue"), "B")
    shown = task_of("p.jsonl", kind="choice", prompt="{question} …\n{choices}\nIt is").problems[0]
    assert (shown.text, shown.compared) == ("The sky is …\nA. red\nB. blue\nIt is", ("A", "B"))
    texts = task_of(write("m.jsonl", [MMLU]), prompt="Q: {question}\nA:").problems[0]
    assert (texts.text, texts.compared) == ("Q: Two and two?\nA:", ("3", "4", "5", "6"))


def test_an_own_template_fills_its_places_once(write):
    rows = [{"prompt": "A {question} of {choices}?", "answer": "\\frac{1}{2}"}]
    problem = task_of(write("p.jsonl", rows), prompt="Q: {question}\nUse \\boxed{} and {x}.").problems[0]
    assert problem.messages[0]["content"] == "Q: A {question} of {choices}?\nUse \\boxed{} and {x}."
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    asked = task_of(write("c.jsonl", [{"messages": chat, "answer": 1}]), prompt="Now: {question}").problems[0]
    assert [message["content"] for message in asked.messages] == ["s", "Now: u"]


def test_a_limit_draws_nested_problems_in_their_order_under_the_same_names(write):
    name = write("a.jsonl", AIME)
    few, notes = read_task("t", name, limit=8)
    more = task_of(name, limit=20)
    names = [[problem.name for problem in task.problems] for task in (few, more)]
    assert len(names[0]) == 8
    assert set(names[0]) < set(names[1])
    assert names[0] == sorted(names[0], key=int) != [str(n) for n in range(1, 9)]
    assert "t: 8 of 30 problems, drawn by seed 42" in notes
    assert [p.name for p in task_of(name, limit=8, seed=1).problems] != names[0]
    assert len(task_of(name, limit=99).problems) == 30
    without_ids = write("b.jsonl", [{k: row[k] for k in ("problem", "answer")} for row in AIME])
    assert [p.name for p in task_of(without_ids, limit=8).problems] == [str(int(n)) for n in names[0]]


def test_a_task_of_one_problem_and_problems_that_come_again(write):
    assert len(task_of(write("one.jsonl", AIME[:1])).problems) == 1
    parts = [write("1.jsonl", AIME[:2]), write("2.jsonl", [{**AIME[5], "id": 1}, AIME[6]])]
    task, notes = read_task("t", parts)
    assert [problem.name for problem in task.problems] == ["1", "2", "1#2", "7"]
    assert "t: problems whose id others have, named ID#2 …: 1" in notes
    twice = write("twice.jsonl", [AIME[0], AIME[1], {**AIME[0], "answer": 7}])
    with pytest.raises(DataError, match=r"^t: holds the problem of the id 1 twice, got Find 1 in"):
        read_task("t", twice)
    copies = write("copies.jsonl", [{"prompt": "p", "answer": 1}] * 3)
    task, notes = read_task("t", copies)
    assert [problem.name for problem in task.problems] == ["1", "2", "3"]
    assert "t: questions that are there before, and count twice: 2" in notes


def test_a_row_named_by_its_number_does_not_take_the_name_of_an_id(write):
    rows = [
        {"prompt": "p", "answer": 1},
        {"prompt": "q", "answer": 1, "id": "1"},
        {"prompt": "r", "answer": 1, "id": ""},
    ]
    with pytest.raises(DataError, match=r"^x.jsonl:3, field 'id': is empty"):
        read_task("t", write("x.jsonl", rows))
    assert [p.name for p in task_of(write("y.jsonl", rows[:2])).problems] == ["1", "1#2"]


def test_a_folder_and_a_hub_id_give_their_test_split_or_the_only_one(write, monkeypatch):
    write("d/train.jsonl", AIME[:3])
    write("d/test.jsonl", AIME[3:5])
    assert [p.name for p in task_of("d").problems] == ["4", "5"]
    assert [p.name for p in task_of("d", split="train").problems] == ["1", "2", "3"]
    asked = []

    def load_dataset(name, subset, split=None):
        asked.append((name, subset, split))
        only = datasets.Dataset.from_list([GPQA])
        if split is not None:
            raise ValueError(f"Unknown split {split!r}")
        return datasets.DatasetDict({"train": only})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(arrow, "why_not_reached", lambda name, kind: None)
    problem = task_of("owner/gpqa:gpqa_diamond").problems[0]
    assert asked == [("owner/gpqa", "gpqa_diamond", "test"), ("owner/gpqa", "gpqa_diamond", None)]
    assert (problem.name, problem.where) == ("rec7", "owner/gpqa:gpqa_diamond:1")


def test_a_generated_task_asks_its_question_as_it_is(monkeypatch):
    made = {"sums": {"question": "1 + 2?", "answer": 3, "metadata": {"answer_cot": "so #### 3"}}}
    made["blank"] = {"question": "?", "answer": None, "metadata": {}}
    package, factory = ModuleType("reasoning_gym"), ModuleType("reasoning_gym.factory")
    factory.DATASETS = made
    package.create_dataset = lambda task, *, size, seed: [made[task]] * size
    for name, module in (
        ("reasoning_gym", package),
        ("reasoning_gym.factory", factory),
        ("pycosat", ModuleType("p")),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    task, _ = read_task("sums", "reasoning-gym:sums?size=2&seed=3")
    assert (len(task.problems), task.extractor) == (2, "final")
    assert task.problems[1].messages == ({"role": "user", "content": "1 + 2?"},)
    assert (task.problems[1].answer, task.problems[1].where) == ("3", "reasoning-gym:sums?size=2&seed=3:2")
    with pytest.raises(DataError, match=r"^reasoning-gym:blank: reasoning-gym gives no answers to blank"):
        read_task("t", "reasoning-gym:blank")
    with pytest.raises(ConfigError, match="which is generated, got aime"):
        read_task("t", "reasoning-gym:sums", layout="aime")


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"layout": "mmlo"}, "no such layout of a task.*did you mean mmlu"),
        ({"kind": "choices"}, "no such kind of a task.*did you mean choice"),
        ({"limit": 0}, "has a limit too small, expected at least 1, got 0"),
        ({"kind": "choice"}, "compares choices, and the problems have none"),
        ({"prompt": "Solve."}, "has no place for the question"),
        ({"prompt": "{question} {answer}"}, r"names what a problem does not have.*got \{answer\}"),
        ({"prompt": "{qestion}"}, r"did you mean \{question\}"),
        ({"prompt": "{{question}}"}, "double braces.*single braces"),
        ({"prompt": "{question}\n{choices}"}, "shows choices, and the problems have none"),
    ],
)
def test_arguments_that_cannot_be_meant(write, keywords, words):
    name = write("a.jsonl", AIME)
    with pytest.raises(ConfigError, match=f"^evaluate: .*{words}"):
        read_task("t", name, where="evaluate", **keywords)


def test_a_task_has_a_name():
    with pytest.raises(ConfigError, match=r"^--tasks: has a task without a name"):
        read_task(" ", "a.jsonl")


@pytest.mark.parametrize(
    ("name", "rows", "words"),
    [
        ("e.jsonl", [], "^e.jsonl: is empty, expected at least one row"),
        ("e.csv", [["problem", "answer"]], "^e.csv: is empty"),
        ("w.jsonl", [*AIME[:2], {"problem": "p"}], "^w.jsonl:3: lacks a column of the layout aime"),
        ("w.jsonl", [*AIME[:2], {"problem": "p", "answer": None}], "^w.jsonl:3: lacks a column of the layout aime, or it is null"),
        ("w.jsonl", [{"input_ids": [1]}], "^w.jsonl:1: has the columns of no layout.*got input_ids"),
        ("w.jsonl", [{"prompt": "p", "answer": 1}, {"prompt": "p", "answer": "A", "choices": [1, 2]}], "^w.jsonl:2: has choices, and rows before it have none; make two tasks"),
        ("w.csv", [["prompt", "answer"], ["p", ""]], "^w.csv:2: lacks a column of the layout plain|^w.csv:2: has the columns of no"),
        ("x/readme.md", [], "^x: is a folder without data"),
        ("x/config.json", [{"model_type": "llama"}], "^x: is a folder without data"),
        ("x/rows.json", [{"model_type": "llama"}], "^x/rows.json:1: has the columns of no layout.*got model_type"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_by_its_place(write, name, rows, words):
    write(name, rows)
    with pytest.raises(DataError, match=words):
        read_task("t", "x" if name.startswith("x/") else name)


def test_questions_of_mmlu_with_two_choices_of_one_text_are_asked_and_counted(write):
    row = {**MMLU, "choices": ["3", "4", "3", "6"]}
    task, notes = read_task("t", write("m.jsonl", [MMLU, row]))
    assert task.problems[1].choices == ("3", "4", "3", "6")
    assert "m.jsonl: 1 problems have two choices of one text: letters are judged" in notes


def test_the_same_file_twice_is_refused(write):
    with pytest.raises(DataError, match=r"^b.jsonl: is a copy of a.jsonl, byte for byte"):
        read_task("t", [write("a.jsonl", AIME), write("b.jsonl", AIME)])


def test_torn_lines_double_keys_and_other_encodings_are_refused(tmp_path):
    for content, words in (
        (b'{"prompt": "p", "answer": 1}\n{"prompt": "q", "ans', "rows.jsonl:2: is torn"),
        (b'{"prompt": "p", "prompt": "q", "answer": 1}\n', "rows.jsonl:1: names 'prompt' twice"),
        (b'{"prompt": "\xe4", "answer": 1}\n', "rows.jsonl:1: is not UTF-8"),
    ):
        (tmp_path / "rows.jsonl").write_bytes(content)
        with pytest.raises(DataError, match=words):
            read_task("t", tmp_path / "rows.jsonl")
    (tmp_path / "rows.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "p", "answer": 1}')
    assert task_of(tmp_path / "rows.jsonl").problems[0].answer == "1"


def test_a_template_of_a_choice_that_is_written_must_show_the_choices(write):
    with pytest.raises(
        ConfigError, match=r"^--tasks: does not show the choices.*write \{choices\} into the template"
    ):
        read_task("t", write("g.jsonl", [GPQA]), prompt="{question}")
    rows = [{"prompt": "Red (A) or blue (B)?", "choices": ["red", "blue"], "answer": "B"}]
    asked = task_of(write("p.jsonl", rows), prompt="{question}").problems[0]
    assert asked.messages[0]["content"] == "Red (A) or blue (B)?"


def test_a_chat_is_not_compared_by_log_likelihood(write):
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    name = write("c.jsonl", [{"messages": chat, "choices": ["x", "y"], "answer": "A"}])
    with pytest.raises(DataError, match=r"^c.jsonl:1: is a chat, and choices are compared behind a text"):
        read_task("t", name, kind="choice")
