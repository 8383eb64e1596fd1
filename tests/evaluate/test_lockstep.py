"""Two ranks that share a model reply as one: the same forward calls whatever rounding does on one of them, and
memory that runs out on one is known to both."""

from __future__ import annotations

import pytest
import torch

from repsft_fast.config import Config
from repsft_fast.errors import ModelError
from repsft_fast.evaluate import decode
from repsft_fast.evaluate.asked import Generation, Request, Sampling
from repsft_fast.evaluate.decode import Loop
from repsft_fast.models import load_model
from repsft_fast.training.build import build
from tests.helpers import ranks, runs

MODEL = {**runs.MODEL, "num_hidden_layers": 3, "tie_word_embeddings": False}
PROMPTS = [[5, 6, 7, 8, 9], [12, 13, 14], [20], [3, 4, 5, 6]]
REQUESTS = [Request(n, draw, tuple(prompt)) for n, prompt in enumerate(PROMPTS) for draw in (0, 1)]
ENDS = [*range(0, runs.VOCABULARY, 7)]
SAMPLINGS = {
    name: Sampling(temperature=t, top_p=0.9, max_new_tokens=8)
    for name, t in (("greedy", 0.0), ("drawn", 1.0))
}


def replies_of(model, sampling, way=None) -> dict[tuple[int, int], Generation]:
    found = {}
    loop = Loop(model, batch_size=5)
    loop.way = way
    loop.generate(
        REQUESTS,
        sampling,
        end_ids=ENDS,
        on_reply=lambda r, g: found.update({(r.prompt, r.draw): (g.ids, g.finished)}),
    )
    return found


def rank_replies(world, given, disturbed):
    model = build(Config.of(given), world=world).model
    if disturbed and world.rank == 1:
        model.lm_head.register_forward_hook(lambda _, __, logits: logits.flip(-1))
    return [
        replies_of(model, sampling, way) for sampling in SAMPLINGS.values() for way in (None, "one by one")
    ]


@pytest.mark.parametrize("disturbed", [False, True], ids=["alike", "another arg-max on rank 1"])
def test_both_ranks_reply_as_one(disturbed, tmp_path):
    given = runs.settings(tmp_path, model__config=MODEL)
    left, right = ranks.run_ranks(rank_replies, given, disturbed, timeout_s=120)
    assert left == right
    model = build(Config.of(given)).model
    for (greedy, _), sampling in zip((left[:2], left[2:]), SAMPLINGS.values(), strict=True):
        assert greedy == replies_of(model, sampling)
    assert left[0] == left[1]
    assert left[2] == left[3]
    assert len({len(ids) for ids, _ in left[0].values()}) > 1


def full(*_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def broken(*_):
    raise RuntimeError("a kernel of rank 1")


def failures(world, given, what):
    """What is raised where rank 1 fails in its n-th forward call, by n and way; whether it replies after."""
    model = build(Config.of(given), world=world).model
    expected, found = replies_of(model, SAMPLINGS["drawn"]), []
    for way in (None, "padded", "one by one"):
        for number in (0, 1, 3):
            calls = 0
            if way is None:
                decode._WAYS.pop(model, None)  # it is tried again

            def fails(*_, number=number):
                nonlocal calls
                calls += 1
                if calls == number + 1 and world.rank == 1:
                    what()

            hook = model.model.layers[1].mlp.register_forward_hook(fails)
            try:
                replies_of(model, SAMPLINGS["drawn"], way)
                found.append("nothing")
            except Exception as error:
                found.append(f"{type(error).__name__}: {error}")
            finally:
                hook.remove()
            if replies_of(model, SAMPLINGS["drawn"]) != expected:
                found.append("other replies afterwards")
    return found


def test_memory_that_runs_out_on_one_rank_is_raised_on_both(tmp_path):
    given = runs.settings(tmp_path, model__config=MODEL)
    left, right = ranks.run_ranks(failures, given, full, timeout_s=120)
    assert left == ["OutOfMemoryError: memory ran out on 1 of 2 ranks"] * 9
    assert right == ["OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"] * 9


def test_another_error_of_one_rank_leaves_no_rank_waiting(tmp_path):
    """While a model is tried it says that the model is served otherwise, on both."""
    given = runs.settings(tmp_path, model__config=MODEL)
    left, right = ranks.run_ranks(failures, given, broken, timeout_s=120)
    told = "ModelError: model: a step of generation failed on 1 of 2 ranks; read the other ranks' output"
    assert left == ["nothing"] * 3 + [told] * 6
    assert right == ["nothing"] * 3 + ["RuntimeError: a kernel of rank 1"] * 6


def other_requests(world):
    """A model that is whole on each rank is asked for different things."""
    model, found = load_model(MODEL), []
    Loop(model).generate(
        REQUESTS[world.rank :: 2][: 3 + world.rank], SAMPLINGS["greedy"], end_ids=[],
        on_reply=lambda r, g: found.append(r.prompt),
    )  # fmt: skip
    return len(found)


def test_ranks_that_each_hold_the_model_need_not_meet():
    assert ranks.run_ranks(other_requests, timeout_s=60) == [3, 4]


def test_not_finite_is_said_on_both(tmp_path):
    assert ranks.run_ranks(not_finite, runs.settings(tmp_path), timeout_s=60) == ["ModelError", "ModelError"]


def not_finite(world, given):
    model = build(Config.of(given), world=world).model
    model.lm_head.register_forward_hook(lambda _, __, logits: logits * float("nan"))
    try:
        replies_of(model, SAMPLINGS["greedy"])
    except ModelError:
        return "ModelError"
