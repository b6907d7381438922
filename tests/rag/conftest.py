"""Every test has a home of its own; MiniLM is the real one, loaded once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from hata_rag.cli import main
from hata_rag.embed import Embedder
from hata_rag.home import Home
from hata_rag.store import Store

Run = Callable[..., Result]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.setenv("HATA_RAG_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HATA_RAG_SERVER", raising=False)
    return Home()


@pytest.fixture
def store(home: Home) -> Iterator[Store]:
    with closing(Store(home)) as store:
        yield store


@pytest.fixture(scope="session")
def embedder() -> Embedder:
    return Embedder()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, embedder: Embedder) -> Run:
    """``run("index", path)``: the command line, in this process, with the loaded MiniLM."""
    monkeypatch.setattr("hata_rag.cli.Embedder", lambda: embedder)
    return lambda *arguments, **options: CliRunner().invoke(main, [str(a) for a in arguments], **options)


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    """A small corpus, of which each file answers one question."""
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "bread.md").write_text("# Bread\n\n## Sourdough\n\nThe starter ferments for twelve hours.\n")
    (folder / "moons.txt").write_text("Jupiter's largest moon is Ganymede; Io has volcanoes.\n")
    (folder / "sort.py").write_text("def bubble_sort(items):\n    '''Swap neighbours until sorted.'''\n")
    return folder
