"""Attend: softmax attention of each group of queries over its selected tokens, or over all. Specification:
`reference.attend`.

Each (request, KV head) has its own list of tokens, cut into chunks of equal size (`plan.plan_step`), one for each
program. A request that keeps everything has no list, and is served in the same launch.
The program that finishes a (request, KV head) last adds up its chunks, always in the same order, so equal inputs give
equal bits.
"""
# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from hata_kernels.launch import (
    FLOAT8_DTYPES,
    KV_DTYPES,
    check_tensor,
    dot,
    overlaps_launches,
    spreads_early,
    wait_for_previous,
)
from hata_kernels.workspace import FEW_REQUESTS, PIECE, SLOT_BITS, DecodeWorkspace

# Tokens whose keys and values a program loads at a time, up to head_dim 128, and its warps: over what is selected for
# few requests, for more, and over all tokens or lists that are not cut (`Grid.has_long_chunks`). Long chunks gain from
# large loads, short ones from an early first load. Few requests gain from few chunks, as adding them up is a fifth of
# their time.
FEW, SHORT, LONG = (128, 4), (64, 4), (128, 8)
# Of the loop: slots are loaded two rounds ahead, keys and values one. For few requests, four and two, which takes so
# much shared memory that a multiprocessor has room for one program (`launch.spreads_early`).
FEW_STAGES, STAGES = 5, 3
# Query rows of a tile: the fewest that tensor cores take.
MIN_ROWS = 16
# Chunks of a row that are added up at a time, for few requests and for more, whose rows have few chunks; and the most
# elements of them, 128 registers of each thread. One form a kernel: what is compiled into it takes registers from all
# programs, and instructions that are in no cache by the time a model's matrix products are done.
FEW_ADDED, ADDED = 16, 8
SUMMANDS = 128 * 32 * FEW[1]
BITS_OF_SLOT, SLOT_MASK = tl.constexpr(SLOT_BITS), tl.constexpr((1 << SLOT_BITS) - 1)
LOG2_E = 1.4426950408889634


@triton.jit
def add_up(
    out,
    partial,
    partial_lse,
    i_row,
    i_slot,
    n_chunks,
    G: tl.constexpr,
    DV: tl.constexpr,
    BG: tl.constexpr,
    BDV: tl.constexpr,
    BC: tl.constexpr,
):
    """Adds up a row's chunks, BC at a time. One thread has a few elements of all chunks, and nothing that it loads
    waits for what it computes: BC independent loads are on their way."""
    o_g = tl.arange(0, BG)
    o_dv = tl.arange(0, BDV)
    m_g = o_g < G
    m_x = m_g[:, None] & (o_dv < DV)[None, :]
    o_x = o_g[:, None] * DV + o_dv[None, :]
    b_most = tl.full([BG], -1e30, tl.float32)
    b_total = tl.zeros([BG], tl.float32)
    b_out = tl.zeros([BG, BDV], tl.float32)
    p_lse = partial_lse + i_slot * G + o_g
    p_part = partial + i_slot * G * DV + o_x
    for i_c in range(0, n_chunks, BC):
        b_lses = ()  # type: tuple
        b_parts = ()  # type: tuple
        for i_unrolled in tl.static_range(BC):
            m_c = i_c + i_unrolled < n_chunks
            b_lses += (tl.load(p_lse + i_unrolled * G, mask=m_c & m_g, other=-1e30),)
            b_parts += (tl.load(p_part + i_unrolled * G * DV, mask=m_c & m_x, other=0.0),)
        p_lse += BC * G
        p_part += BC * G * DV
        b_new = b_most
        for i_unrolled in tl.static_range(BC):
            b_new = tl.maximum(b_new, b_lses[i_unrolled])
        b_rescale = tl.exp2(b_most - b_new)
        b_total *= b_rescale
        b_out *= b_rescale[:, None]
        for i_unrolled in tl.static_range(BC):
            b_weight = tl.exp2(b_lses[i_unrolled] - b_new)
            b_total += b_weight
            b_out += b_weight[:, None] * b_parts[i_unrolled]
        b_most = b_new
    p_out = out + i_row * G * DV + o_x
    tl.store(p_out, (b_out / b_total[:, None]).to(out.dtype.element_ty), mask=m_x)


