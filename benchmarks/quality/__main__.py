"""Whether answers change: tasks with known answers over long contexts, dense beside HATA, on any SGLang server.

    python -m benchmarks.quality --model DIR --weights DIR         # the whole grid: starts a server for each method
    python -m benchmarks.quality --model DIR --weights DIR --methods dense,trained@1/64 --contexts 4096,8192
    python -m benchmarks.quality --url http://127.0.0.1:30000      # a running server; its budget is asked for
    python -m benchmarks.quality --report [FILE ...]               # tables, plots and docs/quality.md of what is there
    python -m benchmarks.quality --small --require 3               # make quality: SmolLM2 on a CPU, in minutes

A document carries several questions: the first is asked alone and brings it into the prefix cache, the others follow
at once. Then all are asked again, with the document from there. Answers are greedy. Everything is made on the spot and
seeded; nothing is downloaded. Rows are written cell by cell, a cell being a task at a context; those that are in the
file already, of the same GPU, versions and commit, are not measured again. Methods may run apart, on several GPUs:
give each run its own --out, and then all files to --report.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import httpx

from benchmarks.common import RESULTS, ROOT, hata_settings, hata_state, header, write_rows
from benchmarks.quality import report as reports
from benchmarks.quality.run import Asker, Method, Plan, Prompts, budget_of, serving
from benchmarks.quality.tasks import TASKS, prose
from sglang_hata.cpu import gpu_present

# A share is at least --hata-min-budget, so tokens say more where contexts are short.
METHODS = (
    "dense,whole,trained@2048,trained@1/32,trained@1/64,trained@512,trained@256,trained@128,top@1/32,"
    "untrained128@1/32,untrained256@1/32"
)
# A model of 135M parameters does these, and a CPU prefills some hundred tokens a second.
SMALL = {
    "contexts": "2048",
    "tasks": "turns,needle_noise,needle_number",
    "methods": "dense,trained@1/8",
    "documents": 6,
    "questions": 6,
    "hata_flags": "--hata-min-budget 0",  # 1/8 of so little is 256 tokens
    "cold_only": True,
    "again": True,
    "out": ROOT / ".venv" / "quality.json",
}
Cell = tuple[str, int]  # task and context


def main() -> None:
    args = parse()
    if args.report is not None:
        return write_reports(args.report)
    # In a process of its own, as a CUDA context would take memory from the servers.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as aside:
        head = aside.submit(header, "quality").result()
    text = prose(args.documents_from)
    head["plan"] = {name: getattr(args, name) for name in ("documents", "questions", "seed", "hata_flags")}
    head["plan"] |= {"weights": Path(args.weights).name, "server_flags": args.server_flags}
    head["plan"] |= {"text": sha256("".join(text).encode()).hexdigest()[:12]}
    if args.url:
        head |= {"gpu": "not known", "versions": {}, "commit": None}  # the server may run elsewhere
    plan = Plan(
        documents=args.documents,
        questions=args.questions,
        seed=args.seed,
        text=text,
        cold_only=args.cold_only,
        concurrency=args.concurrency,
        answers=args.answers,
    )
    if args.url:
        with httpx.Client(base_url=args.url, timeout=3600) as server:
            state = hata_state(server)
            name = args.method or ("hata" if state else "dense")
            path = measure(server, plan, args, head, name, budget_of(state))
    else:
        model = args.model or default_model()
        for method in [Method.parse(text, args.weights) for text in args.methods.split(",")]:
            path = out(args, model)
            if not missing(path, head | {"model": Path(model).name}, args, method.name, method.budget):
                print(f"{method.label} is in {path} already.", file=sys.stderr)
                continue
            hata = shlex.split(args.hata_flags) if method.flags else []
            with serving(model, [*method.flags, *hata, *shlex.split(args.server_flags)]) as server:
                path = measure(server, plan, args, head, method.name, method.budget)
    (result,) = reports.merge([path]).values()
    write_rows(path, head | {name: result[name] for name in ("model", "hata", "rows")}, reports.key)
    print(path)
    reports.show(result)
    if path.parent == RESULTS:
        write_reports([])
    if args.require is not None and (failure := reports.shortfall(result["rows"], args.require)):
        raise SystemExit(failure)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality",
        description=__doc__,
        epilog=f"Tasks: {', '.join(TASKS)}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    where = parser.add_argument_group("what is measured")
    where.add_argument(
        "--model", help="model folder; a server is started for each method (default: SmolLM2-135M-Instruct)"
    )
    where.add_argument(
        "--methods",
        default=METHODS,
        help="dense, whole, trained@1/64, trained@2048, untrained128@1/64, ..., top@1/64 for trained codes without a "
        "sample of the rest, sized128@1/64 for untrained codes with sizes of keys, and hamming128@1/64 for untrained "
        "codes scored as in the paper (default: each at some budgets)",
    )
    where.add_argument("--weights", default="auto", help="trained hash weights: a folder, or auto (default: auto)")
    where.add_argument("--url", help="ask this running server instead")
    where.add_argument("--method", help="how its rows are called (default: dense, or hata)")
    where.add_argument("--tokenizer", help="tokenizer folder (default: the one of the model that the server names)")
    what = parser.add_argument_group("what is asked")
    what.add_argument("--contexts", default="4096,8192,16384,32768", help="tokens (default: 4096,8192,16384,32768)")
    what.add_argument("--tasks", default=",".join(TASKS), help="separated by commas (default: all, listed below)")
    what.add_argument("--documents", type=int, default=13, help="documents a cell (default: 13)")
    what.add_argument("--questions", type=int, default=8, help="questions a document (default: 8)")
    what.add_argument("--seed", type=int, default=0, help="of the first document (default: 0)")
    what.add_argument("--documents-from", type=Path, metavar="DIR", help="prose and facts of your own: .txt, .md, .rst")
    how = parser.add_argument_group("how")
    how.add_argument("--server-flags", default="", help='more flags for every server, as in --server-flags="--tp 2"')
    how.add_argument(
        "--hata-flags",
        default="",
        help='more flags for HATA, as in --hata-flags="--hata-dense-layers 3"',
    )
    how.add_argument(
        "--concurrency",
        type=int,
        default=16 if gpu_present() else 1,
        help="documents at once (default: 16, or 1 on a CPU)",
    )
    how.add_argument("--cold-only", action="store_true", help="leave out the pass from the prefix cache")
    how.add_argument("--again", action="store_true", help="measure what is in the file already, too")
    how.add_argument("--small", action="store_true", help="a grid for SmolLM2 on a CPU, dense and HATA at 1/8")
    how.add_argument("--require", type=float, metavar="POINTS", help="fail when HATA is further below dense")
    how.add_argument("--out", type=Path, help="result file (default: benchmarks/results/quality-MODEL.json)")
    how.add_argument("--answers", type=Path, metavar="FILE", help="append every answer to this file, as JSON lines")
    how.add_argument("--report", nargs="*", type=Path, metavar="FILE", help="merge files, write tables, plots and docs")
    if "--small" in sys.argv:
        parser.set_defaults(**SMALL)
    args = parser.parse_args()
    args.contexts = sorted(map(int, args.contexts.split(",")))
    args.tasks = args.tasks.split(",")
    if unknown := [name for name in args.tasks if name not in TASKS]:
        parser.error(f"{unknown[0]} is not a task: choose from {', '.join(TASKS)}.")
    if args.documents < 1 or args.questions < 1:
        parser.error("--documents and --questions have to be at least 1.")
    return args


def default_model() -> str:
    from hata_rag.model import default_model as smollm2

    return str(smollm2(lambda line: print(line, file=sys.stderr)))


def out(args: argparse.Namespace, model: str) -> Path:
    return args.out or RESULTS / f"quality-{Path(model).name.lower()}.json"


def missing(path: Path, head: dict[str, Any], args: argparse.Namespace, method: str, budget: str) -> list[Cell]:
    """The cells of a method that are still to be measured."""
    cells = [(task, context) for context in args.contexts for task in args.tasks]
    old = json.loads(path.read_text()) if path.exists() else {}
    if any(old.get(name) != head[name] for name in ("gpu", "versions", "commit")):
        return cells  # nothing of the file will stay
    for name in ("model", "plan"):
        if old[name] != head[name]:
            raise SystemExit(
                f"{path} is of the {name} {old[name]}, not {head[name]}: give another --out, or remove it."
            )
    rows = [row for row in old["rows"] if (row["method"], row["budget"]) == (method, budget) and not args.again]
    done = {(row["task"], row["context"], row["cached"]) for row in rows}
    return [cell for cell in cells if not done >= {(*cell, False), (*cell, not args.cold_only)}]


def measure(
    server: httpx.Client, plan: Plan, args: argparse.Namespace, head: dict[str, Any], name: str, budget: str
) -> Path:
    """Measures the missing cells of one server's method; each goes to the file at once. Returns the file."""
    served = server.get("/v1/models").raise_for_status().json()["data"][0]
    model = served.get("root") or served["id"]
    state = hata_state(server)
    if name == "trained" and state.get("weights", "none") == "none":
        raise SystemExit(f"There are no trained weights for {model}: give their folder with --weights.")
    asker = Asker(server, prompts(args.tokenizer or model), served["id"])
    path = out(args, model)
    settings = {f"{name}@{budget}": hata_settings(state)} if state else {}
    head = head | {"model": Path(model).name, "hata": settings}
    for task, context in missing(path, head, args, name, budget):
        rows: list[dict[str, Any]] = []
        if context <= (served.get("max_model_len") or context):
            rows = plan.cell(asker, task, context, name, budget)
        else:
            print(f"{task} at {context}: left out, as the server ends at {served['max_model_len']}.", file=sys.stderr)
        write_rows(path, head | {"rows": rows}, reports.key)
    return path


@cache
def prompts(folder: str) -> Prompts:
    """The prompts of a model, one object for all its servers. Its own limit of tokens is the servers' to watch."""
    from transformers import AutoTokenizer

    return Prompts(AutoTokenizer.from_pretrained(folder, model_max_length=10**9))


def write_reports(paths: list[Path]) -> None:
    """Merged result files, their plots, and docs/quality.md; without paths, of all that are in the results folder."""
    found = paths or sorted(RESULTS.glob("quality-*.json"), key=lambda path: path.stem)
    if not found:
        raise SystemExit(f"There is nothing to report in {RESULTS}: run python -m benchmarks.quality first.")
    merged = reports.merge(found)
    for result in merged.values():
        path = RESULTS / f"quality-{result['model'].lower()}.json"
        path.write_text(json.dumps(result, indent=2) + "\n")
        reports.show(result)
        reports.draw(result)
    reports.write_docs(merged.values())


if __name__ == "__main__":
    main()
