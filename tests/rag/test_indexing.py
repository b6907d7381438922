from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hata_rag.embed import DIMENSIONS, Embedder
from hata_rag.errors import BadRequestError
from hata_rag.home import Home
from hata_rag.indexing import Indexer, Summary, quiet
from hata_rag.store import Store


class InterruptedRunError(Exception):
    pass


class CountingEmbedder(Embedder):
    """MiniLM that remembers what it embedded, and can be interrupted after some batches."""

    def __init__(self, batches: int = 1_000) -> None:
        self.texts: list[str] = []
        self._left = batches

    def embed(self, texts: list[str]) -> np.ndarray:
        if not self._left:
            raise InterruptedRunError
        self._left -= 1
        self.texts += texts
        return super().embed(texts)


def index(store: Store, *roots: Path, embedder: Embedder | None = None) -> Summary:
    return Indexer(store, embedder or CountingEmbedder(), quiet, lambda path, reason: None).index(roots)


def counts(summary: Summary) -> tuple[int, int, int, int, int]:
    return summary.added, summary.changed, summary.unchanged, summary.deleted, summary.embedded


def test_only_what_changed_is_embedded(store: Store, notes: Path) -> None:
    assert counts(index(store, notes)) == (3, 0, 0, 0, 3)
    assert counts(index(store, notes)) == (0, 0, 3, 0, 0)
    (notes / "moons.txt").write_text("Saturn's largest moon is Titan.\n")
    (notes / "sort.py").unlink()
    (notes / "new.md").write_text("Something else.\n")
    assert counts(index(store, notes)) == (1, 1, 1, 1, 2)
    assert {Path(path).name for path in store.digests()} == {"bread.md", "moons.txt", "new.md"}


def test_a_moved_file_and_untouched_paragraphs_are_not_embedded_again(store: Store, notes: Path) -> None:
    index(store, notes)
    (notes / "moons.txt").rename(notes / "planets.txt")
    bread = notes / "bread.md"
    bread.write_text(bread.read_text() + "\n## Rye\n\nRye needs acid.\n")
    embedder = CountingEmbedder()
    index(store, notes, embedder=embedder)
    assert embedder.texts == ["Bread > Rye\n## Rye\n\nRye needs acid."]


def test_an_interrupted_run_keeps_what_it_embedded(store: Store, tmp_path: Path) -> None:
    file = tmp_path / "long.md"
    file.write_text("".join(f"# Title {number}\n\nText {number}\n\n" for number in range(70)))
    with pytest.raises(InterruptedRunError):
        index(store, file, embedder=CountingEmbedder(batches=2))
    assert store.figures()["embedded"] == 64
    again = CountingEmbedder()
    assert index(store, file, embedder=again).embedded == len(again.texts) == 6


def test_files_without_text_are_skipped_and_named(store: Store, notes: Path) -> None:
    (notes / "photo.jpg").write_bytes(b"\xff\xd8\0\0")
    (notes / "gone.md").symlink_to(notes / "nowhere")
    summary = index(store, notes)
    assert summary.read == 3
    assert {Path(path).name: reason for path, reason in summary.skipped.items()} == {"photo.jpg": "it is binary"}


def test_a_document_that_can_no_longer_be_read_is_dropped(store: Store, notes: Path) -> None:
    index(store, notes)
    (notes / "bread.md").write_bytes(b"\0")
    assert index(store, notes).deleted == 1


def test_a_path_that_is_gone_is_dropped_and_one_that_never_was_is_refused(store: Store, notes: Path) -> None:
    index(store, notes)
    (notes / "sort.py").unlink()
    assert index(store, notes / "sort.py").deleted == 1
    with pytest.raises(BadRequestError, match=r"sort\.py is not there"):
        index(store, notes / "sort.py")


def test_vectors_of_another_embedder_are_made_anew(store: Store, notes: Path) -> None:
    index(store, notes)
    store.use_embedder("another 1.0")
    assert index(store, notes).embedded == 3


def test_search_is_exact(store: Store, home: Home, embedder: Embedder) -> None:
    generator = np.random.default_rng(0)
    file = home.folder / "long.md"
    file.write_text("".join(f"# Title {number}\n\nText {number}\n\n" for number in range(60)))
    index(store, file, embedder=embedder)
    vectors = embedder.embed([f"Title {number}\n# Title {number}\n\nText {number}" for number in range(60)])
    query = vectors[17] + 0.01 * generator.standard_normal(DIMENSIONS, dtype=np.float32)
    hits = store.search(query, 10)
    nearest = np.argsort(-(vectors @ query), kind="stable")[:10]
    assert [passage.headings[0] for passage, _ in hits] == [f"Title {number}" for number in nearest]
    np.testing.assert_allclose([score for _, score in hits], (vectors @ query)[nearest], rtol=1e-4)


def test_the_faiss_file_follows_the_index(store: Store, home: Home, notes: Path, embedder: Embedder) -> None:
    index(store, notes, embedder=embedder)
    query = embedder.embed(["How long does sourdough ferment?"])[0]
    passage, score = store.search(query, 1)[0]
    assert Path(passage.path).name == "bread.md"
    assert passage.headings == ("Bread", "Sourdough")
    assert passage.text == Path(passage.path).read_text()[passage.start : passage.end]
    assert score > 0.4
    (notes / "bread.md").unlink()
    index(store, notes, embedder=embedder)
    assert all(Path(p.path).name != "bread.md" for p, _ in store.search(query, 10))
    assert len(list(home.folder.glob("vectors-*.faiss"))) == 1


def test_the_whole_store_answers_with_the_same_text_it_was_given(store: Store, notes: Path, embedder: Embedder) -> None:
    index(store, notes, embedder=embedder)
    for passage, _ in store.search(embedder.embed(["anything"])[0], 10):
        assert store.find(passage.path, passage.digest, passage.start, passage.end) == passage
        assert store.find(passage.path, "another digest", passage.start, passage.end) is None


def test_a_store_of_another_version_is_refused(home: Home, store: Store) -> None:
    store._db.execute("PRAGMA user_version = 99")
    with pytest.raises(BadRequestError, match="layout 99"):
        Store(home)
