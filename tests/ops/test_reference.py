"""The specification against brute force: Python integers, fractions and sorted tuples."""

from __future__ import annotations

import math
import struct
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hata_kernels.reference import (
    HAMMING,
    KEYS,
    ONE_SIDED,
    Budget,
    Costs,
    attend,
    bins_of,
    distances,
    doublings,
    draw,
    hash_codes,
    hash_sizes,
    hata_decode,
    integer_rows,
    luck,
    magnitudes,
    octaves,
    pack_bits,
    popcount,
    query_planes,
    query_weights,
    rank,
    relative_sizes,
    select_positions,
    stretch,
)

settings.register_profile("ops", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("ops")

INT32 = st.integers(-(2**31), 2**31 - 1)
LENGTHS = st.integers(1, 2**31)
BUDGETS = st.builds(
    Budget,
    tokens=st.integers(0, 5000),
    share_ppm=st.integers(0, 1_000_000),
    floor=st.integers(1, 300),
    min_context=st.integers(0, 20_000),
)


def integers_of(row: list[float], exponent: int = 13) -> list[int]:
    """`integer_rows` of one row in exact arithmetic."""
    largest = max(abs(value) for value in row)
    biased = struct.unpack("<I", struct.pack("<f", largest))[0] >> 23
    scale = Fraction(2) ** (127 + exponent - min(max(biased, 13), 254))
    return [round(Fraction(value) * scale) for value in row]


def code_of(row: list[float], columns: list[list[int]]) -> list[int]:
    """Words of the hash code of one row, as signed 32-bit integers."""
    integers = integers_of(row)
    bits = [int(sum(a * b for a, b in zip(integers, column, strict=True)) > 0) for column in columns]
    words = [sum(bit << i for i, bit in enumerate(bits[w : w + 32])) for w in range(0, len(bits), 32)]
    return [word - 2**32 if word >= 2**31 else word for word in words]


def floats(width: int = 32) -> st.SearchStrategy[float]:
    return st.floats(allow_nan=False, allow_infinity=False, width=width)


@given(st.integers(1, 5).flatmap(lambda d: st.lists(floats(), min_size=d, max_size=d)))
def test_integer_rows_are_scaled_and_rounded_exactly(row: list[float]) -> None:
    assert integer_rows(torch.tensor([row])).tolist() == [integers_of(row)]


@given(st.lists(floats(), min_size=1, max_size=9))
def test_integer_rows_fit_fifteen_bits_and_sign(row: list[float]) -> None:
    rows = integer_rows(torch.tensor(row))
    assert int(rows.abs().max()) <= 2**14


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("kv_heads", "group", "head_dim", "bits"), [(1, 3, 5, 32), (2, 1, 64, 64), (3, 2, 7, 96)])
def test_hash_bits_equal_python_integers(
    kv_heads: int, group: int, head_dim: int, bits: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(kv_heads)
    x = torch.randn(4, kv_heads * group, head_dim, generator=generator)
    x = (x * torch.tensor([1e-4, 1.0, 30.0, 0.0]).view(4, 1, 1)).to(dtype)
    projection = torch.randint(-128, 128, (kv_heads, head_dim, bits), generator=generator, dtype=torch.int8)
    codes = hash_codes(x, projection)
    for n in range(4):
        for head in range(kv_heads * group):
            columns = projection[head // group].T.tolist()
            assert codes[n, head].tolist() == code_of(x[n, head].float().tolist(), columns)


def test_zero_rows_have_zero_codes() -> None:
    projection = torch.full((2, 8, 64), -128, dtype=torch.int8)
    assert hash_codes(torch.zeros(3, 4, 8), projection).eq(0).all()


@given(st.integers(-80, 80), st.integers(0, 2**32 - 1))
def test_hash_ignores_powers_of_two(exponent: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, 9, generator=generator)
    projection = torch.randint(-128, 128, (3, 9, 64), generator=generator, dtype=torch.int8)
    assert torch.equal(hash_codes(x, projection), hash_codes(torch.ldexp(x, torch.tensor(exponent)), projection))


@given(st.lists(INT32, min_size=1, max_size=20))
def test_popcount_counts_bits(words: list[int]) -> None:
    expected = [bin(word & 0xFFFFFFFF).count("1") for word in words]
    assert popcount(torch.tensor(words, dtype=torch.int32)).tolist() == expected


@given(st.lists(st.lists(st.booleans(), min_size=64, max_size=64), min_size=1, max_size=3))
def test_bits_are_packed_least_significant_first(rows: list[list[bool]]) -> None:
    words = pack_bits(torch.tensor(rows)).tolist()
    for row, packed in zip(rows, words, strict=True):
        unpacked = [bool((word >> i) & 1) for word in packed for i in range(32)]
        assert unpacked == row


@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**31))
def test_distances_are_summed_hamming_distances(H: int, G: int, L: int, seed: int) -> None:
    """But for what all keys of a group have in common, and a factor of 2 for even groups."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(1, H * G, 8, generator=generator)
    projection = torch.randint(-128, 128, (H, 8, 64), generator=generator, dtype=torch.int8)
    keys = torch.randint(-(2**31), 2**31, (L, H, 2), generator=generator).to(torch.int32)
    queries = hash_codes(q, projection)[0].tolist()
    weights = query_weights(q, projection)
    assert weights.abs().max() <= magnitudes(G)
    found = distances(query_planes(weights, magnitudes(G))[0], keys)
    for h in range(H):
        # What each bit costs the G queries together at the least, whichever value a key has there.
        ones = [sum(query[w] >> i & 1 for query in queries[h * G : (h + 1) * G]) for w in range(2) for i in range(32)]
        shared = sum(min(n, G - n) for n in ones)
        for position, key in enumerate(keys.tolist()):
            pairs = ((query[w], key[h][w]) for query in queries[h * G : (h + 1) * G] for w in range(2))
            hamming = sum(bin((a ^ b) & 0xFFFFFFFF).count("1") for a, b in pairs)
            assert found[h, position] * (1 if G % 2 else 2) + shared == hamming


@given(st.integers(1, 3), st.integers(1, 5), st.integers(0, 2**31))
def test_one_sided_weights_are_rounded_sums_of_projections(H: int, G: int, seed: int) -> None:
    """Against Python integers: one scale a group, that a sum of its rows stays as short as a row; sevenths of the
    largest."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(1, H * G, 6, generator=generator)
    projection = torch.randint(-128, 128, (H, 6, 32), generator=generator, dtype=torch.int8)
    weights = query_weights(q, projection, ONE_SIDED)[0].tolist()
    for h in range(H):
        rows = q[0, h * G : (h + 1) * G].tolist()
        flat = integers_of([x for row in rows for x in row], 13 - math.ceil(math.log2(G)))
        row = [sum(flat[g * 6 + d] for g in range(G)) for d in range(6)]
        assert max(map(abs, row)) <= 1 << 14
        exact = [sum(x * int(p) for x, p in zip(row, column, strict=True)) for column in projection[h].T.tolist()]
        unit = max(abs(w) for w in exact) >> 8
        for w, found in zip(exact, weights[h], strict=True):
            steps = sum(abs(w) >= unit * step for step in (18, 55, 91, 128, 165, 201, 238))
            assert found == (steps if w > 0 else -steps)


