"""The compiled kernels on a GPU against the specification: integers exactly, attention as bf16 allows."""

from __future__ import annotations

import zlib
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from hata_kernels.decode import hata_decode_step
from hata_kernels.encode import hash_decode_step, hash_rows
from hata_kernels.plan import plan_step
from hata_kernels.reference import HAMMING, ONE_SIDED, SAMPLED, TOP, Budget
from hata_kernels.score import score_and_count
from hata_kernels.workspace import DecodeWorkspace
from ops.cases import (
    SENTINEL,
    SIZE_SENTINEL,
    Case,
    assert_close,
    attend_to_all,
    check_step,
    expected_codes,
    expected_output,
    expected_ranks,
    make_case,
    poison,
    random_projection,
    reference_codes,
    reference_sizes,
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
    scoring: str = HAMMING
    selection: str = SAMPLED
    index_dtype: torch.dtype = torch.int32
    padded: int = 0
    sized: bool = False


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
    "b2-65537-h8g4d128-128-one-sided": Shape([65_537, 3], SHARE, 8, 4, 128, 128, scoring=ONE_SIDED),
    "b4-ragged-h2g7d64-256-one-sided": Shape(ragged(4, 12_289), SHARE, 2, 7, 64, 256, scoring=ONE_SIDED, padded=1),
    "b64-ragged-h4g1d128-64-one-sided": Shape(ragged(64, 4096), SHARE, 4, 1, 128, 64, scoring=ONE_SIDED),
    "b2-65537-h8g4d128-128-top": Shape([65_537, 3], SHARE, 8, 4, 128, 128, selection=TOP),
    "b4-ragged-h2g7d64-256-one-sided-top": Shape(
        ragged(4, 12_289), SHARE, 2, 7, 64, 256, scoring=ONE_SIDED, selection=TOP
    ),
    "b1-131071-h8g4d128-128-one-sided-sized": Shape(
        [131_071], SHARE, 8, 4, 128, 128, scoring=ONE_SIDED, index_dtype=torch.int64, sized=True
    ),
    "b64-ragged-h8g4d128-128-one-sided-sized": Shape(
        ragged(64, 4096), Budget(tokens=128), 8, 4, 128, 128, scoring=ONE_SIDED, sized=True
    ),
    "b13-ragged-h5g3d64-256-one-sided-sized": Shape(
        ragged(13, 9999), SHARE, 5, 3, 64, 256, scoring=ONE_SIDED, padded=2, sized=True
    ),
    "b4-ragged-h2g7d64-64-sized-top": Shape(ragged(4, 12_289), SHARE, 2, 7, 64, 64, selection=TOP, sized=True),
    "b2-32768-h32g1d128-128-sized": Shape([32_768, 20_001], SHARE, 32, 1, 128, 128, sized=True),
    "b32-16384-h1g4d64-64-nearly-all": Shape([16_384] * 32, Budget(tokens=15_000), 1, 4, 64, 64),
    "b3-2049-h2g16d128-256": Shape([2049, 2048, 2047], Budget(tokens=333), 2, 16, 128, 256),
}


def build(name: str, shape: Shape, **options: int) -> Case:
    seed = zlib.crc32(name.encode())
    print(f"{name}: seed {seed}")
    odd = {"width": max(shape.lengths) + 5} if seed % 2 else {}  # else rows of whole groups of tokens
    return make_case(**(shape._asdict() | odd | options), generator=torch.Generator("cuda").manual_seed(seed))


def run(case: Case, workspace: DecodeWorkspace, out: Tensor | None = None) -> Tensor:
    plan_step(case.seq_lens, case.req_rows, workspace, case.budget)
    options = {"sink": case.sink, "recent": case.recent, "scale": case.scale, "layer": case.layer}
    return hata_decode_step(*case.arguments(), workspace, **options, out=out, size_cache=case.size_cache)


