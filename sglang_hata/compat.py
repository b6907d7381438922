"""Every place where this plugin touches SGLang, for 0.5.16 to 0.5.23. Nothing else here imports its internals.

`LAUNCHER_HOOKS` and `SCHEDULER_HOOKS` are the ledger: what is hooked, the symptom without it, and when the entry can
go. Beyond it, `backend.py` follows SGLang's documented AttentionBackend contract, and the functions at the end of this
file read the few values that the two versions keep in different places. It is one long file so that a new SGLang is
one file's work.

Processes: the launcher (or `sgl.Engine`'s program) parses flags and refuses what cannot work; each scheduler process
builds pool and backend. Settings travel from one to the other as a plain dict on ServerArgs, which is pickled before
plugins are loaded and so must hold no class of ours.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import pkgutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from sglang_hata.config import AUTO, FLAGS, HataConfig, HataError
from sglang_hata.refusals import check_model, check_settings
from sglang_hata.state import VERIFIED

BACKEND = "hata"
STAMP = "_hata"  # underscored: the one kind of attribute that both versions let a plugin set on ServerArgs
SCHEDULER_MODULE = "sglang.srt.managers.scheduler"


@dataclass(frozen=True)
class Hook:
    """One hook on SGLang.

    Args:
        target: what is hooked.
        kind: AFTER, AROUND: see SGLang's HookType.
        parameters: names that the target must still have; a missing one means that SGLang has moved on.
        symptom: what happens without the hook.
        removable: when the entry can go.
    """

    target: str
    kind: str
    function: Callable[..., Any]
    parameters: tuple[str, ...]
    symptom: str
    removable: str


def register() -> None:
    """Registers everything; called once in each process by SGLang, through the entry point."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    from sglang.srt.server_args import add_attention_backend_choices

    hooks = LAUNCHER_HOOKS
    # The detokenizer of 0.5.23 loads plugins too; hooks on the scheduler there would import the whole model stack.
    serves = SCHEDULER_MODULE in sys.modules
    if serves:
        hooks += SCHEDULER_HOOKS
    for hook in hooks:
        _check_target(hook)
    for hook in hooks:
        HookRegistry.register(hook.target, hook.function, HookType[hook.kind])
    if serves:
        _register_backend()
    _accept_engine_keywords()
    # Last: without this choice `--hata` cannot start, so a registration that failed half-way never serves.
    add_attention_backend_choices([BACKEND])


