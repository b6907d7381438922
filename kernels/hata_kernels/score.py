"""Score: distances of all cached keys to each group of queries, as ranks, and how many tokens have each rank.

Specification: `reference.distances`, `reference.rank` and `reference.draw`. Ranks are small integers, so the cut that
selection needs is found by counting, with no sort. Counts of integers do not depend on the order of the additions.

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

from hata_kernels.launch import (
    INTERPRETED,
    PARTS,
    check_tensor,
    gain,
    luck_of,
    luck_seed,
    luck_word,
    overlaps_launches,
    popcount,
    wait_for_previous,
)
from hata_kernels.reference import LUCK_TOKENS, OCTAVES_A_ROOT, SAMPLED
from hata_kernels.workspace import FEW_REQUESTS, PIECE, DecodeWorkspace

# Consecutive tokens that a thread scores at a time: their ranks, a byte each, are one word, and so is their luck.
TOKENS = LUCK_TOKENS
# Words between the counts of two heads beyond their own: equal ranks of neighbouring heads lie in different banks.
SKEW = 4
# Triton has no shared memory that a program can index. These four lines of PTX are such an array: its address, and
# storing, adding to and loading its elements. They are side effects, so they stay in order with the barriers.
SHARED_ARRAY = "{{ .shared .align 16 .b32 hata_array[{}]; mov.u32 $0, hata_array; }}"
STORE = tl.constexpr("st.shared.b32 [$1], $2; mov.b32 $0, 0;")
ADD = tl.constexpr("red.shared.add.u32 [$1], $2; mov.b32 $0, 0;")
LOAD = tl.constexpr("ld.shared.b32 $0, [$1];")
# `reference.octaves` divides a root by this.
A_ROOT = tl.constexpr(OCTAVES_A_ROOT)


@triton.jit
def opaque(x):
    """``x``, of which the compiler knows nothing: it then leaves a store's elements with the threads that have them."""
    if INTERPRETED:
        return x
    else:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def shared_array(DECLARATION: tl.constexpr):
    """Address of an array of int32 in shared memory; `SHARED_ARRAY` with its size is the declaration."""
    return tl.inline_asm_elementwise(DECLARATION, "=r,r", [tl.program_id(0)], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def shared_store(address, b_x):
    tl.inline_asm_elementwise(STORE, "=r,r,r", [address, b_x], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def shared_add(address, b_x):
    """Adds each element once if no thread holds another's copy: tiles of an element for each thread and more, reduced
    over axes that lie within a thread. The tests count."""
    tl.inline_asm_elementwise(ADD, "=r,r,r", [address, b_x], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def shared_load(address):
    return tl.inline_asm_elementwise(LOAD, "=r,r", [address], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def load_slots(p_slot, o_t, end):
    return tl.load(p_slot + o_t, mask=o_t < end, other=0).to(tl.int64)


@triton.jit
def load_codes(code_cache, b_slot, o_word, m_c, H: tl.constexpr, HB: tl.constexpr, W: tl.constexpr):
    p_code = code_cache + b_slot[:, :, None, None] * (H * W) + o_word
    if H % HB == 0:
        return tl.load(p_code)
    else:
        return tl.load(p_code, mask=m_c, other=0)


@triton.jit
def four_words(b_x, HB: tl.constexpr):
    """[.., 4 HB] -> four of [.., HB], the words that a thread holds of a code."""
    b_x = tl.reshape(b_x, [b_x.shape[0], b_x.shape[1], b_x.shape[2], HB, 2, 2])
    b_even, b_odd = tl.split(b_x)
    b_first, b_third = tl.split(b_even)
    b_second, b_fourth = tl.split(b_odd)
    return b_first, b_second, b_third, b_fourth


@triton.jit
def bits_by_adding(b_differs, b_planes, P: tl.constexpr, HB: tl.constexpr):
    """The bits of ``b_differs`` in each plane, times what the plane is worth: [.., HB]. Words of equal worth are first
    added, bit by bit: three become a sum, and a carry of twice the worth. With two planes, 5 are left of 8 to count."""
    b_total = tl.zeros([b_differs.shape[0], b_differs.shape[1], b_differs.shape[2], HB], tl.int32)
    b_words = ()  # type: tuple
    for i_p in tl.static_range(P + 1):
        if i_p < P:
            b_words += four_words(b_differs & b_planes[i_p], HB)
        b_carried = ()  # type: tuple
        for _ in tl.static_range((len(b_words) - 1) // 2):
            b_half = b_words[0] ^ b_words[1]
            b_carried += ((b_words[0] & b_words[1]) | (b_half & b_words[2]),)
            b_words = b_words[3:] + (b_half ^ b_words[2],)  # noqa: RUF005 (Triton has no unpacking)
        for i_w in tl.static_range(len(b_words)):
            b_total += popcount(b_words[i_w]) << i_p
        b_words = b_carried
    return b_total


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


@triton.jit(do_not_specialize=["sink", "recent", "layer"])
def score_kernel(
    planes,
    octaves,
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
    layer,
    H: tl.constexpr,
    HB: tl.constexpr,
    P: tl.constexpr,
    W: tl.constexpr,
    WV: tl.constexpr,
    BT: tl.constexpr,
    TOKENS: tl.constexpr,
    BINS: tl.constexpr,
    PIECE: tl.constexpr,
    SHARED: tl.constexpr,
    STRIDE: tl.constexpr,
    DRAWS: tl.constexpr,
    ADDS: tl.constexpr,
    PDL: tl.constexpr,
):
    """A tile is [groups of tokens, TOKENS, W / WV, heads x WV words]. A thread has WV words of a head, 16 bytes where a
    code has as many, loaded at once, of every token of a group: sums over a code, and the ranks of a group, stay within
    it, so threads never wait for one another. Codes are loaded two tiles ahead, and their slots three."""
    i_share = tl.program_id(0)
    i_hb = tl.program_id(1)
    i_b = tl.load(shares + i_share * PIECE).to(tl.int64)
    if i_b < 0:
        wait_for_previous(PDL, NEXT=False)
        return
    i_row = tl.load(shares + i_share * PIECE + 1).to(tl.int64)
    start = tl.multiple_of(tl.load(shares + i_share * PIECE + 2), 16)
    end = tl.load(shares + i_share * PIECE + 3)
    length = tl.load(shares + i_share * PIECE + 4)

    # Of all that is read before the wait, only the newest token's code comes from the launch before. It may be an old
    # one: that token is always kept.
    p_slot = slot_table + i_row * table_stride
    BG: tl.constexpr = BT // TOKENS
    o_t = start + (tl.arange(0, BG) * TOKENS)[:, None] + tl.arange(0, TOKENS)[None, :]
    o_c = tl.arange(0, HB * WV)
    o_column = i_hb * HB + o_c // WV
    m_c = (o_column < H)[None, None, None, :]
    o_word = (tl.arange(0, W // WV) * WV)[None, None, :, None] + (o_column * W + o_c % WV)[None, None, None, :]
    b_code = load_codes(code_cache, load_slots(p_slot, o_t, end), o_word, m_c, H, HB, W)
    b_next = load_codes(code_cache, load_slots(p_slot, o_t + BT, end), o_word, m_c, H, HB, W)
    b_slot = load_slots(p_slot, o_t + 2 * BT, end)

    o_h = i_hb * HB + tl.arange(0, HB)
    m_h = o_h < H
    o_bin = tl.arange(0, BINS)
    b_count = tl.zeros([HB, BINS], tl.int32)
    if INTERPRETED:
        p_shared = 0
    else:
        p_shared = shared_array(SHARED)
        shared_store(p_shared + (tl.arange(0, HB)[:, None] * STRIDE + o_bin[None, :]) * 4, b_count)
        tl.debug_barrier()

    wait_for_previous(PDL, NEXT=False)
    p_plane = planes + i_b * (H * (1 + P) * W) + (o_word + (o_column * (P * W))[None, None, None, :])
    b_sign = tl.load(p_plane, mask=m_c, other=0)
    b_planes = ()  # type: tuple
    for i_p in tl.static_range(P):
        b_planes += (tl.load(p_plane + (1 + i_p) * W, mask=m_c, other=0),)
    if DRAWS:
        seed = luck_seed(length, layer)
        o_group = start // TOKENS + tl.arange(0, BG)[:, None]
        b_squares = tl.zeros_like(b_sign)
        for i_p in tl.static_range(P):
            for i_q in tl.static_range(P):
                b_squares += popcount(b_planes[i_p] & b_planes[i_q]) << (i_p + i_q)
        b_squares = tl.sum(tl.reshape(tl.sum(b_squares, axis=2), [1, 1, HB, WV]), axis=3)
        b_octave = octave_of(b_squares)
        m_first = m_h[None, None, :] & (i_share == tl.load(shares + i_share * PIECE + 5))
        tl.store((octaves + i_b * H + o_h)[None, None, :] + tl.zeros_like(b_octave), b_octave, mask=m_first)
    # Ranks are stored as words, of four bytes or two int16.
    RANKS: tl.constexpr = 4 if BINS <= 256 else 2
    WORDS: tl.constexpr = TOKENS // RANKS
    o_shift = tl.arange(0, RANKS) * (32 // RANKS)
    p_rank = ranks + (i_b * H + o_h)[:, None, None] * (rank_stride // RANKS)
    p_rank += opaque(tl.arange(0, BG) * WORDS)[None, :, None] + tl.arange(0, WORDS)[None, None, :]
    for i_t in tl.range(start, end, BT, num_stages=1):
        b_loaded = load_codes(code_cache, b_slot, o_word, m_c, H, HB, W)
        b_slot = load_slots(p_slot, o_t + 3 * BT, end)
        b_differs = b_code ^ b_sign
        if ADDS:
            b_distance = tl.sum(bits_by_adding(b_differs, b_planes, P, HB), axis=2)
        else:
            b_bits = popcount(b_differs & b_planes[0])
            for i_p in tl.static_range(1, P):
                b_bits += popcount(b_differs & b_planes[i_p]) << i_p
            b_bits = tl.sum(b_bits, axis=2)
            b_distance = tl.sum(tl.reshape(b_bits, [BG, TOKENS, HB, WV]), axis=3)
        m_kept = (o_t < sink) | (o_t >= length - recent)
        b_rank = tl.minimum(b_distance + 1, BINS - 2)
        if DRAWS:
            b_luck = luck_of(luck_word(o_group, seed), tl.arange(0, TOKENS)[None, :])
            b_rank = tl.maximum(b_rank - gain(b_luck[:, :, None], b_octave), 1)
            o_group += BG
        b_rank = tl.where(m_kept[:, :, None], 0, b_rank)
        # Tiles are stored whole: beyond a request's last token goes the rank of no token.
        b_rank = tl.where((o_t < end)[:, :, None], b_rank, BINS - 1)
        b_word = tl.sum(tl.reshape(b_rank, [BG, WORDS, RANKS, HB]) << o_shift[None, None, :, None], axis=2)
        tl.store(p_rank + i_t // RANKS, tl.permute(b_word, [2, 0, 1]), mask=m_h[:, None, None])
        if INTERPRETED:
            b_one = b_rank[:, :, :, None] == o_bin[None, None, None, :]
            b_count += tl.sum(tl.sum(b_one.to(tl.int32), axis=0), axis=0)
        else:
            shared_add(p_shared + (tl.arange(0, HB)[None, None, :] * STRIDE + b_rank) * 4, b_rank * 0 + 1)
        b_code = b_next
        b_next = b_loaded
        o_t += BT

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
    layer: int = 0,
) -> None:
    """Ranks of every cached token of each request that selects, and how many tokens have each rank.

    Args:
        code_cache: [S, H, W] int32, contiguous, 16-byte aligned.
        slot_table: [requests, max_context] int32, rows contiguous: the slot of each position.
        workspace: planned for ``batch`` requests, with the planes of this layer's queries and a histogram of zeros.
            Gets ``ranks`` (whole blocks; beyond a request's length the rank of no token), ``histogram``,
            ``share_counts`` and, where it samples, ``octaves``; a request that keeps all its tokens gets none.
        sink, recent: the first and the last tokens that are always kept (at least the last one is).
        layer: that of `reference.luck`.

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
    HB, bins, shares = grid.head_block, workspace.bins, grid.shares(batch)
    score_kernel[(workspace.pieces(batch)[0], triton.cdiv(H, HB))](
        workspace.planes,
        workspace.octaves,
        code_cache,
        slot_table,
        workspace.shares,
        workspace.ranks.view(torch.int32),
        workspace.histogram,
        workspace.share_counts,
        slot_table.stride(0),
        workspace.ranks.stride(1),
        sink,
        max(recent, 1),
        layer,
        H=H,
        HB=HB,
        P=planes - 1,
        W=W,
        WV=min(W, 4),
        BT=shares.block,
        TOKENS=TOKENS,
        BINS=bins,
        PIECE=PIECE,
        SHARED=SHARED_ARRAY.format(HB * (bins + SKEW)),
        STRIDE=bins + SKEW,
        DRAWS=workspace.selection == SAMPLED,
        ADDS=W > 2 and batch <= FEW_REQUESTS,  # with more requests the additions take longer than counting
        PDL=overlaps_launches(device),
        launch_pdl=overlaps_launches(device),
        num_warps=shares.warps,
    )
