"""Time per output token of a whole SGLang server, dense beside HATA, on one GPU in one run.

    python -m benchmarks.serve_decode --case 131072x1 --case 32768x8

A case is CONTEXTxBATCH. The model is a shape with dummy weights, so nothing is downloaded and answers mean nothing.
Prompts are random tokens, in the prefix cache before the clock starts; a request for few and one for many new tokens
are timed in turn, and their difference is the cost of the tokens between, free of prefill. Beside each time stands its
floor: the bytes that a step must read over the GPU's copy bandwidth, measured in the same run. Writes the medians to
benchmarks/results/serve_decode-GPU.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx

RESULTS = Path(__file__).parent / "results"
VOCABULARY = 32_000
FEW, MANY = 16, 144
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "num_hidden_layers": 32,
        "vocab_size": 128256,
        "max_position_embeddings": 524288,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "torch_dtype": "bfloat16",
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", metavar="CONTEXTxBATCH", help="default: 131072x1 and 32768x8")
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--budget", default="1.5625%", help="HATA's budget (default: 1/64 of the context)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--server-flags", default="", help="more flags for both servers")
    args = parser.parse_args()
    cases = [tuple(map(int, case.split("x"))) for case in args.case or ["131072x1", "32768x8"]]

    common = ["--load-format", "dummy", "--skip-tokenizer-init", "--cuda-graph-max-bs", "8"]
    common += ["--sampling-backend", "pytorch", "--grammar-backend", "none", *args.server_flags.split()]
    modes = {"dense": common, "hata": [*common, "--hata", "--hata-budget", args.budget]}
    measured: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(SHAPES[args.shape]))
        for mode, flags in modes.items():
            with serving(folder, flags) as server:
                measured[mode] = [time_per_token(server, context, batch, args.repeats) for context, batch in cases]
                if mode == "hata":
                    state = server.get("/server_info").json()["internal_states"][0]["hata"]
    bandwidth = copy_bandwidth()
    rows = []
    for (context, batch), dense, hata in zip(cases, measured["dense"], measured["hata"], strict=True):
        least = {mode: 1e3 * size / bandwidth for mode, size in bytes_read(args.shape, context, batch, state).items()}
        row = {"context": context, "batch": batch, "dense_tpot_ms": dense, "hata_tpot_ms": hata, "ratio": dense / hata}
        rows.append(row | {"dense_floor_ms": least["dense"], "hata_floor_ms": least["hata"]})
    write(args, rows, state, bandwidth)


def time_per_token(server: httpx.Client, context: int, batch: int, repeats: int) -> float:
    """Median milliseconds a token, over ``repeats`` pairs of a short and a long generation."""
    rng = random.Random(context * batch)
    prompts = [[rng.randrange(VOCABULARY) for _ in range(context)] for _ in range(batch)]
    server.post("/flush_cache").raise_for_status()
    generate(server, prompts, 1)
    times = []
    for _ in range(repeats):
        few, many = generate(server, prompts, FEW), generate(server, prompts, MANY)
        times.append((many - few) / (MANY - FEW) * 1e3)
    return statistics.median(times)


def generate(server: httpx.Client, prompts: list[list[int]], new_tokens: int) -> float:
    sampling = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
    start = time.perf_counter()
    answers = server.post("/generate", json={"input_ids": prompts, "sampling_params": sampling})
    seconds = time.perf_counter() - start
    for answer in answers.raise_for_status().json():
        assert answer["meta_info"]["completion_tokens"] == new_tokens
    return seconds


def bytes_read(shape: str, context: int, batch: int, state: dict[str, Any]) -> dict[str, float]:
    """The fewest bytes that a decode step reads: all weights but the input embedding, and each request's cache."""
    model = SHAPES[shape]
    hidden, layers, head_dim = model["hidden_size"], model["num_hidden_layers"], model["head_dim"]
    kv_heads = model["num_key_value_heads"]
    attention = 2 * hidden * head_dim * (model["num_attention_heads"] + kv_heads)
    weights = 2 * (layers * (attention + 3 * hidden * model["intermediate_size"]) + hidden * model["vocab_size"])
    kv = batch * context * kv_heads * 4 * head_dim  # of one layer
    sparse = layers - state["dense_layers"]
    kept = float(state["budget"].rstrip("%")) / 100 if "%" in state["budget"] else int(state["budget"]) / context
    codes = batch * context * kv_heads * state["bits"] / 8
    return {
        "dense": weights + layers * kv,
        "hata": weights + state["dense_layers"] * kv + sparse * (codes + min(kept, 1) * kv),
    }


def copy_bandwidth() -> float:
    """Bytes a second of a large device-to-device copy, read and written ones counted; after the servers have ended."""
    import torch

    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = []
    for _ in range(10):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return 2 * source.nbytes / statistics.median(times)


@contextmanager
def serving(model: str, flags: list[str]) -> Iterator[httpx.Client]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", model, "--port", port, *flags]
    print(" ".join(command), file=sys.stderr, flush=True)
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=900)
            wait_until_healthy(client, process)
            yield client
        except BaseException:
            log.seek(0)
            print(log.read().decode(errors="replace")[-8000:], file=sys.stderr)
            raise
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_until_healthy(client: httpx.Client, process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None:
        try:
            if client.get("/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.5)
    raise SystemExit("The server did not start; its log is above.")


def write(args: argparse.Namespace, rows: list[dict[str, Any]], state: dict[str, Any], bandwidth: float) -> None:
    import torch

    gpu = torch.cuda.get_device_name()
    packages = ("sglang", "sglang-hata", "torch", "triton", "flashinfer-python")
    report = {
        "gpu": gpu,
        "versions": {package: version(package) for package in packages},
        "command": shlex.join(["python", "-m", "benchmarks.serve_decode", *sys.argv[1:]]),
        "shape": args.shape,
        "copy_bandwidth_tb_s": bandwidth / 1e12,
        "hata": {name: state[name] for name in ("budget", "bits", "dense_layers", "sink", "recent", "min_context")},
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"serve_decode-{gpu.replace(' ', '-').lower()}.json"
    path.write_text(json.dumps(report, indent=2) + "\n")
    print(f"{gpu}, {args.shape}, budget {args.budget}; floors at {bandwidth / 1e12:.2f} TB/s")
    print("context  batch  dense ms (floor)  HATA ms (floor)  ratio")
    for row in rows:
        dense, hata = row["dense_tpot_ms"], row["hata_tpot_ms"]
        print(f"{row['context']:7}  {row['batch']:5}  {dense:8.2f} ({row['dense_floor_ms']:5.2f})", end="")
        print(f"  {hata:7.2f} ({row['hata_floor_ms']:5.2f})  {row['ratio']:5.2f}")
    print(path)


if __name__ == "__main__":
    main()
