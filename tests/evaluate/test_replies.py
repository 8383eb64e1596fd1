"""Which replies are wanted of a task, by whom, and which are there already."""

from dataclasses import replace

from repsft_fast.evaluate.asked import Generation, Problem, Request, Sampling, Task
from repsft_fast.evaluate.record import Record
from repsft_fast.evaluate.replies import Asked, answer, text_of
from tests.helpers.chat_tokenizers import byte_level

PROBLEMS = tuple(Problem(str(n), ({"role": "user", "content": "?"},), "1") for n in range(5))
ASKED = Asked(Task("t", PROBLEMS, sampling=Sampling(n=2, temperature=0.6)), tuple((n, 9) for n in range(5)))


class Echo:
    """An engine that answers with the prompt."""

    name = "echo"

    def __init__(self):
        self.asked = []

    def generate(self, requests, sampling, *, end_ids, on_reply):
        self.asked += requests
        for request in reversed(requests):
            on_reply(request, Generation([request.prompt, request.draw], True))


def test_ranks_deal_the_prompts_out_and_none_is_lost():
    whole = ASKED.requests()
    assert [(r.prompt, r.draw) for r in whole] == [(p, d) for p in range(5) for d in range(2)]
    assert whole[3] == Request(1, 1, (1, 9))
    parts = [ASKED.requests((rank, 3)) for rank in range(3)]
    assert sorted((r.prompt, r.draw) for part in parts for r in part) == [(r.prompt, r.draw) for r in whole]
    assert {r.prompt for r in parts[1]} == {1, 4}


def test_what_a_record_holds_is_not_asked_again(tmp_path):
    told = []
    with Record(tmp_path / "r", {}, text_of=str) as record:
        record.add(Request(1, 0, (1, 9)), Generation([7], False))
        engine = Echo()
        replies = answer(engine, ASKED, record, end_ids=[], told=lambda request, reply: told.append(request))
    assert len(engine.asked) == len(told) == 9
    assert replies.generated == 18
    assert replies.found[1, 0] == Generation([7], False)
    assert replies.found[4, 1] == Generation([4, 1], True)
    assert len(replies.found) == 10
    with Record(tmp_path / "r", {}, text_of=str) as record:
        again = Echo()
        assert answer(again, ASKED, record, end_ids=[]).found == replies.found
        assert again.asked == []


def test_an_identity_is_of_the_prompts_and_the_draw_and_not_of_how_many():
    same = replace(ASKED, task=replace(ASKED.task, sampling=replace(ASKED.task.sampling, n=8)))
    assert same.identity() == ASKED.identity()
    others = [
        replace(ASKED, prompts=((0, 8), *ASKED.prompts[1:])),
        replace(ASKED, task=replace(ASKED.task, problems=(replace(PROBLEMS[0], name="x"), *PROBLEMS[1:]))),
        *(
            replace(ASKED, task=replace(ASKED.task, sampling=replace(ASKED.task.sampling, **change)))
            for change in ({"seed": 1}, {"temperature": 0.7}, {"top_p": 0.5}, {"max_new_tokens": 9})
        ),
    ]
    assert ASKED.identity() not in [other.identity() for other in others]


def test_an_end_token_is_no_part_of_a_replys_text_and_a_thoughts_mark_is():
    tokenizer = byte_level()
    end = tokenizer.eos_token_id
    ids = tokenizer("<think>a</think>b", add_special_tokens=False).input_ids
    text = text_of(tokenizer, [end])
    assert text(Generation([*ids, end], True)) == "<think>a</think>b"
    assert text(Generation(ids, False)) == "<think>a</think>b"
    assert text(Generation([*ids, end], False)).endswith(tokenizer.eos_token)  # cut there, not ended
    assert text(Generation([], False)) == ""
