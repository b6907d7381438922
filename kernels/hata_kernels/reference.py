"""The specification of HATA's decode step, in plain PyTorch: one short function a step.

    plan     lengths      -> k            how many tokens each request attends to
    hash     x            -> codes        sign bits of an integer projection            (paper, Alg. 2)
    weigh    queries      -> planes       what each bit is worth to a GQA group of queries
    score    planes       -> distances    weighted Hamming; with HAMMING, summed over the group  (Alg. 3)
    stretch  distances    -> distances    by each key's size, where sizes are cached
    rank     distances    -> ranks        sinks and recent tokens before all others
    draw     ranks        -> ranks        some luck for every token (priority sampling)
    select   ranks        -> positions    the k lowest ranks, ties by position
    stand    positions    -> doublings    how many others each selected token stands for
    attend   positions    -> output       softmax attention over those tokens alone

Every Triton kernel of this package is tested against the function of its step, bit for bit where the result
is an integer, and a machine without a GPU serves with these functions themselves. Half of the file is what each step
takes and gives.

Notation of shapes: B requests, N tokens, L context length, S slots of the KV pool, Hq query heads, H KV heads,
G = Hq / H query heads a group, D head dimension, W = bits / 32 words of a code.

Source: Gong et al., "HATA", Findings of ACL 2025. Keys and queries are hashed after RoPE.

The paper attends to the k best tokens and forgets the others. Here, unless TOP is asked for, some of the others are
drawn as well, likelier the better they are, and stand for the rest: priority sampling (Duffield, Lund, Thorup, J. ACM
2007), with a token's score as the guess of its attention. Where the guess is wrong, the output is then not a softmax
over the wrong tokens, but right on average.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

WORD_BITS = 32
# A row is scaled by a power of two so that its largest magnitude lies in [2^13, 2^14), then rounded.
ROW_EXPONENT = 13
# Float32's biased exponent, kept in the range in which the scaling factor is itself a normal float32.
MIN_BIASED_EXPONENT = 13
MAX_BIASED_EXPONENT = 254

# A layer's projections, in a tensor [2, H, D, bits]: keys and queries may be projected each in their own way.
KEYS, QUERIES = 0, 1
# How queries are compared with codes of keys.
HAMMING, ONE_SIDED = "hamming", "one-sided"
# What is selected: the best tokens and a sample of the others, or the best alone.
SAMPLED, TOP = "sampled", "top"
# A token's luck, in octaves, is the zeros at the end of a byte: n or more with a probability of 2^-n. Eight, the most,
# are as good as twelve: codes err, and what they call hopeless must get in at times.
MOST_LUCK, FAR_LUCK = 8, 12
# Tokens that share a hash of four bytes.
LUCK_TOKENS = 4
GOLDEN, MIX_1, MIX_2 = 0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35
# An octave is the deviation of distances of keys that know nothing of the queries, half the root of the sum of squared
# weights, over 2.5: by so much a token's attention halves. In the logarithm of attention that is 1.7 a deviation, as
# measured in Qwen2.5-Coder: 1.6 and 1.8 by trained codes, 1.4 and 1.8 by untrained ones.
OCTAVES_A_ROOT = 5
# Octaves are counted in sixteenths of a rank: one that is a tenth too short is, eight times over, nearly an octave.
RANK_PARTS = 16
# Sizes of keys are compared with those of so many tokens before the current one, in 64ths and up to 4 times.
SIZED_TOKENS, SIZE_PARTS, MOST_PARTS = 16, 64, 255
# Bits of a size's exponent that are taken off, so that the largest is a finite bfloat16.
SIZE_EXPONENT = 158
# The least size that others are divided by, as the bits of a bfloat16: its inverse is a normal float32.
LEAST_SIZE = 16 << 7
# Magnitudes of one-sided weights are rounded to sevenths of the largest: halfway points, in parts of 256.
MAGNITUDE_STEPS = tuple(((2 * step - 1) * 256 + 7) // 14 for step in range(1, 8))

IntOrTensor = TypeVar("IntOrTensor", int, Tensor)


@dataclass(frozen=True)
class Costs:
    """What one layer's attention costs, as measured on the GPU that serves: integers, so that host and device agree.

    Args:
        attend: picoseconds for each token that is attended to.
        score: picoseconds for each cached token of a request that selects.
        fixed: picoseconds that a batch pays once if any of its requests selects.
    """

    attend: int
    score: int
    fixed: int


@dataclass(frozen=True)
class Budget:
    """How many tokens a KV head attends to at a context length.

    Args:
        tokens: a fixed number of tokens; 0 when the budget is a share.
        share_ppm: a share of the context, in parts per million; 0 when the budget is a number.
        floor: never fewer than this (the sinks and recent tokens, which are inside the budget).
        min_context: contexts up to this length are attended whole.
        costs: when given, so is every context, and every batch, in which selecting would not save time.
    """

    tokens: int = 0
    share_ppm: int = 0
    floor: int = 1
    min_context: int = 0
    costs: Costs | None = None

    def of(self, length: IntOrTensor) -> IntOrTensor:
        """Tokens that a request selects of ``length`` cached tokens: int -> int, or Tensor -> int64 Tensor, alike."""
        if isinstance(length, Tensor):
            length = length.to(torch.int64)
            share = -(-length * self.share_ppm // 1_000_000)
            kept = torch.minimum(length, share.clamp(min=max(self.tokens, self.floor)))
            return torch.where(length <= self.min_context, length, kept)
        if length <= self.min_context:
            return length
        share = -(-length * self.share_ppm // 1_000_000)
        return min(length, max(share, self.tokens, self.floor))

    def plan(self, lengths: Tensor) -> Tensor:
        """Tokens that each request of a batch attends to: all of them, unless selecting saves time.

        Args:
            lengths: [B] integer, cached tokens, the current one included.

        Returns:
            [B] int64.
        """
        lengths = lengths.to(torch.int64)
        kept = self.of(lengths)
        if self.costs is None:
            return kept
        saved = ((lengths - kept) * self.costs.attend - lengths * self.costs.score).clamp(min=0)
        selects = (saved > 0) & (saved.sum() > self.costs.fixed)
        return torch.where(selects, kept, lengths)

    def largest(self, max_context: int) -> int:
        """The most tokens that a request of at most ``max_context`` tokens selects; 0 if none leaves any out."""
        kept = self.of(max_context)
        return kept if kept < max_context else 0


def row_exponents(x: Tensor) -> Tensor:
    """Float32's biased exponent of the largest magnitude of a row, in the range that rows are scaled in: [..., 1]."""
    largest = x.to(torch.float32).abs().amax(dim=-1, keepdim=True)
    return (largest.view(torch.int32) >> 23).clamp(MIN_BIASED_EXPONENT, MAX_BIASED_EXPONENT)


