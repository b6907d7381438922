"""How much of the attention the selected tokens hold, for trained codes and for what they compete with.

Mass is the share of a KV head's attention, averaged over its query heads, that falls on the tokens selected for it;
recall is the share of the best possible choice that was chosen. Both follow the server: one choice for each KV head
and query, sinks and recent tokens inside the budget, the earliest position first among equal scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from hata_kernels import reference
from hata_weights.artifact import Identity
from hata_weights.capture import Sample, Shape
from hata_weights.rotation import untrained_projection
from hata_weights.train import mean_attention

BUDGETS = (128, 64, 32, 16)  # one token in ...
QUEST_PAGE = 16
QUERIES_AT_ONCE = 32
BEST, EXACT, TRAINED = "best possible", "exact q.k", "trained"
HASH_ATTENTION = "HashAttention"

# [H, m, N] scores, most is best, of m of the sample's queries, given as [H, G, m, D].
Score = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Method:
    """A way to choose tokens.

    Args:
        name: for the table.
        bytes_per_token: read to score one token of one KV head, K in bfloat16.
        prepare: given a sample and the layer's number, the function that scores for it.
    """

    name: str
    bytes_per_token: float
    prepare: Callable[[Sample, int], Score]


@dataclass(frozen=True)
class Row:
    """What one method kept in one KV head at one budget, averaged over queries and sequences.

    Args:
        budget: one token in so many.
        mass, recall: shares, 0 to 1.
        exact_mass: that of exact q.k.
    """

    method: str
    bytes_per_token: float
    budget: int
    layer: int
    kv_head: int
    mass: float
    recall: float
    exact_mass: float


def methods(shape: Shape, trained: tuple[Identity, Mapping[int, Tensor]] | None = None) -> list[Method]:
    """What is compared: exact q.k, Quest, Loki, untrained Hamming codes and, if given, trained ones."""
    D = shape.head_dim
    known = [
        Method(EXACT, 2 * D, lambda sample, _: lambda queries, keys: torch.bmm(queries.sum(1), keys.transpose(1, 2))),
        Method("Quest", 4 * D / QUEST_PAGE, lambda sample, _: quest),
        Method("Loki", 2 * (D // 4), lambda sample, _: loki(sample)),
        *(untrained(bits) for bits in (128, 256)),
        untrained(128, reference.ONE_SIDED),
        untrained(128, reference.ONE_SIDED, sized=True),
    ]
    if trained is not None:
        identity, layers = trained
        known.append(
            Method(TRAINED, identity.bits / 8, lambda sample, layer: codes(sample, layers[layer], identity.scoring))
        )
    return known


def quest(queries: Tensor, keys: Tensor) -> Tensor:
    """Quest: a page's tokens get the page's upper bound of q.k, summed over the group (Tang et al., ICML 2024).

    Args:
        queries: [H, G, m, D].
        keys: [H, N, D].

    Returns:
        [H, m, N].
    """
    H, N, D = keys.shape
    padded = torch.nn.functional.pad(keys, (0, 0, 0, -N % QUEST_PAGE), mode="replicate").view(H, -1, QUEST_PAGE, D)
    most, least = padded.amax(2).transpose(1, 2), padded.amin(2).transpose(1, 2)
    bound = torch.bmm(queries.clamp(min=0).sum(1), most) + torch.bmm(queries.clamp(max=0).sum(1), least)
    return bound.repeat_interleave(QUEST_PAGE, -1)[..., :N]


def loki(sample: Sample) -> Score:
    """Loki: q.k in the first quarter of the keys' principal components (Singhania et al., NeurIPS 2024).

    The components are those of the prompt's own keys, which favours it: the paper takes them from other text.
    """
    keys = sample.keys
    _, axes = torch.linalg.eigh(keys.transpose(1, 2) @ keys)  # ascending
    axes = axes[..., -(keys.shape[-1] // 4) :]
    return lambda queries, keys: torch.bmm(torch.bmm(queries.sum(1), axes), torch.bmm(keys, axes).transpose(1, 2))


def codes(sample: Sample, projection: Tensor, scoring: str, sized: bool = False) -> Score:
    """Codes of `reference`, ranked as a server ranks them; with sizes, as it does at the end of the sample.

    Args:
        projection: [2, H, D, bits] int8, of keys and of queries.
        scoring: `reference.HAMMING` or `reference.ONE_SIDED`.
    """
    projection = projection.to(sample.keys.device)
    _, H, _, bits = projection.shape
    words = reference.hash_codes(sample.keys.transpose(0, 1), projection[reference.KEYS])
    signs = (2 * reference.unpack_bits(words) - 1).to(torch.float32)
    sizes = reference.hash_sizes(sample.keys.transpose(0, 1), projection[reference.KEYS]) if sized else None
    relative = None if sizes is None else reference.relative_sizes(sizes).T.unsqueeze(1)
    bins = reference.bins_of(len(sample.queries) // H, bits, scoring)

    def score(queries: Tensor, keys: Tensor) -> Tensor:
        rows = queries.flatten(0, 1).transpose(0, 1)
        weights = reference.query_weights(rows, projection[reference.QUERIES], scoring).to(torch.float32)
        # `reference.distances` for all queries at once; integers below 2^24 are exact in float32.
        agreement = torch.einsum("mhj,nhj->hmn", weights, signs)
        total = weights.abs().sum(-1).T.unsqueeze(-1)
        distance = (total - agreement) / 2
        if relative is not None:  # `reference.stretch`
            parts = reference.SIZE_PARTS
            distance = ((total * parts - agreement * relative + parts) / (2 * parts)).floor().clamp(min=0)
        nearest = reference.nearness(total.to(torch.int32), bins)  # `reference.rank`
        return -((distance - nearest).clamp(min=0) + 1).clamp(max=bins - 2)

    return score


def untrained(bits: int, scoring: str = reference.HAMMING, sized: bool = False) -> Method:
    """Codes of random rotations, as served, and sizes of keys if asked for."""

    def prepare(sample: Sample, layer: int) -> Score:
        H, _, D = sample.keys.shape
        return codes(sample, untrained_projection(layer, range(H), D, bits, sample.common), scoring, sized)

    name = f"{scoring.capitalize()} {bits}{' and sizes' if sized else ''}, untrained"
    return Method(name, bits / 8 + 2 * sized, prepare)


def rule(budget: int, sink: int, recent: int) -> reference.Budget:
    """The server's rule for one token in ``budget``."""
    return reference.Budget(share_ppm=-(-1_000_000 // budget), floor=sink + max(recent, 1))


def evaluate_layer(
    samples: Iterable[Sample],
    layer: int,
    compared: Sequence[Method],
    *,
    sink: int,
    recent: int,
    budgets: Sequence[int] = BUDGETS,
) -> list[Row]:
    """Mass and recall of every method, KV head and budget in one layer.

    Args:
        samples: of this layer, float32, one a sequence.
        compared: `EXACT` among them; `BEST` comes along by itself.
        sink, recent: tokens always selected, as the server's settings.
        budgets: one token in so many, each.
    """
    kept: dict[str, list[Tensor]] = {BEST: [], **{method.name: [] for method in compared}}
    for sample in samples:
        H = sample.keys.shape[0]
        score_of = {method.name: method.prepare(sample, layer) for method in compared}
        grouped = sample.queries.unflatten(0, (H, -1))
        for queries, positions in zip(
            grouped.split(QUERIES_AT_ONCE, 2), sample.positions.split(QUERIES_AT_ONCE), strict=True
        ):
            attention = mean_attention(queries, sample.keys, positions, sample.scale)
            choice = Choice(attention, positions, sink, max(recent, 1), budgets)
            best, order = choice.of(attention)
            kept[BEST].append(torch.stack([best, torch.ones_like(best)]))
            chosen_best = choice.members(order)
            for name, score in score_of.items():
                mass, order = choice.of(score(queries, sample.keys))
                kept[name].append(torch.stack([mass, choice.recall(order, chosen_best)]))
    # [2, H, budgets, queries] -> [2, H, budgets]
    shares = {name: torch.cat(parts, -1).mean(-1).tolist() for name, parts in kept.items()}
    size = {BEST: 0.0, **{method.name: method.bytes_per_token for method in compared}}
    return [
        Row(name, size[name], budget, layer, head, mass[head][b], recall[head][b], shares[EXACT][0][head][b])
        for name, (mass, recall) in shares.items()
        for head in range(len(mass))
        for b, budget in enumerate(budgets)
    ]


class Choice:
    """Chooses tokens by score as the server does, and says what the choice holds.

    Args:
        attention: [H, m, N] float32.
        positions: [m] int64, of the queries.
        sink, recent: always chosen; recent at least 1.
        budgets: one token in so many, each.
    """

    def __init__(
        self, attention: Tensor, positions: Tensor, sink: int, recent: int, budgets: Sequence[int] = BUDGETS
    ) -> None:
        everywhere = torch.arange(attention.shape[-1], device=attention.device)
        self.attention = attention
        self.future = everywhere > positions.unsqueeze(1)
        self.forced = ((everywhere < sink) | (everywhere > positions.unsqueeze(1) - recent)) & ~self.future
        kept = [rule(budget, sink, recent).of(positions + 1) for budget in budgets]
        self.counts = torch.stack(kept)  # [budgets, m]

    def of(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """The mass [H, budgets, m] that the highest scores [H, m, N] hold, and their positions in order of rank."""
        ranked = scores.to(torch.float64)
        # Integers get their position's place among equals; others differ by far more than that or not at all.
        places = torch.arange(scores.shape[-1], device=scores.device, dtype=torch.float64)
        ranked = ranked - places * 2.0**-30 * ranked.abs().amax(-1, keepdim=True).clamp(min=1e-30) / len(places)
        ranked = ranked.masked_fill(self.forced, torch.inf).masked_fill(self.future, -torch.inf)
        order = ranked.topk(int(self.counts.max())).indices
        held = self.attention.gather(-1, order).cumsum(-1)
        last = (self.counts - 1).transpose(0, 1).expand(len(held), -1, -1)
        return held.gather(-1, last).transpose(1, 2), order

    def members(self, order: Tensor) -> Tensor:
        """The rank of each position in ``order``: [H, m, N] int64, N where it is not in it."""
        N = self.attention.shape[-1]
        ranks = torch.arange(order.shape[-1], device=order.device).expand_as(order)
        return torch.full_like(self.attention, N, dtype=torch.int64).scatter(-1, order, ranks)

    def recall(self, order: Tensor, best: Tensor) -> Tensor:
        """The share of the best choice that ``order`` makes too, beyond what is always chosen: [H, budgets, m]."""
        rank_in_best = best.gather(-1, order)
        rank = torch.arange(order.shape[-1], device=order.device)
        optional = ~self.forced.expand_as(self.attention).gather(-1, order)
        always = self.forced.sum(-1)
        shares = []
        for count in self.counts:
            both = (rank < count.unsqueeze(1)) & (rank_in_best < count.unsqueeze(1)) & optional
            wanted = (count - always).clamp(min=0)
            shares.append(torch.where(wanted > 0, both.sum(-1) / wanted.clamp(min=1), 1.0))
        return torch.stack(shares, 1)


@dataclass(frozen=True)
class Summary:
    """One method at one budget over all layers and heads: ``ratio`` is mass over that of exact q.k, mean and worst."""

    method: str
    bytes_per_token: float
    budget: int
    mass: float
    recall: float
    ratio: float
    worst_ratio: float


def summarise(rows: Sequence[Row]) -> list[Summary]:
    """A `Summary` for each method and budget, in the order of the rows."""
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.method, row.budget), []).append(row)
    return [
        Summary(
            method,
            group[0].bytes_per_token,
            budget,
            fmean(row.mass for row in group),
            fmean(row.recall for row in group),
            fmean(row.mass for row in group) / fmean(row.exact_mass for row in group),
            min(row.mass / row.exact_mass for row in group),
        )
        for (method, budget), group in groups.items()
    ]
