"""AdamW with 8-bit moments in plain torch: the truth of the Triton kernel's tests, and what runs on CPU.

Per element, with the gradient g already clipped, t updates done, and b1, b2 the betas:

    m ← b1·m + (1 − b1)·g            v ← b2·v + (1 − b2)·g²
    w ← w − lr·decay·w − lr / (1 − b1ᵗ) · m / (√v / √(1 − b2ᵗ) + eps)

The update uses m and v before they are coded again. Codes are small floats relative to a power of two per
block of 256 neighbours in one row, so coding is integer arithmetic on float bits: no table, no division, the
same on every device.

| moment | stored | code                                    | range in a block          |
|--------|--------|-----------------------------------------|---------------------------|
| m      | m      | sign, 4 bits exponent, 3 bits mantissa  | 2¹⁵, and zero             |
| v      | √v     | 4 bits exponent, 4 bits mantissa        | 2¹⁵ (2³⁰ of v), no zero   |

Both are rounded stochastically: up with the probability of the remainder, so the averages have no bias.
Nearest rounding, as with the dynamic code of Dettmers et al. 2022 (arXiv:2110.02861), sticks wherever an
update moves a moment by less than half a code step. m under a constant gradient stops at 0.75 of it; v moves
by 1 − b2 = 0.1 % an update and hardly falls at all when the gradients of some weights of a block shrink, as
those of memorised tokens do. And a code with a zero sends small v to 0 and its weight to m / eps; here the
least code is above zero. Tests show all three.

bf16 weights are rounded stochastically: plain rounding stalls once updates are below bf16's step of 2⁻⁸ of
the weight. Those that are copies of fp32 masters are not: nothing is lost in them. All random bits are a hash
of (seed, update, parameter, global element): a resumed or resharded run repeats them.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from repsft_fast.optim.adamw_reference import nearest_bf16

BLOCK = 256  # elements that share a scale; never across a row
MIN_ELEMENTS = 4096  # smaller tensors keep 32-bit moments: they are few bytes and often the most sensitive
_SPAN = 15  # octaves a block covers below its largest element
_LEAST = 1 + _SPAN  # scale bytes count from this exponent field, so that byte 0 is a block of zeros
_GOLDEN = 0x9E3779B9
_NAN = 0x7FC00000  # every NaN is treated as this one, so that adding to its bits cannot overflow
_CHUNK_BLOCKS = 256  # blocks worked on at once: 64 k elements, so that temporaries stay in the cache


def has_8bit_moments(shape: tuple[int, ...] | torch.Size) -> bool:
    """Whether a parameter of this *global* shape gets 8-bit moments. Independent of how it is split over
    ranks."""
    return len(shape) >= 2 and shape[-1] % BLOCK == 0 and math.prod(shape) >= MIN_ELEMENTS


def scale_shape(shape: tuple[int, ...] | torch.Size) -> tuple[int, ...]:
    """Shape of the scales of a parameter of `shape`: one byte per block of a row."""
    return (*shape[:-1], shape[-1] // BLOCK)


def parameter_key(seed: int, name: str) -> tuple[int, int]:
    """Two 32-bit words for (seed, parameter). By name, so that adding a parameter changes no other's bits."""
    digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def mix(x: Tensor) -> Tensor:
    """A 32-bit integer hash, element by element. x: int32, overflow wraps. Two multiply-xorshift rounds."""
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * 0x21F0AAAD
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * _signed(0xD35A2D97)
    return x ^ ((x >> 15) & 0x1FFFF)


def update_key(key: tuple[int, int], step: Tensor) -> tuple[Tensor, Tensor]:
    """The parameter's two words for one update. step: [] int64, the count after this update."""
    count = _wrap(step * _GOLDEN)
    return mix(count ^ _signed(key[0])), mix(count + _signed(key[1]))


def random_bits(key: tuple[Tensor, Tensor], first: int, count: int) -> Tensor:
    """[count] int32, 32 random bits for each of the global elements first … first + count - 1."""
    blocks = torch.arange(first >> 8, (first + count + 0xFF) >> 8, device=key[0].device)
    lanes = torch.arange(256, dtype=torch.int32, device=key[0].device) * _signed(_GOLDEN)
    bits = mix((mix(_wrap(blocks) ^ key[0])[:, None] + lanes) ^ key[1])
    return bits.view(-1)[first & 0xFF : (first & 0xFF) + count]


