"""HATA's decode attention for SGLang. This file is the method; the rest of the package serves it.

SGLang runs prefill on a dense backend of its own and hands every decode step to `HataBackend`. A step looks at the
context lengths once, then each layer hashes its queries, picks slots by Hamming distance and attends to those. The
first layers, and batches of short contexts, go to a dense backend.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

from hata_kernels.attend import SparseDecode
from hata_kernels.decode import select_tokens
from hata_kernels.reference import hash_codes, hata_decode
from hata_kernels.workspace import DecodeWorkspace
from sglang_hata import compat
from sglang_hata.code_cache import PADDING_SLOT
from sglang_hata.config import HataError
from sglang_hata.verify import wrong_selections

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from torch import Tensor

logger = logging.getLogger(__name__)

SHORTEST_ROOM = 1024  # tokens that the first eager buffers hold, a multiple of every alignment in them


class SparseDecoder(Protocol):
    """How a layer's sparse decode is computed: by the specification on a CPU, by kernels on a GPU."""

    def plan(self, step: Step, in_graph: bool) -> None:
        """Once a step, before its first layer, on the host."""
        ...

    def keep_on_device(self, batch: ForwardBatch) -> None:
        """Once a step, before its first layer, on the device."""
        ...

    def decode(self, q: Tensor, k: Tensor, v: Tensor, layer: RadixAttention, batch: ForwardBatch) -> Tensor:
        """Stores k and v with their codes, then attends: q [B, Hq, D] -> [B, Hq, Dv]."""
        ...


@dataclass(frozen=True)
class Step:
    """What a decode step knows before its first layer.

    Args:
        lengths: context length of each row of the batch, the current token included; 1 for a padding row.
        kept: tokens that each KV head attends to.
        captured: the step is being recorded into a CUDA graph, which will serve all lengths.
    """

    lengths: list[int]
    kept: list[int]
    captured: bool = False

    @property
    def is_dense(self) -> bool:
        return self.lengths == self.kept and not self.captured


