"""What can go wrong, each kind with the exit code that scripts see.

    RagError
    ├── BadRequestError      2   the command cannot be followed: a missing path, options at odds
    ├── NothingToReadError   3   nothing of what was named could be read
    ├── ServerError          4   no server answers, or none could be started
    └── NotGroundedError     5   the documents hold nothing to answer from

Every message is one sentence or two: what is wrong, with the value, and what to do.
"""

from __future__ import annotations

import click


class RagError(click.ClickException):
    """A mistake or a failure that a person can act on; click prints its message without a traceback."""


class BadRequestError(RagError):
    exit_code = 2


class NothingToReadError(RagError):
    exit_code = 3


class ServerError(RagError):
    exit_code = 4


class NotGroundedError(RagError):
    exit_code = 5
