"""What codes keep of the attention: by encoder, by training text, and on a fine-tuned model.

    python -m benchmarks.codes frontier MODEL --train texts/train/* --test texts/evaluate/*
    python -m benchmarks.codes text     MODEL --train texts/train/* --test texts/evaluate/*
    python -m benchmarks.codes finetune MODEL --train texts/train/* --test texts/evaluate/* --domain other/

frontier: attention mass against bytes read, for every encoder and budget; all learn from the same samples.
text: the default codes, learned from more and from more diverse text, in a few layers.
finetune: tunes the model on text of another domain, and measures the base model's codes on it beside new ones.

Every path of --train is a kind of text. A layer is trained and measured by itself, several at a time on a GPU, and
what is finished lies in --scratch, from which the same command goes on. Writes benchmarks/results/codes-MODEL.json,
codes-text-MODEL.json or codes-finetune-MODEL.json as results come, and plots. A checkout is enough, with
PYTHONPATH=kernels:weights. The rows of HATA's own training are explained at `train_paper`.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from click import ClickException
from torch import Tensor

from benchmarks.common import RESULTS, header, installed, plot
from hata_kernels import reference
from hata_weights import artifact, jobs
from hata_weights.capture import (
    Decoder,
    Sample,
    Shape,
    capture,
    data_fingerprint,
    load_sample,
    read_sequences,
    read_text,
)
from hata_weights.errors import RequestError
from hata_weights.evaluate import (
    BEST,
    EXACT,
    HASH_ATTENTION,
    Method,
    Row,
    codes,
    evaluate_layer,
    methods,
    rule,
    summarise,
    untrained,
)
from hata_weights.mapping import BITS as MAPPING_BITS
from hata_weights.mapping import train_mapping
from hata_weights.rotation import SEED, to_int8, untrained_projection
from hata_weights.train import Recipe, train_layer

BUDGETS = (256, 128, 64, 32, 16, 8)  # one token in ...
SERVED = (Recipe.sink, Recipe.recent)
DEFAULT = Recipe()  # its bits and scoring are a server's default, at a budget of 1/64
PAPER = "HATA's loss, Hamming 128"
LENGTH, BATCH = 1024, 8  # of a step of fine-tuning
DOMAIN_CHARACTERS = 6_000_000

Record = dict[str, Any]
Task = tuple[Any, ...]


class Encoder(NamedTuple):
    """How an encoder is called and drawn; colours are Okabe and Ito's, which every eye can tell apart."""

    name: str
    bits: int | None
    scoring: str
    colour: str
    marker: str


def trained_name(bits: int, scoring: str) -> str:
    return f"trained, {scoring.replace('hamming', 'Hamming')} {bits}"


def encoders(group: int) -> list[Encoder]:
    """Every encoder of the frontier, for ``group`` query heads a KV head."""
    markers = {64: "v", 128: "o", 256: "^"}
    return [
        Encoder(EXACT, None, "q.k", "#000000", "s"),
        Encoder("Quest", None, "upper bound of q.k", "#E69F00", "D"),
        Encoder("Loki", None, "q.k", "#56B4E9", "P"),
        *(Encoder(untrained(n).name, n, reference.HAMMING, "#999999", markers[n]) for n in markers),
        Encoder(PAPER, 128, reference.HAMMING, "#CC79A7", "o"),
        Encoder(trained_name(128, reference.HAMMING), 128, reference.HAMMING, "#009E73", "o"),
        *(Encoder(trained_name(n, DEFAULT.scoring), n, DEFAULT.scoring, "#0072B2", markers[n]) for n in markers),
        Encoder(HASH_ATTENTION, MAPPING_BITS * group, reference.HAMMING, "#D55E00", "X"),
    ]


# HATA's own training


class Item(NamedTuple):
    """One query position of one sequence: queries [H, G, D], the keys up to it [H, n, D], labels [H, G, n]."""

    queries: Tensor
    keys: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Paper:
    """The hyperparameters of the paper's appendix B."""

    bits: int = 128
    steps: int = 300
    sigma: float = 0.1
    similarity: float = 0.01
    balance: float = 1.0
    decorrelation: float = 2.0
    rate: float = 0.1
    momentum: float = 0.9
    decay: float = 1e-6


