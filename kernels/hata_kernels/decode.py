"""One decode step of one layer: hash, score, select, attend. Specification: `reference.hata_decode`."""

from __future__ import annotations

from torch import Tensor

from hata_kernels.attend import attend
from hata_kernels.encode import hash_decode_step
from hata_kernels.score import score_and_count
from hata_kernels.topk import select_slots
from hata_kernels.workspace import SLOT_BITS, DecodeWorkspace


def hata_decode_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    code_cache: Tensor,
    projection: Tensor,
    slot_table: Tensor,
    loc: Tensor,
    workspace: DecodeWorkspace,
    *,
    sink: int,
    recent: int,
    scale: float,
    layer: int = 0,
    out: Tensor | None = None,
    size_cache: Tensor | None = None,
    store_kv: bool = True,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> Tensor:
    """One decode step of one layer, in four launches, with no word from the host: fit for a CUDA graph.

    The step must be planned, once for all layers, with the lengths and the rows of ``slot_table`` of its requests:
    `plan.plan_step`.

    Args:
        q, k, v: [B, Hq, D], [B, H, D] and [B, H, Dv], bf16 or fp16, after RoPE; last dimension contiguous.
        k_pool, v_pool: [S, H, D] and [S, H, Dv], contiguous; the step's keys and values are written into them.
        code_cache: [S, H, W] int32, contiguous; the codes of the step's keys are written into it.
        projection: [2, H, D, bits] int8, of keys and of queries.
        slot_table: [requests, max_context] int32: the slot of each position (SGLang's req_to_token).
        loc: [B] int32 or int64: the slots of the step's keys.
        sink, recent: the first and last tokens that are always selected.
        scale: multiplies q . k, usually D ** -0.5.
        layer: a number below 2^31; the luck of tokens is another in each layer (`reference.luck`).
        size_cache: [S, H] int16, contiguous, the keys' sizes, to stretch distances by (`reference.stretch`); those of
            the step's keys are written into it.
        store_kv: False where the step's keys and values are in the pools already; fp8 pools must be.
        k_scale, v_scale: what fp8 keys and values are multiplied by.

    Padded rows are planned with seq_lens of 1 and any valid row of the slot table, and have any valid slot.

    Returns:
        [B, Hq, Dv], ``out`` if given.

    Raises:
        ValueError: on tensors that do not fit one another or the workspace.
    """
    if len(code_cache) > 1 << SLOT_BITS:
        raise ValueError(f"{len(code_cache)} slots: expected at most {1 << SLOT_BITS}")
    pools = k_pool, v_pool, code_cache
    hash_decode_step(q, k, v, projection, *pools, loc, workspace, size_cache=size_cache, store_kv=store_kv)
    batch = q.shape[0]
    score_and_count(
        code_cache, slot_table, workspace, batch, sink=sink, recent=recent, layer=layer, size_cache=size_cache
    )
    select_slots(slot_table, workspace, batch, layer)
    return attend(q, k_pool, v_pool, slot_table, workspace, scale, out, k_scale=k_scale, v_scale=v_scale)
