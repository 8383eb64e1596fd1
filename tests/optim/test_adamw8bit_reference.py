"""The codes of 8-bit AdamW's moments, its random bits and its rounding to bf16: what the bytes mean,
exactly."""

import hashlib
import math
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from repsft_fast.optim import adamw8bit_reference as reference

BLOCK = reference.BLOCK


def spread(blocks: int, octaves: float = 3.0, seed: int = 0) -> torch.Tensor:
    """Values whose sizes differ as moments do: log-normal, both signs."""
    generator = torch.Generator().manual_seed(seed)
    shape = (blocks, BLOCK)
    return torch.randn(shape, generator=generator) * torch.exp2(
        torch.randn(shape, generator=generator) * octaves
    )


# The codes ------------------------------------------------------------------------------------------------


def draw(update: int, like: torch.Tensor) -> torch.Tensor:
    key = reference.update_key((1, 2), torch.tensor(update))
    return reference.random_bits(key, 0, like.numel()).view_as(like)


@pytest.mark.parametrize("scale", [0, 1, 111, 238])
def test_stored_bytes_mean_what_the_table_says(scale):
    """Checkpoints hold these bytes: their meaning, in Python's floats, may not move. At scale 111 the top
    octave is 1."""
    codes = torch.arange(256, dtype=torch.uint8)[None]
    scales = torch.tensor([scale], dtype=torch.uint8)
    first = [
        (-1) ** (c >> 7) * (1 + (c & 7) / 8) * 2.0 ** ((c >> 3 & 15) + scale - 126) if c & 127 else 0.0
        for c in range(256)
    ]
    second = [(1 + (c & 15) / 16) * 2.0 ** ((c >> 4) + scale - 126) for c in range(256)]
    assert reference.decode_first(codes, scales)[0].tolist() == first
    assert reference.decode_second(codes, scales)[0].tolist() == second


# times a power of two: the largest value of an octave that a code holds
LAST = {"first": 1.875, "second": 1.9375}


@pytest.mark.parametrize("which", LAST)
@pytest.mark.parametrize("exponent", [-126, -111, -110, -1, 0, 126])
@pytest.mark.parametrize("fraction", [1.0, 1.5, None])
def test_the_scale_is_the_largest_octave_of_a_block(which, exponent, fraction):
    """Whatever the draw, where a code holds the largest value; the least scale is that of a block of
    zeros."""
    encode = getattr(reference, f"encode_{which}")
    m = torch.zeros(3, BLOCK)
    m[1, 7] = m[2] = (fraction or LAST[which]) * 2.0**exponent
    octave = max(exponent + 127 - 16, 0)
    for word in (0, -1):
        codes, scales = encode(m, torch.full((3, BLOCK), word, dtype=torch.int32))
        assert codes.dtype == scales.dtype == torch.uint8
        assert scales.tolist() == [0, octave, octave]


def test_scales_are_one_byte_per_block_of_a_row():
    assert reference.scale_shape((3, 7, 512)) == (3, 7, 2)
    assert reference.scale_shape((16, 256)) == (16, 1)


@pytest.mark.parametrize("exponent", [-80, -20, 0, 30, 120])
@pytest.mark.parametrize("update", range(5))
def test_every_code_survives_a_round_trip_whatever_the_random_bits(exponent, update):
    codes = torch.arange(256, dtype=torch.uint8).repeat(2, 1)
    scale = torch.full((2,), exponent + 127 - 16, dtype=torch.uint8)
    for encode, decode in (
        (reference.encode_first, reference.decode_first),
        (reference.encode_second, reference.decode_second),
    ):
        again, scale_again = encode(decode(codes, scale), draw(update, codes))
        assert torch.equal(again, codes)
        assert torch.equal(scale_again, scale)


