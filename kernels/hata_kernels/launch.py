"""What the kernels share: popcount, luck, and the checks of their launchers."""
# mypy: allow-untyped-defs

from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hata_kernels.reference import FAR_LUCK, GOLDEN, MIX_1, MIX_2, MOST_LUCK, OCTAVES_A_ROOT, RANK_PARTS

# Triton's interpreter runs the kernels on a CPU (TRITON_INTERPRET=1, read when Triton is imported). It has no
# inline assembly.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))

STEP, MULTIPLY_1, MULTIPLY_2 = tl.constexpr(GOLDEN), tl.constexpr(MIX_1), tl.constexpr(MIX_2)
PARTS, PART_BITS = tl.constexpr(RANK_PARTS), tl.constexpr(RANK_PARTS.bit_length() - 1)
A_ROOT = tl.constexpr(OCTAVES_A_ROOT)  # `reference.octaves` divides a root by this
assert (MOST_LUCK, FAR_LUCK) == (8, 8 + 8 // 2)  # `luck_word` adds half of the bit that only the most luck has

MOVE = tl.constexpr("mov.b32 $0, $1;")
BYTE = tl.constexpr("prmt.b32 $0, $1, 0, $2;")  # one of a word, with zeros above

# 1.5 * 2^23: adding it to |y| < 2^22 rounds y half to even and leaves the integer in the low mantissa bits.
ROUND_MAGIC = tl.constexpr(12582912.0)
ROUND_MAGIC_BITS = tl.constexpr(0x4B400000)

INDEX_DTYPES = (torch.int32, torch.int64)
FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
KV_DTYPES = (torch.bfloat16, torch.float16)
FLOAT8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


@triton.jit
def popcount(x):
    """Set bits of each int32."""
    if INTERPRETED:
        x = x - ((x >> 1) & 0x55555555)
        x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
        x = (x + (x >> 4)) & 0x0F0F0F0F
        return (x * 0x01010101) >> 24
    else:
        return tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def rounded(x):
    """float32 below 2^22 -> int32, half to even. If ``x`` is an exact product, or none, the bits are the same whether
    or not this becomes a fused multiply-add."""
    return (x + ROUND_MAGIC).to(tl.int32, bitcast=True) - ROUND_MAGIC_BITS


@triton.jit
def mix(x):
    """`reference.mix` of uint32."""
    x ^= x >> 16
    x *= MULTIPLY_1
    x ^= x >> 13
    x *= MULTIPLY_2
    return x ^ (x >> 16)


@triton.jit
def luck_seed(length, layer):
    """What all tokens of a context have in common."""
    return mix(length.to(tl.uint32) * STEP + layer.to(tl.uint32))


@triton.jit
def luck_word(b_group, seed):
    """`reference.luck` of groups of four tokens, a byte each: four at once, by arithmetic on the bytes of a word."""
    b_word = mix(seed + b_group.to(tl.uint32) * STEP)
    b_flipped = b_word ^ 0xFFFFFFFF
    b_less_one = ((b_word | 0x80808080) - 0x01010101) ^ (b_flipped & 0x80808080)
    b_ones = b_less_one & b_flipped  # as many as zeros at the end
    b_ones -= (b_ones >> 1) & 0x55555555
    b_ones = (b_ones & 0x33333333) + ((b_ones >> 2) & 0x33333333)
    b_zeros = (b_ones + (b_ones >> 4)) & 0x0F0F0F0F
    return (b_zeros + ((b_zeros & 0x08080808) >> 1)).to(tl.int32, bitcast=True)


@triton.jit
def luck_of(b_word, o_token):
    """The luck of tokens, from the word of their group."""
    if INTERPRETED:
        return (b_word >> ((o_token & 3) * 8)) & 15
    else:
        b_selector = o_token & 3 | 0x4440
        return tl.inline_asm_elementwise(BYTE, "=r,r,r", [b_word, b_selector], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def squares(b_planes, P: tl.constexpr):
    """What each word of a code adds to the sum of its query's squared weights."""
    b_squares = tl.zeros_like(b_planes[0])
    for i_p in tl.static_range(P):
        for i_q in tl.static_range(i_p + 1):
            b_squares += popcount(b_planes[i_p] & b_planes[i_q]) << (i_p + i_q + (i_p != i_q))
    return b_squares


@triton.jit
def octave_of(b_squares):
    """`reference.octaves` of sums of squared weights. The root need not be exact: what it comes to is checked."""
    b_octave = (tl.sqrt(b_squares.to(tl.float32)) * (PARTS / A_ROOT) + 0.5).to(tl.int32)
    b_most = 4 * PARTS * PARTS * b_squares
    b_odd = 2 * b_octave - 1
    b_octave -= ((b_octave > 0) & (b_odd * b_odd * (A_ROOT * A_ROOT) > b_most)).to(tl.int32)
    b_odd = 2 * b_octave + 1
    b_octave += (b_odd * b_odd * (A_ROOT * A_ROOT) <= b_most).to(tl.int32)
    return tl.maximum(b_octave, PARTS)


@triton.jit
def gain(b_luck, b_octave):
    """`reference.gain`."""
    return (b_luck * b_octave + PARTS // 2) >> PART_BITS


@triton.jit
def wait_for_previous(PDL: tl.constexpr, NEXT: tl.constexpr = True):
    """Waits until the launch before this one has ended, then lets the next one begin to start, if it may.

    With programmatic dependent launch (Hopper and later) the programs of a launch are on their multiprocessors before
    the one ahead of it has ended, so that only this wait is between them. What they read before it must be older than
    the launch ahead. Every program waits, also one without work: the launch after it relies on that.

    Programs that start early take what room there is beside those ahead of them, and stay there. Many small ones must
    not do so beside few large ones: they would crowd on the multiprocessors that have none.
    """
    if PDL:
        gdc_wait()
        if NEXT:
            gdc_launch_dependents()


@triton.jit
def here(b_x):
    """``b_x``, computed or waited for where this stands. A compiler puts work where its result is needed, and lets
    what is loaded go to shared memory at once: both can be the worse place."""
    if INTERPRETED:
        return b_x
    elif b_x.dtype == tl.int8:
        return tl.inline_asm_elementwise(MOVE, "=r,r", [b_x], dtype=tl.int8, is_pure=False, pack=4)
    else:
        return tl.inline_asm_elementwise(MOVE, "=r,r", [b_x], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def dot(b_a, b_b):
    """Matrix product with float32 sums."""
    if INTERPRETED:  # which takes the bits of bf16 for integers
        return tl.dot(b_a.to(tl.float32), b_b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(b_a, b_b)


def check_tensor(
    name: str,
    tensor: Tensor,
    shape: Sequence[int | None],
    dtypes: torch.dtype | Sequence[torch.dtype],
    device: torch.device,
    *,
    contiguous: bool = True,
) -> None:
    """Raise ValueError unless ``tensor`` is what a kernel will take it for.

    Args:
        shape: the expected sizes; None for any.
        contiguous: False where only the last dimension must be.
    """
    wanted = (dtypes,) if isinstance(dtypes, torch.dtype) else dtypes
    if tensor.dtype not in wanted:
        raise ValueError(f"{name}: dtype {tensor.dtype}, expected one of {[str(d) for d in wanted]}")
    if len(tensor.shape) != len(shape) or any(
        want is not None and size != want for size, want in zip(tensor.shape, shape, strict=True)
    ):
        expected = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name}: shape {tuple(tensor.shape)}, expected ({expected})")
    if tensor.device != device:
        raise ValueError(f"{name}: on {tensor.device}, expected {device}")
    if contiguous and not tensor.is_contiguous():
        raise ValueError(f"{name}: strides {tensor.stride()}, expected a contiguous tensor")
    if not contiguous and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name}: last dimension has stride {tensor.stride(-1)}, expected 1")


def aligned(x: Tensor) -> Tensor:
    """``x`` [N, heads, D], copied if its rows do not all start on 16-element boundaries.

    For correctness, not for speed. Without that alignment Triton 3.6 spreads a row over the warps of a program one
    element at a time, and the hash kernels, compiled so for sm_90, return wrong codes; the cause was not found. What
    models produce, slices of a fused qkv among it, is aligned and is read in place.
    """
    if x.data_ptr() % 16 == 0 and all(stride % 16 == 0 for stride in x.stride()[:-1]):
        return x
    return x.contiguous()


@cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 for the interpreter."""
    if device.type == "cpu":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def overlaps_launches(device: torch.device) -> bool:
    """Whether a GPU has programmatic dependent launch."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@cache
def spreads_early(device: torch.device) -> bool:
    """Whether few large programs can begin early and yet be spread evenly: where a program may have more than half of a
    multiprocessor's shared memory, 228 KB, one that does has it to itself."""
    if not overlaps_launches(device):
        return False
    return torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor >= 200 * 1024
