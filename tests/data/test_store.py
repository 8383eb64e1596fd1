import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from repsft_fast.data.plan import Plan, PlannedRow
from repsft_fast.data.sample import Sample
from repsft_fast.data.store import TokenStore
from repsft_fast.errors import DataError
from repsft_fast.row import IGNORE_INDEX, Row

SAMPLES = [
    Sample([5, 6, 7, 8], [False, False, True, True], task="b", weight=2.0, source="x.jsonl:1"),
    Sample([9, 10], [False, True], task="a", source="x.jsonl:2"),
    Sample([11, 12, 13], [False, True, False], task="b", weight=0.5),
    Sample([14, 15, 16], [False, False, False], task="c"),
]


def planned(ids, store, slots=None) -> PlannedRow:
    ids = np.array(ids, dtype=np.int64)
    real = int(store.index.lengths[ids].sum())
    return PlannedRow(ids, real, real if slots is None else slots)


def resident(store: TokenStore) -> TokenStore:
    """The same store with its tokens on its device: the road a GPU takes, walked on the CPU."""
    store._resident = store._upload()
    return store


@pytest.fixture(params=["host", "device"])
def store(request):
    store = TokenStore(SAMPLES, "cpu")
    return resident(store) if request.param == "device" else store


class TestIndex:
    def test_lengths_are_positions_and_tasks_are_numbered_as_they_appear(self, store):
        index = store.index
        assert index.lengths.tolist() == [3, 1, 2, 2]
        assert index.trained.tolist() == [2, 1, 1, 0]
        assert index.tasks.tolist() == [0, 1, 0, 2]
        assert index.task_names == ("b", "a", "c")
        assert index.weights.tolist() == [2.0, 1.0, 0.5, 1.0]
        assert [a.dtype for a in (index.lengths, index.trained, index.tasks, index.weights)] == [
            np.int64,
            np.int64,
            np.int32,
            np.float64,
        ]

    def test_given_task_names_fix_the_numbers(self):
        index = TokenStore(SAMPLES, "cpu", task_names=["a", "b", "c", "unused"]).index
        assert index.tasks.tolist() == [1, 0, 1, 2]
        assert index.task_names == ("a", "b", "c", "unused")


class TestRow:
    def test_a_row_by_hand(self, store):
        row = store.row(planned([2, 0, 1], store, slots=8), denominator=4.0, average="sample")
        assert row.tokens.tolist() == [[11, 12, 5, 6, 7, 9, 5, 5]]
        assert row.positions.tolist() == [[0, 1, 0, 1, 2, 0, 0, 0]]
        x = IGNORE_INDEX
        assert row.targets.tolist() == [12, x, x, 7, 8, 10, x, x]
        assert row.weights.tolist() == [0.125, 0, 0, 0.25, 0.25, 0.25, 0, 0]
        assert row.trained_positions.tolist() == [0, 3, 4, 5]
        assert row.position_tasks.tolist() == [0, 0, 0, 1]
        assert row.position_segments.tolist() == [0, 1, 1, 2]
        assert row.cu_seqlens.tolist() == [0, 2, 5, 6, 8, 8, 8, 8, 8]
        assert row.segment_lengths == (2, 3, 1, 2)
        assert (row.samples, row.real_tokens, row.num_segments) == ((2, 0, 1), 6, 3)

    def test_token_average_weighs_every_token_of_a_sample_by_its_weight(self, store):
        row = store.row(planned([0, 1], store), denominator=5.0, average="token", scale=2.0)
        assert row.weights.tolist() == [0.0, *np.float32([0.8, 0.8, 0.4]).tolist()]

    def test_types_are_those_of_a_row(self, store):
        row = store.row(planned([0, 3], store, slots=7), denominator=1.0, average="sample")
        others = {"weights": torch.float32, "cu_seqlens": torch.int32}
        for field in dataclasses.fields(Row):
            value = getattr(row, field.name)
            if isinstance(value, torch.Tensor):
                assert value.dtype == others.get(field.name, torch.int64), field.name
                assert value.is_contiguous()
                assert value.data_ptr() % 16 == 0, "Triton would specialise a kernel again"

    def test_a_full_row_has_no_padding_segment(self, store):
        row = store.row(planned([0, 1], store), denominator=1.0, average="sample")
        assert row.segment_lengths == (3, 1)
        assert row.cu_seqlens.tolist() == [0, 3, 4, 4, 4, 4, 4, 4, 4]

    def test_an_empty_row_is_padding_only(self, store):
        row = store.row(PlannedRow(np.empty(0, dtype=np.int64), 0, 5), denominator=3.0, average="sample")
        assert row.tokens.tolist() == [[store._tokens[0]] * 5]
        assert row.positions.tolist() == [[0] * 5]
        assert row.targets.tolist() == [IGNORE_INDEX] * 5
        assert row.weights.tolist() == [0.0] * 5
        assert [t.numel() for t in (row.trained_positions, row.position_tasks, row.position_segments)] == [
            0,
            0,
            0,
        ]
        assert (row.segment_lengths, row.samples, row.real_tokens) == ((5,), (), 0)
        assert row.cu_seqlens.tolist() == [0, 5, 5, 5, 5, 5, 5, 5, 5]

    def test_a_sample_without_targets_contributes_exactly_nothing(self, store):
        row = store.row(planned([3], store), denominator=0.0, average="sample")
        assert row.weights.tolist() == [0.0, 0.0]
        assert row.trained_positions.tolist() == []

    @pytest.mark.parametrize("average", ["sample", "token"])
    def test_a_denominator_of_zero_gives_no_weight_and_no_nan(self, store, average):
        assert (
            store.row(planned([0, 1], store), denominator=0.0, average=average).weights.tolist() == [0.0] * 4
        )

    def test_a_sample_twice_in_a_row_is_two_segments(self, store):
        row = store.row(planned([1, 1], store), denominator=2.0, average="sample")
        assert (row.samples, row.position_segments.tolist(), row.positions.tolist()) == (
            (1, 1),
            [0, 1],
            [[0, 0]],
        )

    def test_an_unknown_average_is_refused(self, store):
        with pytest.raises(ValueError, match=r"average: is not known, expected sample or token, got mean"):
            store.row(planned([0], store), denominator=1.0, average="mean")

    def test_rows_do_not_share_memory(self, store):
        first = store.row(planned([0], store), denominator=1.0, average="sample")
        kept = first.tokens.clone()
        store.row(planned([1], store), denominator=1.0, average="sample").tokens.fill_(99)
        first_again = store.row(planned([0], store), denominator=1.0, average="sample")
        assert first.tokens.equal(kept)
        assert first_again.tokens.equal(kept)


