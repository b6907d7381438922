"""Where hata-rag keeps what it writes: one folder of its user's, and a cache that can be deleted."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

APPLICATION = "hata-rag"


class Home:
    """The files of one index: the store, the FAISS index, the last conversation and the background server.

    Args:
        folder: ``--home``; otherwise the environment's ``HATA_RAG_HOME``, otherwise the user's data folder.
    """

    def __init__(self, folder: Path | None = None) -> None:
        named = folder or os.environ.get("HATA_RAG_HOME") or platformdirs.user_data_path(APPLICATION)
        self.folder = Path(named).expanduser()

    def create(self) -> Home:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self

    @property
    def store(self) -> Path:
        return self.folder / "index.sqlite"

    @property
    def conversation(self) -> Path:
        return self.folder / "last.json"

    @property
    def server(self) -> Path:
        return self.folder / "server.json"

    @property
    def server_log(self) -> Path:
        return self.folder / "server.log"

    @property
    def server_lock(self) -> Path:
        return self.folder / "server.lock"


def cache_folder() -> Path:
    """The folder of converted models: ``HATA_RAG_CACHE``, otherwise the user's cache folder."""
    return Path(os.environ.get("HATA_RAG_CACHE") or platformdirs.user_cache_path(APPLICATION)).expanduser()
