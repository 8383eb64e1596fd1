"""The counter against tensors by hand, and what is predicted of an update against what it counts."""

import re
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from repsft_fast.memory.activations import saved_per_token
from repsft_fast.memory.peak import Peak
from repsft_fast.models.load import config_of
from repsft_fast.sizing.known_models import MODELS
from tests.helpers.peaks import CASES, Case, counted, predicted, recompute

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "memory.md").read_text(encoding="utf-8")
WITHIN = 0.1  # of what is counted


class TestCounter:
    def test_what_lives_at_once(self):
        with FakeTensorMode(), Peak() as peak:
            a = torch.empty(1000)
            b = a + 1
            del a
            c = b + 1  # b and c: two of them, never three
            assert (peak.live, peak.most) == (8000, 8000)
            del b, c
            assert peak.live == 0
            peak.forget()
            assert peak.most == 0

    def test_what_lives_when_the_rest_is_forgotten_counts(self):
        with FakeTensorMode(), Peak() as peak:
            a = torch.empty(1000)
            a + 1
            assert (peak.most, peak.at) == (8000, "aten::add.Tensor")
            peak.forget()
            assert (peak.most, peak.at) == (4000, "")
            del a
            b = torch.empty(10)
            assert (peak.live, peak.most, len(b)) == (40, 4000, 10)

    def test_what_is_counted_already_is_not_looked_up_again(self):
        """Of ten thousands of operators in an update most make views, or less than a new peak."""

        class Watched(Peak):
            looked = 0

            @property
            def live(self):
                self.looked += 1
                return super().live

        with FakeTensorMode(), Watched() as peak:
            held = torch.empty(10, 10)
            assert peak.looked == 1
            held.view(100), held.T, held.add_(1)
            assert (peak.looked, peak.most) == (1, 400)

    def test_views_are_no_storage_and_what_was_there_is_seen(self):
        with FakeTensorMode():
            held = torch.empty(10, 10)
            with Peak() as peak:
                peak.see([held, held.T])
                held.view(100)
                assert peak.most == 400
                held + held
                assert (peak.most, peak.at) == (800, "aten::add.Tensor")

    def test_another_device_is_not_counted(self):
        with FakeTensorMode(), Peak("cuda") as peak:
            torch.empty(10) + 1
            assert peak.most == 0


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_an_update_of_four_layers(case):
    found = counted(case, 4)
    assert predicted(case, 4) == pytest.approx(found, rel=WITHIN)


def test_layers_add_the_same_bytes_each():
    """Past the few with which the peak lies elsewhere (the tied table at the end), so that what is shown of a
    cut model holds of the whole."""
    case = Case("SmolLM2-135M", 2048, {})
    few, more, most = (counted(case, layers) for layers in (6, 8, 12))
    assert most - more == pytest.approx(2 * (more - few), rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("case", [CASES[0], CASES[3], CASES[9]], ids=lambda case: case.name)
def test_a_whole_model(case):
    assert predicted(case) == pytest.approx(counted(case), rel=WITHIN)


def test_the_page_shows_what_is_predicted_and_was_counted_to_a_tenth():
    rows = re.findall(r"^\| (.+?) \| ([\d.]+) GB \| ([\d.]+) GB \| ([\d.]+) \|$", PAGE, re.MULTILINE)
    assert [name for name, *_ in rows] == [case.name for case in CASES]
    for case, (_, said, found, ratio) in zip(CASES, rows):
        assert float(said) == pytest.approx(predicted(case) / 1e9, abs=0.0051)
        assert abs(float(ratio) - 1) <= WITHIN
        assert float(said) / float(found) == pytest.approx(float(ratio), abs=0.005)


def test_adapters_keep_less_than_trained_weights():
    config = config_of(MODELS["Qwen3-0.6B"])
    full, adapters = saved_per_token(config), saved_per_token(config, lora={"rank": 8})
    assert adapters.layer < full.layer, "the inputs of frozen matrices are needed by their adapters alone"
    assert adapters.passing > 0


def test_a_layer_that_is_gone_back_through_holds_more_than_it_kept():
    """Checkpointed rows are as long as this says: without it they were predicted a third too long."""
    long = Case("Qwen3-0.6B", 32_768, recompute("full"), vocabulary=2_000)
    found = counted(long, 4)
    assert predicted(long, 4) == pytest.approx(found, rel=WITHIN)
