"""What HATA refuses to run with, one sentence each: settings under which a decode step would be silently wrong.

Each would either leave codes stale beside fresh keys, or serve dense attention under HATA's name. The checks read
resolved settings, before any weight is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from sglang_hata.config import HataConfig, HataError

# Dense attention for prefill, and on a CPU for the first layers: backends that write K by the pool's set_kv_buffer.
DENSE_BACKENDS = {"cuda": ("flashinfer", "fa3", "triton"), "cpu": ("torch_native",)}
FP8_DTYPES = ("fp8_e4m3", "fp8_e5m2")
KV_DTYPES = ("auto", "bf16", "bfloat16", *FP8_DTYPES)
MAX_HEAD_DIM = 256


@dataclass(frozen=True)
class Refusal:
    """A server setting that HATA cannot serve with.

    Args:
        setting: the name of SGLang's setting.
        harmless: values with which HATA works; a setting that this SGLang does not have counts as harmless.
        why: what would go wrong, and what to do, to follow "--hata cannot run with --setting value: ".
    """

    setting: str
    harmless: tuple[Any, ...]
    why: str


SETTINGS = (
    Refusal(
        "speculative_algorithm",
        (None, ""),
        "its verification steps are dense, so HATA would never act; remove it.",
    ),
    Refusal(
        "enable_hierarchical_cache",
        (False, None),
        "keys that return from the host would come without their codes; remove it.",
    ),
    Refusal("enable_hisparse", (False, None), "it selects tokens itself; use one of the two."),
    Refusal(
        "enable_lmcache",
        (False, None),
        "keys loaded from it would come without their codes; remove it.",
    ),
    Refusal(
        "enable_flexkv",
        (False, None),
        "keys loaded from it would come without their codes; remove it.",
    ),
    Refusal(
        "enable_unified_cache_external_linker",
        (False, None),
        "keys loaded from it would come without their codes; remove it.",
    ),
    Refusal(
        "disaggregation_mode",
        (None, "null"),
        "keys sent between prefill and decode servers would come without their codes; serve both on one.",
    ),
    Refusal("kv_cache_dtype", KV_DTYPES, "the kernels do not read it; use auto, fp8_e4m3 or fp8_e5m2."),
    Refusal("prefill_only_disable_kv_cache", (False, None), "there is no KV cache to select from; remove it."),
    Refusal("enable_page_major_kv_layout", (False, None), "codes follow the slot-major layout; remove it."),
    Refusal("enable_unified_memory", (False, None), "codes follow SGLang's plain KV pool; remove it."),
    Refusal("enable_kv_cache_sharding", (False, None), "codes follow SGLang's plain KV pool; remove it."),
    Refusal("dcp_size", (None, 1), "a request's tokens would be spread over GPUs; use --tp-size."),
    Refusal("attn_cp_size", (None, 1), "a request's tokens would be spread over GPUs; use --tp-size."),
    Refusal("enable_prefill_cp", (False, None), "its key writes bypass the codes; remove it."),
    Refusal("pp_size", (None, 1), "pipeline stages have not been tested with HATA; use --tp-size instead."),
    # 0.5.23 takes the first for the second, and then for off.
    Refusal("enable_dp_attention", (False, None), "it has not been tested with HATA; use --dp-size."),
    Refusal("attn_dp_size", (None, 1), "it has not been tested with HATA; use --dp-size."),
    Refusal("enable_two_batch_overlap", (False, None), "it splits the decode batch; remove it."),
    Refusal("enable_pdmux", (False, None), "it runs prefill beside decode on one pool; remove it."),
    Refusal("enable_nvidia_megakernel", (False, None), "it replaces the decode step; remove it."),
    Refusal("enable_amd_monokernel", (False, None), "it replaces the decode step; remove it."),
    Refusal("enable_torch_compile", (False, None), "it has not been tested with HATA; remove it."),
    Refusal(
        "enable_deterministic_inference",
        (False, None),
        "the sparse decode splits its work by batch; remove it.",
    ),
    Refusal("dllm_algorithm", (None, ""), "diffusion models do not decode token by token; remove it."),
    Refusal("is_embedding", (False, None), "an embedding server never decodes; remove --hata."),
)

ENVIRONMENT = (
    ("SGLANG_USE_HND_KVCACHE", "codes follow the NHD layout of the KV pool"),
    ("SGLANG_ENABLE_POST_CAPTURE_KV_SIZING", "the KV pool would be resized after its codes were allocated"),
    ("SGLANG_ENABLE_METADATA_GLUE_GRAPH", "what is planned on the host before each step would be planned once"),
)


def check_settings(settings: Any, config: HataConfig) -> None:
    """Raises HataError for the first setting (attributes of ``settings``) or variable that HATA cannot run with."""
    for refusal in SETTINGS:
        value = getattr(settings, refusal.setting, refusal.harmless[0])
        if value not in refusal.harmless:
            shown = "" if value is True else f" {value}"
            raise HataError(f"--hata cannot run with --{refusal.setting.replace('_', '-')}{shown}: {refusal.why}")
    for variable, why in ENVIRONMENT:
        if os.environ.get(variable, "").lower() in ("1", "true", "yes"):
            raise HataError(f"--hata cannot run with {variable}={os.environ[variable]}: {why}; unset it.")
    check_device(settings)
    if settings.kv_cache_dtype in FP8_DTYPES and (settings.device != "cuda" or config.verify):
        why = "codes cannot be compared with rounded keys" if config.verify else "only the GPU kernels read it"
        raise HataError(f"--hata cannot run with --kv-cache-dtype {settings.kv_cache_dtype} here: {why}; use auto.")
    graphs_off = settings.disable_cuda_graph or settings.disable_decode_cuda_graph
    if config.verify and settings.device == "cuda" and not graphs_off:
        raise HataError("--hata-verify looks at every step, which CUDA graphs hide: add --disable-cuda-graph.")


def check_device(settings: Any) -> None:
    """Raises HataError unless HATA runs on the device and its dense backend writes keys through the KV pool."""
    device = settings.device
    if device not in DENSE_BACKENDS:
        raise HataError(f"--hata cannot run on --device {device}: it runs on cuda, and on cpu for trying it out.")
    dense = settings.prefill_attention_backend or settings.attention_backend
    if dense not in DENSE_BACKENDS[device]:
        allowed = " or ".join(DENSE_BACKENDS[device])
        raise HataError(
            f"--hata cannot run with --attention-backend {dense} on {device}: "
            f"use {allowed}, which prefill then runs on."
        )


def check_model(model: Any, config: HataConfig, device: str, state_space_layers: bool) -> None:
    """Raises HataError for a model that HATA cannot serve.

    Args:
        model: SGLang's ModelConfig.
        device: where it is to be served.
        state_space_layers: whether SGLang keeps state-space or linear attention for some of its layers.
    """
    for applies, sentence in (*_model_refusals(state_space_layers), *(_kernel_refusals() if device == "cuda" else ())):
        if applies(model):
            raise HataError(f"--hata cannot serve {model.model_path}: {sentence}")
    if config.dense_layers >= model.num_hidden_layers:
        raise HataError(
            f"--hata-dense-layers {config.dense_layers} leaves nothing to HATA, as the model has "
            f"{model.num_hidden_layers} layers: give a smaller number, or remove --hata."
        )
    rule, longest, flag = config.budget_rule(), model.context_len, ""
    if rule.min_context >= longest:
        flag = f"--hata-min-context {config.min_context}"
    elif rule.share_ppm < 1_000_000 and not rule.largest(longest):  # who wants the whole context says 100%
        flag = f"--hata-min-budget {config.min_budget}" if rule.share_ppm else f"--hata-budget {config.budget}"
    if flag:
        raise HataError(
            f"{flag} leaves nothing to HATA, as the model's context ends at {longest} tokens: give a smaller number, "
            "or remove --hata."
        )


def _model_refusals(state_space_layers: bool) -> Iterator[tuple[Callable[[Any], bool], str]]:
    yield (
        lambda m: m.attention_arch.name == "MLA",
        "its attention is MLA, which caches one latent a token and no keys by head; HATA needs MHA or GQA.",
    )
    yield (
        lambda m: bool(m.is_encoder_decoder),
        "it is an encoder-decoder model; HATA needs a decoder.",
    )
    yield (
        lambda m: not m.is_generation,
        "it does not generate text; HATA needs a decoder.",
    )
    yield (
        lambda m: bool(m.is_hybrid_swa) or bool(m.sliding_window_size) or bool(m.attention_chunk_size),
        "some of its layers attend to a sliding window; HATA needs full attention in every layer.",
    )
    yield (
        lambda m: state_space_layers or _has_linear_layers(m),
        "some of its layers are linear attention or state space; HATA needs attention in every layer.",
    )
    yield (
        lambda m: bool(m.has_attention_sinks),
        "it has learned attention sinks; the sparse decode has none.",
    )
    yield (
        lambda m: bool(getattr(m.hf_text_config, "attn_logit_softcapping", None)),
        "it caps attention logits; the sparse decode does not.",
    )
    yield (
        lambda m: m.head_dim != m.v_head_dim or m.head_dim > MAX_HEAD_DIM,
        f"its heads are not of one size of at most {MAX_HEAD_DIM}.",
    )


def _kernel_refusals() -> Iterator[tuple[Callable[[Any], bool], str]]:
    from hata_kernels.encode import HEAD_DIMS
    from hata_kernels.launch import KV_DTYPES as KERNEL_DTYPES
    from hata_kernels.workspace import MAX_GROUP

    yield (
        lambda m: m.head_dim not in HEAD_DIMS,
        f"its head_dim is none of {', '.join(map(str, HEAD_DIMS))}, which the kernels are built for.",
    )
    yield (
        lambda m: m.num_attention_heads > MAX_GROUP * m.get_total_num_kv_heads(),
        f"more than {MAX_GROUP} query heads share a KV head, which is as many as the kernels take.",
    )
    yield (
        lambda m: m.dtype not in KERNEL_DTYPES,
        "its weights are not 16-bit; add --dtype bfloat16.",
    )


def _has_linear_layers(model: Any) -> bool:
    kinds = getattr(model.hf_text_config, "layer_types", None) or ()
    return any(kind != "full_attention" for kind in kinds)
