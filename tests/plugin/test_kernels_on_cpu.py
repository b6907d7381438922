"""The served path of a GPU, kernels and all, where there is none: real SGLang, Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sglang_hata.config import HataConfig
from sglang_hata.cpu import gpu_present
from texts import section

PROGRAM = Path(__file__).with_name("kernels_program.py")
LAYERS, KV_HEADS, TOKENS = 30, 3, 3


@pytest.mark.server
@pytest.mark.skipif(gpu_present(), reason="kernels are compiled where there is a GPU")
def test_kernels_serve_and_choose_as_specified(model: Path) -> None:
    prompt = section("specialnames", 0, 2500) + "\n\nQuestion: What is a class?\nAnswer:"
    command = [sys.executable, "-m", "sglang_hata.cpu", "python", str(PROGRAM), str(model), prompt, str(TOKENS)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    report = json.loads(run.stdout.strip().splitlines()[-1])
    state, prompt_tokens = report["hata"], report["prompt_tokens"]

    rule = HataConfig(budget="128", sink=4, recent=16, min_context=256).budget_rule()
    lengths = [prompt_tokens + step for step in range(1, TOKENS)]
    seen, kept = sum(lengths), sum(rule.of(length) for length in lengths)
    assert kept < seen / 2
    assert state["tokens_seen"] == KV_HEADS * LAYERS * seen
    assert state["tokens_attended"] == KV_HEADS * LAYERS * kept
    assert state["selections_checked"] == KV_HEADS * LAYERS * len(lengths)
    assert state["selections_wrong"] == 0
    assert state["stale_codes"] == 0
