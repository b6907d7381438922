"""What the records say: summaries, tables and plots."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from benchmarks.codes.work import BITS, BUDGETS, DEFAULT, MAPPING_BITS, PAPER, Record, trained_name
from benchmarks.common import RESULTS, plot
from hata_kernels import reference
from hata_weights import jobs
from hata_weights.capture import Shape
from hata_weights.evaluate import BEST, EXACT, HASH_ATTENTION, Row, summarise, untrained

SETTINGS = [{"sink": sink, "recent": recent} for sink, recent in jobs.SETTINGS]
BY_SCORE, SERVED = SETTINGS
ROW_FIELDS = [field.name for field in fields(Row)]


class Encoder(NamedTuple):
    """How an encoder is called and drawn; colours are Okabe and Ito's, which every eye can tell apart."""

    name: str
    bits: int | None
    scoring: str
    colour: str
    marker: str


def encoders(shape: Shape) -> list[Encoder]:
    """Every encoder of the frontier."""
    mapping_bits = MAPPING_BITS * shape.query_heads // shape.kv_heads
    hamming, default = reference.HAMMING, DEFAULT.scoring
    sizes = list(zip(BITS, "vo^", strict=True))
    return [
        Encoder(EXACT, None, "q.k", "#000000", "s"),
        Encoder("Quest", None, "upper bound of q.k", "#E69F00", "D"),
        Encoder("Loki", None, "q.k", "#56B4E9", "P"),
        *(Encoder(untrained(n).name, n, hamming, "#999999", marker) for n, marker in sizes),
        Encoder(PAPER, 128, hamming, "#CC79A7", "o"),
        Encoder(trained_name(128, hamming), 128, hamming, "#009E73", "o"),
        *(Encoder(trained_name(n), n, default, "#0072B2", marker) for n, marker in sizes),
        Encoder(HASH_ATTENTION, mapping_bits, hamming, "#D55E00", "X"),
    ]


def summaries(records: Sequence[Record], shape: Shape) -> list[Record]:
    """Over layers and KV heads: mean mass, its share of exact q.k's, the worst head's share, and what is read."""
    forms = {encoder.name: {"bits": encoder.bits, "scoring": encoder.scoring} for encoder in encoders(shape)}
    default = {"bits": DEFAULT.bits, "scoring": DEFAULT.scoring}
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        label = tuple((name, value) for name, value in record.items() if name not in (*ROW_FIELDS, "selected"))
        groups.setdefault(label, []).append(record)
    found = []
    for label, group in groups.items():
        selected = {record["budget"]: record["selected"] for record in group}
        parts = {(s.method, s.budget): s for s in summarise([Row(**{n: r[n] for n in ROW_FIELDS}) for r in group])}
        for (method, budget), s in parts.items():
            if method == BEST:
                continue
            row = {
                "encoder": method,
                "bytes_per_token": s.bytes_per_token,
                "budget": f"1/{budget}",
                **dict(label),
                "layers": len({record["layer"] for record in group}),
                "mass": round(s.mass, 5),
                "exact_mass": round(parts[EXACT, budget].mass, 5),
                "best_mass": round(parts[BEST, budget].mass, 5),
                "share": round(s.ratio, 5),
                "worst_head": round(s.worst_ratio, 5),
                "recall": round(s.recall, 5),
                "selected": round(selected[budget], 6),
                "bytes_read_per_token": round(s.bytes_per_token + selected[budget] * 4 * shape.head_dim, 3),
            }
            found.append(row | forms.get(method, default))
    return found


def pick(rows: Sequence[Record], **wanted: Any) -> list[Record]:
    """The rows that have the values ``wanted``."""
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def mean(rows: Sequence[Record], value: str, **wanted: Any) -> float:
    return fmean(row[value] for row in pick(rows, **wanted))


def quality(rows: Sequence[Record], **wanted: Any) -> list[float]:
    """The mean share of exact q.k's mass and the worst head's share at 1/64."""
    found = pick(rows, budget="1/64", **wanted)
    return [mean(found, "share"), min(row["worst_head"] for row in found)]


