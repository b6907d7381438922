"""What a person reads of an evaluation: tables, a plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from hata_weights.errors import RequestError
from hata_weights.evaluate import BEST, TRAINED, Row, summarise

PREFERRED = 64  # the budget of tables by head and of plots, if it was measured: one token in 64


def shown_budget(rows: Sequence[Row]) -> int:
    """The budget of tables by head and of plots."""
    budgets = [row.budget for row in rows]
    return PREFERRED if PREFERRED in budgets else budgets[0]


def tables(rows: Sequence[Row]) -> str:
    """Mass and recall of every method and budget, then mass by layer and KV head of one method."""
    summaries = summarise(rows)
    budgets, at = list(dict.fromkeys(row.budget for row in rows)), shown_budget(rows)
    names = list(dict.fromkeys(row.method for row in rows))
    cell = {(s.method, s.budget): s for s in summaries}
    width = max(map(len, names))
    lines = [
        f"Attention mass kept / recall, by budget; then, at 1/{at}, as a share of exact q.k's mass: mean, worst head",
        f"{'':{width}}  bytes" + "".join(f"{f'1/{budget}':>14}" for budget in budgets) + "    mean  worst",
    ]
    for name in names:
        row = [cell[name, budget] for budget in budgets]
        shown = cell[name, at]
        size = "-" if name == BEST else f"{shown.bytes_per_token:g}"
        shares = "".join(f"{s.mass:>8.3f} /{s.recall:.2f}" for s in row)
        lines.append(f"{name:{width}}  {size:>5}{shares}   {shown.ratio:.3f}  {shown.worst_ratio:.3f}")
    last = TRAINED if TRAINED in names else names[-1]
    heads = sorted({row.kv_head for row in rows})
    lines += ["", f"{last}, mass kept at 1/{at} by layer and KV head", "layer" + "".join(f"{h:>7}" for h in heads)]
    grid = {(row.layer, row.kv_head): row.mass for row in rows if row.method == last and row.budget == at}
    for layer in sorted({layer for layer, _ in grid}):
        lines.append(f"{layer:>5}" + "".join(f"{grid[layer, head]:>7.3f}" for head in heads))
    return "\n".join(lines)


def as_json(rows: Sequence[Row], about: dict[str, Any]) -> dict[str, Any]:
    """``about``, the summaries and every row, as plain values."""
    return about | {"summary": [asdict(s) for s in summarise(rows)], "rows": [asdict(row) for row in rows]}


def plot(rows: Sequence[Row], title: str, path: Path) -> None:
    """Draws mass at one budget over the layers, a line a method.

    Raises:
        RequestError: matplotlib is not there, or does not write files of that kind.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise RequestError(f"Drawing {path} needs matplotlib: install it, or give --out a .json file.") from None
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    at = shown_budget(rows)
    layers = sorted({row.layer for row in rows})
    for name in dict.fromkeys(row.method for row in rows):
        of_layer = [[r.mass for r in rows if (r.method, r.budget, r.layer) == (name, at, n)] for n in layers]
        axes.plot(layers, [fmean(masses) for masses in of_layer], label=name, lw=2.5 if name == TRAINED else 1.2)
    axes.set(title=title, xlabel="layer", ylabel=f"attention mass kept at 1/{at}")
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(path, dpi=150)
    except ValueError as error:
        raise RequestError(f"{path} cannot be drawn ({error}): name a .png, .svg or .json file.") from None
