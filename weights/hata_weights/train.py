"""Learns the two projections of a layer, of keys and of queries, for all KV heads of one or more layers at once.

The codes' scores are distilled from exact attention: a softmax over the scores of the keys is held to the KV head's
attention, averaged over its query heads, by cross-entropy. Signs let gradients through near zero (straight-through).
A step looks at few queries and, of the keys, at those with the most attention and a sample of the rest, whose
share of the softmax is corrected for. Every other step leaves out the sinks and recent tokens, which a server selects
whatever their score; the steps between let codes serve with other settings of these.

Every step adds noise to its queries and keys, a fraction of what they vary by themselves: codes that work for the texts
at hand and no others have bits that a little noise would turn.

What all keys of a head have in common, and all queries, moves many times more slowly than the rest (`conditioner`): in
models with biases it is up to a hundred times as long as the differences that tell keys apart, and a single step in its
direction would turn a bit to the same side for every key.

Nothing more is learned. On SmolLM2 the keys' sizes beside the codes, or a bias for each bit, would add less than half a
point each: see weights/README.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hata_kernels import reference
from hata_weights.capture import Sample, Shape
from hata_weights.rotation import SEED, at_right_angles, random_rotation, to_int8

FIRST_SPREAD = 3.0  # standard deviation of the logits before the first step
STEPS, STEPS_ON_GPU = 2500, 10_000
APART = 8  # every eighth key and query tells what they are like
ROOM = 0.8  # of a GPU's free memory that training may take
LOGITS = 6  # copies of a step's attention logits that are alive at a time, about
NARROWNESS = 2.0  # of the soft step that gradients see in place of a sign; columns start with a deviation of 1


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Args:
        bits: of a code, a multiple of 32.
        scoring: "hamming" or "one-sided".
        steps: of Adam.
        queries: positions a step.
        keys: keys a step, half with the most attention, half drawn from the rest.
        rate: Adam's, which falls to zero along a cosine.
        noise: added to queries and keys, in standard deviations of each of their dimensions.
        sink, recent: tokens that the server always selects.
    """

    bits: int = 128
    scoring: str = reference.ONE_SIDED
    steps: int = STEPS
    queries: int = 16
    keys: int = 2048
    rate: float = 0.02
    noise: float = 0.2
    sink: int = 4
    recent: int = 16


