"""What a decode step costs on the GPU at hand, with and without selection: `reference.Costs`.

Both times are straight lines over the context: attention reads keys and values of what it attends to, scoring reads
codes of all, and a step that selects pays for its launches once. Two contexts give each line.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hata_kernels.decode import hata_decode_step
from hata_kernels.plan import plan_step
from hata_kernels.reference import WORD_BITS, Budget, Costs
from hata_kernels.workspace import DecodeWorkspace

# Tokens of the longer of the two contexts, how many times shorter the other is, and tokens selected of either.
LONGEST, RATIO, SELECTED = 65_536, 4, 256
MAX_LAYERS = 8  # enough that each finds the caches cold
REPLAYS = 9


def measure_costs(
    k_pools: Sequence[Tensor],
    v_pools: Sequence[Tensor],
    code_caches: Sequence[Tensor],
    projections: Sequence[Tensor],
    *,
    q_heads: int,
    dtype: torch.dtype,
    max_context: int,
    scoring: str,
) -> Costs | None:
    """Times a step of one request over some layers; half a second, and some seconds when kernels must be compiled.

    Args:
        k_pools, v_pools, code_caches: of some layers, [S, H, D] and [S, H, W]. Slot 0 is written, the others are read.
        projections: of the same layers, [H, D, bits] int8.
        q_heads: query heads.
        dtype: of the queries.
        max_context: the longest context.
        scoring: `reference.HAMMING` or `reference.ONE_SIDED`.

    Returns:
        None if the pool is too small to tell.
    """
    slots, H, D = k_pools[0].shape
    longest = min(LONGEST, max_context, slots - 1)
    if longest < RATIO * 2 * SELECTED:
        return None
    device = k_pools[0].device
    layers = list(zip(k_pools, v_pools, code_caches, projections, strict=True))[:MAX_LAYERS]
    q, k, v = (torch.randn(1, heads, D, dtype=dtype, device=device) for heads in (q_heads, H, H))
    quantised = k_pools[0].dtype != dtype
    slot_table = torch.arange(1, longest + 1, dtype=torch.int32, device=device).unsqueeze(0)
    row = torch.zeros(1, dtype=torch.int64, device=device)
    room = DecodeWorkspace.allocate(
        max_batch=1,
        q_heads=q_heads,
        kv_heads=H,
        head_dim=D,
        bits=code_caches[0].shape[2] * WORD_BITS,
        max_context=longest,
        max_kept=longest,
        device=device,
        scoring=scoring,
    )

    def picoseconds(length: int, kept: int) -> float:
        """Of one layer."""
        plan_step(torch.tensor([length], device=device), row, room, Budget(tokens=kept))

        def step() -> None:
            for k_pool, v_pool, codes, projection in layers:
                pools = k_pool, v_pool, codes, projection, slot_table, row
                hata_decode_step(q, k, v, *pools, room, sink=0, recent=1, scale=D**-0.5, store_kv=not quantised)

        return _median_seconds(step) / len(layers) * 1e12

    short = longest // RATIO
    dense_short, dense_long = (picoseconds(length, length) for length in (short, longest))
    sparse_short, sparse_long = (picoseconds(length, SELECTED) for length in (short, longest))
    attend = max((dense_long - dense_short) / (longest - short), 0)
    score = max((sparse_long - sparse_short) / (longest - short), 0)
    launches = dense_short - short * attend  # paid by every step
    fixed = max(sparse_short - launches - short * score - SELECTED * attend, 0)
    return Costs(attend=round(attend), score=round(score), fixed=round(fixed))


def _median_seconds(step: Callable[[], None]) -> float:

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    seconds = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return statistics.median(seconds)
