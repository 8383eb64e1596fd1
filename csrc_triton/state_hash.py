"""A 64-bit checksum of device memory: the same number from a Triton kernel and from plain torch.

    h(x) = Σ_i mix(w_i + i·GOLDEN)  +  mix(nbytes ^ SALT)                     (mod 2^64)
    mix(w) = xorshift-multiply twice, a bijection of 64-bit words (after splitmix64, Steele, Lea, Flood 2014)

where w_i are the bytes of x as 64-bit words, the last one padded with zeros. The addition makes it parallel
and independent of the order of execution; the position inside `mix` makes it see permutations, which an XOR
(`torch.hash_tensor`) does not. Because `mix` is a bijection, a change inside one word always changes h; any
other change is missed with probability ~2^-64. It is a checksum against damage and bugs, no defence against
someone who forges it.

Cost: one read of the memory. int64 arithmetic wraps in torch and in Triton alike; shifts are made logical by
a mask.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl

    from csrc_triton.launch import AotCase
except ImportError:  # no Triton on this platform: the plain version serves
    triton = None

GOLDEN = -7046029254386353131  # 2^64 / golden ratio, odd, as int64
MULTIPLY_1 = -49064778989728563  # two odd constants with many bits set
MULTIPLY_2 = -4265267296055464877
SALT = 0x5EED_5EED_5EED_5EED
SHIFT_1, SHIFT_2 = 32, 29
# A little less than torch's grain of 32,768 elements, so that no operation is split over OpenMP threads:
# thousands of short ones mean as many barriers, and on a busy machine each waits for a core (591 MB took 9 s
# where it takes 0.3).
CHUNK_WORDS = (1 << 15) - 64
BLOCK_WORDS = 1024
MAX_PROGRAMS = 1056  # 8 per SM of a 132-SM GPU; each loops over its blocks
_kept = threading.local()


def wrap(value: int) -> int:
    """`value` mod 2^64 as a signed 64-bit integer, as int64 tensors hold it."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


def mix_int(word: int) -> int:
    """`mix` on one Python integer; the definition the two tensor versions are tested against."""
    word %= 1 << 64
    word = ((word ^ (word >> SHIFT_1)) * MULTIPLY_1) % (1 << 64)
    word = ((word ^ (word >> SHIFT_2)) * MULTIPLY_2) % (1 << 64)
    return wrap(word)