@st.composite
def stores_and_rows(draw):
    samples = []
    for _ in range(draw(st.integers(1, 12))):
        n = draw(st.integers(2, 40))
        trained = [False, *draw(st.lists(st.booleans(), min_size=n - 1, max_size=n - 1))]
        ids = draw(st.lists(st.integers(0, 2**31 - 1), min_size=n, max_size=n))
        samples.append(
            Sample(
                ids,
                trained,
                task=draw(st.sampled_from("abc")),
                weight=draw(st.sampled_from([0.0, 0.5, 1.0, 3.0])),
            )
        )
    ids = draw(st.lists(st.integers(0, len(samples) - 1), max_size=10))
    return samples, ids, draw(st.integers(0, 20))


class TestAgainstPlainPython:
    @settings(deadline=None)
    @given(stores_and_rows(), st.sampled_from(["sample", "token"]), st.booleans())
    def test_every_field(self, case, average, on_device):
        samples, ids, padding = case
        store = TokenStore(samples, "cpu")
        if on_device:
            resident(store)
        slots = sum(samples[i].positions for i in ids) + padding
        padding += slots == 0
        slots = max(slots, 1)
        row = store.row(planned(ids, store, slots=slots), denominator=7.0, average=average, scale=3.0)

        tokens, positions, targets, weights, trained_positions, tasks, segments, borders = (
            [],
            [],
            [],
            [],
            [],
            [],
            [],
            [0],
        )
        for s, i in enumerate(ids):
            sample = samples[i]
            for p in range(sample.positions):
                if sample.trained[p + 1]:
                    trained_positions.append(len(tokens))
                    tasks.append(store.index.task_names.index(sample.task))
                    segments.append(s)
                    per_sample = sample.weight / 7.0 * 3.0
                    weights.append(per_sample / sample.num_trained if average == "sample" else per_sample)
                    targets.append(sample.ids[p + 1])
                else:
                    weights.append(0.0)
                    targets.append(IGNORE_INDEX)
                tokens.append(sample.ids[p])
                positions.append(p)
            borders.append(len(tokens))
        lengths = [samples[i].positions for i in ids] + [padding] * (padding > 0)
        assert row.tokens.tolist() == [tokens + [samples[0].ids[0]] * padding]
        assert row.positions.tolist() == [positions + [0] * padding]
        assert row.targets.tolist() == targets + [IGNORE_INDEX] * padding
        assert row.weights.tolist() == np.float32(weights + [0.0] * padding).tolist()
        assert row.trained_positions.tolist() == trained_positions
        assert row.position_tasks.tolist() == tasks
        assert row.position_segments.tolist() == segments
        assert row.segment_lengths == tuple(lengths)
        assert sum(row.segment_lengths) == slots
        cu = row.cu_seqlens.tolist()
        assert cu[: len(borders)] == borders
        assert set(cu[len(borders) :]) <= {slots}
        assert cu[-1] == slots
        assert len(cu) % 8 == 1
        assert row.max_seqlen >= max(lengths)
        assert row.samples == tuple(ids)


