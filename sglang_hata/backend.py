"""HATA's decode attention for SGLang. This file is the method; the rest of the package serves it.

SGLang runs prefill on a dense backend of its own and hands every decode step to `HataBackend`. A step looks at the
context lengths once, then each layer hashes its queries, picks slots by Hamming distance and attends to those. The
first layers, and batches of short contexts, go to a dense backend.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from hata_kernels.reference import hash_codes, hata_decode
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

from sglang_hata import compat
from sglang_hata.config import HataError
from sglang_hata.verify import wrong_selections

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from torch import Tensor

logger = logging.getLogger(__name__)


class SparseDecoder(Protocol):
    """How a layer's sparse decode is computed: by the specification on a CPU, by kernels on a GPU."""

    def decode(
        self, q: Tensor, k: Tensor, v: Tensor, layer: RadixAttention, batch: ForwardBatch
    ) -> Tensor:
        """Stores k and v with their codes, then attends: q [B, Hq, D] -> [B, Hq, Dv]."""
        ...


@dataclass(frozen=True)
class Step:
    """What a decode step knows before its first layer.

    Args:
        lengths: context length of each request, the current token included.
        kept: tokens that each KV head attends to.
    """

    lengths: list[int]
    kept: list[int]

    @property
    def is_dense(self) -> bool:
        return self.lengths == self.kept


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
        self.sparse: SparseDecoder = SpecifiedDecoder(self)
        self.step = Step([], [])
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
        self.dense.init_forward_metadata(forward_batch)
        if forward_batch.forward_mode.is_decode():
            self._plan(forward_batch)

    def _plan(self, batch: ForwardBatch) -> None:
        lengths = batch.seq_lens_cpu[: batch.batch_size].tolist()
        self.step = Step(lengths, [self.budget.of(length) for length in lengths])
        self.state.count_step(
            lengths, self.step.kept, self.layers, self.layers - len(self.codes.codes), self.codes.kv_heads
        )

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
        if layer.layer_id not in self.codes.codes or self.step.is_dense:
            return self.dense.forward_decode(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
        if not save_kv_cache or layer.is_cross_attention or layer.logit_cap:
            raise NotImplementedError(
                f"HATA cannot serve layer {layer.layer_id}: it needs plain decoder attention that caches its keys."
            )
        q = q.view(-1, layer.tp_q_head_num, layer.qk_head_dim)
        out = self.sparse.decode(q, k, v, layer, forward_batch)
        return out.view(-1, layer.tp_q_head_num * layer.v_head_dim)

    def forward_extend(self, *args: Any, **kwargs: Any) -> Tensor:
        """Never reached: SGLang gives prefill to its own backend."""
        raise NotImplementedError("HATA decodes; prefill runs on the dense backend.")

    def support_triton(self) -> bool:
        return self.dense.support_triton()


class SpecifiedDecoder:
    """The decode step by its specification, in PyTorch: how a machine without a GPU serves."""

    def __init__(self, backend: HataBackend) -> None:
        self.backend = backend

    def decode(
        self, q: Tensor, k: Tensor, v: Tensor, layer: RadixAttention, batch: ForwardBatch
    ) -> Tensor:
        backend, config = self.backend, self.backend.config
        backend.pool.set_kv_buffer(layer, batch.out_cache_loc, k, v)
        slots = [
            backend.slot_table[row, :length].long()
            for row, length in zip(batch.req_pool_indices.tolist(), backend.step.lengths, strict=True)
        ]
        projection = backend.codes.projections[layer.layer_id]
        codes = backend.codes.codes[layer.layer_id]
        out, selected = hata_decode(
            q,
            backend.pool.get_key_buffer(layer.layer_id),
            backend.pool.get_value_buffer(layer.layer_id),
            codes,
            slots,
            projection,
            backend.budget,
            sink=config.sink,
            recent=config.recent,
            scale=layer.scaling,
        )
        if config.verify:
            backend.state.selections_checked += len(slots) * codes.shape[1]
            backend.state.selections_wrong += wrong_selections(
                hash_codes(q, projection), codes, slots, selected, backend.step.kept, config.sink, config.recent
            )
        return out