def train_paper(samples: Sequence[Sample], layer: int, paper: Paper) -> Tensor:
    """Trains one layer as the paper does.

    As in the paper: labels, the three terms of the loss and their weights, soft bits, SGD with momentum over the whole
    data for 300 steps, normally distributed columns at the start, one query position a sequence from its second half,
    one projection of a KV head for keys and queries, Hamming scoring.

    Where the paper's equations and the training of its published weights differ, this follows the training: the
    weights of balance and decorrelation are 1 and 2 (the equations swap them), balance takes in queries and is divided
    by the bits, and decorrelation is one norm over all KV heads. Otherwise here: texts and sequences, those of the
    other encoders (the paper takes 11 sequences, mostly of its benchmarks); all pairs of them in each step, not
    chunks of 32,768; float32, not bfloat16; and the columns are rounded to int8, as a server takes them.

    Returns:
        [2, H, D, bits] int8, twice the same.
    """
    H, _, D = samples[0].keys.shape
    device = samples[0].keys.device
    draw = torch.Generator(device).manual_seed(SEED + layer)
    items = []
    for sample in samples:
        chosen = int(torch.randint(len(sample.positions), (1,), generator=draw, device=device))
        queries = sample.queries[:, chosen].unflatten(0, (H, -1))
        keys = sample.keys[:, : int(sample.positions[chosen]) + 1]
        items.append(Item(queries, keys, paper_labels(queries @ keys.transpose(1, 2))))
    w = torch.randn(H, D, paper.bits, generator=draw, device=device).requires_grad_()
    optimizer = torch.optim.SGD([w], lr=paper.rate, momentum=paper.momentum, weight_decay=paper.decay)
    for _ in range(paper.steps):
        optimizer.zero_grad()
        paper_loss(w, items, paper).backward()
        optimizer.step()
    learned = to_int8(w.detach().cpu())
    return torch.stack([learned, learned])


def paper_labels(scores: Tensor) -> Tensor:
    """q.k [..., n] -> labels: the highest tenth gets 20 down to 1 by rank, the rest -1."""
    top = max(1, round(scores.shape[-1] / 10))
    ranked = torch.linspace(20, 1, top, device=scores.device).expand(*scores.shape[:-1], top)
    return torch.full_like(scores, -1).scatter(-1, scores.topk(top).indices, ranked)


def paper_loss(w: Tensor, items: Sequence[Item], paper: Paper) -> Tensor:
    """The loss of projections ``w`` [H, D, bits] over all pairs of a query and a key.

    Similarity: labels times the squared distance of the soft bits 2 sigmoid(sigma x W) - 1 of query and key, averaged
    over pairs, summed over query heads. Balance: the square of what the soft bits of queries and keys are on average.
    Decorrelation: how far the columns are from orthonormal.
    """
    bits = w.shape[-1]
    pairs = sum(item.keys.shape[1] for item in items)
    similarity: Any = 0
    total: Any = 0
    for item in items:
        q, k = (2 * torch.sigmoid(paper.sigma * (x @ w)) - 1 for x in (item.queries, item.keys))
        distance = q.square().sum(-1).unsqueeze(2) + k.square().sum(-1).unsqueeze(1) - 2 * q @ k.transpose(1, 2)
        similarity = similarity + (item.labels * distance).sum()
        total = total + k.shape[1] * q + k.sum(1, keepdim=True)
    balance = (total / (pairs * bits)).square().sum()
    decorrelation = (w.transpose(1, 2) @ w - torch.eye(bits, device=w.device)).norm()
    return paper.similarity * similarity / pairs + paper.balance * balance + paper.decorrelation * decorrelation


# Tasks, a layer each, and what they measure


@dataclass(frozen=True)
class Setup:
    """What a worker needs.

    Args:
        folder: of this run, in the scratch folder.
        learned: the captured training text, a folder a sequence.
        tests: the captured texts to measure on, by name.
        weights: folders of hash weights that take the place of training.
        tuned, tuned_tests: as ``learned`` and ``tests``, of the fine-tuned model.
    """

    folder: Path
    shape: Shape
    device: str
    steps: int
    learned: tuple[Path, ...]
    tests: dict[str, list[Path]]
    weights: tuple[Path, ...] = ()
    hash_attention: bool = False
    tuned: tuple[Path, ...] = ()
    tuned_tests: dict[str, list[Path]] | None = None

    def load(self, folders: Iterable[Path], layer: int) -> list[Sample]:
        return [load_sample(folder, layer, self.device) for folder in folders]

    def trained(self, samples: Sequence[Sample], layer: int, bits: int, scoring: str, name: str = "") -> Method:
        """Codes from the folders given, or else trained."""
        of_folder = None
        for folder in self.weights:
            identity, projections = artifact.load(folder)
            if (identity.bits, identity.scoring) == (bits, scoring):
                of_folder = projections.get(layer)
        if of_folder is None:
            of_folder = train_layer(samples, layer, replace(DEFAULT, bits=bits, scoring=scoring, steps=self.steps))
        return served(name or trained_name(bits, scoring), of_folder, scoring)


def served(name: str, projection: Tensor, scoring: str) -> Method:
    """Codes of a layer's projections."""
    return Method(name, projection.shape[-1] / 8, lambda sample, _: codes(sample, projection, scoring))