@given(st.integers(1, 3), st.integers(1, 9), st.integers(0, 2**31))
def test_distances_are_sums_of_weights(H: int, L: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randint(-7, 8, (H, 64), generator=generator, dtype=torch.int32)
    bits = torch.randint(0, 2, (L, H, 64), generator=generator)
    found = distances(query_planes(weights, 7), pack_bits(bits > 0))
    for h in range(H):
        for position in range(L):
            pays = ((int(w), int(bit)) for w, bit in zip(weights[h], bits[position, h], strict=True))
            assert found[h, position] == sum(abs(w) for w, bit in pays if bit != (w > 0))


@given(st.integers(1, 16), st.sampled_from([64, 128, 256]), st.sampled_from([HAMMING, ONE_SIDED]))
def test_ranks_keep_apart_all_distances_but_the_farthest(group: int, bits: int, scoring: str) -> None:
    bins = bins_of(group, bits, scoring)
    assert bins.bit_count() == 1
    farthest = magnitudes(group, scoring) * bits
    ranks = rank(torch.arange(farthest + 1).unsqueeze(0), 0, 0, bins)[0, :-1].tolist()
    assert ranks == [min(1 + distance, bins - 2) for distance in range(farthest)]


@pytest.mark.parametrize("group", range(1, 17))
@pytest.mark.parametrize("scoring", [HAMMING, ONE_SIDED])
def test_random_keys_are_not_among_the_farthest(group: int, scoring: str) -> None:
    """Half of them at least are told apart, so a budget of up to half the context never meets the last rank."""
    generator = torch.Generator().manual_seed(group)
    q, keys = torch.randn(4, group, 64, generator=generator), torch.randn(500, 1, 64, generator=generator)
    projection = torch.randint(-128, 128, (1, 64, 128), generator=generator, dtype=torch.int8)
    codes = hash_codes(keys, projection)
    for weights in query_weights(q, projection, scoring):
        distance = distances(query_planes(weights, magnitudes(group, scoring)), codes)
        assert distance.median() < bins_of(group, 128, scoring) - 3


def bfloat16(bits: int) -> float:
    value: float = struct.unpack("<f", struct.pack("<I", bits << 16))[0]
    return value


@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=3, max_size=3),
    st.lists(st.lists(st.integers(-128, 127), min_size=32, max_size=32), min_size=3, max_size=3),
)
def test_sizes_are_the_magnitudes_of_projections_in_bfloat16(row: list[float], projection: list[list[int]]) -> None:
    x = torch.tensor(row, dtype=torch.float32)
    found = int(hash_sizes(x.view(1, 1, 3), torch.tensor(projection, dtype=torch.int8).unsqueeze(0)))
    rows = integers_of(row)
    columns = list(zip(*projection, strict=True))
    total = sum(abs(sum(a * b for a, b in zip(rows, column, strict=True))) >> 8 for column in columns)
    largest = struct.unpack("<I", struct.pack("<f", max(map(abs, row))))[0] >> 23
    exact = Fraction(max(total, 1)) * Fraction(2) ** (min(max(largest, 13), 254) - 158)
    if exact < Fraction(2) ** -126:
        assert found == 0
    else:
        # One rounding to float32, and one down to bfloat16.
        assert exact * (1 - Fraction(1, 127)) < Fraction(bfloat16(found)) <= exact * (1 + Fraction(1, 2**23))


