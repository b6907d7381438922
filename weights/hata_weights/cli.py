"""`hata-weights`: train hash weights for a model, evaluate them, check that they fit."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hata_weights.console import Commands
from hata_weights.errors import RETRAIN, MisfitError, RequestError

if TYPE_CHECKING:
    from torch import Tensor

    from hata_weights.artifact import Identity
    from hata_weights.capture import Decoder
    from hata_weights.jobs import Text

DEFAULT_TOKENS = 8192
DEFAULT_SEQUENCES = 4
SINK, RECENT, DENSE_LAYERS = 4, 16, 1  # sinks and recent tokens are a server's defaults
MOST = 4096  # tokens of which a budget may take one
PATHS = ("--text", "--test", "--hashattention")


class ManyPaths(click.Command):
    """A command whose options of paths take every word up to the next option: ``--text a.txt b.txt``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        spread: list[str] = []
        option = ""
        for arg in args:
            if arg.startswith("-"):
                option = arg if arg in PATHS else ""
            elif option and spread[-1] != option:
                spread.append(option)
            spread.append(arg)
        return super().parse_args(ctx, spread)


def _texts(name: str, text: str, required: bool = False) -> Any:
    kind = click.Path(path_type=Path)
    return click.option(name, type=kind, multiple=True, required=required, metavar="PATH...", help=text)


device_option = click.option(
    "--device", metavar="cpu|cuda", help="Where to run.  [default: the first GPU, or the CPU if there is none]"
)
tokens_option = click.option(
    "--tokens",
    type=click.IntRange(min=256),
    help=f"Tokens a sequence.  [default: {DEFAULT_TOKENS}, or what the model was made for if that is less]",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="sglang-hata")
def main() -> None:
    """Trained hash weights: codes of few bits that choose nearly the tokens that exact attention would.

    \b
      hata-weights train MODEL --text docs/ src/ --out DIR     learn them from a model and text
      hata-weights eval MODEL --weights DIR --text other.txt   compare them with exact q.k, Quest, Loki
      hata-weights check MODEL --weights DIR                   do they fit this model?

    MODEL is a Hugging Face folder or id of a decoder.

    \b
    Exit codes:
      0    done; of check: keep the weights
      1    check: train anew, the model's weights are others than those the hash weights were trained for, and
           too much is lost, or nothing was measured
      2    the command cannot be followed: a missing path, options at odds
      3    the weights folder cannot be read, or its shape is not the model's
      130  interrupted (Ctrl-C); 141  the reader of the output went away
    """


@main.command(cls=ManyPaths)
@click.argument("model")
@_texts("--text", "Text files, or folders of them, to learn from.", required=True)
@_texts("--test", "Texts to measure on, each by itself.  [default: the last sequence of --text, not learned from]")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder to write.")
@click.option("--bits", type=click.Choice(["64", "128", "256"]), default="128", show_default=True, help="Of a code.")
@click.option(
    "--scoring",
    type=click.Choice(["one-sided", "hamming"]),
    default="one-sided",
    show_default=True,
    help="one-sided keeps four bits a code bit of queries and chooses better; hamming is the paper's.",
)
@click.option("--steps", type=click.IntRange(min=1), help="Steps a layer.  [default: 2500, or 10000 on a GPU]")
@click.option(
    "--sequences",
    type=click.IntRange(min=1),
    help=f"To learn from, at most.  [default: one of each path, {DEFAULT_SEQUENCES} at least]",
)
@tokens_option
@click.option(
    "--dense-layers",
    type=click.IntRange(min=0),
    default=DENSE_LAYERS,
    show_default=True,
    help="First layers left out: a server gives them untrained codes.",
)
@click.option("--resume", is_flag=True, help="Go on with the unfinished run in --out.")
@device_option
def train(
    model: str,
    text: tuple[Path, ...],
    test: tuple[Path, ...],
    out: Path,
    bits: str,
    scoring: str,
    steps: int | None,
    sequences: int | None,
    tokens: int | None,
    dense_layers: int,
    resume: bool,
    device: str | None,
) -> None:
    """Learn hash weights for MODEL from TEXT and write them, with what they are for and how good they are.

    Text of many kinds matters more than much of one: prose, code, tables, languages, as they will be served. An
    interrupted run goes on with --resume. One GPU, or a CPU with patience.

    \b
      hata-weights train ./SmolLM2-135M --text docs/ src/ mails/ --test novel.txt --out smollm2-hata
      hata-weights train ./SmolLM2-135M --text docs/ src/ mails/ --test novel.txt --out smollm2-hata --resume
      python -m sglang.launch_server --model-path ./SmolLM2-135M --hata --hata-weights smollm2-hata
    """
    from hata_weights import jobs
    from hata_weights.train import STEPS, STEPS_ON_GPU, Recipe

    begun = time.monotonic()
    _require(text + test)
    decoder = _decoder(model, device)
    wanted = sequences or max(len(text), DEFAULT_SEQUENCES)
    learned = _read(decoder, text, tokens, wanted if test else wanted + 1)
    if test:
        held_out = [_read(decoder, [path], tokens, 1) for path in test]
    elif len(learned.sequences) > 1:
        held_out = [jobs.Text(text[-1].name, learned.sequences[-1:])]
        learned = jobs.Text(learned.name, learned.sequences[:-1])
    else:
        raise RequestError("The text makes one sequence, which leaves none to measure on: give more, or --test.")
    steps = steps or (STEPS_ON_GPU if decoder.device.startswith("cuda") else STEPS)
    recipe = Recipe(bits=int(bits), scoring=scoring, steps=steps)
    identity = jobs.train(
        decoder, learned, held_out, out, recipe, dense_layers=dense_layers, resume=resume, track=_track
    )
    for score in identity.scores:
        if score["budget"] == "1/64" and (score["sink"], score["recent"]) == jobs.BY_SCORE:
            click.echo(
                f"{out}: {score['mass'] / score['exact_mass']:.1%} of exact q.k's attention mass at a budget of 1/64 "
                f"with {score['bytes_per_token']:g} bytes a token and KV head ({score['worst_head']:.1%} in the worst "
                f"head), on {score['tokens']:,} tokens of {score['text']}"
            )
    click.echo(f"{len(learned.sequences)} sequences learned from, {time.monotonic() - begun:.0f} s")