def integer_rows(x: Tensor, exponent: int = ROW_EXPONENT) -> Tensor:
    """Each row of ``x`` as integers, the largest at least 2^exponent and below twice that: int32, the shape of ``x``.

    Scaling by a power of two and rounding half to even are exact, and a sum of D <= 256 products with int8
    stays below 2^31. So the projection of a row is one integer, whatever the device, the kernel, the batch
    or the order of summation, and a code computed twice is the same code.
    """
    scale = ((2 * 127 + exponent - row_exponents(x)) << 23).view(torch.float32)
    return torch.round(x.to(torch.float32) * scale).to(torch.int32)


def project(x: Tensor, projection: Tensor) -> Tensor:
    """Integer rows [N, heads, D] times their KV head's projection [H, D, bits]: [N, H, heads / H, bits] float64."""
    # Integers below 2^53 in float64: as exact as int64, and a matrix product that every CPU has.
    rows = integer_rows(x).to(torch.float64).unflatten(1, (len(projection), -1))
    return torch.einsum("nhgd,hdb->nhgb", rows, projection.to(torch.float64))


def hash_codes(x: Tensor, projection: Tensor) -> Tensor:
    """Hash codes of keys or queries (paper, Alg. 2).

    Args:
        x: [N, heads, D] floating point; heads is H for keys or Hq = G * H for queries. Query head h belongs to
            KV head h // G and is hashed with that head's projection.
        projection: [H, D, bits] int8, that of KEYS or of QUERIES.

    Returns:
        [N, heads, bits / 32] int32. Bit j of a code is bit j % 32 of word j // 32, set where the projection
        onto column j is greater than zero.
    """
    return pack_bits(project(x, projection) > 0).flatten(1, 2)


