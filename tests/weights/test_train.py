"""Training: on a problem whose answer is known, codes of 64 bits learn where the few directions that matter lie."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hata_kernels import reference
from hata_weights import cli
from hata_weights.capture import Sample, Shape
from hata_weights.evaluate import (
    BEST,
    EXACT,
    QUERIES_AT_ONCE,
    Choice,
    Method,
    codes,
    evaluate_layer,
    methods,
    summarise,
)
from hata_weights.rotation import untrained_projection
from hata_weights.train import (
    LOGITS,
    ROOM,
    Recipe,
    draw_batch,
    first_projection,
    layers_at_once,
    mean_attention,
    train_layer,
    train_layers,
)
from sglang_hata.config import HataConfig

H, G, D, N = 2, 3, 32, 1024
RECIPE = Recipe(bits=64, steps=100, keys=512, sink=4, recent=16)


def synthetic(seed: int, offset: float = 4) -> Sample:
    """Keys with a large common offset and noise in 24 dimensions, which queries do not look at."""
    draw = torch.Generator().manual_seed(seed)
    keys = torch.randn(H, N, D, generator=draw)
    keys[..., 8:] = keys[..., 8:] * 3 + offset
    looked_for = torch.randn(H, 1, 64, D, generator=draw) + 0.3 * torch.randn(H, G, 64, D, generator=draw)
    looked_for *= torch.where(torch.arange(D) < 8, 8.0, 0.1)
    return Sample(looked_for.flatten(0, 1), keys, torch.linspace(N // 2, N - 1, 64).long(), torch.tensor(D**-0.5))


@pytest.fixture(scope="module", params=["hamming", "one-sided"])
def trained(request: pytest.FixtureRequest) -> tuple[str, Tensor]:
    return request.param, train_layer([synthetic(0), synthetic(1)], 5, replace(RECIPE, scoring=request.param))


def masses(compared: list[Method], offset: float = 4) -> dict[str, float]:
    compared = [method for method in methods(Shape(1, H * G, H, D)) if method.name == EXACT] + compared
    rows = evaluate_layer([synthetic(2, offset)], 5, compared, sink=4, recent=16)
    return {s.method: s.mass for s in summarise(rows) if s.budget == 32}


def test_the_defaults_are_those_of_a_server() -> None:
    config = HataConfig()
    assert (Recipe.sink, Recipe.recent) == (cli.SINK, cli.RECENT) == (config.sink, config.recent)


def test_training_beats_random_rotations(trained: tuple[str, Tensor]) -> None:
    scoring, weights = trained
    rotation = untrained_projection(5, range(H), D, 64)
    kept = masses(
        [
            Method("trained", 8, lambda sample, _: codes(sample, weights, scoring)),
            Method("untrained", 8, lambda sample, _: codes(sample, rotation, scoring)),
        ]
    )
    assert kept[EXACT] > kept["trained"] > 1.5 * kept["untrained"]


def test_training_is_none_the_worse_for_a_large_bias(trained: tuple[str, Tensor]) -> None:
    """Keys of Qwen2.5 have a mean that is up to a hundred times as long as their deviations."""
    scoring, weights = trained
    recipe = replace(RECIPE, scoring=scoring)
    biased = train_layer([synthetic(0, 40), synthetic(1, 40)], 5, recipe)
    without = masses([Method("codes", 8, lambda sample, _: codes(sample, weights, scoring))])
    with_bias = masses([Method("codes", 8, lambda sample, _: codes(sample, biased, scoring))], 40)
    assert with_bias["codes"] > 0.8 * without["codes"]


def test_training_repeats_itself(trained: tuple[str, Tensor]) -> None:
    scoring, weights = trained
    again = train_layer([synthetic(0), synthetic(1)], 5, replace(RECIPE, scoring=scoring))
    assert torch.equal(weights, again)


def test_layers_trained_together_are_what_they_are_alone(trained: tuple[str, Tensor]) -> None:
    scoring, weights = trained
    other = [synthetic(3), synthetic(4)]
    pairs = zip([synthetic(0), synthetic(1)], other, strict=True)
    both = [replace(a, queries=torch.cat([a.queries, b.queries]), keys=torch.cat([a.keys, b.keys])) for a, b in pairs]
    recipe, steps = replace(RECIPE, scoring=scoring), []
    together = train_layers(both, [5, 6], recipe, lambda: steps.append(1))
    assert len(steps) == recipe.steps
    assert torch.equal(together[0], weights)
    assert torch.equal(together[1], train_layer(other, 6, recipe))


def test_nothing_beats_the_best_possible_choice(trained: tuple[str, Tensor]) -> None:
    scoring, weights = trained
    others = [method for method in methods(Shape(1, H * G, H, D)) if method.name != EXACT]
    kept = masses([*others, Method("trained", 8, lambda sample, _: codes(sample, weights, scoring))])
    assert kept[BEST] >= kept[EXACT] >= max(mass for name, mass in kept.items() if name not in (BEST, EXACT))


def test_untrained_codes_choose_better_without_what_keys_have_in_common() -> None:
    common = torch.where(torch.arange(D) < 8, 0.0, 40.0).expand(H, D)
    plain, without = (untrained_projection(5, range(H), D, 128, x) for x in (None, common))
    kept = masses(
        [
            Method("plain", 16, lambda sample, _: codes(sample, plain, "hamming")),
            Method("without", 16, lambda sample, _: codes(sample, without, "hamming")),
        ],
        40,
    )
    assert kept["without"] > 2 * kept["plain"]


def different_projections(bits: int) -> Tensor:
    """One for keys and another for queries."""
    return torch.stack([untrained_projection(layer, range(H), D, bits)[0] for layer in (0, 1)])


@pytest.mark.parametrize("scoring", ["hamming", "one-sided"])
def test_choices_are_those_of_the_specification(scoring: str) -> None:
    sample = synthetic(4)
    projection = different_projections(128)
    score = codes(sample, projection, scoring)
    queries = sample.queries.unflatten(0, (H, G))[:, :, :QUERIES_AT_ONCE]
    positions = sample.positions[:QUERIES_AT_ONCE]
    attention = mean_attention(queries, sample.keys, positions, sample.scale)
    choice = Choice(attention, positions, 4, 16)
    mass, order = choice.of(score(queries, sample.keys))
    key_codes = reference.hash_codes(sample.keys.transpose(0, 1), projection[reference.KEYS])
    for m in (0, 17):
        length, k = int(positions[m]) + 1, int(choice.counts[-1, m])
        rows = queries[:, :, m].reshape(1, H * G, D)
        weights = reference.query_weights(rows, projection[reference.QUERIES], scoring)[0]
        planes = reference.query_planes(weights, reference.magnitudes(G, scoring))
        bins = reference.bins_of(G, 128, scoring)
        distance = reference.distances(planes, key_codes[:length])
        ranks = reference.rank(distance, 4, 16, bins, weights.abs().sum(-1))
        selected = reference.select_positions(ranks, k)
        assert torch.equal(order[:, m, :k].sort(-1).values, selected)
        torch.testing.assert_close(mass[:, -1, m], attention[:, m].gather(-1, selected).sum(-1))


@settings(max_examples=40)
@given(
    scores=st.lists(st.integers(-3, 3), min_size=40, max_size=40),
    position=st.integers(20, 39),
    sink=st.integers(0, 4),
    recent=st.integers(1, 6),
    budget=st.sampled_from([2, 4, 16]),
)
def test_ties_and_forced_tokens_are_the_specifications(
    scores: list[int], position: int, sink: int, recent: int, budget: int
) -> None:
    attention = torch.rand(1, 1, 40, generator=torch.Generator().manual_seed(0))
    choice = Choice(attention, torch.tensor([position]), sink, recent, [budget])
    mass, order = choice.of(torch.tensor(scores, dtype=torch.float32).view(1, 1, 40))
    length = position + 1
    k = reference.Budget(share_ppm=1_000_000 // budget, floor=sink + recent).of(length)
    assert int(choice.counts[0, 0]) == k
    ranks = reference.rank(3 - torch.tensor([scores[:length]]), sink, recent, bins=64)
    selected = reference.select_positions(ranks, k)[0]
    assert torch.equal(order[0, 0, :k].sort().values, selected)
    torch.testing.assert_close(mass[0, 0, 0], attention[0, 0, selected].sum())
    assert not (order[0, 0, :k] > position).any()


@settings(max_examples=20)
@given(
    turn=st.integers(0, 3),
    queries=st.integers(1, 8),
    keys=st.integers(64, 4096),
    sink=st.integers(0, 20),
    recent=st.integers(0, 70),
)
def test_a_drawn_batch_stands_for_the_whole_sequence(
    turn: int, queries: int, keys: int, sink: int, recent: int
) -> None:
    recipe = Recipe(queries=queries, keys=keys, sink=sink, recent=recent)
    sample = synthetic(6)
    target, drawn_queries, drawn_keys, correction = draw_batch(
        sample, recipe, turn, torch.Generator().manual_seed(turn)
    )
    n = drawn_keys.shape[1]
    assert target.shape == correction.shape == (H, queries, n) and n <= min(keys, N)
    assert drawn_queries.shape == (H, G, queries, D)
    torch.testing.assert_close(target.sum(-1), torch.ones(H, queries))
    hidden = correction < -1e8
    assert (target[hidden] == 0).all()
    # Drawn keys stand for those that were not: by their corrections they count as all N keys, the hidden ones included.
    counted = torch.where(hidden, -torch.inf, correction).exp().sum(-1)
    most = max(1.0, correction.max().exp().item(), (N - min(keys // 2, N // 2)) / max(n - min(keys // 2, N // 2), 1))
    assert (counted + hidden.sum(-1) <= N * 1.00001).all()
    assert (counted + most * hidden.sum(-1) >= N * 0.99999).all()
    if turn % 2 == 0:
        ahead = drawn_keys.unsqueeze(1) == sample.keys[:, :1].unsqueeze(2)
        first = ahead.all(-1).expand(
            H, queries, n
        )  # the first token is a sink, and may be drawn where none is left out
        assert not (hidden & first).any()


def test_columns_start_at_right_angles_to_what_all_keys_share() -> None:
    sample = synthetic(7)
    columns = first_projection(sample.keys, [3], 96)
    assert columns.shape == (H, D, 96)
    shared = torch.nn.functional.normalize(sample.keys.mean(1), dim=1)
    along = torch.einsum("hd,hdj->hj", shared, torch.nn.functional.normalize(columns, dim=1))
    assert along.abs().max() < 1e-5
    ones = (torch.bmm(sample.keys, columns) > 0).float().mean(1)
    assert ones.min() > 0.4 and ones.max() < 0.6  # so every bit splits the keys in half


def test_layers_are_trained_at_once_while_there_is_room() -> None:
    shape, lengths = Shape(28, 12, 2, 128), [(32_768, 1000), (8192, 900)]
    samples = 4 * 128 * (2 * (32_768 + 8192) + 12 * (1000 + 900))
    step = 4 * Recipe.queries * 12 * 32_768  # logits of all keys of the longest
    layer = samples + LOGITS * step
    for layers in (1, 2, 17):
        enough = int(layers * layer / ROOM) + 1
        assert layers_at_once(shape, lengths, Recipe(), enough) == layers
        assert layers_at_once(shape, lengths, Recipe(), enough - 8) == max(1, layers - 1)


@pytest.mark.parametrize("scoring", ["hamming", "one-sided"])
def test_codes_are_scored_exactly(scoring: str) -> None:
    sample = synthetic(8)
    projection = different_projections(64)
    queries = sample.queries.unflatten(0, (H, G))[:, :, :3]
    scores = codes(sample, projection, scoring)(queries, sample.keys)
    words = reference.hash_codes(sample.keys.transpose(0, 1), projection[reference.KEYS])
    bins = reference.bins_of(G, 64, scoring)
    for m in range(3):
        rows = queries[:, :, m].reshape(1, H * G, D)
        weights = reference.query_weights(rows, projection[reference.QUERIES], scoring)[0]
        distance = reference.distances(reference.query_planes(weights, reference.magnitudes(G, scoring)), words)
        nearest = reference.nearness(weights.abs().sum(-1), bins).unsqueeze(1)
        assert torch.equal(-scores[:, m].to(torch.int32), ((distance - nearest).clamp(min=0) + 1).clamp(max=bins - 2))
