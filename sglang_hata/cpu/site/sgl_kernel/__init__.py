"""A stand-in for SGLang's kernel library on a machine without a GPU driver, where the real one cannot be loaded.

SGLang imports these eight functions on a CPU and, for the models and settings that HATA serves, calls none of them:
they belong to speculative decoding. Whoever calls one after all learns which.

Reason: the published wheel links against the CUDA driver.
Symptom without it: ImportError of libcuda.so.1 at start.
Removable when: the published wheel can be imported without a GPU driver.
"""

from typing import NoReturn

_NAMES = (
    "assign_req_to_token_pool_cpu",
    "assign_extend_cache_locs_cpu",
    "assign_draft_cache_locs_contiguous_cpu",
    "fill_bonus_tokens_cpu",
    "fill_accept_out_cache_loc_cpu",
    "copy_all_layer_kv_cache_cpu",
    "build_tree_kernel_efficient_cpu",
    "verify_tree_greedy_cpu",
)


def _stand_in(name: str) -> object:
    def refuse(*_args: object, **_kwargs: object) -> NoReturn:
        raise NotImplementedError(
            f"sgl_kernel.{name} was called on a machine without a GPU, where sglang-hata replaces SGLang's kernel "
            "library by a stand-in that has no such function: run this model or setting on a GPU."
        )

    refuse.__name__ = name
    return refuse


globals().update({name: _stand_in(name) for name in _NAMES})
