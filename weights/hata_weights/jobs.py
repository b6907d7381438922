"""Whole runs: train a model's weights, evaluate them, check that they fit. Words and tables are the callers'."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hata_weights import artifact
from hata_weights.artifact import Identity
from hata_weights.capture import SHORTEST, Decoder, capture, data_fingerprint, load_sample, second_half, throughout
from hata_weights.errors import MisfitError, RequestError
from hata_weights.evaluate import (
    BEST,
    BUDGETS,
    EXACT,
    HASH_ATTENTION,
    TRAINED,
    Method,
    Row,
    Summary,
    evaluate_layer,
    methods,
    summarise,
)
from hata_weights.mapping import BITS, train_mapping
from hata_weights.train import Recipe, layers_at_once, train_layers

T = TypeVar("T")
# Wraps what is looped over in a progress bar: a description and the items.
Track = Callable[[str, Sequence[T]], Iterable[T]]

PARTIAL, PLAN = "partial", "plan.json"
TRAINING_QUERIES, TEST_QUERIES = 1024, 128
TOLERANCE = 0.02
# Sinks and recent tokens. Scores are recorded as the server selects by default, and with all but the current token
# selected by score.
BY_SCORE = (0, 1)
SETTINGS = (BY_SCORE, (Recipe.sink, Recipe.recent))


@dataclass(frozen=True)
class Text:
    """A named text as sequences of tokens, [N] int64 each."""

    name: str
    sequences: tuple[Tensor, ...]

    def quarter(self) -> Text | None:
        """The first quarter of each sequence: what do codes keep in shorter contexts? None where it is too little."""
        quarters = tuple(tokens[: len(tokens) // 4] for tokens in self.sequences)
        return Text(self.name, quarters) if min(map(len, quarters)) >= SHORTEST else None


def to_learn_from(tokens: Tensor) -> Tensor:
    """Positions of a sequence whose queries codes learn from."""
    return throughout(len(tokens), TRAINING_QUERIES)


def to_measure_on(tokens: Tensor) -> Tensor:
    """Positions of a sequence whose queries codes are measured on."""
    return second_half(len(tokens), TEST_QUERIES)


def train(
    decoder: Decoder,
    text: Text,
    tests: Sequence[Text],
    out: Path,
    recipe: Recipe,
    *,
    dense_layers: int,
    resume: bool,
    track: Track[Any],
) -> Identity:
    """Trains on ``text``, measures on each of ``tests`` and writes the folder ``out``.

    What is finished of a run lies in ``out/partial`` until all is: captured sequences, and each layer's weights.

    Raises:
        RequestError: ``out`` holds weights, or an unfinished run that is not to be resumed or was another one.
    """
    shape = decoder.shape
    layers = range(dense_layers, shape.layers)
    if not layers:
        raise RequestError(f"--dense-layers {dense_layers} leaves none of the model's {shape.layers} layers to train.")
    plan = {
        "fingerprint": decoder.fingerprint,
        "data": data_fingerprint(text.sequences),
        "test": [data_fingerprint(test.sequences) for test in tests],
        "dense_layers": dense_layers,
        "recipe": asdict(recipe),
    }
    partial = _open_partial(out, plan, resume)
    tests = [of_length for test in tests for of_length in (test, test.quarter()) if of_length]
    learned = _folders(partial, "text", text)
    held_out = [_folders(partial, f"test-{n}", test) for n, test in enumerate(tests)]
    read = [(*pair, to_learn_from) for pair in zip(text.sequences, learned, strict=True)]
    for test, folders in zip(tests, held_out, strict=True):
        read += [(*pair, to_measure_on) for pair in zip(test.sequences, folders, strict=True)]
    for tokens, folder, queries in track("Reading", read):
        capture(decoder, tokens, folder, layers, queries(tokens))
    paths = {layer: partial / f"layer-{layer}.safetensors" for layer in layers}
    missing = [layer for layer, path in paths.items() if not path.exists()]
    at_once = _layers_at_once(decoder, text, recipe)
    groups = [missing[first : first + at_once] for first in range(0, len(missing), at_once)]
    steps = iter(track("Training", range(len(groups) * recipe.steps)))
    for group in groups:
        samples = [load_sample(folder, group, decoder.device) for folder in learned]
        projections = train_layers(samples, group, recipe, lambda: next(steps))
        for layer, projection in zip(group, projections, strict=True):
            unfinished = paths[layer].with_suffix(".unfinished")
            save_file({"projection": projection}, unfinished)
            unfinished.rename(paths[layer])
    next(steps, None)  # ends the bar
    trained = {layer: load_file(path)["projection"] for layer, path in paths.items()}
    identity = Identity(
        decoder.name,
        shape.layers,
        dense_layers,
        shape.kv_heads,
        shape.head_dim,
        recipe.bits,
        _tool(),
        scoring=recipe.scoring,
        fingerprint=decoder.fingerprint,
        data=str(plan["data"]),
        tokens=max(map(len, text.sequences)),
        sequences=len(text.sequences),
        steps=recipe.steps,
    )
    compared = [method for method in methods(shape, (identity, trained)) if method.name in (EXACT, TRAINED)]
    scores: list[dict[str, Any]] = []
    for test, folders in zip(tests, held_out, strict=True):
        for sink, recent in SETTINGS:
            rows = _evaluate(decoder, folders, layers, lambda _: compared, sink, recent, BUDGETS, track)
            scores += _score_rows(rows, test, sink, recent)
    identity = replace(identity, scores=tuple(scores))
    artifact.save(out, identity, trained)
    shutil.rmtree(partial)
    return identity


def _layers_at_once(decoder: Decoder, text: Text, recipe: Recipe) -> int:
    """One on a CPU, whose threads a layer keeps busy; as many as have room on a GPU."""
    if not decoder.device.startswith("cuda"):
        return 1
    lengths = [(len(tokens), len(to_learn_from(tokens))) for tokens in text.sequences]
    free, _ = torch.cuda.mem_get_info(decoder.device)
    return layers_at_once(decoder.shape, lengths, recipe, free)


def _tool() -> str:
    try:
        return f"hata-weights {version('sglang-hata')}"
    except PackageNotFoundError:
        return "hata-weights, not installed"  # run from its sources


def _folders(parent: Path, name: str, text: Text) -> list[Path]:
    """Where the samples of a text's sequences lie."""
    return [parent / f"{name}-{n}" for n in range(len(text.sequences))]


