"""A task answered: files of ranks, entropies that an engine does not say."""

import pytest
import torch

from repsft_fast.distributed import World
from repsft_fast.evaluate.asked import Generation, Problem, Sampling, Task
from repsft_fast.evaluate.decode import Loop
from repsft_fast.evaluate.judging import Judge
from repsft_fast.evaluate.replies import Asked
from repsft_fast.evaluate.scores import score
from repsft_fast.models import load_model
from repsft_fast.suite.evaluation import Under, answer_task, finish_record, path_of
from repsft_fast.suite.results import judged_lines, problems_of
from tests.helpers import tiny
from tests.helpers.chat_tokenizers import byte_level

ALONE = World(0, 1, 0, torch.device("cpu"))
ASKED = Asked(
    Task("t", tuple(Problem(str(n), (), "1") for n in range(3)), sampling=Sampling(max_new_tokens=6)),
    ((5, 6), (7, 8, 9), (4,)),
)


class Silent:
    """Our loop, which says no entropies."""

    name = "silent"

    def __init__(self, model):
        self._loop = Loop(model)

    def generate(self, requests, sampling, *, end_ids, on_reply):
        def without(request, reply):
            on_reply(request, Generation(reply.ids, reply.finished))

        self._loop.generate(requests, sampling, end_ids=end_ids, on_reply=without)


def under(model, folder, engine):
    return Under(
        model, byte_level(), engine, ALONE, (2,), 64, True, lambda store: None, folder, {"model": "m"}
    )


def test_entropies_are_added_where_the_engine_says_none(tmp_path):
    model = load_model(tiny.config("llama", vocab_size=400))
    silent = answer_task(under(model, tmp_path, Silent(model)), ASKED)
    told = answer_task(under(model, None, Loop(model)), ASKED)
    assert silent.texts == told.texts
    for key, reply in told.found.items():
        assert silent.found[key].entropy == pytest.approx(reply.entropy, abs=1e-5)
        assert silent.found[key].ids == reply.ids


def test_a_finished_file_holds_what_it_was_given(tmp_path):
    model = load_model(tiny.config("llama", vocab_size=400))
    of = under(model, tmp_path, Loop(model))
    answered = answer_task(of, ASKED)
    lines = [{"prompt": p, "draw": d, "ids": r.ids, "finished": r.finished, "entropy": r.entropy, "verdict": "right"}
             for (p, d), r in answered.found.items()]  # fmt: skip
    finish_record(of, ASKED, lines)
    assert path_of(of, ASKED, 0).read_text().count('"verdict": "right"') == 3
    assert answer_task(of, ASKED).found == answered.found


def test_each_rank_has_a_file_of_its_own(tmp_path):
    of = under(None, tmp_path, Silent)
    assert [path_of(of, ASKED, rank).name for rank in (0, 1)] == ["t.jsonl", "t.rank1.jsonl"]


@pytest.mark.parametrize(("token", "ended"), [(2, 1.0), (3, 0.0)])
def test_termination_of_a_model_that_always_stops_and_of_one_that_never_does(token, ended):
    """A head that says one token whatever it reads."""
    model = load_model(tiny.config("llama", vocab_size=400))

    def said(_module, _given, logits):
        return torch.full_like(logits, -19.0).index_fill_(-1, torch.tensor([token]), 19.0)

    model.get_output_embeddings().register_forward_hook(said)
    of = under(model, None, Loop(model))
    answered = answer_task(of, ASKED)
    with Judge() as judge:
        lines = judged_lines(ASKED, answered, judge, byte_level(), trusted=False)
    scores = score(problems_of(ASKED.task, lines))
    assert scores.ended.value == ended
    cut, whole = scores.lengths_cut, scores.lengths_ended
    assert (cut.replies, whole.replies) == ((0, 3) if ended else (3, 0))
    assert (whole if ended else cut).mean == (1.0 if ended else 6.0)
    # What is said for sure leaves no entropy.
    assert scores.entropy.value == pytest.approx(0.0, abs=1e-4)
