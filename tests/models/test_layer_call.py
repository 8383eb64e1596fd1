"""What a compiled layer is called with: other arguments are told, a row's own documents are none."""

import pytest
import torch

from repsft_fast.models.layer_call import Given, likeness, tensors_in
from repsft_fast.ops.attention import Packed

BASE = {"positions": (torch.zeros(2, 3), torch.zeros(2, 3)), "use_cache": False, "mask": None}


class TestLikeness:
    def packed(self, **changes):
        values = {"cu_seqlens": torch.tensor([0, 3]), "segment_lengths": (3,), "max_seqlen": 4} | changes
        return Packed(**values)

    def given(self, kwargs, args=()):
        tensors = dict(tensors_in((args, kwargs)))
        return Given(likeness((args, kwargs)), tuple(tensors))

    @pytest.mark.parametrize(
        "change",
        [
            {"use_cache": True},
            {"use_cache": 0},
            {"mask": torch.zeros(1)},
            {"positions": (torch.zeros(2, 3),)},
            {"positions": [torch.zeros(2, 3), torch.zeros(2, 3)]},
            {"positions": (torch.zeros(2, 3), torch.zeros(3, 2).t())},
            {"positions": (torch.zeros(2, 3), torch.zeros(2, 3).double())},
            {"positions": (torch.zeros(2, 3), torch.zeros(2, 3).requires_grad_())},
            {"more": None},
            {"mask": object()},
            {"mask": {"a": 1}},
        ],
    )
    def test_other_arguments_are_not_taken(self, change):
        assert self.given(BASE).take((), BASE) is not None
        assert self.given(BASE).take((), BASE | change) is None
        assert self.given(BASE).take((None,), BASE) is None

    @pytest.mark.parametrize(
        ("change", "taken"),
        [
            ({"segment_lengths": (1, 2)}, True),
            ({"cu_seqlens": torch.tensor([0, 1])}, True),
            ({"cu_seqlens": torch.tensor([0, 1, 3])}, False),
            ({"max_seqlen": 5}, False),
            ({"backend": "mask"}, False),
            ({"grouped": False}, False),
        ],
    )
    def test_of_a_rows_documents_their_borders_count_and_not_their_lengths(self, change, taken):
        given = self.given({"packed": self.packed()})
        other = {"packed": self.packed(**change)}
        found = given.take((), other)
        assert (found is not None) == taken
        assert not taken or found[0] is other["packed"].cu_seqlens

    def test_order_of_names_counts(self):
        """A graph's inputs follow it."""
        assert likeness({"a": 1, "b": 2}) != likeness({"b": 2, "a": 1})
