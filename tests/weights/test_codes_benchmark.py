"""`benchmarks.codes` from end to end on a tiny model, and the paper's loss against a calculation by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.codes import paper, tuning, work
from benchmarks.codes.__main__ import main
from benchmarks.codes.report import encoders
from hata_weights import jobs
from hata_weights.capture import Shape
from hata_weights.evaluate import EXACT
from weights.tiny import HEAD_DIM, KV_HEADS, LAYERS, QUERY_HEADS, make_model

SHORT = ["--tokens", "512", "--steps", "3", "--device", "cpu"]


@pytest.fixture
def texts(tmp_path: Path) -> list[Path]:
    """Three kinds of text, of 3,000 letters each."""
    paths = []
    for n, word in enumerate(("count", "spell", "shout")):
        paths.append(tmp_path / f"{word}.txt")
        paths[-1].write_text(" ".join(f"{word}{i * (n + 7) % 91}" for i in range(600))[:3_000])
    return paths


def run(command: str, tiny: Path, texts: list[Path], out: Path, *more: str) -> dict[str, Any]:
    train, test = [str(path) for path in texts[:2]], str(texts[2])
    main([command, str(tiny), "--train", *train, "--test", test, "--out", str(out), *SHORT, *more])
    (path,) = out.glob("*.json")
    return json.loads(path.read_text())


def test_the_papers_loss_is_the_sum_of_its_terms(monkeypatch: pytest.MonkeyPatch) -> None:
    H, G, D, bits = 2, 2, 3, 4
    draw = torch.Generator().manual_seed(0)
    w = torch.randn(H, D, bits, generator=draw)
    items = [
        (
            torch.randn(H, G, D, generator=draw),
            torch.randn(H, n, D, generator=draw),
            torch.randn(H, G, n, generator=draw),
        )
        for n in (5, 2)
    ]
    for name, value in {"SIGMA": 0.7, "SIMILARITY": 0.3, "BALANCE": 0.9, "DECORRELATION": 1.7}.items():
        monkeypatch.setattr(paper, name, value)

    def soft(x: torch.Tensor, h: int, j: int) -> float:
        return 2 / (1 + math.exp(-0.7 * sum(float(x[d] * w[h, d, j]) for d in range(D)))) - 1

    similarity = balance = 0.0
    for h in range(H):
        for g in range(G):
            sums = [0.0] * bits
            for queries, keys, labels in items:
                for i in range(keys.shape[1]):
                    pair = [(soft(queries[h, g], h, j), soft(keys[h, i], h, j)) for j in range(bits)]
                    similarity += float(labels[h, g, i]) * sum((q - k) ** 2 for q, k in pair) / 7
                    sums = [s + q + k for s, (q, k) in zip(sums, pair, strict=True)]
            balance += sum((s / (7 * bits)) ** 2 for s in sums)
    decorrelation = math.sqrt(
        sum(
            (float(w[h, :, a] @ w[h, :, b]) - (a == b)) ** 2 for h in range(H) for a in range(bits) for b in range(bits)
        )
    )
    expected = 0.3 * similarity + 0.9 * balance + 1.7 * decorrelation
    assert float(paper.paper_loss(w, items)) == pytest.approx(expected, rel=1e-4)


def test_the_papers_labels_fall_by_rank() -> None:
    labels = paper.paper_labels(torch.arange(30.0).flip(0))
    assert labels.tolist() == [20, 10.5, 1, *[-1] * 27]


def test_frontier_has_a_row_for_everything(tiny: Path, texts: list[Path], tmp_path: Path) -> None:
    scratch = ["--scratch", str(tmp_path / "scratch")]
    report = run("frontier", tiny, texts, tmp_path / "out", "--dense-layers", "1", *scratch)
    names = [encoder.name for encoder in encoders(Shape(LAYERS, QUERY_HEADS, KV_HEADS, HEAD_DIM))]
    found = {(r["encoder"], r["budget"], r["sink"], r["recent"], r["text"]) for r in report["rows"]}
    assert found == {(n, f"1/{b}", *s, texts[2].name) for n in names for b in work.BUDGETS for s in jobs.SETTINGS}
    assert len(found) == len(report["rows"]) == len(names) * 12
    sizes = {r["encoder"]: (r["bits"], r["bytes_per_token"]) for r in report["rows"]}
    assert sizes["HashAttention"] == (64, 8) and sizes["trained, one-sided 128"] == (128, 16)
    assert sizes[work.PAPER] == (128, 16) and sizes[EXACT] == (None, 2 * HEAD_DIM)
    for row in report["rows"]:
        assert row["layers"] == 2 and 0 < row["mass"] <= row["best_mass"] <= 1
        assert row["share"] == pytest.approx(row["mass"] / row["exact_mass"], abs=1e-3)
        read = row["bytes_per_token"] + row["selected"] * 4 * HEAD_DIM
        assert row["bytes_read_per_token"] == pytest.approx(read, abs=1e-2)
        assert row["selected"] >= 1 / int(row["budget"].removeprefix("1/"))
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"codes-tiny.png", "codes-tiny-by-score.png"}
    again = run("frontier", tiny, texts, tmp_path / "out", "--dense-layers", "1", *scratch)  # from the scratch folder
    assert again["rows"] == report["rows"]
    elsewhere = ("--scratch", str(tmp_path / "elsewhere"), "--workers", "2")
    again = run("frontier", tiny, texts, tmp_path / "out", "--dense-layers", "1", *elsewhere)
    assert {json.dumps(row) for row in again["rows"]} == {json.dumps(row) for row in report["rows"]}


def test_frontier_takes_weights_that_were_trained_before(tiny: Path, texts: list[Path], tmp_path: Path) -> None:
    from click.testing import CliRunner

    from hata_weights.cli import main as hata_weights

    weights = tmp_path / "weights"
    train = ["train", str(tiny), "--text", *map(str, texts[:2]), "--test", str(texts[2]), "--sequences", "2"]
    result = CliRunner().invoke(hata_weights, [*train, "--out", str(weights), *SHORT])
    assert result.exit_code == 0, result.output
    options = ["--weights", str(weights), "--no-hashattention"]
    report = run("frontier", tiny, texts, tmp_path / "out", *options)
    assert report["weights"] == ["weights"]
    (recorded,) = (
        row
        for row in json.loads((weights / "hata.json").read_text())["scores"]
        if (row["budget"], row["sink"]) == ("1/64", 4)
    )
    wanted = ("trained, one-sided 128", "1/64", 4)
    (row,) = (r for r in report["rows"] if (r["encoder"], r["budget"], r["sink"]) == wanted)
    assert row["mass"] == pytest.approx(recorded["mass"], abs=1e-3)
    other = make_model(tmp_path / "other", seed=5)
    with pytest.raises(SystemExit, match="are for other weights than other's: leave them out"):
        run("frontier", other, texts, tmp_path / "other-out", *options)


def test_text_learns_from_more_and_from_other_kinds(tiny: Path, texts: list[Path], tmp_path: Path) -> None:
    report = run("text", tiny, texts, tmp_path, "--layers", "1,2")
    cells = {(r["kinds"], r["sequences"], r["draw"]) for r in report["rows"]}
    assert cells == {(0, 0, 0), (1, 1, 0), (1, 1, 1), (1, 2, 0), (1, 2, 1), (2, 2, 0), (2, 4, 0)}
    assert {r["layers"] for r in report["rows"]} == {2}
    assert (tmp_path / "codes-text-tiny.png").stat().st_size > 10_000


def test_finetune_compares_old_codes_with_new_ones(
    tiny: Path, texts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tuning, "LENGTH", 128)
    domain = tmp_path / "domain.txt"
    domain.write_text("abcdefgh " * 500)
    options = ["--domain", str(domain), "--tuning-steps", "20", "--rate", "0.01"]
    report = run("finetune", tiny, texts, tmp_path / "out", *options)
    held_out = "domain.txt, held out"
    before, after = report["losses"][held_out]
    assert after < before
    cells = {(r["text"], r["model"], r["encoder"]) for r in report["rows"] if r["encoder"] != EXACT}
    of_models = {"base": ["base model's codes"], "fine-tuned": ["base model's codes", "trained anew"]}
    assert cells == {
        (text, model, encoder)
        for text in (texts[2].name, held_out)
        for model, names in of_models.items()
        for encoder in ["Hamming 128, untrained", *names]
    }
    exact_mass = {r["model"]: r["exact_mass"] for r in report["rows"] if r["text"] == held_out and r["sink"] == 4}
    assert exact_mass["base"] != exact_mass["fine-tuned"]
    assert "| domain.txt, held out | fine-tuned | trained anew |" in capsys.readouterr().out
