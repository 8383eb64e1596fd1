"""Single values as YAML and people write them: numbers, sizes and words."""

import pytest

from repsft_fast.config import values


@pytest.mark.parametrize(
    ("read", "given", "value"),
    [
        (values.as_number, " 1e-5 ", "1e-5"),
        (values.as_whole, "5.12e4", 51_200),
        (values.as_whole, "5.125e0", "5.125e0"),
        (values.as_whole, "1e400", "1e400"),
        (values.as_size, "2GiB", "2GiB"),
        (values.as_size, 0, 0),
        (values.as_word, "off", "off"),
    ],
)
def test_what_is_meant_is_read(read, given, value):
    assert read(given) == value


@pytest.mark.parametrize(
    ("read", "given", "said"),
    [
        (values.as_number, True, "a number, not true or false"),
        (values.as_size, 0.5, "a whole number of bytes"),
        (values.as_size, -1, "a whole number of bytes"),
        (values.as_size, "2026-11-21", "a whole number of bytes"),
        (values.as_word, False, "text, not false .YAML reads bare yes"),
        (values.as_word, b"off", "not bytes"),
    ],
)
def test_what_is_not_is_refused(read, given, said):
    with pytest.raises(ValueError, match=said):
        read(given)
