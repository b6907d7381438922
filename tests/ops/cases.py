"""Decode steps to test kernels with, and what the specification makes of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hata_kernels import reference
from hata_kernels.reference import Budget
from hata_kernels.workspace import DecodeWorkspace

SENTINEL = 0x5A5A5A5A
# Rows hashed at a time by the specification, which works in float64.
HASH_CHUNK = 8192


@dataclass
class Case:
    """One layer's decode step: the arguments of `decode.hata_decode_step`, and the slots of each request."""

    q: Tensor
    k: Tensor
    k_pool: Tensor
    v_pool: Tensor
    code_cache: Tensor
    projection: Tensor
    slot_table: Tensor
    req_rows: Tensor
    seq_lens: Tensor
    k_lens: Tensor
    loc: Tensor
    slots: list[Tensor]
    kept: list[int]
    sink: int
    recent: int

    @property
    def scale(self) -> float:
        return self.q.shape[-1] ** -0.5

    def selection_arguments(self) -> tuple[Tensor, ...]:
        """What `decode.select_tokens` takes before the workspace."""
        return (
            self.q,
            self.k,
            self.code_cache,
            self.projection,
            self.slot_table,
            self.req_rows,
            self.seq_lens,
            self.k_lens,
            self.loc,
        )

    def arguments(self) -> tuple[Tensor, ...]:
        """What `decode.hata_decode_step` takes before the workspace."""
        return (self.q, self.k, self.k_pool, self.v_pool, *self.selection_arguments()[2:])


def reference_codes(x: Tensor, projection: Tensor) -> Tensor:
    """`reference.hash_codes`, in chunks that fit a GPU."""
    return torch.cat([reference.hash_codes(part, projection) for part in x.split(HASH_CHUNK)])


def random_projection(kv_heads: int, head_dim: int, bits: int, generator: torch.Generator) -> Tensor:
    return torch.randint(
        -128,
        128,
        (kv_heads, head_dim, bits),
        dtype=torch.int8,
        device=generator.device,
        generator=generator,
    )