class _Sign(torch.autograd.Function):
    """1 where positive, else -1; the gradient is that of a step which is soft over about half a standard deviation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.where(x > 0, 1.0, -1.0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * (NARROWNESS / (1 + (NARROWNESS * x) ** 2))


def sign(x: Tensor) -> Tensor:
    """Signs of ``x`` as floats, never zero, that let gradients through."""
    return _Sign.apply(x)


def train_layers(
    samples: Sequence[Sample], layers: Sequence[int], recipe: Recipe, done: Callable[[], object] = lambda: None
) -> Tensor:
    """Trains from the untrained rotations of `rotation`; the same samples give the same weights on the same machine.

    Args:
        samples: of these layers (`capture.load_sample`), one a sequence, float32, on the device to train on.
        layers: their numbers. Steps are small, and a GPU takes about as long for many layers as for one. They share
            random numbers, and nothing else.
        done: called after each step.

    Returns:
        [layers, 2, H, D, bits] int8, of keys and of queries, on the CPU.
    """
    heads = samples[0].keys.shape[0]
    device = samples[0].keys.device
    draw = torch.Generator(device).manual_seed(SEED)
    some_keys = torch.cat([sample.keys[:, ::APART] for sample in samples], 1)
    some_queries = torch.cat([sample.queries[:, ::APART].unflatten(0, (heads, -1)) for sample in samples], 2)
    of_all_keys, of_all_queries = conditioner(some_keys), conditioner(some_queries.sum(1))
    first = first_projection(some_keys, layers, recipe.bits)
    key_noise = recipe.noise * some_keys.std(1, keepdim=True)
    query_noise = recipe.noise * some_queries.std(2, keepdim=True)
    of_keys = torch.linalg.solve(of_all_keys, first).requires_grad_()
    of_queries = torch.linalg.solve(of_all_queries, first).requires_grad_()
    sharpness = torch.zeros(heads, 1, 1, device=device, requires_grad=True)
    optimizer = torch.optim.Adam([of_keys, of_queries, sharpness], lr=recipe.rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 10) * (1 + math.cos(math.pi * step / recipe.steps)) / 2
    )
    scale: Tensor | None = None
    for step in range(recipe.steps):
        sample = samples[step % len(samples)]
        target, queries, keys, correction = draw_batch(sample, recipe, step // len(samples), draw)
        # The same noise for all heads, so that a layer's does not depend on the layers that it is trained with.
        keys = keys + key_noise * torch.randn(keys.shape[1:], generator=draw, device=device)
        queries = queries + query_noise * torch.randn(queries.shape[1:], generator=draw, device=device)
        bits = sign(keys @ of_all_keys @ of_keys)
        if recipe.scoring == reference.ONE_SIDED:
            weights = queries.sum(1) @ of_all_queries @ of_queries
        else:
            weights = sign(_unit(queries) @ (of_all_queries @ of_queries).unsqueeze(1)).sum(1)
        scores = torch.bmm(weights, bits.transpose(1, 2))
        if scale is None:
            scale = FIRST_SPREAD / scores.detach().std((1, 2), keepdim=True)
        descend(optimizer, scores * (scale * sharpness.exp()) + correction, target)
        schedule.step()
        done()
    # The magnitudes of columns count where queries are not cut down to signs.
    rounded = _to_int8_alike if recipe.scoring == reference.ONE_SIDED else to_int8
    projections = (of_all_keys @ of_keys).detach().cpu(), (of_all_queries @ of_queries).detach().cpu()
    sides = torch.stack([to_int8(projections[reference.KEYS]), rounded(projections[reference.QUERIES])])
    return sides.unflatten(1, (len(layers), -1)).transpose(0, 1).contiguous()


def train_layer(samples: Sequence[Sample], layer: int, recipe: Recipe) -> Tensor:
    """One of `train_layers`: [2, H, D, bits] int8."""
    return train_layers(samples, [layer], recipe)[0]


def layers_at_once(shape: Shape, lengths: Sequence[tuple[int, int]], recipe: Recipe, free: int) -> int:
    """How many layers have room on a GPU, at least one.

    Args:
        lengths: keys and queries of each sequence to train on.
        free: bytes of memory.
    """
    D, float32 = shape.head_dim, 4
    samples = float32 * D * sum(shape.kv_heads * keys + shape.query_heads * queries for keys, queries in lengths)
    step = float32 * recipe.queries * shape.query_heads * max(keys for keys, _ in lengths)
    return max(1, int(free * ROOM) // (samples + LOGITS * step))


def descend(optimizer: torch.optim.Optimizer, logits: Tensor, target: Tensor) -> None:
    """A step towards a softmax of ``logits`` that equals ``target``, both [H, m, n]."""
    loss = -(target * logits.log_softmax(-1)).sum(-1).mean(1).sum()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def conditioner(rows: Tensor) -> Tensor:
    """What makes the mean of rows as short as their deviations: [H, D, D] float32, symmetric, to multiply rows by.

    Args:
        rows: [H, n, D] float32. Where their mean is no longer than that already, the result is the identity.
    """
    mean = rows.mean(1, keepdim=True)
    deviation = (rows - mean).square().mean((1, 2), keepdim=True).sqrt()
    direction = torch.nn.functional.normalize(mean, dim=2)
    along = (rows @ direction.transpose(1, 2)).square().mean((1, 2), keepdim=True).sqrt()
    shrink = (deviation / along).clamp(max=1.0)
    return torch.eye(rows.shape[2], device=rows.device) + (shrink - 1) * direction.transpose(1, 2) @ direction


def first_projection(keys: Tensor, layers: Sequence[int], bits: int) -> Tensor:
    """The untrained rotations at right angles to the keys' mean: [heads, D, bits] float32.

    What all keys share would decide their bits, and tell no key from another. Each column is scaled to projections of
    deviation 1.

    Args:
        keys: [H, n, D] float32, of all heads of all ``layers``.
    """
    heads, _, D = keys.shape
    of_layer = range(heads // len(layers))
    rotation = torch.stack([random_rotation(layer, head, D, bits) for layer in layers for head in of_layer]).to(keys)
    columns = at_right_angles(rotation, keys.mean(1))
    return columns / torch.bmm(keys, columns).std(1, keepdim=True)


def _to_int8_alike(columns: Tensor) -> Tensor:
    """Rounds [H, D, bits] to int8, all columns of a head scaled alike."""
    largest = columns.abs().amax(dim=(-2, -1), keepdim=True).clamp(min=torch.finfo(columns.dtype).tiny)
    return torch.round(columns * (127 / largest)).to(torch.int8)


def draw_batch(sample: Sample, recipe: Recipe, turn: int, draw: torch.Generator) -> tuple[Tensor, ...]:
    """Draws queries and keys of one sequence.

    Args:
        turn: how often the sequence was drawn from before; every other turn leaves out sinks and recent tokens.

    Returns:
        The attention [H, m, n] to learn, of sum 1 over the keys; queries [H, G, m, D]; keys [H, n, D]; what to add
        to the logits [H, m, n]: the logarithm of how many keys one stands for, or -1e9 where it cannot be selected.
    """
    sink, recent = (recipe.sink, max(recipe.recent, 1)) if turn % 2 else (0, 1)
    H, N, _ = sample.keys.shape
    device = sample.keys.device
    chosen = torch.randperm(len(sample.positions), generator=draw, device=device)[: recipe.queries]
    queries = sample.queries.unflatten(0, (H, -1))[:, :, chosen]
    positions = sample.positions[chosen].unsqueeze(1)
    attention = mean_attention(queries, sample.keys, sample.positions[chosen], sample.scale)
    everywhere = torch.arange(N, device=device)
    unlearned = (everywhere < sink) | (everywhere > positions - recent)
    attention = attention.masked_fill(unlearned, 0)

    top = min(recipe.keys // 2, N // 2)
    rest = min(recipe.keys - top, N - top)
    order = torch.rand(N, generator=draw, device=device).expand(H, N)
    order = order.scatter(1, attention.sum(1).topk(top).indices, 2.0)
    index = order.topk(top + rest).indices
    stands_for = torch.zeros(top + rest, device=device)
    stands_for[top:] = math.log((N - top) / rest)
    per_query = index.unsqueeze(1).expand(-1, len(chosen), -1)
    target = attention.gather(2, per_query)
    target = target / target.sum(-1, keepdim=True).clamp(min=1e-9)
    hidden = unlearned.expand(H, -1, -1).gather(2, per_query)
    keys = sample.keys.gather(1, index.unsqueeze(2).expand(-1, -1, sample.keys.shape[2]))
    return target, queries, keys, stands_for.masked_fill(hidden, -1e9)


def mean_attention(queries: Tensor, keys: Tensor, positions: Tensor, scale: Tensor) -> Tensor:
    """Causal softmax attention of the query heads of each KV head, averaged.

    Args:
        queries: [H, G, m, D] float32.
        keys: [H, N, D] float32.
        positions: [m] int64, of the queries.
        scale: [] float32, multiplies q . k.

    Returns:
        [H, m, N] float32, each row of sum 1.
    """
    H, G, m, D = queries.shape
    logits = torch.bmm((queries * scale).reshape(H, G * m, D), keys.transpose(1, 2)).view(H, G, m, -1)
    future = torch.arange(keys.shape[1], device=keys.device) > positions.unsqueeze(1)
    return logits.masked_fill_(future, -torch.inf).softmax(-1).mean(1)


def _unit(queries: Tensor) -> Tensor:
    """Queries of a mean norm that lets gradients through their signs as through those of keys."""
    return queries * (queries.shape[-1] ** 0.5 / queries.norm(dim=-1).mean((1, 2), keepdim=True).unsqueeze(-1))
