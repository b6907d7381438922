"""HATA's decode attention for SGLang. This file is the method; the rest of the package serves it.

SGLang runs prefill on a dense backend of its own and hands every decode step to `HataBackend`. A step looks at the
context lengths once, then each layer hashes its queries, picks slots by Hamming distance and attends to those. The
first layers, and requests for which selection would not pay, attend to everything. What computes a layer is a decoder:
the specification on a CPU, kernels on a GPU.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

from hata_kernels.launch import INTERPRETED
from hata_kernels.reference import QUERIES, SAMPLED, bins_of, query_weights
from hata_kernels.workspace import SLOT_BITS
from sglang_hata import compat
from sglang_hata.code_cache import PADDING_SLOT
from sglang_hata.config import HataError
from sglang_hata.decoders import Decoder, KernelDecoder, SpecifiedDecoder, Step
from sglang_hata.projections import untrained_layers
from sglang_hata.verify import wrong_selections

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from torch import Tensor

logger = logging.getLogger(__name__)


class HataBackend(AttentionBackend):
    """SGLang's decode backend under ``--hata``.

    Args:
        runner: SGLang's ModelRunner.

    Raises:
        HataError: the KV pool has no codes, or a hook of the plugin was not applied.
    """

    needs_cpu_seq_lens = True  # what a step attends to is counted on the host, and planned there too without a GPU

    def __init__(self, runner: Any) -> None:
        super().__init__()
        compat.check_hooks_applied()
        self.pool = runner.token_to_kv_pool
        if getattr(self.pool, "codes", None) is None:
            raise HataError(f"--hata cannot run on the KV pool {type(self.pool).__name__}: remove --hata.")
        self.codes = self.pool.codes
        if (slots := len(self.pool.get_key_buffer(self.codes.first_layer))) > 1 << SLOT_BITS:
            raise HataError(
                f"The KV pool has {slots} slots, and HATA at most {1 << SLOT_BITS}: lower --max-total-tokens."
            )
        self.state = self.pool.state
        self.config = self.state.config
        self.untrained = untrained_layers(self.config, runner.model_config)
        # Every layer reads it, where SGLang's own backends copy what they need before the first; and SGLang's scheduler
        # writes to it while a step runs. That changes no answer: it writes beyond the length of a running request, to
        # rows of requests that have ended, and slots that hold the same keys, values and codes as those they replace.
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
        if config.weights != "none" and self.untrained:
            source += f" (layers before {self.untrained.stop}: an untrained rotation)"
        sizes = " and sizes of keys" if codes.sizes else ""
        costs = self.budget.costs
        above = f"contexts above {max(self.budget.min_context, self.budget.tokens, self.budget.floor)} tokens"
        if costs is not None:
            above = (
                f"batches in which that saves time (measured a layer: {costs.attend} ps for a token attended to, "
                f"{costs.score} for one scored, {costs.fixed / 1e6:.1f} us a step)"
            )
        least = f" (at least {self.budget.floor} tokens)" if self.budget.share_ppm else ""
        return (
            f"HATA is active: budget {config.budget}{least} a KV head for {above} "
            f"(sink {config.sink}, recent {config.recent}, {config.selection}), "
            f"layers {codes.first_layer} to {self.layers - 1} of {self.layers}, "
            f"{codes.bits}-bit codes{sizes} from {source}: {codes.bytes_per_token} bytes a token, "
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
        for what, there in self._beyond_plain(layer, save_kv_cache, kwargs):
            if there:
                raise HataError(f"--hata cannot serve layer {layer.layer_id}: it {what}; remove --hata.")
        sparse = layer.layer_id in self.codes.codes and self.selects
        return self.decoder.attend(q, k, v, layer, forward_batch, sparse)

    def _beyond_plain(self, layer: RadixAttention, caches: bool, extras: dict[str, Any]) -> Iterator[tuple[str, bool]]:
        """What a layer may ask for beyond softmax over all of its own cached tokens, and whether it does.

        `refusals.check_model` knows most of this from the configuration of a model, before it is loaded; the layers
        themselves know all of it."""
        yield "does not cache its keys by the KV pool", not caches
        yield "is cross-attention", layer.is_cross_attention
        yield "attends to a sliding window", 0 <= layer.sliding_window_size < self.slot_table.shape[1]
        yield "caps attention logits", bool(layer.logit_cap)
        yield "scales attention logits by position", layer.xai_temperature_len > 0
        for name, value in extras.items():
            yield f"needs {name}", value is not None and value is not False

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
        lucky = layer if config.selection == SAMPLED else None
        sizes = self.codes.sizes.get(layer)
        self.state.selections_wrong += wrong_selections(
            weights, codes, slots, selected, self.step.kept, config.sink, config.recent, farthest, lucky, sizes
        )

    def forward_extend(self, *args: Any, **kwargs: Any) -> Tensor:
        """Never reached: SGLang gives prefill to its own backend."""
        raise NotImplementedError("HATA decodes; prefill runs on the dense backend.")

    def support_triton(self) -> bool:
        return self.slot_table.is_cuda
