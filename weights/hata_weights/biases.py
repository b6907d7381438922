"""What the keys of a model have in common by its biases, known before any text is read.

Qwen2 and others add a bias to keys. It can be many times as long as what tells keys apart, and then decides most bits
of an untrained code: nearly all keys get the same one.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hata_weights.fingerprint import OTHER_TOWERS, Parameters, read_folder, rope

BIAS = re.compile(r"layers\.(\d+)\.(?:self_attn|self_attention|attention|attn)\.k_proj\.bias$")
NORM = re.compile(r"layers\.\d+\.(?:self_attn|self_attention|attention|attn)\.(?:k_norm|k_layernorm)\.")
POSITIONS = 8192


def common_keys(parameters: Parameters, config: dict[str, Any]) -> dict[int, Tensor]:
    """The mean over positions of each layer's biases of keys, after RoPE.

    Args:
        parameters: what gives each parameter, by its name.
        config: the model's configuration as a dict.

    Returns:
        [H, D] float64 for each layer that has biases; of a model that has none, or norms keys after the bias, nothing.
    """
    names = {name for name in parameters if not OTHER_TOWERS.search(name)}
    if any(map(NORM.search, names)):
        return {}
    text = config.get("text_config") or config
    heads: int = text.get("num_key_value_heads") or text["num_attention_heads"]
    found = {match: name for name in names if (match := BIAS.search(name))}
    return {
        int(match[1]): mean_over_positions(parameters[name]().detach().cpu().double().view(heads, -1), rope(config))
        for match, name in found.items()
    }


def mean_over_positions(rows: Tensor, settings: dict[str, Any]) -> Tensor:
    """Mean of what RoPE, in halves, makes of [H, D] rows at each of `POSITIONS` positions; scaling is left out, as it
    changes what turns slowly, and hardly the mean."""
    D = int(rows.shape[1] * settings["partial"])
    slower = settings["rope_theta"] ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
    angle = torch.arange(POSITIONS, dtype=torch.float64).unsqueeze(1) * slower
    cos, sin = angle.cos().mean(0), angle.sin().mean(0)
    one, other = rows[:, : D // 2], rows[:, D // 2 : D]
    return torch.cat([one * cos - other * sin, one * sin + other * cos, rows[:, D:]], 1)


def folder_common_keys(folder: Path) -> dict[int, Tensor]:
    """`common_keys` of a Hugging Face folder; nothing if its files cannot be read."""
    return read_folder(folder, common_keys) or {}
