"""The model of costs behind `--hata-min-context auto`."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from hata_kernels.costs import fit
from hata_kernels.reference import Budget, Costs

LENGTHS = [65_536 >> i for i in range(7)]
KEPT = 256


def test_straight_lines_are_found() -> None:
    dense = {n: 9e6 + 1000.0 * n for n in LENGTHS}
    sparse = {n: 9e6 + 12e6 + 1000.0 * KEPT + 100.0 * n for n in LENGTHS}
    assert fit(dense, sparse, KEPT) == Costs(attend=1000, score=100, fixed=12_000_000)


def test_where_latency_binds_selection_is_not_chosen() -> None:
    """An attention that takes 14 us however short the context; by the lines alone, 8K tokens would seem worth it."""
    dense = {n: max(14e6, 6e6 + 1000.0 * n) for n in LENGTHS}
    sparse = {n: 20e6 + 100.0 * n for n in LENGTHS}
    costs = fit(dense, sparse, KEPT)
    rule = Budget(tokens=KEPT, costs=costs)
    for length in LENGTHS:
        if dense[length] < sparse[length]:
            assert rule.plan(torch.tensor([length])).tolist() == [length]
    assert rule.plan(torch.tensor([65_536])).tolist() == [KEPT]


times = st.lists(st.integers(1_000_000, 500_000_000), min_size=len(LENGTHS), max_size=len(LENGTHS))


@given(times, times)
def test_no_more_is_promised_than_was_measured(dense: list[int], sparse: list[int]) -> None:
    costs = fit(dict(zip(LENGTHS, dense, strict=True)), dict(zip(LENGTHS, sparse, strict=True)), KEPT)
    assert costs.attend >= 0 and costs.score >= 0 and costs.fixed >= 0
    for length, whole, chosen in zip(LENGTHS, dense, sparse, strict=True):
        promised = (length - KEPT) * costs.attend - length * costs.score - costs.fixed
        assert promised <= whole - chosen + length + 2  # costs are rounded to whole picoseconds
