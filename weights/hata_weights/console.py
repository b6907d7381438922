"""What the command lines of this distribution share: how they end when they are interrupted."""

from __future__ import annotations

import os
import sys
from typing import Any

import click

INTERRUPTED = 130
BROKEN_PIPE = 141


class Commands(click.Group):
    """A group in which Ctrl-C and a closed pipe end quietly, with the exit codes of a shell."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo(err=True)
            ctx.exit(INTERRUPTED)
        except BrokenPipeError:
            # Python flushes stdout once more when it exits: let that go nowhere.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(BROKEN_PIPE)