class HataBackend(AttentionBackend):
    """SGLang's decode backend under ``--hata``.

    Args:
        runner: SGLang's ModelRunner.

    Raises:
        HataError: the KV pool has no codes, or a hook of the plugin was not applied.
    """

    needs_cpu_seq_lens = True  # a step's budget is planned on the host

    def __init__(self, runner: Any) -> None:
        super().__init__()
        compat.check_hooks_applied()
        self.pool = runner.token_to_kv_pool
        if getattr(self.pool, "codes", None) is None:
            raise HataError(f"--hata cannot run on the KV pool {type(self.pool).__name__}: remove --hata.")
        self.codes = self.pool.codes
        self.state = self.pool.state
        self.config = self.state.config
        self.budget = self.config.budget_rule()
        self.slot_table = runner.req_to_token_pool.req_to_token
        self.dense = compat.dense_backend(runner)
        self.layers = self.pool.layer_num
        self.sparse: SparseDecoder = KernelDecoder(self, runner) if self.slot_table.is_cuda else SpecifiedDecoder(self)
        self.step = Step([], [])
        self.checked = False
        if compat.tensor_parallel()[0] == 0:
            logger.info("%s", self.describe())

    def describe(self) -> str:
        """One line for the log: what is active, and what it costs."""
        config, codes = self.config, self.codes
        kv_bytes = sum(self.pool.get_kv_size_bytes()) - codes.size_bytes()
        share = 100 * codes.size_bytes() / kv_bytes
        source = "an untrained rotation" if config.weights == "none" else config.weights
        return (
            f"HATA is active: budget {config.budget} a KV head for contexts above {config.min_context} tokens "
            f"(sink {config.sink}, recent {config.recent}), layers {codes.first_layer} to {self.layers - 1} of "
            f"{self.layers}, {codes.bits}-bit codes from {source}: {codes.bytes_per_token} bytes a token, "
            f"{share:.1f} % of K and V."
        )

    # --- Once a step ---------------------------------------------------------------------------------------------

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Without CUDA graphs."""
        self.dense.init_forward_metadata(forward_batch)
        if forward_batch.forward_mode.is_decode():
            self._plan(forward_batch)
            self.sparse.keep_on_device(forward_batch)

    def init_forward_metadata_out_graph(self, forward_batch: ForwardBatch, in_capture: bool = False) -> None:
        """Before a CUDA graph is captured, and before each replay."""
        self.dense.init_forward_metadata_out_graph(forward_batch, in_capture=in_capture)
        if forward_batch.forward_mode.is_decode():
            self._plan(forward_batch, in_capture, in_graph=True)

    def init_forward_metadata_in_graph(self, forward_batch: ForwardBatch) -> None:
        """On the device, inside the graph if there is one."""
        self.dense.init_forward_metadata_in_graph(forward_batch)
        if forward_batch.forward_mode.is_decode():
            self.sparse.keep_on_device(forward_batch)

    def _plan(self, batch: ForwardBatch, captured: bool = False, in_graph: bool = False) -> None:
        lengths = batch.seq_lens_cpu[: batch.batch_size].tolist()
        self.step = Step(lengths, [self.budget.of(length) for length in lengths], captured)
        selects = self.selects or in_graph
        if selects:
            self.sparse.plan(self.step, in_graph)
        if not captured:
            if not self.checked:
                self._check_codes(batch)
            self._count(selects)

    def _check_codes(self, batch: ForwardBatch) -> None:
        """At the first decode step of a real request: have its keys come with their codes?"""
        slots = self.slots_of(batch)[0][:-1]  # the current token's key is still to come
        slots = slots[slots != PADDING_SLOT]  # which is all that SGLang's own dummy batches have
        if len(slots) > 0:
            self.codes.require_fresh(slots, self.pool.get_key_buffer)
            self.checked = True

    @property
    def selects(self) -> bool:
        """Whether this step selects tokens. Under --hata-verify all do, also those that keep every token."""
        return self.config.verify or not self.step.is_dense

    def _count(self, selects: bool) -> None:
        rows = [row for row in zip(self.step.lengths, self.step.kept, strict=True) if row[0] > 1]
        self.state.count_step(
            [length for length, _ in rows],
            [kept for _, kept in rows],
            self.layers,
            self.layers - len(self.codes.codes),
            self.codes.kv_heads,
        )
        if selects and isinstance(self.sparse, KernelDecoder):
            self.codes.tokens_hashed += len(rows)  # its kernels write codes without passing by the code cache

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        self.dense.init_cuda_graph_state(max_bs, max_num_tokens)
        assert isinstance(self.sparse, KernelDecoder)
        self.sparse.reserve_for_graphs(max_bs)

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        return 1

    def on_after_cuda_graph_warmup(self) -> None:
        self.dense.on_after_cuda_graph_warmup()

    # --- Once a layer --------------------------------------------------------------------------------------------

    def forward_decode(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> Tensor:
        if layer.layer_id not in self.codes.codes or not self.selects:
            return self.dense.forward_decode(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
        if not save_kv_cache or layer.is_cross_attention or layer.logit_cap:
            raise NotImplementedError(
                f"HATA cannot serve layer {layer.layer_id}: it needs plain decoder attention that caches its keys."
            )
        q = q.view(-1, layer.tp_q_head_num, layer.qk_head_dim)
        out = self.sparse.decode(q, k, v, layer, forward_batch)
        return out.view(-1, layer.tp_q_head_num * layer.v_head_dim)

    def slots_of(self, batch: ForwardBatch) -> list[Tensor]:
        """The slots of each request's cached tokens, in order of position."""
        rows = zip(batch.req_pool_indices.tolist(), self.step.lengths, strict=True)
        return [self.slot_table[row, :length].long() for row, length in rows]

    def check_selections(self, layer: int, query_codes: Tensor, slots: list[Tensor], selected: list[Tensor]) -> None:
        """For --hata-verify: compares a layer's selections with the oracle, and counts."""
        codes, config = self.codes.codes[layer], self.config
        self.state.selections_checked += len(slots) * self.codes.kv_heads
        self.state.selections_wrong += wrong_selections(
            query_codes, codes, slots, selected, self.step.kept, config.sink, config.recent
        )

    def forward_extend(self, *args: Any, **kwargs: Any) -> Tensor:
        """Never reached: SGLang gives prefill to its own backend."""
        raise NotImplementedError("HATA decodes; prefill runs on the dense backend.")

    def support_triton(self) -> bool:
        return self.dense.support_triton()


class SpecifiedDecoder:
    """The decode step by its specification, in PyTorch: how a machine without a GPU serves."""

    def __init__(self, backend: HataBackend) -> None:
        self.backend = backend

    def plan(self, step: Step, in_graph: bool) -> None:
        """The host knows all there is to know."""

    def keep_on_device(self, batch: ForwardBatch) -> None:
        """The host is the device."""

    def decode(self, q: Tensor, k: Tensor, v: Tensor, layer: RadixAttention, batch: ForwardBatch) -> Tensor:
        backend, config, codes = self.backend, self.backend.config, self.backend.codes
        backend.pool.set_kv_buffer(layer, batch.out_cache_loc, k, v)
        slots = backend.slots_of(batch)
        projection = codes.projections[layer.layer_id]
        out, selected = hata_decode(
            q,
            backend.pool.get_key_buffer(layer.layer_id),
            backend.pool.get_value_buffer(layer.layer_id),
            codes.codes[layer.layer_id],
            slots,
            projection,
            backend.budget,
            sink=config.sink,
            recent=config.recent,
            scale=layer.scaling,
        )
        if config.verify:
            backend.check_selections(layer.layer_id, hash_codes(q, projection), slots, selected)
        return out


