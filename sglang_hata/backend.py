"""HATA's decode attention for SGLang. This file is the method; the rest of the package serves it.

SGLang runs prefill on a dense backend of its own and hands every decode step to `HataBackend`. A step looks at the
context lengths once, then each layer hashes its queries, picks slots by Hamming distance and attends to those. The
first layers, and requests for which selection would not pay, attend to everything.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

from hata_kernels.attend import attend
from hata_kernels.costs import measure_costs
from hata_kernels.decode import hata_decode_step
from hata_kernels.launch import INTERPRETED
from hata_kernels.plan import plan_step
from hata_kernels.reference import QUERIES, Budget, bins_of, hata_decode, query_weights
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


class Decoder(Protocol):
    """How a layer's decode is computed: by the specification on a CPU, by kernels on a GPU."""

    def budget(self) -> Budget:
        """Once, at start: the rule of how many tokens to attend to."""
        ...

    def prepare(self, step: Step, in_graph: bool) -> None:
        """Once a step, before its first layer, on the host."""
        ...

    def plan(self, batch: ForwardBatch) -> None:
        """Once a step, before its first layer, on the device: how many tokens each request attends to."""
        ...

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, layer: RadixAttention, batch: ForwardBatch, sparse: bool
    ) -> Tensor:
        """Stores k and v, and codes where the layer has some, then attends: [B, Hq * D] -> [B, Hq * Dv].

        Args:
            sparse: attend to the selected tokens, not to all.
        """
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
        self.slot_table = runner.req_to_token_pool.req_to_token
        self.layers = self.pool.layer_num
        kernels = self.slot_table.is_cuda or INTERPRETED.value
        self.decoder: Decoder = KernelDecoder(self, runner) if kernels else SpecifiedDecoder(self, runner)
        self.budget = self.decoder.budget()
        self.state.costs = self.budget.costs
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
        costs = self.budget.costs
        above = f"contexts above {max(self.budget.min_context, self.budget.tokens, self.budget.floor)} tokens"
        if costs is not None:
            above = (
                f"batches in which that saves time (measured a layer: {costs.attend} ps for a token attended to, "
                f"{costs.score} for one scored, {costs.fixed / 1e6:.1f} us a step)"
            )
        return (
            f"HATA is active: budget {config.budget} a KV head for {above} "
            f"(sink {config.sink}, recent {config.recent}), layers {codes.first_layer} to {self.layers - 1} of "
            f"{self.layers}, {codes.bits}-bit codes from {source}: {codes.bytes_per_token} bytes a token, "
            f"{share:.1f} % of K and V."
        )

    # --- Once a step ---------------------------------------------------------------------------------------------

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Without CUDA graphs."""
        if forward_batch.forward_mode.is_decode():
            self._plan(forward_batch)
            self.decoder.plan(forward_batch)

    def init_forward_metadata_out_graph(self, forward_batch: ForwardBatch, in_capture: bool = False) -> None:
        """Before a CUDA graph is captured, and before each replay."""
        if forward_batch.forward_mode.is_decode():
            self._plan(forward_batch, in_capture, in_graph=True)

    def init_forward_metadata_in_graph(self, forward_batch: ForwardBatch) -> None:
        """On the device, inside the graph if there is one."""
        if forward_batch.forward_mode.is_decode():
            self.decoder.plan(forward_batch)

    def _plan(self, batch: ForwardBatch, captured: bool = False, in_graph: bool = False) -> None:
        lengths = batch.seq_lens_cpu[: batch.batch_size].tolist()
        self.step = Step(lengths, self.budget.plan(torch.tensor(lengths)).tolist(), captured)
        self.decoder.prepare(self.step, in_graph)
        if not captured:
            if not self.checked:
                self._check_codes(batch)
            self._count(self.selects or in_graph)

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
        if selects and isinstance(self.decoder, KernelDecoder):
            self.codes.tokens_hashed += len(rows)  # its kernels write codes without passing by the code cache

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        assert isinstance(self.decoder, KernelDecoder)
        self.decoder.reserve_for_graphs(max_bs)

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        return 1

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
        if not save_kv_cache or layer.is_cross_attention or layer.logit_cap:
            raise NotImplementedError(
                f"HATA cannot serve layer {layer.layer_id}: it needs plain decoder attention that caches its keys."
            )
        sparse = layer.layer_id in self.codes.codes and self.selects
        return self.decoder.attend(q, k, v, layer, forward_batch, sparse)

    def slots_of(self, batch: ForwardBatch) -> list[Tensor]:
        """The slots of each request's cached tokens, in order of position."""
        rows = zip(batch.req_pool_indices.tolist(), self.step.lengths, strict=True)
        return [self.slot_table[row, :length].long() for row, length in rows]

    def check_selections(self, layer: int, q: Tensor, slots: list[Tensor], selected: list[Tensor]) -> None:
        """For --hata-verify: compares a layer's selections with the oracle, and counts."""
        codes, config = self.codes.codes[layer], self.config
        weights = query_weights(q, self.codes.projections[layer][QUERIES], config.scoring)
        farthest = bins_of(q.shape[1] // self.codes.kv_heads, self.codes.bits, config.scoring) - 3
        self.state.selections_checked += len(slots) * self.codes.kv_heads
        self.state.selections_wrong += wrong_selections(
            weights, codes, slots, selected, self.step.kept, config.sink, config.recent, farthest
        )

    def forward_extend(self, *args: Any, **kwargs: Any) -> Tensor:
        """Never reached: SGLang gives prefill to its own backend."""
        raise NotImplementedError("HATA decodes; prefill runs on the dense backend.")

    def support_triton(self) -> bool:
        return self.slot_table.is_cuda


class SpecifiedDecoder:
    """The decode step by its specification, in PyTorch: how a machine without a GPU serves. What attends to everything
    goes to SGLang's own backend."""

    def __init__(self, backend: HataBackend, runner: Any) -> None:
        self.backend = backend
        self.dense = compat.dense_backend(runner)

    def budget(self) -> Budget:
        """Without costs: nobody serves in earnest on a CPU."""
        return self.backend.config.budget_rule()

    def prepare(self, step: Step, in_graph: bool) -> None:
        """The host knows all there is to know."""

    def plan(self, batch: ForwardBatch) -> None:
        """The host is the device."""
        self.dense.init_forward_metadata(batch)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, layer: RadixAttention, batch: ForwardBatch, sparse: bool
    ) -> Tensor:
        if not sparse:
            return self.dense.forward_decode(q, k, v, layer, batch)
        backend, config, codes = self.backend, self.backend.config, self.backend.codes
        q = q.view(-1, layer.tp_q_head_num, layer.qk_head_dim)
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
            scoring=config.scoring,
        )
        if config.verify:
            backend.check_selections(layer.layer_id, q, slots, selected)
        return out.flatten(1)


