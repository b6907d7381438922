"""Plan: how many tokens each request attends to, and how the work is cut. Once a step, for all layers.

Specification: `reference.Budget.plan`. The lengths of the contexts are on the device, and a CUDA graph replays one
grid for all of them. So each kernel of a step has a fixed number of programs, and this kernel says what each does:
an equal number of tokens, whichever requests they belong to. A batch of one long and many short requests keeps all
multiprocessors as busy as a batch of equals.

    share   consecutive tokens of one request, scored by one program, compacted by one for each KV head
    chunk   selected tokens of one request, attended to by one program for each KV head

Chunks are cut twice: of the selected tokens, and of all tokens, for the layers that attend to everything.

A piece of work is a row of eight numbers, so that a program knows all about it after one load. The first number is the
request, or -1: no work, and nothing between its start and its end.
"""
# mypy: allow-untyped-defs

import triton
import triton.language as tl
from torch import Tensor

from hata_kernels.launch import INDEX_DTYPES, check_tensor
from hata_kernels.reference import Budget
from hata_kernels.workspace import PIECE, DecodeWorkspace

PPM = tl.constexpr(1_000_000)
# A program of this kernel describes as many pieces as make such a matrix with the requests, and at least the fewest.
MATRIX, FEWEST = 1024, 16
# Blocks of a share that are enough for one program. Only where there are more is the work cut into more shares, up to
# `Shares.many`: each costs the launches after it some time.
FULL_SHARE_BLOCKS = 8


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


@triton.jit
def evenly(tokens, pieces, block):
    """Tokens of each of ``pieces`` pieces, a multiple of ``block``."""
    return tl.maximum(tl.cdiv(tl.cdiv(tokens, tl.maximum(pieces, 1)), block), 1) * block


@triton.jit
def pieces_of(b_tokens, heads, batch, few, many, full, block, most):
    """How many pieces each request is cut into, of at most ``most`` tokens.

    Pieces times heads make about ``few``; up to ``many`` where pieces would have more than ``full`` tokens. A request
    has as many as its part of all tokens is worth, rounded down: a program too many would wait for another to end."""
    total = tl.sum(b_tokens, axis=0) * heads
    wanted = tl.cdiv(total, tl.maximum(many - batch * heads, few))
    wanted = tl.maximum(wanted, tl.minimum(tl.cdiv(total, few), full))
    b_pieces = tl.maximum(b_tokens // tl.maximum(wanted, 1), tl.cdiv(b_tokens, most))
    return tl.cdiv(b_tokens, evenly(b_tokens, b_pieces, block)).to(tl.int32)


SETTINGS = ("tokens", "share_ppm", "floor", "min_context", "attend", "score", "fixed")


@triton.jit(do_not_specialize=["batch", "n_shares", "n_chunks", "n_all_chunks", *SETTINGS])
def plan_kernel(
    seq_lens,
    req_rows,
    kept,
    shares,
    chunks,
    all_chunks,
    batch,
    n_shares,
    n_chunks,
    n_all_chunks,
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
    FEW_SHARES: tl.constexpr,
    MANY_SHARES: tl.constexpr,
    FULL_SHARE: tl.constexpr,
    SHARE_BLOCK: tl.constexpr,
    MAX_SHARE: tl.constexpr,
    CHUNKS: tl.constexpr,
    ALL_CHUNKS: tl.constexpr,
    CHUNK_BLOCK: tl.constexpr,
    PIECE: tl.constexpr,
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

    # One of the three lists: shares, chunks, or chunks of all tokens.
    i_list = tl.program_id(1)
    b_tokens = tl.where(i_list == 0, b_scored, tl.where(i_list == 1, b_kept, b_length))
    heads = tl.where(i_list == 0, 1, H)
    chunks_wanted = tl.where(i_list == 1, CHUNKS, ALL_CHUNKS)
    few = tl.where(i_list == 0, FEW_SHARES, chunks_wanted)
    many = tl.where(i_list == 0, MANY_SHARES, chunks_wanted)
    block = tl.where(i_list == 0, SHARE_BLOCK, CHUNK_BLOCK)
    most = tl.where(i_list == 0, MAX_SHARE, 1 << 30)
    b_pieces = pieces_of(b_tokens, heads, batch, few, many, FULL_SHARE, block, most)
    if (i_list == 0) & (tl.program_id(0) == 0):
        tl.store(kept + o_b, b_kept.to(tl.int32), mask=m_b)

    o_item = tl.program_id(0) * BI + tl.arange(0, BI)
    b_request, b_number, b_first, m_one = piece_of(o_item, b_pieces, o_b)
    b_tokens = of_request(m_one, b_tokens.to(tl.int32))
    b_pieces = of_request(m_one, b_pieces)
    b_size = evenly(b_tokens, b_pieces, block)
    b_selects = of_request(m_one, (b_selects & (i_list == 1)).to(tl.int32))
    if i_list == 0:
        p_piece = shares
    elif i_list == 1:
        p_piece = chunks
    else:
        p_piece = all_chunks
    p_piece += o_item * PIECE
    m_item = o_item < tl.where(i_list == 0, n_shares, tl.where(i_list == 1, n_chunks, n_all_chunks))
    tl.store(p_piece, b_request, mask=m_item)
    tl.store(p_piece + 1, of_request(m_one, b_row), mask=m_item)
    tl.store(p_piece + 2, b_number * b_size, mask=m_item)
    tl.store(p_piece + 3, tl.minimum((b_number + 1) * b_size, b_tokens), mask=m_item)
    tl.store(p_piece + 4, tl.where(i_list == 0, b_tokens, b_selects), mask=m_item)
    tl.store(p_piece + 5, b_first, mask=m_item)
    tl.store(p_piece + 6, b_number, mask=m_item)
    # A request's pieces; of a share, what is kept of its request: selection has it with the rest, after one load.
    tl.store(p_piece + 7, tl.where(i_list == 0, of_request(m_one, b_kept.to(tl.int32)), b_pieces), mask=m_item)


def plan_step(seq_lens: Tensor, req_rows: Tensor, workspace: DecodeWorkspace, budget: Budget) -> None:
    """Decide what each request of a batch attends to, and cut the work; one launch, no host synchronisation.

    Args:
        seq_lens: [B] int32 or int64: cached tokens of each request, the current one included; at least 1, at most
            the workspace's max_context. 1 for a padded row.
        req_rows: [B] int32 or int64: the row of the slot table of each request.
        workspace: gets ``kept``, ``shares``, ``chunks`` and ``all_chunks``.

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
    costs, grid, shares = budget.costs, workspace.grid, workspace.grid.shares(B)
    n_shares, n_chunks, n_all_chunks = workspace.pieces(B)
    BB = workspace.batch_block(B)
    BI = max(FEWEST, MATRIX // BB)
    plan_kernel[(triton.cdiv(max(n_shares, n_chunks, n_all_chunks), BI), 3)](
        seq_lens,
        req_rows,
        workspace.kept,
        workspace.shares,
        workspace.chunks,
        workspace.all_chunks,
        B,
        n_shares,
        n_chunks,
        n_all_chunks,
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
        FEW_SHARES=shares.few,
        MANY_SHARES=shares.many,
        FULL_SHARE=FULL_SHARE_BLOCKS * shares.block,
        SHARE_BLOCK=shares.block,
        MAX_SHARE=shares.longest,
        CHUNKS=grid.selected_chunks(workspace.kv_heads, B),
        ALL_CHUNKS=grid.chunks,
        CHUNK_BLOCK=grid.min_chunk(B),
        PIECE=PIECE,
        HAS_COSTS=costs is not None,
        num_warps=4,
    )
