"""Figures as people read them."""

import pytest

from repsft_fast.report.format import count, duration, number, percent, rows_of, size


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.2134, "0.213"), (12.34, "12.3"), (123.4, "123"), (0.0, "0.00"), (1.8e-5, "1.8e-05"), (2.5e7, "2.5e+07"), (None, "–"),
        (float("nan"), "nan"), (float("inf"), "inf"), (-0.5, "-0.500"), (0.00123, "0.001"),
        (99999, "99999"), (100000.0, "1.0e+05"),
    ],
)  # fmt: skip
def test_number(value, text):
    assert number(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.943, "94.3 %"),
        (0.99999, "99.9 %"),
        (1.0, "100.0 %"),
        (1 - 1e-12, "99.9 %"),
        (0.0, "0.0 %"),
        (None, "–"),
        (float("nan"), "–"),
    ],
)
def test_percent_reaches_100_only_when_nothing_is_left(value, text):
    assert percent(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1204, "1,204"),
        (9999, "9,999"),
        (61234, "61.2k"),
        (612_345, "612k"),
        (3_200_000, "3.2M"),
        (8.03e9, "8.0B"),
        (None, "–"),
    ],
)
def test_count(value, text):
    assert count(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (2048, "2 KiB"),
        (512 * 2**20, "512 MiB"),
        (23.1 * 2**30, "23.1 GiB"),
        (None, "–"),
    ],
)
def test_size(value, text):
    assert size(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (4.2, "4.2 s"), (9.96, "10.0 s"), (59.7, "1:00"), (192, "3:12"), (3753, "1:02:33"), (3599.6, "1:00:00"),
     (270_600, "3 d 03:10"), (None, "–"), (float("inf"), "–")],
)  # fmt: skip
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_rows_of_files_are_counted_to_the_last():
    assert rows_of({"a.jsonl": 1, "b.jsonl": 1204}) == "a.jsonl (1 row), b.jsonl (1,204 rows)"
    assert (
        rows_of({f"{n}.jsonl": n for n in range(10)}, most=2)
        == "0.jsonl (0 rows), 1.jsonl (1 row), and 8 more (44 rows)"
    )
    assert (
        rows_of({"/a/very/long/way/to/a/file/that/somebody/keeps/train.jsonl": 2}) == "train.jsonl (2 rows)"
    )
    assert (
        rows_of({f"/cache/chain_sum_{'size=60_' * 9}seed=12.jsonl": 2})
        == "chain_sum_size=60_size=60_size=…60_seed=12.jsonl (2 rows)"
    )
