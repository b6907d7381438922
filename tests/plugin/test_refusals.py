"""What HATA cannot serve is refused at start, in one sentence, before any weight is loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hata_weights import artifact
from sglang_hata.config import HataConfig, HataError
from sglang_hata.cpu import environment, gpu_present, server_arguments
from sglang_hata.refusals import SETTINGS, check_settings

CASES: dict[str, tuple[list[str], str]] = {
    "plain": ([], "starts"),
    "budget-share": (["--hata-budget", "1.6%", "--hata-min-context", "512"], "starts"),
    "budget": (["--hata-budget", "many"], "--hata-budget many is not a budget"),
    "bits": (["--hata-bits", "96"], "--hata-bits 96 is not a code length"),
    "speculative": (
        ["--speculative-algorithm", "NGRAM"],
        "--hata cannot run with --speculative-algorithm NGRAM: its verification steps are dense",
    ),
    "hierarchical-cache": (
        ["--enable-hierarchical-cache"],
        "--hata cannot run with --enable-hierarchical-cache: keys that return from the host would come without",
    ),
    "disaggregation": (
        ["--disaggregation-mode", "decode"],
        "--hata cannot run with --disaggregation-mode decode: keys sent between prefill and decode servers",
    ),
    "lmcache": (["--enable-lmcache"], "--hata cannot run with --enable-lmcache"),
    "kv-dtype": (
        ["--kv-cache-dtype", "fp8_e4m3"],
        "--hata cannot run with --kv-cache-dtype fp8_e4m3 here: only the GPU kernels read it; use auto.",
    ),
    "flexkv": (["--enable-flexkv"], "--hata cannot run with --enable-flexkv"),
    "pipeline": (["--pp-size", "2"], "--hata cannot run with --pp-size 2"),
    "context-parallel": (["--tp-size", "2", "--attn-cp-size", "2"], "--hata cannot run with --attn-cp-size 2"),
    # By another name in 0.5.23.
    "dp-attention": (
        ["--tp-size", "2", "--dp-size", "2", "--enable-dp-attention"],
        ": it has not been tested with HATA; use --dp-size.",
    ),
    "tensor-parallel": (["--tp-size", "3"], "starts"),
    "data-parallel": (["--dp-size", "2"], "starts"),
    "torch-compile": (["--enable-torch-compile"], "--hata cannot run with --enable-torch-compile"),
    "embedding": (["--is-embedding"], "--hata cannot run with --is-embedding"),
    "decode-backend": (
        ["--decode-attention-backend", "triton"],
        "--hata cannot run with --decode-attention-backend triton: HATA is the decode backend, so remove it",
    ),
    "attention-backend": (
        ["--attention-backend", "flex_attention"],
        "--hata cannot run with --attention-backend flex_attention",
    ),
    "dense-layers": (["--hata-dense-layers", "30"], "--hata-dense-layers 30 leaves nothing to HATA"),
    "min-context": (["--hata-min-context", "8192"], "--hata-min-context 8192 leaves nothing to HATA"),
    "budget-of-all": (["--hata-budget", "8192"], "--hata-budget 8192 leaves nothing to HATA"),
    "share-of-all": (
        ["--hata-budget", "5%", "--hata-min-budget", "8192"],
        "--hata-min-budget 8192 leaves nothing to HATA, as the model's context ends at 8192 tokens: give a smaller",
    ),
    "whole": (["--hata-budget", "100%"], "starts"),
}
ENVIRONMENT_CASES = {
    "SGLANG_USE_HND_KVCACHE": "--hata cannot run with SGLANG_USE_HND_KVCACHE=1: codes follow the NHD layout",
    "SGLANG_ENABLE_POST_CAPTURE_KV_SIZING": "the KV pool would be resized after its codes were allocated",
    "SGLANG_ENABLE_METADATA_GLUE_GRAPH": "what is planned on the host before each step would be planned once",
}
# Architectures, by the part of their configuration that SGLang tells them by.
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "num_hidden_layers": 30,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "torch_dtype": "bfloat16",
}
MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "sliding-window": (
        {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 4096},
        "some of its layers attend to a sliding window",
    ),
    "encoder": ({"architectures": ["BertForSequenceClassification"], "model_type": "bert"}, "it does not generate"),
    "mla": (
        {
            "architectures": ["DeepseekV2ForCausalLM"],
            "model_type": "deepseek_v2",
            "kv_lora_rank": 512,
            "q_lora_rank": None,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
        },
        "its attention is MLA",
    ),
    "hybrid": (
        {
            "architectures": ["Qwen3NextForCausalLM"],
            "model_type": "qwen3_next",
            "layer_types": ["linear_attention", "full_attention"] * 15,
        },
        "some of its layers are linear attention or state space",
    ),
}


def python(program: list[str], arguments: list[str], given: str | None = None) -> subprocess.CompletedProcess[str]:
    """Runs a program of SGLang's with a server's arguments, adapted to a machine without a GPU where it is one."""
    return subprocess.run(
        [sys.executable, *program, *(arguments if gpu_present() else server_arguments(arguments))],
        input=given,
        env=dict(os.environ) if gpu_present() else environment(os.environ),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def ask(cases: list[tuple[list[str], dict[str, str]]]) -> list[str]:
    """The launcher's answers, from one process for all cases."""
    adapt = list if gpu_present() else server_arguments
    program = [str(Path(__file__).with_name("refusals_program.py"))]
    done = python(program, [], json.dumps([(adapt(arguments), variables) for arguments, variables in cases]))
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('"')]
    assert len(answers) == len(cases), done.stderr[-4000:]
    return answers


