"""The FAISS index: exact nearest neighbours by cosine, on the GPU where FAISS sees one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

MOST = 2_048  # neighbours that FAISS finds on a GPU at once
GPU_SCRATCH = 64 << 20  # bytes; FAISS would take 1.5 GB, which the server's KV cache has


def nearest(file: Path, vectors: Callable[[], np.ndarray], query: np.ndarray, count: int) -> list[tuple[int, float]]:
    """The rows of the ``count`` vectors nearest to ``query``, best first, each with its inner product.

    Args:
        file: the index on disk; made of ``vectors()`` when it is not there, in the place of its predecessors.
    """
    import faiss

    if not file.exists():
        _write(file, vectors())
    scores, rows = _on_gpu(faiss.read_index(str(file))).search(query.reshape(1, -1), min(count, MOST))
    return list(zip(rows[0].tolist(), scores[0].tolist(), strict=True))


def _write(file: Path, vectors: np.ndarray) -> None:
    import faiss

    # Exact, not approximate: a scan of a million vectors takes a fraction of a second, needs no training and
    # finds the same passages every time, without which prompts would not repeat and prefixes not be shared.
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    partial = file.with_suffix(".partial")
    faiss.write_index(index, str(partial))
    partial.rename(file)
    for older in file.parent.glob("vectors-*.faiss"):
        if older != file:
            older.unlink(missing_ok=True)


def _on_gpu(index: Any) -> Any:
    import faiss

    if not faiss.get_num_gpus():
        return index
    resources = faiss.StandardGpuResources()
    resources.setTempMemory(GPU_SCRATCH)
    try:
        return faiss.index_cpu_to_gpu(resources, 0, index)
    except RuntimeError:  # no room beside the server: the CPU finds the same
        return index
