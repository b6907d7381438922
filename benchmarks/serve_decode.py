"""Time per output token of a whole SGLang server, dense beside HATA, on one GPU in one run.

    python -m benchmarks.serve_decode                          # the README's cases of the Llama-3.1-8B shape
    python -m benchmarks.serve_decode --shape llama-2-7b       # as many KV heads as query heads
    python -m benchmarks.serve_decode --small                  # contexts and batches at which HATA must cost nothing
    python -m benchmarks.serve_decode --case 131072x1 --case 32768x8

A case is CONTEXTxBATCH. The model is a shape with dummy weights, so nothing is downloaded and answers mean nothing.
Prompts are random tokens, in the prefix cache before the clock starts; a request for few and one for many new tokens
are timed in turn, and their difference is the cost of the tokens between, free of prefill. Shorter prompts are the
beginnings of longer ones, so the longest cases come first and prefill serves all. Beside each time stands its
floor: the bytes that a step must read over the GPU's memory bandwidth, measured in the same run. Medians go to
benchmarks/results/serve_decode-GPU.json, beside those of earlier runs with the same GPU, versions and commit, and into
a plot of the same name.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import httpx

from benchmarks.common import (
    SHAPES,
    add_server_options,
    flush_cache,
    hata_settings,
    hata_state,
    header,
    memory_bandwidth,
    plot,
    result_path,
    server_flags,
    serving,
    write_rows,
)
from sglang_hata.config import HataConfig

Case = tuple[int, int]  # context and batch

CASES: dict[str, list[Case]] = {
    "llama-3.1-8b": [(131_072, 1), (262_144, 1), (32_768, 8), (65_536, 8)],
    "llama-2-7b": [(32_768, 4)],
}
SMALL = [(context, batch) for context in (1024, 4096, 8192, 16_384, 32_768) for batch in (1, 8, 32)]
VOCABULARY = 32_000
PAGE = 64  # tokens that a prefix hit may lack of a whole prompt
FEW, MANY = 16, 144
PREFILL_CONTEXT, PREFILLS = 32_768, 5
QUESTION = 256  # new tokens behind a cached prefix


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--case", action="append", type=parse_case, metavar="CONTEXTxBATCH", help="instead of the shape's"
    )
    parser.add_argument("--small", action="store_true", help="1K to 32K tokens by 1, 8 and 32 requests")
    parser.add_argument(
        "--prefill", action="store_true", help="time to the first token of 32K tokens as well, uncached and cached"
    )
    parser.add_argument("--repeats", type=int, default=5, help="pairs of a short and a long generation (default: 5)")
    add_server_options(parser)
    args = parser.parse_args()
    cases = sorted(args.case or (SMALL if args.small else CASES[args.shape]), reverse=True)
    max_batch = max(batch for _, batch in cases)

    # In a process of their own, as a CUDA context would take memory from the servers.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as aside:
        report = aside.submit(header, "serve_decode").result()
        bandwidth = aside.submit(memory_bandwidth).result()
    path = result_path("serve_decode", report["gpu"])
    report |= {"startup_s": {args.shape: {}}, "rows": []}

    dense: dict[Case, float] = {}
    prefill: dict[str, Any] = {}
    for mode, flags in server_flags(args).items():
        with serving(args.shape, max_batch, ["--skip-tokenizer-init", *flags]) as (server, _, seconds):
            report["startup_s"][args.shape][mode] = seconds
            cases = [case for case in cases if fits(server, case, mode)]
            for case in cases:
                before = hata_state(server) if mode == "hata" else {}
                tpot = time_per_token(server, *case, args.repeats)
                print(f"{case[0]}x{case[1]} {mode}: {tpot:.2f} ms", file=sys.stderr, flush=True)
                if mode == "dense":
                    dense[case] = tpot
                    continue
                after = hata_state(server)
                seen = after["tokens_seen"] - before["tokens_seen"]
                share = (after["tokens_attended"] - before["tokens_attended"]) / seen
                report["hata"] = hata_settings(after)
                report["rows"].append(result(args.shape, case, dense[case], tpot, report["hata"], share, bandwidth))
                # After every case: a run that is cut short has lost nothing.
                write_rows(path, report, lambda row: (row["shape"], row["context"], row["batch"]))
            if args.prefill:
                prefill[f"{mode}_ms"] = time_to_first_token(server)
                prefill[f"{mode}_cached_ms"] = time_to_first_token(server, QUESTION)
    if args.prefill:
        prefill |= {"context": PREFILL_CONTEXT, "new": QUESTION, "ratio": prefill["dense_ms"] / prefill["hata_ms"]}
        report["prefill"] = {args.shape: prefill}
    write_rows(path, report, lambda row: (row["shape"], row["context"], row["batch"]))
    print(path)
    report = json.loads(path.read_text())
    table(report)
    if report["rows"]:
        draw(report)


def result(
    shape: str, case: Case, dense_ms: float, hata_ms: float, hata: dict[str, Any], attended: float, bandwidth: float
) -> dict[str, Any]:
    """A row of the report; ``attended`` is the share of its tokens that HATA's server attended to."""
    context, batch = case
    size = bytes_read(shape, context, batch, hata, selects=attended < 1)
    least = {name: 1e3 * count / bandwidth for name, count in size.items()}
    model = SHAPES[shape]
    return {
        "shape": shape,
        "context": context,
        "batch": batch,
        "q_heads": model["num_attention_heads"],
        "kv_heads": model["num_key_value_heads"],
        "head_dim": model["head_dim"],
        "bits": hata["bits"],
        "budget": hata["budget"],
        "dense_tpot_ms": dense_ms,
        "hata_tpot_ms": hata_ms,
        "ratio": dense_ms / hata_ms,
        "bandwidth_tb_s": bandwidth / 1e12,
        "dense_floor_ms": least["dense"],
        "hata_floor_ms": least["hata"],
        "weights_ms": least["weights"],
        "dense_layers_ms": least["dense_layers"],
        "attended": attended,
        "bytes": {mode: round(size[mode]) for mode in ("dense", "hata")},
    }