@triton.jit
def attend_kernel(
    q,
    k_pool,
    v_pool,
    out,
    slots,
    slot_table,
    chunks,
    partial,
    partial_lse,
    arrivals,
    k_factor,
    v_factor,
    q_token_stride,
    q_head_stride,
    table_stride,
    slot_stride,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BDV: tl.constexpr,
    BG: tl.constexpr,
    BM: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    PIECE: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    i_h = tl.program_id(0) % H
    p_chunk = chunks + tl.program_id(0) // H * PIECE
    i_b = tl.load(p_chunk).to(tl.int64)
    if i_b < 0:
        wait_for_previous(PDL)
        return
    i_table_row = tl.load(p_chunk + 1).to(tl.int64)
    start = tl.load(p_chunk + 2)
    end = tl.load(p_chunk + 3)
    selects = tl.load(p_chunk + 4) > 0
    i_first = tl.load(p_chunk + 5)
    i_chunk = tl.load(p_chunk + 6)
    n_chunks = tl.load(p_chunk + 7)
    i_row = i_b * H + i_h
    p_slot = tl.where(selects, slots + i_row * slot_stride, slot_table + i_table_row * table_stride)

    o_m = tl.arange(0, BM)
    o_d = tl.arange(0, BD)
    o_dv = tl.arange(0, BDV)
    p_q = q + i_b * q_token_stride + (i_h * G + o_m).to(tl.int64) * q_head_stride
    b_q = tl.load(p_q[:, None] + o_d[None, :], mask=(o_m < G)[:, None] & (o_d < D)[None, :], other=0.0)
    wait_for_previous(PDL)
    b_max = tl.full([BM], float("-inf"), tl.float32)
    b_sum = tl.zeros([BM], tl.float32)
    b_acc = tl.zeros([BM, BDV], tl.float32)
    for i_t in tl.range(start, end, BT, num_stages=STAGES):
        o_t = i_t + tl.arange(0, BT)
        m_t = o_t < end
        b_entry = tl.load(p_slot + o_t, mask=m_t, other=0)
        b_slot = (b_entry & SLOT_MASK).to(tl.int64)
        p_k = k_pool + (b_slot * (H * D) + i_h * D)[:, None] + o_d[None, :]
        b_k = tl.load(p_k, mask=m_t[:, None] & (o_d < D)[None, :], other=0.0)
        p_v = v_pool + (b_slot * (H * DV) + i_h * DV)[:, None] + o_dv[None, :]
        b_v = tl.load(p_v, mask=m_t[:, None] & (o_dv < DV)[None, :], other=0.0)
        # Powers of two throughout, so a doubling adds 1.
        b_score = dot(b_q, tl.trans(b_k.to(b_q.dtype))) * k_factor + (b_entry >> BITS_OF_SLOT).to(tl.float32)[None, :]
        b_score = tl.where(m_t[None, :], b_score, float("-inf"))
        b_new_max = tl.maximum(b_max, tl.max(b_score, axis=1))
        b_weight = tl.exp2(b_score - b_new_max[:, None])
        b_rescale = tl.exp2(b_max - b_new_max)
        b_sum = b_sum * b_rescale + tl.sum(b_weight, axis=1)
        b_acc = b_acc * b_rescale[:, None] + dot(b_weight.to(b_q.dtype), b_v.to(b_q.dtype))
        b_max = b_new_max
    b_acc = b_acc / b_sum[:, None] * v_factor

    m_out = (o_m < G)[:, None] & (o_dv < DV)[None, :]
    p_out = out + (i_row * G + o_m)[:, None] * DV + o_dv[None, :]
    if n_chunks == 1:
        tl.store(p_out, b_acc.to(out.dtype.element_ty), mask=m_out)
        return
    i_slot = (i_first * H + i_h * n_chunks).to(tl.int64)
    i_own = i_slot + i_chunk
    tl.store(partial + (i_own * G + o_m)[:, None] * DV + o_dv[None, :], b_acc, mask=m_out)
    tl.store(partial_lse + i_own * G + o_m, b_max + tl.log2(b_sum), mask=o_m < G)
    tl.debug_barrier()
    arrived = tl.atomic_add(arrivals + i_row, 1, sem="acq_rel")
    if arrived < n_chunks - 1:
        return
    tl.debug_barrier()
    tl.store(arrivals + i_row, 0)

    add_up(out, partial, partial_lse, i_row, i_slot, n_chunks, G, DV, BG, BDV, BC)


def attend(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    slot_table: Tensor,
    workspace: DecodeWorkspace,
    scale: float,
    out: Tensor | None = None,
    *,
    everything: bool = False,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> Tensor:
    """Attention of one layer over the tokens selected for it, over all tokens of requests that keep everything.

    Args:
        q: [B, Hq, D], bf16 or fp16; last dimension contiguous.
        k_pool, v_pool: [S, H, D] and [S, H, Dv], contiguous, the dtype of ``q``, or fp8.
        slot_table: [requests, max_context] int32, rows contiguous.
        workspace: planned for B requests, with the selected tokens in ``slots``. Neither the plan nor ``q`` may be
            what the very launch before this one writes, as they are read before its end.
        scale: multiplies q . k, usually D ** -0.5.
        out: [B, Hq, Dv], contiguous; allocated when None.
        everything: attend to all tokens of all requests.
        k_scale, v_scale: what fp8 keys and values are multiplied by.

    Returns:
        ``out``.

    Raises:
        ValueError: on a shape, stride, dtype or device that the kernel would misread.
    """
    device, H, G = workspace.device, workspace.kv_heads, workspace.group
    check_tensor("q", q, (None, H * G, None), KV_DTYPES, device, contiguous=False)
    B, _, D = q.shape
    check_tensor("k_pool", k_pool, (None, H, D), (q.dtype, *FLOAT8_DTYPES), device)
    DV = workspace.partial.shape[2]
    check_tensor("v_pool", v_pool, (k_pool.shape[0], H, DV), k_pool.dtype, device)
    check_tensor("slot_table", slot_table, (None, None), torch.int32, device, contiguous=False)
    if out is None:
        out = torch.empty((B, H * G, DV), dtype=q.dtype, device=device)
    else:
        check_tensor("out", out, (B, H * G, DV), q.dtype, device)
    if B == 0:
        return out
    BG, BDV = triton.next_power_of_2(G), triton.next_power_of_2(DV)
    few = B <= FEW_REQUESTS and not everything
    long = everything or (not few and workspace.grid.has_long_chunks(H, B))
    block, warps = LONG if long else FEW if few else SHORT
    attend_kernel[(workspace.pieces(B)[2 if everything else 1] * H,)](
        q,
        k_pool,
        v_pool,
        out,
        workspace.slots,
        slot_table,
        workspace.all_chunks if everything else workspace.chunks,
        workspace.partial,
        workspace.partial_lse,
        workspace.arrivals,
        scale * k_scale * LOG2_E,
        v_scale,
        q.stride(0),
        q.stride(1),
        slot_table.stride(0),
        workspace.max_kept,
        H=H,
        G=G,
        D=D,
        DV=DV,
        BD=triton.next_power_of_2(D),
        BDV=BDV,
        BG=BG,
        BM=max(MIN_ROWS, BG),
        BT=block if D <= 128 else block // 2,
        BC=max(ADDED, min(FEW_ADDED, SUMMANDS // (BG * BDV))) if few else ADDED,
        PIECE=PIECE,
        STAGES=FEW_STAGES if few and spreads_early(device) else STAGES,
        PDL=overlaps_launches(device),
        launch_pdl=overlaps_launches(device),
        num_warps=warps,
    )
    return out
