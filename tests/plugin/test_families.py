"""Families of models that make their keys in ways of their own, on real SGLang, with random weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sglang_hata.config import HataConfig
from sglang_hata.cpu import gpu_present

pytestmark = pytest.mark.server

PROGRAM = Path(__file__).with_name("families_program.py")
LAYERS, KV_HEADS, VOCABULARY, NEW_TOKENS = 3, 2, 512, 5
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": KV_HEADS,
    "num_hidden_layers": LAYERS,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "torch_dtype": "bfloat16",
}
FAMILIES: dict[str, dict[str, Any]] = {
    # Queries and keys are normalised before RoPE.
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 128},
    # Keys are a slice of what one projection makes; 4 query heads of 64 dimensions a KV head.
    "phi3": {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "hidden_size": 512,
        "sliding_window": None,
        "original_max_position_embeddings": 2048,
    },
    # Heads of 256 dimensions.
    "gemma": {
        "architectures": ["GemmaForCausalLM"],
        "model_type": "gemma",
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_codes_are_of_the_keys_that_are_cached_and_choose_as_specified(family: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SHAPE | FAMILIES[family]))
    launcher = [] if gpu_present() else ["-m", "sglang_hata.cpu", "python"]
    command = [sys.executable, *launcher, str(PROGRAM), str(tmp_path), str(VOCABULARY), str(NEW_TOKENS)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    report = json.loads(run.stdout.strip().splitlines()[-1])
    state = report["hata"]

    rule = HataConfig(budget="128", min_context=0).budget_rule()
    lengths = [length + step for length in report["prompts"] for step in range(1, NEW_TOKENS)]
    assert state["tokens_seen"] == LAYERS * KV_HEADS * sum(lengths)
    assert state["tokens_attended"] == LAYERS * KV_HEADS * sum(rule.of(length) for length in lengths)
    assert state["selections_checked"] == LAYERS * KV_HEADS * len(lengths)
    assert state["selections_wrong"] == 0
    assert state["stale_codes"] == 0