@main.command("eval", cls=ManyPaths)
@click.argument("model")
@_texts("--text", "Text files, or folders of them, that nothing was trained on.", required=True)
@click.option("--weights", type=click.Path(path_type=Path), help="Folder of hash weights, to compare.")
@click.option("--sequences", type=click.IntRange(min=1), help="To measure on, at most.  [default: one of each path]")
@tokens_option
@click.option(
    "--dense-layers",
    type=click.IntRange(min=0),
    help=f"First layers left out.  [default: as the weights, or {DENSE_LAYERS}]",
)
@click.option(
    "--budgets", default="128,64,32,16", show_default=True, metavar="N,N", help="Attend to one token in N, for each N."
)
@_texts("--hashattention", "Also train HashAttention's networks on these texts, and compare them. Takes a while.")
@click.option("--sink", type=click.IntRange(min=0), default=SINK, show_default=True, help="As --hata-sink.")
@click.option("--recent", type=click.IntRange(min=0), default=RECENT, show_default=True, help="As --hata-recent.")
@json_option
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    multiple=True,
    help="Also write a plot, or JSON if .json; may be given twice.",
)
@device_option
def evaluate(
    model: str,
    text: tuple[Path, ...],
    weights: Path | None,
    sequences: int | None,
    tokens: int | None,
    dense_layers: int | None,
    budgets: str,
    hashattention: tuple[Path, ...],
    sink: int,
    recent: int,
    as_json: bool,
    out: tuple[Path, ...],
    device: str | None,
) -> None:
    """Measure how much attention the selected tokens hold, by method, layer and KV head of MODEL.

    Mass is the share of attention on the selected tokens, recall the share of the best possible choice that was
    chosen. Give text that nothing was trained on.

    \b
      hata-weights eval ./SmolLM2-135M --weights smollm2-hata --text novel.txt --out masses.png --out masses.json
      hata-weights eval ./SmolLM2-135M --text novel.txt --sink 0 --recent 0 --budgets 64,8 --json | jq .summary
    """
    from hata_weights import jobs, report

    _require(text + hashattention)
    shares = _budgets(budgets)
    if missing := [path.parent for path in out if not path.parent.is_dir()]:
        raise RequestError(f"{missing[0]} is not a folder: make it, or give another --out.")
    loaded = _load(weights) if weights else None
    decoder = _decoder(model, device)
    if weights and loaded:
        jobs.require_fit(decoder, weights, loaded[0])
    first = dense_layers if dense_layers is not None else loaded[0].dense_layers if loaded else DENSE_LAYERS
    if loaded and first < loaded[0].dense_layers:
        raise RequestError(f"--dense-layers {first} is too few: the weights begin at layer {loaded[0].dense_layers}.")
    chosen = _read(decoder, text, tokens, sequences or len(text))
    mapping = _read(decoder, hashattention, tokens, len(hashattention)) if hashattention else None
    rows = jobs.evaluate(
        decoder,
        chosen,
        loaded,
        dense_layers=first,
        sink=sink,
        recent=recent,
        budgets=shares,
        mapping_text=mapping,
        track=_track,
    )
    about = {
        "model": decoder.name,
        "weights": weights.resolve().name if weights else None,
        "text": chosen.name,
        "tokens": [len(sequence) for sequence in chosen.sequences],
        "sink": sink,
        "recent": recent,
    }
    values = report.as_json(rows, about)
    for path in out:
        if path.suffix == ".json":
            path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        else:
            report.plot(rows, f"{decoder.name}, {chosen.name}", path)
    click.echo(json.dumps(values) if as_json else report.tables(rows))