def refuse_flags(reason: str) -> None:
    """After a failed registration: keeps the flags, so that `--hata` is answered with the reason."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    def refuse(original: Callable[..., Any], cls: type, args: argparse.Namespace) -> Any:
        if getattr(args, "hata", False):
            raise SystemExit(f"--hata is not available: {reason}")
        return original(cls, args)

    flags = next(hook for hook in LAUNCHER_HOOKS if hook.function is _add_flags)
    HookRegistry.register(flags.target, _add_flags, HookType.AFTER)
    HookRegistry.register("sglang.srt.server_args.ServerArgs.from_cli_args", refuse, HookType.AROUND)


def server_args(**kwargs: Any) -> Any:
    """SGLang's ServerArgs from keywords that may include ``hata=True, hata_budget=...``.

    For programs that build ServerArgs themselves; `sgl.Engine(hata=True, ...)` does this on its own.

    Raises:
        HataError: a HATA setting that is not allowed.
    """
    from sglang.srt.server_args import ServerArgs

    config = HataConfig.from_options(kwargs)
    plain = {key: value for key, value in kwargs.items() if key not in _KEYWORDS}
    if config is None:
        return ServerArgs(**plain)
    _choose_decode_backend(plain.get("decode_attention_backend"))
    built = ServerArgs(**plain | {"decode_attention_backend": BACKEND})
    setattr(built, STAMP, config.to_dict() | {"command_line": False})
    return built


def config_of(args: Any) -> HataConfig | None:
    """The HATA settings that ServerArgs carry; None when HATA is off."""
    stamp: Mapping[str, Any] | None = getattr(args, STAMP, None)
    if stamp is None:
        return None
    return HataConfig(**{key: value for key, value in stamp.items() if key != "command_line"})


_KEYWORDS = frozenset(flag.name for flag in FLAGS)


def _check_target(hook: Hook) -> None:
    try:
        found = inspect.signature(pkgutil.resolve_name(hook.target)).parameters
    except (ImportError, AttributeError) as error:
        raise HataError(_moved_on(hook.target, str(error))) from error
    missing = [name for name in hook.parameters if name not in found]
    if missing:
        raise HataError(_moved_on(hook.target, f"no parameter {missing[0]}"))


def _moved_on(target: str, detail: str) -> str:
    return (
        f"sglang {version('sglang')} has moved {target} ({detail}): install sglang from 0.5.16 to 0.5.23, or a newer "
        "sglang-hata."
    )


# --- The launcher: flags, settings, refusals ---------------------------------------------------------------------


def _add_flags(_result: None, parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("HATA (sglang-hata)")
    for flag in FLAGS:
        if flag.metavar is None:
            group.add_argument(flag.option, action="store_true", help=flag.help)
        else:
            group.add_argument(flag.option, metavar=flag.metavar, default=None, help=flag.help)


def _from_cli_args(original: Callable[..., Any], cls: type, args: argparse.Namespace) -> Any:
    try:
        config = HataConfig.from_options(vars(args))
        if config is None:
            return original(cls, args)
        _choose_decode_backend(args.decode_attention_backend)
    except HataError as error:
        raise SystemExit(str(error)) from None
    args.decode_attention_backend = BACKEND
    built = original(cls, args)
    setattr(built, STAMP, config.to_dict() | {"command_line": True})
    return built


def _choose_decode_backend(given: str | None) -> None:
    if given not in (None, BACKEND):
        raise HataError(
            f"--hata cannot run with --decode-attention-backend {given}: HATA is the decode backend, so remove it; "
            "--attention-backend chooses the one for prefill."
        )


def _check_server_args(_result: None, args: Any) -> None:
    config = config_of(args)
    if config is None:
        return
    from sglang_hata.projections import check_fingerprint, check_identity, resolve

    try:
        settings, model = _resolved(args)
        check_settings(settings, config)
        check_model(model, config, settings.device, _has_state_space_layers(model))
        resolved = resolve(config, model)
        check_identity(resolved, model)
        if config.weights != AUTO:  # auto has found them by the fingerprint
            check_fingerprint(resolved, model)
        setattr(args, STAMP, getattr(args, STAMP) | resolved.to_dict())
    except HataError as error:
        if getattr(args, STAMP)["command_line"]:
            raise SystemExit(str(error)) from None
        raise


def _resolved(args: Any) -> tuple[Any, Any]:
    """Resolved settings and the model's configuration; 0.5.23 keeps both outside of ServerArgs."""
    try:
        from sglang.srt.arg_groups.model_override_base import model_config_of, resolving_view
    except ImportError:
        return args, args.get_model_config()
    return resolving_view(args), model_config_of(args)


def _has_state_space_layers(model: Any) -> bool:
    from sglang.srt.configs.hybrid_arch import mambaish_config

    return mambaish_config(model) is not None


def _accept_engine_keywords() -> None:
    """`sgl.Engine(hata=True, ...)`, through the class attribute that SGLang documents for this.

    Not a hook: the registry would take the attribute, which is the ServerArgs class, for ServerArgs itself and
    replace it everywhere.
    """
    engine_module = sys.modules.get("sglang.srt.entrypoints.engine")
    if engine_module is not None:  # absent in the processes that build no Engine
        engine_module.Engine.server_args_class = staticmethod(server_args)


# --- The scheduler: pool, backend, state -------------------------------------------------------------------------


def _register_backend() -> None:
    from sglang.srt.layers.attention.attention_registry import register_attention_backend

    @register_attention_backend(BACKEND)
    def create(runner: Any) -> Any:
        from sglang_hata.backend import HataBackend

        return HataBackend(runner)


def _add_code_bytes(cell_size: int, _self: Any, kvc: Any, num_layers: int) -> int:
    config = config_of(kvc.server_args)
    if config is None:
        return cell_size
    from sglang_hata.code_cache import code_bytes_per_token
    from sglang_hata.projections import bits_of

    kv_heads = kvc.model_config.get_num_kv_heads(tensor_parallel()[1])
    layers = num_layers - config.dense_layers
    code_bytes = code_bytes_per_token(layers, kv_heads, bits_of(config), config.key_sizes)
    return cell_size + code_bytes


