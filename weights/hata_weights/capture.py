"""Queries and keys of real text: prefills a Hugging Face decoder and records what its attention is given.

They are recorded after RoPE, where they are hashed, and go to disk layer by layer while the model runs, so memory
holds one layer's whatever the model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hata_weights.biases import common_keys
from hata_weights.errors import RequestError
from hata_weights.fingerprint import fingerprint

ATTENTION = "hata_capture"
SHORTEST = 256
Record = Callable[[int, Tensor, Tensor, float], None]
TEXT_SUFFIXES = {"", ".c", ".cc", ".cpp", ".go", ".h", ".html", ".java", ".js", ".json", ".md", ".py", ".rs", ".rst"}
TEXT_SUFFIXES |= {".sh", ".tex", ".toml", ".ts", ".txt", ".xml", ".yaml", ".yml"}


@dataclass(frozen=True)
class Sample:
    """What one layer's attention was given for one sequence.

    Args:
        queries: [Hq, M, D], of M positions in ascending order.
        keys: [H, N, D], of all positions.
        positions: [M] int64.
        scale: [] float32, multiplies q . k before the softmax.
        common: [H, D], what keys have in common by the model's biases (`biases.common_keys`); None without any.
    """

    queries: Tensor
    keys: Tensor
    positions: Tensor
    scale: Tensor
    common: Tensor | None = None

    def to(self, device: torch.device | str) -> Sample:
        """On another device, in float32; ``common`` stays as it is."""
        queries, keys = self.queries.to(device, torch.float32), self.keys.to(device, torch.float32)
        return Sample(queries, keys, self.positions.to(device), self.scale.to(device), self.common)


@dataclass(frozen=True)
class Shape:
    """A decoder's attention: layers, query heads, KV heads and head dimension."""

    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int


class Decoder:
    """A Hugging Face decoder, without its head, whose attention can be recorded.

    Args:
        model: folder or id; a folder's own name is what the model is called.
        device: "cpu", "cuda", ...; on a CPU it runs in float32, elsewhere in the checkpoint's dtype.

    Raises:
        RequestError: transformers cannot load it, or it is no decoder with plain multi-head or grouped attention.
    """

    def __init__(self, model: str, device: str) -> None:
        from transformers import AttentionInterface, AutoModel, AutoTokenizer
        from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

        AttentionInterface.register(ATTENTION, _attend)
        AttentionMaskInterface.register(ATTENTION, sdpa_mask)
        self.name = Path(model).resolve().name if Path(model).is_dir() else model
        self.device = device
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(model)
            self.model = AutoModel.from_pretrained(model, dtype="auto", attn_implementation=ATTENTION)
        except (OSError, ValueError, ImportError) as error:
            first = str(error).strip().split("\n")[0]
            raise RequestError(f"{model} cannot be loaded ({first}): give a Hugging Face folder or id.") from None
        config = self.model.config.get_text_config(decoder=True)
        heads = config.num_attention_heads
        self.shape = Shape(
            config.num_hidden_layers,
            heads,
            getattr(config, "num_key_value_heads", None) or heads,
            getattr(config, "head_dim", None) or config.hidden_size // heads,
        )
        self.longest: int = config.max_position_embeddings
        try:
            parameters = {name: p.detach for name, p in self.model.named_parameters()}
            self.fingerprint = fingerprint(parameters, config.to_dict())
            self.common = common_keys(parameters, config.to_dict())
        except ValueError:
            raise RequestError(f"{model} has no attention with query and key projections: give a decoder.") from None
        self.model = self.model.to(device, torch.float32 if device == "cpu" else self.model.dtype).eval()

    def run(self, tokens: Tensor, record: Record) -> None:
        """Prefills one sequence.

        Args:
            tokens: [N] int64.
            record: called with the layer, its queries [Hq, N, D], its keys [H, N, D], both after RoPE, and the
                factor of q . k.
        """
        with torch.inference_mode(), _recording(record):
            self.model(input_ids=tokens.unsqueeze(0).to(self.device), use_cache=False)


_record: Record | None = None


@contextmanager
def _recording(record: Record) -> Iterator[None]:
    global _record
    _record = record
    try:
        yield
    finally:
        _record = None