@pytest.fixture(scope="module")
def answers(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    cases: dict[str, tuple[list[str], dict[str, str]]] = {}
    serve = ["--hata", "--model-path", str(model)]
    for name, (flags, _) in CASES.items():
        cases[name] = ([*serve, *flags], {})
    for variable in ENVIRONMENT_CASES:
        cases[variable] = (serve, {variable: "1"})
    for name, (config, _) in MODELS.items():
        folder = tmp_path_factory.mktemp(name)
        (folder / "config.json").write_text(json.dumps(LLAMA | config))
        cases[name] = (["--hata", "--model-path", str(folder), "--skip-tokenizer-init"], {})
    weights = tmp_path_factory.mktemp("weights")
    identity = artifact.Identity("another", layers=3, dense_layers=2, kv_heads=3, head_dim=64, bits=128, tool="tests")
    artifact.save(weights, identity, {2: torch.zeros(2, 3, 64, 128, dtype=torch.int8)})
    cases["weights"] = ([*serve, "--hata-weights", str(weights)], {})
    fits = artifact.Identity("SmolLM2", 30, 29, 3, 64, 128, "tests", fingerprint="0" * 64)
    foreign = tmp_path_factory.mktemp("foreign")
    artifact.save(foreign, fits, {29: torch.zeros(2, 3, 64, 128, dtype=torch.int8)})
    cases["foreign"] = ([*serve, "--hata-weights", str(foreign), "--hata-dense-layers", "29"], {})
    cases["no-weights"] = ([*serve, "--hata-weights", str(tmp_path_factory.mktemp("empty"))], {})
    cases["without-hata"] = (["--model-path", str(model), "--hata-budget", "512"], {})
    return dict(zip(cases, ask(list(cases.values())), strict=True))


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        *((name, sentence) for name, (_, sentence) in CASES.items()),
        *ENVIRONMENT_CASES.items(),
        *((name, sentence) for name, (_, sentence) in MODELS.items()),
        ("weights", "are for another with layers 3, but"),
        ("foreign", "makes other queries and keys (fingerprint "),
        ("no-weights", "holds no hata.json: give a folder of hash weights."),
        ("without-hata", "--hata-budget has no effect without --hata"),
    ],
)
def test_the_launcher_answers_in_one_sentence(answers: dict[str, str], name: str, sentence: str) -> None:
    assert sentence in answers[name]
    assert "\n" not in answers[name]


HARMLESS = {refusal.setting: refusal.harmless[0] for refusal in SETTINGS} | {
    "device": "cuda",
    "attention_backend": "flashinfer",
    "prefill_attention_backend": None,
    "disable_cuda_graph": False,
    "disable_decode_cuda_graph": False,
}


