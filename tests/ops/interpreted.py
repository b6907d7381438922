"""The Triton kernels under Triton's interpreter, on a CPU; `test_kernels_interpreted.py` runs this file.

Blocks are made small, so that a few dozen tokens make several blocks and several splits.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hata_kernels import launch, reference, score, topk
from hata_kernels.decode import hata_decode_step, select_tokens
from hata_kernels.encode import hash_decode_step, hash_rows
from hata_kernels.reference import Budget
from hata_kernels.workspace import DecodeWorkspace
from ops.cases import (
    SENTINEL,
    Case,
    assert_close,
    check_selection,
    expected_codes,
    expected_output,
    expected_ranks,
    make_case,
    poison,
    random_projection,
)

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch.INTERPRETED.value, "run with TRITON_INTERPRET=1"
    monkeypatch.setattr(score, "MAX_BLOCK", 16)
    monkeypatch.setattr(topk, "BLOCK", 16)
    monkeypatch.setattr("hata_kernels.launch.PROGRAMS_PER_MULTIPROCESSOR", 23)
    monkeypatch.setattr("hata_kernels.workspace.PROGRAMS_PER_MULTIPROCESSOR", 23)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("kv_heads", "group", "head_dim", "bits", "tokens"),
    [(2, 3, 64, 64, 1), (1, 7, 96, 128, 11), (3, 1, 128, 256, 67), (1, 2, 256, 128, 5)],
)
def test_hash_rows_is_exact(
    kv_heads: int, group: int, head_dim: int, bits: int, tokens: int, dtype: torch.dtype
) -> None:
    generator = seeded(tokens)
    heads = kv_heads * group
    # A slice of a fused qkv: strides between tokens and heads are not those of a contiguous tensor.
    fused = torch.randn(tokens, heads + 2, head_dim + 8, generator=generator)
    fused *= torch.randn(tokens, 1, 1, generator=generator).mul(2).exp()
    x = fused.to(dtype)[:, 1:-1, :head_dim]
    x[tokens // 2] = 0
    projection = random_projection(kv_heads, head_dim, bits, generator)
    expected = reference.hash_codes(x, projection)
    assert torch.equal(hash_rows(x, projection, torch.full_like(expected, SENTINEL)), expected)

    for index_dtype in (torch.int32, torch.int64):
        loc = torch.randperm(tokens + 9, generator=generator)[:tokens]
        out = torch.full((tokens + 9, heads, bits // 32), SENTINEL, dtype=torch.int32)
        wanted = out.clone()
        wanted[loc] = expected
        assert torch.equal(hash_rows(x, projection, out, loc.to(index_dtype)), wanted)


def test_hash_rows_of_extreme_magnitudes_is_exact() -> None:
    generator = seeded(3)
    x = torch.randn(8, 1, 64, generator=generator)
    x *= torch.tensor([2.0**n for n in (-149, -126, -120, -114, 0, 60, 120, 125)]).view(8, 1, 1)
    projection = random_projection(1, 64, 64, generator)
    out = torch.empty((8, 1, 2), dtype=torch.int32)
    assert torch.equal(hash_rows(x, projection, out), reference.hash_codes(x, projection))


def test_hashing_nothing_changes_nothing() -> None:
    out = torch.full((3, 1, 2), SENTINEL, dtype=torch.int32)
    projection = random_projection(1, 64, 64, seeded(0))
    assert (hash_rows(torch.empty(0, 1, 64), projection, out) == SENTINEL).all()


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(("batch", "kv_heads", "group"), [(1, 2, 4), (3, 3, 1), (17, 1, 6)])
def test_decode_hashing_writes_keys_queries_and_zeros(
    batch: int, kv_heads: int, group: int, index_dtype: torch.dtype
) -> None:
    case = make_case(
        [5] * batch,
        Budget(tokens=3),
        kv_heads=kv_heads,
        group=group,
        head_dim=64,
        bits=128,
        dtype=torch.bfloat16,
        generator=seeded(batch),
        index_dtype=index_dtype,
        padded=2,
    )
    q_codes = torch.full((batch + 2, kv_heads * group, 4), SENTINEL, dtype=torch.int32)
    histogram = torch.full((batch + 2, kv_heads, 700), SENTINEL, dtype=torch.int32)
    expected = expected_codes(case)
    hash_decode_step(case.q, case.k, case.projection, case.code_cache, case.loc, q_codes, histogram)
    assert torch.equal(case.code_cache[1:], expected[1:])
    assert torch.equal(q_codes, reference.hash_codes(case.q, case.projection))
    assert (histogram == 0).all()


def test_scores_and_histograms_of_all_requests() -> None:
    """Without k_lens every request is scored, even one that will keep everything."""
    case = make_case(
        [37, 1, 16, 50],
        Budget(tokens=100),
        kv_heads=3,
        group=2,
        head_dim=64,
        bits=64,
        dtype=torch.float16,
        generator=seeded(5),
        sink=40,
        recent=0,
    )
    B, H = 4, 3
    codes = expected_codes(case)
    q_codes = reference.hash_codes(case.q, case.projection)
    ranks = torch.full((B, H, 64), 0x5A5A, dtype=torch.int16)
    histogram = torch.zeros((B, H, score.bins_of(2, 64) + 3), dtype=torch.int32)
    score.score_and_count(
        q_codes, codes, case.slot_table, case.req_rows, case.seq_lens, ranks, histogram, sink=40, recent=0
    )
    for b, expected in enumerate(expected_ranks(case, codes)):
        L = expected.shape[1]
        assert torch.equal(ranks[b, :, :L].int(), expected)
        assert (ranks[b, :, L:] == 0x5A5A).all()
        for h in range(H):
            assert torch.equal(histogram[b, h].long(), torch.bincount(expected[h], minlength=133))


CASES = {
    "ragged": ([70, 1, 33, 16, 17, 100], Budget(tokens=9), 2, 3, 64),
    "one": ([90], Budget(tokens=1), 3, 1, 128),
    "share": ([64, 65, 2, 31], Budget(share_ppm=250_000, floor=4), 1, 7, 256),
    "all": ([20, 48, 3], Budget(tokens=100), 2, 4, 128),
    "short whole": ([40, 24, 90], Budget(tokens=5, min_context=40), 5, 1, 64),
}


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_selected_tokens(name: str, index_dtype: torch.dtype) -> None:
    lengths, budget, kv_heads, group, bits = CASES[name]
    # Without padded rows a token too many would land in the sentinels, not in a row written later.
    padded = 0 if name == "one" else 2
    case = make_case(
        lengths,
        budget,
        kv_heads=kv_heads,
        group=group,
        head_dim=64,
        bits=bits,
        dtype=torch.bfloat16,
        generator=seeded(len(name)),
        index_dtype=index_dtype,
        padded=padded,
    )
    B = len(lengths) + padded
    workspace = DecodeWorkspace.allocate(
        max_batch=B + 1,
        q_heads=kv_heads * group,
        kv_heads=kv_heads,
        bits=bits,
        max_context=max(lengths),
        max_kept=budget.largest(max(lengths)),
        device=CPU,
    )
    poison(workspace)
    host = workspace.set_kept(case.kept, batch=B)
    assert torch.equal(workspace.indptr[: len(host)], host)
    select_tokens(*case.selection_arguments(), workspace, sink=case.sink, recent=case.recent)
    check_selection(case, workspace)


def test_ties_at_the_cut_go_to_the_earliest() -> None:
    """One code for all keys: every token that is not always kept ties."""
    case = make_case(
        [60, 45],
        Budget(tokens=20),
        kv_heads=2,
        group=1,
        head_dim=64,
        bits=64,
        dtype=torch.bfloat16,
        generator=seeded(8),
    )
    case.k.copy_(case.k[:1, :1])
    case.code_cache[:] = reference.hash_codes(case.k[:1], case.projection)[0]
    workspace = workspace_for(case, Budget(tokens=20), 60)
    select_tokens(*case.selection_arguments(), workspace, sink=case.sink, recent=case.recent)
    for slots, request in zip(check_selection(case, workspace), case.slots, strict=True):
        assert slots.tolist() == [torch.cat([request[:17], request[-3:]]).tolist()] * 2


def workspace_for(case: Case, budget: Budget, max_context: int) -> DecodeWorkspace:
    B, q_heads, _ = case.q.shape
    workspace = DecodeWorkspace.allocate(
        max_batch=B,
        q_heads=q_heads,
        kv_heads=case.k.shape[1],
        bits=case.projection.shape[2],
        max_context=max_context,
        max_kept=budget.largest(max_context),
        device=CPU,
    )
    poison(workspace)
    workspace.set_kept(case.kept)
    return workspace


class GatherAttention:
    """Attention over the workspace's rows in PyTorch, in place of FlashInfer."""

    def __init__(self, workspace: DecodeWorkspace) -> None:
        self.workspace = workspace

    def run(self, q: Tensor, k_pool: Tensor, v_pool: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
        B, H = q.shape[0], k_pool.shape[1]
        keys, values = k_pool.flatten(0, 1), v_pool.flatten(0, 1)
        indptr = self.workspace.indptr.tolist()
        groups = q.unflatten(1, (H, -1)).flatten(0, 1)
        outputs = []
        for row in range(B * H):
            chosen = self.workspace.indices[indptr[row] : indptr[row + 1]].long()
            outputs.append(reference.attend(groups[row], keys[chosen].unsqueeze(0), values[chosen].unsqueeze(0), scale))
        return torch.stack(outputs).view(B, -1, values.shape[-1])


def test_whole_step_equals_the_specification() -> None:
    budget = Budget(tokens=12, share_ppm=300_000)
    case = make_case(
        [75, 1, 40],
        budget,
        kv_heads=2,
        group=3,
        head_dim=64,
        bits=128,
        dtype=torch.float16,
        generator=seeded(9),
    )
    workspace = workspace_for(case, budget, 75)
    codes = expected_codes(case)
    output = hata_decode_step(
        *case.arguments(),
        workspace,
        GatherAttention(workspace),
        sink=case.sink,
        recent=case.recent,
        scale=case.scale,
    )
    expected, positions = reference.hata_decode(
        case.q,
        case.k_pool,
        case.v_pool,
        codes,
        case.slots,
        case.projection,
        budget,
        sink=case.sink,
        recent=case.recent,
        scale=case.scale,
    )
    chosen = check_selection(case, workspace)
    for slots, request, wanted in zip(chosen, case.slots, positions, strict=True):
        assert torch.equal(slots, request[wanted])
    torch.testing.assert_close(output, expected)
    assert_close("output", output, expected_output(case, chosen), 1e-2)


def test_results_do_not_depend_on_the_number_of_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    budget = Budget(tokens=11)
    results = []
    for programs in (1, 7, 60):
        monkeypatch.setattr("hata_kernels.launch.PROGRAMS_PER_MULTIPROCESSOR", programs)
        monkeypatch.setattr("hata_kernels.workspace.PROGRAMS_PER_MULTIPROCESSOR", programs)
        case = make_case(
            [130, 77],
            budget,
            kv_heads=1,
            group=2,
            head_dim=64,
            bits=64,
            dtype=torch.bfloat16,
            generator=seeded(10),
        )
        workspace = workspace_for(case, budget, 130)
        select_tokens(*case.selection_arguments(), workspace, sink=case.sink, recent=case.recent)
        check_selection(case, workspace)
        results.append(workspace.indices.clone())
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_refusals_name_the_tensor() -> None:
    projection = random_projection(2, 64, 64, seeded(0))
    x = torch.zeros(3, 4, 64)
    out = torch.zeros(3, 4, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"^x: dtype"):
        hash_rows(x.double(), projection, out)
    with pytest.raises(ValueError, match=r"^x: last dimension has stride 2"):
        hash_rows(torch.zeros(3, 4, 128)[..., ::2], projection, out)
    with pytest.raises(ValueError, match=r"^out: shape"):
        hash_rows(x, projection, out[:, :2].contiguous())
    with pytest.raises(ValueError, match=r"^out: strides"):
        hash_rows(x, projection, torch.zeros(3, 4, 4, dtype=torch.int32)[..., :2])
    with pytest.raises(ValueError, match=r"^out: 2 rows for 3 rows of x"):
        hash_rows(x, projection, out[:2])
    with pytest.raises(ValueError, match="3 query heads are no multiple"):
        hash_rows(x[:, :3], projection, out)
    with pytest.raises(ValueError, match="head dimension 32"):
        hash_rows(x, projection[:, :32].contiguous(), out)
    sizes = {"q_heads": 4, "kv_heads": 2, "bits": 64, "max_context": 10, "max_kept": 5, "device": CPU}
    workspace = DecodeWorkspace.allocate(max_batch=2, **sizes)
    with pytest.raises(ValueError, match="max_kept or max_indices"):
        workspace.set_kept([6, 5])
    with pytest.raises(ValueError, match="at least 1 each"):
        workspace.set_kept([0])
    with pytest.raises(ValueError, match="3 requests in a batch of 3"):
        workspace.set_kept([1, 1, 1])
    assert workspace.nbytes() == sum(tensor.numel() * tensor.element_size() for tensor in vars(workspace).values())