def test_sizes_are_in_proportion_whatever_the_magnitude() -> None:
    generator = torch.Generator().manual_seed(4)
    projection = torch.randint(-128, 128, (2, 64, 128), generator=generator, dtype=torch.int8)
    x = torch.randn(7, 2, 64, generator=generator)
    once = hash_sizes(x, projection).to(torch.int32)
    assert (once > 0).all()
    for octaves_larger in (-40, -1, 1, 30):
        scaled = hash_sizes(x * 2.0**octaves_larger, projection).to(torch.int32)
        assert torch.equal(scaled, once + (octaves_larger << 7))
    assert (hash_sizes(x * 2.0**-120, projection) == 0).all() and (hash_sizes(x * 0, projection) == 0).all()


@given(st.lists(st.integers(0, 0x7F7F), min_size=1, max_size=30))
def test_relative_sizes_are_quotients_by_what_is_usual(sizes: list[int]) -> None:
    usual = sizes[:-1][-16:]
    mean = max(sum(usual) // max(len(usual), 1), 16 << 7)
    expected = [min(round(Fraction(64) * Fraction(bfloat16(size)) / Fraction(bfloat16(mean))), 255) for size in sizes]
    found = relative_sizes(torch.tensor(sizes, dtype=torch.int16).unsqueeze(1)).squeeze(1).tolist()
    # The inverse has 16 digits, so quotients next to a half may be rounded the other way.
    assert all(abs(a - b) <= 1 for a, b in zip(found, expected, strict=True))


@given(st.lists(st.tuples(st.integers(0, 900), st.integers(0, 255)), min_size=1, max_size=20), st.integers(0, 900))
def test_stretched_distances_are_as_far_from_half_as_the_key_is_large(keys: list[tuple[int, int]], total: int) -> None:
    distance, relative = torch.tensor(keys, dtype=torch.int32).T
    found = stretch(distance.unsqueeze(0), torch.tensor([total]), relative.unsqueeze(1)).squeeze(0).tolist()
    half = Fraction(total, 2)
    assert found == [max(math.floor(half + (d - half) * Fraction(n, 64) + Fraction(1, 2)), 0) for d, n in keys]


@pytest.mark.parametrize("group", [5, 7, 8, 16])
@pytest.mark.parametrize("scoring", [HAMMING, ONE_SIDED])
def test_queries_that_agree_still_tell_keys_apart(group: int, scoring: str) -> None:
    """As where queries have biases: all weights of a group are then as large as they can be, or nearly."""
    generator = torch.Generator().manual_seed(group)
    projection = torch.randint(-128, 128, (1, 64, 128), generator=generator, dtype=torch.int8)
    q = torch.randn(1, 1, 64, generator=generator) + 0.01 * torch.randn(1, group, 64, generator=generator)
    weights = query_weights(q, projection, scoring)[0]
    codes = torch.randint(-(2**31), 2**31, (5000, 1, 4), generator=generator).to(torch.int32)
    distance = distances(query_planes(weights, magnitudes(group, scoring)), codes)
    bins = bins_of(group, 128, scoring)
    ranks = rank(distance, 0, 1, bins, weights.abs().sum(-1))[0, :-1]
    best = distance[0, :-1].argsort()[:100]
    assert len(ranks[best].unique()) >= 0.9 * len(distance[0, best].unique()) > 5
    assert (ranks == bins - 2).float().mean() < 0.15


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=30),
    st.integers(0, 9),
    st.integers(0, 9),
    st.integers(1, 35),
)
def test_selection_equals_sorted_tuples(scores: list[int], sink: int, recent: int, k: int) -> None:
    """Few distinct scores, so most of them tie; sinks and recent tokens overlap each other and the whole."""
    L = len(scores)
    ranks = rank(torch.tensor([scores], dtype=torch.int32), sink, recent, bins=64)
    always = {p for p in range(L) if p < sink or p >= L - max(recent, 1)}
    expected = [0 if p in always else 1 + score for p, score in enumerate(scores)]
    assert ranks.tolist() == [expected]
    chosen = sorted(p for _, p in sorted((rank, p) for p, rank in enumerate(expected))[:k])
    assert select_positions(ranks, k).tolist() == [chosen]
    if k >= len(always):
        assert always <= set(chosen)


