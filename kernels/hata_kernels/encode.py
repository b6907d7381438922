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

from hata_kernels.launch import (
    FLOAT_DTYPES,
    INDEX_DTYPES,
    aligned,
    check_tensor,
    here,
    overlaps_launches,
    rounded,
    wait_for_previous,
)
from hata_kernels.reference import (
    KEYS,
    MAX_BIASED_EXPONENT,
    MIN_BIASED_EXPONENT,
    ONE_SIDED,
    QUERIES,
    ROW_EXPONENT,
    SIZE_EXPONENT,
    WORD_BITS,
    group_exponent,
)
from hata_kernels.workspace import DecodeWorkspace

MIN_EXPONENT = tl.constexpr(MIN_BIASED_EXPONENT)
MAX_EXPONENT = tl.constexpr(MAX_BIASED_EXPONENT)
OF_ROW = tl.constexpr(ROW_EXPONENT)
OF_SIZE = tl.constexpr(SIZE_EXPONENT)
OF_KEYS, OF_QUERIES = tl.constexpr(KEYS), tl.constexpr(QUERIES)

HEAD_DIMS = (64, 96, 128, 256)
CODE_BITS = (64, 128, 256)
# Rows of a tile: the smallest that tensor cores take, and one that reuses the projection for a long prefill.
FEW_ROWS, MANY_ROWS = 16, 64


@triton.jit
def exponent_of(b_largest):
    """Float32's biased exponent of the largest magnitude of rows, in the range that rows are scaled in."""
    b_exponent = b_largest.to(tl.int32, bitcast=True) >> 23
    return tl.minimum(tl.maximum(b_exponent, MIN_EXPONENT), MAX_EXPONENT)


@triton.jit
def size_of(b_total, b_exponent):
    """`reference.hash_sizes` of summed magnitudes, each shifted by 8, and the rows' exponents."""
    b_bits = tl.maximum(b_total, 1).to(tl.float32).to(tl.int32, bitcast=True) + ((b_exponent - OF_SIZE) << 23)
    return (tl.maximum(b_bits, 0) >> 16).to(tl.int16)


@triton.jit
def integer_planes(b_x, b_largest, exponent):
    """Rows [M, D] float32 and what to scale each by [M] -> `reference.integer_rows` as two int8 planes (lo, hi), each
    integer 256 * hi + lo."""
    # As exponent fields: twice float32's bias, and ours.
    b_scale = ((-exponent_of(b_largest) + (2 * 127 + exponent)) << 23).to(tl.float32, bitcast=True)
    b_row = rounded(b_x * b_scale[:, None])
    b_lo = ((b_row + 128) & 255) - 128
    b_hi = (b_row - b_lo) >> 8
    return b_lo.to(tl.int8), b_hi.to(tl.int8)


@triton.jit
def projected(b_lo, b_hi, b_p):
    """Two [M, D] int8 planes and a [D, bits] int8 projection -> [M, bits] int32, exact."""
    return tl.dot(b_hi, b_p, out_dtype=tl.int32) * 256 + tl.dot(b_lo, b_p, out_dtype=tl.int32)


@triton.jit
def largest_of_group(b_largest, BR: tl.constexpr, BG: tl.constexpr):
    """[BR * BG], of rows -> [BR * BG]: each row's the largest of its request's."""
    b_group = tl.max(tl.reshape(b_largest, [BR, BG]), axis=1)
    return tl.reshape(tl.broadcast_to(b_group[:, None], [BR, BG]), [BR * BG])


@triton.jit
def pack(b_bit, M: tl.constexpr, W: tl.constexpr):
    """[M, 32 W] of zeros and ones -> [M, W] int32 words, least significant bit first."""
    return tl.sum(tl.reshape(b_bit, [M, W, 32]) << tl.arange(0, 32)[None, None, :], axis=2)


