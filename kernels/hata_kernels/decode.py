"""One decode step of one layer: hash, score, select, attend. Specification: `reference.hata_decode`."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from hata_kernels.encode import hash_decode_step
from hata_kernels.score import score_and_count
from hata_kernels.topk import select_slots
from hata_kernels.workspace import DecodeWorkspace


class Attention(Protocol):
    """Attention over the rows in a workspace's indices; `attend.SparseDecode`."""

    def run(self, q: Tensor, k_pool: Tensor, v_pool: Tensor, scale: float, out: Tensor | None = None) -> Tensor: ...


def select_tokens(
    q: Tensor,
    k: Tensor,
    code_cache: Tensor,
    projection: Tensor,
    slot_table: Tensor,
    req_rows: Tensor,
    seq_lens: Tensor,
    k_lens: Tensor,
    loc: Tensor,
    workspace: DecodeWorkspace,
    *,
    sink: int,
    recent: int,
) -> None:
    """Hash the step's keys and queries, score all cached tokens, write the selected ones into the workspace.

    Arguments as for `hata_decode_step`. Four launches, no host synchronisation, no allocation.

    Raises:
        ValueError: on tensors that do not fit one another or the workspace.
    """
    B = q.shape[0]
    if workspace.max_batch < B:
        raise ValueError(f"batch of {B}, workspace for {workspace.max_batch}")
    q_codes, ranks, histogram = workspace.q_codes[:B], workspace.ranks[:B], workspace.histogram[:B]
    hash_decode_step(q, k, projection, code_cache, loc, q_codes, histogram)
    score_and_count(
        q_codes,
        code_cache,
        slot_table,
        req_rows,
        seq_lens,
        ranks,
        histogram,
        sink=sink,
        recent=recent,
        k_lens=k_lens,
    )
    select_slots(
        ranks,
        histogram,
        k_lens,
        workspace.indptr,
        seq_lens,
        slot_table,
        req_rows,
        workspace.indices,
        thresholds=workspace.thresholds,
        counts=workspace.counts,
    )


def hata_decode_step(
    q: Tensor,
    k: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    code_cache: Tensor,
    projection: Tensor,
    slot_table: Tensor,
    req_rows: Tensor,
    seq_lens: Tensor,
    k_lens: Tensor,
    loc: Tensor,
    workspace: DecodeWorkspace,
    attention: Attention,
    *,
    sink: int,
    recent: int,
    scale: float,
    out: Tensor | None = None,
) -> Tensor:
    """One decode step of one layer.

    The step must be planned: ``attention.plan`` with the host's copy of ``k_lens``.

    Args:
        q, k: [B, Hq, D] and [B, H, D], bf16 or fp16, after RoPE; last dimension contiguous.
        k_pool, v_pool: [S, H, D] and [S, H, Dv], contiguous; the step's own keys and values are in them
            already.
        code_cache: [S, H, W] int32, contiguous; the codes of the step's keys are written into it.
        projection: [H, D, bits] int8.
        slot_table: [requests, max_context] int32: the slot of each position (SGLang's req_to_token).
        req_rows: [B] int32 or int64: the row of ``slot_table`` of each request.
        seq_lens: [B] int32 or int64: cached tokens, the current one included, last. Not above the workspace's
            max_context.
        k_lens: [B] int32 or int64 on the device: tokens each KV head attends to, 1 <= k_lens <= seq_lens.
        loc: [B] int32 or int64: the slots of the step's keys.
        sink, recent: the first and last tokens that are always among those.
        scale: multiplies q . k, usually D ** -0.5.

    Padded rows have seq_lens and k_lens of 1 and any valid row and slot.

    Returns:
        [B, Hq, Dv], ``out`` if given.

    Raises:
        ValueError: on tensors that do not fit one another, the workspace or the plan.
    """
    select_tokens(
        q,
        k,
        code_cache,
        projection,
        slot_table,
        req_rows,
        seq_lens,
        k_lens,
        loc,
        workspace,
        sink=sink,
        recent=recent,
    )
    return attention.run(q, k_pool, v_pool, scale, out)