@pytest.mark.parametrize("setting", [refusal.setting for refusal in SETTINGS])
def test_every_setting_of_the_table_is_refused(setting: str) -> None:
    check_settings(SimpleNamespace(**HARMLESS), HataConfig())
    for value in (True, 2, "other"):
        if value in next(refusal.harmless for refusal in SETTINGS if refusal.setting == setting):
            continue
        with pytest.raises(HataError, match="^--hata cannot run with --" + setting.replace("_", "-")):
            check_settings(SimpleNamespace(**HARMLESS | {setting: value}), HataConfig())


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"device": "npu"}, "--hata cannot run on --device npu: it runs on cuda"),
        (
            {"attention_backend": "trtllm_mha"},
            "--attention-backend trtllm_mha on cuda: use flashinfer or fa3 or triton",
        ),
        ({"device": "cpu"}, "--attention-backend flashinfer on cpu: use torch_native"),
    ],
)
def test_devices_and_dense_backends(settings: dict[str, str], sentence: str) -> None:
    with pytest.raises(HataError) as refusal:
        check_settings(SimpleNamespace(**HARMLESS | settings), HataConfig())
    assert sentence in str(refusal.value)


def test_verification_needs_eager_steps_on_a_gpu() -> None:
    with pytest.raises(HataError, match="--hata-verify looks at every step, which CUDA graphs hide"):
        check_settings(SimpleNamespace(**HARMLESS), HataConfig(verify=True))
    check_settings(SimpleNamespace(**HARMLESS | {"disable_cuda_graph": True}), HataConfig(verify=True))


@pytest.mark.parametrize(
    ("layer", "asked", "what"),
    [
        ({"logit_cap": 30.0}, {}, "caps attention logits"),
        ({"sliding_window_size": 1024}, {}, "attends to a sliding window"),
        ({"is_cross_attention": True}, {}, "is cross-attention"),
        ({}, {"save_kv_cache": False}, "does not cache its keys by the KV pool"),
        ({}, {"sinks": torch.zeros(8)}, "needs sinks"),
        ({}, {"return_lse": True}, "needs return_lse"),
    ],
)
def test_what_a_layer_asks_for_beyond_plain_attention(layer: dict[str, Any], asked: dict[str, Any], what: str) -> None:
    """Where a model's configuration does not say it."""
    from sglang.srt.layers.radix_attention import RadixAttention

    from sglang_hata.backend import HataBackend

    backend = HataBackend.__new__(HataBackend)  # without a server
    backend.slot_table = torch.zeros(1, 4096)
    odd = RadixAttention(8, 64, 0.125, num_kv_heads=2, layer_id=3, **layer)
    with pytest.raises(HataError, match=f"^--hata cannot serve layer 3: it {what}; remove --hata.$"):
        backend.forward_decode(*torch.zeros(3, 1, 1), odd, None, **asked)


LAUNCHERS = {
    "launch_server": ["-m", "sglang.launch_server"],
    "sglang serve": ["-c", "from sglang.cli.main import main; main()", "serve"],
}


@pytest.mark.parametrize("launcher", LAUNCHERS.values(), ids=LAUNCHERS)
def test_a_refused_command_line_exits_with_its_sentence_and_no_traceback(model: Path, launcher: list[str]) -> None:
    done = python(launcher, ["--model-path", str(model), "--hata", "--enable-hierarchical-cache"])
    assert done.returncode == 1
    assert "--hata cannot run with --enable-hierarchical-cache" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr and "Load weight" not in done.stdout + done.stderr


BROKEN = """
from sglang_hata import compat
compat.LAUNCHER_HOOKS += (compat.Hook("sglang.srt.server_args.ServerArgs.gone", "AFTER", print, (), "", ""),)
import runpy
runpy.run_module("sglang.launch_server", run_name="__main__")
"""


def test_a_plugin_that_failed_to_load_never_ends_as_dense_serving(model: Path) -> None:
    done = python(["-c", BROKEN], ["--model-path", str(model), "--hata"])
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("--hata is not available: sglang") and "has moved" in last and "install sglang" in last


def test_flags_are_in_the_launchers_help() -> None:
    done = python(["-m", "sglang.launch_server"], ["--help"])
    assert done.returncode == 0, done.stderr[-2000:]
    for flag in ("--hata ", "--hata-budget TOKENS|SHARE%", "--hata-weights DIR|auto|none", "--hata-verify"):
        assert flag in done.stdout
