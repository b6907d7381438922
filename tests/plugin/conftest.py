"""What the tests of the plugin share."""

from pathlib import Path
from typing import Any

import pytest

from serving import NEW_TOKENS, serving
from texts import PROMPTS


@pytest.fixture(scope="session")
def dense_answers(model: Path) -> list[Any]:
    with serving(model) as server:
        return [server.generate(prompt, NEW_TOKENS) for prompt in PROMPTS]
