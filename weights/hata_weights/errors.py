"""What can go wrong, each kind with the exit code that scripts see.

WeightsError
├── RequestError   2   the command cannot be followed: a missing path, options at odds
└── MisfitError    3   the weights folder cannot be read, or does not fit the model
"""

from __future__ import annotations

import click

RETRAIN = 1


class WeightsError(click.ClickException):
    """A mistake that a person can act on; click prints its one sentence without a traceback."""


class RequestError(WeightsError):
    exit_code = 2


class MisfitError(WeightsError):
    exit_code = 3
