"""HashAttention's encoder, to compare with: small networks in place of one projection (Desai et al., ICML 2025).

Queries and keys have a network each for every query head, and every query head has 32 bits a token, so a KV head has
32 bits for each head of its group. Networks, bits and scores are the paper's. The loss and the samples are `train`'s,
so that encoders are compared and nothing else; and the group's scores are summed, as one choice serves a KV head.
Nothing serves it: the networks would have to run on every new key.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hata_weights.capture import Sample
from hata_weights.rotation import SEED
from hata_weights.train import FIRST_SPREAD, Recipe, descend, draw_batch, sign

BITS = 32  # a query head
RATE = 0.003  # of Adam


class Networks(nn.Module):
    """The networks of Hq query heads, of three layers: [Hq, N, D] -> [Hq, N, bits]."""

    def __init__(self, heads: int, head_dim: int, draw: torch.Generator) -> None:
        super().__init__()
        sizes = [(head_dim, head_dim), (head_dim, head_dim), (head_dim, BITS)]
        self.layers = nn.ParameterList(
            torch.randn(heads, inner, outer, generator=draw, device=draw.device) / inner**0.5 for inner, outer in sizes
        )
        self.biases = nn.ParameterList(torch.zeros(heads, 1, outer, device=draw.device) for _, outer in sizes)

    def forward(self, x: Tensor) -> Tensor:
        for n, (layer, bias) in enumerate(zip(self.layers, self.biases, strict=True)):
            x = torch.baddbmm(bias, x, layer)
            if n + 1 < len(self.layers):
                x = nn.functional.silu(x)
        return x


class Mapping(nn.Module):
    """Networks for queries and keys of one layer.

    Args:
        samples: what a unit of queries and keys is taken from.
    """

    def __init__(self, samples: Sequence[Sample], draw: torch.Generator) -> None:
        super().__init__()
        heads, _, head_dim = samples[0].queries.shape
        self.query, self.key = (Networks(heads, head_dim, draw) for _ in range(2))
        self.query_unit = torch.cat([s.queries for s in samples], 1).std()
        self.key_unit = torch.cat([s.keys for s in samples], 1).std((1, 2), keepdim=True)

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        """[H, G, m, D] and [H, n, D] -> agreement of bits, summed over the group: [H, m, n]."""
        H, G, m, _ = queries.shape
        of_queries = sign(self.query(queries.flatten(0, 1) / self.query_unit))
        of_keys = sign(self.key((keys / self.key_unit).repeat_interleave(G, 0)))
        return torch.bmm(of_queries, of_keys.transpose(1, 2)).view(H, G, m, -1).sum(1)


def train_mapping(samples: Sequence[Sample], layer: int, recipe: Recipe) -> Mapping:
    """Trains the networks of one layer by `recipe`, whose bits and scoring do not matter here."""
    H = samples[0].keys.shape[0]
    device = samples[0].keys.device
    draw = torch.Generator(device).manual_seed(SEED + layer)
    mapping = Mapping(samples, draw)
    sharpness = torch.zeros(H, 1, 1, device=device, requires_grad=True)
    optimizer = torch.optim.Adam([*mapping.parameters(), sharpness], lr=RATE)
    scale: Tensor | None = None
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 + math.cos(math.pi * step / recipe.steps)) / 2
        target, queries, keys, correction = draw_batch(samples[step % len(samples)], recipe, step // len(samples), draw)
        scores = mapping(queries, keys)
        if scale is None:
            scale = FIRST_SPREAD / scores.detach().std((1, 2), keepdim=True)
        descend(optimizer, scores * (scale * sharpness.exp()) + correction, target)
    return mapping.requires_grad_(False)
