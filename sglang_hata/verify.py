"""`--hata-verify`: an oracle for selections that shares no code with what it checks."""

from __future__ import annotations

import numpy as np
from torch import Tensor


def wrong_selections(
    weights: Tensor,
    code_cache: Tensor,
    slots: list[Tensor],
    selected: list[Tensor],
    kept: list[int],
    sink: int,
    recent: int,
    farthest: int,
) -> int:
    """How many selections (request, KV head) are not a best choice.

    A selection is right if it holds as many distinct tokens as it should, sinks and recent ones among them, and if
    the distances of the others are, as a multiset, the smallest there are. A key's distance is what it pays for the
    bits in which it differs from what its group of queries prefers.

    Args:
        weights: [B, H, bits] int32: the sign is what the queries prefer, the magnitude what the other value costs.
        code_cache: [S, H, W] int32.
        slots: for each request, the slots of its cached tokens in order of position.
        selected: for each request, positions [H, k].
        kept: how many tokens each request should attend to.
        farthest: distances from here on count as equal.
    """
    wrong = 0
    for preferred, request_slots, positions, k in zip(weights.cpu().numpy(), slots, selected, kept, strict=True):
        length = len(request_slots)
        keys = _bits(code_cache[request_slots])  # [L, H, bits]
        free = np.arange(sink, max(length - max(recent, 1), sink))
        forced = np.setdiff1d(np.arange(length), free)
        for head, chosen in enumerate(positions.cpu().numpy()):
            differs = keys[:, head] != (preferred[head] > 0)
            distance = np.minimum((differs * np.abs(preferred[head])).sum(axis=1), farthest)
            others = np.setdiff1d(chosen, forced)
            best = np.sort(distance[free])[: len(others)]
            if (
                len(np.unique(chosen)) != k
                or not np.isin(forced, chosen).all()
                or not np.array_equal(np.sort(distance[others]), best)
            ):
                wrong += 1
    return wrong


def _bits(codes: Tensor) -> np.ndarray:
    """[..., W] int32 -> [..., 32 * W] of zeros and ones."""
    words = np.ascontiguousarray(codes.cpu().numpy())
    return np.unpackbits(words.view(np.uint8), axis=-1, bitorder="little")
