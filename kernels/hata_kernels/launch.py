"""What the kernel launchers share: argument checks, how work is split over a GPU, and popcount."""
# mypy: allow-untyped-defs

from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

# Triton's interpreter runs the kernels on a CPU (TRITON_INTERPRET=1, read when Triton is imported). It has no
# inline assembly.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))

INDEX_DTYPES = (torch.int32, torch.int64)
FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
KV_DTYPES = (torch.bfloat16, torch.float16)

# Programs a kernel aims at for each multiprocessor: enough that all stay busy to the end, few enough that
# each has a few blocks of work.
PROGRAMS_PER_MULTIPROCESSOR = 4


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
def share_of(length, i_split, n_splits, BLOCK: tl.constexpr):
    """First and one-past-last position of a split's share of ``length`` tokens, in whole blocks.

    The score kernel and the selection kernels split a request by the same rule, but not into equally many
    parts: no result depends on the number of splits.
    """
    share = tl.cdiv(tl.cdiv(length, n_splits), BLOCK) * BLOCK
    start = tl.minimum(i_split * share, length)
    return start, tl.minimum(start + share, length)


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


def splits_of(rows: int, longest: int, block: int, device: torch.device) -> int:
    """Programs to give each of ``rows`` rows of at most ``longest`` tokens, read in blocks of ``block``.

    It depends on the batch size and the buffers alone, never on the lengths, which live on the device: a
    CUDA graph keeps its grid. Programs with nothing left to do exit after one load.
    """
    wanted = triton.cdiv(PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(device), rows)
    return max(1, min(wanted, triton.cdiv(longest, block)))
