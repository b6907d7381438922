"""Settings: what is allowed, and the sentence that answers what is not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hata_kernels.reference import Costs
from sglang_hata.config import HataConfig, HataError, parse_budget


@given(st.integers(1, 2**24))
def test_a_budget_in_tokens(tokens: int) -> None:
    assert parse_budget(str(tokens)) == (tokens, 0)


@given(st.integers(1, 1_000_000))
def test_a_budget_as_a_share_is_exact_to_a_part_in_a_million(ppm: int) -> None:
    assert parse_budget(f"{ppm / 10_000:.4f}%") == (0, ppm)


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5", "0%", "100.1%", "1e3", "1024 tokens", "%", "99999999"])
def test_what_is_not_a_budget(text: str) -> None:
    with pytest.raises(HataError, match="is not a budget: give a number of tokens"):
        parse_budget(text)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"hata_bits": "100"}, "--hata-bits 100 is not a code length: choose 64, 128 or 256."),
        ({"hata_bits": "many"}, "--hata-bits many is not a whole number: give one, such as --hata-bits 64."),
        ({"hata_selection": "best"}, "--hata-selection best is not a selection: choose sampled or top."),
        ({"hata_scoring": "cosine"}, "--hata-scoring cosine is not a score: choose hamming or one-sided."),
        ({"hata_sink": "-1"}, "--hata-sink -1 is out of range: give a number from 0 to 16777216."),
        ({"hata_recent": "1.5"}, "--hata-recent 1.5 is not a whole number"),
        ({"hata_min_context": "1e12"}, "--hata-min-context 1e12 is not a whole number"),
        ({"hata_dense_layers": True}, "--hata-dense-layers True is not a whole number"),
        ({"hata_min_budget": "64"}, "--hata-min-budget 64 has no effect with a --hata-budget in tokens"),
        (
            {"hata_budget": "64", "hata_min_budget": 0},
            "--hata-min-budget 0 has no effect with a --hata-budget in tokens",
        ),
        ({"hata_budget": "19"}, "has no room for 4 sink and 16 recent tokens"),
        ({"hata_budget": "4", "hata_recent": "0"}, "has no room for 4 sink and 1 recent tokens"),
        ({"hata_weights": "/no/such/folder"}, "--hata-weights /no/such/folder is not a folder"),
        (
            {"hata_weights": "none", "hata_scoring": "auto"},
            "--hata-scoring auto is not a score: choose hamming or one-sided.",
        ),
        ({"hata_weights": "/", "hata_bits": "256"}, "--hata-bits 256 has no effect with --hata-weights /"),
    ],
)
def test_refused_values(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(HataError) as refusal:
        HataConfig.from_options({"hata": True} | options)
    assert sentence in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_auto_is_the_default_and_decides_by_costs() -> None:
    costs = Costs(attend=5, score=1, fixed=0)
    config = HataConfig.from_options({"hata": True, "hata_min_context": "auto"})
    assert config == HataConfig(weights="auto", scoring="auto") and config.budget_rule(costs).costs == costs
    fixed = HataConfig.from_options({"hata": True, "hata_min_context": "512"})
    assert fixed is not None and fixed.budget_rule(costs).costs is None and fixed.budget_rule().min_context == 512


def test_weights_bring_their_own_scoring_unless_one_is_given() -> None:
    for options, scoring in (
        ({"hata_weights": "auto"}, "auto"),
        ({"hata_weights": "/"}, "auto"),
        ({"hata_weights": "auto", "hata_bits": "64", "hata_scoring": "hamming"}, "hamming"),
        ({"hata_weights": "none"}, "one-sided"),
        ({}, "auto"),
    ):
        config = HataConfig.from_options({"hata": True} | options)
        assert config is not None and config.scoring == scoring


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"hata_budget": "1.6%"}, [100, 1024, 1024, 1040]),
        ({"hata_budget": "1.6%", "hata_min_budget": "64"}, [64, 64, 513, 1040]),
        ({"hata_budget": "1.6%", "hata_min_budget": "0"}, [20, 32, 513, 1040]),
        ({"hata_budget": "1.6%", "hata_min_budget": "0", "hata_recent": "200"}, [100, 204, 513, 1040]),
        ({"hata_budget": "64"}, [64, 64, 64, 64]),
    ],
)
def test_a_share_is_never_fewer_tokens_than_the_least_budget(options: dict[str, object], kept: list[int]) -> None:
    config = HataConfig.from_options({"hata": True} | options)
    assert config is not None
    assert [config.budget_rule().of(length) for length in (100, 2000, 32_001, 65_000)] == kept


def test_a_setting_without_hata_is_refused() -> None:
    with pytest.raises(HataError, match="--hata-budget has no effect without --hata"):
        HataConfig.from_options({"hata": False, "hata_budget": "64"})


def test_without_hata_there_is_no_config() -> None:
    assert HataConfig.from_options({"hata": False, "hata_budget": None}) is None


def test_flags_and_keywords_give_the_same_config() -> None:
    flags = {"hata": True, "hata_budget": "1.6%", "hata_bits": "256", "hata_sink": "0", "model_path": "x"}
    keywords = {"hata": True, "hata_budget": "1.6%", "hata_bits": 256, "hata_sink": 0}
    config = HataConfig.from_options(flags)
    assert config == HataConfig.from_options(keywords)
    assert config is not None and config.budget_rule().share_ppm == 16_000 and config.floor == 16
    assert HataConfig(**config.to_dict()) == config
