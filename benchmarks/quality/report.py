"""What the rows say: intervals, differences from dense, floors, tables, a plot and docs/quality.md."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import ROOT, plot
from benchmarks.quality.tasks import TASKS
from sglang_hata.config import MAX_TOKENS

ALL = "all"  # the budget that is the whole context
EVIDENCE = 50  # what dense must score for a cell to say anything of another method
FLOORS = {"1/32": (0.5, 2.0), "1/64": (1.0, 3.0)}  # of trained weights: most lost on average, and by any task
DRAWS = 2000
DOCS = ROOT / "docs" / "quality.md"
Row = dict[str, Any]


def interval(cells: Iterable[Sequence[float]]) -> tuple[float, float]:
    """The 95 % bootstrap interval of the mean over cells of the mean over documents.

    Documents are drawn again, not questions: those of one document stand or fall together.
    """
    rng = np.random.default_rng(0)
    means = []
    for cell in cells:
        values = np.asarray(cell, dtype=float)
        means.append(values[rng.integers(len(values), size=(DRAWS, len(values)))].mean(axis=1))
    low, high = np.percentile(np.mean(means, axis=0), [2.5, 97.5])
    return float(low), float(high)


def key(row: Row) -> tuple[Any, ...]:
    """What a row is of; sorted by it, methods and tasks come in the order in which they are read."""
    methods = ["dense", "whole", "trained", "top"]
    order = methods.index(row["method"]) if row["method"] in methods else len(methods)
    task = list(TASKS).index(row["task"]) if row["task"] in TASKS else len(TASKS)
    return row["context"], task, row["task"], order, row["method"], -share(row["budget"]), row["budget"], row["cached"]


def share(budget: str) -> float:
    """A budget as a number that grows with it."""
    if budget.isdigit():
        return int(budget) / MAX_TOKENS  # below all shares
    return 1 / int(budget[2:]) if budget.startswith("1/") else 1.0 if budget == ALL else 0.0


def label(row: Row) -> str:
    return row["method"] if row["budget"] == ALL else f"{row['method']} {row['budget']}"


def compared(rows: list[Row]) -> list[Row]:
    """The rows, each with its difference from dense, document by document, and the share of equal answers."""
    dense = {(row["task"], row["context"], row["cached"]): row for row in rows if row["method"] == "dense"}
    result = []
    for row in sorted(rows, key=key):
        base = dense.get((row["task"], row["context"], row["cached"]))
        if base and len(base["documents"]) == len(row["documents"]) and base["n"] == row["n"]:
            change = np.subtract(row["documents"], base["documents"])
            low, high = interval([change])
            same = np.mean([one == other for one, other in zip(digests(row), digests(base), strict=True)])
            row = row | {"difference": float(change.mean()), "difference_low": low, "difference_high": high}
            row |= {"same_text": float(same), "evidence": base_score(rows, row) >= EVIDENCE}
        result.append(row)
    return result


def base_score(rows: list[Row], row: Row) -> float:
    """What dense scores, cold, where a row is."""
    cell = ("dense", False, row["task"], row["context"])
    found = (base["score"] for base in rows if (base["method"], base["cached"], base["task"], base["context"]) == cell)
    return next(found, 0.0)


def digests(row: Row) -> list[str]:
    return [row["answers"][i : i + 4] for i in range(0, len(row["answers"]), 4)]


def evidence(rows: list[Row], cached: bool = False) -> dict[str, list[Row]]:
    """Rows by method where dense scores enough, of one pass."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row.get("evidence") and row["cached"] == cached:
            found.setdefault(label(row), []).append(row)
    return found


def average(rows: list[Row], name: str = "score") -> float:
    return sum(row[name] for row in rows) / len(rows)


def lost(rows: list[Row], dense: list[Row]) -> tuple[float, tuple[float, float]]:
    """The average difference from dense over rows, and its interval."""
    base = {(row["task"], row["context"]): row["documents"] for row in dense}
    cells = [np.subtract(row["documents"], base[row["task"], row["context"]]) for row in rows]
    return average(rows, "difference"), interval(cells)


def by_task(rows: list[Row]) -> dict[str, float]:
    """Each task's difference from dense, over its contexts."""
    names = dict.fromkeys(row["task"] for row in rows)
    return {name: average([row for row in rows if row["task"] == name], "difference") for name in names}