def make_case(
    lengths: list[int],
    budget: Budget,
    *,
    kv_heads: int,
    group: int,
    head_dim: int,
    bits: int,
    dtype: torch.dtype,
    generator: torch.Generator,
    index_dtype: torch.dtype = torch.int32,
    sink: int = 2,
    recent: int = 3,
    padded: int = 0,
    rows: int | None = None,
    width: int | None = None,
) -> Case:
    """A random step.

    Slots are scattered over the pool; requests after the first share a prefix of the first one's slots, as
    in a prefix cache. Slots no request holds are NaN in both pools and sentinels in the code cache, as are
    the codes of the current tokens, which the step must write. ``padded`` rows at the end have row 0,
    length 1 and slot 0.
    """
    device = generator.device
    B, H, D = len(lengths), kv_heads, head_dim

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=generator)

    shared = [0] + [min(lengths[0] - 1, length - 1, lengths[0] // 3) for length in lengths[1:]]
    own = [length - prefix for length, prefix in zip(lengths, shared, strict=True)]
    free = sum(own) // 4 + 3
    order = torch.randperm(sum(own) + free, device=device, generator=generator) + 1
    slots: list[Tensor] = []
    taken = 0
    for prefix, fresh in zip(shared, own, strict=True):
        reused = slots[0][:prefix] if slots else order[:0]
        slots.append(torch.cat([reused, order[taken : taken + fresh]]))
        taken += fresh
    unused = torch.cat([order[taken:], order.new_zeros(1)])
    S = len(order) + 1

    # Magnitudes differ between heads and tokens, as keys' do.
    k_pool = (randn(S, H, D) * randn(S, H, 1).exp()).to(dtype)
    v_pool = randn(S, H, D).to(dtype)
    k_pool[unused] = float("nan")
    v_pool[unused] = float("nan")
    qkv = randn(B + padded, (group * H + 2 * H) * D).to(dtype)
    q = qkv[:, : group * H * D].unflatten(-1, (group * H, D))
    k = qkv[:, group * H * D : (group + 1) * H * D].unflatten(-1, (H, D))
    last = torch.stack([request[-1] for request in slots])
    k_pool[last] = k[:B]

    projection = random_projection(H, D, bits, generator)
    code_cache = reference_codes(k_pool.nan_to_num(), projection)
    code_cache[unused] = SENTINEL
    code_cache[last] = SENTINEL

    rows = B + 2 if rows is None else rows
    width = max(lengths) + 5 if width is None else width
    slot_table = torch.zeros((rows, width), dtype=torch.int32, device=device)
    # Request b has row `chosen[b]`; row 0 belongs to padded rows.
    chosen = torch.randperm(rows - 1, device=device, generator=generator)[:B] + 1
    for row, request in zip(chosen.tolist(), slots, strict=True):
        slot_table[row, : len(request)] = request.to(torch.int32)
    kept = [budget.of(length) for length in lengths]

    def index(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=index_dtype, device=device)

    return Case(
        q=q,
        k=k,
        k_pool=k_pool,
        v_pool=v_pool,
        code_cache=code_cache,
        projection=projection,
        slot_table=slot_table,
        req_rows=index(chosen.tolist() + [0] * padded),
        seq_lens=index(lengths + [1] * padded),
        k_lens=torch.tensor(kept + [1] * padded, dtype=torch.int32, device=device),
        loc=index(last.tolist() + [0] * padded),
        slots=slots,
        kept=kept,
        sink=sink,
        recent=recent,
    )


def poison(workspace: DecodeWorkspace) -> None:
    """Fill every scratch buffer but indptr with a sentinel: none may be read before it is written."""
    for name in ("q_codes", "histogram", "thresholds", "counts", "indices"):
        getattr(workspace, name).fill_(SENTINEL)
    workspace.ranks.fill_(0x5A5A)


def expected_codes(case: Case) -> Tensor:
    """The code cache after the step, but for slot 0, which belongs to padded rows."""
    codes = case.code_cache.clone()
    B = len(case.slots)
    codes[case.loc[:B].long()] = reference.hash_codes(case.k[:B], case.projection)
    return codes


def expected_ranks(case: Case, codes: Tensor) -> list[Tensor]:
    """[H, L] int32 for each request, given the code cache after the step."""
    q_codes = reference.hash_codes(case.q, case.projection)
    return [
        reference.rank_scores(reference.hamming_scores(q_codes[b], codes[request]), case.sink, case.recent)
        for b, request in enumerate(case.slots)
    ]


def check_selection(case: Case, workspace: DecodeWorkspace) -> list[Tensor]:
    """Assert that the workspace holds what the specification selects.

    Exact: codes, ranks, histograms, positions. Requests that keep everything have no ranks. Padded rows
    select slot 0, and nothing is written beyond them.

    Returns:
        The chosen slots of each request, [H, k].
    """
    B, H, _ = case.k.shape
    codes = expected_codes(case)
    assert torch.equal(case.code_cache[1:], codes[1:]), "codes of the step's keys, or of others"
    q_codes = reference.hash_codes(case.q, case.projection)
    assert torch.equal(workspace.q_codes[:B], q_codes), "codes of the queries"
    indptr = workspace.indptr[: B * H + 1].tolist()
    chosen = []
    for b, ranks in enumerate(expected_ranks(case, codes)):
        L, k = ranks.shape[1], case.kept[b]
        if k < L:
            assert torch.equal(workspace.ranks[b, :, :L].int(), ranks), f"ranks of request {b}"
            for h in range(H):
                counts = torch.bincount(ranks[h], minlength=workspace.histogram.shape[2])
                assert torch.equal(workspace.histogram[b, h].long(), counts), f"histogram {b}, {h}"
        positions = reference.select_positions(ranks, k)
        slots = case.slots[b][positions]
        for h in range(H):
            start, end = indptr[b * H + h], indptr[b * H + h + 1]
            assert end - start == k
            rows = workspace.indices[start:end].long()
            assert torch.equal(rows, slots[h] * H + h), f"selection of request {b}, KV head {h}"
        chosen.append(slots)
    end = indptr[len(case.slots) * H]
    padded = torch.arange(H, device=case.k.device).repeat(B - len(case.slots))
    assert torch.equal(workspace.indices[end : indptr[-1]].long(), padded), "selection of padded rows"
    assert (workspace.indices[indptr[-1] :] == SENTINEL).all(), "indices beyond the last request"
    return chosen


def expected_output(case: Case, chosen: list[Tensor]) -> Tensor:
    """[requests, Hq, Dv] float64: exact attention over the chosen slots."""
    head = torch.arange(case.k.shape[1], device=case.q.device).unsqueeze(1)
    outputs = []
    for b, slots in enumerate(chosen):
        keys, values = case.k_pool[slots, head].double(), case.v_pool[slots, head].double()
        q = case.q[b].double().unflatten(0, (keys.shape[0], -1))
        weights = torch.softmax(q @ keys.transpose(1, 2) * case.scale, dim=-1)
        outputs.append((weights @ values).flatten(0, 1))
    return torch.stack(outputs)


def assert_close(name: str, actual: Tensor, wanted: Tensor, ratio: float) -> None:
    """Root mean square of the error, as a share of the expected values' own."""
    error = actual.double() - wanted.double()
    found = float(error.square().mean().sqrt() / wanted.double().square().mean().sqrt().clamp(min=1e-30))
    assert found < ratio, f"{name}: relative error {found:.2e}, expected below {ratio:.0e}"  # NaN fails too
