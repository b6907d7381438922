"""Score: distances of all cached keys to each group of queries, as ranks, and how many tokens have each rank.

Specification: `reference.distances` and `reference.rank`. Ranks are small integers, so the cut that selection needs is
found by counting, with no sort. Counts of integers do not depend on the order of the additions.

A program takes shares of consecutive tokens (`plan.plan_step`) and all KV heads, as a token's codes for all heads lie
side by side (128 bytes with 8 heads of 128 bits): it reads whole cache lines wherever SGLang put the slots, and reads
the slot table once. Counts are kept in shared memory: counting 8 million tokens by atomics on global memory takes
longer than reading their codes.
"""
# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from hata_kernels.launch import INTERPRETED, check_tensor, overlaps_launches, popcount, wait_for_previous
from hata_kernels.workspace import PIECE, DecodeWorkspace

# How many loads of codes are on their way at a time.
STAGES = 3
# Words between the counts of two heads beyond their own: equal ranks of neighbouring heads lie in different banks.
SKEW = 4
# Triton has no shared memory that a program can index. These four lines of PTX are such an array: its address, and
# storing, adding to and loading its elements. They are side effects, so they stay in order with the barriers.
ARRAY = "{{ .shared .align 16 .b32 hata_histogram[{}]; mov.u32 $0, hata_histogram; }}"
STORE = tl.constexpr("st.shared.b32 [$1], $2; mov.b32 $0, 0;")
ADD = tl.constexpr("red.shared.add.u32 [$1], $2; mov.b32 $0, 0;")
LOAD = tl.constexpr("ld.shared.b32 $0, [$1];")