def floors(rows: list[Row]) -> list[tuple[bool, str]]:
    """Each floor, whether it holds, in words."""
    results = []
    for budget, (most, most_of_task) in FLOORS.items():
        found = evidence(rows).get(f"trained {budget}")
        if not found:
            continue
        mean = average(found, "difference")
        task, worst = min(by_task(found).items(), key=lambda item: item[1])
        holds = mean >= -most and worst >= -most_of_task
        words = f"trained {budget}: {mean:+.2f} on average (floor -{most:g}), worst task {task} {worst:+.2f} "
        results.append((holds, f"{words}(floor -{most_of_task:g}): {'holds' if holds else 'FAILS'}"))
    return results


def shortfall(rows: list[Row], most: float) -> str | None:
    """A sentence when a HATA method falls more than ``most`` points below dense, or nothing can be said; else None."""
    found = evidence(rows)
    others = {name: own for name, own in found.items() if name != "dense"}
    if not others:
        return f"No task tells: dense scores {EVIDENCE} nowhere, or only dense was run."
    name, own = min(others.items(), key=lambda item: average(item[1], "difference"))
    loss = -average(own, "difference")
    return f"{name} falls {loss:.2f} points below dense, and {most:g} are allowed." if loss > most else None


def summary(rows: list[Row]) -> str:
    """The small table: every method's average over the cells that are evidence."""
    found = evidence(rows)
    if "dense" not in found:
        return f"No cell is evidence yet: dense has to be run, and to score {EVIDENCE}."
    cells = len(found["dense"])
    lines = [
        "| method | tokens read | quality | against dense (95 %) | same text | cells |",
        "|---|---|---|---|---|---|",
    ]
    for name, own in found.items():
        difference, (low, high) = lost(own, found["dense"])
        against = "" if name == "dense" else f"{difference:+.2f} ({low:+.2f} to {high:+.2f})"
        same = "" if name == "dense" else f"{average(own, 'same_text'):.0%}"
        figures = f"{average(own, 'attended'):.1%} | {average(own):.1f} | {against} | {same}"
        lines.append(f"| {name} | {figures} | {len(own)} of {cells} |")
    return "\n".join(lines)


