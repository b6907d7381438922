"""The compiled kernels on a GPU against the specification: integers exactly, attention as bf16 allows."""

from __future__ import annotations

import subprocess
import sys
import zlib
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from hata_kernels.attend import SparseDecode
from hata_kernels.decode import hata_decode_step, select_tokens
from hata_kernels.encode import hash_rows
from hata_kernels.reference import Budget
from hata_kernels.workspace import DecodeWorkspace
from ops.cases import (
    SENTINEL,
    Case,
    assert_close,
    check_selection,
    expected_output,
    make_case,
    poison,
    random_projection,
    reference_codes,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
    # FlashInfer and the compilers it starts warn of their own affairs.
    pytest.mark.filterwarnings("default"),
]

BF16, FP16 = torch.bfloat16, torch.float16
# Root mean square error of bf16 attention, weights and partial outputs rounded to 8 bits, against float64.
BF16_RATIO = 1e-2
SHARE = Budget(share_ppm=15_625, floor=64)


class Shape(NamedTuple):
    """A decode step to test; every value the kernels are meant for appears in one of them."""

    lengths: list[int]
    budget: Budget
    kv_heads: int
    group: int
    head_dim: int
    bits: int
    dtype: torch.dtype = BF16
    index_dtype: torch.dtype = torch.int32
    padded: int = 0


