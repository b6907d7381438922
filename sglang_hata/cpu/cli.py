"""`hata-cpu`: run SGLang, or any program that uses it, on a machine without a GPU."""

from __future__ import annotations

import os
import sys

import click

from sglang_hata.cpu import environment, gpu_present, ranks_of, server_arguments

NOTICE = "hata-cpu: SGLang runs on the CPU, for trying and testing only; speeds mean nothing here."
PASS_ON = {"ignore_unknown_options": True, "allow_interspersed_args": False, "help_option_names": []}


@click.group(epilog="Exit codes: those of the program that is run; 2 if a GPU is present or usage is wrong.")
def main() -> None:
    """Run SGLang on a machine without a GPU, for trying HATA and for tests.

    \b
    hata-cpu serve --model-path MODEL --hata     start a server (also --tp-size N)
    hata-cpu python PROGRAM.py                   run a program that uses sglang
    """
    if gpu_present():
        raise click.UsageError(
            "This machine has a GPU, and hata-cpu is for machines without one: use python -m sglang.launch_server."
        )


@main.command(context_settings=PASS_ON, add_help_option=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def serve(arguments: tuple[str, ...]) -> None:
    """Start a server: the arguments are those of sglang.launch_server."""
    given = list(arguments)
    run(["-m", "sglang.launch_server", *server_arguments(given)], ranks_of(given))


@main.command(context_settings=PASS_ON, add_help_option=False)
@click.argument("arguments", nargs=-1, required=True, type=click.UNPROCESSED)
def python(arguments: tuple[str, ...]) -> None:
    """Run Python: the arguments are a program and its own."""
    run(list(arguments))


def run(arguments: list[str], ranks: int = 1) -> None:
    """Becomes Python in the environment for a plain CPU, so that signals and exit codes are the program's own."""
    print(NOTICE, file=sys.stderr, flush=True)
    os.execve(sys.executable, [sys.executable, *arguments], environment(os.environ, ranks))


if __name__ == "__main__":
    main()
