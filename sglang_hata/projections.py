"""Which projections a server hashes with: a weights folder's, or untrained rotations; and this rank's part of them."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from hata_kernels.reference import ONE_SIDED
from hata_weights import artifact, shipped
from hata_weights.biases import untrained_projections
from hata_weights.fingerprint import folder_fingerprint
from sglang_hata.config import AUTO, HataConfig, HataError

logger = logging.getLogger(__name__)

UNREAD = "its safetensors are not, or not all, on this disk at start, or are of no known layout"
UNTRAINED = (
    "No trained hash weights of %d bits ship for %s%s: codes are untrained rotations. With 128 bits they kept 89 to "
    "95 %% of the attention that exact q.k keeps at a budget of 1/64, trained ones 98 to 99 %%; over 32K tokens at "
    "1/32 models whose keys have biases answered worse than dense, one of 1.5B by 3.7 points (trained: 0.2), one of "
    "0.5B by 28.6 (0.5). "
    "To train yours: hata-weights train %s --text FILES --out DIR, then --hata-weights DIR."
)
LONGER = (
    "The hash weights in %s were trained on up to %d tokens, and this server allows %d, where they may choose "
    "worse than untrained codes: train others with hata-weights train --tokens %d, or give --context-length %d."
)


def resolve(config: HataConfig, model: Any) -> HataConfig:
    """Settings with a folder, or none, in place of ``auto``, and with the scoring that the weights are for.

    Args:
        model: SGLang's ModelConfig.

    Raises:
        HataError: the weights folder does not say what it is for.
    """
    if config.weights == AUTO:
        shape = model.num_hidden_layers, model.get_total_num_kv_heads(), model.head_dim
        fitting = shipped.of_shape(*shape)
        # Hashing a large model's weights takes seconds: only where something may come of it.
        fingerprint = model_fingerprint(model) if fitting else None
        found = shipped.find(fingerprint, config.bits, fitting)
        if found is None:
            unread = f" ({UNREAD})" if fitting and not fingerprint else ""
            logger.warning(UNTRAINED, config.bits, model.model_path, unread, model.model_path)
            return replace(config, weights="none", scoring=ONE_SIDED if config.scoring == AUTO else config.scoring)
        logger.info("Hash weights that ship for %s: %s", model.model_path, found)
        config = replace(config, weights=str(found))
    if config.weights == "none":
        return config
    if config.key_sizes:
        raise HataError(
            f"--hata-key-sizes does not go with the trained hash weights in {config.weights}, which choose worse by "
            "sizes that they were not trained with: remove it, or give --hata-weights none."
        )
    identity = read_identity(config)
    if 0 < identity.tokens < model.context_len:
        logger.warning(LONGER, config.weights, identity.tokens, model.context_len, model.context_len, identity.tokens)
    trained_for = identity.scoring
    if config.scoring == AUTO:
        return replace(config, scoring=trained_for)
    if config.scoring != trained_for:
        logger.warning(
            "The hash weights in %s were trained for %s scoring, and --hata-scoring %s chooses worse by them: leave it "
            "out to serve them as they were trained.",
            config.weights,
            trained_for,
            config.scoring,
        )
    return config


def model_fingerprint(model: Any) -> str | None:
    """What codes of this model depend on, from its files on this disk; None if they are not there, or not known."""
    folder = model_folder(model)
    return folder_fingerprint(folder) if folder else None


def model_folder(model: Any) -> Path | None:
    """Where the files of SGLang's ModelConfig are on this disk; None if nowhere."""
    folder = Path(model.model_path)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model.model_path, revision=model.revision, local_files_only=True))
    except (OSError, ValueError):
        return None


def bits_of(config: HataConfig) -> int:
    """Bits of a code: the weights folder's, or ``--hata-bits``."""
    if config.weights == "none":
        return config.bits
    return read_identity(config).bits


