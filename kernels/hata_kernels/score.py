"""Score: Hamming distances summed over a GQA group (paper, Alg. 3), as ranks, and their histogram.

Specification: `reference.hamming_scores` and `reference.rank_scores`. Ranks are small integers, so the cut
    that selection
needs is found in a histogram, with no sort; counts of integers do not depend on the order of the atomics that
add them.
"""
# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from hata_kernels.launch import INDEX_DTYPES, check_tensor, popcount, share_of, splits_of
from hata_kernels.reference import WORD_BITS

# Code words a program holds at a time: 32 registers for each of 128 threads.
TILE_WORDS = 4096
MAX_BLOCK = 1024
# Ranks are stored in int16.
MAX_RANK = 2**15 - 1


@triton.jit(do_not_specialize=["sink", "recent"])
def score_and_count_kernel(
    q_codes,
    code_cache,
    slot_table,
    req_rows,
    seq_lens,
    k_lens,
    ranks,
    histogram,
    table_stride,
    rank_stride,
    bins,
    sink,
    recent,
    H: tl.constexpr,
    BH: tl.constexpr,
    G: tl.constexpr,
    W: tl.constexpr,
    BT: tl.constexpr,
    SKIP_WHOLE: tl.constexpr,
):
    """One program scores a share of one request's tokens for all KV heads.

    A token's codes for all heads are H * W * 4 consecutive bytes (128 with 8 heads of 128 bits), so a program
    that takes all heads reads whole cache lines wherever SGLang put the slots, and reads the slot table once.
    One program a head would fetch each 32-byte sector for 16 useful bytes and read the slot table H times.
    """
    i_b = tl.program_id(0).to(tl.int64)
    i_s = tl.program_id(1)
    length = tl.load(seq_lens + i_b).to(tl.int32)
    if SKIP_WHOLE:  # noqa: SIM102 (known at compile time)
        # Everything is kept: nobody will read the ranks.
        if tl.load(k_lens + i_b).to(tl.int32) >= length:
            return
    start, end = share_of(length, i_s, tl.num_programs(1), BT)
    p_slot = slot_table + tl.load(req_rows + i_b).to(tl.int64) * table_stride

    o_w = tl.arange(0, BH * W)
    m_w = o_w < H * W
    o_h = tl.arange(0, BH)
    m_h = o_h < H
    o_row = i_b * H + o_h
    p_q = q_codes + i_b * (H * G * W) + (o_w // W) * (G * W) + o_w % W
    for i_t in range(start, end, BT):
        o_t = i_t + tl.arange(0, BT)
        m_t = o_t < end
        b_slot = tl.load(p_slot + o_t, mask=m_t, other=0).to(tl.int64)
        p_k = code_cache + b_slot[:, None] * (H * W) + o_w[None, :]
        b_k = tl.load(p_k, mask=m_t[:, None] & m_w[None, :], other=0)
        b_bits = tl.zeros([BT, BH * W], tl.int32)
        for i_g in tl.static_range(G):
            b_q = tl.load(p_q + i_g * W, mask=m_w, other=0)
            b_bits += popcount(b_k ^ b_q[None, :])
        b_score = tl.sum(tl.reshape(b_bits, [BT, BH, W]), axis=2)

        m_kept = (o_t < sink) | (o_t >= length - recent)
        b_rank = tl.where(m_kept[:, None], 0, b_score + 1)
        m = m_t[:, None] & m_h[None, :]
        p_rank = ranks + (o_row * rank_stride)[None, :] + o_t[:, None]
        tl.store(p_rank, b_rank.to(tl.int16), mask=m)
        p_bin = histogram + (o_row * bins)[None, :] + b_rank
        tl.atomic_add(p_bin, tl.full([BT, BH], 1, tl.int32), mask=m, sem="relaxed")


def bins_of(group: int, bits: int) -> int:
    """Different ranks: 0 for tokens always kept, 1 + distance for the others."""
    return group * bits + 2


def score_and_count(
    q_codes: Tensor,
    code_cache: Tensor,
    slot_table: Tensor,
    req_rows: Tensor,
    seq_lens: Tensor,
    ranks: Tensor,
    histogram: Tensor,
    *,
    sink: int,
    recent: int,
    k_lens: Tensor | None = None,
) -> None:
    """Ranks of every cached token of every request, and how many tokens have each rank.

    Args:
        q_codes: [B, G * H, W] int32, contiguous.
        code_cache: [S, H, W] int32, contiguous.
        slot_table: [requests, max_context] int32, rows contiguous: the slot of each position.
        req_rows: [B] int32 or int64: the row of ``slot_table`` of each request.
        seq_lens: [B] int32 or int64: cached tokens, the current one included; at least 1, at most ``stride``.
        ranks: [B, H, stride] int16, contiguous. Written up to each request's length, untouched beyond it.
        histogram: [B, H, bins] int32, contiguous, zero on entry; bins >= G * bits + 2.
        sink, recent: the first and the last tokens that are always kept (at least the last one is).
        k_lens: [B] int32 or int64: when given, a request that keeps all its tokens is skipped, and its ranks
            and histogram stay as they were. `topk.select_slots` does not read them.

    Raises:
        ValueError: on a shape, stride, dtype or device that the kernel would misread.
    """
    device = q_codes.device
    check_tensor("code_cache", code_cache, (None, None, None), torch.int32, device)
    _, H, W = code_cache.shape
    check_tensor("q_codes", q_codes, (None, None, W), torch.int32, device)
    B, q_heads, _ = q_codes.shape
    if W not in (2, 4, 8) or q_heads == 0 or q_heads % H:
        raise ValueError(f"{q_heads} query heads over {H} KV heads, codes of {W} words: expected 2, 4 or 8")
    G = q_heads // H
    check_tensor("slot_table", slot_table, (None, None), torch.int32, device, contiguous=False)
    check_tensor("req_rows", req_rows, (B,), INDEX_DTYPES, device)
    check_tensor("seq_lens", seq_lens, (B,), INDEX_DTYPES, device)
    check_tensor("ranks", ranks, (B, H, None), torch.int16, device)
    check_tensor("histogram", histogram, (B, H, None), torch.int32, device)
    if k_lens is not None:
        check_tensor("k_lens", k_lens, (B,), INDEX_DTYPES, device)
    bins = bins_of(G, W * WORD_BITS)
    if histogram.shape[2] < bins or bins - 1 > MAX_RANK:
        raise ValueError(f"histogram: {histogram.shape[2]} bins for {bins} ranks, at most {MAX_RANK + 1}")
    if sink < 0 or recent < 0:
        raise ValueError(f"sink {sink} and recent {recent} must not be negative")
    if B == 0:
        return

    BH = triton.next_power_of_2(H)
    BT = max(1, min(MAX_BLOCK, TILE_WORDS // (BH * W)))
    score_and_count_kernel[(B, splits_of(B, ranks.shape[2], BT, device))](
        q_codes,
        code_cache,
        slot_table,
        req_rows,
        seq_lens,
        seq_lens if k_lens is None else k_lens,
        ranks,
        histogram,
        slot_table.stride(0),
        ranks.shape[2],
        histogram.shape[2],
        sink,
        max(recent, 1),
        H=H,
        BH=BH,
        G=G,
        W=W,
        BT=BT,
        SKIP_WHOLE=k_lens is not None,
        num_warps=4,
    )
