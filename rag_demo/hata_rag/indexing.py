"""Bringing the index up to date: what is new or changed is read and embedded, what is gone is dropped."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from hata_rag.chunks import cut
from hata_rag.documents import Document, UnreadableError, find_files, python_reference, read_document
from hata_rag.embed import BATCH, Embedder
from hata_rag.errors import BadRequestError
from hata_rag.store import Store

MAX_BYTES = 64 << 20
# Topics of the Python language reference are indexed under this scheme instead of a path.
REFERENCE = "python:"


class Track(Protocol):
    """Draws, or does not draw, a progress bar while it hands out the items."""

    def __call__(self, items: Sequence[Any], what: str) -> Iterable[Any]: ...


@dataclass
class Summary:
    """What a run of indexing did, in documents; ``embedded`` counts chunks."""

    added: int = 0
    changed: int = 0
    unchanged: int = 0
    deleted: int = 0
    embedded: int = 0
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def read(self) -> int:
        return self.added + self.changed + self.unchanged


class Indexer:
    """Updates a store.

    Args:
        track: shows progress.
        skip: told of each file that cannot be read, as (path, reason), when it is met.
    """

    def __init__(self, store: Store, embedder: Embedder, track: Track, skip: Callable[[str, str], None]) -> None:
        self._store, self._embedder, self._track, self._skip = store, embedder, track, skip

    def index(self, roots: Sequence[Path]) -> Summary:
        """Index the files under ``roots``; documents indexed from there before and gone now are dropped."""
        folders = [root.expanduser().resolve() for root in roots]
        known = self._store.digests()
        for folder in folders:
            if not folder.exists() and not any(_within(path, [folder]) for path in known):
                raise BadRequestError(f"{folder} is not there and was never indexed: name a file or a folder.")
        files = dict.fromkeys(file for folder in folders if folder.exists() for file in find_files(folder))
        before = {path for path in known if _within(path, folders)}
        return self._update(before, [(str(file), _reader(file)) for file in files], "Reading")

    def index_reference(self) -> Summary:
        """Index the Python language reference of the running interpreter."""
        before = {path for path in self._store.digests() if path.startswith(REFERENCE)}
        documents = python_reference()
        entries = [(REFERENCE + topic, _given(document)) for topic, document in documents.items()]
        return self._update(before, entries, "Reading the Python language reference")

    def forget(self, roots: Sequence[str]) -> int:
        """Drop documents by file or folder, or the reference by ``python:``; returns how many."""
        folders = [Path(root).expanduser().resolve() for root in roots if root != REFERENCE]
        paths = [
            path
            for path in self._store.digests()
            if _within(path, folders) or (REFERENCE in roots and path.startswith(REFERENCE))
        ]
        self._store.remove(paths)
        self._store.drop_unused_vectors()
        return len(paths)

    def _update(self, before: set[str], entries: Sequence[tuple[str, _Read]], what: str) -> Summary:
        known = self._store.digests()
        summary = Summary()
        for path, read in self._track(entries, what):
            try:
                digest, parse = read()
                if known.get(path) == digest:
                    summary.unchanged += 1
                else:
                    document = parse()
                    self._store.replace(path, digest, document, cut(document, self._embedder.wordpieces))
                    summary.changed += path in known
                    summary.added += path not in known
                before.discard(path)
            except (UnreadableError, OSError) as error:
                reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
                summary.skipped[path] = reason
                self._skip(path, reason)
        self._store.remove(before)
        summary.deleted = len(before)
        summary.embedded = self.embed()
        return summary

    def embed(self) -> int:
        """Embed every chunk that has no vector, those of an interrupted run or another embedder included."""
        self._store.use_embedder(self._embedder.name)
        # Chunks of like length share a batch, because a batch is padded to its longest.
        pending = sorted(self._store.pending().items(), key=lambda item: len(item[1]))
        batches = [pending[start : start + BATCH] for start in range(0, len(pending), BATCH)]
        for batch in self._track(batches, "Embedding"):
            self._store.add_vectors([digest for digest, _ in batch], self._embedder.embed([t for _, t in batch]))
        self._store.drop_unused_vectors()
        return len(pending)


# Gives the digest of a document's source, and a function that reads the document when the digest is new.
_Read = Callable[[], tuple[str, Callable[[], Document]]]


def _reader(file: Path) -> _Read:
    def read() -> tuple[str, Callable[[], Document]]:
        if file.stat().st_size > MAX_BYTES:
            raise UnreadableError(f"it is larger than {MAX_BYTES >> 20} MB")
        data = file.read_bytes()
        return hashlib.sha256(data).hexdigest(), lambda: read_document(file.name, data)

    return read


def _given(document: Document) -> _Read:
    return lambda: (hashlib.sha256(document.text.encode()).hexdigest(), lambda: document)


def _within(path: str, folders: Sequence[Path]) -> bool:
    return any(Path(path).is_relative_to(folder) for folder in folders)


def quiet(items: Sequence[Any], what: str) -> Iterator[Any]:
    """A Track that draws nothing."""
    return iter(items)
