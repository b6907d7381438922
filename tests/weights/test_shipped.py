"""Weights that ship: what they say of themselves, and how a server finds the ones for its model."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from hata_weights import artifact, shipped
from hata_weights.fingerprint import folder_fingerprint
from hata_weights.rotation import untrained_projection
from sglang_hata.config import HataConfig, HataError
from sglang_hata.projections import check_fingerprint, check_identity, rank_projections, resolve
from weights.tiny import HEAD_DIM, KV_HEADS, LAYERS, make_model


@pytest.fixture
def served(tiny: Path) -> SimpleNamespace:
    """What SGLang's ModelConfig says of the tiny model."""
    return SimpleNamespace(
        model_path=str(tiny),
        revision=None,
        num_hidden_layers=LAYERS,
        head_dim=HEAD_DIM,
        context_len=1024,
        get_total_num_kv_heads=lambda: KV_HEADS,
    )


@pytest.fixture
def data(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of shipped weights: codes of 64 and of 128 bits for the tiny model, and of 128 for another."""
    of_tiny = folder_fingerprint(tiny)
    assert of_tiny
    for name, fingerprint, bits in (("a", "0" * 64, 128), ("b", of_tiny, 64), ("c", of_tiny, 128)):
        identity = artifact.Identity(name, LAYERS, 1, KV_HEADS, HEAD_DIM, bits, "tests", scoring="one-sided")
        rotations = {n: untrained_projection(n, range(KV_HEADS), HEAD_DIM, bits) for n in range(1, LAYERS)}
        artifact.save(tmp_path / name, replace(identity, fingerprint=fingerprint), rotations)
    monkeypatch.setattr(shipped, "DATA", tmp_path)
    return tmp_path


@pytest.mark.parametrize(("bits", "name"), [(64, "b"), (128, "c")])
def test_auto_finds_the_weights_of_this_very_model(data: Path, served: SimpleNamespace, bits: int, name: str) -> None:
    config = resolve(HataConfig(weights="auto", scoring="auto", bits=bits), served)
    assert (config.weights, config.scoring) == (str(data / name), "one-sided")
    check_identity(config, served)
    check_fingerprint(config, served)
    assert rank_projections(config, served, 0, 1, "cpu")[2].shape == (2, KV_HEADS, HEAD_DIM, bits)
    assert resolve(config, served) == config
    assert resolve(HataConfig(weights="auto", scoring="hamming", bits=bits), served).scoring == "hamming"


def test_sizes_of_keys_are_refused_beside_trained_codes(data: Path, served: SimpleNamespace) -> None:
    with pytest.raises(HataError, match=r"--hata-key-sizes does not go with .* remove it, or give --hata-weights none"):
        resolve(HataConfig(weights="auto", scoring="auto", key_sizes=True), served)
    untrained = HataConfig(key_sizes=True)
    assert resolve(untrained, served) == untrained


@pytest.mark.parametrize(
    ("bits", "scoring", "served_by"),
    [(64, "auto", "one-sided"), (256, "auto", "one-sided"), (256, "hamming", "hamming")],
)
def test_without_shipped_weights_codes_are_untrained_and_the_log_says_so(
    data: Path,
    served: SimpleNamespace,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    bits: int,
    scoring: str,
    served_by: str,
) -> None:
    served.model_path = str(make_model(tmp_path / "other", seed=5))
    with caplog.at_level(logging.WARNING):
        config = resolve(HataConfig(weights="auto", scoring=scoring, bits=bits), served)
    assert (config.weights, config.scoring, config.bits) == ("none", served_by, bits)
    (record,) = caplog.records
    assert f"No trained hash weights of {bits} bits ship for {served.model_path}: codes are" in record.message
    assert "89 to 95 %" in record.message and f"hata-weights train {served.model_path} --text" in record.message
    check_fingerprint(config, served)


def test_only_for_a_shape_that_weights_ship_for_is_a_model_hashed(
    data: Path, served: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hashes(folder: Path) -> str:
        raise AssertionError("a model was hashed for nothing")

    assert resolve(HataConfig(weights="auto", scoring="auto"), served).weights != "none"
    monkeypatch.setattr("sglang_hata.projections.folder_fingerprint", hashes)
    served.head_dim *= 2
    assert resolve(HataConfig(weights="auto", scoring="auto"), served).weights == "none"


def test_a_model_that_is_not_on_disk_is_not_guessed_at(
    data: Path, served: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    served.model_path = "nobody/has-this-model"
    assert resolve(HataConfig(weights="auto", scoring="auto"), served).weights == "none"
    assert "its safetensors are not, or not all, on this disk" in caplog.text


def test_contexts_beyond_what_was_learned_are_warned_of(
    data: Path, served: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    identity, projections = artifact.load(data / "c")
    for tokens, warned in ((1024, False), (512, True)):
        artifact.save(data / "c", replace(identity, tokens=tokens), projections)
        caplog.clear()
        resolve(HataConfig(weights="auto", scoring="auto"), served)
        assert ("were trained on up to 512 tokens, and this server allows 1024" in caplog.text) == warned


def test_weights_of_another_model_are_refused_by_name(data: Path, served: SimpleNamespace) -> None:
    config = resolve(HataConfig(weights=str(data / "a"), scoring="auto"), served)
    check_identity(config, served)
    with pytest.raises(
        HataError, match=r"were trained for a, and .* makes other queries and keys \(fingerprint "
    ) as raised:
        check_fingerprint(config, served)
    assert f"not {'0' * 12})" in str(raised.value) and "hata-weights check" in str(raised.value)
    unknown = replace(artifact.load_identity(data / "a"), fingerprint="")
    artifact.save(data / "d", unknown, artifact.load(data / "a")[1])
    check_fingerprint(replace(config, weights=str(data / "d")), served)  # nothing to compare


def test_what_ships_is_whole() -> None:
    """Every shipped folder loads, names its model and texts, and holds what it claims."""
    assert shipped.shipped()
    for folder, identity in shipped.shipped().items():
        assert artifact.load(folder)[0] == identity
        assert identity.fingerprint and identity.data and identity.tokens and identity.scores
        assert (folder / "README.md").is_file()
        assert not any("/" in row["text"] for row in identity.scores)


def test_what_ships_is_for_the_default_model_and_scores_as_it_says(model: Path) -> None:
    folder = shipped.find(folder_fingerprint(model), 128)
    assert folder is not None
    by_score = [row for row in artifact.load_identity(folder).scores if row["recent"] == 1 and row["budget"] == "1/64"]
    measured = {(row["text"], row["tokens"]) for row in by_score}
    texts = ("licences.txt", "lodash.js", "opticks.txt")
    assert measured == {(text, tokens) for text in texts for tokens in (2048, 8192)}
    for row in by_score:
        least = 0.98 if row["tokens"] == 8192 else 0.97
        assert row["best_mass"] >= row["exact_mass"] and least * row["exact_mass"] < row["mass"] < row["exact_mass"]