# Not specialised on sizes that change from call to call: prefill must not compile in the middle of serving.
@triton.jit(do_not_specialize=["rows"])
def hash_rows_kernel(
    x,
    projection,
    out,
    sizes,
    loc,
    rows,
    x_token_stride,
    x_head_stride,
    H: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BITS: tl.constexpr,
    BM: tl.constexpr,
    BB: tl.constexpr,
    HAS_LOC: tl.constexpr,
    SIZED: tl.constexpr,
):
    i_m = tl.program_id(0)
    i_h = tl.program_id(1)
    o_m = i_m * BM + tl.arange(0, BM)
    o_d = tl.arange(0, BD)
    m_m = o_m < rows
    o_token = o_m.to(tl.int64)
    p_x = x + o_token * x_token_stride + i_h.to(tl.int64) * x_head_stride
    b_x = tl.load(p_x[:, None] + o_d[None, :], mask=m_m[:, None] & (o_d < D)[None, :], other=0.0)
    b_x = b_x.to(tl.float32)
    b_largest = tl.max(tl.abs(b_x), axis=1)
    b_lo, b_hi = integer_planes(b_x, b_largest, OF_ROW)

    o_out = o_token
    if HAS_LOC:
        o_out = tl.load(loc + o_token, mask=m_m, other=0).to(tl.int64)
    p_out = out + (o_out * H + i_h) * (BITS // 32)
    o_w = tl.arange(0, BB // 32)
    b_total = tl.zeros([BM], tl.int32)
    for i_b in tl.static_range(BITS // BB):
        p_p = projection + (i_h * D + o_d)[:, None] * BITS + (i_b * BB + tl.arange(0, BB))[None, :]
        b_p = tl.load(p_p, mask=(o_d < D)[:, None], other=0)
        b_acc = projected(b_lo, b_hi, b_p)
        b_words = pack((b_acc > 0).to(tl.int32), BM, BB // 32)
        tl.store(p_out[:, None] + (i_b * (BB // 32) + o_w)[None, :], b_words, mask=m_m[:, None])
        if SIZED:
            b_total += tl.sum(tl.abs(b_acc) >> 8, axis=1)
    if SIZED:
        tl.store(sizes + o_out * H + i_h, size_of(b_total, exponent_of(b_largest)), mask=m_m)


@triton.jit(do_not_specialize=["batch"])
def hash_decode_step_kernel(
    q,
    k,
    v,
    projection,
    k_pool,
    v_pool,
    code_cache,
    size_cache,
    loc,
    planes,
    histogram,
    batch,
    q_token_stride,
    q_head_stride,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BDV: tl.constexpr,
    BITS: tl.constexpr,
    P: tl.constexpr,
    BINS: tl.constexpr,
    ONE_SIDED: tl.constexpr,
    OF_GROUP: tl.constexpr,
    BR: tl.constexpr,
    BG: tl.constexpr,
    BP: tl.constexpr,
    BW: tl.constexpr,
    STORE_KV: tl.constexpr,
    SIZED: tl.constexpr,
    PDL: tl.constexpr,
):
    """A tile holds BR requests of one KV head, BG rows each: the G queries, the new key, and nothing in the rest. A
    program projects one side of it, the keys or the queries: each has a projection of its own."""
    i_m = tl.program_id(0)
    i_h = tl.program_id(1)
    i_w = tl.program_id(2) // 2
    i_side = tl.program_id(2) % 2
    o_m = tl.arange(0, BR * BG)
    o_request = (i_m * BR + o_m // BG).to(tl.int64)
    o_g = o_m % BG
    o_d = tl.arange(0, BD)
    m_q = (o_request < batch) & (o_g < G) & (i_side == OF_QUERIES)
    m_k = (o_request < batch) & (o_g == G) & (i_side == OF_KEYS)
    m_d = (o_d < D)[None, :]
    o_bit = i_w * (BW * 32) + tl.arange(0, BW * 32)
    o_p = (i_side * H + i_h) * D + o_d
    b_p = tl.load(projection + o_p[:, None] * BITS + o_bit[None, :], mask=(o_d < D)[:, None], other=0)
    o_r = i_m * BR + tl.arange(0, BR)
    m_r = o_r < batch
    wait_for_previous(PDL)
    # All loads go out before anything waits for one: after a model's matrix products none finds its data in a cache.
    b_loc = tl.load(loc + o_r, mask=m_r & (i_side == OF_KEYS), other=0).to(tl.int64)
    if STORE_KV:
        m_store = m_k & (i_w == 0)
        b_row = tl.load(loc + o_request, mask=m_store, other=0).to(tl.int64) * H + i_h
        o_dv = tl.arange(0, BDV)
        m_v = m_store[:, None] & (o_dv < DV)[None, :]
        p_v = v + o_request * v_token_stride + i_h.to(tl.int64) * v_head_stride
        b_v = tl.load(p_v[:, None] + o_dv[None, :], mask=m_v, other=0.0)
    p_q = q + o_request * q_token_stride + (i_h * G + o_g).to(tl.int64) * q_head_stride
    p_k = k + o_request * k_token_stride + i_h.to(tl.int64) * k_head_stride
    b_q = tl.load(p_q[:, None] + o_d[None, :], mask=m_q[:, None] & m_d, other=0.0)
    b_k = tl.load(p_k[:, None] + o_d[None, :], mask=m_k[:, None] & m_d, other=0.0)
    b_p = here(b_p)
    b_x = tl.where(m_k[:, None], b_k, b_q).to(tl.float32)
    b_largest = tl.max(tl.abs(b_x), axis=1)
    exponent = OF_ROW
    if ONE_SIDED:
        b_largest = largest_of_group(b_largest, BR, BG)  # a key has its tile's rows to itself
        exponent = tl.where(i_side == OF_QUERIES, OF_GROUP, OF_ROW)
    b_lo, b_hi = integer_planes(b_x, b_largest, exponent)
    b_acc = tl.reshape(projected(b_lo, b_hi, b_p), [BR, BG, BW * 32])
    b_bit = (b_acc > 0).to(tl.int32)

    o_g = tl.arange(0, BG)[None, :, None]
    o_w = (i_w * BW + tl.arange(0, BW))[None, :]
    if i_side == OF_KEYS:
        b_key = pack(tl.sum(tl.where(o_g == G, b_bit, 0), axis=1), BR, BW)
        tl.store(code_cache + (b_loc * H + i_h)[:, None] * (BITS // 32) + o_w, b_key, mask=m_r[:, None])
        if SIZED:
            b_total = tl.sum(tl.sum(tl.where(o_g == G, tl.abs(b_acc) >> 8, 0), axis=1), axis=1)
            b_size = size_of(b_total, exponent_of(tl.max(tl.reshape(b_largest, [BR, BG]), axis=1)))
            tl.store(size_cache + b_loc * H + i_h, b_size, mask=m_r)
        if i_w == 0:
            p_bin = histogram + (o_r.to(tl.int64) * H + i_h)[:, None] * BINS + tl.arange(0, BINS)[None, :]
            tl.store(p_bin, tl.zeros([BR, BINS], tl.int32), mask=m_r[:, None])
        if STORE_KV:
            tl.store(k_pool + b_row[:, None] * D + o_d[None, :], b_k, mask=m_store[:, None] & m_d)
            tl.store(v_pool + b_row[:, None] * DV + o_dv[None, :], b_v, mask=m_v)
    else:
        if ONE_SIDED:
            b_weight = tl.sum(b_acc, axis=1)  # rows without a query are zero
            b_unit = (tl.max(tl.abs(b_weight), axis=1) >> 8)[:, None]
            b_magnitude = tl.zeros([BR, BW * 32], tl.int32)
            for i_step in tl.static_range(1, 1 << P):
                b_magnitude += (tl.abs(b_weight) >= b_unit * (((2 * i_step - 1) * 256 + 7) // 14)).to(tl.int32)
        else:
            b_weight = 2 * tl.sum(tl.where(o_g < G, b_bit, 0), axis=1) - G
            b_magnitude = tl.abs(b_weight) >> (1 - G % 2)
        b_digits = 2 * b_magnitude + ((b_weight > 0) & (b_magnitude > 0)).to(tl.int32)
        # All planes are packed at once: each time is a few barriers.
        o_plane = tl.arange(0, BP)[None, :, None]
        b_words = pack(tl.reshape((b_digits[:, None, :] >> o_plane) & 1, [BR * BP, BW * 32]), BR * BP, BW)
        o_row = tl.arange(0, BR * BP)
        o_to = (i_m * BR + o_row // BP).to(tl.int64)
        p_plane = planes + ((o_to * H + i_h) * (1 + P) + o_row % BP)[:, None] * (BITS // 32) + o_w
        tl.store(p_plane, b_words, mask=((o_to < batch) & (o_row % BP <= P))[:, None])


def check_projection(projection: Tensor, device: torch.device) -> tuple[int, int, int]:
    """H, D and bits of a projection; ValueError if the kernels do not know its shape."""
    check_tensor("projection", projection, (None, None, None), torch.int8, device)
    H, D, bits = projection.shape
    if D not in HEAD_DIMS or bits not in CODE_BITS:
        raise ValueError(
            f"projection: head dimension {D} and {bits} bits, expected one of {HEAD_DIMS} and one of {CODE_BITS}"
        )
    return H, D, bits


def hash_rows(
    x: Tensor, projection: Tensor, out: Tensor, loc: Tensor | None = None, sizes: Tensor | None = None
) -> Tensor:
    """Hash codes of keys (paper, Alg. 2), equal bit for bit to `reference.hash_codes`, and their sizes if asked for.

    Args:
        x: [N, H, D], bf16, fp16 or fp32, keys after RoPE. The last dimension is contiguous; the other strides are
            free, so a slice of a fused qkv is read in place.
        projection: [H, D, bits] int8; D one of HEAD_DIMS, bits one of CODE_BITS.
        out: [rows, H, bits / 32] int32, contiguous: the code cache of a layer, or a buffer of codes.
        loc: [N] int32 or int64: row i of ``x`` goes to ``out[loc[i]]``; to ``out[i]`` when None. Where two
            rows have the same loc, either may win (the dummy slot of padded rows).
        sizes: [rows, H] int16, contiguous: gets `reference.hash_sizes`, where ``out`` gets codes.

    Returns:
        ``out``.

    Raises:
        ValueError: on a shape, stride, dtype or device that the kernel would misread.
    """
    H, D, bits = check_projection(projection, x.device)
    check_tensor("x", x, (None, H, D), FLOAT_DTYPES, x.device, contiguous=False)
    N = x.shape[0]
    check_tensor("out", out, (None, H, bits // WORD_BITS), torch.int32, x.device)
    if loc is not None:
        check_tensor("loc", loc, (N,), INDEX_DTYPES, x.device)
    elif out.shape[0] < N:
        raise ValueError(f"out: {out.shape[0]} rows for {N} rows of x")
    if sizes is not None:
        check_tensor("sizes", sizes, (out.shape[0], H), torch.int16, x.device)
    if N == 0:
        return out

    x = aligned(x)
    BD = triton.next_power_of_2(D)
    BM = FEW_ROWS if N <= 4 * FEW_ROWS else MANY_ROWS
    hash_rows_kernel[(triton.cdiv(N, BM), H)](
        x,
        projection,
        out,
        out if sizes is None else sizes,
        out if loc is None else loc,
        N,
        x.stride(0),
        x.stride(1),
        H=H,
        D=D,
        BD=BD,
        BITS=bits,
        BM=BM,
        BB=min(bits, 128),
        HAS_LOC=loc is not None,
        SIZED=sizes is not None,
        num_warps=8 if BM == MANY_ROWS and BD == 256 else 4,
    )
    return out


def hash_decode_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    code_cache: Tensor,
    loc: Tensor,
    workspace: DecodeWorkspace,
    *,
    size_cache: Tensor | None = None,
    store_kv: bool = True,
) -> None:
    """Everything that a layer's decode step writes before it scores, in one launch: keys, values and codes of the new
    tokens into the cache, the planes of the queries, and zeros where scoring counts.

    Args:
        q, k, v: [B, G * H, D], [B, H, D] and [B, H, Dv], bf16, fp16 or fp32, the same dtype, after RoPE; last
            dimension contiguous.
        projection: [2, H, D, bits] int8, of `reference.KEYS` and of `reference.QUERIES`.
        k_pool, v_pool: [S, H, D] and [S, H, Dv], contiguous, the dtype of ``k``.
        code_cache: [S, H, bits / 32] int32, contiguous; row ``loc[b]`` gets the code of ``k[b]``.
        loc: [B] int32 or int64. Padded rows may share a dummy slot.
        workspace: gets ``planes``, equal to `reference.query_planes`, and a ``histogram`` of zeros.
        size_cache: [S, H] int16, contiguous; row ``loc[b]`` gets the size of ``k[b]``.
        store_kv: False where the pool is of another dtype and has been written already.

    Raises:
        ValueError: on a shape, stride, dtype or device that the kernel would misread.
    """
    check_tensor("projection", projection, (2, None, None, None), torch.int8, q.device)
    H, D, bits = check_projection(projection[KEYS], q.device)
    G = workspace.group
    check_tensor("q", q, (None, H * G, D), FLOAT_DTYPES, q.device, contiguous=False)
    B = q.shape[0]
    check_tensor("k", k, (B, H, D), q.dtype, q.device, contiguous=False)
    check_tensor("code_cache", code_cache, (None, H, bits // WORD_BITS), torch.int32, q.device)
    check_tensor("loc", loc, (B,), INDEX_DTYPES, q.device)
    check_tensor("workspace.planes", workspace.planes, (None, H, None, bits // WORD_BITS), torch.int32, q.device)
    if size_cache is not None:
        check_tensor("size_cache", size_cache, code_cache.shape[:2], torch.int16, q.device)
    if workspace.max_batch < B:
        raise ValueError(f"batch of {B}, workspace for {workspace.max_batch}")
    if store_kv:
        check_tensor("v", v, (B, H, None), q.dtype, q.device, contiguous=False)
        check_tensor("k_pool", k_pool, (code_cache.shape[0], H, D), q.dtype, q.device)
        check_tensor("v_pool", v_pool, (code_cache.shape[0], H, v.shape[2]), q.dtype, q.device)
    if B == 0:
        return

    q, k, v = aligned(q), aligned(k), aligned(v)
    BG = triton.next_power_of_2(G + 1)
    BR = max(1, FEW_ROWS // BG)
    one_sided = workspace.scoring == ONE_SIDED
    # A small batch is bound by latency: one word of bits a program spreads it over more multiprocessors. One-sided
    # weights are rounded by the largest of all bits, and sizes are summed over them.
    whole = one_sided or size_cache is not None
    BW = bits // WORD_BITS if whole else 1 if B * BG <= 4 * FEW_ROWS else min(bits, 128) // WORD_BITS
    BD = triton.next_power_of_2(D)
    hash_decode_step_kernel[(triton.cdiv(B, BR), H, 2 * (bits // WORD_BITS // BW))](
        q,
        k,
        v,
        projection,
        k_pool,
        v_pool,
        code_cache,
        code_cache if size_cache is None else size_cache,
        loc,
        workspace.planes,
        workspace.histogram,
        B,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        H=H,
        G=G,
        D=D,
        DV=v.shape[2],
        BD=BD,
        BDV=triton.next_power_of_2(v.shape[2]),
        BITS=bits,
        P=workspace.planes.shape[2] - 1,
        BINS=workspace.bins,
        ONE_SIDED=one_sided,
        OF_GROUP=group_exponent(G),
        BR=BR,
        BG=BG,
        BP=triton.next_power_of_2(workspace.planes.shape[2]),
        BW=BW,
        STORE_KV=store_kv,
        SIZED=size_cache is not None,
        PDL=overlaps_launches(q.device),
        launch_pdl=overlaps_launches(q.device),
        num_warps=8 if whole else 4,
    )
