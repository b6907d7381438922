"""Which weights of a model its codes depend on, as one hash: a fine-tuned model may have others.

The hash comes from a loaded model or, alike, from the files of a Hugging Face folder, which a server reads at start.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

# What a layer's queries and keys come from, given its input: projections, norms on them, and the norm before them.
PARTS = re.compile(
    r"layers\.\d+\.(?:self_attn|self_attention|attention|attn)\."
    r"(?:q_proj|k_proj|qkv_proj|qk_proj|query_key_value|c_attn|Wqkv|q_norm|k_norm|q_layernorm|k_layernorm)\.\w+$"
    r"|layers\.\d+\.input_layernorm\.\w+$"
)
OTHER_TOWERS = re.compile(r"vision|visual|audio")

Parameters = Mapping[str, Callable[[], Tensor]]  # what gives each parameter, by its name
T = TypeVar("T")


def fingerprint(parameters: Parameters, config: dict[str, Any]) -> str:
    """sha256 of the query and key projections, their norms and biases, and the settings of RoPE.

    Args:
        parameters: what gives each parameter, in the dtype of the checkpoint, by its name; names are compared from
            "layers." on, so that a decoder with a head and one without agree.
        config: the model's configuration as a dict.

    Raises:
        ValueError: no parameter of that kind is there.
    """
    digest = hashlib.sha256()
    chosen = parts(parameters)
    if not chosen:
        raise ValueError("The model has no query and key projections under names that are known.")
    for name, load in sorted(chosen.items()):
        tensor = load().detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)  # scales of fp8 have no dimension
    digest.update(json.dumps(rope(config), sort_keys=True, default=str).encode())
    return digest.hexdigest()


def parts(parameters: Parameters) -> dict[str, Callable[[], Tensor]]:
    """The parameters that codes depend on, by their names from "layers." on."""
    return {short: load for name, load in parameters.items() if (short := part(name))}


def part(name: str) -> str:
    """A parameter's name from "layers." on if codes depend on it; else the empty string."""
    match = None if OTHER_TOWERS.search(name) else PARTS.search(name)
    return match[0] if match else ""


def rope(config: dict[str, Any]) -> dict[str, Any]:
    """The settings of RoPE in one form: transformers 5 keeps them in ``rope_parameters``, earlier files beside it."""
    text = config.get("text_config") or config
    settings = {**(text.get("rope_scaling") or {}), **(text.get("rope_parameters") or {})}
    kind = settings.pop("type", "default")
    theta = settings.pop("rope_theta", None) or text.get("rope_theta") or 10_000
    share = settings.pop("partial_rotary_factor", None) or text.get("partial_rotary_factor") or 1
    if settings.get("original_max_position_embeddings") == text.get("max_position_embeddings"):
        settings.pop("original_max_position_embeddings", None)  # which transformers adds where a file lacks it
    named = {"rope_type": settings.pop("rope_type", kind), "rope_theta": float(theta), "partial": float(share)}
    return {key: value for key, value in settings.items() if value is not None} | named


def folder_fingerprint(folder: Path) -> str | None:
    """The fingerprint of a Hugging Face folder, tensor by tensor from its files; None if they do not hold one, or if
    some are missing or broken."""
    return read_folder(folder, fingerprint)


def read_folder(folder: Path, read: Callable[[Parameters, dict[str, Any]], T]) -> T | None:
    """What ``read`` makes of a Hugging Face folder's parameters, each loaded when asked for, and of its configuration;
    None if files are missing or broken."""
    from safetensors import SafetensorError, safe_open

    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        index = folder / "model.safetensors.index.json"
        if index.exists():
            listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            if not all((folder / name).exists() for name in listed):
                return None
        with ExitStack() as stack:
            opened = [stack.enter_context(safe_open(f, framework="pt")) for f in sorted(folder.glob("*.safetensors"))]
            stored = {name: partial(file.get_tensor, name) for file in opened for name in file.keys()}  # noqa: SIM118
            return read(stored, config)
    except (OSError, ValueError, KeyError, SafetensorError):
        return None
