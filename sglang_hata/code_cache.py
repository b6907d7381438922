"""Hash codes beside the KV cache: one row a slot, written whenever the slot's key is.

A code is a function of the key alone, so whoever shares a slot shares its code: a prefix in the radix cache is
hashed once, by the request that first computed it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from hata_kernels.reference import KEYS, WORD_BITS, hash_codes, hash_sizes, popcount
from sglang_hata.config import HataError

# Slot 0 takes the writes of padding rows, of several at a time and in no order: nothing ever reads it.
PADDING_SLOT = 0
MAX_ROUNDED_BITS = 0.1


class CodeCache:
    """The codes of every layer that HATA serves.

    Args:
        slots: slots of the KV pool, the padding slot included.
        projections: for each such layer, by its global number, [2, H, D, bits] int8 on the pool's device, of keys and
            of queries; H are the KV heads of this rank.
        sized: sizes of the keys, too (``--hata-key-sizes``).
    """

    def __init__(self, slots: int, projections: Mapping[int, Tensor], sized: bool = False) -> None:
        self.projections = dict(projections)
        first = next(iter(self.projections.values()))
        _, self.kv_heads, self.head_dim, self.bits = first.shape
        shape = (slots, self.kv_heads, self.bits // 32)
        # Zeros, as the KV pool's own buffers: a key of zeros has a code of zeros, so codes match keys from the start.
        self.codes = {
            layer: torch.zeros(shape, dtype=torch.int32, device=w.device) for layer, w in self.projections.items()
        }
        self.sizes = {
            layer: torch.zeros(shape[:2], dtype=torch.int16, device=w.device)
            for layer, w in self.projections.items()
            if sized
        }
        self.first_layer = min(self.projections)
        self.tokens_hashed = 0

    @property
    def bytes_per_token(self) -> int:
        """Bytes that the codes of one token take, over all layers, and its key's sizes."""
        return code_bytes_per_token(len(self.codes), self.kv_heads, self.bits, bool(self.sizes))

    def size_bytes(self) -> int:
        return sum(rows.nbytes for rows in (*self.codes.values(), *self.sizes.values()))

    def write(self, layer: int, slots: Tensor, keys: Tensor) -> None:
        """Hashes the keys of new tokens into their slots.

        Args:
            slots: [N] int.
            keys: [N, H, D] or [N, H * D], after RoPE, before any quantisation.
        """
        keys = keys.view(-1, self.kv_heads, self.head_dim)
        projection, sizes = self.projections[layer][KEYS], self.sizes.get(layer)
        if keys.is_cuda:
            from hata_kernels.encode import hash_rows

            hash_rows(keys, projection, self.codes[layer], slots, sizes)
        else:
            self.codes[layer][slots] = hash_codes(keys, projection)
            if sizes is not None:
                sizes[slots] = hash_sizes(keys, projection)
        if layer == self.first_layer:
            self.tokens_hashed += slots.numel()

    def move(self, target: Tensor, source: Tensor) -> None:
        """Copies codes from slot to slot, as the pool does with keys and values."""
        for rows in (*self.codes.values(), *self.sizes.values()):
            rows[target] = rows[source]

    def require_fresh(self, slots: Tensor, key_buffer: Callable[[int], Tensor]) -> None:
        """Checks the codes of some cached tokens in every layer.

        Asked once, at a server's first decode step: a model that writes its keys by kernels of its own, past the
        KV pool, would otherwise be served with the codes of other keys, and answer wrongly without a word.

        Args:
            slots: [N], of tokens whose keys are cached.
            key_buffer: the key buffer of a layer, [slots, H, D].

        Raises:
            HataError: a code is not the hash of its key.
        """
        for layer, codes in self.codes.items():
            keys = key_buffer(layer)[slots]
            wrong = popcount(hash_codes(keys, self.projections[layer][KEYS]) ^ codes[slots])
            allowed = 0.0
            if keys.dtype.itemsize == 1:
                # Keys in fp8 have been rounded since they were hashed, which turns bits whose sum is next to zero. What
                # was rounded to nothing, like the tiny keys of dummy weights, says nothing of its code.
                wrong, allowed = wrong[keys.float().any(dim=-1)], MAX_ROUNDED_BITS
            if wrong.numel() and wrong.float().mean() / WORD_BITS > allowed:
                raise HataError(
                    f"--hata cannot serve this model: the keys of layer {layer} reach the KV cache by a way that "
                    "leaves out their codes; remove --hata, and please report the model."
                )

    def stale(self, layer: int, keys: Tensor, rows: int = 8192) -> int:
        """How many slots of a layer hold a code or a size that is not their key's; 0 unless something is broken.

        Args:
            keys: the layer's key buffer, [slots, H, D].
            rows: slots hashed at a time, to bound memory.
        """
        wrong = 0
        projection, sizes = self.projections[layer][KEYS], self.sizes.get(layer)
        for start in range(PADDING_SLOT + 1, keys.shape[0], rows):
            some = slice(start, start + rows)
            differs = (hash_codes(keys[some], projection) != self.codes[layer][some]).any(dim=-1)
            if sizes is not None:
                differs |= hash_sizes(keys[some], projection) != sizes[some]
            wrong += int(differs.any(dim=-1).sum())
        return wrong


def code_bytes_per_token(layers: int, kv_heads: int, bits: int, sized: bool) -> int:
    return layers * kv_heads * (bits // 8 + 2 * sized)