# Rows of a fused qkv start on 16-element boundaries and are read in place; others are copied first.
@pytest.mark.parametrize("padding", [16, 8], ids=["in-place", "copied"])
@pytest.mark.parametrize("dtype", [BF16, FP16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("tokens", "heads", "head_dim", "bits"),
    [
        (1, 8, 128, 128),
        (7, 3, 64, 128),
        (64, 2, 64, 256),
        (65, 1, 96, 64),
        (500, 2, 128, 256),
        (1000, 4, 256, 128),
        (3001, 5, 64, 64),
        (100_000, 8, 128, 128),
    ],
)
def test_hash_bits_are_exact(
    tokens: int, heads: int, head_dim: int, bits: int, dtype: torch.dtype, padding: int
) -> None:
    generator = torch.Generator("cuda").manual_seed(tokens)
    x = torch.randn(tokens, heads + 1, head_dim + padding, device="cuda", generator=generator)
    x *= torch.randn(tokens, 1, 1, device="cuda", generator=generator).mul(2).exp()
    x = x.to(dtype)[:, 1:, :head_dim]
    x[tokens // 2] = 0
    projection = random_projection(heads, head_dim, bits, generator)
    expected = reference_codes(x, projection)
    out = torch.full_like(expected, SENTINEL)
    assert torch.equal(hash_rows(x, projection, out), expected)

    loc = torch.randperm(tokens + 9, device="cuda", generator=generator)[:tokens]
    cache = torch.full((tokens + 9, heads, bits // 32), SENTINEL, dtype=torch.int32, device="cuda")
    wanted = cache.clone()
    wanted[loc] = expected
    assert torch.equal(hash_rows(x, projection, cache, loc), wanted)
    sizes = torch.full((tokens + 9, heads), SIZE_SENTINEL, dtype=torch.int16, device="cuda")
    wanted_sizes = sizes.clone()
    wanted_sizes[loc] = reference_sizes(x, projection)
    assert torch.equal(hash_rows(x, projection, cache, loc, sizes), wanted)
    assert torch.equal(sizes, wanted_sizes)


def test_hash_of_extreme_magnitudes_is_exact() -> None:
    """Subnormal numbers must not be flushed to zero before they are scaled."""
    generator = torch.Generator("cuda").manual_seed(3)
    x = torch.randn(9, 1, 64, device="cuda", generator=generator)
    powers = [2.0**n for n in (-149, -140, -126, -120, -114, 0, 60, 120, 125)]
    x = (x.double() * torch.tensor(powers, dtype=torch.float64, device="cuda").view(9, 1, 1)).float()
    projection = random_projection(1, 64, 64, generator)
    # On the host: a GPU's own matrix products are beside the point here, its float32 conversions are not.
    expected = reference_codes(x.cpu(), projection.cpu()).cuda()
    sizes = torch.empty(9, 1, dtype=torch.int16, device="cuda")
    assert torch.equal(hash_rows(x, projection, torch.empty_like(expected), sizes=sizes), expected)
    assert torch.equal(sizes.cpu(), reference_sizes(x.cpu(), projection.cpu()))


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_step_is_the_specification(name: str, dtype: torch.dtype) -> None:
    """Codes, planes, ranks and selections exactly; tokens outside the requests are NaN, so that one attended to shows.

    A second step of the same inputs gives the same bits."""
    case = build(name, SHAPES[name]._replace(dtype=dtype))
    workspace = case.workspace()
    poison(workspace)
    codes = expected_codes(case)
    output = run(case, workspace, torch.full_like(case.q, float("nan")))
    expected = expected_output(case, check_step(case, workspace, codes))
    assert_close("output", output[: len(case.slots)], expected, BF16_RATIO)
    everything = attend_to_all(case, workspace)
    assert_close("output of a dense layer", everything[: len(case.slots)], expected_output(case), BF16_RATIO)

    first = workspace.slots.clone(), workspace.ranks.clone()
    poison(workspace)
    again = run(case, workspace)
    assert torch.equal(again[: len(case.slots)], output[: len(case.slots)])
    assert torch.equal(first[0], workspace.slots)
    for b, length in enumerate(SHAPES[name].lengths):
        assert torch.equal(first[1][b, :, :length], workspace.ranks[b, :, :length])


@pytest.mark.parametrize("name", SHAPES)
def test_every_token_is_counted_once(name: str) -> None:
    """The histogram in shared memory, which the interpreter does not have."""
    case = build(name, SHAPES[name])
    workspace = case.workspace()
    poison(workspace)
    codes = expected_codes(case)
    plan_step(case.seq_lens, case.req_rows, workspace, case.budget)
    pools = case.k_pool, case.v_pool, case.code_cache
    sizes = {"size_cache": case.size_cache}
    hash_decode_step(case.q, case.k, case.v, case.projection, *pools, case.loc, workspace, **sizes)
    options = {"sink": case.sink, "recent": case.recent, "layer": case.layer, **sizes}
    score_and_count(case.code_cache, case.slot_table, workspace, len(case.q), **options)
    for b, ranks in enumerate(expected_ranks(case, codes)):
        for h, row in enumerate(ranks):
            counts = torch.bincount(row, minlength=workspace.bins)
            if case.kept[b] == len(row):
                counts.zero_()
            # The last rank is that of no token: what tiles have beyond a request is counted there.
            assert torch.equal(workspace.histogram[b, h, :-1].long(), counts[:-1]), f"histogram {b}, {h}"


def test_a_step_never_waits_for_the_gpu() -> None:
    case = build("no wait", SHAPES["b4-ragged-h2g6d128-128"])
    workspace, out = case.workspace(), torch.empty_like(case.q)
    run(case, workspace, out)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(case, workspace, out)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_fp8_pools(dtype: torch.dtype) -> None:
    """Codes come from the keys before quantisation; attention reads what was stored, times its scale."""
    case = build("fp8", Shape([3000, 77, 1500], SHARE, 4, 4, 128, 128))
    workspace = case.workspace()
    last = case.loc.long()
    case.k_pool[last], case.v_pool[last] = case.k, case.v
    quantised = [(pool.nan_to_num() / 2).to(dtype) for pool in (case.k_pool, case.v_pool)]
    codes = expected_codes(case)
    plan_step(case.seq_lens, case.req_rows, workspace, case.budget)
    output = hata_decode_step(
        *(case.q, case.k, case.v, *quantised),
        *case.arguments()[5:],
        workspace,
        sink=case.sink,
        recent=case.recent,
        scale=case.scale,
        layer=case.layer,
        store_kv=False,
        k_scale=2.0,
        v_scale=2.0,
    )
    for b in range(3):
        workspace.slots[b * 4 : (b + 1) * 4, case.kept[b] :] = SENTINEL
    chosen = check_step(case, workspace, codes)
    case.k_pool, case.v_pool = (pool.to(BF16) * 2 for pool in quantised)
    assert_close("output", output, expected_output(case, chosen), BF16_RATIO)


@pytest.mark.parametrize("name", SHAPES)
def test_attention_equals_flashinfer(name: str) -> None:
    """FlashInfer's paged decode over the same lists: (request, KV head) is a request, a token a page. It knows of no
    tokens that count more than once."""
    flashinfer = pytest.importorskip("flashinfer")
    case = build(name, SHAPES[name]._replace(selection=TOP))
    workspace = case.workspace()
    output = run(case, workspace)
    B, (H, D) = len(case.slots), case.k.shape[1:]
    lists = [
        (workspace.slots[b * H + h, :k] if k < len(request) else request.int()) * H + h
        for b, (request, k) in enumerate(zip(case.slots, case.kept, strict=True))
        for h in range(H)
    ]
    ends = torch.tensor([0, *(len(chosen) for chosen in lists)], device="cuda").cumsum(0).int()
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(2**28, dtype=torch.uint8, device="cuda"), use_tensor_cores=True
    )
    ones = torch.ones(B * H, dtype=torch.int32, device="cuda")
    wrapper.plan(ends, torch.cat(lists), ones, case.group, 1, D, 1, q_data_type=BF16, sm_scale=case.scale)
    pools = case.k_pool.view(-1, 1, 1, D), case.v_pool.view(-1, 1, 1, D)
    expected = wrapper.run(case.q[:B].reshape(B * H, case.group, D), pools)
    assert_close("output", output[:B].reshape_as(expected), expected, BF16_RATIO)


class Captured:
    """A decode step of one padded batch size in a CUDA graph, with buffers that cases are loaded into."""

    TENSORS = (
        *("q", "k", "v", "k_pool", "v_pool", "code_cache", "projection"),
        *("slot_table", "req_rows", "seq_lens", "loc"),
    )

    def __init__(self, case: Case, workspace: DecodeWorkspace) -> None:
        self.workspace, self.case = workspace, case
        for name in self.TENSORS:
            setattr(case, name, getattr(case, name).contiguous().clone())
        # Compiles before anything is captured.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run(case, workspace)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.output = run(case, workspace)

    def replay(self, case: Case) -> Tensor:
        """Load a case into the captured buffers, replay, and return a copy of the output."""
        for name in self.TENSORS:
            value, buffer = getattr(case, name), getattr(self.case, name)
            view = buffer[tuple(slice(size) for size in value.shape)]
            view.copy_(value)
            setattr(case, name, view)
        poison(self.workspace)
        self.output.fill_(float("nan"))
        self.graph.replay()
        return self.output.clone()


@pytest.mark.parametrize(("kv_heads", "group", "head_dim"), [(8, 4, 128), (2, 7, 64), (4, 1, 128), (3, 3, 64)])
def test_graphs_replay_other_steps(kv_heads: int, group: int, head_dim: int) -> None:
    """Two batch sizes captured on the same buffers, replayed with other lengths, slots, rows and padding."""
    budget = Budget(tokens=200, floor=8)
    shape = Shape([5000] * 7, budget, kv_heads, group, head_dim, 128, index_dtype=torch.int64)

    def load(lengths: list[int], batch: int) -> Case:
        padded = shape._replace(lengths=lengths, padded=batch - len(lengths))
        return build(f"graph {kv_heads}x{group} {lengths}", padded, rows=20, width=5000)

    workspace = load([5000] * 7, 7).workspace()
    graphs = {batch: Captured(load([5000] * batch, batch), workspace) for batch in (7, 3)}
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
        codes = expected_codes(case)
        output = graphs[batch].replay(case)
        # The pools of the capture are larger than the case's: only its own slots count.
        expected = expected_output(case, check_step(case, workspace, codes))
        assert_close(f"output of {lengths}", output[: len(lengths)], expected, BF16_RATIO)
