"""Decode steps to test kernels with, and what the specification makes of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hata_kernels import reference
from hata_kernels.attend import attend
from hata_kernels.reference import Budget
from hata_kernels.workspace import SLOT_BITS, DecodeWorkspace

SENTINEL = 0x5A5A5A5A
SIZE_SENTINEL = 0x5A5A
# Rows hashed at a time by the specification, which works in float64.
HASH_CHUNK = 8192


@dataclass
class Case:
    """One layer's decode step: the arguments of `decode.hata_decode_step`, and the slots of each request."""

    q: Tensor
    k: Tensor
    v: Tensor
    k_pool: Tensor
    v_pool: Tensor
    code_cache: Tensor
    projection: Tensor
    slot_table: Tensor
    req_rows: Tensor
    seq_lens: Tensor
    loc: Tensor
    slots: list[Tensor]
    budget: Budget
    sink: int
    recent: int
    scoring: str = reference.HAMMING
    selection: str = reference.SAMPLED
    layer: int = 5
    size_cache: Tensor | None = None

    @property
    def scale(self) -> float:
        return self.q.shape[-1] ** -0.5

    @property
    def group(self) -> int:
        return self.q.shape[1] // self.k.shape[1]

    @property
    def kept(self) -> list[int]:
        """Tokens that each request attends to; padded rows left out."""
        kept: list[int] = self.budget.plan(self.seq_lens.cpu()).tolist()
        return kept[: len(self.slots)]

    def arguments(self) -> tuple[Tensor, ...]:
        """What `decode.hata_decode_step` takes before the workspace."""
        return (
            self.q,
            self.k,
            self.v,
            self.k_pool,
            self.v_pool,
            self.code_cache,
            self.projection,
            self.slot_table,
            self.loc,
        )

    def workspace(self, max_batch: int | None = None, max_context: int | None = None) -> DecodeWorkspace:
        max_context = int(self.seq_lens.max()) if max_context is None else max_context
        return DecodeWorkspace.allocate(
            max_batch=len(self.q) if max_batch is None else max_batch,
            q_heads=self.q.shape[1],
            kv_heads=self.k.shape[1],
            head_dim=self.v.shape[2],
            bits=self.projection.shape[-1],
            max_context=max_context,
            max_kept=self.budget.largest(max_context),
            device=self.q.device,
            scoring=self.scoring,
            selection=self.selection,
        )


def reference_codes(x: Tensor, projection: Tensor) -> Tensor:
    """`reference.hash_codes`, in chunks that fit a GPU."""
    return torch.cat([reference.hash_codes(part, projection) for part in x.split(HASH_CHUNK)])


