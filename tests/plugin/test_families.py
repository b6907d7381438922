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
LAYERS, VOCABULARY, NEW_TOKENS = 3, 512, 5
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_hidden_layers": LAYERS,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "layer_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "torch_dtype": "bfloat16",
}
HEADS_OF_64, NO_WINDOW = {"hidden_size": 512}, {"sliding_window": None}
FAMILIES: dict[str, dict[str, Any]] = {
    # Queries and keys are normalised before RoPE.
    "Qwen3ForCausalLM": {"model_type": "qwen3", "head_dim": 128},
    # Keys are a slice of what one projection makes.
    "Phi3ForCausalLM": HEADS_OF_64 | NO_WINDOW | {"model_type": "phi3", "original_max_position_embeddings": 2048},
    # Heads of 256 dimensions.
    "GemmaForCausalLM": {"model_type": "gemma", "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh"},
}
# `--all-families` runs these too.
MORE: dict[str, dict[str, Any]] = {
    "ApertusForCausalLM": {"model_type": "apertus", "head_dim": 64, "hidden_act": "xielu"},
    "ArceeForCausalLM": {"model_type": "arcee", "head_dim": 64, "hidden_act": "relu2"},
    "CohereForCausalLM": HEADS_OF_64 | {"model_type": "cohere", "logit_scale": 0.0625},
    "Ernie4_5_ForCausalLM": {"model_type": "ernie4_5", "head_dim": 128, "use_bias": False},
    "ExaoneForCausalLM": HEADS_OF_64 | {"model_type": "exaone", "num_layers": LAYERS, "layer_norm_epsilon": 1e-5},
    "Glm4ForCausalLM": {"model_type": "glm4", "head_dim": 128, "partial_rotary_factor": 0.5, "attention_bias": True},
    "GraniteForCausalLM": HEADS_OF_64 | {"model_type": "granite", "attention_multiplier": 0.0156},
    "MistralForCausalLM": NO_WINDOW | {"model_type": "mistral", "head_dim": 64},
    "MixtralForCausalLM": HEADS_OF_64
    | NO_WINDOW
    | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "Olmo2ForCausalLM": HEADS_OF_64 | {"model_type": "olmo2"},
    # MHA, and positions that are learned.
    "OPTForCausalLM": HEADS_OF_64 | {"model_type": "opt", "num_key_value_heads": 8, "word_embed_proj_dim": 512},
    "Qwen2ForCausalLM": HEADS_OF_64 | {"model_type": "qwen2"},
    "Qwen3MoeForCausalLM": {
        "model_type": "qwen3_moe",
        "head_dim": 128,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 128,
        "norm_topk_prob": True,
        "mlp_only_layers": [],
    },
    "SeedOssForCausalLM": {"model_type": "seed_oss", "head_dim": 128, "attention_bias": True},
    # Its last layer has no RoPE.
    "SmolLM3ForCausalLM": HEADS_OF_64 | {"model_type": "smollm3", "no_rope_layers": [1, 1, 0]},
    # RoPE turns a quarter of each head.
    "StableLmForCausalLM": HEADS_OF_64 | {"model_type": "stablelm", "partial_rotary_factor": 0.25},
    "Starcoder2ForCausalLM": HEADS_OF_64
    | NO_WINDOW
    | {"model_type": "starcoder2", "norm_epsilon": 1e-5, "use_bias": True, "hidden_act": "gelu_pytorch_tanh"},
}


@pytest.mark.parametrize("family", [*FAMILIES, *(pytest.param(name, marks=pytest.mark.more) for name in MORE)])
def test_codes_are_of_the_keys_that_are_cached_and_choose_as_specified(family: str, tmp_path: Path) -> None:
    config = SHAPE | (FAMILIES | MORE)[family] | {"architectures": [family]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    launcher = [] if gpu_present() else ["-m", "sglang_hata.cpu", "python"]
    command = [sys.executable, *launcher, str(PROGRAM), str(tmp_path), str(VOCABULARY), str(NEW_TOKENS)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    report = json.loads(run.stdout.strip().splitlines()[-1])
    state, heads = report["hata"], LAYERS * config["num_key_value_heads"]

    rule = HataConfig(budget="128", min_context=0).budget_rule()
    lengths = [length + step for length in report["prompts"] for step in range(1, NEW_TOKENS)]
    assert state["tokens_seen"] == heads * sum(lengths)
    assert state["tokens_attended"] == heads * sum(rule.of(length) for length in lengths)
    assert state["selections_checked"] == heads * len(lengths)
    assert state["selections_wrong"] == 0
    assert state["stale_codes"] == 0