def exact(shape: Shape) -> Method:
    return next(method for method in methods(shape) if method.name == EXACT)


def measure(tests: dict[str, list[Sample]], layer: int, compared: Sequence[Method], **labels: Any) -> list[Record]:
    """A `Row` of each text, setting of sinks and recent tokens, method, KV head and budget, with ``labels``."""
    records = []
    for text, samples in tests.items():
        lengths = torch.cat([sample.positions for sample in samples]) + 1
        for sink, recent in jobs.SETTINGS:
            shares = {b: float((rule(b, sink, recent).of(lengths) / lengths).mean()) for b in BUDGETS}
            rows = evaluate_layer(samples, layer, compared, sink=sink, recent=recent, budgets=BUDGETS)
            common = {**labels, "text": text, "sink": sink, "recent": recent}
            records += [{**common, "selected": shares[row.budget], **asdict(row)} for row in rows]
    return records


def frontier_layer(setup: Setup, layer: int) -> list[Record]:
    """Every encoder, trained on the same samples."""
    learned, shape = setup.load(setup.learned, layer), setup.shape
    group = shape.query_heads // shape.kv_heads
    known = {method.name: method for method in (*methods(shape), *map(untrained, (64, 128, 256)))}
    compared = []
    for encoder in encoders(group):
        if encoder.name in known:
            compared.append(known[encoder.name])
        elif encoder.name == PAPER:
            paper = Paper(steps=min(Paper.steps, setup.steps))
            compared.append(served(PAPER, train_paper(learned, layer, paper), reference.HAMMING))
        elif encoder.name == HASH_ATTENTION:
            if setup.hash_attention:
                mapping = train_mapping(learned, layer, replace(DEFAULT, steps=setup.steps))
                compared.append(Method(HASH_ATTENTION, MAPPING_BITS / 8 * group, lambda sample, _, m=mapping: m))
        else:
            compared.append(setup.trained(learned, layer, encoder.bits or 0, encoder.scoring))
    del learned
    return measure({text: setup.load(folders, layer) for text, folders in setup.tests.items()}, layer, compared)


def text_layer(setup: Setup, layer: int, kinds: int, draw: int, folders: tuple[str, ...]) -> list[Record]:
    """The default codes from some of the training text; from none of it, the untrained rotation."""
    if folders:
        method = setup.trained(setup.load(map(Path, folders), layer), layer, DEFAULT.bits, DEFAULT.scoring)
    else:
        shape = setup.shape
        rotation = untrained_projection(layer, range(shape.kv_heads), shape.head_dim, DEFAULT.bits)
        method = served(trained_name(DEFAULT.bits, DEFAULT.scoring), rotation, DEFAULT.scoring)
    tests = {text: setup.load(captured, layer) for text, captured in setup.tests.items()}
    compared = [exact(setup.shape), method]
    return measure(tests, layer, compared, kinds=kinds, sequences=len(folders), draw=draw)


def finetune_layer(setup: Setup, layer: int) -> list[Record]:
    """The base model's codes on both models, and new codes on the fine-tuned one."""
    base = setup.trained(setup.load(setup.learned, layer), layer, DEFAULT.bits, DEFAULT.scoring, "base model's codes")
    without = replace(setup, weights=())
    new = without.trained(setup.load(setup.tuned, layer), layer, DEFAULT.bits, DEFAULT.scoring, "trained anew")
    records = []
    for model, tests, compared in (("base", setup.tests, [base]), ("fine-tuned", setup.tuned_tests, [base, new])):
        samples = {text: setup.load(folders, layer) for text, folders in (tests or {}).items()}
        records += measure(samples, layer, [exact(setup.shape), untrained(DEFAULT.bits), *compared], model=model)
    return records


def run_task(work: Callable[..., list[Record]], setup: Setup, name: str, task: Task) -> list[Record]:
    """Does a task and keeps its records in the scratch folder; one that was done is read from there."""
    path = setup.folder / "records" / f"{name}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(work(setup, *task)))
        unfinished.rename(path)
    return json.loads(path.read_text())


def each(
    work: Callable[..., list[Record]], setup: Setup, tasks: dict[str, Task], workers: int
) -> Iterator[list[Record]]:
    """The records of every task as they come, several at a time."""
    begun = time.monotonic()

    def told(done: int, name: str) -> None:
        seconds = time.monotonic() - begun
        print(f"{done} of {len(tasks)} done, {seconds:.0f} s: {name}", file=sys.stderr, flush=True)

    if workers == 1:
        for done, (name, task) in enumerate(tasks.items(), 1):
            yield run_task(work, setup, name, task)
            told(done, name)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        waiting = {pool.submit(run_task, work, setup, name, task): name for name, task in tasks.items()}
        for done, future in enumerate(as_completed(waiting), 1):
            yield future.result()
            told(done, waiting[future])