def test_equal_scores_keep_the_earliest() -> None:
    ranks = rank(torch.full((2, 10), 7, dtype=torch.int32), sink=1, recent=2, bins=64)
    assert select_positions(ranks, 5).tolist() == [[0, 1, 2, 8, 9]] * 2
    assert select_positions(ranks, 1).tolist() == [[0]] * 2
    assert select_positions(ranks, 10).tolist() == [list(range(10))] * 2


def test_luck_halves_with_every_octave_and_is_another_in_every_layer_and_step() -> None:
    drawn = [luck(length, layer) for length, layer in ((50_000, 3), (50_000, 4), (50_001, 3))]
    assert torch.equal(luck(50_000, 3), drawn[0])
    for row in drawn:
        assert set(row.tolist()) == {*range(8), 12}
        for n in range(1, 9):
            expected = 50_000 / 2**n
            assert abs(int((row >= n).sum()) - expected) < 5 * expected**0.5
    rows = torch.stack([row[:49_999] for row in drawn] + [drawn[0][1:]]).double()
    assert (torch.corrcoef(rows).fill_diagonal_(0).abs() < 0.025).all()


@given(st.integers(1, 2**24), st.integers(0, 200))
def test_luck_is_the_zeros_at_the_end_of_a_byte_of_murmurhash(length: int, layer: int) -> None:
    def murmur(x: int) -> int:
        x &= 0xFFFFFFFF
        x = (x ^ (x >> 16)) * 0x85EBCA6B & 0xFFFFFFFF
        x = (x ^ (x >> 13)) * 0xC2B2AE35 & 0xFFFFFFFF
        return x ^ (x >> 16)

    shown = min(length, 13)
    seed = murmur(length * 0x9E3779B1 + layer)
    octets = [murmur(seed + i // 4 * 0x9E3779B1) >> 8 * (i % 4) & 255 for i in range(shown)]
    expected = [(octet & -octet).bit_length() - 1 if octet else 12 for octet in octets]
    assert luck(length, layer)[:shown].tolist() == expected


@given(st.lists(st.lists(st.integers(-15, 15), min_size=4, max_size=256), min_size=1, max_size=1))
def test_octaves_are_a_fifth_of_the_root_of_the_squares_in_sixteenths(rows: list[list[int]]) -> None:
    root = math.sqrt(sum(w * w for w in rows[0]))
    assert octaves(torch.tensor(rows)).tolist() == [max(16, math.floor(root * 16 / 5 + 0.5))]


@given(st.integers(2, 60), st.integers(1, 60), st.integers(16, 150), st.integers(0, 2**31))
def test_a_token_counts_as_often_as_it_needed_luck(L: int, k: int, octave: int, seed: int) -> None:
    """Token by token: how many octaves better than it is must a token be to be no worse than the worst selected?"""
    k = min(k, L)
    generator = torch.Generator().manual_seed(seed)
    ranks = torch.randint(0, 60, (1, L), generator=generator, dtype=torch.int32)
    lucky = torch.tensor([*range(8), 12], dtype=torch.int32)[torch.randint(0, 9, (L,), generator=generator)]
    drawn = draw(ranks, lucky, torch.tensor([octave]))
    pairs = zip(ranks[0].tolist(), lucky.tolist(), strict=True)
    gains = [math.floor(n * octave / 16 + 0.5) for n in range(13)]
    expected = [0 if rank == 0 else max(1, rank - gains[n]) for rank, n in pairs]
    assert drawn.tolist() == [expected]
    positions = select_positions(drawn, k)
    doubled = doublings(drawn, lucky, torch.tensor([octave]), positions)
    worst = max(expected[p] for p in positions[0].tolist())
    for p, found in zip(positions[0].tolist(), doubled[0].tolist(), strict=True):
        needed = next(n for n in range(13) if int(ranks[0, p]) - gains[n] <= worst)
        assert found == (min(needed, 8) if expected[p] > 1 else 0)


def test_what_is_selected_stands_for_all() -> None:
    """Attention that halves with every octave, summed over the selected tokens, each as often as it counts, is on
    average nearly that over all tokens. Ties at the cut make it a few per cent less."""
    L, k, octave = 3000, 300, torch.tensor([100])
    generator = torch.Generator().manual_seed(0)
    ranks = (100 + 15 * torch.randn(1, L, generator=generator)).round().int()
    attention = torch.exp2(-ranks[0].double() * 16 / 100) * torch.rand(L, generator=generator)
    attention /= attention.sum()
    sums = []
    for layer in range(400):
        lucky = luck(L, layer)
        drawn = draw(ranks, lucky, octave)
        positions = select_positions(drawn, k)
        times = 2.0 ** doublings(drawn, lucky, octave, positions)[0]
        sums.append(float((times * attention[positions[0]]).sum()))
    assert 0.94 < sum(sums) / len(sums) < 1.02
    assert attention[select_positions(ranks, k)[0]].sum() < 0.7, "the best alone would do: the test shows nothing"


def test_what_codes_call_hopeless_gets_in_at_times() -> None:
    """A token ten octaves behind the cut: once in 2^8 steps, and then it counts 2^8 times."""
    L, k, octave, steps = 400, 80, torch.tensor([100]), 5000
    ranks = (100 + 5 * torch.randn(1, L, generator=torch.Generator().manual_seed(0))).round().int()
    ranks[0, 7] = 150
    counted = 0
    for layer in range(steps):
        lucky = luck(L, layer)
        drawn = draw(ranks, lucky, octave)
        positions = select_positions(drawn, k)
        behind = 150 - int(drawn.gather(1, positions).max())
        assert 8 * 6.25 < behind < 12 * 6.25, "the test is about tokens that are far, but not too far"
        if 7 in positions:
            assert doublings(drawn, lucky, octave, positions)[0, positions[0] == 7].item() == 8
            counted += 1
    expected = steps / 2**8
    assert abs(counted - expected) < 4 * expected**0.5


@given(BUDGETS, st.lists(LENGTHS, min_size=1, max_size=8))
def test_budget_is_the_same_on_host_and_device(budget: Budget, lengths: list[int]) -> None:
    on_host = [budget.of(length) for length in lengths]
    assert budget.of(torch.tensor(lengths)).tolist() == on_host
    assert budget.of(torch.tensor([min(n, 2**31 - 1) for n in lengths], dtype=torch.int32)).tolist() == [
        budget.of(min(n, 2**31 - 1)) for n in lengths
    ]
    assert all(1 <= kept <= length for kept, length in zip(on_host, lengths, strict=True))


@given(BUDGETS, st.integers(1, 40_000), st.data())
def test_budget_never_exceeds_its_largest(budget: Budget, max_context: int, data: st.DataObject) -> None:
    length = data.draw(st.integers(1, max_context))
    kept = budget.of(length)
    assert kept == length or kept <= budget.largest(max_context)


@given(st.integers(0, 9), st.integers(0, 9), st.integers(0, 90), st.lists(st.integers(1, 40), min_size=1, max_size=6))
def test_costs_decide_as_their_sums_do(attend: int, score: int, fixed: int, lengths: list[int]) -> None:
    """A batch selects if that saves time; a request of it, if it saves some of its own."""
    budget = Budget(tokens=10, costs=Costs(attend, score, fixed))
    saved = [max(0, (n - min(n, 10)) * attend - n * score) for n in lengths]
    worth = sum(saved) > fixed
    assert budget.plan(torch.tensor(lengths)).tolist() == [
        10 if worth and each > 0 else n for n, each in zip(lengths, saved, strict=True)
    ]


def test_attention_equals_sums_in_python() -> None:
    generator = torch.Generator().manual_seed(0)
    H, G, D, k = 2, 3, 5, 4
    query, keys, values = (
        torch.randn(shape, generator=generator, dtype=torch.float32) for shape in ((H * G, D), (H, k, D), (H, k, 3))
    )
    output = attend(query, keys, values, scale=0.3)
    for head in range(H * G):
        h = head // G
        logits = [0.3 * float(query[head].double() @ keys[h, i].double()) for i in range(k)]
        weights = [math.exp(logit) for logit in logits]
        for d in range(3):
            expected = sum(w * float(values[h, i, d]) for i, w in enumerate(weights)) / sum(weights)
            assert float(output[head, d]) == pytest.approx(expected, rel=1e-5)


def test_whole_step_with_a_full_budget_is_dense_attention() -> None:
    generator = torch.Generator().manual_seed(1)
    B, H, G, D, S = 2, 2, 2, 8, 20
    q = torch.randn(B, H * G, D, generator=generator)
    k_cache, v_cache = (torch.randn(S, H, D, generator=generator) for _ in range(2))
    projection = torch.randint(-128, 128, (2, H, D, 64), generator=generator, dtype=torch.int8)
    slots = [torch.tensor([3, 1, 7]), torch.tensor([3, 1, 9, 4, 0])]
    codes = hash_codes(k_cache, projection[KEYS])
    step = {"sink": 1, "recent": 1, "scale": 0.5}
    output, selected = hata_decode(q, k_cache, v_cache, codes, slots, projection, Budget(tokens=100), **step)
    for b, request in enumerate(slots):
        keys, values = k_cache[request].transpose(0, 1), v_cache[request].transpose(0, 1)
        torch.testing.assert_close(output[b], attend(q[b], keys, values, 0.5))
        assert selected[b].tolist() == [list(range(len(request)))] * H
    _, selected = hata_decode(q, k_cache, v_cache, codes, slots, projection, Budget(tokens=2), **step)
    assert [positions.tolist() for positions in selected] == [[[0, 2]] * H, [[0, 4]] * H]