def reference_sizes(x: Tensor, projection: Tensor) -> Tensor:
    """`reference.hash_sizes`, in chunks that fit a GPU."""
    return torch.cat([reference.hash_sizes(part, projection) for part in x.split(HASH_CHUNK)])


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
    scoring: str = reference.HAMMING,
    selection: str = reference.SAMPLED,
    sized: bool = False,
) -> Case:
    """A random step, with sizes of keys beside their codes if ``sized``.

    Slots are scattered over the pool; requests after the first share a prefix of the first one's slots, as
    in a prefix cache. Slots that no request holds are NaN in both pools and sentinels in the caches of codes and sizes,
    as are those of the current tokens, which the step must write. Entries of the slot table that no request has are
    sentinels, far beyond the pool. Its rows have ``width`` of them, else room for whole groups of four tokens, as in
    SGLang.
    ``padded`` rows at the end have row 0, length 1 and slot 0.
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
    q[:, :group] = q[:, :1]  # the first group's queries agree in all bits (`reference.nearness`)
    k = qkv[:, group * H * D : (group + 1) * H * D].unflatten(-1, (H, D))
    v = qkv[:, (group + 1) * H * D :].unflatten(-1, (H, D))
    last = torch.stack([request[-1] for request in slots])
    k_pool[last] = float("nan")
    v_pool[last] = float("nan")

    projection = torch.stack([random_projection(H, D, bits, generator) for _ in ("keys", "queries")])
    code_cache = reference_codes(k_pool.nan_to_num(), projection[reference.KEYS])
    code_cache[unused] = SENTINEL
    code_cache[last] = SENTINEL
    size_cache = None
    if sized:
        size_cache = reference_sizes(k_pool.nan_to_num(), projection[reference.KEYS])
        size_cache[unused] = SIZE_SENTINEL
        size_cache[last] = SIZE_SENTINEL

    rows = B + 2 if rows is None else rows
    width = -(-max(lengths) // 4) * 4 if width is None else width
    slot_table = torch.full((rows, width), SENTINEL, dtype=torch.int32, device=device)
    slot_table[0, 0] = 0
    # Request b has row `chosen[b]`; row 0 belongs to padded rows.
    chosen = torch.randperm(rows - 1, device=device, generator=generator)[:B] + 1
    for row, request in zip(chosen.tolist(), slots, strict=True):
        slot_table[row, : len(request)] = request.to(torch.int32)

    def index(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=index_dtype, device=device)

    return Case(
        q=q,
        k=k,
        v=v,
        k_pool=k_pool,
        v_pool=v_pool,
        code_cache=code_cache,
        projection=projection,
        slot_table=slot_table,
        req_rows=index(chosen.tolist() + [0] * padded),
        seq_lens=index(lengths + [1] * padded),
        loc=index(last.tolist() + [0] * padded),
        slots=slots,
        budget=budget,
        sink=sink,
        recent=recent,
        scoring=scoring,
        selection=selection,
        size_cache=size_cache,
    )


def poison(workspace: DecodeWorkspace) -> None:
    """Fill the buffers that need not be zero between steps with a sentinel: none is read before it is written."""
    for name in ("planes", "histogram", "slots", "kept", "partial", "partial_lse"):
        getattr(workspace, name).view(torch.int32).fill_(SENTINEL)
    for name in ("shares", "chunks", "all_chunks"):
        getattr(workspace, name).fill_(SENTINEL)
    workspace.ranks.fill_(0x5A)
    workspace.share_counts.fill_(0x5A5A)


def expected_codes(case: Case) -> Tensor:
    """The code cache after the step, but for slot 0, which belongs to padded rows."""
    codes = case.code_cache.clone()
    B = len(case.slots)
    codes[case.loc[:B].long()] = reference.hash_codes(case.k[:B], case.projection[reference.KEYS])
    return codes


def expected_sizes(case: Case) -> Tensor | None:
    """The cache of sizes after the step, but for slot 0; None where keys have no sizes."""
    if case.size_cache is None:
        return None
    sizes = case.size_cache.clone()
    B = len(case.slots)
    sizes[case.loc[:B].long()] = reference.hash_sizes(case.k[:B], case.projection[reference.KEYS])
    return sizes


def expected_weights(case: Case) -> Tensor:
    """[B, H, bits] int32."""
    return reference.query_weights(case.q, case.projection[reference.QUERIES], case.scoring)


def expected_planes(case: Case) -> Tensor:
    """[B, H, 1 + P, W] int32."""
    return reference.query_planes(expected_weights(case), reference.magnitudes(case.group, case.scoring))


def expected_luck(case: Case, length: int) -> Tensor:
    """[L] int32: none where only the best are selected."""
    return reference.luck(length, case.layer, case.q.device) * (case.selection == reference.SAMPLED)


def expected_ranks(case: Case, codes: Tensor) -> list[Tensor]:
    """[H, L] int32 for each request, as drawn, given the code cache after the step."""
    bins = reference.bins_of(case.group, case.projection.shape[-1], case.scoring)
    weights, sizes = expected_weights(case), expected_sizes(case)
    octaves, totals = reference.octaves(weights), weights.abs().sum(-1)
    drawn = []
    for planes, octave, total, request in zip(expected_planes(case), octaves, totals, case.slots, strict=False):
        distances = reference.distances(planes, codes[request])
        if sizes is not None:
            distances = reference.stretch(distances, total, reference.relative_sizes(sizes[request]))
        ranks = reference.rank(distances, case.sink, case.recent, bins, total)
        drawn.append(reference.draw(ranks, expected_luck(case, len(request)), octave))
    return drawn


def slots_of(entries: Tensor) -> tuple[Tensor, Tensor]:
    """What a workspace's ``slots`` hold: the slots, int64, and their doublings, int32."""
    return (entries & (1 << SLOT_BITS) - 1).long(), entries >> SLOT_BITS