class TestFewShapes:
    def test_max_seqlen_takes_few_values_and_bounds_the_longest_segment(self):
        samples = [Sample([1] * (n + 1), [False] + [True] * n) for n in range(1, 1200)]
        store = TokenStore(samples, "cpu")
        bounds = {}
        for i in range(0, len(samples), 7):
            row = store.row(planned([i], store), denominator=1.0, average="sample")
            assert row.max_seqlen >= i + 1
            bounds[row.max_seqlen] = bounds.get(row.max_seqlen, 0) + 1
        assert set(bounds) == {128, 256, 512, 1024, 2048}

    @pytest.mark.parametrize("ids", [[], [0]])
    def test_max_seqlen_bounds_the_padding_too(self, ids):
        store = TokenStore(SAMPLES, "cpu")
        row = store.row(planned(ids, store, slots=700), denominator=1.0, average="sample")
        assert row.max_seqlen == 1024

    def test_shapes_as_they_were_planned(self, store):
        made = PlannedRow(np.array([2, 0]), 5, 8, segments=4, max_seqlen=6)
        row = store.row(made, denominator=1.0, average="sample")
        assert row.cu_seqlens.tolist() == [0, 2, 5, 8, 8]
        assert row.max_seqlen == 6
        full = PlannedRow(np.array([2, 0]), 5, 5, segments=2, max_seqlen=3)
        assert store.row(full, denominator=1.0, average="sample").cu_seqlens.tolist() == [0, 2, 5]
        nothing = PlannedRow(np.array([], dtype=np.int64), 0, 8, segments=3, max_seqlen=8)
        assert store.row(nothing, denominator=1.0, average="sample").cu_seqlens.tolist() == [0, 8, 8, 8]

    @pytest.mark.parametrize(("slots", "segments", "bound"), [(8, 2, 6), (8, 4, 2), (5, 1, 3), (9, 4, 3)])
    def test_a_row_that_is_not_of_its_shapes_is_an_error(self, slots, segments, bound, store):
        made = PlannedRow(np.array([2, 0]), 5, slots, segments=segments, max_seqlen=bound)
        with pytest.raises(ValueError, match=r"row: has .* segments"):
            store.row(made, denominator=1.0, average="sample")

    def test_cu_seqlens_takes_few_lengths(self):
        store = TokenStore([Sample([1, 2], [False, True])], "cpu")
        lengths = {
            store.row(planned([0] * n, store, slots=64), denominator=1.0, average="sample").cu_seqlens.numel()
            for n in range(1, 64)
        }
        assert lengths == {9, 17, 25, 33, 41, 49, 57, 65}


