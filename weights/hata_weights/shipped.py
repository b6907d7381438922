"""The trained weights that come with this package, found by the fingerprint of the model that they are for."""

from __future__ import annotations

from pathlib import Path

from hata_weights import artifact
from hata_weights.artifact import Identity

DATA = Path(__file__).parent / "data"


def shipped() -> dict[Path, Identity]:
    """Every folder of weights that ships, in order of name, with what it is for."""
    return {
        path.parent: artifact.load_identity(path.parent) for path in sorted(DATA.glob(f"*/{artifact.IDENTITY_FILE}"))
    }


def find(fingerprint: str | None, bits: int, among: dict[Path, Identity] | None = None) -> Path | None:
    """The folder for a model of this fingerprint with codes of this many bits; None if none ships."""
    if not fingerprint:
        return None
    folders = shipped() if among is None else among
    fitting = (path for path, of in folders.items() if of.fingerprint == fingerprint and of.bits == bits)
    return next(fitting, None)


def of_shape(layers: int, kv_heads: int, head_dim: int) -> dict[Path, Identity]:
    """The folders for models of this shape."""
    shape = layers, kv_heads, head_dim
    return {path: of for path, of in shipped().items() if (of.layers, of.kv_heads, of.head_dim) == shape}