def _words(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """(whole 64-bit words [n] int64, the rest zero-padded to one word [0 or 1] int64) of the tensor's bytes,
    row-major."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if flat.data_ptr() % 8:
        flat = flat.clone()
    whole = flat.numel() // 8 * 8
    tail = torch.zeros(8 if flat.numel() > whole else 0, dtype=torch.uint8, device=flat.device)
    tail[: flat.numel() - whole] = flat[whole:]
    return flat[:whole].view(torch.int64), tail.view(torch.int64)


def _mix_(word: Tensor, scratch: Tensor) -> Tensor:
    for shift, multiply in ((SHIFT_1, MULTIPLY_1), (SHIFT_2, MULTIPLY_2)):
        torch.bitwise_right_shift(word, shift, out=scratch)
        word.bitwise_xor_(scratch.bitwise_and_((1 << (64 - shift)) - 1)).mul_(multiply)
    return word


def _buffers(size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(i·GOLDEN [size], two of scratch [size]) int64. Kept per thread on a CPU, where fresh memory means page
    faults."""
    if device.type != "cpu":
        steps = torch.arange(size, dtype=torch.int64, device=device).mul_(GOLDEN)
        return steps, torch.empty_like(steps), torch.empty_like(steps)
    if not hasattr(_kept, "buffers"):
        steps = torch.arange(CHUNK_WORDS, dtype=torch.int64).mul_(GOLDEN)
        _kept.buffers = (steps, torch.empty_like(steps), torch.empty_like(steps))
    steps, word, scratch = _kept.buffers
    return steps[:size], word[:size], scratch[:size]


def _sum_plain(words: Tensor, first: int = 0) -> Tensor:  # [n] int64 -> [] int64
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for start in range(0, words.numel(), CHUNK_WORDS):
        chunk = words[start : start + CHUNK_WORDS]
        steps, word, scratch = _buffers(chunk.numel(), words.device)
        torch.add(chunk, steps, out=word)
        if first + start:
            word.add_(torch.tensor(wrap((first + start) * GOLDEN)))
        total += _mix_(word, scratch).sum()
    return total


if triton is not None:

    @triton.jit(do_not_specialize=["blocks"])  # every tensor has another number of blocks: one kernel for all
    def _sum_kernel(
        words_ptr, partial_ptr, blocks,
        BLOCK: tl.constexpr, G: tl.constexpr, M1: tl.constexpr, M2: tl.constexpr,
        S1: tl.constexpr, S2: tl.constexpr,
    ):  # fmt: skip
        program = tl.program_id(0).to(tl.int64)
        lanes = tl.arange(0, BLOCK).to(tl.int64)
        total = tl.zeros([BLOCK], dtype=tl.int64)
        for block in range(program, blocks, tl.num_programs(0)):
            index = block * BLOCK + lanes
            word = tl.load(words_ptr + index) + index * G
            word = (word ^ ((word >> S1) & ((1 << (64 - S1)) - 1))) * M1
            total += (word ^ ((word >> S2) & ((1 << (64 - S2)) - 1))) * M2
        tl.store(partial_ptr + program, tl.sum(total, axis=0))

    AOT_CASES = [
        AotCase(
            name=f"state_hash/block{BLOCK_WORDS}",
            kernel=_sum_kernel,
            signature={"words_ptr": "*i64", "partial_ptr": "*i64", "blocks": "i32"},
            constexprs={
                "BLOCK": BLOCK_WORDS,
                "G": GOLDEN,
                "M1": MULTIPLY_1,
                "M2": MULTIPLY_2,
                "S1": SHIFT_1,
                "S2": SHIFT_2,
            },
            num_warps=4,
            divisible=("words_ptr", "partial_ptr"),
            store_bytes=8,  # one partial sum per program
        )
    ]


def _sum_triton(words: Tensor) -> Tensor:  # [n] int64 -> [] int64
    blocks = words.numel() // BLOCK_WORDS  # whole blocks only: a mask would cost the kernel its 16-byte loads
    programs = max(1, min(MAX_PROGRAMS, blocks))  # at least one, so that the partial sums are written
    partial = torch.empty(programs, dtype=torch.int64, device=words.device)
    _sum_kernel[(programs,)](
        words,
        partial,
        blocks,
        BLOCK=BLOCK_WORDS,
        G=GOLDEN,
        M1=MULTIPLY_1,
        M2=MULTIPLY_2,
        S1=SHIFT_1,
        S2=SHIFT_2,
    )
    return partial.sum() + _sum_plain(words[blocks * BLOCK_WORDS :], first=blocks * BLOCK_WORDS)


def checksum(tensor: Tensor, *, plain: bool = False) -> Tensor:
    """[] int64 on the tensor's device: of its bytes in row-major order, whatever its strides. No host sync.

    `plain` keeps to torch's own operations, as CPU tensors always do. Shape, dtype and name are not part of
    it.
    """
    words, tail = _words(tensor)
    fast = tensor.is_cuda and triton is not None and not plain
    if fast:
        with torch.cuda.device(words.device):
            total = _sum_triton(words)
    else:
        total = _sum_plain(words)
    if tail.numel():
        total = total + _sum_plain(tail, first=words.numel())
    return total + wrap(mix_int(tensor.numel() * tensor.element_size() ^ SALT))


def checksums(tensors: Sequence[Tensor]) -> list[int]:
    """Unsigned 64-bit checksums of many tensors, read by the host in one go per device."""
    sums = [checksum(t) for t in tensors]
    result = [0] * len(sums)
    for device in {s.device for s in sums}:
        places = [i for i, s in enumerate(sums) if s.device == device]
        for i, value in zip(places, torch.stack([sums[i] for i in places]).tolist()):
            result[i] = value % (1 << 64)
    return result
