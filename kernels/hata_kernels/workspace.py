"""Buffers of a decode step, allocated once: under CUDA graphs every address stays what it was at capture."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import triton
from torch import Tensor

from hata_kernels.launch import multiprocessors
from hata_kernels.reference import HAMMING, SAMPLED, WORD_BITS, bins_of, magnitudes

# Query heads of a KV head, at most.
MAX_GROUP = 16
# Numbers that describe a piece of work.
PIECE = 8
# Counts of a share are int16.
MAX_SHARE = 2**15 - 1
# Tokens in the smallest piece of work of the attention kernel, for few requests and for more.
FEW_MIN_CHUNK, MIN_CHUNK = 128, 64
# Programs of the score kernel for every multiprocessor, where there is little to do and where there is much, and of the
# attention kernel, over what is selected for few requests and for more, and over all tokens. A multiprocessor has room
# for more, but those that find no work cost the others time.
FEW_SHARES, MANY_SHARES, FEW_CHUNKS, MORE_CHUNKS, CHUNKS = 1, 2, 1, 3, 2
# Batches up to this size have few tokens to score and to attend to: the work is cut otherwise than for larger ones.
FEW_REQUESTS = 3
# Warps of the compaction, each a program, for every multiprocessor, which has room for 32.
COMPACT_PROGRAMS = 30
# A selected slot holds in its upper bits how often it is doubled (`reference.doublings`).
SLOT_BITS = 27
# Warps of a score program, for few requests and for more, and code words that a warp holds at a time: 16 registers for
# each thread.
SCORE_WARPS, FEWER_WARPS = 16, 8
TILE_WORDS = 32 * 16
# Bytes of shared memory for the score kernel's histogram. With what Triton takes for tiles it must stay below 48 KiB,
# the most that a launch gets unasked: Triton asks for what it takes itself, and knows nothing of this.
HISTOGRAM_BYTES = 8 * 1024
# Batches up to this size share one compiled kernel.
SMALL_BATCH = 16


@dataclass(frozen=True)
class Shares:
    """How the score kernel's work is cut for a batch.

    Attributes:
        few, many: programs, where there is little to do and where there is much.
        warps: of a program.
        block: tokens that it reads at a time; a share is a multiple of it.
        longest: the most tokens of a share.
    """

    few: int
    many: int
    warps: int
    block: int

    @property
    def longest(self) -> int:
        return MAX_SHARE // self.block * self.block


@dataclass(frozen=True)
class Grid:
    """How many programs each kernel has, and how small a piece of work may be; from the sizes of the buffers alone.

    Attributes:
        few_requests, more_requests: the score kernel's, for batches up to FEW_REQUESTS and for larger ones.
        few_chunks, more_chunks, chunks: programs of the attention kernel.
        head_block: KV heads that a program of the score kernel works on, a power of two.
        compact: programs of the compaction for each KV head.
    """

    few_requests: Shares
    more_requests: Shares
    few_chunks: int
    more_chunks: int
    chunks: int
    head_block: int
    compact: int

    @classmethod
    def of(cls, kv_heads: int, words: int, bins: int, device: torch.device) -> Grid:
        n = multiprocessors(device)
        heads = triton.next_power_of_2(kv_heads)
        head_block = min(heads, HISTOGRAM_BYTES // (4 * bins))
        compact = max(COMPACT_PROGRAMS * n // kv_heads, 1)
        few = FEW_SHARES * n
        # No more than the compaction has programs for at once, if that does not leave the score kernel too few.
        many = max(few, min(MANY_SHARES * n, compact))

        def block(warps: int) -> int:
            return max(16, warps * TILE_WORDS // (head_block * min(words, 4)))

        return cls(
            few_requests=Shares(few, few, SCORE_WARPS, block(SCORE_WARPS)),
            more_requests=Shares(few, many, FEWER_WARPS, block(FEWER_WARPS)),
            few_chunks=FEW_CHUNKS * n,
            more_chunks=MORE_CHUNKS * n,
            chunks=CHUNKS * n,
            head_block=head_block,
            compact=compact,
        )

    def shares(self, batch: int) -> Shares:
        return self.few_requests if batch <= FEW_REQUESTS else self.more_requests

    def has_long_chunks(self, kv_heads: int, batch: int) -> bool:
        """Whether (request, KV head) pairs make about one program of the attention kernel each, without being cut."""
        return self.chunks <= 2 * batch * kv_heads <= 2 * self.chunks

    def selected_chunks(self, kv_heads: int, batch: int) -> int:
        if batch <= FEW_REQUESTS:
            return self.few_chunks
        return self.chunks if self.has_long_chunks(kv_heads, batch) else self.more_chunks

    @staticmethod
    def min_chunk(batch: int) -> int:
        return FEW_MIN_CHUNK if batch <= FEW_REQUESTS else MIN_CHUNK

    def pieces(self, kv_heads: int, batch: int, tokens: int) -> tuple[int, int, int]:
        """The most shares, chunks and chunks of all tokens that `plan.plan_kernel` cuts a batch of so many requests and
        tokens into."""
        cut = self.shares(batch)
        shares = max(cut.many, cut.few + batch) + tokens // cut.longest
        chunks, all_chunks = (-(-n // kv_heads) + batch for n in (self.selected_chunks(kv_heads, batch), self.chunks))
        return shares, chunks, all_chunks


@dataclass(frozen=True)
class DecodeWorkspace:
    """Scratch of one layer's decode step, shared by all layers and all batch sizes up to ``max_batch``.

    Attributes:
        planes: [B, H, 1 + P, W] int32, what each bit of a code is worth to the queries.
        ranks: [B, H, stride] uint8, int16 with more than 256 bins: a rank for each cached token, as drawn.
        histogram: [B, H, bins] int32, tokens of each rank; cleared when the step's queries are hashed.
        share_counts: [shares, H, bins] int16: tokens of each rank or a lower one in a share.
        slots: [B * H, max_kept] int32, the selected ones in order of position, their doublings from bit SLOT_BITS on.
        partial: [pieces, G, Dv] float32, attention over a chunk; partial_lse: [pieces, G], log2 of its softmax sum.
        arrivals: [B * H] int32, chunks that are done. Zero between steps.
        kept: [B] int32, tokens that each request attends to; shares, chunks, all_chunks: [pieces, 8] int32, the work of
            each program, all_chunks that of a layer that attends to everything. Written by `plan.plan_step`.
        grid: programs of each kernel.
        max_context: the longest context.
        scoring: how queries are compared with codes of keys.
        selection: `reference.SAMPLED` or `reference.TOP`.
    """

    planes: Tensor
    ranks: Tensor
    histogram: Tensor
    share_counts: Tensor
    slots: Tensor
    partial: Tensor
    partial_lse: Tensor
    arrivals: Tensor
    kept: Tensor
    shares: Tensor
    chunks: Tensor
    all_chunks: Tensor
    grid: Grid
    max_context: int
    scoring: str
    selection: str

    @classmethod
    def allocate(
        cls,
        *,
        max_batch: int,
        q_heads: int,
        kv_heads: int,
        head_dim: int,
        bits: int,
        max_context: int,
        max_kept: int,
        device: torch.device | str,
        scoring: str = HAMMING,
        selection: str = SAMPLED,
    ) -> DecodeWorkspace:
        """Buffers for up to ``max_batch`` requests of up to ``max_context`` tokens.

        Args:
            head_dim: of the values.
            scoring: `reference.HAMMING` or `reference.ONE_SIDED`.
            selection: `reference.SAMPLED` or `reference.TOP`.
            max_kept: the most tokens that a KV head of one request selects (`reference.Budget.largest`).

        Raises:
            ValueError: on sizes that the kernels have no form for.
        """
        device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0", as tensors report it
        G, W = q_heads // kv_heads, bits // WORD_BITS
        if q_heads % kv_heads or W not in (2, 4, 8) or not 1 <= G <= MAX_GROUP:
            raise ValueError(
                f"{q_heads} query heads over {kv_heads} KV heads, {bits} bits: expected 1 to {MAX_GROUP} query heads"
                " for each KV head, and 64, 128 or 256 bits"
            )
        bins = bins_of(G, bits, scoring)
        grid = Grid.of(kv_heads, W, bins, device)
        rows = max_batch * kv_heads
        # A smaller batch may be cut into more chunks than a larger one.
        pieces = [grid.pieces(kv_heads, batch, batch * max_context) for batch in range(1, max_batch + 1)]
        shares, *chunk_lists = map(max, zip(*pieces, strict=True))
        chunks = max(chunk_lists)
        # Whole blocks are written and read, beyond the last token too.
        block = max(grid.few_requests.block, grid.more_requests.block)
        stride = -(-max_context // block) * block

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            planes=zeros(max_batch, kv_heads, 1 + magnitudes(G, scoring).bit_length(), W),
            ranks=zeros(max_batch, kv_heads, stride, dtype=torch.uint8 if bins <= 256 else torch.int16),
            histogram=zeros(max_batch, kv_heads, bins),
            share_counts=zeros(shares, kv_heads, bins, dtype=torch.int16),
            slots=zeros(rows, max(max_kept, 1)),
            partial=zeros(chunks * kv_heads, G, head_dim, dtype=torch.float32),
            partial_lse=zeros(chunks * kv_heads, G, dtype=torch.float32),
            arrivals=zeros(rows),
            kept=zeros(max_batch),
            shares=zeros(shares, PIECE),
            chunks=zeros(chunks, PIECE),
            all_chunks=zeros(chunks, PIECE),
            grid=grid,
            max_context=max_context,
            scoring=scoring,
            selection=selection,
        )

    @property
    def max_batch(self) -> int:
        return self.ranks.shape[0]

    @property
    def kv_heads(self) -> int:
        return self.ranks.shape[1]

    @property
    def group(self) -> int:
        return self.partial.shape[1]

    @property
    def max_kept(self) -> int:
        return self.slots.shape[1]

    @property
    def bins(self) -> int:
        return self.histogram.shape[2]

    @property
    def device(self) -> torch.device:
        return self.ranks.device

    def pieces(self, batch: int) -> tuple[int, int, int]:
        """The most shares, chunks and chunks of all tokens of a step of ``batch`` requests."""
        return self.grid.pieces(self.kv_heads, batch, batch * self.max_context)

    def batch_block(self, batch: int) -> int:
        """The power of two that kernels compiled for ``batch`` requests search among."""
        return triton.next_power_of_2(SMALL_BATCH if batch <= SMALL_BATCH else self.max_batch)

    def nbytes(self) -> int:
        """Bytes of all buffers together."""
        buffers = (getattr(self, field.name) for field in fields(self))
        return sum(buffer.nbytes for buffer in buffers if isinstance(buffer, Tensor))