ROW_FIELDS = [field.name for field in fields(Row)]


def summaries(records: Sequence[Record], head_dim: int) -> list[Record]:
    """Over layers and KV heads: mean mass, its share of exact q.k's, the worst head's share, and what is read."""
    groups: dict[tuple, list[Record]] = {}
    for record in records:
        label = tuple((name, value) for name, value in record.items() if name not in (*ROW_FIELDS, "selected"))
        groups.setdefault(label, []).append(record)
    found = []
    for label, group in groups.items():
        rows = sorted((Row(**{name: r[name] for name in ROW_FIELDS}) for r in group), key=lambda row: row.layer)
        selected = {r["budget"]: r["selected"] for r in group}
        parts = {(s.method, s.budget): s for s in summarise(rows)}
        for s in parts.values():
            if s.method == BEST:
                continue
            found.append(
                {
                    "encoder": s.method,
                    "bytes_per_token": s.bytes_per_token,
                    "budget": f"1/{s.budget}",
                    **dict(label),
                    "layers": len({row.layer for row in rows}),
                    "mass": round(s.mass, 5),
                    "exact_mass": round(parts[EXACT, s.budget].mass, 5),
                    "best_mass": round(parts[BEST, s.budget].mass, 5),
                    "share": round(s.ratio, 5),
                    "worst_head": round(s.worst_ratio, 5),
                    "recall": round(s.recall, 5),
                    "selected": round(selected[s.budget], 6),
                    "bytes_read_per_token": round(s.bytes_per_token + selected[s.budget] * 4 * head_dim, 3),
                }
            )
    return found


def mean(rows: Iterable[Record], value: str, **wanted: Any) -> float:
    """The mean of a column over the rows that have the values ``wanted``; NaN if none has."""
    values = [row[value] for row in rows if all(row[name] == wish for name, wish in wanted.items())]
    return fmean(values) if values else math.nan


def quality(rows: Iterable[Record]) -> list[float]:
    """The mean share of exact q.k's mass and the worst head's share, of each setting of sinks and recent tokens."""
    rows = list(rows)
    found: list[float] = []
    for chosen in jobs.SETTINGS:
        if of_setting := [row for row in rows if fits(row, chosen)]:
            found += [mean(of_setting, "share"), min(row["worst_head"] for row in of_setting)]
    return found


def fits(row: Record, chosen: tuple[int, int]) -> bool:
    return (row["sink"], row["recent"]) == chosen


def setting(sink_recent: tuple[int, int]) -> Record:
    return dict(zip(("sink", "recent"), sink_recent, strict=True))


def in_words(sink_recent: tuple[int, int]) -> str:
    if sink_recent == jobs.BY_SCORE:
        return "by score alone"
    return "{} sinks and {} recent tokens always".format(*sink_recent)


def print_table(names: Sequence[str], lines: Iterable[Sequence[Any]]) -> None:
    """Markdown; numbers to three digits."""
    print("| " + " | ".join(names) + " |\n|" + "---|" * len(names))
    for line in lines:
        cells = [f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in line]
        print("| " + " | ".join(cells) + " |")


# The three commands


