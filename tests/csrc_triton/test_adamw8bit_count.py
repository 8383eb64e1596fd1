"""What every element of an 8-bit update shares, counted by a kernel in Triton's interpreter."""

import pytest
import torch

from csrc_triton import adamw8bit_count
from repsft_fast.optim import adamw8bit_reference as reference
from repsft_fast.optim import adamw_reference
from tests.helpers.interpreter import interpret


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    interpret(monkeypatch, "csrc_triton.adamw8bit_count", "csrc_triton.tensor_table")


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.0), (0.5, 0.99999), (0.95, 0.9)])
def test_what_an_update_shares_is_counted_on_the_device(betas):
    """Step, corrections, clip and veto of every pair of betas, in memory that stays; the corrections are
    AdamW's to the bit, and the reference's to fp32's rounding."""
    counter = adamw8bit_count.Counter([betas, (0.8, 0.9)], torch.device("cpu"))
    for before in (0, 1, 9, 998, 2**24, 2**31, 2**40):
        for veto, clip in ((None, None), (torch.tensor(0.0), torch.tensor(0.25)), (torch.tensor(1.0), None)):
            step = torch.tensor(before)
            lines = counter(step, veto, clip)
            assert int(step) == before + (veto is None or not bool(veto))
            for pair, (line, *elements) in zip([betas, (0.8, 0.9)], lines, strict=True):
                assert line.tolist() == [float(element) for element in elements]
                known = reference.corrections(*pair, step)
                torch.testing.assert_close(line[:2], torch.stack(known), rtol=1.2e-7, atol=0)
                if before < 2**24:
                    exact = adamw_reference.corrections(*pair, step.float())
                    assert torch.equal(line[:2], torch.stack(exact))
                assert line[2:].tolist() == [1.0 if clip is None else 0.25, float(veto or 0.0)]
    again = counter(step, None, None)
    assert again[0][0].data_ptr() == lines[0][0].data_ptr()


def test_more_betas_than_it_counts_for_are_refused():
    with pytest.raises(ValueError, match="1 to 16 pairs"):
        adamw8bit_count.Counter([(0.9, n / 100) for n in range(17)], torch.device("cpu"))