def _open_partial(out: Path, plan: dict[str, Any], resume: bool) -> Path:
    """The folder of an unfinished run: a new one, or that of the same run."""
    partial = out / PARTIAL
    require_free(out, "--out")
    if (partial / PLAN).exists():
        if not resume:
            raise RequestError(f"{out} holds an unfinished run: add --resume to go on, or remove it first.")
        before = json.loads((partial / PLAN).read_text(encoding="utf-8"))
        if differing := [key for key in plan if before.get(key) != plan[key]]:
            raise RequestError(
                f"The unfinished run in {out} had another {' and '.join(differing)}: repeat its command, or remove it."
            )
    partial.mkdir(parents=True, exist_ok=True)
    (partial / PLAN).write_text(json.dumps(plan, indent=2) + "\n", encoding="utf-8")
    return partial


def evaluate(
    decoder: Decoder,
    text: Text,
    weights: tuple[Identity, dict[int, Tensor]] | None,
    *,
    dense_layers: int,
    sink: int,
    recent: int,
    track: Track[Any],
    budgets: Sequence[int] = BUDGETS,
    only: Sequence[str] | None = None,
    mapping_text: Text | None = None,
) -> list[Row]:
    """Every method, or ``only`` those named, in every layer past the dense ones.

    Args:
        mapping_text: where given, HashAttention's networks are trained on it and compared too.
    """
    layers = range(dense_layers, decoder.shape.layers)
    compared = [method for method in methods(decoder.shape, weights) if only is None or method.name in only]
    with tempfile.TemporaryDirectory() as scratch:
        folders = _folders(Path(scratch), "text", text)
        learned = _folders(Path(scratch), "mapping", mapping_text) if mapping_text else []
        read = [(*pair, to_measure_on) for pair in zip(text.sequences, folders, strict=True)]
        if mapping_text:
            read += [(*pair, to_learn_from) for pair in zip(mapping_text.sequences, learned, strict=True)]
        for tokens, folder, queries in track("Reading", read):
            capture(decoder, tokens, folder, layers, queries(tokens))

        def of_layer(layer: int) -> list[Method]:
            if not learned:
                return compared
            mapping = train_mapping([load_sample(f, [layer], decoder.device) for f in learned], layer, Recipe())
            size = BITS / 8 * decoder.shape.query_heads / decoder.shape.kv_heads
            return [*compared, Method(HASH_ATTENTION, size, lambda sample, _: mapping)]

        return _evaluate(decoder, folders, layers, of_layer, sink, recent, budgets, track)


