"""Select: the slots of the k lowest ranks of each (request, KV head), in order of position.

Specification: `reference.select_positions` and `reference.doublings`. Tokens below the threshold are all kept; of those
on it, the earliest, as many as are still wanted. Every program finds the threshold for itself, in the counts of its
row, and adds up what earlier shares keep, so that none waits for a neighbour: two short loads take less time than a
launch between.

Few tokens are selected, and they lie anywhere. So a program first writes the positions of its selected tokens where
their slots will be, each by itself, and then replaces them, a warp's worth at a time.
"""
# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from hata_kernels.launch import (
    PARTS,
    check_tensor,
    gain,
    here,
    luck_of,
    luck_seed,
    luck_word,
    octave_of,
    overlaps_launches,
    popcount,
    spreads_early,
    squares,
    wait_for_previous,
)
from hata_kernels.reference import MOST_LUCK, SAMPLED
from hata_kernels.workspace import FEW_REQUESTS, PIECE, SLOT_BITS, DecodeWorkspace

# Earlier shares whose counts are loaded at a time.
EARLIER = 128
# A program is one warp, whose barriers cost little. Each lane has COLUMNS consecutive ranks, usually 16 bytes; their
# marks fill an int32: selected for sure in the low half, tied in the high half.
LANES, COLUMNS = 32, 16
BITS_OF_SLOT, MOST = tl.constexpr(SLOT_BITS), tl.constexpr(MOST_LUCK)


@triton.jit
def cut(
    histogram, share_counts, i_row, i_first, i_share, i_h, k, H: tl.constexpr, BINS: tl.constexpr, BE: tl.constexpr
):
    """Threshold of a row, how many tokens on it are wanted, and how many below it and on it earlier shares have."""
    o_bin = tl.arange(0, BINS)
    b_count = tl.load(histogram + i_row * BINS + o_bin)
    threshold = tl.sum((tl.cumsum(b_count, axis=0) < k).to(tl.int32), axis=0)
    wanted = k - tl.sum(tl.where(o_bin < threshold, b_count, 0), axis=0)
    # Shares have counted the tokens of each rank or a lower one.
    b_less = tl.zeros([BE], tl.int32)
    b_up_to = tl.zeros([BE], tl.int32)
    for i_s in range(i_first, i_share, BE):
        o_s = i_s + tl.arange(0, BE)
        p_count = share_counts + (o_s.to(tl.int64) * H + i_h) * BINS + threshold
        b_less += tl.load(p_count - 1, mask=(o_s < i_share) & (threshold > 0), other=0).to(tl.int32)
        b_up_to += tl.load(p_count, mask=o_s < i_share, other=0).to(tl.int32)
    less = tl.sum(b_less, axis=0)
    return threshold, wanted, less, tl.sum(b_up_to, axis=0) - less


