"""What a decode step costs on the GPU at hand, with and without selection: `reference.Costs`.

For long contexts both times are straight lines: attention reads keys and values of what it attends to, scoring reads
codes of all, and a step that selects pays for its longer chain of launches once. Short contexts are bound by latency,
and there selection must not be chosen for a saving that the lines promise and the GPU does not keep: the fixed cost is
the least with which they promise no more than was measured, at any length.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from hata_kernels.decode import hata_decode_step
from hata_kernels.plan import plan_step
from hata_kernels.reference import WORD_BITS, Budget, Costs
from hata_kernels.workspace import DecodeWorkspace

# Tokens of the longest context, and how many are selected; how many contexts, each half as long as the one before.
LONGEST, SELECTED, HALVINGS = 65_536, 256, 7
MIN_LENGTHS = 3
MAX_LAYERS = 8  # enough that each finds the caches cold
REPLAYS = 9


def measure_costs(
    k_pools: Sequence[Tensor],
    v_pools: Sequence[Tensor],
    code_caches: Sequence[Tensor],
    projections: Sequence[Tensor],
    size_caches: Sequence[Tensor | None],
    *,
    q_heads: int,
    dtype: torch.dtype,
    max_context: int,
    scoring: str,
    selection: str,
) -> Costs | None:
    """Times a step of one request over some layers; half a second, and some seconds when kernels must be compiled.

    Args:
        k_pools, v_pools, code_caches: of some layers, [S, H, D] and [S, H, W]. Slot 0 is written, the others are read.
        projections: of the same layers, [2, H, D, bits] int8.
        size_caches: of the same layers, [S, H] int16, or None where keys have no sizes.
        q_heads: query heads.
        dtype: of the queries.
        max_context: the longest context.
        scoring: `reference.HAMMING` or `reference.ONE_SIDED`.
        selection: `reference.SAMPLED` or `reference.TOP`.

    Returns:
        None if the pool is too small to tell.
    """
    slots, H, D = k_pools[0].shape
    longest = min(LONGEST, max_context, slots - 1)
    lengths = [longest >> i for i in range(HALVINGS) if longest >> i >= 2 * SELECTED]
    if len(lengths) < MIN_LENGTHS:
        return None
    device = k_pools[0].device
    layers = list(zip(k_pools, v_pools, code_caches, projections, size_caches, strict=True))[:MAX_LAYERS]
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
        selection=selection,
    )

    def picoseconds(length: int, kept: int) -> float:
        """Of one layer."""
        plan_step(torch.tensor([length], device=device), row, room, Budget(tokens=kept))

        def step() -> None:
            for k_pool, v_pool, codes, projection, sizes in layers:
                tensors = q, k, v, k_pool, v_pool, codes, projection, slot_table, row
                hata_decode_step(
                    *tensors, room, sink=0, recent=1, scale=D**-0.5, size_cache=sizes, store_kv=not quantised
                )

        return _median_seconds(step) / len(layers) * 1e12

    return fit(
        {length: picoseconds(length, length) for length in lengths},
        {length: picoseconds(length, SELECTED) for length in lengths},
        SELECTED,
    )


def fit(dense: Mapping[int, float], sparse: Mapping[int, float], kept: int) -> Costs:
    """Costs from the picoseconds of a step of one request at several context lengths, three at least.

    Args:
        dense: attending to everything.
        sparse: attending to ``kept`` tokens, chosen by score.
    """
    middle, longest = sorted(dense)[-3], max(dense)
    attend, score = (max((line[longest] - line[middle]) / (longest - middle), 0) for line in (dense, sparse))
    promised = {length: (length - kept) * attend - length * score for length in dense}
    fixed = max(0, *(promised[length] - (dense[length] - sparse[length]) for length in dense))
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