def table(rows: list[Row], context: int, cached: bool = False) -> str:
    """Tasks by methods at one context: scores with their intervals; in italics where dense tells nothing."""
    own = [row for row in rows if row["context"] == context and row["cached"] == cached]
    methods = list(dict.fromkeys(label(row) for row in sorted(own, key=lambda row: key(row)[3:])))
    cells = {(row["task"], label(row)): row for row in own}
    lines = [f"| {context // 1024}K | n | " + " | ".join(methods) + " |", "|---|---|" + "---|" * len(methods)]
    for task in dict.fromkeys(row["task"] for row in own):
        shown = [cells.get((task, method)) for method in methods]
        n = max(row["n"] for row in shown if row)
        texts = [f"{row['score']:.1f} ({row['low']:.0f}-{row['high']:.0f})" if row else "" for row in shown]
        if base_score(rows, {"task": task, "context": context}) < EVIDENCE:
            texts = [f"*{text}*" if text else "" for text in texts]
        lines.append(f"| {task} | {n} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def cold_and_cached(rows: list[Row]) -> list[str]:
    """For each method, how many answers and points change when the documents come from the prefix cache."""
    cold = {key(row)[:-1]: row for row in rows if not row["cached"]}
    pairs: dict[str, list[tuple[Row, Row]]] = {}
    for row in rows:
        if row["cached"] and key(row)[:-1] in cold:
            pairs.setdefault(label(row), []).append((cold[key(row)[:-1]], row))
    lines = []
    for name, both in pairs.items():
        differ = sum(a != b for one, other in both for a, b in zip(digests(one), digests(other), strict=True))
        points = sum(other["score"] - one["score"] for one, other in both) / len(both)
        lines.append(f"{name}: {differ} of {sum(one['n'] for one, _ in both)} answers differ, {points:+.2f} points")
    return lines


def merge(paths: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """The reports of result files, by model: files of one model, whose methods ran apart, become one report."""
    merged: dict[str, dict[str, Any]] = {}
    for path in paths:
        report = json.loads(path.read_text())
        if (old := merged.get(report["model"])) is None:
            merged[report["model"]] = report
            continue
        if differing := [name for name in ("versions", "commit", "plan") if old[name] != report[name]]:
            raise SystemExit(
                f"{path} cannot be merged with the files before it: its {differing[0]} differs from theirs."
            )
        rows = {key(row): row for row in [*old["rows"], *report["rows"]]}
        commands = dict.fromkeys([*old["command"].split(" && "), *report["command"].split(" && ")])
        gpus = dict.fromkeys([*old["gpu"].split(" and "), report["gpu"]])
        merged[report["model"]] = old | {
            "gpu": " and ".join(gpus),
            "command": " && ".join(commands),
            "hata": old["hata"] | report["hata"],
            "rows": list(rows.values()),
        }
    for report in merged.values():
        report["rows"] = compared(report["rows"])
    return merged


def show(report: dict[str, Any]) -> None:
    """The summary and the floors, on the terminal."""
    rows = report["rows"]
    print(f"{report['model']} on {report['gpu']}; averages over the cells where dense scores at least {EVIDENCE}\n")
    print(summary(rows))
    for line in [*(text for _, text in floors(rows)), *cold_and_cached(rows)]:
        print(line)


def write_docs(reports: Iterable[dict[str, Any]]) -> None:
    """docs/quality.md: every table of every model, what counts, and the command that repeats it."""
    parts = [
        "# Quality: whether answers change",
        "Written by `python -m benchmarks.quality --report`. Scores are percentages with 95 % intervals by bootstrap "
        "over documents, as the questions of one document stand or fall together; where all documents agree, an "
        f"interval has no width. A cell, a task at a context, is evidence where dense scores at least {EVIDENCE}; "
        "where it does not, it is in italics. A server prefills densely, so the first token of an answer is always "
        "dense: "
        "answers begin before what is asked for.",
    ]
    for report in reports:
        rows = report["rows"]
        versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items() if number)
        parts += [f"## {report['model']}", summary(rows)]
        if (ROOT / image(report)).exists():
            parts.append(f"![Quality against tokens read](../{image(report)})")
        if note := report.get("note"):
            parts.append(note)
        if checked := floors(rows):
            parts.append("Floors:\n\n" + "\n".join(f"- {text}" for _, text in checked))
        if lines := cold_and_cached(rows):
            parts.append(
                "Documents from the prefix cache, against cold:\n\n" + "\n".join(f"- {line}" for line in lines)
            )
        parts += [table(rows, context) for context in sorted({row["context"] for row in rows})]
        plan = ", ".join(f"{name} {value}" for name, value in report["plan"].items())
        parts.append(f"{report['gpu']}, {versions}, commit {report['commit']}; {plan}. To repeat:")
        parts.append("```sh\n" + report["command"].replace(" && ", "\n") + "\n```")
    DOCS.parent.mkdir(exist_ok=True)
    DOCS.write_text("\n\n".join(parts) + "\n")
    print(DOCS)


def image(report: dict[str, Any]) -> str:
    return f"benchmarks/results/quality-{report['model'].lower()}.png"


def draw(report: dict[str, Any]) -> None:
    """Points against dense over the share of tokens that decode attention reads, a line a method.

    Each method against dense in its own cells: where it was measured in few, averages of scores do not compare.
    """
    found = evidence(report["rows"])
    dense = found.pop("dense", None)
    if not dense or not found:
        return
    lines: dict[str, list[tuple[float, float, float, float]]] = {}
    for own in found.values():
        difference, (low, high) = lost(own, dense)
        point = (100 * average(own, "attended"), difference, difference - low, high - difference)
        few = "" if len(own) == len(dense) else f" ({len(own)} cells)"
        lines.setdefault(own[0]["method"] + few, []).append(point)
    with plot(ROOT / image(report), width=7) as axes:
        axes.axhline(0, color="0.65", label="dense")
        for name, points in lines.items():
            x, y, down, up = zip(*sorted(points), strict=True)
            axes.errorbar(x, y, yerr=[down, up], marker="o", capsize=3, label=name)
        axes.set_xscale("log")
        read = sorted({round(x, 1) for points in lines.values() for x, *_ in points})
        axes.set_xticks(read, [f"{x:g}" for x in read])
        axes.set_xticks([], minor=True)
        axes.set(xlabel="tokens read, % of those that dense reads", ylabel="average score, points against dense")
        axes.set_title(f"{report['model']}: {len(dense)} cells where dense scores at least {EVIDENCE}")
        axes.figure.legend(loc="outside lower center", ncols=3, frameon=False)