def qualities(rows: Sequence[Record], **wanted: Any) -> list[float]:
    """`quality` with all but the current token chosen by score, and as a server chooses."""
    return [*quality(rows, **BY_SCORE, **wanted), *quality(rows, **SERVED, **wanted)]


def in_words(setting: dict[str, int]) -> str:
    if setting == BY_SCORE:
        return "by score alone"
    return "{sink} sinks and {recent} recent tokens always".format(**setting)


QUALITIES = ["by score", "worst head", in_words(SERVED), "worst head"]


def print_table(names: Sequence[str], lines: Iterable[Sequence[Any]]) -> None:
    """Markdown; numbers to three digits."""
    print("| " + " | ".join(names) + " |\n|" + "---|" * len(names))
    for line in lines:
        cells = [f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in line]
        print("| " + " | ".join(cells) + " |")


def show_frontier(report: Record, shape: Shape, paths: Sequence[Path]) -> None:
    """A table and a plot, into one of ``paths``, for each setting of sinks and recent tokens."""
    rows, times = report["rows"], measured_times()
    for setting, path in zip(SETTINGS, paths, strict=True):
        title = f"{report['model']}, {in_words(setting)}"
        print(f"\n{title}: mass by budget; share of exact q.k's mass and worst head at 1/64\n")
        lines = []
        for name in dict.fromkeys(row["encoder"] for row in rows):
            own = pick(rows, encoder=name, **setting)
            masses = [mean(own, "mass", budget=f"1/{budget}") for budget in BUDGETS]
            lines.append([name, f"{own[0]['bytes_per_token']:g}", *masses, *quality(own), times.get(name, "-")])
        budgets = [f"1/{budget}" for budget in BUDGETS]
        print_table(["selected by", "bytes", *budgets, "share", "worst", "µs, 32K x 8"], lines)
        draw_frontier(report, shape, setting, times, path)


def measured_times() -> dict[str, str]:
    """One layer's decode attention by encoder, where `benchmarks.decode_attention` has it: 8 requests of 32K, 1/64."""
    wanted = {"context": 32_768, "batch": 8, "q_heads": 32, "kv_heads": 8, "head_dim": 128, "budget": "1/64"}
    times: dict[str, str] = {}
    for path in sorted(RESULTS.glob("decode_attention-*.json")):
        report = json.loads(path.read_text())
        for row in pick(report["rows"], **wanted, slots="in order"):
            if row["dense_us"]:
                shown = f"{row['hata_us']:.0f} (dense {row['dense_us']:.0f}), {report['gpu']}"
                times[trained_name(row["bits"], row["scoring"])] = shown
                if row["scoring"] == reference.HAMMING:
                    times[untrained(row["bits"]).name] = shown
    return times


def draw_frontier(report: Record, shape: Shape, setting: dict[str, int], times: dict[str, str], path: Path) -> None:
    rows, D = pick(report["rows"], **setting), shape.head_dim
    columns = ("bytes_read_per_token", "mass")
    with plot(path, width=11) as axes:
        for encoder in encoders(shape):
            if not (own := pick(rows, encoder=encoder.name)):
                continue  # HashAttention, if left out
            solid = encoder.name.startswith(("trained", EXACT))
            style = {"linestyle": "-" if solid else "--", "linewidth": 1.8 if solid else 1.1, "markersize": 5}
            style |= {"color": encoder.colour, "marker": encoder.marker}
            axes.plot(*curve(own, "budget", *columns), label=encoder.name, **style)
        axes.plot([4 * D], [1], "*", color="black", markersize=13, linestyle="", label="dense: all of K and V")
        (x,), (y,) = curve(pick(rows, encoder=trained_name(), budget="1/64"), "budget", *columns)
        label = "default: one-sided 128 at 1/64"
        if time := times.get(trained_name()):
            label += f"\n{time}, µs a layer"
        axes.plot([x], [y], "o", color="none", markeredgecolor="black", markersize=13, markeredgewidth=1.5)
        arrow = {"arrowstyle": "-", "shrinkB": 7}
        axes.annotate(label, (x, y), (0.42, 0.04), textcoords="axes fraction", fontsize=9, arrowprops=arrow)
        axes.set(xscale="log", xlabel="bytes read a cached token and KV head: codes, selected K and V")
        axes.set(ylabel="attention mass kept, mean of layers and heads")
        title = f"{report['model']}, {report['tokens']:,} tokens, budgets 1/256 to 1/8, {in_words(setting)}"
        axes.set_title(title, fontsize=11)
        finish(axes, [8 * 2**n for n in range(8) if 8 * 2**n <= 4 * D], fontsize=9)