@triton.jit
def compact_share(
    ranks,
    planes,
    shares,
    histogram,
    share_counts,
    slot_table,
    slots,
    i_share,
    i_h,
    table_stride,
    rank_stride,
    slot_stride,
    layer,
    H: tl.constexpr,
    P: tl.constexpr,
    W: tl.constexpr,
    BINS: tl.constexpr,
    BE: tl.constexpr,
    BL: tl.constexpr,
    BC: tl.constexpr,
    PIECE: tl.constexpr,
    DRAWS: tl.constexpr,
    NEXT: tl.constexpr,
    PDL: tl.constexpr,
):
    """Little is done for each token: one mark. Then every lane walks over its marks."""
    p_share = shares + i_share * PIECE
    # A piece without work is of request -1, and has nothing between its start and its end.
    i_b = tl.maximum(tl.load(p_share), 0).to(tl.int64)
    i_row = i_b * H + i_h
    k = tl.load(p_share + 7)
    p_table = slot_table + tl.load(p_share + 1).to(tl.int64) * table_stride
    start = tl.multiple_of(tl.load(p_share + 2), 16)
    end = tl.load(p_share + 3)
    i_first = tl.where(start < end, tl.load(p_share + 5), i_share)
    p_rank = ranks + i_row * rank_stride
    p_out = slots + i_row * slot_stride
    o_lane = tl.arange(0, BL) * BC
    o_c = tl.arange(0, BC)
    # Whole blocks of 16, so that loads are wide; beyond the last token scoring has left the rank of no token.
    rounded = tl.multiple_of(tl.cdiv(end, 16) * 16, 16)
    o_t = start + o_lane[:, None] + o_c[None, :]
    seed = luck_seed(tl.load(p_share + 4), layer)
    if DRAWS:
        p_plane = planes + i_row * (1 + P) * W + tl.arange(0, W)  # of the launch before the one ahead
        b_planes = ()  # type: tuple
        for i_p in tl.static_range(P):
            b_planes += (tl.load(p_plane + (1 + i_p) * W),)
    wait_for_previous(PDL, NEXT)
    b_next = tl.load(p_rank + o_t, mask=o_t < rounded, other=BINS - 1)
    if DRAWS:
        octave = here(octave_of(tl.sum(squares(b_planes, P), axis=0)))
        # Times this, over 2^24, is division by an octave, exactly: 13 octaves times an octave stay below 2^24.
        inverse = here((1 << 24) // octave + 1)
    threshold, wanted, less, tie = cut(histogram, share_counts, i_row, i_first, i_share, i_h, k, H, BINS, BE)
    first = less + tl.minimum(tie, wanted)
    for i_t in range(start, end, BL * BC):
        b_rank = b_next.to(tl.int32)
        o_t = i_t + BL * BC + o_lane[:, None] + o_c[None, :]
        b_next = tl.load(p_rank + o_t, mask=o_t < rounded, other=BINS - 1)
        b_mark = tl.where(b_rank < threshold, 1 << o_c[None, :], 0)
        b_mark = tl.sum(tl.where(b_rank == threshold, 65536 << o_c[None, :], b_mark), axis=1)
        # Both prefix sums in one scan.
        b_both = popcount(b_mark & 0xFFFF) + (popcount(b_mark & -65536) << 16)
        b_before = tl.cumsum(b_both, axis=0) - b_both
        b_less = less + (b_before & 0xFFFF)
        b_tie = tie + (b_before >> 16)
        both = tl.sum(b_both, axis=0)
        less += both & 0xFFFF
        tie += both >> 16
        b_left = (b_mark | (b_mark >> 16)) & 0xFFFF
        for _ in range(tl.max(popcount(b_left), axis=0)):
            b_lowest = b_left & -b_left
            b_left ^= b_lowest
            m_less = (b_mark & b_lowest) != 0
            m_tie = (b_lowest != 0) & ~m_less
            m_out = m_less | (m_tie & (b_tie < wanted))
            o_token = i_t + o_lane + popcount(b_lowest - 1)
            tl.store(p_out + b_less + tl.minimum(b_tie, wanted), o_token, mask=m_out)
            b_less += m_less.to(tl.int32)
            b_tie += m_tie.to(tl.int32)
    tl.debug_barrier()
    last = less + tl.minimum(tie, wanted)
    for i_out in range(first, last, BL):
        o_out = i_out + tl.arange(0, BL)
        m_out = o_out < last
        o_token = tl.load(p_out + o_out, mask=m_out, other=0)
        b_slot = tl.load(p_table + o_token, mask=m_out, other=0)
        if DRAWS:
            b_drawn = tl.load(p_rank + o_token, mask=m_out, other=0).to(tl.int32)
            b_luck = luck_of(luck_word(o_token >> 2, seed), o_token)
            b_missing = b_drawn + gain(b_luck, octave) - threshold
            b_needed = tl.maximum(b_missing * PARTS - PARTS // 2 + octave - 1, 0) * inverse >> 24
            b_slot |= tl.where(b_drawn > 1, tl.minimum(b_needed, MOST), 0) << BITS_OF_SLOT
        tl.store(p_out + o_out, b_slot, mask=m_out)


@triton.jit(do_not_specialize=["n_shares", "layer"])
def compact_kernel(
    ranks,
    planes,
    shares,
    histogram,
    share_counts,
    slot_table,
    slots,
    table_stride,
    rank_stride,
    slot_stride,
    layer,
    n_shares,
    H: tl.constexpr,
    P: tl.constexpr,
    W: tl.constexpr,
    STRIDE: tl.constexpr,
    BINS: tl.constexpr,
    BE: tl.constexpr,
    BL: tl.constexpr,
    BC: tl.constexpr,
    PIECE: tl.constexpr,
    DRAWS: tl.constexpr,
    NEXT: tl.constexpr,
    PDL: tl.constexpr,
):
    i_h = tl.program_id(0) % H
    for i_share in range(tl.program_id(0) // H, n_shares, STRIDE):
        compact_share(
            ranks,
            planes,
            shares,
            histogram,
            share_counts,
            slot_table,
            slots,
            i_share,
            i_h,
            table_stride,
            rank_stride,
            slot_stride,
            layer,
            H,
            P,
            W,
            BINS,
            BE,
            BL,
            BC,
            PIECE,
            DRAWS,
            NEXT,
            PDL,
        )


def select_slots(slot_table: Tensor, workspace: DecodeWorkspace, batch: int, layer: int = 0) -> None:
    """The slots that each (request, KV head) attends to, for the requests that select.

    Args:
        slot_table: [requests, max_context] int32, rows contiguous.
        workspace: planned for ``batch`` requests and scored.
            ``slots[b * H + h, i]`` becomes the slot of the i-th selected position of request b and KV head h, in order
            of position, for i below ``kept[b]``, its doublings from bit SLOT_BITS on. Rows of requests that keep
            everything stay as they were.
        layer: as it was scored.

    Raises:
        ValueError: on a shape, stride, dtype or device that the kernel would misread.
    """
    check_tensor("slot_table", slot_table, (None, None), torch.int32, workspace.device, contiguous=False)
    if batch == 0:
        return
    H = workspace.kv_heads
    overlap = overlaps_launches(workspace.device)
    n_shares, stride = workspace.pieces(batch)[0], workspace.grid.compact
    compact_kernel[(min(n_shares, stride) * H,)](
        workspace.ranks,
        workspace.planes,
        workspace.shares,
        workspace.histogram,
        workspace.share_counts,
        slot_table,
        workspace.slots,
        slot_table.stride(0),
        workspace.ranks.stride(1),
        workspace.max_kept,
        layer,
        n_shares,
        H=H,
        P=workspace.planes.shape[2] - 1,
        W=workspace.planes.shape[3],
        STRIDE=stride,
        BINS=workspace.bins,
        BE=EARLIER,
        BL=LANES,
        BC=COLUMNS,
        PIECE=PIECE,
        DRAWS=workspace.selection == SAMPLED,
        NEXT=batch > FEW_REQUESTS or spreads_early(workspace.device),
        PDL=overlap,
        launch_pdl=overlap,
        num_warps=1,
    )
