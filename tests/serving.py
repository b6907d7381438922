"""A real SGLang server for tests: started with the flags of a user, asked over HTTP."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from sglang_hata.cpu import gpu_present

START_SECONDS = 600
NEW_TOKENS = 32
# Logits are bf16, and between 16 and 32, where this model's best ones lie, bf16 numbers are 0.125 apart: sums taken in
# another order may make two tokens that are one such step apart change places.
TIE = 0.125
# What the machine at hand needs, "--attention-backend flashinfer" say.
EXTRA_FLAGS = os.environ.get("HATA_TEST_SERVER_FLAGS", "").split()


class Server:
    """One running server.

    Args:
        url: where it listens.
        log: what it has printed.
    """

    def __init__(self, url: str, log: Path) -> None:
        self.http = httpx.Client(base_url=url, timeout=600)
        self.url = url
        self.log = log

    def generate(self, prompt: str | list[str], new_tokens: int, **fields: Any) -> Any:
        """Greedy continuation, with the log probabilities of the five best tokens at every step."""
        request = {
            "text": prompt,
            "sampling_params": {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True},
            "return_logprob": True,
            "top_logprobs_num": 5,
        }
        response = self.http.post("/generate", json=request | fields)
        response.raise_for_status()
        return response.json()

    def generate_at_once(self, prompts: list[str], new_tokens: int) -> list[Any]:
        """As many requests at the same time as there are prompts."""
        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(lambda prompt: self.generate(prompt, new_tokens), prompts))

    def hata(self) -> dict[str, Any]:
        """HATA's settings and counters."""
        return self.http.get("/server_info").raise_for_status().json()["internal_states"][0]["hata"]

    def flush(self) -> None:
        self.http.post("/flush_cache").raise_for_status()

    def abort_all(self) -> None:
        self.http.post("/abort_request", json={"rid": "", "abort_all": True}).raise_for_status()


def command(model: Path, flags: list[str]) -> list[str]:
    """The command that a user would type on this machine."""
    launcher = ["sglang.launch_server"] if gpu_present() else ["sglang_hata.cpu", "serve"]
    return [sys.executable, "-m", *launcher, "--model-path", str(model), "--random-seed", "1", *flags, *EXTRA_FLAGS]


@contextmanager
def serving(model: Path, *flags: str, environment: Mapping[str, str] | None = None) -> Iterator[Server]:
    """A server for the length of a with block; its log is printed if it does not start."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = Path(tempfile.mkstemp(prefix="sglang-", suffix=".log")[1])
    with log.open("wb") as file:
        process = subprocess.Popen(
            command(model, ["--host", "127.0.0.1", "--port", str(port), *flags]),
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | (environment or {}),
            start_new_session=True,
        )
    server = Server(f"http://127.0.0.1:{port}", log)
    try:
        wait_until_healthy(server, process)
        yield server
    finally:
        server.http.close()
        stop(process)


def wait_until_healthy(server: Server, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            if server.http.get("/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.5)
    raise AssertionError(f"the server did not start:\n{server.log.read_text(errors='replace')[-6000:]}")


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ends the server and every process that it started."""
    import psutil

    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for child in family:
        if child.is_running():
            child.kill()
    psutil.wait_procs(family, timeout=20)


def first_difference(one: Any, other: Any) -> int | None:
    """The first step at which two answers have different tokens."""
    tokens = [[token for _, token, _ in answer["meta_info"]["output_token_logprobs"]] for answer in (one, other)]
    return next((i for i, (a, b) in enumerate(zip(*tokens, strict=True)) if a != b), None)


def assert_same_text(dense: Any, hata: Any) -> None:
    """Equal texts, or a first difference at which dense itself had the two tokens tied within bf16 noise."""
    step = first_difference(dense, hata)
    if step is None:
        assert dense["text"] == hata["text"]
        return
    ranked = {token: logprob for logprob, token, _ in dense["meta_info"]["output_top_logprobs"][step]}
    chosen = hata["meta_info"]["output_token_logprobs"][step][1]
    behind = max(ranked.values()) - ranked.get(chosen, float("-inf"))
    print(f"step {step}: for dense, the token that the other chose is {behind:.4f} behind its own")
    assert behind <= TIE + 1e-3
