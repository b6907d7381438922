"""How a layer's decode is computed: by the specification on a CPU, by kernels on a GPU."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from hata_kernels.attend import attend
from hata_kernels.costs import measure_costs
from hata_kernels.decode import hata_decode_step
from hata_kernels.plan import plan_step
from hata_kernels.reference import Budget, hata_decode
from hata_kernels.workspace import SLOT_BITS, DecodeWorkspace
from sglang_hata import compat

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from torch import Tensor

    from sglang_hata.backend import HataBackend

logger = logging.getLogger(__name__)

SHORTEST_ROOM = 1024  # tokens that the first eager buffers hold, a multiple of every alignment in them


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


class Decoder(Protocol):
    """What `HataBackend` asks for, in this order."""

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
            selection=config.selection,
            layer=layer.layer_id,
            size_cache=codes.sizes.get(layer.layer_id),
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
            [codes.sizes.get(layer) for layer in layers],
            q_heads=self.q_heads,
            dtype=self.dtype,
            max_context=self.max_context,
            scoring=backend.config.scoring,
            selection=backend.config.selection,
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
            layer=layer.layer_id,
            size_cache=backend.codes.sizes.get(layer.layer_id),
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
            selection=self.backend.config.selection,
        )

    def _verify(self, q: Tensor, layer: int, batch: ForwardBatch) -> None:
        """Compares what the kernels selected with the oracle, on the host."""
        backend, H = self.backend, self.backend.codes.kv_heads
        slots = backend.slots_of(batch)
        selected = []
        for b, (request, kept) in enumerate(zip(slots, self.room.kept.tolist(), strict=False)):
            chosen = self.room.slots[b * H : (b + 1) * H, :kept] & (1 << SLOT_BITS) - 1
            if kept == len(request):
                chosen = request.expand(H, -1)
            selected.append(torch.stack([torch.isin(request, row).nonzero().squeeze(1) for row in chosen]))
        backend.check_selections(layer, q, slots, selected)