def parse_case(text: str) -> Case:
    context, batch = map(int, text.split("x"))
    return context, batch


def fits(server: httpx.Client, case: Case, mode: str) -> bool:
    """Whether the KV pool has room for a case; HATA's is the smaller one, as its codes lie beside it."""
    context, batch = case
    room = server.get("/server_info").json()["max_total_num_tokens"]
    if batch * (context + MANY) > room:
        print(f"{context}x{batch} is left out: the {mode} server's KV pool has room for {room} tokens.", flush=True)
        return False
    return True


def time_per_token(server: httpx.Client, context: int, batch: int, repeats: int) -> float:
    """Median milliseconds a token, over ``repeats`` pairs of a short and a long generation."""
    prompts = [random_tokens(random.Random(i), context) for i in range(batch)]
    generate(server, prompts, 1)
    times = []
    for _ in range(repeats):
        few, many = (generate(server, prompts, new_tokens, context - PAGE) for new_tokens in (FEW, MANY))
        times.append((many - few) / (MANY - FEW) * 1e3)
    return statistics.median(times)


def time_to_first_token(server: httpx.Client, new: int = PREFILL_CONTEXT) -> float:
    """Median milliseconds until the first token after a prompt of which all but ``new`` tokens are cached."""
    rng = random.Random(0)
    shared = random_tokens(rng, PREFILL_CONTEXT - new)
    times = []
    for i in range(1 + PREFILLS):
        if i == 0 or not shared:
            flush_cache(server)
        cached = len(shared) - PAGE if i else 0
        times.append(1e3 * generate(server, [shared + random_tokens(rng, new)], 1, cached))
    return statistics.median(times[1:])  # in the first, kernels may still be compiled, and nothing is cached


def random_tokens(rng: random.Random, count: int) -> list[int]:
    """Random tokens; fewer of one seed are the beginning of more of it."""
    return rng.choices(range(VOCABULARY), k=count)


def generate(server: httpx.Client, prompts: list[list[int]], new_tokens: int, cached: int = 0) -> float:
    """Seconds of a batch of requests, each of which must find ``cached`` tokens of its prompt in the prefix cache."""
    sampling = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
    start = time.perf_counter()
    answers = server.post("/generate", json={"input_ids": prompts, "sampling_params": sampling})
    seconds = time.perf_counter() - start
    for answer in answers.raise_for_status().json():
        assert answer["meta_info"]["completion_tokens"] == new_tokens
        if answer["meta_info"]["cached_tokens"] < cached:
            raise SystemExit(
                "Prompts fell out of the prefix cache, so decode was not measured alone: give fewer tokens."
            )
    return seconds