def hash_sizes(x: Tensor, projection: Tensor) -> Tensor:
    """How large keys are, as their code sees them: the mean magnitude of the projections whose signs are the code.

    A code times that is the nearest to the projections that a code times a number can be (Rastegari et al., XNOR-Net,
    ECCV 2016, section 3.1). What a rotation is at right angles to, such as a bias of all keys, does not count.

    Args:
        x: [N, H, D] floating point, keys.
        projection: [H, D, bits] int8, that of KEYS.

    Returns:
        [N, H] int16: the bits of a positive bfloat16, rounded down, in a unit that is the same for all keys. Keys below
        2^-95 have size 0.
    """
    magnitude = project(x, projection).squeeze(2).abs().to(torch.int64)
    # 2^8 less than the projections, so that the sum of 256 is an int32, which rounds to one float32 everywhere.
    total = (magnitude >> 8).sum(-1).clamp(min=1).to(torch.int32)
    bits = total.to(torch.float32).view(torch.int32) + ((row_exponents(x).squeeze(-1) - SIZE_EXPONENT) << 23)
    return (bits.clamp(min=0) >> 16).to(torch.int16)


def pack_bits(bits: Tensor) -> Tensor:
    """[..., bits] bool -> [..., bits / 32] int32, least significant bit first."""
    words = bits.unflatten(-1, (-1, WORD_BITS)).to(torch.int64)
    packed = (words << torch.arange(WORD_BITS, device=bits.device)).sum(-1)
    return packed.to(torch.int32)  # int64 to int32 keeps the low 32 bits


def unpack_bits(words: Tensor) -> Tensor:
    """[..., W] int32 -> [..., 32 W] int32 of zeros and ones; the inverse of `pack_bits`."""
    return ((words.unsqueeze(-1) >> torch.arange(WORD_BITS, device=words.device)) & 1).flatten(-2)


