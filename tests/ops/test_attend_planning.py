"""What `SparseDecode` asks of FlashInfer, with FlashInfer replaced: its planning runs on the host."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from hata_kernels.attend import SparseDecode, float_workspace_bytes, int_workspace_bytes
from hata_kernels.workspace import DecodeWorkspace


class Wrapper:
    """Records calls as FlashInfer's BatchDecodeWithPagedKVCacheWrapper takes them."""

    made: list[Wrapper]

    def __init__(self, float_workspace: torch.Tensor, layout: str, **options: Any) -> None:
        self.options = options
        self.plans: list[list[int]] = []
        self.fast_plans: list[list[int]] = []
        self._plan_info = [1, 2, 3]
        Wrapper.made.append(self)

    def reset_workspace_buffer(self, float_workspace: torch.Tensor, int_workspace: torch.Tensor) -> None:
        self.int_workspace = int_workspace

    def plan(self, indptr: torch.Tensor, *geometry: Any, **options: Any) -> None:
        self.plans.append(indptr.tolist())

    def run(self, q: torch.Tensor, pools: Any, *, q_scale: float, out: torch.Tensor) -> None:
        assert q.shape == out.shape
        assert pools[0].shape[1:] == (1, 1, q.shape[-1])
        out.fill_(q_scale)


def fast_decode_plan(
    wrapper: Wrapper, indptr: torch.Tensor, *geometry: Any, global_override_indptr_cpu: torch.Tensor, **_: Any
) -> None:
    assert torch.equal(indptr, global_override_indptr_cpu)
    wrapper.fast_plans.append(indptr.tolist())


@pytest.fixture(autouse=True)
def flashinfer(monkeypatch: pytest.MonkeyPatch) -> None:
    Wrapper.made = []
    package, decode = ModuleType("flashinfer"), ModuleType("flashinfer.decode")
    vars(package).update(BatchDecodeWithPagedKVCacheWrapper=Wrapper, decode=decode)
    vars(decode).update(fast_decode_plan=fast_decode_plan)
    monkeypatch.setitem(sys.modules, "flashinfer", package)
    monkeypatch.setitem(sys.modules, "flashinfer.decode", decode)


def workspace(q_heads: int = 4, kv_heads: int = 2) -> DecodeWorkspace:
    return DecodeWorkspace.allocate(
        max_batch=3,
        q_heads=q_heads,
        kv_heads=kv_heads,
        bits=64,
        max_context=50,
        max_kept=20,
        device="cpu",
    )


def decoder(**options: Any) -> SparseDecode:
    return SparseDecode(workspace(), head_dim=64, dtype=torch.bfloat16, **options)


def test_a_graph_has_a_wrapper_for_each_batch_size() -> None:
    attention = decoder(use_cuda_graph=True)
    attention.plan([5, 7])
    attention.plan(torch.tensor([9]), batch=2)
    attention.plan([4])
    attention.plan([5, 7])
    two, one = Wrapper.made
    assert two.plans == [[0, 5, 10, 17, 24]]
    assert two.fast_plans == [[0, 9, 18, 19, 20], [0, 5, 10, 17, 24]]
    assert one.plans == [[0, 4, 8]]
    assert two.options["backend"] == "fa2"
    assert len(two.options["paged_kv_indptr_buffer"]) == 5
    assert two.options["paged_kv_last_page_len_buffer"].tolist() == [1] * 4


def test_without_graphs_one_wrapper_serves_all_batches() -> None:
    attention = decoder()
    for lengths in ([5, 7], [1], [1], [3, 3, 3]):
        attention.plan(lengths)
    (wrapper,) = Wrapper.made
    assert wrapper.plans == [[0, 5, 10, 17, 24]]
    assert wrapper.fast_plans == [[0, 1, 2], [0, 3, 6, 9, 12, 15, 18]]  # the repeated plan is not made again


def test_a_changed_launch_shape_is_refused() -> None:
    attention = decoder(use_cuda_graph=True)
    attention.plan([5, 7])
    Wrapper.made[0]._plan_info = [1, 2, 4]
    with pytest.raises(RuntimeError, match="captured graph cannot replay"):
        attention.plan([5, 8])


def test_run_needs_a_plan_of_its_batch() -> None:
    attention = decoder()
    q, pool = torch.zeros(2, 4, 64, dtype=torch.bfloat16), torch.zeros(9, 2, 64, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="call plan first"):
        attention.run(q, pool, pool, 0.5)
    attention.plan([3])
    with pytest.raises(ValueError, match="call plan first"):
        attention.run(q, pool, pool, 0.5)
    attention.plan([3, 4])
    assert (attention.run(q, pool, pool, 0.5) == 0.5).all()
    with pytest.raises(ValueError, match=r"^k_pool: strides"):
        attention.run(q, pool.transpose(0, 1).contiguous().transpose(0, 1), pool, 0.5)


@pytest.mark.parametrize(
    ("group", "cores"), [(1, False), (2, False), (3, False), (4, True), (5, True), (7, True), (16, True)]
)
def test_tensor_cores_by_group_size(group: int, cores: bool) -> None:
    attention = SparseDecode(workspace(2 * group), head_dim=64, dtype=torch.float16)
    assert attention.use_tensor_cores is cores


@pytest.mark.parametrize(
    ("buffers", "options"),
    [
        ({"q_heads": 34}, {}),
        ({"q_heads": 10}, {"use_tensor_cores": False}),
        ({}, {"head_dim": 96}),
        ({}, {"v_head_dim": 128}),
        ({}, {"dtype": torch.float32}),
        ({}, {"float_workspace": torch.empty(10, dtype=torch.uint8)}),
    ],
)
def test_refused_geometries(buffers: dict[str, int], options: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        SparseDecode(workspace(**buffers), **({"head_dim": 64, "dtype": torch.float16} | options))


@pytest.mark.parametrize("group", range(1, 17))
@pytest.mark.parametrize("rows", [1, 8, 264, 265, 512, 5000])
def test_buffers_hold_what_flashinfer_plans(rows: int, group: int) -> None:
    """Its planner's own sums, for the most blocks it plans, on a GPU of 132 multiprocessors."""
    plan = SimpleNamespace(tiles=max(264, -(-rows * group // 16) + rows - 1), blocks=max(132 * 16, rows))
    assert float_workspace_bytes(rows, group, 128, True, 132) >= group * plan.tiles * 16 * 129 * 4
    assert float_workspace_bytes(rows, group, 128, False, 132) >= group * plan.blocks * 129 * 4
    for blocks in (plan.tiles, plan.blocks):
        assert int_workspace_bytes(rows, group, 132) >= 13 * blocks + 8 * (rows + 1) + 1024