def _evaluate(
    decoder: Decoder,
    folders: Sequence[Path],
    layers: range,
    compared: Callable[[int], Sequence[Method]],
    sink: int,
    recent: int,
    budgets: Sequence[int],
    track: Track[Any],
) -> list[Row]:
    rows: list[Row] = []
    for layer in track("Measuring", layers):
        samples = (load_sample(folder, [layer], decoder.device) for folder in folders)
        rows += evaluate_layer(samples, layer, compared(layer), sink=sink, recent=recent, budgets=budgets)
    return rows


def _score_rows(rows: Sequence[Row], test: Text, sink: int, recent: int) -> list[dict[str, Any]]:
    """What `hata.json` says of quality, a row for each budget."""
    by_key = {(summary.method, summary.budget): summary for summary in summarise(rows)}
    tokens = round(fmean(len(sequence) for sequence in test.sequences))
    return [
        {
            "text": test.name,
            "tokens": tokens,
            "sink": sink,
            "recent": recent,
            "budget": f"1/{budget}",
            "mass": round(summary.mass, 4),
            "exact_mass": round(by_key[EXACT, budget].mass, 4),
            "best_mass": round(by_key[BEST, budget].mass, 4),
            "worst_head": round(summary.worst_ratio, 4),
            "bytes_per_token": summary.bytes_per_token,
        }
        for (method, budget), summary in by_key.items()
        if method == TRAINED
    ]


def recorded_ratio(identity: Identity) -> float | None:
    """The share of exact q.k's mass at 1/64 that `hata.json` has, selected by score, over its texts whole."""
    rows = [row for row in identity.scores if row["budget"] == "1/64" and (row["sink"], row["recent"]) == BY_SCORE]
    rows = [row for row in rows if row["tokens"] == max(row["tokens"] for row in rows)]
    return fmean(row["mass"] / row["exact_mass"] for row in rows) if rows else None


@dataclass(frozen=True)
class Verdict:
    """What `check` found.

    Args:
        same: the weights that codes depend on are those that the hash weights were trained for; None if not known.
        kept, recorded: share of exact q.k's mass at 1/64, on the text given and as `hata.json` has it; None unless
            measured and recorded.
        scores: what was measured, as `hata.json` has it.
    """

    same: bool | None
    kept: float | None = None
    recorded: float | None = None
    scores: tuple[dict[str, Any], ...] = ()

    @property
    def retrain(self) -> bool:
        """Whether to train anew: other weights, and either nothing measured or more lost than `TOLERANCE`."""
        if self.same:
            return False
        return self.kept is None or self.recorded is None or self.recorded - self.kept > TOLERANCE


def require_fit(decoder: Decoder, folder: Path, identity: Identity) -> None:
    """Raises MisfitError unless the model has the shape that the hash weights are for."""
    for name in ("layers", "kv_heads", "head_dim"):
        theirs, ours = getattr(identity, name), getattr(decoder.shape, name)
        if theirs != ours:
            raise MisfitError(
                f"The hash weights in {folder} are for {identity.model} with {name} {theirs}, but {decoder.name} has "
                f"{ours}: train weights for this model."
            )


def check(
    decoder: Decoder, weights: tuple[Identity, dict[int, Tensor]], text: Text | None, track: Track[Any]
) -> Verdict:
    """Compares fingerprints and, given a text, measures what share of exact q.k's mass the codes keep."""
    identity, _ = weights
    same = identity.fingerprint == decoder.fingerprint if identity.fingerprint else None
    recorded = recorded_ratio(identity)
    if text is None:
        return Verdict(same, recorded=recorded)
    sink, recent = BY_SCORE
    rows = evaluate(
        decoder,
        text,
        weights,
        dense_layers=identity.dense_layers,
        sink=sink,
        recent=recent,
        track=track,
        only=(EXACT, TRAINED),
    )
    scores = tuple(_score_rows(rows, text, sink, recent))
    return Verdict(same, ratio_of(summarise(rows)), recorded, scores)


def require_free(out: Path, option: str) -> None:
    """Raises RequestError if ``out`` holds hash weights."""
    if (out / artifact.IDENTITY_FILE).exists():
        raise RequestError(f"{out} holds hash weights: give another {option}, or remove it first.")


def adopt(decoder: Decoder, weights: tuple[Identity, dict[int, Tensor]], verdict: Verdict, out: Path) -> None:
    """Writes the hash weights again as this model's own, with its scores, so that a server takes them for it."""
    identity, projections = weights
    scores = verdict.scores or identity.scores
    artifact.save(
        out, replace(identity, model=decoder.name, fingerprint=decoder.fingerprint, scores=scores), projections
    )


def ratio_of(summaries: Sequence[Summary]) -> float:
    """The trained codes' share of exact q.k's mass at 1/64."""
    return next(s.ratio for s in summaries if s.method == TRAINED and s.budget == 64)
