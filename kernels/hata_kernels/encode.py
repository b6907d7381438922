"""Hash: sign bits of an integer projection (paper, Alg. 2). Specification: `reference.hash_codes`.

A row becomes integers of 15 bits with sign (`reference.integer_rows`). Tensor cores multiply int8, so the row
is split into two signed int8 planes, row = 256 * hi + lo, and each plane is multiplied by the int8 projection
with int32 accumulation. Every step is exact, so the bits equal the specification's on any device and for any
tiling.
"""
# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from hata_kernels.launch import FLOAT_DTYPES, INDEX_DTYPES, aligned, check_tensor
from hata_kernels.reference import MAX_BIASED_EXPONENT, MIN_BIASED_EXPONENT, ROW_EXPONENT, WORD_BITS

MIN_EXPONENT = tl.constexpr(MIN_BIASED_EXPONENT)
MAX_EXPONENT = tl.constexpr(MAX_BIASED_EXPONENT)
# Exponent field of the scaling factor for a row with exponent field 0: twice float32's bias, plus ours.
SCALE_EXPONENT = tl.constexpr(2 * 127 + ROW_EXPONENT)
# 1.5 * 2^23: adding it to |y| < 2^22 rounds y half to even and leaves the integer in the low mantissa bits.
ROUND_MAGIC = tl.constexpr(12582912.0)
ROUND_MAGIC_BITS = tl.constexpr(0x4B400000)

HEAD_DIMS = (64, 96, 128, 256)
CODE_BITS = (64, 128, 256)
# Rows of a tile: the smallest that tensor cores take, and one that reuses the projection for a long prefill.
FEW_ROWS, MANY_ROWS = 16, 64
ZERO_BLOCK = 1024


@triton.jit
def integer_planes(b_x):
    """[M, D] float32 -> its integer rows as two int8 planes (lo, hi), row = 256 * hi + lo."""
    b_largest = tl.max(tl.abs(b_x), axis=1)
    b_exponent = b_largest.to(tl.int32, bitcast=True) >> 23
    b_exponent = tl.minimum(tl.maximum(b_exponent, MIN_EXPONENT), MAX_EXPONENT)
    b_scale = ((-b_exponent + SCALE_EXPONENT) << 23).to(tl.float32, bitcast=True)
    # Exact product, then one rounding: the same bits whether or not this becomes a fused multiply-add.
    b_rounded = b_x * b_scale[:, None] + ROUND_MAGIC
    b_row = b_rounded.to(tl.int32, bitcast=True) - ROUND_MAGIC_BITS
    b_lo = ((b_row + 128) & 255) - 128
    b_hi = (b_row - b_lo) >> 8
    return b_lo.to(tl.int8), b_hi.to(tl.int8)


