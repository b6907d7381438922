"""`hata-weights` from end to end on a tiny model: what it writes, says and returns."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from hata_weights import artifact, jobs
from hata_weights.cli import main
from hata_weights.train import Recipe
from weights.tiny import LAYERS, make_model

SHORT = ["--tokens", "512", "--device", "cpu"]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def train(tiny: Path, text: Path, out: Path, *options: str) -> Result:
    return run("train", tiny, "--text", text, "--out", out, "--steps", 4, "--sequences", 2, *SHORT, *options)


@pytest.fixture(scope="module")
def weights(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    (folder / "text.txt").write_text(" ".join(map(str, range(1_200))))
    result = train(tiny, folder / "text.txt", folder / "out")
    assert result.exit_code == 0, result.output
    assert "of exact q.k's attention mass at a budget of 1/64 with 16 bytes" in result.output
    return folder / "out"


def test_train_writes_an_artefact_with_its_scores(weights: Path, tiny: Path) -> None:
    identity, layers = artifact.load(weights)
    assert set(layers) == {1, LAYERS - 1} and (identity.layers, identity.kv_heads, identity.bits) == (LAYERS, 2, 128)
    assert identity.fingerprint and identity.data and identity.model == tiny.name
    assert {row["budget"] for row in identity.scores} == {"1/128", "1/64", "1/32", "1/16"}
    assert [(row["sink"], row["recent"]) for row in identity.scores[::4]] == [(0, 1), (4, 16)]
    for row in identity.scores:
        assert row["best_mass"] >= row["exact_mass"] > 0 and row["bytes_per_token"] == 16 and row["tokens"] == 512
    assert not (weights / jobs.PARTIAL).exists()


def test_train_measures_shorter_contexts_too(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(" ".join(map(str, range(3_000))))
    result = train(tiny, tmp_path / "text.txt", tmp_path / "out", "--tokens", "1024")
    assert result.exit_code == 0, result.output
    identity = artifact.load_identity(tmp_path / "out")
    assert identity.tokens == 1024
    assert [row["tokens"] for row in identity.scores[::8]] == [1024, 256]
    whole = [row for row in identity.scores if row["tokens"] == 1024]
    assert jobs.recorded_ratio(identity) == jobs.recorded_ratio(replace(identity, scores=tuple(whole)))


def test_an_interrupted_run_goes_on(tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    options = ("--dense-layers", "0")
    assert train(tiny, text, whole, *options).exit_code == 0
    done: list[int] = []
    real = jobs.train_layers

    def stops_at_2(samples: object, layers: Sequence[int], *rest: object) -> object:
        if layers[0] == 2 and len(done) < LAYERS:
            raise KeyboardInterrupt
        done.extend(layers)
        return real(samples, layers, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(jobs, "train_layers", stops_at_2)
    assert train(tiny, text, out, *options).exit_code == 130
    again = train(tiny, text, out, *options)
    assert (again.exit_code, "add --resume to go on" in again.output) == (2, True)
    other = train(tiny, text, out, *options, "--resume", "--bits", "256")
    assert (other.exit_code, "had another recipe: repeat its command" in other.output) == (2, True)
    monkeypatch.setattr(jobs, "train_layers", lambda *a: done.extend(a[1]) or real(*a))  # type: ignore[func-returns-value]
    assert train(tiny, text, out, *options, "--resume").exit_code == 0
    assert done == [0, 1, 2]  # no layer twice
    assert (out / artifact.TENSOR_FILE).read_bytes() == (whole / artifact.TENSOR_FILE).read_bytes()
    twice = train(tiny, text, out, *options)
    assert (twice.exit_code, "holds hash weights: give another --out" in twice.output) == (2, True)


def test_layers_trained_together_are_those_trained_apart(
    tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--dense-layers", "0")
    assert train(tiny, text, tmp_path / "apart", *options).exit_code == 0
    groups: list[list[int]] = []
    real = jobs.train_layers
    monkeypatch.setattr(jobs, "train_layers", lambda *a: groups.append(list(a[1])) or real(*a))  # type: ignore[func-returns-value]
    monkeypatch.setattr(jobs, "_layers_at_once", lambda *_: 2)
    assert train(tiny, text, tmp_path / "together", *options).exit_code == 0
    assert groups == [[0, 1], [2]]
    (_, apart), (_, together) = (artifact.load(tmp_path / name) for name in ("apart", "together"))
    assert all(torch.equal(apart[layer], together[layer]) for layer in apart)


def test_eval_compares_and_writes(weights: Path, tiny: Path, text: Path, tmp_path: Path) -> None:
    arguments = ["eval", tiny, "--weights", weights, "--text", text, *SHORT]
    table = run(*arguments, "--out", tmp_path / "masses.png")
    assert table.exit_code == 0, table.output
    assert (tmp_path / "masses.png").stat().st_size > 10_000
    names = ("best possible", "exact q.k", "Quest", "Loki", "Hamming 128, untrained", "trained")
    assert all(name in table.output for name in names)
    printed = run(*arguments, "--json", "--out", tmp_path / "masses.json")
    values = json.loads(printed.stdout)
    assert printed.stderr == ""
    assert values == json.loads((tmp_path / "masses.json").read_text())
    mass = {(row["method"], row["budget"]): row["mass"] for row in values["summary"]}
    assert all(mass["best possible", budget] >= value for (_, budget), value in mass.items())
    assert {(row["layer"], row["kv_head"]) for row in values["rows"]} == {
        (layer, head) for layer in range(1, LAYERS) for head in (0, 1)
    }


def test_eval_takes_other_budgets_and_trains_hashattention(
    weights: Path, tiny: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "Recipe", lambda: Recipe(steps=2))
    arguments = ["eval", tiny, "--weights", weights, "--text", text, "--budgets", "8,32", "--hashattention", text]
    values = json.loads(run(*arguments, "--json", *SHORT).stdout)
    sizes = {row["method"]: row["bytes_per_token"] for row in values["summary"]}
    assert sizes["HashAttention"] == 32 / 8 * 2  # two query heads a KV head
    assert {(row["method"], row["budget"]) for row in values["summary"]} == {(m, b) for m in sizes for b in (8, 32)}


def test_check_keeps_or_retrains(weights: Path, tiny: Path, text: Path, tmp_path: Path) -> None:
    same = run("check", tiny, "--weights", weights, "--device", "cpu")
    assert (same.exit_code, same.output.endswith("Keep them.\n")) == (0, True)
    other = make_model(tmp_path / "other", seed=3)
    unmeasured = run("check", other, "--weights", weights, "--device", "cpu")
    assert (unmeasured.exit_code, "Give --text to measure what is lost. Train anew." in unmeasured.output) == (1, True)
    measured = run("check", other, "--weights", weights, "--text", text, "--json", *SHORT)
    verdict = json.loads(measured.stdout)
    assert verdict["same"] is False and 0 < verdict["kept"] <= 1
    recorded = jobs.recorded_ratio(artifact.load_identity(weights))
    assert recorded is not None and verdict["recorded"] == recorded
    assert measured.exit_code == int(recorded - verdict["kept"] > jobs.TOLERANCE)


def test_kept_weights_can_be_adopted(
    weights: Path, tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = make_model(tmp_path / "tuned", seed=3)
    arguments = ["check", other, "--weights", weights, "--text", text, "--adopt", tmp_path / "own", *SHORT]
    monkeypatch.setattr(jobs, "TOLERANCE", -1.0)
    assert run(*arguments).exit_code == 1 and not (tmp_path / "own").exists()
    monkeypatch.setattr(jobs, "TOLERANCE", 1.0)
    assert run(*arguments).exit_code == 0
    identity, projections = artifact.load(tmp_path / "own")
    assert identity.model == "tuned" and {row["text"] for row in identity.scores} == {text.name}
    assert torch.equal(projections[2], artifact.load(weights)[1][2])
    again = run("check", other, "--weights", tmp_path / "own", "--device", "cpu")
    assert (again.exit_code, again.output.startswith("The queries and keys of this model are those of tuned")) == (
        0,
        True,
    )
    assert "holds hash weights: give another --adopt" in run(*arguments).output
    third = make_model(tmp_path / "third", seed=4)
    arguments = ["check", third, "--weights", tmp_path / "own", "--text", text, "--adopt", tmp_path / "next", *SHORT]
    assert run(*arguments).exit_code == 0 and artifact.load_identity(tmp_path / "next").model == "third"


def test_a_model_of_another_shape_is_refused(weights: Path, text: Path, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", seed=0, kv_heads=4)
    for command, *options in (["check"], ["eval", "--text", text]):
        result = run(command, other, *options, "--weights", weights, *SHORT)
        assert result.exit_code == 3
        assert "with kv_heads 2, but" in result.output and "has 4: train weights for this model." in result.output


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["eval", "MODEL", "--text", "/no/such"], 2, "/no/such does not exist: give text files or folders"),
        (["eval", "/no/such", "--text", "TEXT"], 2, "/no/such cannot be loaded"),
        (["eval", "MODEL", "--text", "TEXT", "--tokens", "4096"], 2, "--tokens 4096 is more than the 1024"),
        (["check", "MODEL", "--weights", "/"], 3, "holds no hata.json: give a folder of hash weights"),
        (
            ["train", "MODEL", "--text", "TEXT", "--out", "OUT", "--dense-layers", "3"],
            2,
            "leaves none of the model's 3",
        ),
        (["train", "MODEL", "--text", "TEXT", "--out", "OUT", "--sequences", "0"], 2, "not in the range"),
        (["eval", "MODEL", "--text", "TEXT", "--budgets", "64,1"], 2, "is not a list of numbers from 2 to 4096"),
        (["eval", "MODEL", "--text", "TEXT", "--out", "OUT/x.png"], 2, "is not a folder"),
        (["eval", "MODEL", "--text", "TEXT", "TEXT", "--sequences", "1"], 2, "is fewer than the 2 texts: give 2"),
    ],
)
def test_mistakes_are_one_sentence(
    arguments: list[str], code: int, sentence: str, tiny: Path, text: Path, tmp_path: Path
) -> None:
    words = {"MODEL": tiny, "TEXT": text, "OUT": tmp_path / "out"}
    result = run(*(words.get(argument, argument) for argument in arguments))
    assert result.exit_code == code, result.output
    assert sentence in result.output and "Traceback" not in result.output


def test_another_schema_and_another_scoring_are_refused(weights: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(weights, other)
    values = json.loads((other / artifact.IDENTITY_FILE).read_text())
    (other / artifact.IDENTITY_FILE).write_text(json.dumps(values | {"schema": 2}))
    with pytest.raises(artifact.ArtifactError, match="has schema 2: this version reads schema 3, so train them anew"):
        artifact.load(other)
    (other / artifact.IDENTITY_FILE).write_text(json.dumps(values | {"scoring": "guess"}))
    with pytest.raises(artifact.ArtifactError, match="has scoring guess: this version knows hamming and one-sided"):
        artifact.load(other)
