"""The served path, end to end: real SGLang, a real model, real documents, the flags of a user."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest
import torch

from hata_weights import artifact
from hata_weights.rotation import untrained_projection
from serving import NEW_TOKENS, Server, assert_same_text, serving
from sglang_hata.config import HataConfig
from sglang_hata.cpu import gpu_present
from texts import PROMPTS, section

pytestmark = pytest.mark.server

LAYERS, KV_HEADS = 30, 3  # SmolLM2-135M
# Checks between the launches of a step need eager steps.
VERIFY = ["--hata-verify", "--disable-cuda-graph"] if gpu_present() else ["--hata-verify"]
# As many ranks as KV heads, where there are GPUs for them; a CPU takes any number.
RANKS = KV_HEADS if not gpu_present() or torch.cuda.device_count() >= KV_HEADS else 1
# SGLang 0.5.16 allocates pages of more than one token with a kernel that a CPU does not have.
PAGES = [] if version("sglang") == "0.5.16" and not gpu_present() else ["--page-size", "16"]


def test_with_the_whole_context_as_budget_the_text_is_dense(
    model: Path, dense_answers: list[Any], tmp_path: Path
) -> None:
    """Also: a folder of weights, 256 bits, a dense layer and pages of 16 tokens."""
    identity = artifact.Identity(str(model), LAYERS, 0, KV_HEADS, head_dim=64, bits=256, tool="tests")
    # Of another layer each, and for queries another one than for keys.
    rotations = [untrained_projection(i, range(KV_HEADS), 64, 256)[0] for i in range(LAYERS + 2)]
    weights = {i: torch.stack([rotations[i + 1], rotations[i + 2]]) for i in range(LAYERS)}
    artifact.save(tmp_path, identity, weights)
    flags = ["--hata", "--hata-budget", "100%", "--hata-min-context", "0", *PAGES]
    flags += ["--hata-weights", str(tmp_path), "--hata-dense-layers", "1"]
    # --hata-verify selects also where every token is kept, so this runs the whole sparse path.
    with serving(model, *flags, *VERIFY) as server:
        lengths = []
        for prompt, dense in zip(PROMPTS, dense_answers, strict=True):
            answer = server.generate(prompt, NEW_TOKENS)
            lengths.append(answer["meta_info"]["prompt_tokens"])
            assert_same_text(dense, answer)
        print(f"prompts of {lengths} tokens")
        assert min(lengths) >= 500 and 2_500 <= max(lengths) <= 3_000
        state = server.hata()
        assert state["weights"] == str(tmp_path) and state["bits"] == 256
        assert state["tokens_attended"] == state["tokens_seen"]
        assert state["selections_checked"] > len(PROMPTS) * (NEW_TOKENS - 1) * (LAYERS - 1) * KV_HEADS
        assert state["selections_wrong"] == 0 and state["stale_codes"] == 0


def test_auto_serves_the_weights_that_ship_by_their_own_scoring(model: Path) -> None:
    """By tensor-parallel ranks, each with a KV head and its codes. --hata-verify counts what all of them chose."""
    flags = ["--hata", "--hata-weights", "auto", "--hata-budget", "128", "--hata-min-context", "0"]
    flags += ["--hata-sink", "4", "--hata-recent", "16", "--tp-size", str(RANKS)]
    with serving(model, *flags, *VERIFY) as server:
        before = server.hata()
        server.generate(PROMPTS[0], 8)
        state = server.hata()
    assert Path(state["weights"]).name == "SmolLM2-135M-Instruct-128"
    assert (state["scoring"], state["bits"]) == ("one-sided", 128)
    assert state["bytes_per_token"] == LAYERS * KV_HEADS // RANKS * 16
    steps = state["decode_steps"] - before["decode_steps"]
    assert state["selections_checked"] - before["selections_checked"] == steps * LAYERS * KV_HEADS > 0
    assert state["selections_wrong"] == 0 and state["stale_codes"] == 0


BUDGET, MIN_CONTEXT = 128, 256
DOCUMENT = section("specialnames", 0, 6_000)
QUESTIONS = [DOCUMENT + f"\n\nQuestion: {question}\nAnswer:" for question in ("What is a class?", "What does new do?")]


@pytest.fixture(scope="module")
def small(model: Path) -> Iterator[Server]:
    """A small budget, untrained codes and sizes, chunked and mixed prefill, forced retraction, and a pool that two
    documents fill."""
    flags = ["--hata", "--hata-budget", str(BUDGET), "--hata-min-context", str(MIN_CONTEXT), "--hata-sink", "4"]
    flags += ["--hata-recent", "16", "--hata-weights", "none", "--hata-key-sizes"]
    flags += ["--max-total-tokens", "4096", "--enable-mixed-chunk"]
    # With overlap, a GPU runs a step past the end of each request, and counts it.
    flags += ["--chunked-prefill-size", "512", "--disable-overlap-schedule"]
    with serving(model, *flags, *VERIFY, environment={"SGLANG_TEST_RETRACT": "1"}) as server:
        yield server


def gained(before: dict[str, Any], after: dict[str, Any]) -> dict[str, int]:
    counters = ("tokens_attended", "tokens_seen", "keys_hashed", "selections_checked")
    return {name: after[name] - before[name] for name in counters}


def assert_codes_and_selections_right(server: Server) -> None:
    state = server.hata()
    assert state["stale_codes"] == 0, "a stored code is not the hash of its key"
    assert state["selections_wrong"] == 0, "a selection is not the oracle's"


def test_server_info_says_what_is_active(small: Server) -> None:
    state = small.hata()
    shown = ("budget", "bits", "scoring", "key_sizes", "dense_layers", "sink", "recent", "min_context")
    assert {name: state[name] for name in shown} == {
        "budget": "128",
        "bits": 128,
        "scoring": "one-sided",
        "key_sizes": True,
        "dense_layers": 0,
        "sink": 4,
        "recent": 16,
        "min_context": 256,
    }
    assert state["bytes_per_token"] == LAYERS * KV_HEADS * 18
    lines = [line for line in small.log.read_text().splitlines() if "HATA is active" in line]
    assert len(lines) == 1 and f"{state['bytes_per_token']} bytes a token" in lines[0]


def test_a_small_budget_reads_less_and_a_shared_prefix_is_not_hashed_again(small: Server) -> None:
    rule = HataConfig(budget=str(BUDGET), sink=4, recent=16, min_context=MIN_CONTEXT).budget_rule()
    small.flush()
    for number, prompt in enumerate(QUESTIONS):
        before = small.hata()
        meta = small.generate(prompt, NEW_TOKENS)["meta_info"]
        more = gained(before, small.hata())

        # The first new token comes from prefill; each later one from a decode step over all tokens before it.
        steps = range(meta["prompt_tokens"] + 1, meta["prompt_tokens"] + NEW_TOKENS)
        seen, kept = sum(steps), sum(rule.of(length) for length in steps)
        assert more["tokens_seen"] == KV_HEADS * LAYERS * seen
        assert more["tokens_attended"] == KV_HEADS * LAYERS * kept
        assert more["selections_checked"] == len(steps) * LAYERS * KV_HEADS
        assert more["keys_hashed"] == meta["prompt_tokens"] - meta["cached_tokens"] + len(steps)
        share = more["tokens_attended"] / more["tokens_seen"]
        print(f"question {number}: {meta['cached_tokens']} of {meta['prompt_tokens']} prompt tokens cached, ", end="")
        print(f"{more['tokens_attended']:,} of {more['tokens_seen']:,} tokens attended ({share:.1%})")
        assert share < 0.2
        if number == 1:
            shared = small.generate(DOCUMENT, 1)["meta_info"]["prompt_tokens"]
            assert meta["cached_tokens"] > 0.95 * shared
    assert_codes_and_selections_right(small)


def test_codes_after_eviction(small: Server) -> None:
    small.generate(QUESTIONS[0], 4)
    for start in range(3):
        small.generate(section("compound", start * 8_000, 8_000), 4)
    again = small.generate(QUESTIONS[0], 4)["meta_info"]
    assert again["cached_tokens"] < 0.1 * again["prompt_tokens"], "the document was to be evicted"
    assert_codes_and_selections_right(small)


def test_codes_after_retraction_of_a_ragged_batch(small: Server) -> None:
    def retractions() -> int:
        return small.log.read_text().count("retracted_reqs")

    before = retractions()
    prompts = [section("types", 4_000 * i, 700 * (i + 1)) + "\n\nIn short," for i in range(4)]
    answers = small.generate_at_once(prompts, 24)
    assert all(answer["meta_info"]["completion_tokens"] == 24 for answer in answers)
    assert retractions() > before
    assert_codes_and_selections_right(small)


def test_codes_after_abort_and_flush(small: Server) -> None:
    def ask() -> None:
        with httpx.Client(base_url=small.url, timeout=600) as http:  # its connection ends with the request
            request = {"text": PROMPTS[1], "sampling_params": {"max_new_tokens": 500, "ignore_eos": True}}
            http.post("/generate", json=request)

    steps = small.hata()["decode_steps"]
    asking = Thread(target=ask)
    asking.start()
    while small.hata()["decode_steps"] < steps + 3:
        time.sleep(0.5)
    small.abort_all()
    asking.join(timeout=120)
    assert not asking.is_alive()
    assert_codes_and_selections_right(small)

    small.flush()
    meta = small.generate(QUESTIONS[0], 4)["meta_info"]
    assert meta["cached_tokens"] == 0
    assert_codes_and_selections_right(small)


def test_the_frontend_program_runs_against_the_server(small: Server) -> None:
    done = run_example("frontend.py", "--server", small.url)
    assert done.count("Q: ") == 2 and done.count("A: ") == 2


def test_the_engine_takes_hata_as_a_keyword(model: Path) -> None:
    first, second, state = (json.loads(line) for line in run_example("engine.py", str(model)).splitlines())
    assert first["cached"] == 0 and second["cached"] > 0.95 * first["prompt"]
    assert first["answer"] and state["budget"] == "256" and state["min_context"] == 512
    assert 0 < state["tokens_attended"] < 0.5 * state["tokens_seen"]


def run_example(name: str, *arguments: str) -> str:
    """What a program in rag_demo/examples prints, run as its own text says."""
    program = [str(Path(__file__).parents[2] / "rag_demo" / "examples" / name), *arguments]
    python = [sys.executable] if gpu_present() else [sys.executable, "-m", "sglang_hata.cpu", "python"]
    done = subprocess.run([*python, *program], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