class KernelDecoder:
    """The decode step by kernels, with no word between host and GPU from layer to layer. Under Triton's interpreter
    (TRITON_INTERPRET=1) also on a CPU, to see the kernels serve where there is no GPU.

    With CUDA graphs every buffer is as large as the largest captured batch and the longest context can make it, and
    stays where it is. Without them buffers grow with the batches that come.
    """

    room: DecodeWorkspace  # the one that this step works in

    def __init__(self, backend: HataBackend, runner: Any) -> None:
        self.backend = backend
        self.q_heads = runner.model_config.num_attention_heads // compat.tensor_parallel()[1]
        self.dtype = runner.dtype
        self.max_context = backend.slot_table.shape[1]
        self.graphs: DecodeWorkspace | None = None
        self.eager: DecodeWorkspace | None = None

    def budget(self) -> Budget:
        backend, codes = self.backend, self.backend.codes
        rule = backend.config.budget_rule()
        if backend.config.min_context is not None or not backend.slot_table.is_cuda:
            return rule
        layers = list(codes.codes)
        costs = measure_costs(
            [backend.pool.get_key_buffer(layer) for layer in layers],
            [backend.pool.get_value_buffer(layer) for layer in layers],
            [codes.codes[layer] for layer in layers],
            [codes.projections[layer] for layer in layers],
            q_heads=self.q_heads,
            dtype=self.dtype,
            max_context=self.max_context,
            scoring=backend.config.scoring,
        )
        return backend.config.budget_rule(costs)

    def reserve_for_graphs(self, max_batch: int) -> None:
        """Allocates, once, what the captured graphs will point to."""
        self.graphs = self._workspace(max_batch, self.max_context)
        megabytes = self.graphs.nbytes() / 2**20
        logger.info("HATA reserves %.0f MiB for CUDA graphs of up to %d requests.", megabytes, max_batch)

    def prepare(self, step: Step, in_graph: bool) -> None:
        room = self.graphs if in_graph else self._eager_for(step)
        assert room is not None, "a graph is planned before reserve_for_graphs"
        self.room = room

    def plan(self, batch: ForwardBatch) -> None:
        B = batch.batch_size
        plan_step(batch.seq_lens[:B], batch.req_pool_indices[:B], self.room, self.backend.budget)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, layer: RadixAttention, batch: ForwardBatch, sparse: bool
    ) -> Tensor:
        backend, pool, slots = self.backend, self.backend.pool, batch.out_cache_loc
        q = q.view(-1, layer.tp_q_head_num, layer.qk_head_dim)
        k = k.view(-1, layer.tp_k_head_num, layer.qk_head_dim)
        v = v.view(-1, layer.tp_v_head_num, layer.v_head_dim)
        k_pool, v_pool = pool.get_key_buffer(layer.layer_id), pool.get_value_buffer(layer.layer_id)
        quantised = k_pool.dtype != k.dtype
        k_scale = (layer.k_scale_float or 1.0) if quantised else 1.0
        v_scale = (layer.v_scale_float or 1.0) if quantised else 1.0
        if not sparse:
            pool.set_kv_buffer(layer, slots, k, v, layer.k_scale, layer.v_scale)
            pools = k_pool, v_pool, backend.slot_table
            room, scale = self.room, layer.scaling
            return attend(q, *pools, room, scale, everything=True, k_scale=k_scale, v_scale=v_scale).flatten(1)
        if quantised:
            pool.set_kv_without_codes(layer, slots, k, v)
        out = hata_decode_step(
            q,
            k,
            v,
            k_pool,
            v_pool,
            backend.codes.codes[layer.layer_id],
            backend.codes.projections[layer.layer_id],
            backend.slot_table,
            slots,
            self.room,
            sink=backend.config.sink,
            recent=backend.config.recent,
            scale=layer.scaling,
            store_kv=not quantised,
            k_scale=k_scale,
            v_scale=v_scale,
        )
        if backend.config.verify:
            self._verify(q, layer.layer_id, batch)
        return out.flatten(1)

    def _eager_for(self, step: Step) -> DecodeWorkspace:
        batch, longest = len(step.lengths), max(step.lengths)
        room = self.eager
        if room is not None:
            if room.max_batch >= batch and room.max_context >= longest:
                return room
            batch, longest = max(batch, room.max_batch), max(longest, room.max_context)
            self.eager = room = None  # frees its buffers before the larger ones are taken
        doubled = min(max(1 << (longest - 1).bit_length(), SHORTEST_ROOM), self.max_context)
        self.eager = self._workspace(1 << (batch - 1).bit_length(), doubled)
        return self.eager

    def _workspace(self, max_batch: int, max_context: int) -> DecodeWorkspace:
        codes = self.backend.codes
        return DecodeWorkspace.allocate(
            max_batch=max_batch,
            q_heads=self.q_heads,
            kv_heads=codes.kv_heads,
            head_dim=codes.head_dim,
            bits=codes.bits,
            max_context=max_context,
            max_kept=self.backend.budget.largest(max_context),
            device=self.backend.slot_table.device,
            scoring=self.backend.config.scoring,
        )

    def _verify(self, q: Tensor, layer: int, batch: ForwardBatch) -> None:
        """Compares what the kernels selected with the oracle, on the host."""
        backend, H = self.backend, self.backend.codes.kv_heads
        slots = backend.slots_of(batch)
        selected = []
        for b, (request, kept) in enumerate(zip(slots, self.room.kept.tolist(), strict=False)):
            chosen = self.room.slots[b * H : (b + 1) * H, :kept]
            if kept == len(request):
                chosen = request.expand(H, -1)
            selected.append(torch.stack([torch.isin(request, row).nonzero().squeeze(1) for row in chosen]))
        backend.check_selections(layer, q, slots, selected)