def bytes_read(shape: str, context: int, batch: int, hata: dict[str, Any], selects: bool) -> dict[str, float]:
    """The fewest bytes that a decode step reads: all weights but the input embedding, and each request's cache.

    Also the two parts of HATA's step that no selection makes smaller: the weights and the dense layers. Where HATA has
    selected nothing, because the context is too short for that to pay, it reads what dense attention does.
    """
    model = SHAPES[shape]
    hidden, layers, head_dim = model["hidden_size"], model["num_hidden_layers"], model["head_dim"]
    kv_heads = model["num_key_value_heads"]
    attention = 2 * hidden * head_dim * (model["num_attention_heads"] + kv_heads)
    weights = 2 * (layers * (attention + 3 * hidden * model["intermediate_size"]) + hidden * model["vocab_size"])
    kv = batch * context * kv_heads * 4 * head_dim  # of one layer
    codes = batch * context * kv_heads * hata["bits"] / 8  # of one layer
    own = {name: hata[name] for name in ("budget", "min_budget", "sink", "recent")}
    sparse = codes + HataConfig(**own).budget_rule().of(context) / context * kv if selects else kv
    dense_layers = hata["dense_layers"] * kv
    return {
        "weights": weights,
        "dense_layers": dense_layers,
        "dense": weights + layers * kv,
        "hata": weights + dense_layers + (layers - hata["dense_layers"]) * sparse,
    }


def table(report: dict[str, Any]) -> None:
    print(f"{report['gpu']}, HATA's budget {report['hata']['budget']}; floors at the memory's bandwidth")
    print("shape         context  batch  dense ms (floor)  HATA ms (floor)  ratio  attended")
    for row in report["rows"]:
        dense, hata = row["dense_tpot_ms"], row["hata_tpot_ms"]
        print(f"{row['shape']:12} {row['context']:8}  {row['batch']:5}", end="")
        print(f"  {dense:8.2f} ({row['dense_floor_ms']:5.2f})  {hata:7.2f} ({row['hata_floor_ms']:5.2f})", end="")
        print(f"  {row['ratio']:5.2f}  {row['attended']:8.1%}")
    for shape, seconds in report["startup_s"].items():
        print(f"{shape}: healthy after {seconds['dense']:.0f} s dense, {seconds['hata']:.0f} s with HATA")
    for shape, times in report.get("prefill", {}).items():
        first = f"{shape}: first token of {times['context']} tokens after"
        print(f"{first} {times['dense_ms']:.0f} ms dense, {times['hata_ms']:.0f} ms with HATA, none cached", end="")
        if "new" in times:
            print(
                f"; {times['dense_cached_ms']:.1f} and {times['hata_cached_ms']:.1f} ms, all but {times['new']} cached",
                end="",
            )
        print()


def draw(report: dict[str, Any]) -> None:
    """A pair of bars for each case, a line across each at its floor, and the ratio above."""
    rows = report["rows"]
    with plot(result_path("serve_decode", report["gpu"], ".png"), width=max(7, 1.5 + 0.9 * len(rows))) as axes:
        for mode, label, color, left in (("dense", "dense", "0.65", -0.4), ("hata", "HATA", "C0", 0.0)):
            starts = [i + left for i in range(len(rows))]
            axes.bar(starts, [row[f"{mode}_tpot_ms"] for row in rows], 0.4, align="edge", color=color, label=label)
            floors = [row[f"{mode}_floor_ms"] for row in rows]
            floor_label = "floor: bytes over memory bandwidth" if mode == "hata" else None
            axes.hlines(floors, starts, [start + 0.4 for start in starts], color="black", label=floor_label)
        for i, row in enumerate(rows):
            height = max(row["dense_tpot_ms"], row["hata_tpot_ms"])
            axes.annotate(f"{row['ratio']:.2f}x", (i, height), (0, 4), textcoords="offset points", ha="center")
        names = [f"{row['context'] // 1024}K x {row['batch']}\n{row['shape'].removeprefix('llama-')}" for row in rows]
        axes.set_xticks(range(len(rows)), names)
        axes.set(xlabel="context x batch, Llama shape", ylabel="time per output token (ms)")
        axes.set_title(f"{report['gpu']}, SGLang {report['versions']['sglang']}, budget {report['hata']['budget']}")
        axes.figure.legend(loc="outside lower center", ncols=3, frameon=False)
        axes.margins(x=0.02, y=0.1)


if __name__ == "__main__":
    main()
