"""What a server has done under HATA, in counters: shown by /server_info, and enough to check its claims."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from sglang_hata.config import HataConfig

if TYPE_CHECKING:
    from hata_kernels.reference import Costs
    from sglang_hata.code_cache import CodeCache


# What --hata-verify counts: the only counters that are of all ranks, and not of one.
VERIFIED = ("selections_checked", "selections_wrong", "stale_codes")


@dataclass
class ServingState:
    """Settings and counters of one scheduler process, which is one rank of tensor parallelism.

    Args:
        config: the settings.
        costs: what a decode step costs here, where that decides who selects.
        decode_steps: decode steps of the whole batch.
        tokens_attended, tokens_seen: cached tokens that decode attention read, and that it would have read if dense,
            summed over requests, layers (the dense ones too) and KV heads of this rank.
        selections_checked, selections_wrong: with ``--hata-verify``, selections compared with the specification.
    """

    config: HataConfig
    costs: Costs | None = None
    decode_steps: int = 0
    tokens_attended: int = 0
    tokens_seen: int = 0
    selections_checked: int = 0
    selections_wrong: int = 0

    def count_step(self, lengths: list[int], kept: list[int], layers: int, dense_layers: int, kv_heads: int) -> None:
        """Counts one decode step.

        Args:
            lengths: context length of each request.
            kept: tokens that each KV head attends to in the layers that HATA serves.
            layers: layers of the model on this rank, of which ``dense_layers`` attend to everything.
        """
        seen = sum(lengths)
        self.decode_steps += 1
        self.tokens_seen += kv_heads * layers * seen
        self.tokens_attended += kv_heads * (dense_layers * seen + (layers - dense_layers) * sum(kept))

    def report(self, pool: Any) -> dict[str, Any]:
        """Plain values for /server_info; ``pool`` is the KV pool with codes."""
        codes: CodeCache = pool.codes
        shown = self.config.to_dict() | {
            "bits": codes.bits,
            "costs_ps": asdict(self.costs) if self.costs else None,
            "bytes_per_token": codes.bytes_per_token,
            "decode_steps": self.decode_steps,
            "tokens_attended": self.tokens_attended,
            "tokens_seen": self.tokens_seen,
            "keys_hashed": codes.tokens_hashed,
        }
        if self.config.verify:
            shown |= {
                "selections_checked": self.selections_checked,
                "selections_wrong": self.selections_wrong,
                "stale_codes": sum(codes.stale(layer, pool.get_key_buffer(layer)) for layer in codes.codes),
            }
        return shown