def ragged(batch: int, longest: int) -> list[int]:
    """Lengths from 1 to ``longest``, of every residue, the longest among them."""
    return [1 + (longest - 1) * (7 * b % batch) // max(batch - 1, 1) for b in range(batch)]


SHAPES = {
    "b1-131072-h8g4d128-128": Shape([131_072], SHARE, 8, 4, 128, 128, index_dtype=torch.int64),
    "b1-131071-h2g7d64-256": Shape([131_071], SHARE, 2, 7, 64, 256),
    "b1-1-h8g4d128-128": Shape([1], SHARE, 8, 4, 128, 128),
    "b2-65537-h8g4d128-64": Shape([65_537, 3], SHARE, 8, 4, 128, 64),
    "b2-32768-h32g1d128-128": Shape([32_768, 20_001], SHARE, 32, 1, 128, 128),
    "b3-8191-h3g3d64-128": Shape([8191, 64, 65], SHARE, 3, 3, 64, 128, index_dtype=torch.int64),
    "b4-ragged-h2g6d128-128": Shape(ragged(4, 12_289), Budget(tokens=777), 2, 6, 128, 128, padded=3),
    "b8-ragged-h1g8d128-256": Shape(ragged(8, 32_768), Budget(tokens=1), 1, 8, 128, 256),
    "b13-ragged-h5g1d64-64": Shape(ragged(13, 999), Budget(tokens=100, min_context=300), 5, 1, 64, 64),
    "b64-ragged-h8g4d128-128": Shape(ragged(64, 4096), Budget(tokens=128), 8, 4, 128, 128),
    "b64-ones-h2g7d64-128": Shape([1] * 64, SHARE, 2, 7, 64, 128, padded=1),
    "b5-whole-h2g5d64-256": Shape(ragged(5, 2500), Budget(tokens=2500), 2, 5, 64, 256),
    "b3-2049-h2g16d128-256": Shape([2049, 2048, 2047], Budget(tokens=333), 2, 16, 128, 256),
}


def build(name: str, shape: Shape, **options: int) -> Case:
    seed = zlib.crc32(name.encode())
    print(f"{name}: seed {seed}")
    return make_case(**(shape._asdict() | options), generator=torch.Generator("cuda").manual_seed(seed))


def allocate(shape: Shape, max_batch: int | None = None) -> DecodeWorkspace:
    workspace = DecodeWorkspace.allocate(
        max_batch=max_batch or len(shape.lengths) + shape.padded,
        q_heads=shape.kv_heads * shape.group,
        kv_heads=shape.kv_heads,
        bits=shape.bits,
        max_context=max(shape.lengths),
        max_kept=shape.budget.largest(max(shape.lengths)),
        device="cuda",
    )
    poison(workspace)
    return workspace


def step(case: Case, workspace: DecodeWorkspace, attention: SparseDecode) -> Tensor:
    return hata_decode_step(
        *case.arguments(),
        workspace,
        attention,
        sink=case.sink,
        recent=case.recent,
        scale=case.scale,
    )


@pytest.fixture(scope="module")
def compiled_attention() -> None:
    """FlashInfer compiles at first use, for a minute or more a geometry: do all of this file's at once."""
    script = Path(__file__).with_name("compile_attention.py")
    geometries = {(shape.head_dim, 8 if shape.group >= 4 else 1) for shape in SHAPES.values()}
    running = [subprocess.Popen([sys.executable, script, str(d), str(g)]) for d, g in sorted(geometries)]
    assert [process.wait() for process in running] == [0] * len(running)


# Rows of a fused qkv start on 16-element boundaries and are read in place; others are copied first.
@pytest.mark.parametrize("padding", [16, 8], ids=["in-place", "copied"])
@pytest.mark.parametrize("dtype", [BF16, FP16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("tokens", "kv_heads", "group", "head_dim", "bits"),
    [
        (1, 8, 4, 128, 128),
        (7, 3, 3, 64, 128),
        (64, 2, 7, 64, 256),
        (65, 1, 1, 96, 64),
        (500, 2, 6, 128, 256),
        (1000, 4, 1, 256, 128),
        (3001, 5, 2, 64, 64),
        (100_000, 8, 1, 128, 128),
    ],
)
def test_hash_bits_are_exact(
    tokens: int, kv_heads: int, group: int, head_dim: int, bits: int, dtype: torch.dtype, padding: int
) -> None:
    generator = torch.Generator("cuda").manual_seed(tokens)
    heads = kv_heads * group
    x = torch.randn(tokens, heads + 1, head_dim + padding, device="cuda", generator=generator)
    x *= torch.randn(tokens, 1, 1, device="cuda", generator=generator).mul(2).exp()
    x = x.to(dtype)[:, 1:, :head_dim]
    x[tokens // 2] = 0
    projection = random_projection(kv_heads, head_dim, bits, generator)
    expected = reference_codes(x, projection)
    out = torch.full_like(expected, SENTINEL)
    assert torch.equal(hash_rows(x, projection, out), expected)

    loc = torch.randperm(tokens + 9, device="cuda", generator=generator)[:tokens]
    cache = torch.full((tokens + 9, heads, bits // 32), SENTINEL, dtype=torch.int32, device="cuda")
    wanted = cache.clone()
    wanted[loc] = expected
    assert torch.equal(hash_rows(x, projection, cache, loc), wanted)


def test_hash_of_extreme_magnitudes_is_exact() -> None:
    """Subnormal numbers must not be flushed to zero before they are scaled."""
    generator = torch.Generator("cuda").manual_seed(3)
    x = torch.randn(9, 1, 64, device="cuda", generator=generator)
    powers = [2.0**n for n in (-149, -140, -126, -120, -114, 0, 60, 120, 125)]
    x = (x.double() * torch.tensor(powers, dtype=torch.float64, device="cuda").view(9, 1, 1)).float()
    projection = random_projection(1, 64, 64, generator)
    # On the host: a GPU's own matrix products are beside the point here, its float32 conversions are not.
    expected = reference_codes(x.cpu(), projection.cpu()).cuda()
    assert torch.equal(hash_rows(x, projection, torch.empty_like(expected)), expected)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_selection_is_exact_and_repeatable(name: str, dtype: torch.dtype) -> None:
    """Codes, ranks, histograms and positions equal the specification's; a second run gives the same bits."""
    shape = SHAPES[name]._replace(dtype=dtype)
    case = build(name, shape)
    workspace = allocate(shape)
    B = len(case.slots) + shape.padded
    assert shape.budget.of(case.seq_lens)[: len(case.slots)].tolist() == case.kept
    workspace.set_kept(case.kept, batch=B)
    select_tokens(*case.selection_arguments(), workspace, sink=case.sink, recent=case.recent)
    check_selection(case, workspace)

    first = workspace.indices.clone(), workspace.ranks.clone(), workspace.histogram.clone()
    poison(workspace)
    select_tokens(*case.selection_arguments(), workspace, sink=case.sink, recent=case.recent)
    assert torch.equal(first[0], workspace.indices)
    assert torch.equal(first[1], workspace.ranks)
    assert torch.equal(first[2], workspace.histogram)


def test_selection_never_waits_for_the_gpu() -> None:
    shape = SHAPES["b4-ragged-h2g6d128-128"]
    case, workspace = build("no wait", shape), allocate(shape)
    workspace.set_kept(case.kept, batch=len(case.slots) + shape.padded)
    arguments = case.selection_arguments()
    select_tokens(*arguments, workspace, sink=2, recent=3)  # compiles
    torch.cuda.synchronize()
    allocated = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        select_tokens(*arguments, workspace, sink=2, recent=3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == allocated


@pytest.mark.usefixtures("compiled_attention")
@pytest.mark.parametrize("name", SHAPES)
def test_step_attends_to_the_selected_tokens(name: str) -> None:
    """Tokens outside the requests are NaN: one of them attended to would show."""
    shape = SHAPES[name]
    case, workspace = build(name, shape), allocate(shape)
    attention = SparseDecode(workspace, head_dim=shape.head_dim, dtype=shape.dtype)
    attention.plan(case.kept, batch=len(case.slots) + shape.padded)
    output = step(case, workspace, attention)
    expected = expected_output(case, check_selection(case, workspace))
    assert_close("output", output[: len(case.slots)], expected, BF16_RATIO)

    poison(workspace)
    assert torch.equal(step(case, workspace, attention)[: len(case.slots)], output[: len(case.slots)])


@pytest.mark.usefixtures("compiled_attention")
def test_plans_follow_the_batch_without_graphs() -> None:
    """One eager wrapper serves batches that grow and shrink."""
    shape = Shape([600] * 6, Budget(tokens=50), 2, 4, 128, 128)
    workspace = allocate(shape)
    attention = SparseDecode(workspace, head_dim=128, dtype=BF16)
    for lengths in ([600, 1, 30], [5], [77] * 6, [77] * 6, [600, 600]):
        case = build(f"eager {lengths}", shape._replace(lengths=lengths))
        poison(workspace)
        attention.plan(case.kept)
        output = step(case, workspace, attention)
        assert_close("output", output, expected_output(case, check_selection(case, workspace)), BF16_RATIO)


class Captured:
    """A decode step of one padded batch size in a CUDA graph, with buffers that cases are loaded into."""

    TENSORS = (
        *("q", "k", "k_pool", "v_pool", "code_cache", "projection"),
        *("slot_table", "req_rows", "seq_lens", "k_lens", "loc"),
    )

    def __init__(self, case: Case, batch: int, workspace: DecodeWorkspace, attention: SparseDecode) -> None:
        self.batch, self.workspace, self.attention = batch, workspace, attention
        self.case = case
        for name in self.TENSORS:
            setattr(case, name, getattr(case, name).contiguous().clone())
        attention.plan(case.kept, batch=batch)
        # Compiles, and makes FlashInfer's small buffers, before anything is captured.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step(case, workspace, attention)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.output = step(case, workspace, attention)

    def replay(self, case: Case) -> Tensor:
        """Load a case into the captured buffers, replay, and return a copy of the output."""
        for name in self.TENSORS:
            value, buffer = getattr(case, name), getattr(self.case, name)
            view = buffer[tuple(slice(size) for size in value.shape)]
            view.copy_(value)
            setattr(case, name, view)
        poison(self.workspace)
        self.output.fill_(float("nan"))
        self.attention.plan(case.kept, batch=self.batch)
        self.graph.replay()
        return self.output.clone()


@pytest.mark.usefixtures("compiled_attention")
@pytest.mark.parametrize(("kv_heads", "group", "head_dim"), [(8, 4, 128), (2, 7, 64), (4, 1, 128), (3, 3, 64)])
def test_graphs_replay_other_steps(kv_heads: int, group: int, head_dim: int) -> None:
    """Two batch sizes captured on the same buffers, replayed with other lengths, slots, rows and padding."""
    budget = Budget(tokens=200, floor=8)
    shape = Shape([5000] * 7, budget, kv_heads, group, head_dim, 128, index_dtype=torch.int64)
    workspace = allocate(shape)
    attention = SparseDecode(workspace, head_dim=head_dim, dtype=BF16, use_cuda_graph=True)

    def load(lengths: list[int], batch: int) -> Case:
        padded = shape._replace(lengths=lengths, padded=batch - len(lengths))
        return build(f"graph {kv_heads}x{group} {lengths}", padded, rows=20, width=5000)

    graphs = {batch: Captured(load([5000] * batch, batch), batch, workspace, attention) for batch in (7, 3)}
    for batch, lengths in (
        (7, [5000, 1, 77, 4999, 200, 201, 300]),
        (3, [1000]),
        (7, [4]),
        (7, [4]),
        (3, [3, 4000, 199]),
        (3, [1, 1, 1]),
        (7, [5000] * 5),
    ):
        case = load(lengths, batch)
        output = graphs[batch].replay(case)
        expected = expected_output(case, check_selection(case, workspace))
        assert_close(f"output of {lengths}", output[: len(lengths)], expected, BF16_RATIO)
