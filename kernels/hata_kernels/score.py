"""Score: distances of all cached keys to each group of queries, as ranks, and how many tokens have each rank.

Specification: `reference.distances`, `reference.stretch`, `reference.nearness`, `reference.rank` and `reference.draw`.
Ranks are small integers, so the cut that selection needs is found by counting, with no sort. Counts of integers do not
depend on the order of the additions.

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
    check_tensor,
    gain,
    luck_of,
    luck_seed,
    luck_word,
    octave_of,
    overlaps_launches,
    popcount,
    rounded,
    squares,
    wait_for_previous,
)
from hata_kernels.reference import LEAST_SIZE, LUCK_TOKENS, MOST_PARTS, SAMPLED, SIZE_PARTS, SIZED_TOKENS
from hata_kernels.workspace import FEW_REQUESTS, PIECE, DecodeWorkspace

# Consecutive tokens that a thread scores at a time: their ranks, a byte each, are one word, and so is their luck.
TOKENS = LUCK_TOKENS
# Registers of a thread that scores codes of 128 bits with sizes. It would take 134, and of the two programs that a
# multiprocessor is to have only one would find room. (Other codes do not fit into so few.)
SIZED_REGISTERS = 128
# Words between the counts of two heads beyond their own: equal ranks of neighbouring heads lie in different banks.
SKEW = 4
# Triton has no shared memory that a program can index. These four lines of PTX are such an array: its address, and
# storing, adding to and loading its elements. They are side effects, so they stay in order with the barriers.
SHARED_ARRAY = "{{ .shared .align 16 .b32 hata_array[{}]; mov.u32 $0, hata_array; }}"
STORE = tl.constexpr("st.shared.b32 [$1], $2; mov.b32 $0, 0;")
ADD = tl.constexpr("red.shared.add.u32 [$1], $2; mov.b32 $0, 0;")
LOAD = tl.constexpr("ld.shared.b32 $0, [$1];")
# Two bytes, with zeros above.
LOAD_SIZE = tl.constexpr("{ .reg .u16 size; ld.global.u16 size, [$1]; cvt.u32.u16 $0, size; }")
OF_SIZES, PARTS_OF_SIZE, MOST_OF_SIZE = tl.constexpr(SIZED_TOKENS), tl.constexpr(SIZE_PARTS), tl.constexpr(MOST_PARTS)
SIZE_SHIFT, LEAST_MEAN = tl.constexpr(SIZE_PARTS.bit_length()), tl.constexpr(LEAST_SIZE)
# Functions of three bits: (x ^ y) & z, and the two digits of x + y + z.
DIFFERS = tl.constexpr("lop3.b32 $0, $1, $2, $3, 0x28;")
SUM = tl.constexpr("lop3.b32 $0, $1, $2, $3, 0x96;")
CARRY = tl.constexpr("lop3.b32 $0, $1, $2, $3, 0xE8;")


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
def load_slots(p_slot, o_t, left, WIDE: tl.constexpr):
    """Slots of groups of tokens, 0 where none is left. One load a group, where rows of the slot table consist of whole
    groups: what it reads beyond the last token is in the same row."""
    if WIDE:
        m_group = o_t // o_t.shape[1] * o_t.shape[1] < left
        return tl.where(o_t < left, tl.load(p_slot + o_t, mask=m_group, other=0), 0)
    else:
        return tl.load(p_slot + o_t, mask=o_t < left, other=0)


@triton.jit
def load_codes(code_cache, b_slot, o_word, m_c, H: tl.constexpr, HB: tl.constexpr, W: tl.constexpr):
    p_code = code_cache + b_slot.to(tl.int64)[:, :, None, None] * (H * W) + o_word
    if o_word.shape[3] == 4 * HB:
        # Threads are spread over a tile's dimensions from the one of the longest runs on. Of ties Triton 3.6 takes the
        # first dimension and 3.8 the last, so that four threads would share a group. So groups are said to have runs
        # of 2, which they have not. A load is only as wide as the longest runs allow, which are of 4 and true.
        p_code = tl.max_contiguous(p_code, [2, 1, 1, 4])
    if H % HB == 0:
        return tl.load(p_code)
    else:
        return tl.load(p_code, mask=m_c, other=0)


@triton.jit
def load_sizes(size_cache, b_slot, o_head, H: tl.constexpr):
    """Sizes of the keys of some slots, [.., HB]. A plain load would spread them over the threads in its own way, and
    hand them to those that have the tokens through shared memory, with barriers."""
    p_size = size_cache + (b_slot.to(tl.int64)[:, :, None] * H + o_head[None, None, :])
    if INTERPRETED:
        return tl.load(p_size).to(tl.int32)
    else:
        p_size = p_size.to(tl.int64)
        return tl.inline_asm_elementwise(LOAD_SIZE, "=r,l", [p_size], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def usual_size(size_cache, p_row, length, o_head, H: tl.constexpr):
    """What `reference.relative_sizes` multiplies sizes by, [HB] float32."""
    o_t = length - 2 - tl.arange(0, OF_SIZES)
    b_slot = tl.load(p_row + o_t, mask=o_t >= 0, other=0).to(tl.int64)
    b_size = tl.load(size_cache + (b_slot[:, None] * H + o_head[None, :]), mask=(o_t >= 0)[:, None], other=0)
    b_mean = tl.sum(b_size.to(tl.int32), axis=0) // tl.maximum(tl.minimum(length - 1, OF_SIZES), 1)
    b_mean = (tl.maximum(b_mean, LEAST_MEAN) << 16).to(tl.float32, bitcast=True)
    b_inverse = tl.div_rn(tl.full(b_mean.shape, PARTS_OF_SIZE, tl.float32), b_mean)
    return (b_inverse.to(tl.int32, bitcast=True) & -256).to(tl.float32, bitcast=True)


@triton.jit
def stretch(b_distance, b_weight, b_size, b_inverse):
    """`reference.stretch`, by sizes as loaded."""
    b_size = (b_size << 16).to(tl.float32, bitcast=True) * b_inverse
    b_size = rounded(tl.minimum(b_size, MOST_OF_SIZE))
    b_doubled = b_weight * PARTS_OF_SIZE + (2 * b_distance - b_weight) * b_size
    return tl.maximum((b_doubled + PARTS_OF_SIZE) >> SIZE_SHIFT, 0)


@triton.jit
def words_of(b_x, HB: tl.constexpr, WV: tl.constexpr):
    """[.., WV HB] -> WV of [.., HB], the words that a thread holds of a code."""
    b_x = tl.reshape(b_x, [b_x.shape[0], b_x.shape[1], b_x.shape[2], HB, WV // 2, 2])
    b_even, b_odd = tl.split(b_x)
    if WV == 2:
        shape: tl.constexpr = [b_x.shape[0], b_x.shape[1], b_x.shape[2], HB]
        return tl.reshape(b_even, shape), tl.reshape(b_odd, shape)
    else:
        b_first, b_third = tl.split(b_even)
        b_second, b_fourth = tl.split(b_odd)
        return b_first, b_second, b_third, b_fourth


@triton.jit
def over_code(b_x, HB: tl.constexpr, WV: tl.constexpr):
    """[.., W / WV, WV HB] -> [.., HB], sums over the words of a code."""
    b_words = words_of(b_x, HB, WV)
    b_sum = b_words[0]
    for i_w in tl.static_range(1, WV):
        b_sum += b_words[i_w]
    return tl.sum(b_sum, axis=2)


@triton.jit
def bitwise(b_x, b_y, b_z, PTX: tl.constexpr):
    """Any function of three bits, of all bits of three words, in one instruction."""
    return tl.inline_asm_elementwise(PTX, "=r,r,r,r", [b_x, b_y, b_z], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def differs(b_code, b_sign, b_plane):
    """The bits of a plane in which a code differs from the query's."""
    if INTERPRETED:
        return (b_code ^ b_sign) & b_plane
    else:
        return bitwise(b_code, b_sign, b_plane, DIFFERS)


