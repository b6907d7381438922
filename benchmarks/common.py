"""What the benchmarks share: a server on dummy weights, the head of a result file, its rows, and its plot."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import MagicMock

if TYPE_CHECKING:
    import httpx

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SETTINGS = ("budget", "min_budget", "bits", "scoring", "selection", "dense_layers", "sink", "recent", "min_context")
PACKAGES = ("sglang", "sglang-hata", "torch", "triton", "flashinfer-python")
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
    # As published but for the context, which ends at 4096.
    "llama-2-7b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "num_hidden_layers": 32,
        "vocab_size": 32000,
        "max_position_embeddings": 65536,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "torch_dtype": "bfloat16",
    },
}


def add_server_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b", help="default: llama-3.1-8b")
    parser.add_argument("--budget", default="1.5625%", help="HATA's budget (default: 1.5625%%, 1/64 of the context)")
    parser.add_argument("--hata-flags", default="", help='more flags for HATA, as in --hata-flags="--hata-bits 256"')
    parser.add_argument("--server-flags", default="", help="more flags for both servers, in the same way")


def server_flags(args: argparse.Namespace) -> dict[str, list[str]]:
    """The flags of the dense server and of the HATA server; where a flag is given twice, the last one counts."""
    both = shlex.split(args.server_flags)
    hata = ["--hata", "--hata-budget", args.budget, "--hata-min-context", "auto", *shlex.split(args.hata_flags)]
    return {"dense": both, "hata": [*both, *hata]}


@contextmanager
def serving(shape: str, max_batch: int, flags: list[str]) -> Iterator[tuple[httpx.Client, Path, float]]:
    """A server of a shape with dummy weights: its client, its model folder and the seconds until it was healthy.

    The CUDA graphs go up to ``max_batch`` requests.
    """
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder)
        (model / "config.json").write_text(json.dumps(SHAPES[shape]))
        write_tokenizer(model, SHAPES[shape]["vocab_size"])
        arguments = ["sglang.launch_server", "--model-path", folder, "--load-format", "dummy"]
        arguments += ["--sampling-backend", "pytorch", "--grammar-backend", "none"]
        start = time.perf_counter()
        with running([*arguments, "--cuda-graph-max-bs-decode", str(max_batch), *flags]) as client:
            yield client, model, time.perf_counter() - start


@contextmanager
def running(arguments: list[str]) -> Iterator[httpx.Client]:
    """A server, ``python -m`` with these arguments and a port, for the length of a with block: its client.

    When anything fails, the end of the server's log is shown.
    """
    import httpx  # here, as the benchmark of the kernels needs neither a server nor its packages

    with tempfile.TemporaryFile() as log:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        command = [sys.executable, "-m", *arguments, "--port", port]
        print(shlex.join(command), file=sys.stderr, flush=True)
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=offline(), start_new_session=True)
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=900) as client:
                wait_until_healthy(client, process)
                yield client
        except BaseException:
            log.seek(0)
            print(log.read().decode(errors="replace")[-8000:], file=sys.stderr)
            raise
        finally:
            with suppress(ProcessLookupError):  # it has ended by itself, with all its children
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def write_tokenizer(folder: Path, words: int) -> None:
    """A tokenizer whose words are t0, t1, ..., one token each: nothing to download, and prompts of exact lengths."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(words)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def offline(**variables: str) -> dict[str, str]:
    """The environment of a process that must not ask the model hub, with ``variables`` added."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", **variables}


def wait_until_healthy(client: httpx.Client, process: subprocess.Popen[bytes]) -> None:
    import httpx

    while process.poll() is None:
        try:
            if client.get("/health", timeout=30).status_code == 200:
                return
        except httpx.TransportError:
            pass  # not listening yet
        time.sleep(0.2)
    raise SystemExit("The server did not start; its log is above.")


def flush_cache(server: httpx.Client) -> None:
    """Empties the prefix cache, as soon as the server is idle."""
    server.post("/flush_cache", params={"timeout": 60}).raise_for_status()


def hata_state(server: httpx.Client) -> dict[str, Any]:
    """Settings and counters of a HATA server; nothing of one that is dense, or not SGLang."""
    import httpx

    with suppress(httpx.HTTPError, ValueError, LookupError):
        return server.get("/server_info").raise_for_status().json()["internal_states"][0]["hata"]
    return {}


def hata_settings(state: dict[str, Any]) -> dict[str, Any]:
    """What a result says of HATA's settings: weights by the name of their folder."""
    return {name: state[name] for name in SETTINGS} | {"weights": Path(state["weights"]).name}


def header(module: str) -> dict[str, Any]:
    """What a figure of ``benchmarks.<module>`` comes with: GPU, versions, commit and command.

    Asks CUDA for the name of the GPU, so call it when no server has yet to size its memory.
    """
    import torch

    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU",
        "versions": {package: installed(package) for package in PACKAGES},
        "commit": commit(),
        "command": shlex.join(["python", "-m", f"benchmarks.{module}", *sys.argv[1:]]),
    }


def memory_bandwidth() -> float:
    """Bytes a second of the GPU's memory: the better of a large copy, reads and writes counted, and a large sum."""
    import torch

    source = torch.zeros(2**29, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)

    def seconds(work: Callable[[], Any]) -> float:
        times = []
        for _ in range(10):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        return statistics.median(times)

    return max(2 * source.nbytes / seconds(lambda: target.copy_(source)), source.nbytes / seconds(source.sum))


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit() -> str | None:
    """The short hash of HEAD, "-dirty" after it when the tree has changes; HATA_COMMIT where git cannot say."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    if given := os.environ.get("HATA_COMMIT"):
        return given
    try:
        # The results are written by the benchmarks themselves, and change none of them.
        changes = git("status", "--porcelain", "--", ".", ":!benchmarks/results")
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def result_path(name: str, gpu: str, suffix: str = ".json") -> Path:
    return RESULTS / f"{name}-{gpu.replace(' ', '-').lower()}{suffix}"


def write_rows(path: Path, report: dict[str, Any], key: Callable[[dict[str, Any]], tuple]) -> None:
    """Writes a report, its rows in the order of their keys, together with what was measured before.

    Rows of the same GPU, versions and commit that are already in the file stay, unless ``report`` has one of the same
    key; so do its other entries, and its commands. Of another GPU, version or commit, nothing stays.
    """
    old = json.loads(path.read_text()) if path.exists() else {}
    if all(name in old and old[name] == report[name] for name in ("gpu", "versions", "commit")):
        commands = dict.fromkeys([*old["command"].split(" && "), report["command"]])
        parts = {name: old[name] | part for name, part in report.items() if name in old and isinstance(part, dict)}
        report = old | report | parts | {"rows": old["rows"] + report["rows"], "command": " && ".join(commands)}
    rows = {key(row): row for row in report["rows"]}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(report | {"rows": [rows[name] for name in sorted(rows)]}, indent=2) + "\n")


@contextmanager
def plot(path: Path, width: float = 9) -> Iterator[Any]:
    """Axes to draw on, of which an image is written at the end; without matplotlib, one sentence and no image."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"{path.name} is not drawn, as matplotlib is not installed: pip install matplotlib.")
        yield MagicMock()  # takes every call
        return
    figure = Figure(figsize=(width, 5), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    yield axes
    figure.savefig(path, dpi=150)
    print(path)
