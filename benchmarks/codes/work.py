"""What is measured, a task each, and the processes that do it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.codes import paper
from hata_kernels import reference
from hata_weights import artifact, jobs
from hata_weights.capture import Sample, Shape, load_sample
from hata_weights.evaluate import HASH_ATTENTION, Method, codes, evaluate_layer, methods, rule, untrained
from hata_weights.mapping import BITS as MAPPING_BITS
from hata_weights.mapping import train_mapping
from hata_weights.train import Recipe, train_layer, train_layers

BUDGETS = (256, 128, 64, 32, 16, 8)  # one token in ...
BITS = (64, 128, 256)
DEFAULT = Recipe()  # its bits and scoring are a server's default, at a budget of 1/64
PAPER = "HATA's loss, Hamming 128"

Record = dict[str, Any]
Task = tuple[Any, ...]


def trained_name(bits: int = DEFAULT.bits, scoring: str = DEFAULT.scoring) -> str:
    return f"trained, {scoring.replace('hamming', 'Hamming')} {bits}"


@dataclass(frozen=True)
class Setup:
    """What every task of a run needs.

    Args:
        folder: of this run, in the scratch folder.
        steps: of training a layer.
        tests: the captured texts to measure on, by name: a folder a sequence.
        weights: folders of hash weights that take the place of training.
    """

    folder: Path
    shape: Shape
    device: str
    steps: int
    tests: dict[str, list[Path]]
    weights: Sequence[Path]

    def load(self, folders: Iterable[Path], *layers: int) -> list[Sample]:
        return [load_sample(folder, layers, self.device) for folder in folders]

    def trained(
        self, samples: Sequence[Sample], layer: int, bits: int = DEFAULT.bits, scoring: str = DEFAULT.scoring
    ) -> Method:
        """Codes from the folders given, or else trained."""
        projection = None
        for folder in self.weights:
            identity, projections = artifact.load(folder)
            if (identity.bits, identity.scoring) == (bits, scoring):
                projection = projections.get(layer)
        if projection is None:
            projection = train_layer(samples, layer, replace(DEFAULT, bits=bits, scoring=scoring, steps=self.steps))
        return served(trained_name(bits, scoring), projection, scoring)

    def measure(self, layer: int, compared: Sequence[Method], **labels: Any) -> list[Record]:
        """A `Row` of each text, setting of sinks and recent tokens, method, KV head and budget, with ``labels``."""
        records = []
        for text, folders in self.tests.items():
            samples = self.load(folders, layer)
            lengths = torch.cat([sample.positions for sample in samples]) + 1
            for sink, recent in jobs.SETTINGS:
                shares = {b: float((rule(b, sink, recent).of(lengths) / lengths).mean()) for b in BUDGETS}
                rows = evaluate_layer(samples, layer, compared, sink=sink, recent=recent, budgets=BUDGETS)
                common = {**labels, "text": text, "sink": sink, "recent": recent}
                records += [{**common, "selected": shares[row.budget], **asdict(row)} for row in rows]
        return records


def served(name: str, projection: Tensor, scoring: str) -> Method:
    """Codes of a layer's projections."""
    return Method(name, projection.shape[-1] / 8, lambda sample, _: codes(sample, projection, scoring))


def frontier_layer(setup: Setup, layer: int, learned: Sequence[Path], hash_attention: bool) -> list[Record]:
    """Every encoder, trained on the same samples."""
    samples, shape = setup.load(learned, layer), setup.shape
    of_paper = paper.train_paper(samples, layer, min(paper.STEPS, setup.steps))
    exact, quest, loki, *_ = methods(shape)
    compared = [exact, quest, loki, *map(untrained, BITS), served(PAPER, of_paper, reference.HAMMING)]
    compared.append(setup.trained(samples, layer, scoring=reference.HAMMING))
    compared += [setup.trained(samples, layer, bits) for bits in BITS]
    if hash_attention:
        mapping = train_mapping(samples, layer, replace(DEFAULT, steps=setup.steps))
        size = MAPPING_BITS / 8 * shape.query_heads / shape.kv_heads
        compared.append(Method(HASH_ATTENTION, size, lambda sample, _: mapping))
    del samples
    return setup.measure(layer, compared)


def text_layers(setup: Setup, layers: Sequence[int], kinds: int, draw: int, learned: Sequence[Path]) -> list[Record]:
    """The default codes from some of the training text, all layers at once; from none of it, the untrained rotation."""
    exact, *_ = methods(setup.shape)
    compared = [replace(untrained(DEFAULT.bits, DEFAULT.scoring), name=trained_name())] * len(layers)
    if learned:
        projections = train_layers(setup.load(learned, *layers), layers, replace(DEFAULT, steps=setup.steps))
        compared = [served(trained_name(), projection, DEFAULT.scoring) for projection in projections]
    about = {"kinds": kinds, "sequences": len(learned), "draw": draw}
    return [
        record
        for layer, method in zip(layers, compared, strict=True)
        for record in setup.measure(layer, [exact, method], **about)
    ]


def finetune_layer(
    setup: Setup, layer: int, learned: Sequence[Path], tuned: Sequence[Path], tuned_tests: dict[str, list[Path]]
) -> list[Record]:
    """The base model's codes on both models, and new codes on the fine-tuned one."""
    exact, *_ = methods(setup.shape)
    base = replace(setup.trained(setup.load(learned, layer), layer), name="base model's codes")
    after = replace(setup, tests=tuned_tests, weights=())
    new = replace(after.trained(setup.load(tuned, layer), layer), name="trained anew")
    compared = [exact, untrained(DEFAULT.bits), base]
    records = setup.measure(layer, compared, model="base")
    return records + after.measure(layer, [*compared, new], model="fine-tuned")


def each(
    work: Callable[..., list[Record]], setup: Setup, tasks: dict[str, Task], workers: int
) -> Iterator[list[Record]]:
    """The records of every task in turn, several at a time."""
    do = partial(run_task, work, setup)
    if workers == 1:
        yield from map(do, tasks, tasks.values())
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(do, tasks, tasks.values())


def run_task(work: Callable[..., list[Record]], setup: Setup, name: str, task: Task) -> list[Record]:
    """Does a task and keeps its records in the scratch folder; one that was done is read from there."""
    path = setup.folder / "records" / f"{name}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(work(setup, *task)))
        unfinished.rename(path)
    return json.loads(path.read_text())
