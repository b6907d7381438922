"""Hash weights on disk: `projection.safetensors` beside `hata.json`, which says what they are for.

A folder without an identity, of another shape, or whose tensors are not the ones that the identity was written
for is refused: a wrong projection would still run, and choose badly without a word.

Schema 3 has a projection for queries beside that for keys, which earlier ones, never released, had not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hata_kernels import reference

SCHEMA = 3
SCORINGS = (reference.HAMMING, reference.ONE_SIDED)
IDENTITY_FILE = "hata.json"
TENSOR_FILE = "projection.safetensors"
LATER = ("sequences", "steps")  # not in the first folders


class ArtifactError(ValueError):
    """A weights folder that cannot be used. The message is one sentence."""


@dataclass(frozen=True)
class Identity:
    """What a folder of hash weights is for, and how good it is.

    Args:
        model: name or path of the model that it was made for.
        layers: the model's number of layers.
        dense_layers: the first layers, for which there are no weights.
        kv_heads: KV heads of the whole model, whatever the tensor parallelism.
        head_dim, bits: the shape of a KV head's projection.
        tool: who wrote it, with version.
        sha256: of the tensor file; filled in by `save`.
        scoring: how queries are compared with codes, "hamming" or "one-sided" (`reference.query_weights`).
        fingerprint: of the model's weights that codes depend on (see `fingerprint`); empty if unknown.
        data: sha256 of the tokens that it was trained on; empty if untrained.
        tokens: the longest sequence that it was trained on; 0 if unknown.
        sequences, steps: how many sequences it was trained on, and for how long; 0 if unknown.
        scores: what was measured on text that it was not trained on: rows of "text", "tokens", "sink", "recent",
            "budget", "mass", "exact_mass", "best_mass", "worst_head" and "bytes_per_token".
    """

    model: str
    layers: int
    dense_layers: int
    kv_heads: int
    head_dim: int
    bits: int
    tool: str
    sha256: str = ""
    scoring: str = reference.HAMMING
    fingerprint: str = ""
    data: str = ""
    tokens: int = 0
    sequences: int = 0
    steps: int = 0
    scores: tuple[dict[str, Any], ...] = ()


def save(folder: Path, identity: Identity, projections: Mapping[int, Tensor]) -> None:
    """Writes one int8 tensor [2, kv_heads, head_dim, bits] a layer, and the identity last.

    Raises:
        ArtifactError: layers or shapes that the identity does not announce.
    """
    check_projections(folder, identity, projections)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"layers.{layer}.projection": w.contiguous() for layer, w in projections.items()}
    save_file(tensors, folder / TENSOR_FILE)
    (folder / TENSOR_FILE).chmod(0o644)  # safetensors makes files that only their owner can read
    written = asdict(identity) | {"schema": SCHEMA, "sha256": _sha256(folder / TENSOR_FILE)}
    (folder / IDENTITY_FILE).write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


def load_identity(folder: Path) -> Identity:
    """Reads `hata.json`.

    Raises:
        ArtifactError: it is missing, is not JSON, has another schema or scoring, or lacks a field.
    """
    path = folder / IDENTITY_FILE
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{folder} holds no {IDENTITY_FILE}: give a folder of hash weights.") from None
    except (ValueError, OSError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}): write the weights anew.") from None
    if not isinstance(read, dict) or read.get("schema") != SCHEMA:
        schema = read.get("schema") if isinstance(read, dict) else None
        raise ArtifactError(f"{path} has schema {schema}: this version reads schema {SCHEMA}, so train them anew.")
    names = [field.name for field in fields(Identity) if field.name in read or field.name not in LATER]
    if missing := [name for name in names if name not in read]:
        raise ArtifactError(f"{path} lacks {', '.join(missing)}: write the weights anew.")
    values: dict[str, Any] = {name: tuple(read[name]) if name == "scores" else read[name] for name in names}
    identity = Identity(**values)
    if identity.scoring not in SCORINGS:
        raise ArtifactError(f"{path} has scoring {identity.scoring}: this version knows {' and '.join(SCORINGS)}.")
    return identity


def load(folder: Path) -> tuple[Identity, dict[int, Tensor]]:
    """Reads identity and projections, and checks one against the other.

    Returns:
        The identity, and for each layer [2, kv_heads, head_dim, bits] int8, of keys and of queries.


    Raises:
        ArtifactError: as `load_identity`, or the tensors are missing or are not those of the identity.
    """
    identity = load_identity(folder)
    path = folder / TENSOR_FILE
    if not path.is_file():
        raise ArtifactError(f"{folder} holds no {TENSOR_FILE}: give a complete folder of hash weights.")
    if _sha256(path) != identity.sha256:
        raise ArtifactError(f"{path} is not the file that {IDENTITY_FILE} was written for: copy both again.")
    projections = {int(name.split(".")[1]): w for name, w in load_file(path).items()}
    check_projections(folder, identity, projections)
    return identity, projections


def check_projections(folder: Path, identity: Identity, projections: Mapping[int, Tensor]) -> None:
    """Raises ArtifactError unless every layer past the dense ones has projections of the right shape."""
    wanted = set(range(identity.dense_layers, identity.layers))
    if set(projections) != wanted:
        raise ArtifactError(
            f"The hash weights in {folder} cover layers {sorted(projections)}, not {identity.dense_layers} to "
            f"{identity.layers - 1}: write them anew."
        )
    shape = (2, identity.kv_heads, identity.head_dim, identity.bits)
    for layer, w in projections.items():
        if tuple(w.shape) != shape or w.dtype != torch.int8:
            raise ArtifactError(
                f"The hash weights of layer {layer} in {folder} are {w.dtype} {tuple(w.shape)}, not int8 {shape}: "
                "write them anew."
            )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
