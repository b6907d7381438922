"""Attend: softmax attention over the selected tokens alone. Specification: `reference.attend`.

Each KV head of each request selects its own tokens, so FlashInfer's paged decode sees (request, KV head) as a
request with one KV head and G query heads, and every token as a page: K and V are viewed as [S * H, 1, 1, D],
and the row of slot s and head h is s * H + h, which is what `topk.select_slots` writes. How many tokens a
request keeps is the same in every layer, so one plan a step serves all layers; which tokens they are is read
on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hata_kernels.launch import KV_DTYPES, check_tensor, multiprocessors
from hata_kernels.workspace import INT32_MAX, DecodeWorkspace

# What FlashInfer's decode kernels are built for.
ATTENTION_HEAD_DIMS = (64, 128, 256)
MAX_GROUP = 16
# Group sizes of the CUDA-core kernel in the oldest FlashInfer we run on; the tensor-core kernel takes any.
CUDA_CORE_GROUPS = (1, 2, 3, 4, 8)
# From this group size on SGLang's dense decode uses tensor cores too, so their kernel is compiled already.
TENSOR_CORE_GROUP = 4

# FlashInfer's planner: query rows of a tensor-core tile for groups up to 16, tiles a multiprocessor when it
# splits, and the most blocks of 128 threads that fit a multiprocessor.
TILE_ROWS = 16
TILES_PER_MULTIPROCESSOR = 2
BLOCKS_PER_MULTIPROCESSOR = 16


class SparseDecode:
    """Attention of a decode step over the tokens in a `DecodeWorkspace`.

    ``plan`` once a step; ``run`` once a layer, after `topk.select_slots` has written the layer's indices.
    Under CUDA graphs ``plan`` is called before capture and before each replay, and ``run`` is captured; run
    once before capturing, because FlashInfer makes small buffers at first use.

    Args:
        workspace: holds indptr and indices, and sets the largest batch and the numbers of heads.
        head_dim, v_head_dim: D and Dv, equal, one of ATTENTION_HEAD_DIMS.
        dtype: of queries, keys, values and the output: bf16 or fp16.
        use_cuda_graph: keep one FlashInfer wrapper for each batch size, with launch shapes that never change.
        float_workspace: uint8 on the device, at least `float_workspace_bytes`; it may be shared with other
            FlashInfer wrappers on the same stream. Allocated when None.
        use_tensor_cores: the kernel to use; by group size when None.

    Raises:
        ValueError: on a geometry that FlashInfer has no kernel for.
    """

    def __init__(
        self,
        workspace: DecodeWorkspace,
        *,
        head_dim: int,
        dtype: torch.dtype,
        v_head_dim: int | None = None,
        use_cuda_graph: bool = False,
        float_workspace: Tensor | None = None,
        use_tensor_cores: bool | None = None,
    ) -> None:
        group, remainder = divmod(workspace.q_heads, workspace.kv_heads)
        if use_tensor_cores is None:
            use_tensor_cores = group >= TENSOR_CORE_GROUP
        if remainder or group > MAX_GROUP or (not use_tensor_cores and group not in CUDA_CORE_GROUPS):
            raise ValueError(
                f"{workspace.q_heads} query heads over {workspace.kv_heads} KV heads: expected groups of 1 to"
                f" {MAX_GROUP}, without tensor cores one of {CUDA_CORE_GROUPS}"
            )
        if head_dim not in ATTENTION_HEAD_DIMS or v_head_dim not in (None, head_dim):
            raise ValueError(
                f"head dimension {head_dim} (values: {v_head_dim}), expected one of {ATTENTION_HEAD_DIMS},"
                " the same for values"
            )
        if dtype not in KV_DTYPES:
            raise ValueError(f"dtype {dtype}, expected one of {KV_DTYPES}")
        self.workspace = workspace
        self.group = group
        self.head_dim = head_dim
        self.dtype = dtype
        self.use_cuda_graph = use_cuda_graph
        self.use_tensor_cores = use_tensor_cores

        device = workspace.device
        rows = workspace.max_batch * workspace.kv_heads
        needed = float_workspace_bytes(rows, group, head_dim, use_tensor_cores, multiprocessors(device))
        if float_workspace is None:
            float_workspace = torch.empty(needed, dtype=torch.uint8, device=device)
        check_tensor("float_workspace", float_workspace, (None,), torch.uint8, device)
        if float_workspace.numel() < needed:
            raise ValueError(f"float_workspace: {float_workspace.numel()} bytes, expected at least {needed}")
        self._float_workspace = float_workspace
        # With one token a page, the last page of every request holds one token.
        self._ones = torch.ones(rows, dtype=torch.int32, device=device)
        self._ones_host = torch.ones(rows, dtype=torch.int32)
        self._wrappers: dict[int, Any] = {}
        self._launch_shapes: dict[int, tuple[int, ...]] = {}
        self._active: Any = None
        self._planned: Tensor | None = None

    def plan(self, k_lens: Tensor | Sequence[int], batch: int | None = None) -> None:
        """Plan all layers of a step, and write the workspace's indptr.

        Args:
            k_lens: on the host: tokens each request keeps, the same numbers as in the ``k_lens`` on the
                device.
            batch: the padded batch size; a padded row keeps one token.

        Raises:
            ValueError: if the step does not fit the workspace.
            RuntimeError: if FlashInfer would launch a captured batch size in another shape than at capture.
        """
        indptr = self.workspace.set_kept(k_lens, batch)
        rows = len(indptr) - 1
        if rows == 0:
            return
        key = rows if self.use_cuda_graph else 0
        wrapper = self._wrappers.get(key)
        # Long contexts keep a fixed number of tokens, so most steps repeat the last plan.
        if wrapper is not None and self._planned is not None and torch.equal(indptr, self._planned):
            return
        if wrapper is None:
            wrapper = self._wrappers[key] = self._new_wrapper(rows)
            wrapper.plan(
                indptr,
                # A graph's wrapper has the buffer already and would copy onto it what it is given here.
                self.workspace.indices[:1] if self.use_cuda_graph else self.workspace.indices,
                self._ones_host[:rows],
                self.group,
                1,
                self.head_dim,
                1,
                q_data_type=self.dtype,
                kv_data_type=self.dtype,
                sm_scale=1.0,
            )
        else:
            from flashinfer.decode import fast_decode_plan

            # Copies nothing to or from the device but the plan itself.
            fast_decode_plan(
                wrapper,
                self.workspace.indptr[: rows + 1],
                self.workspace.indices,
                self._ones[:rows],
                self.group,
                1,
                self.head_dim,
                1,
                q_data_type=self.dtype,
                kv_data_type=self.dtype,
                sm_scale=1.0,
                global_override_indptr_cpu=indptr,
            )
        if self.use_cuda_graph:
            # Grid and buffer offsets: FlashInfer derives them from the batch size alone under CUDA graphs,
            # and a graph replays them as they were captured. Lengths travel in device memory.
            shape = tuple(int(number) for number in wrapper._plan_info)
            if self._launch_shapes.setdefault(key, shape) != shape:
                raise RuntimeError(
                    f"FlashInfer's plan for {rows} rows changed from {self._launch_shapes[key]} to {shape}:"
                    " a captured graph cannot replay it"
                )
        self._active, self._planned = wrapper, indptr

    def run(self, q: Tensor, k_pool: Tensor, v_pool: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
        """Attention of one layer over the tokens whose rows are in the workspace's indices.

        Args:
            q: [B, Hq, D]; B as planned. Copied if its rows are not contiguous.
            k_pool, v_pool: [S, H, D], contiguous.
            scale: multiplies q . k, usually D ** -0.5.
            out: [B, Hq, D], contiguous; allocated when None.

        Returns:
            ``out``.

        Raises:
            ValueError: on tensors that do not fit the plan.
        """
        H, G, D = self.workspace.kv_heads, self.group, self.head_dim
        device = self.workspace.device
        check_tensor("q", q, (None, H * G, D), self.dtype, device, contiguous=False)
        check_tensor("k_pool", k_pool, (None, H, D), self.dtype, device)
        check_tensor("v_pool", v_pool, (k_pool.shape[0], H, D), self.dtype, device)
        B = q.shape[0]
        if B == 0:
            return q.new_empty((0, H * G, D)) if out is None else out
        if self._planned is None or len(self._planned) != B * H + 1:
            raise ValueError(f"q: batch of {B}, but the last plan was for another: call plan first")
        if k_pool.shape[0] * H > INT32_MAX:
            raise ValueError(f"k_pool: {k_pool.shape[0]} slots of {H} KV heads exceed 32-bit indices")
        if out is None:
            out = torch.empty((B, H * G, D), dtype=self.dtype, device=device)
        else:
            check_tensor("out", out, (B, H * G, D), self.dtype, device)
        self._active.run(
            q.reshape(B * H, G, D),
            (k_pool.view(-1, 1, 1, D), v_pool.view(-1, 1, 1, D)),
            q_scale=scale,
            out=out.view(B * H, G, D),
        )
        return out

    def _new_wrapper(self, rows: int) -> Any:
        from flashinfer import BatchDecodeWithPagedKVCacheWrapper

        workspace = self.workspace
        # "fa2" by name: "auto" may choose other kernels in later FlashInfer, with other planning.
        wrapper = BatchDecodeWithPagedKVCacheWrapper(
            self._float_workspace,
            "NHD",
            use_cuda_graph=self.use_cuda_graph,
            use_tensor_cores=self.use_tensor_cores,
            paged_kv_indptr_buffer=workspace.indptr[: rows + 1] if self.use_cuda_graph else None,
            paged_kv_indices_buffer=workspace.indices if self.use_cuda_graph else None,
            paged_kv_last_page_len_buffer=self._ones[:rows] if self.use_cuda_graph else None,
            backend="fa2",
        )
        # Its own 8 MiB, once on the device and once pinned for each batch size, are many times what a plan
        # takes.
        planned = rows if self.use_cuda_graph else workspace.max_batch * workspace.kv_heads
        size = int_workspace_bytes(planned, self.group, multiprocessors(workspace.device))
        wrapper.reset_workspace_buffer(
            self._float_workspace, torch.empty(size, dtype=torch.uint8, device=workspace.device)
        )
        return wrapper


def largest_grid(rows: int, group: int, use_tensor_cores: bool, n_multiprocessors: int) -> int:
    """Upper bound on the thread blocks FlashInfer plans for ``rows`` (request, KV head) pairs."""
    if use_tensor_cores:
        return max(TILES_PER_MULTIPROCESSOR * n_multiprocessors, -(-rows * group // TILE_ROWS) + rows - 1)
    return max(BLOCKS_PER_MULTIPROCESSOR * n_multiprocessors, rows)


def float_workspace_bytes(rows: int, group: int, head_dim: int, use_tensor_cores: bool, n_multiprocessors: int) -> int:
    """Bytes FlashInfer may use for the partial outputs of split attention, and their softmax sums."""
    blocks = largest_grid(rows, group, use_tensor_cores, n_multiprocessors)
    partial_rows = blocks * (TILE_ROWS if use_tensor_cores else 1)
    return group * partial_rows * (head_dim + 1) * 4 + 4096


def int_workspace_bytes(rows: int, group: int, n_multiprocessors: int) -> int:
    """Bytes FlashInfer's plan may take: at most 13 for each block and 8 for each row, and some alignment."""
    blocks = max(largest_grid(rows, group, cores, n_multiprocessors) for cores in (False, True))
    return 16 * (blocks + rows) + 64 * 1024
