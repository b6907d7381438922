"""Buffers of a decode step, allocated once: under CUDA graphs every address stays what it was at capture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from hata_kernels.launch import PROGRAMS_PER_MULTIPROCESSOR, multiprocessors
from hata_kernels.reference import WORD_BITS
from hata_kernels.score import MAX_RANK, bins_of

# Rows of ranks start on 32-byte boundaries, so that loads are as wide as they can be.
RANK_ALIGNMENT = 16
INT32_MAX = 2**31 - 1


@dataclass(frozen=True)
class DecodeWorkspace:
    """Scratch of one layer's decode step, shared by all layers and all batch sizes up to ``max_batch``.

    Attributes:
        q_codes: [B, Hq, W] int32, codes of the queries.
        ranks: [B, H, stride] int16, a rank for each cached token.
        histogram: [B, H, bins] int32, tokens of each rank.
        thresholds: [B * H * 2] int32, the rank at the cut and how many tokens of that rank are kept.
        counts: int32, two for each part into which selection splits a (request, KV head).
        indptr: [B * H + 1] int32: where each (request, KV head) begins in ``indices``.
        indices: int32, rows of the [S * H] view of the KV pool, in order of position.
    """

    q_codes: Tensor
    ranks: Tensor
    histogram: Tensor
    thresholds: Tensor
    counts: Tensor
    indptr: Tensor
    indices: Tensor

    @classmethod
    def allocate(
        cls,
        *,
        max_batch: int,
        q_heads: int,
        kv_heads: int,
        bits: int,
        max_context: int,
        max_kept: int,
        device: torch.device | str,
        max_indices: int | None = None,
    ) -> DecodeWorkspace:
        """Buffers for up to ``max_batch`` requests of up to ``max_context`` tokens.

        Args:
            max_kept: the most tokens a KV head of one request attends to (`reference.Budget.largest`).
            max_indices: tokens attended to in one step, over all requests and KV heads; when None, enough for
                every request to keep ``max_kept``.

        Raises:
            ValueError: on sizes that the kernels cannot index.
        """
        device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0", as tensors report it
        bins = bins_of(q_heads // kv_heads, bits)
        if q_heads % kv_heads or bits % WORD_BITS or bins - 1 > MAX_RANK:
            raise ValueError(f"{q_heads} query heads, {kv_heads} KV heads, {bits} bits: no kernel for these")
        rows = max_batch * kv_heads
        size = rows * max_kept if max_indices is None else max_indices
        if size > INT32_MAX:
            raise ValueError(f"{size} selected tokens a step, at most {INT32_MAX}: lower budget or batch")
        stride = -(-max_context // RANK_ALIGNMENT) * RANK_ALIGNMENT
        # `launch.splits_of` never gives rows programs beyond the next multiple of rows.
        parts = PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(device) + rows

        def int32(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        return cls(
            q_codes=int32(max_batch, q_heads, bits // WORD_BITS),
            ranks=torch.zeros((max_batch, kv_heads, stride), dtype=torch.int16, device=device),
            histogram=int32(max_batch, kv_heads, bins),
            thresholds=int32(rows * 2),
            counts=int32(parts * 2),
            indptr=int32(rows + 1),
            indices=int32(size),
        )

    @property
    def max_batch(self) -> int:
        return self.q_codes.shape[0]

    @property
    def q_heads(self) -> int:
        return self.q_codes.shape[1]

    @property
    def kv_heads(self) -> int:
        return self.ranks.shape[1]

    @property
    def max_context(self) -> int:
        return self.ranks.shape[2]

    @property
    def device(self) -> torch.device:
        return self.ranks.device

    def nbytes(self) -> int:
        """Bytes of all buffers together."""
        return sum(getattr(self, field.name).nbytes for field in fields(self))

    def set_kept(self, k_lens: Tensor | Sequence[int], batch: int | None = None) -> Tensor:
        """Write ``indptr`` for requests that keep ``k_lens`` tokens each; once a step, outside CUDA graphs.

        Args:
            k_lens: on the host, the same numbers as on the device: tokens kept by each request.
            batch: rows of the batch when it is padded; padded rows keep one token.

        Returns:
            The first batch * H + 1 entries of ``indptr``, int32 on the host.

        Raises:
            ValueError: if the batch or the tokens it keeps exceed the buffers.
        """
        kept = torch.as_tensor(k_lens, dtype=torch.int64, device="cpu")
        B = len(kept) if batch is None else batch
        if not len(kept) <= B <= self.max_batch:
            raise ValueError(f"{len(kept)} requests in a batch of {B}, workspace for {self.max_batch}")
        if len(kept) < B:
            kept = torch.cat([kept, torch.ones(B - len(kept), dtype=torch.int64)])
        rows = kept.repeat_interleave(self.kv_heads)
        total = int(rows.sum())
        if total > self.indices.numel() or (B and int(kept.min()) < 1):
            raise ValueError(
                f"requests keep {kept.tolist()} tokens for each of {self.kv_heads} KV heads: expected at"
                f" least 1 each, {self.indices.numel()} altogether (max_kept or max_indices of the workspace)"
            )
        host = torch.zeros(len(rows) + 1, dtype=torch.int32)
        torch.cumsum(rows, dim=0, out=host[1:])
        self.indptr[: len(host)].copy_(host, non_blocking=True)
        return host
