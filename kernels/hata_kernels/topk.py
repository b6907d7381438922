"""Select: the slots of the k lowest ranks of each (request, KV head), in order of position.

Specification: `reference.select_positions`. Two launches over (request and head, split):

    count    threshold from the histogram; how many ranks of each split lie below it, and how many on it
    compact  prefix sums of those counts give each split its place; selected slots are written in order

Tokens below the threshold are all kept; of those on it, the earliest, as many as are still wanted.
"""
# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from hata_kernels.launch import INDEX_DTYPES, check_tensor, share_of, splits_of

# Ranks a program reads at a time: 16 bytes for each of 128 threads. Below 2^15, for the packed prefix sum.
BLOCK = 1024


@triton.jit
def count_kernel(
    ranks,
    histogram,
    k_lens,
    seq_lens,
    thresholds,
    counts,
    rank_stride,
    bins,
    H: tl.constexpr,
    BINS: tl.constexpr,
    BT: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    i_s = tl.program_id(1)
    n_s = tl.num_programs(1)
    length = tl.load(seq_lens + i_row // H).to(tl.int32)
    k = tl.load(k_lens + i_row // H).to(tl.int32)
    if k >= length:
        return

    # Every program finds the threshold itself: a launch of its own would take longer than a row of the
    # histogram.
    o_bin = tl.arange(0, BINS)
    b_count = tl.load(histogram + i_row * bins + o_bin, mask=o_bin < bins, other=0)
    threshold = tl.sum((tl.cumsum(b_count, axis=0) < k).to(tl.int32), axis=0)
    below = tl.sum(tl.where(o_bin < threshold, b_count, 0), axis=0)
    if i_s == 0:
        tl.store(thresholds + i_row * 2, threshold)
        tl.store(thresholds + i_row * 2 + 1, k - below)

    start, end = share_of(length, i_s, n_s, BT)
    b_less = tl.zeros([BT], tl.int32)
    b_tie = tl.zeros([BT], tl.int32)
    for i_t in range(start, end, BT):
        o_t = i_t + tl.arange(0, BT)
        m_t = o_t < end
        b_rank = tl.load(ranks + i_row * rank_stride + o_t, mask=m_t, other=32767).to(tl.int32)
        b_less += (m_t & (b_rank < threshold)).to(tl.int32)
        b_tie += (m_t & (b_rank == threshold)).to(tl.int32)
    p_count = counts + (i_row * n_s + i_s) * 2
    tl.store(p_count, tl.sum(b_less, axis=0))
    tl.store(p_count + 1, tl.sum(b_tie, axis=0))


@triton.jit
def compact_kernel(
    ranks,
    thresholds,
    counts,
    k_lens,
    indptr,
    seq_lens,
    slot_table,
    req_rows,
    out_indices,
    table_stride,
    rank_stride,
    H: tl.constexpr,
    BS: tl.constexpr,
    BT: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    i_s = tl.program_id(1)
    n_s = tl.num_programs(1)
    i_b = i_row // H
    i_h = (i_row % H).to(tl.int32)
    length = tl.load(seq_lens + i_b).to(tl.int32)
    k = tl.load(k_lens + i_b).to(tl.int32)
    p_slot = slot_table + tl.load(req_rows + i_b).to(tl.int64) * table_stride
    p_out = out_indices + tl.load(indptr + i_row).to(tl.int64)
    start, end = share_of(length, i_s, n_s, BT)

    if k >= length:
        for i_t in range(start, end, BT):
            o_t = i_t + tl.arange(0, BT)
            b_slot = tl.load(p_slot + o_t, mask=o_t < end, other=0)
            tl.store(p_out + o_t, b_slot * H + i_h, mask=o_t < end)
    else:
        threshold = tl.load(thresholds + i_row * 2)
        wanted = tl.load(thresholds + i_row * 2 + 1)
        o_s = tl.arange(0, BS)
        p_count = counts + (i_row * n_s + o_s) * 2
        less = tl.sum(tl.load(p_count, mask=o_s < i_s, other=0), axis=0)
        tie = tl.sum(tl.load(p_count + 1, mask=o_s < i_s, other=0), axis=0)
        own_less = tl.load(counts + (i_row * n_s + i_s) * 2)
        if (own_less == 0) & (tie >= wanted):
            # Most splits of a long request end up here: nothing in them is selected.
            end = start
        for i_t in range(start, end, BT):
            o_t = i_t + tl.arange(0, BT)
            m_t = o_t < end
            b_rank = tl.load(ranks + i_row * rank_stride + o_t, mask=m_t, other=32767).to(tl.int32)
            b_less = (m_t & (b_rank < threshold)).to(tl.int32)
            b_tie = (m_t & (b_rank == threshold)).to(tl.int32)
            # Both prefix sums in one scan: ranks below the threshold in the low half, on it in the high half.
            b_both = b_less + (b_tie << 16)
            b_before = tl.cumsum(b_both, axis=0) - b_both
            b_less_before = less + (b_before & 0xFFFF)
            b_tie_before = tie + (b_before >> 16)
            m_out = (b_less > 0) | ((b_tie > 0) & (b_tie_before < wanted))
            b_slot = tl.load(p_slot + o_t, mask=m_out, other=0)
            o_out = b_less_before + tl.minimum(b_tie_before, wanted)
            tl.store(p_out + o_out, b_slot * H + i_h, mask=m_out)
            less += tl.sum(b_less, axis=0)
            tie += tl.sum(b_tie, axis=0)


def selection_splits(B: int, H: int, longest: int, device: torch.device) -> int:
    """Programs for each (request, KV head), which `select_slots` needs to size ``counts``."""
    return splits_of(B * H, longest, BLOCK, device)


def select_slots(
    ranks: Tensor,
    histogram: Tensor,
    k_lens: Tensor,
    indptr: Tensor,
    seq_lens: Tensor,
    slot_table: Tensor,
    req_rows: Tensor,
    out_indices: Tensor,
    *,
    thresholds: Tensor,
    counts: Tensor,
) -> None:
    """Rows of the [S * H] view of the KV pool that each (request, KV head) attends to.

    ``out_indices[indptr[b * H + h] + i]`` becomes ``slot * H + h`` for the i-th selected position of request
    b and KV head h, in order of position.

    Args:
        ranks, histogram: what `score.score_and_count` wrote: [B, H, stride] int16 and [B, H, bins] int32. Not
            read for a request with k_lens == seq_lens, which keeps everything.
        k_lens: [B] int32 or int64: tokens to keep, 1 <= k_lens <= seq_lens.
        indptr: [at least B * H + 1] int32, contiguous: indptr[i + 1] - indptr[i] is k_lens of row i's
            request.
        seq_lens, slot_table, req_rows: as for `score.score_and_count`.
        out_indices: [at least indptr[B * H]] int32, contiguous.
        thresholds, counts: scratch, int32, contiguous: at least B * H * 2 elements, and B * H * 2 times
            `selection_splits`.

    Raises:
        ValueError: on a shape, stride, dtype or device that the kernels would misread.
    """
    device = ranks.device
    check_tensor("ranks", ranks, (None, None, None), torch.int16, device)
    B, H, longest = ranks.shape
    check_tensor("histogram", histogram, (B, H, None), torch.int32, device)
    check_tensor("k_lens", k_lens, (B,), INDEX_DTYPES, device)
    check_tensor("seq_lens", seq_lens, (B,), INDEX_DTYPES, device)
    check_tensor("req_rows", req_rows, (B,), INDEX_DTYPES, device)
    check_tensor("slot_table", slot_table, (None, None), torch.int32, device, contiguous=False)
    check_tensor("indptr", indptr, (None,), torch.int32, device)
    check_tensor("out_indices", out_indices, (None,), torch.int32, device)
    if B == 0:
        return
    splits = selection_splits(B, H, longest, device)
    check_tensor("thresholds", thresholds, (None,), torch.int32, device)
    check_tensor("counts", counts, (None,), torch.int32, device)
    for name, buffer, size in (
        ("indptr", indptr, B * H + 1),
        ("thresholds", thresholds, B * H * 2),
        ("counts", counts, B * H * splits * 2),
    ):
        if buffer.numel() < size:
            raise ValueError(f"{name}: {buffer.numel()} elements, expected at least {size}")

    grid = (B * H, splits)
    count_kernel[grid](
        ranks,
        histogram,
        k_lens,
        seq_lens,
        thresholds,
        counts,
        longest,
        histogram.shape[2],
        H=H,
        BINS=triton.next_power_of_2(histogram.shape[2]),
        BT=BLOCK,
        num_warps=4,
    )
    compact_kernel[grid](
        ranks,
        thresholds,
        counts,
        k_lens,
        indptr,
        seq_lens,
        slot_table,
        req_rows,
        out_indices,
        slot_table.stride(0),
        longest,
        H=H,
        BS=triton.next_power_of_2(splits),
        BT=BLOCK,
        num_warps=4,
    )