@triton.jit
def add_bits(b_x, b_y, b_z):
    """Three words, added bit by bit: sum and carry."""
    if INTERPRETED:
        b_half = b_x ^ b_y
        return b_half ^ b_z, (b_x & b_y) | (b_half & b_z)
    else:
        return bitwise(b_x, b_y, b_z, SUM), bitwise(b_x, b_y, b_z, CARRY)


@triton.jit
def count_bits(b_levels, LEVELS: tl.constexpr):
    """The bits of some words, each word of level i worth 2^i: words of one level are first added, bit by bit; three
    become their sum, and a carry of the next level. With two planes of four words, 5 are left of 8 to count."""
    b_total = tl.zeros_like(b_levels[0][0])
    b_words = ()  # type: tuple
    for i_l in tl.static_range(2 * LEVELS):
        if i_l < LEVELS:
            b_words += b_levels[i_l]
        b_carried = ()  # type: tuple
        for _ in tl.static_range((len(b_words) - 1) // 2):
            b_sum, b_carry = add_bits(b_words[0], b_words[1], b_words[2])
            b_carried += (b_carry,)
            b_words = b_words[3:] + (b_sum,)  # noqa: RUF005 (Triton has no unpacking)
        for i_w in tl.static_range(len(b_words)):
            b_total += popcount(b_words[i_w]) << i_l
        b_words = b_carried
    return b_total


@triton.jit
def distances(b_code, b_sign, b_planes, P: tl.constexpr, HB: tl.constexpr, WV: tl.constexpr):
    """`reference.distances`, from bits that differ from the query's, counted by what each is worth."""
    b_levels = ()  # type: tuple
    for i_p in tl.static_range(P):
        b_levels += (words_of(differs(b_code, b_sign, b_planes[i_p]), HB, WV),)
    return tl.sum(count_bits(b_levels, P), axis=2)


@triton.jit(do_not_specialize=["sink", "recent", "layer"])
def score_kernel(
    planes,
    code_cache,
    size_cache,
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
    WIDE: tl.constexpr,
    SIZED: tl.constexpr,
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
    BG: tl.constexpr = BT // TOKENS
    row_start = i_row * table_stride
    p_slot = slot_table + (tl.multiple_of(row_start, TOKENS) if WIDE else row_start) + start
    o_t = (tl.arange(0, BG) * TOKENS)[:, None] + tl.arange(0, TOKENS)[None, :]
    o_c = tl.arange(0, HB * WV)
    o_column = i_hb * HB + o_c // WV
    m_c = (o_column < H)[None, None, None, :]
    o_word = (tl.arange(0, W // WV) * WV)[None, None, :, None] + (o_column * W + o_c % WV)[None, None, None, :]
    o_h = i_hb * HB + tl.arange(0, HB)
    m_h = o_h < H
    b_slot = load_slots(p_slot, o_t, end - start, WIDE)
    b_after = load_slots(p_slot + BT, o_t, end - start - BT, WIDE)
    b_code = load_codes(code_cache, b_slot, o_word, m_c, H, HB, W)
    b_next = load_codes(code_cache, b_after, o_word, m_c, H, HB, W)
    if SIZED:
        o_head = tl.minimum(o_h, H - 1)
        b_size = load_sizes(size_cache, b_slot, o_head, H)
        b_next_size = load_sizes(size_cache, b_after, o_head, H)
        b_inverse = usual_size(size_cache, slot_table + row_start, length, o_head, H)[None, None, :]
    b_slot = load_slots(p_slot + 2 * BT, o_t, end - start - 2 * BT, WIDE)

    o_bin = tl.arange(0, BINS)
    b_count = tl.zeros([HB, BINS], tl.int32)
    if INTERPRETED:
        p_head = tl.zeros([HB], tl.int32)
    else:
        p_head = shared_array(SHARED) + tl.arange(0, HB) * (4 * STRIDE)
        shared_store(p_head[:, None] + 4 * o_bin[None, :], b_count)
        tl.debug_barrier()

    # Ranks are stored as words, of four bytes or two int16.
    RANKS: tl.constexpr = 4 if BINS <= 256 else 2
    WORDS: tl.constexpr = TOKENS // RANKS
    o_shift = tl.arange(0, RANKS) * (32 // RANKS)
    # Stored in one dimension, so that no order of dimensions comes between a thread and the words it has.
    p_rank = ranks + (i_b * H + o_h)[None, None, :] * (rank_stride // RANKS) + start // RANKS
    p_rank += tl.arange(0, WORDS)[:, None, None] + opaque(tl.arange(0, BG) * WORDS)[None, :, None]
    p_rank = tl.reshape(p_rank, [WORDS * BG * HB])
    m_rank = tl.reshape(tl.broadcast_to(m_h[None, None, :], [WORDS, BG, HB]), [WORDS * BG * HB])
    o_group = start // TOKENS + tl.arange(0, BG)[:, None]
    seed = luck_seed(length, layer)

    wait_for_previous(PDL, NEXT=False)
    p_plane = planes + i_b * (H * (1 + P) * W) + (o_word + (o_column * (P * W))[None, None, None, :])
    b_sign = tl.load(p_plane, mask=m_c, other=0)
    b_planes = ()  # type: tuple
    for i_p in tl.static_range(P):
        b_planes += (tl.load(p_plane + (1 + i_p) * W, mask=m_c, other=0),)
    if DRAWS:
        b_octave = octave_of(over_code(squares(b_planes, P), HB, WV))
    # Whether weights can come to so much that ranks do not begin at a distance of 0.
    FAR: tl.constexpr = 2 * ((1 << P) - 1) * (32 * W) > 3 * BINS
    if SIZED or FAR:
        b_bits = tl.zeros_like(b_sign)
        for i_p in tl.static_range(P):
            b_bits += popcount(b_planes[i_p]) << i_p
        b_weight = over_code(b_bits, HB, WV)
    b_first = 1
    if FAR:
        b_first = 1 - tl.maximum(b_weight // 2 - 3 * BINS // 4, 0)
    for i_t in tl.range(start, end, BT, num_stages=1):
        b_loaded = load_codes(code_cache, b_slot, o_word, m_c, H, HB, W)
        if SIZED:
            b_loaded_size = load_sizes(size_cache, b_slot, o_head, H)
        p_slot += BT
        b_slot = load_slots(p_slot + 2 * BT, o_t, end - i_t - 3 * BT, WIDE)
        b_distance = distances(b_code, b_sign, b_planes, P, HB, WV)
        if SIZED:
            b_distance = stretch(b_distance, b_weight, b_size, b_inverse)
            b_size = b_next_size
            b_next_size = b_loaded_size
        b_rank = tl.minimum(b_distance + b_first, BINS - 2)
        if DRAWS:
            b_luck = luck_of(luck_word(o_group, seed), tl.arange(0, TOKENS)[None, :])
            b_rank -= gain(b_luck[:, :, None], b_octave)
            o_group += BG
        if DRAWS or FAR:
            b_rank = tl.maximum(b_rank, 1)
        if (i_t < sink) | (i_t + BT > tl.minimum(length - recent, end)):
            m_kept = (i_t + o_t < sink) | (i_t + o_t >= length - recent)
            b_rank = tl.where(m_kept[:, :, None], 0, b_rank)
            # Tiles are stored whole: beyond a request's last token goes the rank of no token.
            b_rank = tl.where((i_t + o_t < end)[:, :, None], b_rank, BINS - 1)
        b_word = tl.sum(tl.reshape(b_rank, [BG, WORDS, RANKS, HB]) << o_shift[None, None, :, None], axis=2)
        tl.store(p_rank, tl.reshape(tl.permute(b_word, [1, 0, 2]), [WORDS * BG * HB]), mask=m_rank)
        p_rank += BT // RANKS
        if INTERPRETED:
            b_one = b_rank[:, :, :, None] == o_bin[None, None, None, :]
            b_count += tl.sum(tl.sum(b_one.to(tl.int32), axis=0), axis=0)
        else:
            shared_add(p_head[None, None, :] + b_rank * 4, b_rank * 0 + 1)
        b_code = b_next
        b_next = b_loaded

    if not INTERPRETED:
        tl.debug_barrier()
        b_count = shared_load(p_head[:, None] + 4 * o_bin[None, :])
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
    size_cache: Tensor | None = None,
) -> None:
    """Ranks of every cached token of each request that selects, and how many tokens have each rank.

    Args:
        code_cache: [S, H, W] int32, contiguous, 16-byte aligned.
        slot_table: [requests, max_context] int32, rows contiguous: the slot of each position.
        workspace: planned for ``batch`` requests, with the planes of this layer's queries and a histogram of zeros.
            Gets ``ranks`` (whole blocks; beyond a request's length the rank of no token), ``histogram`` and
            ``share_counts``; a request that keeps all its tokens gets none.
        sink, recent: the first and the last tokens that are always kept (at least the last one is).
        layer: that of `reference.luck`.
        size_cache: [S, H] int16, contiguous, the keys' sizes, to stretch distances by (`reference.stretch`).

    Raises:
        ValueError: on a shape, stride, dtype or device that the kernel would misread.
    """
    device, grid = workspace.device, workspace.grid
    _, H, planes, W = workspace.planes.shape
    check_tensor("code_cache", code_cache, (None, H, W), torch.int32, device)
    check_tensor("slot_table", slot_table, (None, None), torch.int32, device, contiguous=False)
    if size_cache is not None:
        check_tensor("size_cache", size_cache, (len(code_cache), H), torch.int16, device)
    if sink < 0 or recent < 0:
        raise ValueError(f"sink {sink} and recent {recent} must not be negative")
    if batch == 0:
        return
    whole_groups = slot_table.data_ptr() % (4 * TOKENS) == 0 and slot_table.stride(0) % TOKENS == 0
    HB, bins, shares = grid.head_block, workspace.bins, grid.shares(batch)
    score_kernel[(workspace.pieces(batch)[0], triton.cdiv(H, HB))](
        workspace.planes,
        code_cache,
        code_cache if size_cache is None else size_cache,
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
        WIDE=whole_groups and batch <= FEW_REQUESTS,  # with more requests single loads are 1 to 2 us faster
        SIZED=size_cache is not None,
        PDL=overlaps_launches(device),
        launch_pdl=overlaps_launches(device),
        num_warps=shares.warps,
        maxnreg=SIZED_REGISTERS if size_cache is not None and W == 4 else None,
    )