def read_identity(config: HataConfig) -> artifact.Identity:
    """What the weights folder says it is for; HataError if it does not say so."""
    try:
        return artifact.load_identity(Path(config.weights))
    except artifact.ArtifactError as error:
        raise HataError(str(error)) from None


def rank_projections(config: HataConfig, model: Any, rank: int, size: int, device: str) -> dict[int, Tensor]:
    """The projections of one tensor-parallel rank.

    Args:
        model: SGLang's ModelConfig.
        rank, size: of attention's tensor parallelism.

    Returns:
        For each layer that HATA serves, by its number: [2, H, D, bits] int8 on ``device``, of keys and of queries, H
        the KV heads of this rank.

    Raises:
        HataError: the weights folder does not fit the model.
    """
    check_identity(config, model)
    heads = rank_kv_heads(model.get_total_num_kv_heads(), rank, size)
    trained: dict[int, Tensor] = {}
    if config.weights != "none":
        try:
            _, trained = artifact.load(Path(config.weights))
        except artifact.ArtifactError as error:
            raise HataError(str(error)) from None
    projections = {layer: w[:, heads] for layer, w in trained.items() if layer >= config.dense_layers}
    if untrained := untrained_layers(config, model):
        projections |= untrained_projections(model_folder(model), untrained, heads, model.head_dim, bits_of(config))
    return {layer: projections[layer].to(device) for layer in sorted(projections)}


def untrained_layers(config: HataConfig, model: Any) -> range:
    """The layers that HATA serves by untrained codes: all, or those before the first that the weights are for."""
    end = model.num_hidden_layers if config.weights == "none" else read_identity(config).dense_layers
    return range(config.dense_layers, end)


def check_identity(config: HataConfig, model: Any) -> None:
    """Raises HataError unless the weights folder is for a model of this shape, and for all layers but the first."""
    if config.weights == "none":
        return
    identity = read_identity(config)
    shape = {
        "layers": model.num_hidden_layers,
        "kv_heads": model.get_total_num_kv_heads(),
        "head_dim": model.head_dim,
    }
    for name, value in shape.items():
        if getattr(identity, name) != value:
            raise HataError(
                f"The hash weights in {config.weights} are for {identity.model} with {name} {getattr(identity, name)}, "
                f"but {model.model_path} has {value}: give weights for this model, or --hata-weights none."
            )
    # That layer 0 may have untrained codes beside trained ones has been measured; of more layers, nothing.
    if identity.dense_layers > max(config.dense_layers, 1):
        raise HataError(
            f"The hash weights in {config.weights} begin at layer {identity.dense_layers}, and --hata-dense-layers "
            f"{config.dense_layers} leaves layer {identity.dense_layers - 1} to untrained codes, which only layer 0 "
            f"may have beside trained ones: give --hata-dense-layers {identity.dense_layers}, or train for all layers."
        )


def check_fingerprint(config: HataConfig, model: Any) -> None:
    """Raises HataError if the model's queries and keys are known to be others than the weights were trained for."""
    if config.weights == "none":
        return
    identity = read_identity(config)
    if not identity.fingerprint:
        return
    fingerprint = model_fingerprint(model)
    if fingerprint is None:
        logger.warning("Whether %s fit %s cannot be checked: %s.", config.weights, model.model_path, UNREAD)
    elif fingerprint != identity.fingerprint:
        folder, path = config.weights, model.model_path
        raise HataError(
            f"The hash weights in {folder} were trained for {identity.model}, and {path} makes other queries and keys "
            f"(fingerprint {fingerprint[:12]}, not {identity.fingerprint[:12]}): measure what is lost with "
            f"hata-weights check {path} --weights {folder} --text FILES --adopt DIR, or give --hata-weights none."
        )


def rank_kv_heads(total: int, rank: int, size: int) -> list[int]:
    """The KV heads of a rank: a slice of them, or one that it shares with others when ranks outnumber heads."""
    if total >= size:
        share = total // size
        return list(range(rank * share, (rank + 1) * share))
    return [rank * total // size]