@triton.jit
def code_words(b_lo, b_hi, b_p, M: tl.constexpr, BITS: tl.constexpr):
    """Two [M, D] int8 planes and a [D, BITS] int8 projection -> [M, BITS / 32] int32 words."""
    b_acc = tl.dot(b_hi, b_p, out_dtype=tl.int32) * 256 + tl.dot(b_lo, b_p, out_dtype=tl.int32)
    b_bit = tl.reshape((b_acc > 0).to(tl.int32), [M, BITS // 32, 32])
    return tl.sum(b_bit << tl.arange(0, 32)[None, None, :], axis=2)


# Not specialised on sizes that change from call to call: prefill must not compile in the middle of serving.
@triton.jit(do_not_specialize=["rows"])
def hash_rows_kernel(
    x,
    projection,
    out,
    loc,
    rows,
    x_token_stride,
    x_head_stride,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BITS: tl.constexpr,
    BM: tl.constexpr,
    BB: tl.constexpr,
    HAS_LOC: tl.constexpr,
):
    """Row m of KV head i_h is query head i_h * G + m % G of token m // G: the G heads that share a projection
    are rows of one tile, so decode fills tensor cores as well as prefill does."""
    i_m = tl.program_id(0)
    i_h = tl.program_id(1)
    o_m = i_m * BM + tl.arange(0, BM)
    o_d = tl.arange(0, BD)
    m_m = o_m < rows
    o_token = (o_m // G).to(tl.int64)
    o_head = i_h * G + o_m % G
    p_x = x + o_token * x_token_stride + o_head.to(tl.int64) * x_head_stride
    b_x = tl.load(p_x[:, None] + o_d[None, :], mask=m_m[:, None] & (o_d < D)[None, :], other=0.0)
    b_lo, b_hi = integer_planes(b_x.to(tl.float32))

    o_out = o_token
    if HAS_LOC:
        o_out = tl.load(loc + o_token, mask=m_m, other=0).to(tl.int64)
    p_out = out + (o_out * (H * G) + o_head) * (BITS // 32)
    o_w = tl.arange(0, BB // 32)
    for i_b in tl.static_range(BITS // BB):
        p_p = projection + (i_h * D + o_d)[:, None] * BITS + (i_b * BB + tl.arange(0, BB))[None, :]
        b_p = tl.load(p_p, mask=(o_d < D)[:, None], other=0)
        b_words = code_words(b_lo, b_hi, b_p, BM, BB)
        tl.store(p_out[:, None] + (i_b * (BB // 32) + o_w)[None, :], b_words, mask=m_m[:, None])


@triton.jit(do_not_specialize=["rows", "histogram_size"])
def hash_decode_step_kernel(
    q,
    k,
    projection,
    code_cache,
    loc,
    q_codes,
    histogram,
    rows,
    histogram_size,
    q_token_stride,
    q_head_stride,
    k_token_stride,
    k_head_stride,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BITS: tl.constexpr,
    BM: tl.constexpr,
    BB: tl.constexpr,
    BZ: tl.constexpr,
):
    """Row m of KV head i_h belongs to request m // (G + 1): its G queries first, then its new key."""
    i_m = tl.program_id(0)
    i_h = tl.program_id(1)
    i_b = tl.program_id(2)
    o_m = i_m * BM + tl.arange(0, BM)
    o_d = tl.arange(0, BD)
    o_request = (o_m // (G + 1)).to(tl.int64)
    o_g = o_m % (G + 1)
    m_q = (o_m < rows) & (o_g < G)
    m_k = (o_m < rows) & (o_g == G)
    m_d = (o_d < D)[None, :]
    o_head = i_h * G + o_g
    p_q = q + o_request * q_token_stride + o_head.to(tl.int64) * q_head_stride
    p_k = k + o_request * k_token_stride + i_h.to(tl.int64) * k_head_stride
    b_q = tl.load(p_q[:, None] + o_d[None, :], mask=m_q[:, None] & m_d, other=0.0)
    b_k = tl.load(p_k[:, None] + o_d[None, :], mask=m_k[:, None] & m_d, other=0.0)
    b_lo, b_hi = integer_planes(tl.where(m_k[:, None], b_k, b_q).to(tl.float32))

    p_p = projection + (i_h * D + o_d)[:, None] * BITS + (i_b * BB + tl.arange(0, BB))[None, :]
    b_p = tl.load(p_p, mask=(o_d < D)[:, None], other=0)
    b_words = code_words(b_lo, b_hi, b_p, BM, BB)

    o_w = (i_b * (BB // 32) + tl.arange(0, BB // 32))[None, :]
    p_q_codes = q_codes + (o_request * (H * G) + o_head) * (BITS // 32)
    tl.store(p_q_codes[:, None] + o_w, b_words, mask=m_q[:, None])
    b_loc = tl.load(loc + o_request, mask=m_k, other=0).to(tl.int64)
    p_cache = code_cache + (b_loc * H + i_h) * (BITS // 32)
    tl.store(p_cache[:, None] + o_w, b_words, mask=m_k[:, None])

    i_program = (i_m * tl.num_programs(1) + i_h) * tl.num_programs(2) + i_b
    n_programs = tl.num_programs(0) * tl.num_programs(1) * tl.num_programs(2)
    for i_zero in range(i_program * BZ, histogram_size, n_programs * BZ):
        o_zero = i_zero + tl.arange(0, BZ)
        tl.store(histogram + o_zero, tl.zeros([BZ], tl.int32), mask=o_zero < histogram_size)


def check_projection(projection: Tensor, device: torch.device) -> tuple[int, int, int]:
    """H, D and bits of a projection; ValueError if the kernels do not know its shape."""
    check_tensor("projection", projection, (None, None, None), torch.int8, device)
    H, D, bits = projection.shape
    if D not in HEAD_DIMS or bits not in CODE_BITS:
        raise ValueError(
            f"projection: head dimension {D} and {bits} bits, expected one of {HEAD_DIMS} and one of {CODE_BITS}"
        )
    return H, D, bits


def group_size(q_heads: int, kv_heads: int) -> int:
    """Query heads of each KV head; ValueError if they do not divide."""
    if q_heads == 0 or q_heads % kv_heads:
        raise ValueError(f"{q_heads} query heads are no multiple of the projection's {kv_heads} KV heads")
    return q_heads // kv_heads


def hash_rows(x: Tensor, projection: Tensor, out: Tensor, loc: Tensor | None = None) -> Tensor:
    """Hash codes of keys or queries (paper, Alg. 2), equal bit for bit to `reference.hash_codes`.

    Args:
        x: [N, heads, D], bf16, fp16 or fp32, keys or queries after RoPE. The last dimension is contiguous;
            the other strides are free, so a slice of a fused qkv is read in place. ``heads`` is H for keys, G
            * H for queries.
        projection: [H, D, bits] int8; D one of HEAD_DIMS, bits one of CODE_BITS.
        out: [rows, heads, bits / 32] int32, contiguous: the code cache of a layer, or a buffer of codes.
        loc: [N] int32 or int64: row i of ``x`` goes to ``out[loc[i]]``; to ``out[i]`` when None. Where two
            rows have the same loc, either may win (the dummy slot of padded rows).

    Returns:
        ``out``.

    Raises:
        ValueError: on a shape, stride, dtype or device that the kernel would misread.
    """
    H, D, bits = check_projection(projection, x.device)
    check_tensor("x", x, (None, None, D), FLOAT_DTYPES, x.device, contiguous=False)
    N, heads, _ = x.shape
    G = group_size(heads, H)
    check_tensor("out", out, (None, heads, bits // WORD_BITS), torch.int32, x.device)
    if loc is not None:
        check_tensor("loc", loc, (N,), INDEX_DTYPES, x.device)
    elif out.shape[0] < N:
        raise ValueError(f"out: {out.shape[0]} rows for {N} rows of x")
    if N == 0:
        return out

    x = aligned(x)
    rows = N * G
    BD = triton.next_power_of_2(D)
    BM = FEW_ROWS if rows <= 4 * FEW_ROWS else MANY_ROWS
    hash_rows_kernel[(triton.cdiv(rows, BM), H)](
        x,
        projection,
        out,
        out if loc is None else loc,
        rows,
        x.stride(0),
        x.stride(1),
        H=H,
        G=G,
        D=D,
        BD=BD,
        BITS=bits,
        BM=BM,
        BB=min(bits, 128),
        HAS_LOC=loc is not None,
        num_warps=8 if BM == MANY_ROWS and BD == 256 else 4,
    )
    return out


def hash_decode_step(
    q: Tensor,
    k: Tensor,
    projection: Tensor,
    code_cache: Tensor,
    loc: Tensor,
    q_codes_out: Tensor,
    histogram: Tensor,
) -> None:
    """All hashing of one layer's decode step in one launch: new keys into the cache, queries, and a histogram
    set to zero.

    Args:
        q, k: [B, G * H, D] and [B, H, D], bf16, fp16 or fp32, the same dtype, after RoPE; last dimension
            contiguous.
        projection: [H, D, bits] int8.
        code_cache: [S, H, bits / 32] int32, contiguous; row ``loc[b]`` gets the code of ``k[b]``.
        loc: [B] int32 or int64. Padded rows may share a dummy slot.
        q_codes_out: [B, G * H, bits / 32] int32, contiguous; gets the codes of ``q``.
        histogram: [B, H, bins] int32, contiguous; set to zero for `score.score_and_count`.

    Raises:
        ValueError: on a shape, stride, dtype or device that the kernel would misread.
    """
    H, D, bits = check_projection(projection, q.device)
    W = bits // WORD_BITS
    check_tensor("q", q, (None, None, D), FLOAT_DTYPES, q.device, contiguous=False)
    B, q_heads, _ = q.shape
    G = group_size(q_heads, H)
    check_tensor("k", k, (B, H, D), q.dtype, q.device, contiguous=False)
    check_tensor("code_cache", code_cache, (None, H, W), torch.int32, q.device)
    check_tensor("loc", loc, (B,), INDEX_DTYPES, q.device)
    check_tensor("q_codes_out", q_codes_out, (B, q_heads, W), torch.int32, q.device)
    check_tensor("histogram", histogram, (B, H, None), torch.int32, q.device)
    if B == 0:
        return

    q, k = aligned(q), aligned(k)
    rows = B * (G + 1)
    BM = FEW_ROWS if rows <= 4 * FEW_ROWS else MANY_ROWS
    # A small batch is bound by latency: one word of bits a program spreads it over more multiprocessors.
    BB = 32 if BM == FEW_ROWS else min(bits, 128)
    BD = triton.next_power_of_2(D)
    hash_decode_step_kernel[(triton.cdiv(rows, BM), H, bits // BB)](
        q,
        k,
        projection,
        code_cache,
        loc,
        q_codes_out,
        histogram,
        rows,
        histogram.numel(),
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        H=H,
        G=G,
        D=D,
        BD=BD,
        BITS=bits,
        BM=BM,
        BB=BB,
        BZ=ZERO_BLOCK,
        num_warps=8 if BM == MANY_ROWS and BD == 256 else 4,
    )
