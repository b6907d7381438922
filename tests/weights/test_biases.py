"""Untrained codes of models whose keys have biases."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from hata_weights import biases
from hata_weights.biases import folder_common_keys
from hata_weights.capture import Decoder, capture, load_sample
from hata_weights.rotation import untrained_projection
from sglang_hata.config import HataConfig
from sglang_hata.projections import rank_projections
from weights.tiny import HEAD_DIM, KV_HEADS, LAYERS, make_model

LENGTH = 512


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("biased") / "model", seed=3, bias=40.0)


def keys_of(decoder: Decoder, layer: int) -> Tensor:
    """[H, N, D]"""
    keys: list[Tensor] = []
    tokens = torch.randint(0, 256, (LENGTH,), generator=torch.Generator().manual_seed(1))
    decoder.run(tokens, lambda number, _, key, __: keys.append(key) if number == layer else None)
    return keys[0].float()


def test_common_keys_are_what_the_model_itself_makes_of_its_biases(
    biased: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(biases, "POSITIONS", LENGTH)
    decoder = Decoder(str(biased), "cpu")
    for block in decoder.model.layers:
        block.self_attn.k_proj.weight.data.zero_()
    common = folder_common_keys(biased)
    assert sorted(common) == list(range(LAYERS))
    for layer, expected in common.items():
        torch.testing.assert_close(keys_of(decoder, layer).mean(1), expected.float(), rtol=1e-3, atol=1e-2)


def test_a_model_without_biases_has_nothing_in_common(tiny: Path) -> None:
    assert folder_common_keys(tiny) == {} == Decoder(str(tiny), "cpu").common


def test_keys_that_are_normed_after_the_bias_are_left_alone() -> None:
    parameters = {
        "model.layers.0.self_attn.k_proj.bias": lambda: torch.ones(64),
        "model.layers.0.self_attn.k_norm.weight": lambda: torch.ones(32),
    }
    assert biases.common_keys(parameters, {"num_attention_heads": 2}) == {}


def test_a_server_and_the_table_of_eval_leave_out_what_keys_have_in_common(biased: Path, tmp_path: Path) -> None:
    model = SimpleNamespace(
        model_path=str(biased),
        revision=None,
        num_hidden_layers=LAYERS,
        head_dim=HEAD_DIM,
        get_total_num_kv_heads=lambda: KV_HEADS,
    )
    served = rank_projections(HataConfig(dense_layers=1, bits=64), model, 0, 1, "cpu")
    second_rank = rank_projections(HataConfig(dense_layers=1, bits=64), model, 1, 2, "cpu")
    decoder = Decoder(str(biased), "cpu")
    capture(decoder, torch.arange(256), tmp_path / "sample", range(1, LAYERS), torch.arange(128, 256))
    for layer in range(1, LAYERS):
        sample = load_sample(tmp_path / "sample", [layer], "cpu")
        assert sample.common is not None
        measured = untrained_projection(layer, range(KV_HEADS), HEAD_DIM, 64, sample.common)
        assert torch.equal(served[layer], measured)
        assert torch.equal(second_rank[layer], measured[:, 1:])