def _use_pool_with_codes(original: Callable[..., Any], self: Any, **kwargs: Any) -> Any:
    config = config_of(self.server_args)
    if config is None:
        return original(self, **kwargs)
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    from sglang_hata.projections import rank_projections

    if kwargs["mha_pool_class"] is not MHATokenToKVPool:
        raise HataError(f"--hata cannot run on the KV pool {kwargs['mha_pool_class'].__name__}: remove --hata.")
    rank, size = tensor_parallel()
    projections = rank_projections(config, self.model_config, rank, size, self.device)
    pool_class = functools.partial(_pool_with_codes(), config=config, projections=projections)
    return original(self, **kwargs | {"mha_pool_class": pool_class})


def _check_pool(pool: Any, self: Any, **_kwargs: Any) -> Any:
    if config_of(self.server_args) is not None and getattr(pool, "codes", None) is None:
        raise HataError(
            f"--hata cannot run on the KV pool {type(pool).__name__}, which this model or these settings need: remove "
            "--hata."
        )
    return pool


@functools.cache
def _pool_with_codes() -> type:
    from sglang.srt.constants import GPU_MEMORY_TYPE_KV_CACHE
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, unwrap_write_loc

    from sglang_hata.code_cache import CodeCache
    from sglang_hata.state import ServingState

    class HataTokenToKVPool(MHATokenToKVPool):
        """SGLang's KV pool with a code for every key, written by the same call."""

        codes: CodeCache

        def __init__(self, *args: Any, config: HataConfig, projections: Mapping[int, Any], **kwargs: Any) -> None:
            self.state = ServingState(config)
            self._projections = projections
            super().__init__(*args, **kwargs)

        def _create_buffers(self) -> None:
            super()._create_buffers()
            with self.memory_saver_adapter.region(GPU_MEMORY_TYPE_KV_CACHE):
                self.codes = CodeCache(self.size + self.page_size, self._projections, self.state.config.key_sizes)

        def _clear_buffers(self) -> None:
            super()._clear_buffers()
            del self.codes

        def get_kv_size_bytes(self) -> tuple[int, int]:
            k_size, v_size = super().get_kv_size_bytes()
            return k_size + self.codes.size_bytes(), v_size

        def set_kv_buffer(
            self, layer: Any, loc_info: Any, cache_k: Any, cache_v: Any, *args: Any, **kwargs: Any
        ) -> None:
            # Before the pool's own write, which scales K in place when the cache is narrower than K.
            override = kwargs.get("layer_id_override")
            layer_id = layer.layer_id if override is None else override
            if layer_id in self.codes.codes:
                self.codes.write(layer_id, unwrap_write_loc(loc_info)[0], cache_k)
            super().set_kv_buffer(layer, loc_info, cache_k, cache_v, *args, **kwargs)

        def set_kv_without_codes(self, layer: Any, slots: Any, cache_k: Any, cache_v: Any) -> None:
            """For decode kernels, which hash keys themselves, where the cache is narrower than K."""
            # Copies, as the pool scales in place.
            super().set_kv_buffer(layer, slots, cache_k.clone(), cache_v.clone(), layer.k_scale, layer.v_scale)

        def move_kv_cache(self, tgt_loc: Any, src_loc: Any) -> None:
            super().move_kv_cache(tgt_loc, src_loc)
            self.codes.move(tgt_loc, src_loc)

        def set_kv_buffer_prefix_valid(self, *_args: Any, **_kwargs: Any) -> None:
            raise NotImplementedError("HATA does not follow the KV writes of speculative decoding.")

        def get_cpu_copy(self, *_args: Any, **_kwargs: Any) -> None:
            raise NotImplementedError("HATA does not follow KV that leaves the GPU.")

        def load_cpu_copy(self, *_args: Any, **_kwargs: Any) -> None:
            raise NotImplementedError("HATA does not follow KV that leaves the GPU.")

    return HataTokenToKVPool


def _never_fuse_kv_writes(original: Callable[..., bool], forward_batch: Any) -> bool:
    from sglang.srt.models.utils import get_token_to_kv_pool

    return False if hasattr(get_token_to_kv_pool(), "codes") else original(forward_batch)