def curve(rows: Sequence[Record], of: str, x: str, y: str) -> Iterable[tuple[float, ...]]:
    """The means of columns ``x`` and ``y`` for each value of column ``of``, in the order of ``x``."""
    groups = [pick(rows, **{of: value}) for value in {row[of] for row in rows}]
    return zip(*sorted((mean(group, x), mean(group, y)) for group in groups), strict=True)


def finish(axes: Any, ticks: Sequence[int], **legend: Any) -> None:
    """Plain numbers on the x axis, a grid, and the legend beside it."""
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3)
    axes.figure.legend(loc="outside right center", frameon=False, **legend)


def show_text(report: Record, path: Path) -> None:
    rows = [row for row in pick(report["rows"], budget="1/64") if row["encoder"] != EXACT]
    print(f"\n{report['model']}, layers {report['layers']}: share of exact q.k's mass at 1/64, and the worst head's\n")
    cells = sorted({(row["kinds"], row["sequences"]) for row in rows})
    lines = [[k, n, *qualities(rows, kinds=k, sequences=n)] for k, n in cells]
    print_table(["kinds", "sequences", *QUALITIES], lines)
    draw_text(report, pick(rows, **BY_SCORE), path)


def draw_text(report: Record, rows: Sequence[Record], path: Path) -> None:
    columns = ("sequences", "sequences", "share")
    colours = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#0072B2", "#D55E00")
    with plot(path) as axes:
        for n, k in enumerate(sorted({row["kinds"] for row in rows} - {0})):
            style = {"color": colours[n % 6], "marker": "ovs^DP"[n % 6]}
            own = pick(rows, kinds=k)
            axes.plot(*curve(own, *columns), label=f"{k} kind{'s' * (k > 1)} of text", **style)
            for draw in sorted({row["draw"] for row in own}):
                axes.plot(*curve(pick(own, draw=draw), *columns), linestyle="", alpha=0.35, **style)
        axes.axhline(mean(rows, "share", kinds=0), color="#999999", linestyle=":", label="untrained, one-sided 128")
        axes.set(xscale="log", xlabel=f"training sequences of {report['tokens']:,} tokens")
        axes.set(ylabel="share of exact q.k's attention mass at 1/64")
        layers = ", ".join(map(str, report["layers"]))
        axes.set_title(f"{report['model']}, one-sided 128, layers {layers}; faint: each draw of kinds")
        finish(axes, sorted({row["sequences"] for row in rows} - {0}))


def show_finetune(report: Record) -> None:
    print(f"\n{report['model']}, {report['tuning_steps']} steps on {report['domain']}: next-token loss\n")
    print_table(["text", "before", "after"], [[name, *loss] for name, loss in report["losses"].items()])
    print("\nShare of exact q.k's mass at 1/64, and the worst head's\n")
    rows = report["rows"]
    cells = dict.fromkeys((r["text"], r["model"], r["encoder"]) for r in rows if r["encoder"] != EXACT)
    lines = [[*cell, *qualities(rows, **dict(zip(("text", "model", "encoder"), cell, strict=True)))] for cell in cells]
    print_table(["text", "model", "codes", *QUALITIES], lines)
