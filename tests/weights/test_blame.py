"""`python -m benchmarks.blame`: reading right answers by choices of tokens, with a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import blame
from hata_weights import artifact
from hata_weights.rotation import untrained_projection
from weights.tiny import HEAD_DIM, KV_HEADS, LAYERS

BITS = 64


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Untrained ones, in a folder; the first layer is left out of it."""
    identity = artifact.Identity("tiny", LAYERS, 1, KV_HEADS, head_dim=HEAD_DIM, bits=BITS, tool="tests")
    projection = {i: untrained_projection(i, range(KV_HEADS), HEAD_DIM, BITS) for i in range(1, LAYERS)}
    artifact.save(tmp_path / "codes", identity, projection)
    return tmp_path / "codes"


def test_answers_are_read_by_every_choice_at_every_budget(
    tiny: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blame, "RESULTS", tmp_path)
    asked = "--tasks frequent_words --context 1000 --budgets 1,8 --documents 1 --questions 2 --alone all"
    monkeypatch.setattr("sys.argv", ["blame", str(tiny), "--weights", str(weights), *asked.split()])
    blame.main()
    (path,) = tmp_path.glob("blame-*.json")
    rows = {(row["budget"], row["choice"], row["layer"]): row for row in json.loads(path.read_text())["rows"]}
    choices = [(kind, "all") for kind in blame.KINDS] + [("sampled", layer) for layer in range(LAYERS)]
    assert rows.keys() == {(budget, *choice) for budget in ("1/1", "1/8") for choice in choices}
    for choice in choices:
        whole, part = rows["1/1", *choice], rows["1/8", *choice]
        assert whole["answers"] == 2 and whole["tokens"] > 2
        assert whole["divergence"] < 1e-6 and whole["same"] == 1, "all tokens, and not what dense reads"
        assert part["divergence"] > 1e-5, "few tokens, and nothing is lost: the choice was not used"
    assert rows["1/8", "best", "all"]["divergence"] < rows["1/8", "top", "all"]["divergence"]
