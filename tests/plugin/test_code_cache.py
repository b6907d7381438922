"""Codes beside keys: what is written, moved and found stale. On the CPU, against the specification."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hata_kernels.reference import (
    bins_of,
    distances,
    draw,
    hash_codes,
    hash_sizes,
    luck,
    magnitudes,
    octaves,
    query_planes,
    query_weights,
    rank,
    relative_sizes,
    select_positions,
    stretch,
)
from hata_weights import artifact
from hata_weights.rotation import random_rotation, untrained_projection
from sglang_hata import compat
from sglang_hata.code_cache import CodeCache
from sglang_hata.config import SCORINGS, HataConfig, HataError
from sglang_hata.projections import bits_of, check_identity, rank_kv_heads, rank_projections, untrained_layers
from sglang_hata.state import ServingState
from sglang_hata.verify import wrong_selections


@pytest.fixture(params=[False, True], ids=["codes", "codes and sizes"])
def cache(request: pytest.FixtureRequest) -> CodeCache:
    projections = {layer: untrained_projection(layer, range(3), 64, 128) for layer in (2, 3)}
    return CodeCache(50, projections, request.param)


def test_codes_follow_their_keys(cache: CodeCache) -> None:
    keys = torch.zeros(50, 3, 64, dtype=torch.bfloat16)
    assert cache.stale(2, keys) == 0, "a pool that nothing was written to"
    slots = torch.tensor([7, 3, 49])
    keys[slots] = torch.randn(3, 3, 64).to(torch.bfloat16)
    assert cache.stale(2, keys) == 3, "keys without codes must be found"
    cache.write(2, slots, keys[slots])
    assert cache.stale(2, keys) == 0
    assert cache.tokens_hashed == 3
    cache.write(3, slots, keys[slots].view(3, -1))
    assert cache.tokens_hashed == 3, "a token counts once, in the first layer"
    cache.move(torch.tensor([1]), torch.tensor([49]))
    keys[1] = keys[49]
    assert cache.stale(2, keys, rows=7) == 0
    moved = keys[49].clone()
    keys[49, 1] += 1
    assert cache.stale(2, keys, rows=7) == 1
    if cache.sizes:
        keys[49] = moved
        keys[7] *= 2
        assert cache.stale(2, keys, rows=7) == 1, "a key of the same code and of another size"


def test_keys_that_came_past_their_codes_stop_the_first_step(cache: CodeCache) -> None:
    slots = torch.tensor([5, 6, 9])
    keys = {layer: torch.zeros(50, 3, 64) for layer in (2, 3)}
    for layer, buffer in keys.items():
        buffer[slots] = torch.randn(3, 3, 64)
        cache.write(layer, slots, buffer[slots])
    cache.require_fresh(slots, keys.__getitem__)
    keys[3][6] = torch.randn(3, 64)
    with pytest.raises(HataError, match="the keys of layer 3 reach the KV cache by a way that leaves out their codes"):
        cache.require_fresh(slots, keys.__getitem__)


def test_codes_of_keys_that_fp8_has_rounded_are_fresh(cache: CodeCache) -> None:
    slots = torch.tensor([4, 9, 6])
    keys = torch.randn(50, 3, 64)
    keys[9] *= 1e-6  # to nothing
    for layer in (2, 3):
        cache.write(layer, slots, keys[slots])
    rounded = {layer: keys.to(torch.float8_e4m3fn) for layer in (2, 3)}
    assert not rounded[2][9].float().any()
    cache.require_fresh(slots, rounded.__getitem__)
    rounded[3][4] = torch.randn(3, 64).to(torch.float8_e4m3fn)
    with pytest.raises(HataError, match="the keys of layer 3 reach the KV cache"):
        cache.require_fresh(slots, rounded.__getitem__)


def test_cost_of_codes(cache: CodeCache) -> None:
    assert cache.bytes_per_token == 2 * 3 * (18 if cache.sizes else 16)
    assert cache.size_bytes() == 50 * cache.bytes_per_token


def test_the_kv_pool_is_sized_with_its_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "tensor_parallel", lambda: (0, 2))
    model = SimpleNamespace(get_num_kv_heads=lambda ranks: 8 // ranks)
    with_hata = SimpleNamespace(**{compat.STAMP: HataConfig(dense_layers=1).to_dict() | {"command_line": True}})
    kvc = SimpleNamespace(server_args=with_hata, model_config=model)
    assert compat._add_code_bytes(1000, None, kvc, 32) == 1000 + 31 * 4 * 16
    getattr(with_hata, compat.STAMP)["key_sizes"] = True
    assert compat._add_code_bytes(1000, None, kvc, 32) == 1000 + 31 * 4 * 18
    kvc.server_args = SimpleNamespace()
    assert compat._add_code_bytes(1000, None, kvc, 32) == 1000, "without --hata nothing changes"


def test_rotations_are_orthogonal_fixed_and_distinct() -> None:
    columns = random_rotation(5, 1, 128, 256).to(torch.float64)
    assert torch.equal(columns, random_rotation(5, 1, 128, 256).to(torch.float64))
    assert not torch.equal(columns, random_rotation(5, 2, 128, 256).to(torch.float64))
    unit = columns / columns.norm(dim=0)
    for half in (unit[:, :128], unit[:, 128:]):
        assert (half.T @ half - torch.eye(128)).abs().max() < 0.02, "int8 rounding alone is left"


@pytest.mark.parametrize(
    ("total", "size", "heads"),
    [
        (8, 1, [[0, 1, 2, 3, 4, 5, 6, 7]]),
        (8, 4, [[0, 1], [2, 3], [4, 5], [6, 7]]),
        (2, 8, [[0], [0], [0], [0], [1], [1], [1], [1]]),
    ],
)
def test_tensor_parallel_ranks_hash_their_own_heads(total: int, size: int, heads: list[list[int]]) -> None:
    assert [rank_kv_heads(total, index, size) for index in range(size)] == heads
    path = "nobody/has-this-model"
    model = SimpleNamespace(
        model_path=path, revision=None, num_hidden_layers=3, head_dim=64, get_total_num_kv_heads=lambda: total
    )
    for index in range(size):
        w = rank_projections(HataConfig(), model, index, size, "cpu")[2]
        assert torch.equal(w, untrained_projection(2, heads[index], 64, 128))


@given(
    st.sampled_from(SCORINGS),
    st.sampled_from([None, 0, 7]),
    st.booleans(),
    st.integers(1, 40),
    st.integers(1, 50),
    st.integers(0, 6),
    st.integers(0, 6),
    st.integers(0, 2**31),
)
def test_the_oracle_accepts_right_selections_and_no_other(
    scoring: str, layer: int | None, sized: bool, L: int, k: int, sink: int, recent: int, seed: int
) -> None:
    k = min(max(k, sink + max(recent, 1)), L)
    generator = torch.Generator().manual_seed(seed)
    of_keys, of_queries = (untrained_projection(layer, range(2), 64, 128)[0] for layer in (0, 1))
    keys = torch.randn(60, 2, 64, generator=generator) * torch.randn(60, 1, 1, generator=generator).exp()
    sizes = hash_sizes(keys, of_keys) if sized else None
    codes = hash_codes(keys, of_keys)
    weights = query_weights(torch.randn(1, 6, 64, generator=generator), of_queries, scoring)
    slots = torch.randperm(60, generator=generator)[:L]
    bins = bins_of(3, 128, scoring)
    total = weights[0].abs().sum(-1)
    distance = distances(query_planes(weights, magnitudes(3, scoring))[0], codes[slots])
    if sizes is not None:
        distance = stretch(distance, total, relative_sizes(sizes[slots]))
    ranks = rank(distance, sink, recent, bins, total)
    if layer is not None and k < L:
        ranks = draw(ranks, luck(L, layer), octaves(weights)[0])
    positions = select_positions(ranks, k)

    def wrong(selected: torch.Tensor) -> int:
        return wrong_selections(weights, codes, [slots], [selected], [k], sink, recent, bins - 3, layer, sizes)

    assert wrong(positions) == 0
    if k > 1:
        assert wrong(positions[:, :-1]) == 2, "too few tokens"
    left_out = [sorted(set(range(L)) - set(row.tolist())) for row in positions]
    for head in range(2):
        worst = positions[head][ranks[head][positions[head]].argmax()]
        better = [p for p in left_out[head] if ranks[head][p] > ranks[head][worst]]
        if better:
            swapped = positions.clone()
            swapped[head][swapped[head] == worst] = better[0]
            assert wrong(swapped) == 1, "a farther token in place of a nearer one"


def test_counters_count_dense_layers_in_full() -> None:
    state = ServingState(HataConfig())
    state.count_step([1000, 300], [64, 300], layers=30, dense_layers=2, kv_heads=3)
    assert state.tokens_seen == 3 * 30 * 1300
    assert state.tokens_attended == 3 * (2 * 1300 + 28 * 364)


class TestWeightsFolder:
    identity = artifact.Identity("tiny", layers=4, dense_layers=1, kv_heads=2, head_dim=64, bits=256, tool="test")
    model = SimpleNamespace(
        num_hidden_layers=4, head_dim=64, get_total_num_kv_heads=lambda: 2, model_path="some/model", revision=None
    )

    @pytest.fixture
    def projections(self) -> dict[int, torch.Tensor]:
        rng = np.random.default_rng(0)
        return {layer: torch.from_numpy(rng.integers(-127, 128, (2, 2, 64, 256), dtype=np.int8)) for layer in (1, 2, 3)}

    def test_what_is_saved_is_served(self, tmp_path, projections) -> None:
        artifact.save(tmp_path, self.identity, projections)
        identity, loaded = artifact.load(tmp_path)
        assert identity.bits == 256 and identity.model == "tiny"
        assert all(torch.equal(loaded[layer], projections[layer]) for layer in (1, 2, 3))
        config = HataConfig(weights=str(tmp_path), dense_layers=2)
        served = rank_projections(config, self.model, 1, 2, "cpu")
        assert sorted(served) == [2, 3] and torch.equal(served[2], projections[2][:, 1:])
        config = HataConfig(weights=str(tmp_path))
        served = rank_projections(config, self.model, 1, 2, "cpu")
        assert sorted(served) == [0, 1, 2, 3] and torch.equal(served[1], projections[1][:, 1:])
        assert torch.equal(served[0], untrained_projection(0, [1], 64, 256))
        assert list(untrained_layers(config, self.model)) == [0]

    @pytest.mark.parametrize(
        ("change", "sentence"),
        [
            ({"num_hidden_layers": 5}, "with layers 4, but some/model has 5"),
            ({"head_dim": 128}, "with head_dim 64, but some/model has 128"),
            ({"get_total_num_kv_heads": lambda: 8}, "with kv_heads 2, but some/model has 8"),
        ],
    )
    def test_weights_of_another_shape_are_refused(self, tmp_path, projections, change, sentence) -> None:
        artifact.save(tmp_path, self.identity, projections)
        model = SimpleNamespace(**vars(self.model) | change)
        with pytest.raises(HataError, match=sentence):
            rank_projections(HataConfig(weights=str(tmp_path)), model, 0, 1, "cpu")

    def test_weights_that_leave_out_more_than_layer_0_are_refused(self, tmp_path, projections) -> None:
        late = replace(self.identity, dense_layers=2)
        artifact.save(tmp_path, late, {layer: projections[layer] for layer in (2, 3)})
        for dense in (0, 1):
            sentence = f"begin at layer 2, and --hata-dense-layers {dense} leaves layer 1 to untrained codes, .* give"
            with pytest.raises(HataError, match=sentence):
                rank_projections(HataConfig(weights=str(tmp_path), dense_layers=dense), self.model, 0, 1, "cpu")
        served = rank_projections(HataConfig(weights=str(tmp_path), dense_layers=2), self.model, 0, 1, "cpu")
        assert sorted(served) == [2, 3]

    def test_tensors_of_another_folder_are_refused(self, tmp_path, projections) -> None:
        artifact.save(tmp_path / "a", self.identity, projections)
        artifact.save(tmp_path / "b", self.identity, projections | {1: projections[1].flip(1)})
        (tmp_path / "b" / artifact.TENSOR_FILE).replace(tmp_path / "a" / artifact.TENSOR_FILE)
        with pytest.raises(artifact.ArtifactError, match=r"is not the file that hata\.json was written for"):
            artifact.load(tmp_path / "a")

    def test_folders_without_identity_are_refused(self, tmp_path, projections) -> None:
        with pytest.raises(artifact.ArtifactError, match=r"holds no hata\.json"):
            artifact.load(tmp_path)
        (tmp_path / artifact.IDENTITY_FILE).write_text("{")
        with pytest.raises(artifact.ArtifactError, match="cannot be read"):
            artifact.load(tmp_path)
        (tmp_path / artifact.IDENTITY_FILE).write_text('{"schema": 7}')
        with pytest.raises(artifact.ArtifactError, match="has schema 7: this version reads schema 3"):
            artifact.load(tmp_path)

    def test_a_folder_that_is_no_weights_folder_is_refused_like_any_setting(self, tmp_path) -> None:
        for ask in (bits_of, lambda config: check_identity(config, self.model)):
            with pytest.raises(HataError, match=r"holds no hata\.json: give a folder of hash weights"):
                ask(HataConfig(weights=str(tmp_path)))

    def test_missing_layers_are_refused(self, tmp_path, projections) -> None:
        del projections[2]
        with pytest.raises(artifact.ArtifactError, match=r"cover layers \[1, 3\], not 1 to 3"):
            artifact.save(tmp_path, self.identity, projections)
