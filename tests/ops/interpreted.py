"""The Triton kernels under Triton's interpreter, on a CPU; `test_kernels_interpreted.py` runs this file.

Blocks are made small, so that a few dozen tokens make several shares, parts and chunks.
"""

from __future__ import annotations

import pytest
import torch

from hata_kernels import attend, launch, plan, reference, topk, workspace
from hata_kernels.decode import hata_decode_step
from hata_kernels.encode import hash_rows
from hata_kernels.plan import plan_step
from hata_kernels.reference import Budget, Costs
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
    expected_sizes,
    make_case,
    poison,
    random_projection,
)

CPU = torch.device("cpu")
PROGRAMS = ("FEW_SHARES", "MANY_SHARES", "FEW_CHUNKS", "MORE_CHUNKS", "CHUNKS")
DTYPE_RATIO = {torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch.INTERPRETED.value, "run with TRITON_INTERPRET=1"
    monkeypatch.setattr(workspace, "TILE_WORDS", 2)
    for name, programs in (
        ("FEW_SHARES", 5),
        ("MANY_SHARES", 13),
        ("FEW_CHUNKS", 7),
        ("MORE_CHUNKS", 17),
        ("CHUNKS", 11),
    ):
        monkeypatch.setattr(workspace, name, programs)
    monkeypatch.setattr(workspace, "COMPACT_PROGRAMS", 8)
    monkeypatch.setattr(plan, "FULL_SHARE_BLOCKS", 1)
    monkeypatch.setattr(workspace, "FEW_MIN_CHUNK", 16)
    monkeypatch.setattr(workspace, "MIN_CHUNK", 16)
    monkeypatch.setattr(topk, "LANES", 4)
    monkeypatch.setattr(topk, "EARLIER", 4)
    monkeypatch.setattr(attend, "FEW", (16, 4))
    monkeypatch.setattr(attend, "SHORT", (16, 4))
    monkeypatch.setattr(attend, "LONG", (32, 4))
    monkeypatch.setattr(attend, "FEW_ADDED", 4)
    monkeypatch.setattr(attend, "ADDED", 2)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def step(case: Case, room: DecodeWorkspace) -> torch.Tensor:
    """A planned step with `sink`, `recent` and `scale` of the case, into an output that was NaN."""
    plan_step(case.seq_lens, case.req_rows, room, case.budget)
    return hata_decode_step(
        *case.arguments(),
        room,
        sink=case.sink,
        recent=case.recent,
        scale=case.scale,
        layer=case.layer,
        out=torch.full_like(case.q, float("nan")),
        size_cache=case.size_cache,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("heads", "head_dim", "bits", "tokens"), [(2, 64, 64, 1), (1, 96, 128, 11), (3, 128, 256, 67), (1, 256, 128, 5)]
)
def test_hash_rows_is_exact(heads: int, head_dim: int, bits: int, tokens: int, dtype: torch.dtype) -> None:
    generator = seeded(tokens)
    # A slice of a fused qkv: strides between tokens and heads are not those of a contiguous tensor.
    fused = torch.randn(tokens, heads + 2, head_dim + 8, generator=generator)
    fused *= torch.randn(tokens, 1, 1, generator=generator).mul(2).exp()
    x = fused.to(dtype)[:, 1:-1, :head_dim]
    x[tokens // 2] = 0
    projection = random_projection(heads, head_dim, bits, generator)
    expected, sizes_of_x = reference.hash_codes(x, projection), reference.hash_sizes(x, projection)
    assert torch.equal(hash_rows(x, projection, torch.full_like(expected, SENTINEL)), expected)

    for index_dtype in (torch.int32, torch.int64):
        loc = torch.randperm(tokens + 9, generator=generator)[:tokens]
        out = torch.full((tokens + 9, heads, bits // 32), SENTINEL, dtype=torch.int32)
        wanted = out.clone()
        wanted[loc] = expected
        assert torch.equal(hash_rows(x, projection, out, loc.to(index_dtype)), wanted)
        sizes = torch.full((tokens + 9, heads), SIZE_SENTINEL, dtype=torch.int16)
        wanted_sizes = sizes.clone()
        wanted_sizes[loc] = sizes_of_x
        assert torch.equal(hash_rows(x, projection, out, loc.to(index_dtype), sizes), wanted)
        assert torch.equal(sizes, wanted_sizes)


def test_hash_rows_of_extreme_magnitudes_is_exact() -> None:
    generator = seeded(3)
    x = torch.randn(8, 1, 64, generator=generator)
    x *= torch.tensor([2.0**n for n in (-149, -126, -120, -114, 0, 60, 120, 125)]).view(8, 1, 1)
    projection = random_projection(1, 64, 64, generator)
    out, sizes = torch.empty((8, 1, 2), dtype=torch.int32), torch.empty((8, 1), dtype=torch.int16)
    assert torch.equal(hash_rows(x, projection, out, sizes=sizes), reference.hash_codes(x, projection))
    assert torch.equal(sizes, reference.hash_sizes(x, projection))


def test_hashing_nothing_changes_nothing() -> None:
    out = torch.full((3, 1, 2), SENTINEL, dtype=torch.int32)
    projection = random_projection(1, 64, 64, seeded(0))
    assert (hash_rows(torch.empty(0, 1, 64), projection, out) == SENTINEL).all()


SAVING = Costs(attend=1000, score=100, fixed=20_000)
STEPS = {
    # lengths, budget, KV heads, group, head_dim, bits
    "ragged": ([70, 1, 33, 16, 17, 100], Budget(tokens=9), 2, 3, 64, 64),
    "one": ([90], Budget(tokens=5), 3, 1, 64, 128),
    "two of four": ([80, 33], Budget(tokens=7), 2, 4, 64, 128),
    "three of sixteen": ([70, 21, 48], Budget(tokens=9), 1, 16, 64, 256),
    "share": ([64, 65, 2, 31], Budget(share_ppm=250_000, floor=6), 1, 7, 64, 256),
    "all": ([20, 48, 3], Budget(tokens=100), 2, 4, 64, 128),
    "short whole": ([40, 24, 90], Budget(tokens=5, min_context=40), 5, 1, 96, 64),
    "long and short": ([400, 5, 6, 7], Budget(tokens=40), 1, 16, 64, 64),
    "worth it": ([90, 30, 12], Budget(tokens=10, costs=SAVING), 2, 2, 64, 64),
    "not worth it": ([30, 12], Budget(tokens=10, costs=SAVING), 2, 2, 64, 64),
    "many": ([9] * 18 + [50], Budget(tokens=6), 1, 5, 64, 64),
    "nearly all": ([3000], Budget(tokens=2900), 1, 1, 64, 64),
}

UNPADDED = ("one", "two of four", "three of sixteen")  # batches of a few requests


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize(
    ("scoring", "selection", "index_dtype", "sized"),
    [
        (reference.HAMMING, reference.SAMPLED, torch.int32, False),
        (reference.HAMMING, reference.TOP, torch.int64, True),
        (reference.ONE_SIDED, reference.SAMPLED, torch.int64, False),
        (reference.ONE_SIDED, reference.SAMPLED, torch.int32, True),
    ],
    ids=str,
)
def test_step_is_the_specification(
    name: str, scoring: str, selection: str, index_dtype: torch.dtype, sized: bool
) -> None:
    lengths, budget, kv_heads, group, head_dim, bits = STEPS[name]
    dtype = torch.bfloat16 if index_dtype == torch.int32 else torch.float16
    case = make_case(
        lengths,
        budget,
        kv_heads=kv_heads,
        group=group,
        head_dim=head_dim,
        bits=bits,
        dtype=dtype,
        generator=seeded(len(name)),
        index_dtype=index_dtype,
        padded=0 if name in UNPADDED else 2,
        width=max(lengths) + 5 if selection == reference.TOP else None,
        scoring=scoring,
        selection=selection,
        sized=sized,
    )
    room = case.workspace(max_batch=len(case.q) + 1)
    poison(room)
    codes = expected_codes(case)
    output = step(case, room)
    chosen = check_step(case, room, codes)
    assert_close("output", output[: len(lengths)], expected_output(case, chosen), DTYPE_RATIO[dtype])
    everything = attend_to_all(case, room)
    assert_close("output of a dense layer", everything[: len(lengths)], expected_output(case), DTYPE_RATIO[dtype])
    specified, positions = reference.hata_decode(
        case.q[: len(lengths)],
        case.k_pool,
        case.v_pool,
        codes,
        case.slots,
        case.projection,
        budget,
        sink=case.sink,
        recent=case.recent,
        scale=case.scale,
        scoring=scoring,
        selection=selection,
        layer=case.layer,
        size_cache=expected_sizes(case),
    )
    assert_close("the specification's output", specified, expected_output(case, chosen), DTYPE_RATIO[dtype])
    for mine, request, wanted in zip(chosen, case.slots, positions, strict=True):
        assert torch.equal(mine.slots, request[wanted])
    if name == "long and short":
        drawn = any(mine.doublings.any() for mine in chosen)
        assert drawn == (selection == reference.SAMPLED), "nothing was drawn: the test shows nothing"


def test_costs_decide_by_the_batch() -> None:
    assert Budget(tokens=10, costs=SAVING).plan(torch.tensor([30])).tolist() == [30]
    assert Budget(tokens=10, costs=SAVING).plan(torch.tensor([30, 30, 11])).tolist() == [10, 10, 11]


@pytest.mark.parametrize("seed", range(12))
def test_a_plan_hands_out_every_token_once(seed: int) -> None:
    generator = seeded(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    H, B = draw(1, 9), draw(1, 12)
    lengths = [draw(1, 10 ** draw(0, 4)) for _ in range(B)]
    rule = Budget(tokens=draw(1, 300), share_ppm=draw(0, 100_000), floor=draw(1, 20), min_context=draw(0, 500))
    room = DecodeWorkspace.allocate(
        max_batch=B + draw(0, 3),
        q_heads=2 * H,
        kv_heads=H,
        head_dim=64,
        bits=64,
        max_context=max(lengths),
        max_kept=rule.largest(max(lengths)),
        device=CPU,
    )
    poison(room)
    rows = torch.randperm(50, generator=generator)[:B]
    plan_step(torch.tensor(lengths), rows, room, rule)
    kept = rule.plan(torch.tensor(lengths)).tolist()
    assert room.kept[:B].tolist() == kept
    shares, chunks, all_chunks = room.pieces(B)
    scored = [length if k < length else 0 for length, k in zip(lengths, kept, strict=True)]
    for name, pieces, tokens, block in (
        ("shares", room.shares[:shares], scored, room.grid.shares(B).block),
        ("chunks", room.chunks[:chunks], kept, room.grid.min_chunk(B)),
        ("all chunks", room.all_chunks[:all_chunks], lengths, room.grid.min_chunk(B)),
    ):
        first = 0
        for b, wanted in enumerate(tokens):
            mine = pieces[pieces[:, 0] == b].tolist()
            message = f"{name} of request {b} of {lengths}"
            assert pieces[first : first + len(mine), 0].tolist() == [b] * len(mine), message
            starts, ends = [piece[2] for piece in mine], [piece[3] for piece in mine]
            assert [*starts, wanted] == [0, *ends] and all(map(int.__lt__, starts, ends)), message
            assert all(start % block == 0 for start in starts), message
            assert all(piece[1] == rows[b] for piece in mine), message
            numbers = [[first, i, len(mine)] for i in range(len(mine))]
            if name == "shares":
                assert [piece[4:6] for piece in mine] == [[lengths[b], first]] * len(mine), message
            else:
                selects = name == "chunks" and kept[b] < lengths[b]
                assert [piece[4:] for piece in mine] == [[selects, *number] for number in numbers], message
            first += len(mine)
        assert (pieces[first:, 0] == -1).all() and (pieces[first:, 2] >= pieces[first:, 3]).all(), name


@pytest.mark.parametrize("kv_heads", [1, 2, 8])
def test_no_batch_is_cut_into_more_pieces_than_there_is_room_for(kv_heads: int) -> None:
    for most in range(1, 15):
        room = DecodeWorkspace.allocate(
            max_batch=most,
            q_heads=kv_heads,
            kv_heads=kv_heads,
            head_dim=64,
            bits=64,
            max_context=64,
            max_kept=16,
            device=CPU,
        )
        for batch in range(1, most + 1):
            for pieces, buffer in zip(room.pieces(batch), (room.shares, room.chunks, room.all_chunks), strict=True):
                assert pieces <= len(buffer), f"batch of {batch}, workspace for {most}"


def test_a_step_leaves_the_workspace_fit_for_the_next() -> None:
    """The second step has other lengths, and finds the counts of the first."""
    room = None
    for seed, lengths in enumerate([[60, 45, 130], [130, 1, 20], [7, 90, 64]]):
        case = make_case(
            lengths,
            Budget(tokens=20),
            kv_heads=2,
            group=4,
            head_dim=64,
            bits=64,
            dtype=torch.float16,
            generator=seeded(seed),
        )
        room = room or case.workspace(max_context=130)
        codes = expected_codes(case)
        room.slots.fill_(SENTINEL)
        output = step(case, room)
        assert_close("output", output, expected_output(case, check_step(case, room, codes)), 2e-3)


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
        selection=reference.TOP,
    )
    case.k.copy_(case.k[:1, :1])
    case.code_cache[:] = reference.hash_codes(case.k[:1], case.projection[reference.KEYS])[0]
    room = case.workspace()
    poison(room)
    codes = expected_codes(case)
    step(case, room)
    for chosen, request in zip(check_step(case, room, codes), case.slots, strict=True):
        assert chosen.slots.tolist() == [torch.cat([request[:17], request[-3:]]).tolist()] * 2


def test_results_do_not_depend_on_how_the_work_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for programs in (1, 7, 60):
        for name, factor in (
            ("FEW_SHARES", 1),
            ("MANY_SHARES", 2),
            ("FEW_CHUNKS", 3),
            ("MORE_CHUNKS", 5),
            ("CHUNKS", 4),
        ):
            monkeypatch.setattr(workspace, name, factor * programs)
        case = make_case(
            [130, 77],
            Budget(tokens=11),
            kv_heads=3,
            group=2,
            head_dim=64,
            bits=64,
            dtype=torch.bfloat16,
            generator=seeded(10),
        )
        room = case.workspace()
        poison(room)
        codes = expected_codes(case)
        output = step(case, room)
        check_step(case, room, codes)
        results.append((room.slots.clone(), output))
    for slots, output in results[1:]:
        assert torch.equal(slots, results[0][0])
        assert torch.equal(output, results[0][1])


def test_keys_and_values_may_be_in_the_pool_already() -> None:
    """As with fp8, which SGLang quantises itself."""
    case = make_case(
        [40, 9], Budget(tokens=8), kv_heads=2, group=2, head_dim=64, bits=64, dtype=torch.float16, generator=seeded(2)
    )
    last = case.loc.long()
    case.k_pool[last], case.v_pool[last] = case.k, case.v
    kept = case.k_pool.clone()
    room = case.workspace()
    poison(room)
    plan_step(case.seq_lens, case.req_rows, room, case.budget)
    codes = expected_codes(case)
    options = {"sink": case.sink, "recent": case.recent, "scale": case.scale, "layer": case.layer}
    output = hata_decode_step(*case.arguments(), room, store_kv=False, **options)
    assert torch.equal(case.k_pool.nan_to_num(), kept.nan_to_num())
    assert_close("output", output, expected_output(case, check_step(case, room, codes)), 2e-3)


def test_more_slots_than_a_selected_one_has_bits_for_are_refused() -> None:
    case = make_case(
        [9], Budget(tokens=8), kv_heads=2, group=2, head_dim=64, bits=64, dtype=torch.float16, generator=seeded(2)
    )
    case.code_cache = case.code_cache[:1].expand(2**27 + 1, 2, 2)
    with pytest.raises(ValueError, match=f"{2**27 + 1} slots: expected at most {2**27}"):
        step(case, case.workspace())


def test_refusals_name_the_tensor() -> None:
    projection = random_projection(4, 64, 64, seeded(0))
    x = torch.zeros(3, 4, 64)
    out = torch.zeros(3, 4, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"^x: dtype"):
        hash_rows(x.double(), projection, out)
    with pytest.raises(ValueError, match=r"^x: last dimension has stride 2"):
        hash_rows(torch.zeros(3, 4, 128)[..., ::2], projection, out)
    with pytest.raises(ValueError, match=r"^x: shape"):
        hash_rows(x[:, :3], projection, out)
    with pytest.raises(ValueError, match=r"^out: shape"):
        hash_rows(x, projection, out[:, :2].contiguous())
    with pytest.raises(ValueError, match=r"^out: strides"):
        hash_rows(x, projection, torch.zeros(3, 4, 4, dtype=torch.int32)[..., :2])
    with pytest.raises(ValueError, match=r"^out: 2 rows for 3 rows of x"):
        hash_rows(x, projection, out[:2])
    with pytest.raises(ValueError, match="head dimension 32"):
        hash_rows(x, projection[:, :32].contiguous(), out)
    sizes = {"kv_heads": 2, "head_dim": 64, "bits": 64, "max_context": 10, "max_kept": 5, "device": CPU}
    room = DecodeWorkspace.allocate(max_batch=2, q_heads=4, **sizes)
    lengths = torch.ones(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="workspace for 5"):
        plan_step(lengths, lengths, room, Budget(tokens=6))
    with pytest.raises(ValueError, match="batch of 3, workspace for 2"):
        plan_step(torch.ones(3).long(), torch.ones(3).long(), room, Budget(tokens=5))
    with pytest.raises(ValueError, match="1 to 16 query heads"):
        DecodeWorkspace.allocate(max_batch=2, q_heads=34, **sizes)
    assert room.nbytes() == sum(
        t.numel() * t.element_size() for t in vars(room).values() if isinstance(t, torch.Tensor)
    )
