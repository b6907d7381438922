"""The command line: options in, library calls, words out."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from pathlib import Path
from typing import Any

import click

from hata_rag import report
from hata_rag import server as background
from hata_rag.answer import Options, answer, prepare
from hata_rag.client import Client
from hata_rag.embed import Embedder
from hata_rag.errors import BadRequestError, NothingToReadError
from hata_rag.home import Home
from hata_rag.indexing import REFERENCE, Indexer, Summary
from hata_rag.store import Store
from hata_weights.console import Commands

home_option = click.option(
    "--home",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of the index and the server's state.  [env: HATA_RAG_HOME]",
)
server_option = click.option(
    "--server",
    envvar="HATA_RAG_SERVER",
    metavar="URL",
    help="Use this SGLang server.  [env: HATA_RAG_SERVER]",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="sglang-hata")
def main() -> None:
    """Ask questions of your documents: many of them in one prompt, the answer cites which.

    \b
      hata-rag index ~/notes ~/papers     read and embed what is new
      hata-rag ask "What did we decide?"  answer from it; starts a server the first time
      hata-rag ask -c "And who decided?"  follow up over the same documents
      hata-rag status                     what runs, what is indexed
      hata-rag stop                       end the server

    With nothing indexed, questions are answered from the Python language reference.

    \b
    Exit codes:
      0    done
      2    the command cannot be followed: a missing path, options at odds
      3    nothing is indexed, or nothing of what was named could be read
      4    no server answers, or none could be started
      5    the documents hold nothing to answer from
      130  interrupted (Ctrl-C); 141  the reader of the output went away
    """


@main.command()
@click.argument("paths", nargs=-1)
@click.option("--forget", is_flag=True, help="Drop the PATHs from the index instead.")
@home_option
def index(paths: tuple[str, ...], forget: bool, home: Path | None) -> None:
    """Index files and folders: text, Markdown, HTML, PDF and source code.

    Only what is new or changed since the last time is embedded; what is gone is dropped. An interrupted run
    goes on where it stopped. Without a PATH, the Python language reference is indexed (its name for --forget
    is "python:"). Hidden files and folders are left out; a file that holds no text is named and skipped.

    \b
      hata-rag index ~/notes paper.pdf
      hata-rag index                       # the Python language reference
      hata-rag index --forget python:
    """
    if forget and not paths:
        raise BadRequestError(f"--forget needs the PATHs to drop, or {REFERENCE} for the Python language reference.")
    with closing(Store(Home(home))) as store:
        indexer = Indexer(store, Embedder(), _track, _skip)
        if forget:
            if not (count := indexer.forget(paths)):
                raise NothingToReadError(
                    f"Nothing under {shlex.join(paths)} is indexed: `hata-rag status` says what is."
                )
            click.echo(f"Documents: {count:,} dropped")
            return
        begun = time.monotonic()
        summary = indexer.index([Path(path) for path in paths]) if paths else indexer.index_reference()
        click.echo(report.summary_line(summary, time.monotonic() - begun))
        _require_something(summary, paths)


@main.command()
@click.argument("question", nargs=-1, required=True)
@click.option("-c", "--continue", "follow", is_flag=True, help="Follow up over the documents of the last question.")
@click.option("--fresh", is_flag=True, help="Choose documents anew even if the last ones hold the best hits.")
@click.option(
    "--tokens",
    type=click.IntRange(min=1),
    help="Tokens of documents in the prompt.  [default: half the server's context, at most 32,768]",
)
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True, help="Longest answer.")
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="0 always picks the likeliest token.",
)
@click.option(
    "--model",
    metavar="FOLDER|ID",
    help="Hugging Face folder or id for the server that is started.  [default: SmolLM2-135M-Instruct]",
)
@click.option("--server-args", default="", help="More SGLang arguments for that server, in quotes.")
@server_option
@json_option
@home_option
def ask(
    question: tuple[str, ...],
    follow: bool,
    fresh: bool,
    tokens: int | None,
    max_new_tokens: int,
    temperature: float,
    model: str | None,
    server_args: str,
    server: str | None,
    as_json: bool,
    home: Path | None,
) -> None:
    """Answer a question from the indexed documents, and name those it cites.

    The answer goes to stdout, everything else to stderr. Documents come first in the prompt, in an order that
    does not depend on the question: the server then finds the same documents in its cache. So that it does,
    the last documents are used again when they hold the five best hits of the new question; --fresh chooses
    anew. With -c the question continues the conversation over exactly the last documents.

    \b
      hata-rag ask "When is the else clause of a for loop executed?"
      hata-rag ask -c "And of a while loop?"
      hata-rag ask --json "What is a lambda?" | jq -r .answer
    """
    words = " ".join(question).strip()
    if not words:
        raise BadRequestError("The question is empty: put it in quotes after `hata-rag ask`.")
    if follow and (fresh or tokens):
        raise BadRequestError("-c keeps the last documents; --fresh and --tokens choose others: use one or the other.")
    if server and (model or server_args):
        raise BadRequestError(
            "--model and --server-args are for a server that hata-rag starts, and --server names one."
        )
    options = Options(tokens, max_new_tokens, temperature, follow, fresh)
    place, embedder = Home(home), Embedder()
    with closing(Store(place)) as store:
        _complete_index(store, embedder)
        with closing(Client(server or _started(place, model, server_args))) as client:
            info = client.info()
            prompt = prepare(words, options, place, store, embedder, client, info, _say)
            with ExitStack() as waiting:
                waiting.enter_context(_spinner(f"Reading {len(prompt.passages)} documents"))

                def write(piece: str) -> None:
                    waiting.close()
                    if not as_json:
                        click.echo(piece, nl=False)

                result = answer(words, prompt, options, place, client, info, write)
            if as_json:
                click.echo(json.dumps(report.answer_object(words, prompt, result, info, client.url), indent=2))
                return
            click.echo()
            _say("")
            for line in report.source_lines(prompt, result):
                _say(line)
            _say(report.figure_line(result))


@main.command()
@server_option
@json_option
@home_option
def status(server: str | None, as_json: bool, home: Path | None) -> None:
    """Say what runs and what is indexed.

    \b
      hata-rag status
      hata-rag status --json | jq .index.chunks
    """
    place = Home(home)
    record = None if server else background.running(place)
    url = server or (record.url if record else None)
    info = None
    if url:
        with closing(Client(url)) as client:
            info = client.info() if server or client.healthy() else None
    with closing(Store(place)) as store:
        result = report.status_object(record, url, info, store.figures())
    click.echo(json.dumps(result, indent=2) if as_json else "\n".join(report.status_lines(result)))


@main.command()
@home_option
def stop(home: Path | None) -> None:
    """End the server that `hata-rag ask` started, with every process of it.

    \b
      hata-rag stop
    """
    record = background.stop(Home(home))
    click.echo(f"Stopped the server at {record.url}" if record else "No server runs")


def _complete_index(store: Store, embedder: Embedder) -> None:
    """Index the default corpus if nothing is indexed; finish what an interrupted run left."""
    figures = store.figures()
    indexer = Indexer(store, embedder, _track, _skip)
    if not figures["documents"]:
        _say("Nothing is indexed yet: indexing the Python language reference (`hata-rag index PATH` indexes yours)")
        indexer.index_reference()
    elif figures["embedded"] < figures["chunks"] or figures["embedder"] != embedder.name:
        _say("The index is not complete: embedding the chunks that are missing")
        indexer.embed()


def _require_something(summary: Summary, paths: Sequence[str]) -> None:
    if not summary.read and not summary.deleted:
        raise NothingToReadError(f"No document could be read in {shlex.join(paths)}: name files that hold text.")


def _started(home: Home, model: str | None, arguments: str) -> str:
    try:
        options = shlex.split(arguments)
    except ValueError as error:
        raise BadRequestError(f"--server-args {arguments!r} cannot be split into words: {error}.") from error
    return background.ensure(home, model, options, _say, _spinner).url


def _say(line: str) -> None:
    click.echo(line, err=True)


def _skip(path: str, reason: str) -> None:
    _say(f"Skipped {path}: {reason}")


def _track(items: Sequence[Any], what: str) -> Iterable[Any]:
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(items, what, console=console, transient=True, disable=not console.is_terminal)


def _spinner(text: str) -> AbstractContextManager[object]:
    from rich.console import Console

    console = Console(stderr=True)
    return console.status(text) if console.is_terminal else nullcontext()


if __name__ == "__main__":
    main()
