"""What the keys of a model have in common by its biases, known before any text is read.

Qwen2 and others add a bias to keys. It can be many times as long as what tells keys apart, and then decides most bits
of an untrained code: nearly all keys get the same one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hata_weights.fingerprint import Parameters, parts, read_folder, rope
from hata_weights.rotation import untrained_projection

BIAS = re.compile(r"layers\.(\d+)\.\w+\.k_proj\.bias")
NORM = re.compile(r"layers\.\d+\.\w+\.(?:k_norm|k_layernorm)\.\w+")
POSITIONS = 8192


def common_keys(parameters: Parameters, config: dict[str, Any]) -> dict[int, Tensor]:
    """The mean over positions of each layer's biases of keys, after RoPE.

    Args:
        parameters: what gives each parameter, by its name.
        config: the model's configuration as a dict.

    Returns:
        [H, D] float64 for each layer that has biases; of a model that has none, or norms keys after the bias, nothing.
    """
    known = parts(parameters)
    biases = {int(match[1]): load() for name, load in known.items() if (match := BIAS.fullmatch(name))}
    if not biases or any(map(NORM.fullmatch, known)):
        return {}
    text = config.get("text_config") or config
    heads: int = text.get("num_key_value_heads") or text["num_attention_heads"]
    rows = torch.stack([bias.detach().cpu().double().view(heads, -1) for bias in biases.values()])
    return dict(zip(biases, mean_over_positions(rows, rope(config)), strict=True))


def mean_over_positions(rows: Tensor, settings: dict[str, Any]) -> Tensor:
    """Mean of what RoPE, in halves, makes of [..., D] rows at each of `POSITIONS` positions; scaling is left out, as it
    changes what turns slowly, and hardly the mean."""
    D = int(rows.shape[-1] * settings["partial"])
    slower = settings["rope_theta"] ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
    angle = torch.arange(POSITIONS, dtype=torch.float64).unsqueeze(1) * slower
    cos, sin = angle.cos().mean(0), angle.sin().mean(0)
    one, other = rows[..., : D // 2], rows[..., D // 2 : D]
    return torch.cat([one * cos - other * sin, one * sin + other * cos, rows[..., D:]], -1)


def folder_common_keys(folder: Path) -> dict[int, Tensor]:
    """`common_keys` of a Hugging Face folder; nothing if its files cannot be read."""
    return read_folder(folder, common_keys) or {}


def untrained_projections(
    folder: Path | None, layers: Sequence[int], kv_heads: Sequence[int], head_dim: int, bits: int
) -> dict[int, Tensor]:
    """`untrained_projection` of some layers, without what the model's keys have in common.

    Args:
        folder: of the model, in Hugging Face's format; None if it is not on this disk.
    """
    common = folder_common_keys(folder) if folder and layers else {}
    return {layer: untrained_projection(layer, kv_heads, head_dim, bits, common.get(layer)) for layer in layers}