@pytest.mark.parametrize("which", ["first", "second"])
def test_codes_are_unbiased_neighbours_of_the_value(which):
    """Every draw is one of the two codes around the value (the exact neighbours), and the mean is the
    value."""
    first = which == "first"
    encode, decode = (getattr(reference, f"{verb}_{which}") for verb in ("encode", "decode"))
    value = spread(8) if first else spread(8).abs()
    mantissa = 3 if first else 4
    total = torch.zeros(8, BLOCK, dtype=torch.float64)
    trials = 2000
    covered = value.abs() > value.abs().amax(dim=1, keepdim=True) * 2.0**-14
    step = torch.exp2(torch.floor(torch.log2(value.abs())) - mantissa)
    for update in range(trials):
        codes, scale = encode(value, draw(update, value))
        decoded = decode(codes, scale)
        assert ((decoded - value).abs() < step)[covered].all()
        assert first or (decoded > 0).all()
        total += decoded
    error = ((total / trials - value) / step)[covered]
    assert error.abs().max() < 6 * 0.5 / math.sqrt(trials)
    assert error.mean().abs() < 5 * 0.5 / math.sqrt(trials * covered.sum())


def test_small_values_of_the_first_moment_are_unbiased_down_to_zero():
    # below the least code, 1.125 · 2^-15, zero is the neighbour
    value = torch.full((1, BLOCK), 2.0**-15 * 1.03)
    value[0, 0] = 1.0
    mean = (
        sum(
            reference.decode_first(*reference.encode_first(value, draw(u, value))).double()
            for u in range(400)
        )
        / 400
    )
    # The step there is from 0 to 1.125 · 2^-15; the code's ramp between them is linear in the float's bits,
    # over one step of mantissa only, so the bias is bounded by the least code and not zero: assert the bound.
    assert (mean[0, 1:] <= 1.125 * 2.0**-15).all()
    # and not lost: about a quarter of the draws round up, 0.24 · 1.125 expected
    assert mean[0, 1:].mean() > 0.1 * 2.0**-15


def test_a_block_of_equal_values_can_grow_past_a_power_of_two():
    root = torch.full((1, BLOCK), 1.99)
    seen = {
        reference.decode_second(*reference.encode_second(root, draw(u, root))).max().item() for u in range(50)
    }
    assert seen == {1.9375, 2.0} or seen == {2.0}
    m = -root
    seen = {reference.decode_first(*reference.encode_first(m, draw(u, m))).min().item() for u in range(50)}
    assert seen == {-2.0, -1.875} or seen == {-2.0}


def test_zero_blocks_stay_zero_and_do_not_divide_by_zero():
    zero = torch.zeros(2, BLOCK)
    ones = torch.full((2, BLOCK), -1, dtype=torch.int32)
    assert not reference.decode_first(*reference.encode_first(zero, ones)).any()
    assert not reference.decode_second(*reference.encode_second(zero, ones)).square().any()
    fresh = torch.zeros(2, BLOCK, dtype=torch.uint8), torch.zeros(2, dtype=torch.uint8)
    assert not reference.decode_first(*fresh).any()
    assert not reference.decode_second(*fresh).square().any()


@pytest.mark.parametrize("exponent", [-149, -127, -120, -115, -111])
def test_values_near_the_end_of_fp32_fade_to_zero_and_never_change_sign(exponent):
    m = torch.ldexp(spread(2, octaves=1.0), torch.tensor(exponent))
    decoded = reference.decode_first(*reference.encode_first(m, draw(1, m)))
    assert (decoded * m.sign() >= 0).all()
    assert (decoded.abs() <= m.abs() * 1.125 + 2.0**-124).all()
    root = reference.decode_second(*reference.encode_second(m.abs(), draw(1, m)))
    assert (root >= 0).all()
    assert (root <= m.abs() * 1.0625 + 2.0**-124).all()


@pytest.mark.parametrize("bits", [0x7F800000, 0x7FC00000, 0x7FFFFFFF, 0x7F800001, -0x400000, -1])
def test_a_poisoned_moment_stays_visible(bits):
    """Infinity, and NaNs of either sign: a CPU's own NaN is negative, a GPU's has all bits set."""
    m = torch.ones(1, BLOCK)
    m.view(torch.int32)[0, 3] = bits
    for update in range(5):
        assert not reference.decode_first(*reference.encode_first(m, draw(update, m)))[0, 3].isfinite()
        assert not reference.decode_second(*reference.encode_second(m, draw(update, m)))[0, 3].isfinite()


# The random bits ------------------------------------------------------------------------------------------


def mix_by_hand(x: int) -> int:
    x ^= x >> 16
    x = x * 0x21F0AAAD % 2**32
    x ^= x >> 15
    x = x * 0xD35A2D97 % 2**32
    return x ^ (x >> 15)