def _report_state(result: Any, self: Any, *_args: Any) -> Any:
    pool = self.token_to_kv_pool_allocator.get_kvcache()
    if getattr(pool, "codes", None) is not None:
        report = pool.state.report(pool)
        if pool.state.config.verify:  # of all ranks, as one alone may be wrong; SGLang asks each of them
            report |= _sum_over_ranks({name: report[name] for name in VERIFIED})
        result.internal_state["hata"] = report
    return result


def _sum_over_ranks(counters: Mapping[str, int]) -> dict[str, int]:
    """Counters, added up over the ranks of attention's tensor parallelism; each of them has to call."""
    import torch
    from sglang.srt.runtime_context import get_parallel

    total = torch.tensor(list(counters.values()))
    torch.distributed.all_reduce(total, group=get_parallel().attn_tp_group.cpu_group)
    return dict(zip(counters, total.tolist(), strict=True))


LAUNCHER_HOOKS: tuple[Hook, ...] = (
    Hook(
        "sglang.srt.server_args.ServerArgs.add_cli_args",
        "AFTER",
        _add_flags,
        ("parser",),
        symptom="the launcher does not know --hata",
        removable="SGLang lets plugins declare flags",
    ),
    Hook(
        "sglang.srt.server_args.ServerArgs.from_cli_args",
        "AROUND",
        _from_cli_args,
        ("args",),
        symptom="flags are parsed and then dropped, as only declared fields are copied",
        removable="SGLang carries plugin settings in ServerArgs",
    ),
    Hook(
        "sglang.srt.server_args.ServerArgs.check_server_args",
        "AFTER",
        _check_server_args,
        (),
        symptom="combinations that HATA cannot serve start, and answer wrongly",
        removable="never: this is where SGLang validates its own combinations",
    ),
)

SCHEDULER_HOOKS: tuple[Hook, ...] = (
    Hook(
        "sglang.srt.model_executor.pool_configurator.DefaultPoolConfigurator._compute_cell_size",
        "AFTER",
        _add_code_bytes,
        ("kvc", "num_layers"),
        symptom="the KV pool is sized without its codes, and memory runs out",
        removable="SGLang asks the pool class for its bytes a token",
    ),
    Hook(
        "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator._build_mha_kv_pool",
        "AROUND",
        _use_pool_with_codes,
        ("mha_pool_class", "quant_method"),
        symptom="keys are cached without codes",
        removable="SGLang lets an attention backend name its KV pool class",
    ),
    Hook(
        "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator._build_token_to_kv_pool",
        "AFTER",
        _check_pool,
        ("sizes",),
        symptom="a model with another kind of KV pool would serve without codes",
        removable="together with the hook above",
    ),
    Hook(
        "sglang.srt.models.utils.enable_fused_set_kv_buffer",
        "AROUND",
        _never_fuse_kv_writes,
        ("forward_batch",),
        symptom="models that write K inside RoPE bypass the pool, and codes go stale",
        removable="SGLang asks the pool whether it allows fused writes",
    ),
    Hook(
        "sglang.srt.managers.scheduler.Scheduler.get_internal_state",
        "AFTER",
        _report_state,
        ("recv_req",),
        symptom="/server_info does not say that HATA is active",
        removable="SGLang lets plugins report state",
    ),
)


# --- Values that the two versions keep in different places --------------------------------------------------------


def tensor_parallel() -> tuple[int, int]:
    """Rank and size of attention's tensor parallelism."""
    from sglang.srt.runtime_context import get_parallel

    parallel = get_parallel()
    return parallel.attn_tp_rank, parallel.attn_tp_size


def dense_backend(runner: Any) -> Any:
    """A new instance of the attention backend that prefill uses, for what a CPU attends to in full."""
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    try:
        from sglang.srt.runtime_context import attention_backends  # 0.5.23
    except ImportError:
        attention_backends = runner.server_args.get_attention_backends  # 0.5.16
    return ATTENTION_BACKENDS[attention_backends()[0]](runner)


def check_hooks_applied() -> None:
    """Raises HataError if SGLang could not apply a hook; it only logs that, and would serve on without it."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    for hook in SCHEDULER_HOOKS:
        if hook.target not in HookRegistry._patched:
            raise HataError(f"SGLang did not apply HATA's hook on {hook.target}: its log says why.")