class KernelDecoder:
    """The decode step by Triton kernels and FlashInfer, with no word between host and GPU from layer to layer.

    With CUDA graphs every buffer is as large as the largest captured batch and the longest context can make it, and
    stays where it is. Without them buffers grow with the batches that come.
    """

    attention: SparseDecode  # the one that this step was planned on
    kept: Tensor  # [B] int64 on the device: tokens that each request attends to

    def __init__(self, backend: HataBackend, runner: Any) -> None:
        self.backend = backend
        self.q_heads = runner.model_config.num_attention_heads // compat.tensor_parallel()[1]
        self.dtype = runner.dtype
        self.max_context = backend.slot_table.shape[1]
        self.graphs: SparseDecode | None = None
        self.eager: SparseDecode | None = None

    def reserve_for_graphs(self, max_batch: int) -> None:
        """Allocates, once, what the captured graphs will point to."""
        self.graphs = self._attention(max_batch, self.max_context, use_cuda_graph=True)
        megabytes = self.graphs.workspace.nbytes() / 2**20
        logger.info("HATA reserves %.0f MiB for CUDA graphs of up to %d requests.", megabytes, max_batch)

    def plan(self, step: Step, in_graph: bool) -> None:
        attention = self.graphs if in_graph else self._eager_for(step)
        assert attention is not None, "a graph is planned before reserve_for_graphs"
        attention.plan(step.kept)
        self.attention = attention

    def keep_on_device(self, batch: ForwardBatch) -> None:
        """How many tokens each request keeps, from the lengths that are on the device; recorded into graphs."""
        self.kept = self.backend.budget.of(batch.seq_lens[: batch.batch_size])

    def decode(self, q: Tensor, k: Tensor, v: Tensor, layer: RadixAttention, batch: ForwardBatch) -> Tensor:
        backend, config, codes = self.backend, self.backend.config, self.backend.codes
        slots = batch.out_cache_loc
        backend.pool.set_kv_without_codes(layer, slots, k, v)
        select_tokens(
            q,
            k.view(-1, codes.kv_heads, codes.head_dim),
            codes.codes[layer.layer_id],
            codes.projections[layer.layer_id],
            backend.slot_table,
            batch.req_pool_indices,
            batch.seq_lens,
            self.kept,
            slots,
            self.attention.workspace,
            sink=config.sink,
            recent=config.recent,
        )
        if config.verify:
            self._verify(layer.layer_id, batch)
        return self.attention.run(
            q,
            backend.pool.get_key_buffer(layer.layer_id),
            backend.pool.get_value_buffer(layer.layer_id),
            layer.scaling,
        )

    def _eager_for(self, step: Step) -> SparseDecode:
        batch, longest = len(step.lengths), max(step.lengths)
        if self.eager is not None:
            room = self.eager.workspace
            if room.max_batch >= batch and room.max_context >= longest:
                return self.eager
            batch, longest = max(batch, room.max_batch), max(longest, room.max_context)
            self.eager = None  # frees its buffers before the larger ones are taken
        doubled = min(max(1 << (longest - 1).bit_length(), SHORTEST_ROOM), self.max_context)
        self.eager = self._attention(1 << (batch - 1).bit_length(), doubled, use_cuda_graph=False)
        return self.eager

    def _attention(self, max_batch: int, max_context: int, use_cuda_graph: bool) -> SparseDecode:
        codes = self.backend.codes
        workspace = DecodeWorkspace.allocate(
            max_batch=max_batch,
            q_heads=self.q_heads,
            kv_heads=codes.kv_heads,
            bits=codes.bits,
            max_context=max_context,
            max_kept=self.backend.budget.largest(max_context),
            device=self.backend.slot_table.device,
        )
        return SparseDecode(workspace, head_dim=codes.head_dim, dtype=self.dtype, use_cuda_graph=use_cuda_graph)

    def _verify(self, layer: int, batch: ForwardBatch) -> None:
        """Compares what the kernels selected with the oracle, on the host."""
        backend, workspace = self.backend, self.attention.workspace
        step, H = backend.step, backend.codes.kv_heads
        slots = backend.slots_of(batch)
        sizes = [kept for kept in step.kept for _ in range(H)]
        rows = workspace.indices[: sum(sizes)].split(sizes)
        backend.check_selections(
            layer,
            workspace.q_codes[: len(slots)],
            slots,
            [
                torch.stack([torch.isin(request_slots, rows[b * H + h] // H).nonzero().squeeze(1) for h in range(H)])
                for b, request_slots in enumerate(slots)
            ],
        )
