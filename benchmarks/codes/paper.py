"""HATA's own training, as a baseline."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hata_weights.capture import Sample
from hata_weights.rotation import SEED, to_int8

# The hyperparameters of the paper's appendix B.
BITS, STEPS = 128, 300
SIGMA = 0.1
SIMILARITY, BALANCE, DECORRELATION = 0.01, 1.0, 2.0
RATE, MOMENTUM, DECAY = 0.1, 0.9, 1e-6

# One query position of one sequence: queries [H, G, D], the keys up to it [H, n, D], labels [H, G, n].
Item = tuple[Tensor, Tensor, Tensor]


def train_paper(samples: Sequence[Sample], layer: int, steps: int = STEPS) -> Tensor:
    """Trains one layer as the paper does.

    As in the paper: labels, the three terms of the loss and their weights, soft bits, SGD with momentum over the whole
    data for 300 steps, normally distributed columns at the start, one query position a sequence from its second half,
    one projection of a KV head for keys and queries, Hamming scoring.

    Where the paper's equations and the training of its published weights differ, this follows the training: the
    weights of balance and decorrelation are 1 and 2 (the equations swap them), balance takes in queries and is divided
    by the bits, and decorrelation is one norm over all KV heads. Otherwise here: texts and sequences, those of the
    other encoders (the paper takes 11 sequences, mostly of its benchmarks); all pairs of them in each step, not
    chunks of 32,768; float32, not bfloat16; and the columns are rounded to int8, as a server takes them.

    Returns:
        [2, H, D, bits] int8, twice the same.
    """
    H, _, D = samples[0].keys.shape
    device = samples[0].keys.device
    draw = torch.Generator(device).manual_seed(SEED + layer)
    items: list[Item] = []
    for sample in samples:
        late = (sample.positions >= sample.keys.shape[1] // 2).nonzero()
        chosen = int(late[torch.randint(len(late), (1,), generator=draw, device=device)])
        queries = sample.queries[:, chosen].unflatten(0, (H, -1))
        keys = sample.keys[:, : int(sample.positions[chosen]) + 1]
        items.append((queries, keys, paper_labels(queries @ keys.transpose(1, 2))))
    w = torch.randn(H, D, BITS, generator=draw, device=device).requires_grad_()
    optimizer = torch.optim.SGD([w], lr=RATE, momentum=MOMENTUM, weight_decay=DECAY)
    for _ in range(steps):
        optimizer.zero_grad()
        paper_loss(w, items).backward()
        optimizer.step()
    return to_int8(w.detach().cpu()).repeat(2, 1, 1, 1)


def paper_labels(scores: Tensor) -> Tensor:
    """q.k [..., n] -> labels: the highest tenth gets 20 down to 1 by rank, the rest -1."""
    top = max(1, round(scores.shape[-1] / 10))
    ranked = torch.linspace(20, 1, top, device=scores.device).expand(*scores.shape[:-1], top)
    return torch.full_like(scores, -1).scatter(-1, scores.topk(top).indices, ranked)


def paper_loss(w: Tensor, items: Sequence[Item]) -> Tensor:
    """The loss of projections ``w`` [H, D, bits] over all pairs of a query and a key.

    Similarity: labels times the squared distance of the soft bits 2 sigmoid(sigma x W) - 1 of query and key, averaged
    over pairs, summed over query heads. Balance: the square of what the soft bits of queries and keys are on average.
    Decorrelation: how far the columns are from orthonormal.
    """
    bits = w.shape[-1]
    pairs = sum(keys.shape[1] for _, keys, _ in items)
    similarity = total = w.new_zeros(())
    for queries, keys, labels in items:
        q, k = (2 * torch.sigmoid(SIGMA * (x @ w)) - 1 for x in (queries, keys))
        distance = q.square().sum(-1).unsqueeze(2) + k.square().sum(-1).unsqueeze(1) - 2 * q @ k.transpose(1, 2)
        similarity = similarity + (labels * distance).sum()
        total = total + k.shape[1] * q + k.sum(1, keepdim=True)
    balance = (total / (pairs * bits)).square().sum()
    decorrelation = (w.transpose(1, 2) @ w - torch.eye(bits, device=w.device)).norm()
    return SIMILARITY * similarity / pairs + BALANCE * balance + DECORRELATION * decorrelation