def encode_first(m: Tensor, random: Tensor) -> tuple[Tensor, Tensor]:
    """m: [B, 256] fp32; random: [B, 256] int32 → codes [B, 256] uint8, scales [B] uint8."""
    bits = m.view(torch.int32)
    magnitude = (bits & 0x7FFFFFFF).clamp(max=_NAN)
    top = _top(magnitude, 0xFFFFF)
    # A word of its own: the product's upper bits depend on all of `random`, and the weight and √v use other
    # bits of that.
    remainder = ((random * _signed(_GOLDEN)) >> 12) & 0xFFFFF
    code = ((magnitude + remainder) >> 20) - ((top - _SPAN) << 3)[:, None]
    code = code.clamp(0, 127) | ((bits >> 24) & 0x80)
    return code.to(torch.uint8), (top - _LEAST).to(torch.uint8)


def decode_first(code: Tensor, scale: Tensor) -> Tensor:
    """The inverse: [B, 256] fp32."""
    code = code.to(torch.int32)
    magnitude = code & 0x7F
    base = (scale.to(torch.int32) + (_LEAST - _SPAN)) << 3
    bits = torch.where(magnitude > 0, (magnitude + base[:, None]) << 20, 0)
    return (bits | ((code & 0x80) << 24)).view(torch.float32)


def encode_second(root: Tensor, random: Tensor) -> tuple[Tensor, Tensor]:
    """root: [B, 256] fp32, √v ≥ 0; random: [B, 256] int32 → codes [B, 256] uint8, scales [B] uint8."""
    # a CPU's own NaN, of ∞ − ∞ say, has its sign bit set
    magnitude = (root.view(torch.int32) & 0x7FFFFFFF).clamp(max=_NAN)
    top = _top(magnitude, 0x7FFFF)
    code = ((magnitude + (random & 0x7FFFF)) >> 19) - ((top - _SPAN) << 4)[:, None]
    return code.clamp(0, 255).to(torch.uint8), (top - _LEAST).to(torch.uint8)


def decode_second(code: Tensor, scale: Tensor) -> Tensor:
    """The inverse: [B, 256] fp32, √v."""
    base = (scale.to(torch.int32) + (_LEAST - _SPAN)) << 4
    return ((code.to(torch.int32) + base[:, None]) << 19).view(torch.float32)


def round_to_bf16(value: Tensor, random: Tensor) -> Tensor:
    """fp32 → bf16, up with the probability of the remainder. random: int32, its upper half is used. NaN and
    Inf stay."""
    # an infinity's lower half is zero: no draw carries into the half that is kept
    bits = value.view(torch.int32) + ((random >> 16) & 0xFFFF)
    bits = torch.where(value.isnan(), _NAN, bits)
    return (bits >> 16).to(torch.int16).view(torch.bfloat16)