class TestTiers:
    def test_on_the_cpu_there_is_one_memory(self):
        store = TokenStore(SAMPLES, "cpu", device_limit_bytes=0)
        assert (store.tier, store.notes) == ("host", [])

    def test_nbytes_counts_tokens_and_targets(self, store):
        assert store.nbytes == 8 * (3 + 1 + 2 + 2)

    def test_past_the_limit_the_tokens_stay_on_the_host(self):
        """`meta` stands for an accelerator: no memory, but another device than the CPU."""
        bytes_needed = TokenStore(SAMPLES, "cpu").nbytes
        assert TokenStore(SAMPLES, "meta", device_limit_bytes=bytes_needed).tier == "device"
        assert TokenStore(SAMPLES, "meta", device_limit_bytes=bytes_needed - 1).tier == "host"
        row = TokenStore(SAMPLES, "meta", device_limit_bytes=0).row(
            PlannedRow(np.array([0]), 3, 4), denominator=1.0, average="sample"
        )
        assert row.tokens.device.type == "meta"

    def test_pinning_refused_is_noted_and_rows_are_the_same(self, monkeypatch):
        store = TokenStore(SAMPLES, "cpu")
        store.device = torch.device("cuda")
        empty = torch.empty

        def refuse(*size, pin_memory=False, **options):
            if pin_memory:
                raise RuntimeError("cannot pin\nCompile with …")
            return empty(*size, **options)

        monkeypatch.setattr(torch, "empty", refuse)
        assert store._can_pin() is False
        (note,) = store.notes
        expected = "rows are copied from plain memory, and each may wait for the device"
        assert note == f"pinned host memory was refused (cannot pin): {expected}"

    def test_a_row_costs_one_copy_and_two_gathers_and_no_host_read(self):
        store = TokenStore(SAMPLES, "meta")
        seen = []

        class Record(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                seen.append(str(func.overloadpacket).removeprefix("aten."))
                return func(*args, **(kwargs or {}))

        with Record():
            store.row(PlannedRow(np.array([0, 2]), 5, 8), denominator=1.0, average="sample")
        moving = [
            name for name in seen if name not in ("empty", "slice", "view", "unsqueeze", "detach", "alias")
        ]
        assert moving == ["_to_copy", "index_select", "_to_copy", "index_select", "_to_copy"]


class TestBadSamples:
    @pytest.mark.parametrize(
        ("sample", "wrong"),
        [
            (
                Sample([1], [False], source="y:3"),
                "y:3: has no position to train, expected at least 2 tokens, got 1",
            ),
            (Sample([], [], source="y:3"), "y:3: has no position to train"),
            (
                Sample([1, 2], [False], source="y:3"),
                "y:3: has unequal ids and trained, expected 2 flags, got 1",
            ),
            (Sample([1, 2], [True, True], source="y:3"), "y:3: trains its first token"),
            (
                Sample([1, -2], [False, True], source="y:3"),
                "y:3: has an impossible token id, expected 0 … 2³¹-1, got -2",
            ),
            (Sample([2**31, 2], [False, True], source="y:3"), "y:3: has an impossible token id"),
            (Sample([1, 2], [False, True], weight=float("nan"), source="y:3"), "y:3: has no usable weight"),
            (Sample([1, 2], [False, True], weight=-1.0, source="y:3"), "y:3: has no usable weight"),
            (Sample([1, 2], [False, True], weight=float("inf")), "sample 1: has no usable weight"),
        ],
    )
    def test_the_source_and_the_fault_are_named(self, sample, wrong):
        with pytest.raises(DataError) as caught:
            TokenStore([SAMPLES[0], sample], "cpu")
        assert str(caught.value).startswith(wrong)

    def test_no_samples(self):
        with pytest.raises(DataError, match="data: has no samples"):
            TokenStore([], "cpu")

    def test_an_unknown_task(self):
        with pytest.raises(DataError, match=r"x\.jsonl:2: has an unknown task, expected b, c, got a"):
            TokenStore(SAMPLES, "cpu", task_names=["b", "c"])

    def test_a_token_past_the_vocabulary_names_its_sample(self):
        store = TokenStore(SAMPLES, "cpu")
        store.check_vocabulary(16)
        with pytest.raises(
            DataError, match="sample 2: has a token id past the vocabulary, expected below 12, got 12"
        ):
            store.check_vocabulary(12)

    def test_a_target_past_the_vocabulary_counts_though_it_is_never_an_input(self):
        with pytest.raises(DataError, match=r"x\.jsonl:2: has a token id past"):
            TokenStore([SAMPLES[0], SAMPLES[1]], "cpu").check_vocabulary(10)


class TestWithThePlan:
    @pytest.mark.parametrize("ranks", [1, 2, 3])
    def test_all_rows_of_an_epoch_hold_every_trained_token_once(self, ranks):
        samples = [
            Sample(list(range(n + 1)), [False] * 2 + [True] * (n - 1), task=str(n % 3)) for n in range(2, 40)
        ]
        store = TokenStore(samples, "cpu")
        plan = Plan(store.index, seed=0, row_tokens=64, bucket_tokens=16, ranks=ranks)
        trained = np.zeros(len(samples), dtype=int)
        for update in plan.epoch(0, 0):
            for planned_row in (row for rows in update.ranks for row in rows):
                row = store.row(planned_row, denominator=update.denominator, average="sample")
                assert row.tokens.shape == (1, planned_row.padded_tokens)
                np.add.at(trained, np.array(row.samples, dtype=int)[row.position_segments.numpy()], 1)
        assert trained.tolist() == store.index.trained.tolist()