@main.command(cls=ManyPaths)
@click.argument("model")
@click.option("--weights", type=click.Path(path_type=Path), required=True, help="Folder of hash weights.")
@_texts("--text", "Text to measure on, if the model's weights are others.")
@tokens_option
@click.option(
    "--adopt",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="If they are kept, write them to DIR as this model's own, which a server takes.",
)
@json_option
@device_option
def check(
    model: str,
    weights: Path,
    text: tuple[Path, ...],
    tokens: int | None,
    adopt: Path | None,
    as_json: bool,
    device: str | None,
) -> None:
    """Say whether hash weights fit MODEL, such as a fine-tuned one: keep them, or train anew.

    Exit code 0 means keep, 1 train anew, 3 that they cannot be used at all.

    \b
      hata-weights check ./SmolLM2-135M --weights smollm2-hata
      hata-weights check ./my-finetune --weights smollm2-hata --text mails/ --adopt my-hata
    """
    from hata_weights import jobs

    _require(text)
    if adopt:
        jobs.require_free(adopt, "--adopt")
    loaded = _load(weights)
    decoder = _decoder(model, device)
    jobs.require_fit(decoder, weights, loaded[0])
    verdict = jobs.check(decoder, loaded, _read(decoder, text, tokens, len(text)) if text else None, _track)
    if as_json:
        values = {"same": verdict.same, "kept": verdict.kept, "recorded": verdict.recorded, "retrain": verdict.retrain}
        click.echo(json.dumps(values))
    else:
        click.echo(_words(verdict, loaded[0].model))
    if adopt and not verdict.retrain:
        jobs.adopt(decoder, loaded, verdict, adopt)
        click.echo(f"{adopt}: the hash weights as this model's own", err=as_json)
    if verdict.retrain:
        sys.exit(RETRAIN)


def _words(verdict: Any, trained_for: str) -> str:
    origin = {
        True: f"The queries and keys of this model are those of {trained_for}, for which the weights were trained.",
        False: f"This model makes other queries and keys than {trained_for}, for which the weights were trained.",
        None: "The weights do not say which queries and keys they were trained for.",
    }[verdict.same]
    measured = ""
    if verdict.kept is not None:
        measured = f" At a budget of 1/64 they keep {verdict.kept:.1%} of exact q.k's attention mass on this text"
        measured += f"; {verdict.recorded:.1%} when they were trained." if verdict.recorded is not None else "."
    elif not verdict.same:
        measured = " Give --text to measure what is lost."
    return f"{origin}{measured} {'Train anew.' if verdict.retrain else 'Keep them.'}"


def _require(paths: Sequence[Path]) -> None:
    """Refuses missing paths before a model is loaded."""
    for path in paths:
        if not path.exists():
            raise RequestError(f"{path} does not exist: give text files or folders of them.")


def _budgets(given: str) -> list[int]:
    shares = given.split(",")
    if not all(share.strip().isdecimal() and 1 < int(share) <= MOST for share in shares):
        raise RequestError(f"--budgets {given} is not a list of numbers from 2 to {MOST}: give such as 128,64,32.")
    return list(dict.fromkeys(int(share) for share in shares))


def _decoder(model: str, device: str | None) -> Decoder:
    import torch
    import transformers

    from hata_weights.capture import Decoder

    transformers.utils.logging.set_verbosity_error()  # it reports each head that is left out
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device.startswith("cuda") and not torch.cuda.is_available():
        raise RequestError(f"--device {device} asks for a GPU, and PyTorch finds none: give --device cpu.")
    return Decoder(model, device)


def _load(folder: Path) -> tuple[Identity, dict[int, Tensor]]:
    from hata_weights.artifact import ArtifactError, load

    try:
        return load(folder)
    except ArtifactError as error:
        raise MisfitError(str(error)) from None


def _read(decoder: Decoder, paths: Sequence[Path], tokens: int | None, sequences: int) -> Text:
    from hata_weights.capture import read_sequences
    from hata_weights.jobs import Text

    length = tokens or min(DEFAULT_TOKENS, decoder.longest)
    if length > decoder.longest:
        raise RequestError(f"--tokens {length} is more than the {decoder.longest} that {decoder.name} was made for.")
    cut = read_sequences(decoder, paths, length, sequences)
    return Text(", ".join(path.name for path in paths), tuple(cut))


def _track(what: str, items: Sequence[Any]) -> Iterable[Any]:
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(items, what, console=console, transient=True, disable=not console.is_terminal)


if __name__ == "__main__":
    main()
