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
    layer: int | None = None,
    sizes: Tensor | None = None,
) -> int:
    """How many selections (request, KV head) are not a best choice.

    A selection is right if it holds as many distinct tokens as it should, sinks and recent ones among them, and if
    the distances of the others are, as a multiset, the smallest there are. A key's distance is what it pays for the
    bits in which it differs from what its group of queries prefers, less what luck spares it. If keys have sizes,
    what it pays above or below half of all weights is first multiplied by its own.

    Args:
        weights: [B, H, bits] int32: the sign is what the queries prefer, the magnitude what the other value costs.
        code_cache: [S, H, W] int32.
        slots: for each request, the slots of its cached tokens in order of position.
        selected: for each request, positions [H, k].
        kept: how many tokens each request should attend to.
        farthest: distances from here on count as equal, and those below what puts half of all weights at 3/4 of it.
        layer: draws the luck of this layer; None where there is no luck.
        sizes: [S, H] int16, bits of bfloat16.
    """
    wrong = 0
    for preferred, request_slots, positions, k in zip(weights.cpu().numpy(), slots, selected, kept, strict=True):
        length = len(request_slots)
        keys = _bits(code_cache[request_slots])  # [L, H, bits]
        free = np.arange(sink, max(length - max(recent, 1), sink))
        forced = np.setdiff1d(np.arange(length), free)
        for head, chosen in enumerate(positions.cpu().numpy()):
            differs = keys[:, head] != (preferred[head] > 0)
            distance = (differs * np.abs(preferred[head])).sum(axis=1)
            all_weights = int(np.abs(preferred[head]).sum())
            if sizes is not None:
                size = sizes[request_slots, head].cpu().numpy().astype(np.int64)
                distance = (64 * all_weights + (2 * distance - all_weights) * _relative(size) + 64) // 128
            nearest = max(all_weights // 2 - 3 * (farthest + 3) // 4, 0)
            distance = (distance - nearest).clip(0, farthest)
            if layer is not None and k < length:
                sixteenths = max(16, int(np.sqrt(np.square(preferred[head], dtype=np.int64).sum()) * 16 / 5 + 0.5))
                distance = np.maximum(distance - (sixteenths * _luck(length, layer) + 8) // 16, 0)
            others = np.setdiff1d(chosen, forced)
            best = np.sort(distance[free])[: len(others)]
            if (
                len(np.unique(chosen)) != k
                or not np.isin(forced, chosen).all()
                or not np.array_equal(np.sort(distance[others]), best)
            ):
                wrong += 1
    return wrong


def _relative(sizes: np.ndarray) -> np.ndarray:
    """[L] int64, bits of bfloat16 -> [L] int64: 64ths of the geometric mean of the 16 before the last, nearly."""
    usual = max(int(sizes[-17:-1].sum()) // max(len(sizes[-17:-1]), 1), 2048)
    parts = np.float32(64) / _float32(np.array([usual << 16]))
    parts = _float32(parts.view(np.uint32).astype(np.int64) >> 8 << 8)  # a product with 8 digits is then exact
    return np.rint(np.minimum(_float32(sizes << 16) * parts, 255)).astype(np.int64)


def _float32(bits: np.ndarray) -> np.ndarray:
    return bits.astype(np.uint32).view(np.float32)


def _luck(length: int, layer: int) -> np.ndarray:
    """[length]: zeros at the end of each token's byte of a hash, 12 if there is nothing else."""
    words = _hash(_hash(np.array([length * 0x9E3779B1 + layer])) + np.arange(-(-length // 4)) * 0x9E3779B1)
    octets = words.astype("<u4").view(np.uint8)[:length]
    bits = np.unpackbits(octets[:, None], axis=1, bitorder="little")
    return np.where(octets > 0, bits.argmax(axis=1), 12)


def _hash(numbers: np.ndarray) -> np.ndarray:
    """MurmurHash3's finalizer."""
    x = (numbers & 0xFFFFFFFF).astype(np.uint32)
    x ^= x >> 16
    x *= np.uint32(0x85EBCA6B)
    x ^= x >> 13
    x *= np.uint32(0xC2B2AE35)
    return (x ^ (x >> 16)).astype(np.int64)


def _bits(codes: Tensor) -> np.ndarray:
    """[..., W] int32 -> [..., 32 * W] of zeros and ones."""
    words = np.ascontiguousarray(codes.cpu().numpy())
    return np.unpackbits(words.view(np.uint8), axis=-1, bitorder="little")