class Run:
    """A command's model, texts, layers and scratch folder.

    Args:
        spread: measure this many layers if no --layers are given; all that are sparse if 0.
    """

    def __init__(self, args: argparse.Namespace, scratch: Path, spread: int = 0) -> None:
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.args, self.scratch = args, scratch
        self.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.workers = args.workers or (4 if self.device.startswith("cuda") else 1)
        self.decoder: Any = Decoder(args.model, self.device)
        self.name, self.shape = Path(self.decoder.name).name, self.decoder.shape
        self.tokens = args.tokens or min(8192, self.decoder.longest)
        sparse = range(args.dense_layers, self.shape.layers)
        self.layers = args.layers or list(sparse)
        if not args.layers and spread:
            self.layers = sorted({sparse[int(len(sparse) * (n + 0.5) / spread)] for n in range(spread)})
        if not self.layers or not set(self.layers) <= set(range(self.shape.layers)):
            raise RequestError(f"{self.name} has layers 0 to {self.shape.layers - 1}: give some of them as --layers.")
        self.tests = {path.name: self.read([path], 1) for path in args.test}
        self.report = header("codes") | {"model": self.name, "layers": self.layers, "tokens": self.tokens}
        self.report["versions"] |= {"transformers": installed("transformers")}
        self.report |= {"steps": args.steps, "train": [path.name for path in args.train], "rows": []}
        self.folder = scratch

    def read(self, paths: Sequence[Path], sequences: int) -> list[Tensor]:
        return read_sequences(self.decoder, paths, self.tokens, sequences)

    def begin(self, *about: Any) -> None:
        """Names the folder in the scratch folder by all that its contents depend on."""
        given = self.args
        tests = {name: data_fingerprint(sequences) for name, sequences in self.tests.items()}
        weights = [artifact.load_identity(folder).sha256 for folder in given.weights]
        plan = [given.command, self.decoder.fingerprint, self.layers, given.steps, tests, weights, *about]
        self.folder = self.scratch / hashlib.sha256(json.dumps(plan).encode()).hexdigest()[:12]

    def capture(self, decoder: Any, name: str, sequences: Sequence[Tensor], queries: int) -> list[Path]:
        folders = [self.folder / f"{name}-{n}" for n in range(len(sequences))]
        for n, (tokens, folder) in enumerate(zip(sequences, folders, strict=True), 1):
            print(f"reading {name}, sequence {n} of {len(sequences)}", file=sys.stderr, flush=True)
            capture(decoder, tokens, folder, self.layers, queries)
        return folders

    def capture_tests(self, decoder: Any, name: str, tests: dict[str, list[Tensor]]) -> dict[str, list[Path]]:
        return {
            text: self.capture(decoder, f"{name}-{n}", sequences, jobs.TEST_QUERIES)
            for n, (text, sequences) in enumerate(tests.items())
        }

    def release(self) -> None:
        """Frees the model's memory for the workers."""
        self.decoder = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def path(self, kind: str, suffix: str) -> Path:
        return self.args.out / f"codes-{kind}{self.name}{suffix}"

    def collect(self, kind: str, work: Callable[..., list[Record]], setup: Setup, tasks: dict[str, Task]) -> None:
        """Runs the tasks, and writes the report anew after each."""
        self.release()
        group = self.shape.query_heads // self.shape.kv_heads
        forms = {encoder.name: {"bits": encoder.bits, "scoring": encoder.scoring} for encoder in encoders(group)}
        ours = {"bits": DEFAULT.bits, "scoring": DEFAULT.scoring}
        records: list[Record] = []
        for found in each(work, setup, tasks, self.workers):
            records += found
            rows = summaries(records, self.shape.head_dim)
            self.report["rows"] = [row | forms.get(row["encoder"], ours) for row in rows]
            self.args.out.mkdir(parents=True, exist_ok=True)
            self.path(kind, ".json").write_text(json.dumps(self.report, indent=2) + "\n")
        print(self.path(kind, ".json"))


def check_weights(run: Run) -> tuple[Path, ...]:
    """The folders of --weights, which must be for this very model."""
    for folder in run.args.weights:
        try:
            identity, _ = artifact.load(folder)
        except artifact.ArtifactError as error:
            raise RequestError(str(error)) from None
        jobs.require_fit(run.decoder, folder, identity)
        if identity.fingerprint != run.decoder.fingerprint:
            raise RequestError(f"The hash weights in {folder} are for other weights than {run.name}'s: leave them out.")
    run.report["weights"] = [folder.resolve().name for folder in run.args.weights]
    return tuple(run.args.weights)


def frontier(args: argparse.Namespace, scratch: Path) -> None:
    run = Run(args, scratch)
    weights = check_weights(run)
    text = run.read(args.train, args.sequences or len(args.train))
    run.begin(data_fingerprint(text), args.hash_attention)
    learned = run.capture(run.decoder, "train", text, jobs.TRAINING_QUERIES)
    tests = run.capture_tests(run.decoder, "test", run.tests)
    setup = Setup(run.folder, run.shape, run.device, args.steps, tuple(learned), tests, weights, args.hash_attention)
    run.collect("", frontier_layer, setup, {f"layer-{layer}": (layer,) for layer in run.layers})
    rows, times = run.report["rows"], measured_times()
    names = list(dict.fromkeys(row["encoder"] for row in rows))
    for chosen in jobs.SETTINGS:
        print(f"\n{run.name}, {in_words(chosen)}: mass by budget; share of exact q.k's mass and worst head at 1/64\n")
        print_table(
            ["selected by", "bytes", *(f"1/{budget}" for budget in BUDGETS), "share", "worst", "µs, 32K x 8"],
            [
                [
                    name,
                    f"{mean(rows, 'bytes_per_token', encoder=name):g}",
                    *(mean(rows, "mass", encoder=name, budget=f"1/{b}", **setting(chosen)) for b in BUDGETS),
                    *quality(r for r in rows if (r["encoder"], r["budget"]) == (name, "1/64") and fits(r, chosen)),
                    times.get(name, "-"),
                ]
                for name in names
            ],
        )
        draw_frontier(run, chosen, times)


