"""The index on disk: documents, chunks and vectors in SQLite, and the FAISS index made of the vectors.

SQLite is the truth. A vector belongs to the text it was made of, not to a file: a moved file costs nothing,
an edited paragraph only its chunks, and an interrupted run keeps every vector it committed. The FAISS file is
named after the generation of the chunks it holds; one of another generation is made anew.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hata_rag.chunks import Chunk
from hata_rag.documents import Document
from hata_rag.errors import BadRequestError
from hata_rag.home import Home

if TYPE_CHECKING:
    import numpy as np

SCHEMA_VERSION = 1
SCHEMA = """
CREATE TABLE fact (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE document (id INTEGER PRIMARY KEY, path TEXT UNIQUE NOT NULL, digest TEXT NOT NULL,
                       text TEXT NOT NULL);
CREATE TABLE chunk (id INTEGER PRIMARY KEY, document INTEGER NOT NULL REFERENCES document ON DELETE CASCADE,
                    start INTEGER NOT NULL, end INTEGER NOT NULL, headings TEXT NOT NULL, page INTEGER,
                    words TEXT NOT NULL);
CREATE INDEX chunk_document ON chunk (document);
CREATE INDEX chunk_words ON chunk (words);
CREATE TABLE vector (words TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
"""
PASSAGES = """
SELECT path, digest, start, end, substr(text, start + 1, end - start), headings, page
FROM chunk JOIN document ON document.id = chunk.document WHERE
"""


@dataclass(frozen=True, order=True)
class Passage:
    """A chunk with its text, as it is shown to the model and cited. Passages sort by path, then by place."""

    path: str
    start: int
    end: int
    digest: str
    text: str
    headings: tuple[str, ...] = ()
    page: int | None = None

    @property
    def title(self) -> str:
        """What it is about, for the model: file name, headings and page."""
        page = f", page {self.page}" if self.page else ""
        return " > ".join((Path(self.path).name, *self.headings)) + page

    @property
    def place(self) -> str:
        """Where a person finds it: the title with the whole path."""
        return str(Path(self.path).parent / self.title) if "/" in self.path else self.title


class Store:
    """The index in a home folder, made when it is not there yet."""

    def __init__(self, home: Home) -> None:
        self._folder = home.create().folder
        self._db = sqlite3.connect(home.store)
        self._db.execute("PRAGMA foreign_keys = ON")
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version == 0:
            self._db.executescript(f"BEGIN; {SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")
        elif version != SCHEMA_VERSION:
            raise BadRequestError(
                f"{home.store} has the layout {version} of another version of hata-rag, which reads "
                f"{SCHEMA_VERSION}: delete the file and index again."
            )

    def close(self) -> None:
        self._db.close()

    # Documents

    def digests(self) -> dict[str, str]:
        """The content hash of every document, by path."""
        return dict(self._db.execute("SELECT path, digest FROM document"))

    def replace(self, path: str, digest: str, document: Document, chunks: Sequence[Chunk]) -> None:
        """Put a document in the place of the one at its path, if any."""
        with self._db:
            self._db.execute("DELETE FROM document WHERE path = ?", (path,))
            row = self._db.execute(
                "INSERT INTO document (path, digest, text) VALUES (?, ?, ?)", (path, digest, document.text)
            )
            self._db.executemany(
                "INSERT INTO chunk (document, start, end, headings, page, words) VALUES (?, ?, ?, ?, ?, ?)",
                [
                    (
                        row.lastrowid,
                        c.start,
                        c.end,
                        json.dumps(c.headings),
                        c.page,
                        _digest_of_words(document, c),
                    )
                    for c in chunks
                ],
            )
            self._advance()

    def remove(self, paths: Iterable[str]) -> None:
        with self._db:
            self._db.executemany("DELETE FROM document WHERE path = ?", [(path,) for path in paths])
            self._advance()

    # Vectors

    def use_embedder(self, name: str) -> bool:
        """Drop the vectors of any other embedder than ``name``; true if there were some."""
        if (before := self._fact("embedder")) == name:
            return False
        with self._db:
            self._db.execute("DELETE FROM vector")
            self._set_fact("embedder", name)
            self._advance()
        return before is not None

    @property
    def embedder(self) -> str | None:
        return self._fact("embedder")

    def pending(self) -> dict[str, str]:
        """The texts that have no vector yet, by their hash."""
        rows = self._db.execute(
            "SELECT words, substr(text, start + 1, end - start), headings FROM chunk "
            "JOIN document ON document.id = chunk.document WHERE words NOT IN (SELECT words FROM vector)"
        )
        return {digest: embedded_text(json.loads(headings), text) for digest, text, headings in rows}

    def add_vectors(self, digests: Sequence[str], vectors: np.ndarray) -> None:
        with self._db:
            rows = [(digest, vector.tobytes()) for digest, vector in zip(digests, vectors, strict=True)]
            self._db.executemany("INSERT OR REPLACE INTO vector VALUES (?, ?)", rows)
            self._advance()

    def drop_unused_vectors(self) -> None:
        with self._db:
            self._db.execute("DELETE FROM vector WHERE words NOT IN (SELECT words FROM chunk)")

    # Reading

    def search(self, query: np.ndarray, count: int) -> list[tuple[Passage, float]]:
        """The ``count`` passages nearest to the query vector, best first, each with its cosine."""
        from hata_rag.vectors import nearest

        ids = [row[0] for row in self._db.execute("SELECT id FROM chunk JOIN vector USING (words) ORDER BY id")]
        if not ids:
            return []
        file = self._folder / f"vectors-{self._fact('generation')}.faiss"
        hits = nearest(file, self._vectors, query, min(count, len(ids)))
        return [(self._passages("chunk.id = ?", ids[row])[0], score) for row, score in hits]

    def find(self, path: str, digest: str, start: int, end: int) -> Passage | None:
        """The passage at a place, if the document there is still the same."""
        found = self._passages("path = ? AND digest = ? AND start = ? AND end = ?", path, digest, start, end)
        return found[0] if found else None

    def figures(self) -> dict[str, Any]:
        """What the index holds."""
        counts = self._db.execute(
            "SELECT (SELECT count(*) FROM document), (SELECT count(*) FROM chunk), "
            "(SELECT count(*) FROM chunk JOIN vector USING (words)), (SELECT sum(length(text)) FROM document)"
        ).fetchone()
        size = sum(file.stat().st_size for file in self._folder.glob("index.sqlite*"))
        size += sum(file.stat().st_size for file in self._folder.glob("vectors-*.faiss"))
        return {
            "documents": counts[0],
            "chunks": counts[1],
            "embedded": counts[2],
            "characters": counts[3] or 0,
            "embedder": self.embedder,
            "bytes": size,
            "folder": str(self._folder),
        }

    def _vectors(self) -> np.ndarray:
        import numpy as np

        rows = self._db.execute("SELECT value FROM chunk JOIN vector USING (words) ORDER BY chunk.id")
        return np.stack([np.frombuffer(row[0], dtype=np.float32) for row in rows])

    def _passages(self, condition: str, *values: Any) -> list[Passage]:
        rows = self._db.execute(PASSAGES + condition, values)
        return [
            Passage(path, start, end, digest, text, tuple(json.loads(headings)), page)
            for path, digest, start, end, text, headings, page in rows
        ]

    def _fact(self, name: str) -> str | None:
        row = self._db.execute("SELECT value FROM fact WHERE name = ?", (name,)).fetchone()
        return row[0] if row else None

    def _set_fact(self, name: str, value: str) -> None:
        self._db.execute("INSERT OR REPLACE INTO fact VALUES (?, ?)", (name, value))

    def _advance(self) -> None:
        self._set_fact("generation", str(int(self._fact("generation") or 0) + 1))


def embedded_text(headings: Sequence[str], text: str) -> str:
    """What is embedded for a chunk: its text under its headings, which say what a paragraph is about."""
    return "\n".join([" > ".join(headings), text.strip()]).strip()


def _digest_of_words(document: Document, chunk: Chunk) -> str:
    words = embedded_text(chunk.headings, document.text[chunk.start : chunk.end])
    return hashlib.sha256(words.encode()).hexdigest()
