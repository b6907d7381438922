"""Plan: how many tokens each request attends to, and how the work is cut. Once a step, for all layers.

Specification: `reference.Budget.plan`. The lengths of the contexts are on the device, and a CUDA graph replays one
grid for all of them. So each kernel of a step has a fixed number of programs, and this kernel says what each does:
an equal number of tokens, whichever requests they belong to. A batch of one long and many short requests keeps all
multiprocessors as busy as a batch of equals.

    share   consecutive tokens of one request, scored by one program, compacted by one for each KV head
    chunk   selected tokens of one request, attended to by one program for each KV head

A piece of work is a row of eight numbers, so that a program knows all about it after one load. The first number is the
request, or -1: no work, and nothing between its start and its end.
"""
# mypy: allow-untyped-defs

import triton
import triton.language as tl
from torch import Tensor

from hata_kernels.launch import INDEX_DTYPES, check_tensor
from hata_kernels.reference import Budget
from hata_kernels.workspace import MIN_CHUNK, PIECE, REQUEST, DecodeWorkspace

PPM = tl.constexpr(1_000_000)
# A program of this kernel describes as many pieces as make such a matrix with the requests, and at least the fewest.
MATRIX, FEWEST = 1024, 16


@triton.jit
def piece_of(o_item, b_pieces, o_b):
    """For each item: its request (-1 if there is none), its number in it, and the request's row of a one-hot matrix."""
    b_end = tl.cumsum(b_pieces, axis=0)
    b_request = tl.sum((b_end[None, :] <= o_item[:, None]).to(tl.int32), axis=1)
    m_one = b_request[:, None] == o_b[None, :]
    b_first = tl.sum(tl.where(m_one, (b_end - b_pieces)[None, :], 0), axis=1)
    m_item = o_item < tl.sum(b_pieces, axis=0)
    return tl.where(m_item, b_request, -1), o_item - b_first, b_first, m_one


@triton.jit
def of_request(m_one, b_x):
    """The element of ``b_x`` that belongs to the request of each item."""
    return tl.sum(tl.where(m_one, b_x[None, :], 0), axis=1)


SETTINGS = ("tokens", "share_ppm", "floor", "min_context", "attend", "score", "fixed")