def measured_times() -> dict[str, str]:
    """One layer's decode attention by encoder, where `benchmarks.decode_attention` has it: 8 requests of 32K, 1/64."""
    times: dict[str, str] = {}
    for path in sorted(RESULTS.glob("decode_attention-*.json")):
        report = json.loads(path.read_text())
        for row in report["rows"]:
            form = tuple(row[name] for name in ("context", "batch", "q_heads", "kv_heads", "head_dim", "budget"))
            if form == (32_768, 8, 32, 8, 128, "1/64") and row["slots"] == "in order" and row["dense_us"]:
                shown = f"{row['hata_us']:.0f} (dense {row['dense_us']:.0f}), {report['gpu']}"
                times[trained_name(row["bits"], row["scoring"])] = shown
                if row["scoring"] == reference.HAMMING:
                    times[untrained(row["bits"]).name] = shown
    return times


def draw_frontier(run: Run, chosen: tuple[int, int], times: dict[str, str]) -> None:
    rows, D = run.report["rows"], run.shape.head_dim
    mark = {"encoder": trained_name(DEFAULT.bits, DEFAULT.scoring), "budget": "1/64", **setting(chosen)}
    with plot(run.path("", ".png" if chosen == SERVED else "-by-score.png"), width=11) as axes:
        for encoder in encoders(run.shape.query_heads // run.shape.kv_heads):
            points = [
                [mean(rows, value, encoder=encoder.name, budget=f"1/{b}", **setting(chosen)) for b in BUDGETS]
                for value in ("bytes_read_per_token", "mass")
            ]
            if math.isnan(points[0][0]):
                continue
            solid = encoder.name.startswith(("trained", EXACT))
            style = {"linestyle": "-" if solid else "--", "linewidth": 1.8 if solid else 1.1}
            axes.plot(*points, color=encoder.colour, marker=encoder.marker, markersize=5, label=encoder.name, **style)
        axes.plot([4 * D], [1], "*", color="black", markersize=13, linestyle="", label="dense: all of K and V")
        at = [mean(rows, value, **mark) for value in ("bytes_read_per_token", "mass")]
        label = "default: one-sided 128 at 1/64"
        if mark["encoder"] in times:
            label += f"\n{times[mark['encoder']]}, µs a layer"
        axes.plot(*[[x] for x in at], "o", color="none", markeredgecolor="black", markersize=13, markeredgewidth=1.5)
        arrow = {"arrowstyle": "-", "shrinkB": 7}
        axes.annotate(label, at, (0.42, 0.04), textcoords="axes fraction", fontsize=9, arrowprops=arrow)
        axes.set(xscale="log", xlabel="bytes read a cached token and KV head: codes, selected K and V")
        axes.set(ylabel="attention mass kept, mean of layers and heads")
        axes.set_title(f"{run.name}, {run.tokens:,} tokens, budgets 1/256 to 1/8, {in_words(chosen)}", fontsize=11)
        ticks = [8 * 2**n for n in range(8) if 8 * 2**n <= 4 * D]
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.3)
        axes.figure.legend(loc="outside right center", frameon=False, fontsize=9)