@triton.jit
def shared_array(DECLARATION: tl.constexpr):
    """Address of an array of int32 in shared memory; `ARRAY` with its size is the declaration."""
    return tl.inline_asm_elementwise(DECLARATION, "=r,r", [tl.program_id(0)], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def shared_zero(address):
    tl.inline_asm_elementwise(STORE, "=r,r,r", [address, address * 0], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def shared_add(address, b_x):
    """Adds each element once if no thread holds another's copy: tiles of 128 elements and more, reduced over an axis
    that lies within a thread. The tests count."""
    tl.inline_asm_elementwise(ADD, "=r,r,r", [address, b_x], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def shared_load(address):
    return tl.inline_asm_elementwise(LOAD, "=r,r", [address], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit(do_not_specialize=["sink", "recent"])
def score_kernel(
    planes,
    code_cache,
    slot_table,
    shares,
    ranks,
    histogram,
    share_counts,
    table_stride,
    rank_stride,
    sink,
    recent,
    H: tl.constexpr,
    HB: tl.constexpr,
    P: tl.constexpr,
    W: tl.constexpr,
    WV: tl.constexpr,
    BT: tl.constexpr,
    BINS: tl.constexpr,
    PIECE: tl.constexpr,
    SHARED: tl.constexpr,
    STRIDE: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """WV words, 16 bytes where a code has as many, are loaded at once by a thread, which then holds all of them: the
    sum over a code's words stays within a thread."""
    i_share = tl.program_id(0)
    i_hb = tl.program_id(1)
    i_b = tl.load(shares + i_share * PIECE).to(tl.int64)
    if i_b < 0:
        wait_for_previous(PDL)
        return
    i_row = tl.load(shares + i_share * PIECE + 1).to(tl.int64)
    start = tl.multiple_of(tl.load(shares + i_share * PIECE + 2), 16)
    end = tl.load(shares + i_share * PIECE + 3)
    length = tl.load(shares + i_share * PIECE + 4)

    o_c = tl.arange(0, HB * WV)
    o_column = i_hb * HB + o_c // WV
    m_c = o_column < H
    o_word = o_column * W + o_c % WV
    o_h = i_hb * HB + tl.arange(0, HB)
    m_h = o_h < H
    o_bin = tl.arange(0, BINS)
    b_count = tl.zeros([HB, BINS], tl.int32)
    if INTERPRETED:
        p_shared = 0
    else:
        p_shared = shared_array(SHARED)
        shared_zero(p_shared + (tl.arange(0, HB)[:, None] * STRIDE + o_bin[None, :]) * 4)
        tl.debug_barrier()

    wait_for_previous(PDL)
    p_slot = slot_table + i_row * table_stride
    p_plane = planes + i_b * (H * (1 + P) * W) + o_column * ((1 + P) * W) + o_c % WV
    p_rank = ranks + (i_b * H + o_h) * rank_stride
    for i_t in tl.range(start, end, BT, num_stages=STAGES):
        o_t = i_t + tl.arange(0, BT)
        m_t = o_t < end
        b_slot = tl.load(p_slot + o_t, mask=m_t, other=0).to(tl.int64)
        b_distance = tl.zeros([BT, HB], tl.int32)
        for i_v in tl.static_range(W // WV):
            p_code = code_cache + b_slot[:, None] * (H * W) + (o_word + i_v * WV)[None, :]
            b_code = tl.load(p_code, mask=m_t[:, None] & m_c[None, :], other=0)
            b_differs = b_code ^ tl.load(p_plane + i_v * WV, mask=m_c, other=0)[None, :]
            b_bits = tl.zeros([BT, HB * WV], tl.int32)
            for i_p in tl.static_range(P):
                b_plane = tl.load(p_plane + (1 + i_p) * W + i_v * WV, mask=m_c, other=0)
                b_bits += popcount(b_differs & b_plane[None, :]) << i_p
            b_distance += tl.sum(tl.reshape(b_bits, [BT, HB, WV]), axis=2)
        m_kept = (o_t < sink) | (o_t >= length - recent)
        b_rank = tl.where(m_kept[:, None], 0, tl.minimum(b_distance + 1, BINS - 2))
        # Whole blocks, so that stores are wide: beyond a request's last token goes the rank of no token.
        p_out = p_rank[None, :] + o_t[:, None]
        b_stored = tl.where(m_t[:, None], b_rank, BINS - 1).to(ranks.dtype.element_ty)
        tl.store(p_out, b_stored, mask=m_h[None, :] & (o_t >= 0)[:, None])
        m = m_t[:, None] & m_h[None, :]
        if INTERPRETED:
            b_one = (b_rank[:, :, None] == o_bin[None, None, :]) & m[:, :, None]
            b_count += tl.sum(b_one.to(tl.int32), axis=0)
        else:
            shared_add(p_shared + (tl.arange(0, HB)[None, :] * STRIDE + b_rank) * 4, m.to(tl.int32))

    if not INTERPRETED:
        tl.debug_barrier()
        b_count = shared_load(p_shared + (tl.arange(0, HB)[:, None] * STRIDE + o_bin[None, :]) * 4)
    p_bin = histogram + ((i_b * H + o_h) * BINS)[:, None] + o_bin[None, :]
    tl.atomic_add(p_bin, b_count, mask=m_h[:, None] & (b_count > 0), sem="relaxed")
    p_up_to = share_counts + ((i_share * H + o_h).to(tl.int64) * BINS)[:, None] + o_bin[None, :]
    tl.store(p_up_to, tl.cumsum(b_count, axis=1).to(tl.int16), mask=m_h[:, None])


def score_and_count(
    code_cache: Tensor,
    slot_table: Tensor,
    workspace: DecodeWorkspace,
    batch: int,
    *,
    sink: int,
    recent: int,
) -> None:
    """Ranks of every cached token of each request that selects, and how many tokens have each rank.

    Args:
        code_cache: [S, H, W] int32, contiguous, 16-byte aligned.
        slot_table: [requests, max_context] int32, rows contiguous: the slot of each position.
        workspace: planned for ``batch`` requests, with the planes of this layer's queries and a histogram of zeros.
            Gets ``ranks`` (whole blocks; beyond a request's length the rank of no token), ``histogram`` and
            ``share_counts``; a request that keeps all its tokens gets none.
        sink, recent: the first and the last tokens that are always kept (at least the last one is).

    Raises:
        ValueError: on a shape, stride, dtype or device that the kernel would misread.
    """
    device, grid = workspace.device, workspace.grid
    _, H, planes, W = workspace.planes.shape
    check_tensor("code_cache", code_cache, (None, H, W), torch.int32, device)
    check_tensor("slot_table", slot_table, (None, None), torch.int32, device, contiguous=False)
    if sink < 0 or recent < 0:
        raise ValueError(f"sink {sink} and recent {recent} must not be negative")
    if batch == 0:
        return
    HB, bins = grid.head_block, workspace.bins
    score_kernel[(workspace.pieces(batch)[0], triton.cdiv(H, HB))](
        workspace.planes,
        code_cache,
        slot_table,
        workspace.shares,
        workspace.ranks,
        workspace.histogram,
        workspace.share_counts,
        slot_table.stride(0),
        workspace.ranks.stride(1),
        sink,
        max(recent, 1),
        H=H,
        HB=HB,
        P=planes - 1,
        W=W,
        WV=min(W, 4),
        BT=grid.share_block,
        BINS=bins,
        PIECE=PIECE,
        SHARED=ARRAY.format(HB * (bins + SKEW)),
        STRIDE=bins + SKEW,
        STAGES=STAGES,
        PDL=overlaps_launches(device),
        launch_pdl=overlaps_launches(device),
        num_warps=4,
    )
