"""Throughput of a whole SGLang server under load, dense beside HATA, on one GPU in one run.

    python -m benchmarks.serve_load
    python -m benchmarks.serve_load --rates 4,inf --prompts 32

Each request asks its own question about one long document, which is in the prefix cache before the clock starts. The
load is SGLang's own benchmark client (sglang.benchmark.serving, dataset generated-shared-prefix), at one request rate
after the other; "inf" sends everything at once. The model is a shape with dummy weights, and the tokenizer is made on
the spot, so nothing is downloaded. Writes benchmarks/results/serve_load-GPU.json.

One process of the server turns each prompt's text into tokens, one prompt after the other, and streams all answers:
tens of milliseconds for 32K tokens, which limits the highest rates whatever the attention. More of them may help,
--server-flags="--tokenizer-worker-num 8"; from SGLang 0.5.23 on, --client-flags=--tokenize-prompt sends tokens.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx

from benchmarks.common import (
    add_server_options,
    flush_cache,
    hata_settings,
    hata_state,
    header,
    offline,
    result_path,
    server_flags,
    serving,
    write_rows,
)

WORKLOAD = ("prefix", "question", "output", "prompts")
FIGURES = {  # of the client, with what the table calls them, and their decimals there
    "total_throughput": ("tokens/s", 0),
    "output_throughput": ("output tokens/s", 0),
    "median_e2e_latency_ms": ("answer P50 ms", 0),
    "p99_e2e_latency_ms": ("P99 ms", 0),
    "median_tpot_ms": ("TPOT P50 ms", 2),
    "p99_tpot_ms": ("P99 ms", 2),
    "median_ttft_ms": ("TTFT P50 ms", 0),
    "p99_ttft_ms": ("P99 ms", 0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", default="1,2,4,8,16,inf", help="requests a second (default: 1,2,4,8,16,inf)")
    parser.add_argument("--prompts", type=int, default=64, help="requests at each rate (default: 64)")
    parser.add_argument("--prefix", type=int, default=32_768, help="tokens that all requests share (default: 32768)")
    parser.add_argument("--question", type=int, default=128, help="tokens of each one's own (default: 128)")
    parser.add_argument("--output", type=int, default=128, help="tokens of each answer (default: 128)")
    parser.add_argument("--client-flags", default="", help="more flags for the client")
    add_server_options(parser)
    args = parser.parse_args()
    workload = {"shape": args.shape} | {name: getattr(args, name) for name in WORKLOAD}
    rows: dict[str, dict[str, Any]] = {rate: workload | {"rate": rate} for rate in args.rates.split(",")}

    report: dict[str, Any] = {}
    for mode, flags in server_flags(args).items():
        with serving(args.shape, args.prompts, flags) as (server, model, _):
            for rate, row in rows.items():
                row[mode] = load(server, model, args, rate)
                if mode == "hata":
                    # After every rate: a run that is cut short has lost nothing.
                    report = report or header("serve_load") | {"hata": hata_settings(hata_state(server))}
                    path = result_path("serve_load", report["gpu"])
                    write_rows(path, report | {"rows": [row]}, key)
    print(path)
    table(json.loads(path.read_text()))


def key(row: dict[str, Any]) -> tuple:
    return (row["shape"], *(row[name] for name in WORKLOAD), float(row["rate"]))


def load(server: httpx.Client, model: Path, args: argparse.Namespace, rate: str) -> dict[str, float]:
    """The client's figures at one rate; its warm-up request brings the shared prefix into the empty cache."""
    flush_cache(server)
    results = model / "load.jsonl"
    command = [sys.executable, "-m", "sglang.benchmark.serving", "--backend", "sglang", "--disable-tqdm"]
    command += ["--base-url", str(server.base_url).rstrip("/"), "--model", str(model), "--tokenizer", str(model)]
    command += ["--dataset-name", "generated-shared-prefix", "--gsp-num-groups", "1"]
    command += ["--gsp-prompts-per-group", str(args.prompts), "--gsp-system-prompt-len", str(args.prefix)]
    command += ["--gsp-question-len", str(args.question), "--gsp-output-len", str(args.output)]
    command += ["--request-rate", rate, "--output-file", str(results), *shlex.split(args.client_flags)]
    # The client keeps its prompts in the home folder under a name that does not tell one tokenizer from another.
    subprocess.run(command, check=True, stdout=sys.stderr, env=offline(HOME=str(model)))
    result = json.loads(results.read_text().splitlines()[-1])
    if result["completed"] != args.prompts:
        raise SystemExit(f"Only {result['completed']} of {args.prompts} requests were answered; the log is above.")
    return {name: result[name] for name in FIGURES}


def table(report: dict[str, Any]) -> None:
    print(f"{report['gpu']}, HATA's budget {report['hata']['budget']}; dense / HATA")
    print("shape          prefix  prompts  rate" + "".join(f"{heading:>18}" for heading, _ in FIGURES.values()))
    for row in report["rows"]:
        print(f"{row['shape']:12} {row['prefix']:8}  {row['prompts']:7}  {row['rate']:>4}", end="")
        for name, (_, decimals) in FIGURES.items():
            both = " / ".join(f"{row[mode][name]:.{decimals}f}" for mode in ("dense", "hata"))
            print(f"{both:>18}", end="")
        print()


if __name__ == "__main__":
    main()