@dataclass(frozen=True)
class Scalars:
    """What every element of an update shares. Tensors are [] fp32 on the device, never read by the host."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    inverse_correction1: Tensor  # 1 / (1 - beta1^t)
    inverse_correction2: Tensor  # 1 / √(1 - beta2^t)
    clip: Tensor  # multiplies the gradient
    veto: Tensor  # 0 or 1; 1 = nothing changes


def corrections(beta1: float, beta2: float, step: Tensor) -> tuple[Tensor, Tensor]:
    """1 / (1 - beta1^t) and 1 / √(1 - beta2^t), [] fp32. step: [] int64 ≥ 0; at 0 (a first update vetoed) any
    finite number."""
    count = step.clamp(min=1).double()
    first = -torch.expm1(count * math.log(beta1)) if beta1 > 0 else torch.ones_like(count)
    second = -torch.expm1(count * math.log(beta2)) if beta2 > 0 else torch.ones_like(count)
    return first.reciprocal().float(), second.rsqrt().float()


def update_(
    weight: Tensor,  # [n] fp32 | bf16, changed in place; n a multiple of 256 where moments have 8 bits
    grad: Tensor,  # [n] fp32 | bf16
    # flat, changed in place: exp_avg, exp_avg_sq [n], and their scales [n/256] where uint8
    moments: dict[str, Tensor],
    scalars: Scalars,
    key: tuple[Tensor, Tensor],  # update_key
    first_element: int,  # global index of weight[0]
    copy: Tensor
    | None = None,  # [n] bf16, changed in place: what an fp32 weight is rounded to, to the nearest
) -> None:
    """One parameter's (or shard's) update. Peak extra memory: temporaries of 64 k elements."""
    step = BLOCK * _CHUNK_BLOCKS
    for start in range(0, weight.numel(), step):
        elements, blocks = slice(start, start + step), slice(start // BLOCK, start // BLOCK + _CHUNK_BLOCKS)
        part = {name: t[blocks] if name.endswith("_scale") else t[elements] for name, t in moments.items()}
        copied = None if copy is None else copy[elements]
        _update_chunk(weight[elements], grad[elements], part, scalars, key, first_element + start, copied)


def _update_chunk(weight, grad, moments, s: Scalars, key, first: int, copy) -> None:
    # An fp32 weight with fp32 moments rounds nothing, so it draws nothing.
    eight_bit = moments["exp_avg"].dtype == torch.uint8
    seeded = eight_bit or weight.dtype == torch.bfloat16
    random = random_bits(key, first, weight.numel()) if seeded else weight.new_empty(0, dtype=torch.int32)
    if eight_bit:
        m = decode_first(moments["exp_avg"].view(-1, BLOCK), moments["exp_avg_scale"]).view(-1)
        root = decode_second(moments["exp_avg_sq"].view(-1, BLOCK), moments["exp_avg_sq_scale"])
        v = root.view(-1).square()
    else:
        m, v = moments["exp_avg"], moments["exp_avg_sq"]

    # Operation by operation as the kernel computes it: the bits must be the same.
    g = grad.float() * s.clip
    m = s.beta1 * m + (1 - s.beta1) * g
    v = s.beta2 * v + (1 - s.beta2) * (g * g)
    root = v.double().sqrt().float()  # correctly rounded; torch's fp32 sqrt on CPU can be one unit off
    w = weight.float()
    w = w - (s.lr * s.weight_decay) * w
    w = w - (s.lr * s.inverse_correction1) * (m / (root * s.inverse_correction2 + s.eps))
    if eight_bit:
        bits = random.view(-1, BLOCK)
        first_code, first_scale = encode_first(m.view(-1, BLOCK), bits)
        second_code, second_scale = encode_second(root.view(-1, BLOCK), bits)
        new = {"exp_avg": first_code, "exp_avg_scale": first_scale}
        new |= {"exp_avg_sq": second_code, "exp_avg_sq_scale": second_scale}
    else:
        new = {"exp_avg": m, "exp_avg_sq": v}

    # A vetoed update writes what is there already: asking whether it is vetoed would be a host read.
    rounded = round_to_bf16(w, random) if weight.dtype == torch.bfloat16 else w
    keep = s.veto != 0
    results = [(weight, rounded), *((moments[name], value.view(-1)) for name, value in new.items())]
    results += [] if copy is None else [(copy, nearest_bf16(w))]
    for old, value in results:
        old.copy_(torch.where(keep, old, value))


def _top(magnitude: Tensor, remainder: int) -> Tensor:
    """[B] int32, the largest exponent field a block's elements can be rounded up to, at least `_LEAST`.

    Without the rounding up, a block of equal values could never grow past a power of two.
    """
    return ((magnitude.amax(dim=1) + remainder) >> 23).clamp(min=_LEAST)


def _wrap(x: Tensor) -> Tensor:
    """The low 32 bits of int64 as int32."""
    x = x & 0xFFFFFFFF
    return torch.where(x >= 1 << 31, x - (1 << 32), x).to(torch.int32)


def _signed(word: int) -> int:
    """A 32-bit word as the int32 with the same bits."""
    return word - (1 << 32) if word >= 1 << 31 else word
