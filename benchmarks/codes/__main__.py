"""What codes keep of the attention: by encoder, by training text, and on a fine-tuned model.

    python -m benchmarks.codes frontier MODEL --train texts/train/* --test texts/evaluate/*
    python -m benchmarks.codes text     MODEL --train texts/train/* --test texts/evaluate/*
    python -m benchmarks.codes finetune MODEL --train texts/train/* --test texts/evaluate/* --domain other/

frontier: attention mass against bytes read, for every encoder and budget; all learn from the same samples.
text: the default codes, learned from more and from more diverse text, in a few layers.
finetune: tunes the model on text of another domain, and measures the base model's codes on it beside new ones.

Every path of --train is a kind of text. Several tasks run at a time on a GPU, a layer or an amount of text each, and
what is finished lies in --scratch, from which the same command goes on. Writes benchmarks/results/codes-MODEL.json,
codes-text-MODEL.json or codes-finetune-MODEL.json as results come, and plots. A checkout is enough, with
PYTHONPATH=kernels:weights. The rows of HATA's own training are explained in paper.py.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.codes import report, tuning
from benchmarks.codes.work import DEFAULT, Record, Setup, Task, each, finetune_layer, frontier_layer, text_layers
from benchmarks.common import RESULTS, header, installed
from hata_weights import artifact, jobs
from hata_weights.capture import Decoder, capture, data_fingerprint, read_sequences, read_text
from hata_weights.cli import DENSE_LAYERS
from hata_weights.errors import RequestError, WeightsError
from hata_weights.rotation import SEED

DOMAIN_CHARACTERS = 6_000_000


def main(arguments: Sequence[str] | None = None) -> None:
    args = options().parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory() as temporary:
            args.work(args, args.scratch or Path(temporary))
    except (WeightsError, artifact.ArtifactError) as error:
        sys.exit(str(error))


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.codes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for work in (frontier, text, finetune):
        command = commands.add_parser(work.__name__)
        command.set_defaults(work=work, weights=[])
        command.add_argument("model", help="Hugging Face folder")
        command.add_argument("--train", type=Path, nargs="+", required=True, metavar="PATH", help="a kind of text each")
        command.add_argument("--test", type=Path, nargs="+", required=True, metavar="PATH", help="a text each")
        command.add_argument("--tokens", type=int, help="a sequence (default: 8192, or the model's longest if less)")
        command.add_argument("--steps", type=int, default=DEFAULT.steps, help=f"a layer (default: {DEFAULT.steps})")
        command.add_argument(
            "--dense-layers", type=int, default=DENSE_LAYERS, help="first layers left out (default: %(default)s)"
        )
        command.add_argument("--layers", type=layer_list, metavar="N,N", help="only these layers")
        command.add_argument("--device", help="default: cuda if there is one, or cpu")
        command.add_argument("--workers", type=int, help="tasks at a time (default: 4 on a GPU, 1 on a CPU)")
        command.add_argument("--scratch", type=Path, help="keep samples and finished layers here, and go on from them")
        command.add_argument("--out", type=Path, default=RESULTS, help="folder of results")
        if work is text:
            command.add_argument("--draws", type=int, default=2, help="of which kinds are learned from (default: 2)")
            continue
        command.add_argument("--sequences", type=int, help="to learn from (default: one of each --train)")
        command.add_argument("--weights", type=Path, nargs="+", default=[], metavar="DIR", help="instead of training")
        if work is frontier:
            command.add_argument("--no-hashattention", dest="hash_attention", action="store_false")
        else:
            command.add_argument("--domain", type=Path, required=True, help="text to tune on; its end is held out")
            command.add_argument("--tuning-steps", type=int, default=300, help="default: 300")
            command.add_argument("--rate", type=float, default=3e-4, help="AdamW's (default: 3e-4)")
    return parser


def layer_list(given: str) -> list[int]:
    return [int(layer) for layer in given.split(",")]


def frontier(args: argparse.Namespace, scratch: Path) -> None:
    run = Run(args, scratch)
    run.check_weights()
    texts = run.read(args.train, args.sequences or len(args.train))
    run.begin(data_fingerprint(texts), args.hash_attention)
    learned = run.capture("train", texts, jobs.to_learn_from)
    tests = run.capture_tests("test", run.tests)
    tasks: dict[str, Task] = {f"layer-{layer}": (layer, learned, args.hash_attention) for layer in run.layers}
    run.collect(frontier_layer, tests, tasks)
    report.show_frontier(run.report, run.shape, [run.path("-by-score.png"), run.path(".png")])


def text(args: argparse.Namespace, scratch: Path) -> None:
    run = Run(args, scratch)
    kinds = len(args.train)
    orders = [
        torch.randperm(kinds, generator=torch.Generator().manual_seed(SEED + draw)).tolist()
        for draw in range(args.draws)
    ]
    numbers = [n for n in (1, 2, 4, 8, 16, 32) if n < kinds] + [kinds]
    # By kinds, sequences and draw: how many sequences of which kind.
    cells = {
        (k, n, draw): {kind: n // k + (i < n % k) for i, kind in enumerate(orders[draw][:k])}
        for k in numbers
        for n in [n for n in numbers if n >= k] + [2 * kinds] * (k == kinds)
        for draw in range(args.draws if k < kinds else 1)
    }
    most = [max(cell.get(kind, 0) for cell in cells.values()) for kind in range(kinds)]
    sequences = {kind: run.read([args.train[kind]], n) for kind, n in enumerate(most)}
    run.begin({kind: data_fingerprint(cut) for kind, cut in sequences.items()})
    captured = {kind: run.capture(f"train-{kind}", cut, jobs.to_learn_from) for kind, cut in sequences.items()}
    tests = run.capture_tests("test", run.tests)
    tasks: dict[str, Task] = {"none": (run.layers, 0, 0, ())}
    for (k, n, draw), cell in cells.items():
        learned = [folder for kind, share in cell.items() for folder in captured[kind][:share]]
        tasks[f"{k}-kinds-{n}-draw-{draw}"] = (run.layers, k, draw, learned)
    run.report["draws"] = [[args.train[kind].name for kind in order] for order in orders]
    run.collect(text_layers, tests, tasks)
    report.show_text(run.report, run.path(".png"))


def finetune(args: argparse.Namespace, scratch: Path) -> None:
    run = Run(args, scratch)
    run.check_weights()
    ids = run.decoder.tokenizer(read_text(args.domain, DOMAIN_CHARACTERS), verbose=False)["input_ids"]
    domain = torch.tensor(ids, dtype=torch.int64)
    if len(domain) < run.tokens + tuning.LENGTH:
        raise RequestError(f"{args.domain} holds {len(domain)} tokens: give at least {run.tokens + tuning.LENGTH}.")
    texts = run.read(args.train, args.sequences or len(args.train))
    tests = {**run.tests, f"{args.domain.name}, held out": [domain[-run.tokens :]]}
    how = (args.tuning_steps, args.rate)
    run.begin(data_fingerprint(texts), data_fingerprint([domain]), how)
    learned = run.capture("train", texts, jobs.to_learn_from)
    of_base = run.capture_tests("test", tests)
    run.release()
    model = run.folder / "model"
    if not (model / tuning.LOSSES).exists():
        tuning.tune(args.model, domain[: -run.tokens], tests, model, *how, run.device)
    run.report |= {"domain": args.domain.name, "tuning_steps": args.tuning_steps, "rate": args.rate}
    run.report["losses"] = json.loads((model / tuning.LOSSES).read_text())
    run.decoder = Decoder(str(model), run.device)
    tuned = run.capture("tuned-train", texts, jobs.to_learn_from)
    of_tuned = run.capture_tests("tuned-test", tests)
    tasks: dict[str, Task] = {f"layer-{layer}": (layer, learned, tuned, of_tuned) for layer in run.layers}
    run.collect(finetune_layer, of_base, tasks)
    report.show_finetune(run.report)


class Run:
    """A command's model, texts, layers and scratch folder."""

    def __init__(self, args: argparse.Namespace, scratch: Path) -> None:
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.args, self.folder = args, scratch
        self.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.decoder: Any = Decoder(args.model, self.device)
        self.name, self.shape = Path(self.decoder.name).name, self.decoder.shape
        self.tokens = args.tokens or min(8192, self.decoder.longest)
        self.layers = args.layers or list(range(args.dense_layers, self.shape.layers))
        if args.command == "text" and not args.layers:  # four, evenly
            self.layers = sorted({self.layers[len(self.layers) * n // 8] for n in (1, 3, 5, 7) if self.layers})
        if not self.layers or not set(self.layers) <= set(range(self.shape.layers)):
            raise RequestError(f"{self.name} has layers 0 to {self.shape.layers - 1}: give some of them as --layers.")
        self.tests = {path.name: self.read([path], 1) for path in args.test}
        self.report: Record = header("codes") | {"model": self.name, "layers": self.layers, "tokens": self.tokens}
        self.report["versions"] |= {"transformers": installed("transformers")}
        self.report |= {"steps": args.steps, "train": [path.name for path in args.train], "rows": []}

    def check_weights(self) -> None:
        """The folders of --weights must be for this very model."""
        for folder in self.args.weights:
            identity, _ = artifact.load(folder)
            jobs.require_fit(self.decoder, folder, identity)
            if identity.fingerprint != self.decoder.fingerprint:
                raise RequestError(
                    f"The hash weights in {folder} are for other weights than {self.name}'s: leave them out."
                )
        self.report["weights"] = [folder.resolve().name for folder in self.args.weights]

    def read(self, paths: Sequence[Path], sequences: int) -> list[Tensor]:
        return read_sequences(self.decoder, paths, self.tokens, sequences)

    def begin(self, *about: Any) -> None:
        """Names the folder in the scratch folder by all that its contents depend on."""
        tests = {name: data_fingerprint(sequences) for name, sequences in self.tests.items()}
        weights = [artifact.load_identity(folder).sha256 for folder in self.args.weights]
        made_by = [self.report["commit"], self.args.command, self.args.steps]
        plan = [*made_by, self.decoder.fingerprint, self.layers, tests, weights, *about]
        self.folder /= hashlib.sha256(json.dumps(plan).encode()).hexdigest()[:12]

    def capture(self, name: str, sequences: Sequence[Tensor], queries: Callable[[Tensor], Tensor]) -> list[Path]:
        folders = [self.folder / f"{name}-{n}" for n in range(len(sequences))]
        for n, (tokens, folder) in enumerate(zip(sequences, folders, strict=True), 1):
            print(f"reading {name}, sequence {n} of {len(sequences)}", file=sys.stderr, flush=True)
            capture(self.decoder, tokens, folder, self.layers, queries(tokens))
        return folders

    def capture_tests(self, name: str, tests: dict[str, list[Tensor]]) -> dict[str, list[Path]]:
        return {
            text: self.capture(f"{name}-{n}", sequences, jobs.to_measure_on)
            for n, (text, sequences) in enumerate(tests.items())
        }

    def release(self) -> None:
        """Frees the model's memory for the workers."""
        self.decoder = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def path(self, suffix: str) -> Path:
        kind = "" if self.args.command == "frontier" else f"{self.args.command}-"
        return self.args.out / f"codes-{kind}{self.name}{suffix}"

    def collect(self, work: Callable[..., list[Record]], tests: dict[str, list[Path]], tasks: dict[str, Task]) -> None:
        """Runs the tasks, and writes the report anew after each."""
        self.release()
        setup = Setup(self.folder, self.shape, self.device, self.args.steps, tests, self.args.weights)
        workers = self.args.workers or (4 if self.device.startswith("cuda") else 1)
        self.args.out.mkdir(parents=True, exist_ok=True)
        records: list[Record] = []
        begun = time.monotonic()
        for done, (name, found) in enumerate(zip(tasks, each(work, setup, tasks, workers), strict=True), 1):
            records += found
            self.report["rows"] = report.summaries(records, self.shape)
            self.path(".json").write_text(json.dumps(self.report, indent=2) + "\n")
            seconds = time.monotonic() - begun
            print(f"{done} of {len(tasks)} done, {seconds:.0f} s: {name}", file=sys.stderr, flush=True)
        print(self.path(".json"))


if __name__ == "__main__":
    main()