@given(
    key=st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)),
    step=st.integers(0, 2**33),
    first=st.integers(0, 2**39),
)
@settings(max_examples=50, deadline=None)
def test_random_bits_are_the_formula_in_python_integers(key, step, first):
    count = (step * 0x9E3779B9) % 2**32
    k0, k1 = mix_by_hand(count ^ key[0]), mix_by_hand((count + key[1]) % 2**32)
    bits = reference.random_bits(reference.update_key(key, torch.tensor(step)), first, 300)
    for i in (0, 1, 255, 256, 299):
        e = first + i
        block = mix_by_hand(((e >> 8) & 0xFFFFFFFF) ^ k0)
        assert bits[i].item() % 2**32 == mix_by_hand(((block + (e & 0xFF) * 0x9E3779B9) % 2**32) ^ k1)


def test_random_bits_look_random():
    """Bit means, lag correlations and a chi-square of bytes: within 5 standard deviations, over keys and
    updates."""
    n = 1 << 16
    for update in (1, 2, 1000):
        bits = reference.random_bits(
            reference.update_key(reference.parameter_key(0, "w"), torch.tensor(update)), 0, n
        )
        words = bits.numpy().view(np.uint32)
        for bit in range(32):
            assert abs(((words >> bit) & 1).mean() - 0.5) < 5 * 0.5 / math.sqrt(n)
        uniform = words / 2.0**32 - 0.5
        for lag in (1, 2, 255, 256, 257):
            assert abs((uniform[:-lag] * uniform[lag:]).mean()) < 5 / 12 / math.sqrt(n)
        for shift in (0, 8, 16, 24):
            counts = np.bincount((words >> shift) & 0xFF, minlength=256)
            chi = ((counts - n / 256) ** 2 / (n / 256)).sum()
            assert abs(chi - 255) < 5 * math.sqrt(2 * 255)


def test_the_three_roundings_of_an_element_are_independent():
    """Weight, m and √v take their remainders from one word; that one goes up says nothing of another, to 5
    deviations."""
    n = 1 << 18
    word = reference.random_bits(reference.update_key((11, 12), torch.tensor(3)), 0, n)

    def goes_up(fraction: float) -> tuple[torch.Tensor, ...]:
        """[n] bool each: whether 1 and this fraction of the next step was rounded up."""
        between = [torch.full((n,), 1 + fraction * 2.0**-bits).view(-1, BLOCK) for bits in (7, 3, 4)]
        rounded = (
            reference.round_to_bf16(between[0].view(-1), word),
            reference.decode_first(*reference.encode_first(between[1], word.view(-1, BLOCK))).view(-1),
            reference.decode_second(*reference.encode_second(between[2], word.view(-1, BLOCK))).view(-1),
        )
        return tuple(value > 1 for value in rounded)

    for one in (0.1, 0.5, 0.9):
        for other in (0.1, 0.5, 0.9):
            for a, b in ((0, 1), (0, 2), (1, 2)):
                both = (goes_up(one)[a] & goes_up(other)[b]).double().mean().item()
                assert abs(both - one * other) < 5 * math.sqrt(one * other / n)


def test_bits_are_32_bit_words():
    """Not only equal modulo 2^32: on a GPU 64-bit words would be another hash's time."""
    key = reference.update_key((2**32 - 1, 2**31), torch.tensor(2**40 + 1))
    assert [part.dtype for part in key] == [torch.int32] * 2
    bits = reference.random_bits(key, 255, 2)
    assert bits.dtype == torch.int32
    assert bits.shape == (2,)


def test_a_parameters_key_is_the_digest_of_its_seed_and_name():
    """Two 32-bit words; a resumed run must find the same ones, so they are pinned. Seed and name cannot run
    together."""
    digest = hashlib.sha256(b"12\x00model.w").digest()
    assert reference.parameter_key(12, "model.w") == struct.unpack("<2I", digest[:8])
    assert reference.parameter_key(1, "2w") != reference.parameter_key(12, "w")


def test_bits_differ_between_seeds_parameters_and_updates():
    def bits(seed, name, update):
        return reference.random_bits(
            reference.update_key(reference.parameter_key(seed, name), torch.tensor(update)), 0, 4096
        )

    base = bits(0, "w", 1)
    for other in (bits(1, "w", 1), bits(0, "v", 1), bits(0, "w", 2)):
        assert (base == other).sum() < 3