def text(args: argparse.Namespace, scratch: Path) -> None:
    run = Run(args, scratch, spread=4)
    kinds = len(args.train)
    numbers = [n for n in (1, 2, 4, 8, 16, 32) if n < kinds] + [kinds]
    cells = [
        (k, n, draw)
        for k in numbers
        for n in (*numbers, 2 * kinds)
        if k <= n and (n <= kinds or k == kinds)
        for draw in range(args.draws if k < kinds else 1)
    ]
    orders = [
        torch.randperm(kinds, generator=torch.Generator().manual_seed(SEED + draw)).tolist()
        for draw in range(args.draws)
    ]
    shares = [[(order, n // k + (i < n % k)) for i, order in enumerate(orders[draw][:k])] for k, n, draw in cells]
    most = {path: max((n for cell in shares for p, n in cell if p == path), default=0) for path in range(kinds)}
    sequences = {path: run.read([args.train[path]], n) for path, n in most.items() if n}
    run.begin({path: data_fingerprint(cut) for path, cut in sequences.items()})
    captured = {
        path: run.capture(run.decoder, f"train-{path}", cut, jobs.TRAINING_QUERIES) for path, cut in sequences.items()
    }
    tests = run.capture_tests(run.decoder, "test", run.tests)
    setup = Setup(run.folder, run.shape, run.device, args.steps, (), tests)
    tasks: dict[str, Task] = {f"none-{layer}": (layer, 0, 0, ()) for layer in run.layers}
    for (k, n, draw), cell in zip(cells, shares, strict=True):
        folders = tuple(str(folder) for path, share in cell for folder in captured[path][:share])
        tasks |= {f"{k}-kinds-{n}-draw-{draw}-{layer}": (layer, k, draw, folders) for layer in run.layers}
    run.report["draws"] = [[args.train[path].name for path in order] for order in orders]
    run.collect("text-", text_layer, setup, tasks)
    rows = [row for row in run.report["rows"] if row["encoder"] != EXACT and row["budget"] == "1/64"]
    cells_found = sorted({(row["kinds"], row["sequences"]) for row in rows})
    print(f"\n{run.name}, layers {run.layers}: share of exact q.k's mass at 1/64, and the worst head's\n")
    print_table(
        ["kinds", "sequences", "by score", "worst head", in_words(SERVED), "worst head"],
        [[k, n, *quality(row for row in rows if (row["kinds"], row["sequences"]) == (k, n))] for k, n in cells_found],
    )
    draw_text(run, rows)


def draw_text(run: Run, rows: list[Record]) -> None:
    rows = [row for row in rows if fits(row, jobs.BY_SCORE)]
    with plot(run.path("text-", ".png")) as axes:
        counts = sorted({row["kinds"] for row in rows} - {0})
        for n, k in enumerate(counts):
            style = {"color": ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#0072B2", "#D55E00")[n % 6]}
            style |= {"marker": "ovs^DP"[n % 6]}
            of_kind = sorted({row["sequences"] for row in rows if row["kinds"] == k})
            shares = [mean(rows, "share", kinds=k, sequences=count) for count in of_kind]
            axes.plot(of_kind, shares, label=f"{k} kind{'s' * (k > 1)} of text", **style)
            for draw in sorted({row["draw"] for row in rows if row["kinds"] == k}):
                own = sorted({row["sequences"] for row in rows if (row["kinds"], row["draw"]) == (k, draw)})
                of_draw = [mean(rows, "share", kinds=k, sequences=count, draw=draw) for count in own]
                axes.plot(own, of_draw, linestyle="", alpha=0.35, **style)
        if not math.isnan(nothing := mean(rows, "share", kinds=0)):
            axes.axhline(nothing, color="#999999", linestyle=":", label="untrained, one-sided 128")
        amounts = sorted({row["sequences"] for row in rows} - {0})
        axes.set(xscale="log", xlabel=f"training sequences of {run.tokens:,} tokens")
        axes.set_xticks(amounts, [str(amount) for amount in amounts])
        axes.set_xticks([], minor=True)
        axes.set(ylabel="share of exact q.k's attention mass at 1/64")
        axes.set_title(
            f"{run.name}, one-sided 128, layers {', '.join(map(str, run.layers))}; faint: each draw of kinds"
        )
        axes.grid(alpha=0.3)
        axes.figure.legend(loc="outside right center", frameon=False)


def finetune(args: argparse.Namespace, scratch: Path) -> None:
    run = Run(args, scratch)
    weights = check_weights(run)
    domain = torch.tensor(
        run.decoder.tokenizer(read_text(args.domain, DOMAIN_CHARACTERS), verbose=False)["input_ids"], dtype=torch.int64
    )
    if len(domain) < run.tokens + LENGTH:
        raise RequestError(f"{args.domain} holds {len(domain)} tokens: give at least {run.tokens + LENGTH}.")
    learned_text = run.read(args.train, args.sequences or len(args.train))
    held_out = {**run.tests, f"{args.domain.name}, held out": [domain[-run.tokens :]]}
    tuning = (args.tuning_steps, args.rate)
    run.begin(data_fingerprint(learned_text), data_fingerprint([domain]), tuning)
    learned = run.capture(run.decoder, "train", [] if weights else learned_text, jobs.TRAINING_QUERIES)
    tests = run.capture_tests(run.decoder, "test", held_out)
    run.release()
    model = run.folder / "model"
    if not (model / "losses.json").exists():
        losses = tune(args.model, domain[: -run.tokens], held_out, model, *tuning, run.device)
        (model / "losses.json").write_text(json.dumps(losses))
    run.report |= {"domain": args.domain.name, "tuning_steps": args.tuning_steps, "rate": args.rate}
    run.report["losses"] = json.loads((model / "losses.json").read_text())
    decoder = Decoder(str(model), run.device)
    tuned = run.capture(decoder, "tuned-train", learned_text, jobs.TRAINING_QUERIES)
    tuned_tests = run.capture_tests(decoder, "tuned-test", held_out)
    del decoder
    setup = Setup(
        run.folder,
        run.shape,
        run.device,
        args.steps,
        tuple(learned),
        tests,
        weights,
        tuned=tuple(tuned),
        tuned_tests=tuned_tests,
    )
    run.collect("finetune-", finetune_layer, setup, {f"layer-{layer}": (layer,) for layer in run.layers})
    rows = [row for row in run.report["rows"] if row["budget"] == "1/64"]
    print(f"\n{run.name}, {args.tuning_steps} steps on {args.domain.name}: next-token loss\n")
    print_table(["text", "before", "after"], [[name, *loss] for name, loss in run.report["losses"].items()])
    print("\nShare of exact q.k's mass at 1/64, and the worst head's\n")
    print_table(
        ["text", "model", "codes", "by score", "worst head", in_words(SERVED), "worst head"],
        [
            [*cell, *quality(row for row in rows if (row["text"], row["model"], row["encoder"]) == cell)]
            for cell in dict.fromkeys((r["text"], r["model"], r["encoder"]) for r in rows if r["encoder"] != EXACT)
        ],
    )


def tune(
    model: str, tokens: Tensor, tests: dict[str, list[Tensor]], out: Path, steps: int, rate: float, device: str
) -> dict[str, list[float]]:
    """Fine-tunes all weights on random pieces of ``tokens`` with AdamW, and writes the model.

    Weights and moments are float32, products bfloat16 on a GPU. The rate rises over the first tenth of the steps, and
    falls to zero along a cosine.

    Returns:
        The loss on each test before and after.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    network = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    dtype = network.dtype
    network = network.to(device, torch.float32)
    low = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=device != "cpu")

    def losses() -> list[float]:
        found = []
        network.eval()
        for sequences in tests.values():
            pieces = [piece.unsqueeze(0).to(device) for tokens in sequences for piece in tokens.split(LENGTH)]
            with torch.no_grad(), low:
                of_pieces = [float(network(input_ids=x, labels=x).loss) for x in pieces if x.shape[1] > 1]
            found.append(fmean(of_pieces))
        return found

    before = losses()
    network.train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.01)
    draw = torch.Generator().manual_seed(SEED)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / (steps / 10)) * (1 + math.cos(math.pi * step / steps)) / 2
        starts = torch.randint(len(tokens) - LENGTH + 1, (BATCH,), generator=draw).tolist()
        batch = torch.stack([tokens[start : start + LENGTH] for start in starts]).to(device)
        with low:
            loss = network(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0 or step == steps - 1:
            print(f"tuning, step {step + 1} of {steps}: loss {loss.item():.3f}", file=sys.stderr, flush=True)
    network.to(dtype)
    after = losses()
    network.save_pretrained(out)
    AutoTokenizer.from_pretrained(model).save_pretrained(out)
    return {name: [round(b, 4), round(a, 4)] for name, b, a in zip(tests, before, after, strict=True)}


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, work in (("frontier", frontier), ("text", text), ("finetune", finetune)):
        command = commands.add_parser(name)
        command.set_defaults(work=work, weights=[])
        command.add_argument("model", help="Hugging Face folder")
        command.add_argument("--train", type=Path, nargs="+", required=True, metavar="PATH", help="a kind of text each")
        command.add_argument("--test", type=Path, nargs="+", required=True, metavar="PATH", help="a text each")
        command.add_argument("--tokens", type=int, help="a sequence (default: 8192, or the model's longest if less)")
        command.add_argument("--steps", type=int, default=DEFAULT.steps, help=f"a layer (default: {DEFAULT.steps})")
        command.add_argument("--dense-layers", type=int, default=2, help="first layers left out (default: 2)")
        command.add_argument("--layers", type=layer_list, metavar="N,N", help="only these layers")
        command.add_argument("--device", help="default: cuda if there is one, or cpu")
        command.add_argument("--workers", type=int, help="layers at a time (default: 4 on a GPU, 1 on a CPU)")
        command.add_argument("--scratch", type=Path, help="keep samples and finished layers here, and go on from them")
        command.add_argument("--out", type=Path, default=RESULTS, help="folder of results")
        if name == "text":
            command.add_argument("--draws", type=int, default=2, help="of which kinds are learned from (default: 2)")
            continue
        command.add_argument("--sequences", type=int, help="to learn from (default: one of each --train)")
        command.add_argument("--weights", type=Path, nargs="+", default=[], metavar="DIR", help="instead of training")
        if name == "frontier":
            command.add_argument("--no-hashattention", dest="hash_attention", action="store_false")
        else:
            command.add_argument("--domain", type=Path, required=True, help="text to tune on; its end is held out")
            command.add_argument("--tuning-steps", type=int, default=300, help="default: 300")
            command.add_argument("--rate", type=float, default=3e-4, help="AdamW's (default: 3e-4)")
    return parser


def layer_list(given: str) -> list[int]:
    return [int(layer) for layer in given.split(",")]


def main(arguments: Sequence[str] | None = None) -> None:
    args = options().parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory() as temporary:
            args.work(args, args.scratch or Path(temporary))
    except ClickException as error:
        sys.exit(error.message)


if __name__ == "__main__":
    main()