def popcount(x: Tensor) -> Tensor:
    """Set bits of each int32."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return (x * 0x01010101) >> 24


def query_weights(query: Tensor, projection: Tensor, scoring: str = HAMMING) -> Tensor:
    """What each bit of a key's code is worth to a group of queries.

    HAMMING binarises the queries as it does keys (paper, Alg. 3). The Hamming distances of a key to the G queries of
    its group add up bit by bit: a key bit that is 1 where n of the queries have a 1 adds G - n, one that is 0 adds n.
    Which of the two is cheaper, and by how much, is all that the choice of keys depends on; so the group is summed
    once, before any key is read.

    ONE_SIDED leaves the queries as they are: their projections, summed over the group, in 8 steps of magnitude.

    Args:
        query: [B, Hq, D] floating point.
        projection: [H, D, bits] int8, that of QUERIES.

    Returns:
        [B, H, bits] int32: the sign is the bit that the group prefers, the magnitude what a key pays for the other one.
        With HAMMING, 2 n - G, halved where G is even.
    """
    B, Hq, D = query.shape
    H, _, bits = projection.shape
    G = Hq // H
    if scoring == HAMMING:
        ones = unpack_bits(hash_codes(query, projection)).view(B, H, G, bits).sum(2, dtype=torch.int32)
        return (2 * ones - G) // (1 if G % 2 else 2)  # exact: 2 n - G is even where G is
    # One power of two for the whole group, so that its rows can be added, and their sum is no longer than one row.
    rows = integer_rows(query.reshape(B, H, G * D), group_exponent(G)).view(B, H, G, D).to(torch.float64)
    projected = torch.einsum("bhgd,hdj->bhj", rows, projection.to(torch.float64)).to(torch.int32)
    unit = projected.abs().amax(dim=-1, keepdim=True) >> 8
    steps = torch.stack([projected.abs() >= unit * step for step in MAGNITUDE_STEPS]).sum(0, dtype=torch.int32)
    return torch.where(projected > 0, steps, -steps)


def group_exponent(group: int) -> int:
    """The exponent of `integer_rows` at which a sum of ``group`` rows still has the length of one row."""
    return ROW_EXPONENT - (group - 1).bit_length()


def magnitudes(group: int, scoring: str = HAMMING) -> int:
    """The largest magnitude of `query_weights` for a group of G query heads."""
    if scoring == ONE_SIDED:
        return len(MAGNITUDE_STEPS)
    return group if group % 2 else group // 2


def query_planes(weights: Tensor, largest: int) -> Tensor:
    """Weights cut into words that popcounts can work on.

    Args:
        weights: [..., bits] int32.
        largest: `magnitudes`.

    Returns:
        [..., 1 + P, W] int32: the signs (set where the weight is positive), then the P binary digits of the
        magnitudes, the lowest first.
    """
    digits = [(weights.abs() >> p) & 1 for p in range(largest.bit_length())]
    return torch.stack([pack_bits(weights > 0), *(pack_bits(digit > 0) for digit in digits)], dim=-2)


def distances(planes: Tensor, key_codes: Tensor) -> Tensor:
    """Summed weights of the bits in which a key differs from what its group of queries prefers; least is best.

    With HAMMING, the Hamming distances summed over the group, but for a constant of the group and a factor of 2 where
    G is even: the order of the keys is the same, ties too.

    Args:
        planes: [H, 1 + P, W] int32, of one request.
        key_codes: [L, H, W] int32, the codes of its cached keys in order of position.

    Returns:
        [H, L] int32, from 0 to `magnitudes` * bits.
    """
    differs = key_codes.transpose(0, 1) ^ planes[:, :1]
    total = torch.zeros(differs.shape[:2], dtype=torch.int32, device=differs.device)
    for p in range(planes.shape[1] - 1):
        total += popcount(differs & planes[:, 1 + p : 2 + p]).sum(-1, dtype=torch.int32) << p
    return total


def relative_sizes(sizes: Tensor) -> Tensor:
    """Sizes of a request's keys, relative to what is usual there: [L, H] int16 of `hash_sizes` -> [L, H] int32.

    In parts of SIZE_PARTS, at most MOST_PARTS. Usual is the geometric mean, nearly, of the SIZED_TOKENS tokens before
    the current one: the mean of the bits of floats. It only decides how finely distances are told apart, and how much
    a token's luck is worth: the order of the keys is the same by any other.
    """
    usual = sizes[max(len(sizes) - 1 - SIZED_TOKENS, 0) : len(sizes) - 1].to(torch.int32)
    mean = (usual.sum(0, dtype=torch.int32) // max(len(usual), 1)).clamp(min=LEAST_SIZE)
    # With 16 digits, so that a product with a bfloat16 is exact and then rounded once.
    inverse = (SIZE_PARTS / (mean << 16).view(torch.float32)).view(torch.int32) & -256
    size = (sizes.to(torch.int32) << 16).view(torch.float32)
    return torch.round((size * inverse.view(torch.float32)).clamp(max=MOST_PARTS)).to(torch.int32)


def stretch(distance: Tensor, total: Tensor, relative: Tensor) -> Tensor:
    """Distances times the keys' sizes, measured from that of keys at right angles to the queries, half of all weights.

    Args:
        distance: [H, L] int32.
        total: [H] int32, summed magnitudes of the `query_weights`.
        relative: [L, H] int32, of `relative_sizes`.

    Returns:
        [H, L] int32, at least 0.
    """
    total = total.unsqueeze(1)
    doubled = total * SIZE_PARTS + (2 * distance - total) * relative.T
    return ((doubled + SIZE_PARTS) >> SIZE_PARTS.bit_length()).clamp(min=0)


def bins_of(group: int, bits: int, scoring: str = HAMMING) -> int:
    """How many different ranks there are: a power of two, 256 for codes of 128 bits, so that a rank is a byte.

    Large groups, and one-sided weights, give distances beyond that: `nearness` says which of them count as equal.
    """
    return min(2 * bits, 1 << (magnitudes(group, scoring) * bits - 1).bit_length())


def nearness(total: Tensor, bins: int) -> Tensor:
    """The distance that ranks begin at: keys that are nearer count as equal. [...] int32, of ``total``.

    A key that knows nothing of the queries pays for half of all weights. That has a rank of about 3/4 bins at most, so
    that keys are told apart on both sides of it, also where the queries of a group agree in most bits, as where they
    have biases: by 128 bits and 7 queries that agree in all, keys from 4.8 deviations nearer to 1.6 farther; by 16
    queries, from 4.2 to 1.4.

    Args:
        total: [...] int32, summed magnitudes of the `query_weights`.
        bins: `bins_of`.
    """
    return (total // 2 - 3 * bins // 4).clamp(min=0)


def rank(distance: Tensor, sink: int, recent: int, bins: int, total: Tensor | None = None) -> Tensor:
    """Ranks to select by: 0 for tokens that are always kept, 1 + distance for all others, at most bins - 2.

    Distances are measured from their `nearness`, and none is below it.

    Rank bins - 1 is for no token.

    Args:
        distance: [H, L] int32.
        sink: the first ``sink`` tokens are always kept.
        recent: so are the last ``recent``; at least 1, so that the current token always is.
        bins: `bins_of`.
        total: [H] int32, summed magnitudes of the `query_weights`; None where distances are of another kind, which
            are measured from 0.
    """
    L = distance.shape[-1]
    position = torch.arange(L, device=distance.device)
    kept = (position < sink) | (position >= L - max(recent, 1))
    if total is not None:
        distance = (distance - nearness(total, bins).unsqueeze(1)).clamp(min=0)
    return torch.where(kept, 0, (distance + 1).clamp(max=bins - 2))


def octaves(weights: Tensor) -> Tensor:
    """By how many sixteenths of a rank a token's attention is guessed to halve: weights [..., bits] -> [...] int32.

    At least a rank.
    """
    squares = weights.to(torch.int64).square().sum(-1)
    # Rounds the root of the squares times RANK_PARTS over OCTAVES_A_ROOT, in integers: n + 1/2 <= 16 root / 5.
    n = torch.arange(1024, device=weights.device)
    enough = (2 * n + 1).square() * OCTAVES_A_ROOT**2 <= 4 * RANK_PARTS**2 * squares.unsqueeze(-1)
    return enough.sum(-1, dtype=torch.int32).clamp(min=RANK_PARTS)


def mix(x: Tensor) -> Tensor:
    """A random-looking 32-bit integer for each int64 of 32 bits (the end of MurmurHash3)."""
    low = 0xFFFFFFFF
    x = x & low
    x = ((x ^ (x >> 16)) * MIX_1) & low
    x = ((x ^ (x >> 13)) * MIX_2) & low
    return x ^ (x >> 16)


def luck(length: int, layer: int, device: torch.device | str = "cpu") -> Tensor:
    """The luck of every token of a context in one layer, in octaves: [length] int32, from 0 to 7, or FAR_LUCK.

    n or more with a probability of 2^-n, for n up to MOST_LUCK. It depends on nothing else, so a step that is repeated
    selects the same tokens.
    """
    position = torch.arange(length, device=device)
    seed = mix(torch.tensor(length * GOLDEN + layer, device=device))
    word = mix(seed + position // LUCK_TOKENS * GOLDEN)
    byte = (word >> (8 * (position % LUCK_TOKENS))) | 1 << MOST_LUCK
    zeros = popcount(((byte - 1) & ~byte).to(torch.int32) & (1 << MOST_LUCK) - 1)
    return torch.where(zeros == MOST_LUCK, FAR_LUCK, zeros)


def gain(luck: Tensor, octave: Tensor) -> Tensor:
    """Ranks that luck is worth: octaves and sixteenths of a rank -> whole ranks, rounded."""
    return (luck * octave + RANK_PARTS // 2) // RANK_PARTS


def draw(ranks: Tensor, luck: Tensor, octave: Tensor) -> Tensor:
    """Ranks bettered by luck: a token that is n octaves too bad gets in with a probability of 2^-n, n up to MOST_LUCK.

    Args:
        ranks: [H, L] int32, of `rank`; 0, for what is always kept, stays 0, and nothing else gets better than 1.
        luck: [L] int32.
        octave: [H] int32, of `octaves`.
    """
    return torch.where(ranks == 0, 0, (ranks - gain(luck, octave.unsqueeze(1))).clamp(min=1))


def doublings(drawn: Tensor, luck: Tensor, octave: Tensor, positions: Tensor) -> Tensor:
    """How often the weight of each selected token is doubled, as it stands for tokens that had no such luck.

    A token that needed n octaves of luck to be no worse than the worst selected had a chance of 2^-n, so it counts 2^n
    times. What luck has brought to rank 1 is taken for one that needed none: it is far better than what just got in.
    Sums over all tokens are then met on average, but for those that not even FAR_LUCK helps, and for ties at the cut,
    of which the earliest get in.

    Args:
        drawn: [H, L] int32, of `draw`.
        positions: [H, k] int64, selected by ``drawn``.

    Returns:
        [H, k] int32, from 0 to MOST_LUCK.
    """
    chosen, octave = drawn.gather(1, positions), octave.unsqueeze(1)
    missing = chosen + gain(luck[positions], octave) - chosen.amax(dim=1, keepdim=True)
    # The least n of which `gain` is that much: n octaves and half a rank are as many sixteenths, or more.
    needed = (missing * RANK_PARTS - RANK_PARTS // 2 + octave - 1) // octave
    return torch.where(chosen > 1, needed.clamp(0, MOST_LUCK), 0).to(torch.int32)


def select_positions(ranks: Tensor, k: int) -> Tensor:
    """Positions of the ``k`` lowest ranks of each KV head; among equal ranks the earliest positions win.

    Returns:
        [H, min(k, L)] int64, ascending.
    """
    order = torch.sort(ranks, dim=-1, stable=True).indices
    return order[..., :k].sort(dim=-1).values


def attend(query: Tensor, keys: Tensor, values: Tensor, scale: float, doublings: Tensor | None = None) -> Tensor:
    """Softmax attention of one request's query heads over the tokens selected for their KV head, in float32.

    Args:
        query: [Hq, D].
        keys, values: [H, k, D] and [H, k, Dv].
        scale: multiplies q . k, usually D ** -0.5.
        doublings: [H, k] int32: each token counts 2 to that power times.

    Returns:
        [Hq, Dv], the dtype of ``query``.
    """
    H = keys.shape[0]
    q = query.to(torch.float32).view(H, -1, query.shape[-1])
    logits = q @ keys.to(torch.float32).transpose(1, 2) * scale
    if doublings is not None:
        logits = logits + doublings.unsqueeze(1) * math.log(2)
    weights = torch.softmax(logits, dim=-1)
    return (weights @ values.to(torch.float32)).reshape(query.shape[0], -1).to(query.dtype)


def hata_decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    code_cache: Tensor,
    slots: list[Tensor],
    projection: Tensor,
    budget: Budget,
    *,
    sink: int,
    recent: int,
    scale: float,
    scoring: str = HAMMING,
    selection: str = SAMPLED,
    layer: int = 0,
    size_cache: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """One decode step of one layer: all the steps above, request by request.

    Args:
        query: [B, Hq, D], after RoPE.
        key_cache, value_cache: [S, H, D] and [S, H, Dv].
        code_cache: [S, H, W] int32.
        slots: for each request, the slots of its cached tokens in order of position, the current one last.
        projection: [2, H, D, bits] int8, that of KEYS and that of QUERIES, which made ``code_cache`` and make planes.
        selection: SAMPLED, or TOP for the best tokens alone, as in the paper.
        layer: luck is another in every layer.
        size_cache: [S, H] int16, sizes of the keys (`hash_sizes`), to stretch distances by.

    Returns:
        The output [B, Hq, Dv], and for each request the selected positions [H, k] int64.
    """
    _, H, _, bits = projection.shape
    G = query.shape[1] // H
    weights = query_weights(query, projection[QUERIES], scoring)
    planes, octave = query_planes(weights, magnitudes(G, scoring)), octaves(weights)
    totals = weights.abs().sum(-1, dtype=torch.int32)
    bins = bins_of(G, bits, scoring)
    kept = budget.plan(torch.tensor([len(request) for request in slots])).tolist()
    head = torch.arange(H, device=query.device).unsqueeze(1)
    outputs, selected = [], []
    for q, q_planes, q_octave, total, request_slots, k in zip(query, planes, octave, totals, slots, kept, strict=True):
        distance = distances(q_planes, code_cache[request_slots])
        if size_cache is not None:
            distance = stretch(distance, total, relative_sizes(size_cache[request_slots]))
        ranks = rank(distance, sink, recent, bins, total)
        chance = luck(len(request_slots), layer, query.device) * (selection == SAMPLED and k < len(request_slots))
        drawn = draw(ranks, chance, q_octave)
        positions = select_positions(drawn, k)
        chosen = request_slots[positions]
        counted = doublings(drawn, chance, q_octave, positions)
        outputs.append(attend(q, key_cache[chosen, head], value_cache[chosen, head], scale, counted))
        selected.append(positions)
    return torch.stack(outputs), selected