@dataclass
class Chosen:
    """What a request's KV heads attend to: slots [H, k] int64, and how often each is doubled [H, k] int32."""

    slots: Tensor
    doublings: Tensor


def check_step(case: Case, workspace: DecodeWorkspace, codes: Tensor) -> list[Chosen]:
    """Assert that pools and workspace hold what the specification says, after a step.

    Exact: the step's keys, values and codes, the plan, planes, ranks, the selection in order of position. Nothing else
    is written, and what is to be zero between steps is.

    Args:
        codes: `expected_codes`, from before the step.

    Returns:
        What each request attends to.
    """
    B, n = len(case.q), len(case.slots)
    H = case.k.shape[1]
    last = case.loc[:n].long()
    assert torch.equal(case.k_pool[last], case.k[:n]) and torch.equal(case.v_pool[last], case.v[:n]), "pools"
    assert torch.equal(case.code_cache[1:], codes[1:]), "codes of the step's keys, or of others"
    sizes = expected_sizes(case)
    if case.size_cache is not None and sizes is not None:
        assert torch.equal(case.size_cache[1:], sizes[1:]), "sizes of the step's keys, or of others"
    assert workspace.kept[:B].tolist() == case.kept + [1] * (B - n), "plan"
    assert torch.equal(workspace.planes[:B], expected_planes(case)), "planes of the queries"
    assert not workspace.arrivals.any(), "arrivals after the step"
    chosen = []
    octaves = reference.octaves(expected_weights(case))
    untouched = torch.ones_like(workspace.slots, dtype=torch.bool)
    for b, ranks in enumerate(expected_ranks(case, codes)):
        L, k = ranks.shape[1], case.kept[b]
        positions = reference.select_positions(ranks, k)
        slots = case.slots[b][positions]
        doublings = torch.zeros_like(slots, dtype=torch.int32)
        if k < L:
            doublings = reference.doublings(ranks, expected_luck(case, L), octaves[b], positions)
            assert torch.equal(workspace.ranks[b, :, :L].int(), ranks), f"ranks of request {b}"
            found, doubled = slots_of(workspace.slots[b * H : (b + 1) * H, :k])
            assert torch.equal(found, slots), f"selection of request {b}"
            assert torch.equal(doubled, doublings), f"doublings of request {b}"
            untouched[b * H : (b + 1) * H, :k] = False
        chosen.append(Chosen(slots, doublings))
    assert (workspace.slots[untouched] == SENTINEL).all(), "slots beyond the selection"
    return chosen


def expected_output(case: Case, chosen: list[Chosen] | None = None) -> Tensor:
    """[requests, Hq, Dv] float64: exact attention over what is chosen, all when None, after the step."""
    head = torch.arange(case.k.shape[1], device=case.q.device).unsqueeze(1)
    outputs = []
    for b, request in enumerate(case.slots):
        slots, times = request, torch.ones(1, dtype=torch.float64, device=case.q.device)
        if chosen:
            slots, times = chosen[b].slots, 2.0 ** chosen[b].doublings.double().unsqueeze(1)
        keys, values = case.k_pool[slots, head].double(), case.v_pool[slots, head].double()
        q = case.q[b].double().unflatten(0, (keys.shape[0], -1))
        logits = q @ keys.transpose(1, 2) * case.scale
        weights = times * (logits - logits.amax(-1, keepdim=True)).exp()
        weights /= weights.sum(-1, keepdim=True)
        outputs.append((weights @ values).flatten(0, 1))
    return torch.stack(outputs)


def attend_to_all(case: Case, workspace: DecodeWorkspace) -> Tensor:
    """A dense layer of a step that is planned."""
    return attend(case.q, case.k_pool, case.v_pool, case.slot_table, workspace, case.scale, everything=True)


def assert_close(name: str, actual: Tensor, wanted: Tensor, ratio: float) -> None:
    """Root mean square of the error, as a share of the expected values' own."""
    error = actual.double() - wanted.double()
    found = float(error.square().mean().sqrt() / wanted.double().square().mean().sqrt().clamp(min=1e-30))
    assert found < ratio, f"{name}: relative error {found:.2e}, expected below {ratio:.0e}"  # NaN fails too
