"""A tiny model and a text that all tests of weights share."""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics

import pytest

from weights.tiny import make_model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "tiny", seed=0)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A file of 6,000 letters, a token each."""
    path = tmp_path / "text.txt"
    path.write_text(topics["types"].encode("ascii", "ignore").decode()[:6_000], encoding="utf-8")
    return path