# Rounding to bf16 -----------------------------------------------------------------------------------------


def test_bf16_rounding_is_unbiased_between_its_two_neighbours():
    value = torch.tensor([1.001, -1.001, 3.14159, 1e-20, -7.7e30]).repeat_interleave(20_000)
    random = reference.random_bits(reference.update_key((3, 4), torch.tensor(9)), 0, value.numel())
    rounded = reference.round_to_bf16(value, random).double().view(5, -1)
    exact = value.double().view(5, -1)
    step = torch.exp2(torch.floor(torch.log2(exact.abs())) - 7)
    assert ((rounded - exact).abs() < step).all()
    standard_error = 0.5 / math.sqrt(20_000)
    assert (((rounded - exact) / step).mean(dim=1).abs() < 5 * standard_error).all()


def test_bf16_rounding_keeps_what_is_exact_or_not_a_number():
    value = torch.tensor([0.0, -0.0, 1.0, -2.5, float("inf"), float("-inf")])
    ones = torch.full((6,), -1, dtype=torch.int32)
    assert torch.equal(reference.round_to_bf16(value, ones), value.to(torch.bfloat16))
    nans = torch.tensor([0x7F800001, 0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    assert reference.round_to_bf16(nans, ones[:3]).isnan().all()


def test_bf16_rounding_adds_the_upper_half_of_the_word():
    """Between 1 and the next bf16 there are 2^16 fp32 numbers; the k-th goes up for the k largest of 2^16
    words."""
    k = torch.tensor([0, 1, 0x8000, 0xFFFF], dtype=torch.int32)
    value = (k + 0x3F800000).view(torch.float32)
    for word, up in (
        (0x0000FFFF, [0, 0, 0, 0]),
        (0x00010000, [0, 0, 0, 1]),
        (0x7FFFFFFF, [0, 0, 0, 1]),
        (-1, [0, 1, 1, 1]),
    ):
        rounded = reference.round_to_bf16(value, torch.full((4,), word, dtype=torch.int32))
        assert ((rounded.double() - 1) * 2**7).tolist() == up


# What stochastic rounding is for --------------------------------------------------------------------------


def test_a_constant_gradient_is_followed_where_nearest_rounding_stops_short():
    m = nearest = torch.zeros(32, BLOCK)
    half = torch.full((32, BLOCK), 1, dtype=torch.int32) << 19
    for update in range(200):
        m = 0.9 * m + 0.1
        m = reference.decode_first(*reference.encode_first(m, draw(update, m)))
        nearest = 0.9 * nearest + 0.1
        magnitude = (nearest.view(torch.int32) + half) >> 20 << 20  # the same mantissa, rounded to nearest
        nearest = magnitude.view(torch.float32)
    # standard error: 0.06 a draw, about 20 draws' memory over 8,192 weights
    assert abs(m.mean().item() - 1.0) < 0.01
    assert nearest.mean() < 0.8


def second_moment_after_a_fall(encode):
    """√v relative to fp32's, for half of each block's weights whose gradients fell to a tenth 2,000 updates
    ago."""
    torch.manual_seed(0)
    size = torch.ones(8, BLOCK)
    exact = torch.zeros(8, BLOCK)
    v = exact.clone()
    for update in range(3000):
        if update == 1000:
            size[:, ::2] = 0.1
        g = torch.randn(8, BLOCK) * size
        exact = 0.999 * exact + 0.001 * g * g
        v = encode((0.999 * v + 0.001 * g * g).sqrt(), update).square()
    return (v.sqrt() / exact.sqrt())[:, ::2].median().item()


def test_the_second_moment_follows_a_fall_where_nearest_rounding_sticks():
    def ours(root, update):
        key = reference.update_key((5, 6), torch.tensor(update))
        random = reference.random_bits(key, 0, root.numel()).view_as(root)
        return reference.decode_second(*reference.encode_second(root, random))

    def nearest(root, update):
        half = torch.full_like(root, 1 << 18, dtype=torch.int32)
        return reference.decode_second(*reference.encode_second(root, half))

    assert 0.9 < second_moment_after_a_fall(ours) < 1.1
    assert second_moment_after_a_fall(nearest) > 1.5