def _attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
    """transformers' attention function: hands over what it is given, then attends as usual."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if _record is not None:
        _record(module.layer_idx, query[0], key[0], options.get("scaling") or query.shape[-1] ** -0.5)
    return sdpa_attention_forward(module, query, key, value, mask, **options)


def read_sequences(decoder: Decoder, paths: Sequence[Path], tokens: int, sequences: int) -> list[Tensor]:
    """Cuts texts into sequences, as evenly as can be over the paths.

    Args:
        paths: files, or folders whose text files are read in order of their names.
        tokens: the longest sequence.
        sequences: how many at most.

    Returns:
        [N] int64 each.

    Raises:
        RequestError: a path is missing or holds too little text, or there are more paths than sequences.
    """
    if sequences < len(paths):
        raise RequestError(f"--sequences {sequences} is fewer than the {len(paths)} texts: give {len(paths)} or more.")
    shares = [sequences // len(paths) + (n < sequences % len(paths)) for n in range(len(paths))]
    cut: list[Tensor] = []
    for path, share in zip(paths, shares, strict=True):
        text = read_text(path, limit=12 * tokens * share)
        ids = torch.tensor(decoder.tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
        whole = [piece for piece in ids.split(tokens)[:share] if len(piece) == tokens] or [ids]
        if len(whole[0]) < SHORTEST:
            raise RequestError(f"{path} holds {len(whole[0])} tokens of text: give at least {SHORTEST}.")
        cut += whole
    return cut


def read_text(path: Path, limit: int) -> str:
    """The text of a file, or of a folder's text files, up to about ``limit`` characters.

    Raises:
        RequestError: there is no such path.
    """
    if not path.exists():
        raise RequestError(f"{path} does not exist: give text files or folders of them.")
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in TEXT_SUFFIXES and file.is_file())
    pieces: list[str] = []
    for file in files:
        pieces.append(file.read_text(encoding="utf-8", errors="replace"))
        if sum(map(len, pieces)) >= limit:
            break
    return "\n\n".join(pieces)[:limit]


def data_fingerprint(sequences: Sequence[Tensor]) -> str:
    """sha256 of sequences of tokens."""
    digest = hashlib.sha256()
    for tokens in sequences:
        digest.update(len(tokens).to_bytes(8, "little") + tokens.numpy().tobytes())
    return digest.hexdigest()


def second_half(length: int, queries: int) -> Tensor:
    """At most ``queries`` positions spread over the second half of a sequence, to measure on: [M] int64, ascending."""
    half = length // 2
    return torch.linspace(half, length - 1, min(queries, length - half)).round().to(torch.int64)


def throughout(length: int, queries: int) -> Tensor:
    """At most ``queries`` positions to learn from, denser towards the start: [M] int64, ascending.

    A projection of queries after RoPE knows the positions that it has seen: learned from the second half of long
    sequences alone, it would choose worse than an untrained one in short contexts.
    """
    spread = torch.linspace(1 / 8, 1, queries, dtype=torch.float64).square() * (length - 1)
    return spread.round().to(torch.int64).unique()


def capture(decoder: Decoder, tokens: Tensor, folder: Path, layers: Container[int], positions: Tensor) -> None:
    """Writes one sequence's `Sample` of every layer, in bfloat16, as keys are cached.

    Args:
        tokens: [N] int64.
        folder: made; complete once it exists.
        layers: the layers to keep.
        positions: [M] int64, those of the queries to keep.
    """
    if folder.exists():
        return
    unfinished = folder.with_suffix(".unfinished")
    unfinished.mkdir(parents=True, exist_ok=True)

    def record(layer: int, query: Tensor, key: Tensor, scale: float) -> None:
        if layer in layers:
            chosen = query[:, positions.to(query.device)]
            kept = {"queries": chosen, "keys": key}
            tensors = {name: x.to("cpu", torch.bfloat16).contiguous() for name, x in kept.items()}
            tensors |= {"positions": positions, "scale": torch.tensor(scale)}
            if layer in decoder.common:
                tensors["common"] = decoder.common[layer]
            save_file(tensors, unfinished / f"{layer}.safetensors")

    decoder.run(tokens, record)
    unfinished.rename(folder)


def load_sample(folder: Path, layers: Sequence[int], device: str) -> Sample:
    """One sequence's sample, in float32 on ``device``: the heads of ``layers``, one layer's after another's.

    It has one ``scale``, the first layer's; queries of layers with another are multiplied by the ratio.
    """
    of_layers = [load_file(folder / f"{layer}.safetensors") for layer in layers]
    first = of_layers[0]
    queries = [of["queries"].to(torch.float32) * (of["scale"] / first["scale"]) for of in of_layers]
    joined = {"queries": torch.cat(queries), "keys": torch.cat([of["keys"] for of in of_layers])}
    if "common" in first:
        joined["common"] = torch.cat([of["common"] for of in of_layers])
    return Sample(**{**first, **joined}).to(device)