@triton.jit(do_not_specialize=["batch", "n_shares", "n_chunks", *SETTINGS])
def plan_kernel(
    seq_lens,
    req_rows,
    kept,
    requests,
    shares,
    chunks,
    batch,
    n_shares,
    n_chunks,
    tokens,
    share_ppm,
    floor,
    min_context,
    attend,
    score,
    fixed,
    H: tl.constexpr,
    BB: tl.constexpr,
    BI: tl.constexpr,
    SHARES: tl.constexpr,
    SHARE_BLOCK: tl.constexpr,
    MAX_SHARE: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK_BLOCK: tl.constexpr,
    PIECE: tl.constexpr,
    REQUEST: tl.constexpr,
    HAS_COSTS: tl.constexpr,
):
    o_b = tl.arange(0, BB)
    m_b = o_b < batch
    b_length = tl.load(seq_lens + o_b, mask=m_b, other=0).to(tl.int64)
    b_row = tl.load(req_rows + o_b, mask=m_b, other=0).to(tl.int32)
    b_share = (b_length * share_ppm + PPM - 1) // PPM
    b_kept = tl.minimum(b_length, tl.maximum(b_share, tl.maximum(tokens, floor).to(tl.int64)))
    b_kept = tl.where(b_length <= min_context, b_length, b_kept)
    if HAS_COSTS:
        b_saved = tl.maximum((b_length - b_kept) * attend - b_length * score, 0)
        b_kept = tl.where((b_saved > 0) & (tl.sum(b_saved, axis=0) > fixed), b_kept, b_length)
    b_selects = b_kept < b_length
    b_scored = tl.where(b_selects, b_length, 0)
    share = tl.cdiv(tl.sum(b_scored, axis=0), tl.maximum(SHARES - batch, SHARES // 4 + 1))
    share = tl.minimum(tl.maximum(tl.cdiv(share, SHARE_BLOCK), 1) * SHARE_BLOCK, MAX_SHARE).to(tl.int32)
    chunk = tl.cdiv(tl.sum(b_kept, axis=0) * H, CHUNKS)
    chunk = (tl.maximum(tl.cdiv(chunk, CHUNK_BLOCK), 1) * CHUNK_BLOCK).to(tl.int32)
    b_length, b_kept, b_scored = b_length.to(tl.int32), b_kept.to(tl.int32), b_scored.to(tl.int32)
    b_shares = tl.cdiv(b_scored, share)
    b_last = tl.cumsum(b_shares, axis=0)
    if tl.program_id(0) == 0:
        tl.store(kept + o_b, b_kept, mask=m_b)
        tl.store(requests + o_b * REQUEST, b_kept, mask=m_b)
        tl.store(requests + o_b * REQUEST + 1, b_last - b_shares, mask=m_b)
        tl.store(requests + o_b * REQUEST + 2, b_last, mask=m_b)

    o_item = tl.program_id(0) * BI + tl.arange(0, BI)
    b_request, b_number, _, m_one = piece_of(o_item, b_shares, o_b)
    b_end = of_request(m_one, b_length)
    p_share, m_share = shares + o_item * PIECE, o_item < n_shares
    tl.store(p_share, b_request, mask=m_share)
    tl.store(p_share + 1, of_request(m_one, b_row), mask=m_share)
    tl.store(p_share + 2, b_number * share, mask=m_share)
    tl.store(p_share + 3, tl.minimum((b_number + 1) * share, b_end), mask=m_share)
    tl.store(p_share + 4, b_end, mask=m_share)

    b_chunks = tl.cdiv(b_kept, chunk)
    b_request, b_number, b_first, m_one = piece_of(o_item, b_chunks, o_b)
    p_chunk, m_chunk = chunks + o_item * PIECE, o_item < n_chunks
    tl.store(p_chunk, b_request, mask=m_chunk)
    tl.store(p_chunk + 1, of_request(m_one, b_row), mask=m_chunk)
    tl.store(p_chunk + 2, b_number * chunk, mask=m_chunk)
    tl.store(p_chunk + 3, tl.minimum((b_number + 1) * chunk, of_request(m_one, b_kept)), mask=m_chunk)
    tl.store(p_chunk + 4, of_request(m_one, b_selects.to(tl.int32)), mask=m_chunk)
    tl.store(p_chunk + 5, b_first, mask=m_chunk)
    tl.store(p_chunk + 6, b_number, mask=m_chunk)
    tl.store(p_chunk + 7, of_request(m_one, b_chunks), mask=m_chunk)


def plan_step(seq_lens: Tensor, req_rows: Tensor, workspace: DecodeWorkspace, budget: Budget) -> None:
    """Decide what each request of a batch attends to, and cut the work; one launch, no host synchronisation.

    Args:
        seq_lens: [B] int32 or int64: cached tokens of each request, the current one included; at least 1, at most
            the workspace's max_context. 1 for a padded row.
        req_rows: [B] int32 or int64: the row of the slot table of each request.
        workspace: gets ``kept``, ``requests``, ``shares`` and ``chunks``.

    Raises:
        ValueError: on a batch or a budget that the workspace has no room for.
    """
    check_tensor("seq_lens", seq_lens, (None,), INDEX_DTYPES, workspace.device)
    B = seq_lens.shape[0]
    check_tensor("req_rows", req_rows, (B,), INDEX_DTYPES, workspace.device)
    if workspace.max_batch < B:
        raise ValueError(f"batch of {B}, workspace for {workspace.max_batch}")
    if budget.largest(workspace.max_context) > workspace.max_kept:
        raise ValueError(
            f"{budget} selects up to {budget.largest(workspace.max_context)} tokens of {workspace.max_context},"
            f" workspace for {workspace.max_kept}"
        )
    if B == 0:
        return
    costs, grid = budget.costs, workspace.grid
    n_shares, n_chunks = workspace.pieces(B)
    BB = workspace.batch_block(B)
    BI = max(FEWEST, MATRIX // BB)
    plan_kernel[(triton.cdiv(max(n_shares, n_chunks), BI),)](
        seq_lens,
        req_rows,
        workspace.kept,
        workspace.requests,
        workspace.shares,
        workspace.chunks,
        B,
        n_shares,
        n_chunks,
        budget.tokens,
        budget.share_ppm,
        budget.floor,
        budget.min_context,
        costs.attend if costs else 0,
        costs.score if costs else 0,
        costs.fixed if costs else 0,
        H=workspace.kv_heads,
        BB=BB,
        BI=BI,
        SHARES=grid.shares,
        SHARE_BLOCK=grid.share_block,
        MAX_SHARE=grid.max_share,
        CHUNKS=grid.chunks,
        CHUNK_BLOCK=MIN_CHUNK,
        PIECE=PIECE,
        REQUEST=REQUEST,
        HAS_COSTS=costs is not None,
        num_warps=4,
    )
