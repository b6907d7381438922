"""Untrained projections: a random rotation for every layer and KV head."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

SEED = 0x48415441


def random_rotation(layer: int, kv_head: int, head_dim: int, bits: int) -> Tensor:
    """The untrained projection of one KV head: [head_dim, bits] int8, the same in every process.

    Columns come from orthogonal matrices, as many as it takes, so that no two bits of one matrix ask the same
    question; each column is scaled to use the range of int8, which no sign depends on.
    """
    generator = torch.Generator().manual_seed(SEED + (layer << 16) + kv_head)
    rotations = []
    for _ in range(-(-bits // head_dim)):
        gaussian = torch.randn(head_dim, head_dim, generator=generator, dtype=torch.float64)
        q, r = torch.linalg.qr(gaussian)
        rotations.append(q * r.diagonal().sign())  # the sign makes the rotation uniform (Haar)
    columns = torch.cat(rotations, dim=1)[:, :bits]
    return to_int8(columns)


def untrained_projection(
    layer: int, kv_heads: Iterable[int], head_dim: int, bits: int, common: Tensor | None = None
) -> Tensor:
    """The rotations of some KV heads of a layer, for keys and for queries alike: [2, heads, head_dim, bits] int8.

    Args:
        common: [H, head_dim], what the keys of each KV head of the layer have in common (`biases.common_keys`): columns
            are at right angles to it. None where nothing is known.
    """
    heads = list(kv_heads)
    rotation = torch.stack([random_rotation(layer, head, head_dim, bits) for head in heads])
    if common is not None:
        rotation = to_int8(at_right_angles(rotation.double(), common[heads].double()))
    return torch.stack([rotation, rotation])


def at_right_angles(columns: Tensor, rows: Tensor) -> Tensor:
    """Columns [H, D, bits] without their parts along the rows [H, D]; as they are where a row is zero."""
    direction = torch.nn.functional.normalize(rows, dim=1).unsqueeze(1)
    return columns - direction.transpose(1, 2) @ (direction @ columns)


def to_int8(columns: Tensor) -> Tensor:
    """Rounds float columns [..., head_dim, bits] to int8, each scaled to a largest magnitude of 127."""
    largest = columns.abs().amax(dim=-2, keepdim=True).clamp(min=torch.finfo(columns.dtype).tiny)
    return torch.round(columns * (127 / largest)).to(torch.int8)
