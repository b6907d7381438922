"""What is recorded of a model: exactly what its attention is given."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hata_weights.capture import (
    Decoder,
    capture,
    data_fingerprint,
    load_sample,
    read_sequences,
    second_half,
    throughout,
)
from hata_weights.errors import RequestError
from hata_weights.fingerprint import fingerprint, folder_fingerprint, rope
from weights.tiny import HEAD_DIM, KV_HEADS, LAYERS, QUERY_HEADS, make_model


@pytest.mark.parametrize("kv_heads", [KV_HEADS, QUERY_HEADS], ids=["gqa", "mha"])
def test_the_first_layer_is_what_a_hand_computes(tmp_path: Path, text: Path, kv_heads: int) -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    decoder = Decoder(str(make_model(tmp_path / "model", seed=1, kv_heads=kv_heads)), "cpu")
    (tokens,) = read_sequences(decoder, [text], 300, 1)
    capture(decoder, tokens, tmp_path / "sample", range(LAYERS), throughout(300, 40))
    sample = load_sample(tmp_path / "sample", [0], "cpu")

    model, first = decoder.model, decoder.model.layers[0]
    with torch.inference_mode():
        hidden = first.input_layernorm(model.embed_tokens(tokens.unsqueeze(0)))
        q = first.self_attn.q_proj(hidden).view(1, 300, QUERY_HEADS, HEAD_DIM).transpose(1, 2)
        k = first.self_attn.k_proj(hidden).view(1, 300, kv_heads, HEAD_DIM).transpose(1, 2)
        q, k = apply_rotary_pos_emb(q, k, *model.rotary_emb(hidden, torch.arange(300).unsqueeze(0)))
    assert torch.equal(sample.positions, throughout(300, 40))
    assert torch.equal(sample.queries, q[0, :, sample.positions].to(torch.bfloat16).to(torch.float32))
    assert torch.equal(sample.keys, k[0].to(torch.bfloat16).to(torch.float32))
    assert sample.scale.item() == pytest.approx(HEAD_DIM**-0.5)


def test_a_sample_of_two_layers_has_one_scale(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    scales = (0.25, 0.5)
    for layer, scale in enumerate(scales):
        tensors = {
            "queries": torch.randn(4, 3, 8, generator=generator),
            "keys": torch.randn(2, 9, 8, generator=generator),
        }
        tensors |= {"positions": torch.arange(3), "scale": torch.tensor(scale)}
        save_file(tensors, tmp_path / f"{layer}.safetensors")
    both = load_sample(tmp_path, [0, 1], "cpu")
    for layer, scale in enumerate(scales):
        alone = load_sample(tmp_path, [layer], "cpu")
        keys, queries = slice(2 * layer, 2 * layer + 2), slice(4 * layer, 4 * layer + 4)
        assert torch.equal(both.keys[keys], alone.keys)
        assert torch.equal(both.queries[queries] * both.scale, alone.queries * scale)


def test_capturing_leaves_the_output_alone(tiny: Path, text: Path, tmp_path: Path) -> None:
    from transformers import AutoModel

    decoder = Decoder(str(tiny), "cpu")
    (tokens,) = read_sequences(decoder, [text], 300, 1)
    usual = AutoModel.from_pretrained(tiny, dtype=torch.float32, attn_implementation="sdpa")
    seen: list[int] = []
    with torch.inference_mode():
        expected = usual(input_ids=tokens.unsqueeze(0)).last_hidden_state
        decoder.run(tokens, lambda layer, *_: seen.append(layer))
        assert torch.equal(decoder.model(input_ids=tokens.unsqueeze(0)).last_hidden_state, expected)
    assert seen == list(range(LAYERS))  # and nothing is recorded outside `run`


def test_queries_to_measure_on_come_from_the_second_half() -> None:
    assert second_half(10, 3).tolist() == [5, 7, 9]
    assert second_half(11, 100).tolist() == [5, 6, 7, 8, 9, 10]


def test_queries_to_learn_from_come_from_short_contexts_too() -> None:
    assert throughout(65, 3).tolist() == [1, 20, 64]  # squares of 1/8, 9/16 and 1
    positions = throughout(8192, 1024)
    assert positions[0] == 128
    assert positions[-1] == 8191
    assert 300 < (positions < 2048).sum() < 450
    assert len(throughout(10, 1024)) == 10


def test_sequences_are_shared_out_over_the_paths(tiny: Path, text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.md").write_text("a" * 600)
    (folder / "b.md").write_text("b" * 600)
    (folder / "c.bin").write_bytes(bytes(600))
    decoder = Decoder(str(tiny), "cpu")
    sequences = read_sequences(decoder, [text, folder], 512, 3)
    assert [len(sequence) for sequence in sequences] == [512, 512, 512]
    assert data_fingerprint(sequences) != data_fingerprint(sequences[:2])


def test_short_text_and_no_model_are_refused(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(RequestError, match=r"short\.txt holds 5 tokens of text: give at least 256"):
        read_sequences(Decoder(str(tiny), "cpu"), [tmp_path / "short.txt"], 512, 1)
    with pytest.raises(RequestError, match=r"cannot be loaded .* give a Hugging Face folder or id"):
        Decoder(str(tmp_path), "cpu")


def test_the_fingerprint_is_that_of_queries_and_keys(tiny: Path, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    before = Decoder(str(tiny), "cpu")
    for name in ("mlp.up_proj", "self_attn.v_proj", "self_attn.k_proj"):
        model = LlamaForCausalLM.from_pretrained(tiny)
        with torch.no_grad():
            model.get_parameter(f"model.layers.1.{name}.weight")[0, 0] += 1
        model.save_pretrained(tmp_path / name)
        before.tokenizer.save_pretrained(tmp_path / name)
        after = Decoder(str(tmp_path / name), "cpu").fingerprint
        assert (after == before.fingerprint) == (name != "self_attn.k_proj")
        assert folder_fingerprint(tmp_path / name) == after  # what a server computes, without loading the model


def test_settings_of_rope_read_alike_from_old_and_new_configurations() -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0}
    old = {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0}}
    assert rope(old) == rope({"rope_parameters": scaling | {"rope_theta": 1e6}}) == rope({"text_config": old})
    assert rope({"rope_theta": 1e6, "rope_scaling": None}) == rope({"rope_theta": 1e6}) != rope(old)
    assert rope({}) != rope({"rope_theta": 1e6}) != rope({"rope_theta": 1e6, "partial_rotary_factor": 0.5})


@pytest.mark.parametrize("kind", ["default", "linear", "yarn", "llama3"])
def test_a_folder_and_its_loaded_model_have_one_fingerprint(tiny: Path, tmp_path: Path, kind: str) -> None:
    shutil.copytree(tiny, tmp_path / kind)
    file = tmp_path / kind / "config.json"
    config = json.loads(file.read_text())
    config.pop("rope_parameters", None)
    scaling = {"rope_type": kind, "factor": 4.0}
    if kind == "llama3":
        scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    file.write_text(json.dumps(config | ({} if kind == "default" else {"rope_scaling": scaling})))
    assert folder_fingerprint(tmp_path / kind) == Decoder(str(tmp_path / kind), "cpu").fingerprint
    assert (folder_fingerprint(tmp_path / kind) == folder_fingerprint(tiny)) == (kind == "default")


def test_broken_or_missing_files_have_no_fingerprint(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "model")
    index = tmp_path / "model" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
    assert folder_fingerprint(tmp_path / "model") == folder_fingerprint(tiny)
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-00002.safetensors"}}))
    assert folder_fingerprint(tmp_path / "model") is None
    index.unlink()
    (tmp_path / "model" / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    assert folder_fingerprint(tmp_path / "model") is None


def test_scales_without_a_dimension_are_read() -> None:
    tensors = {"layers.0.self_attn.k_proj.weight": torch.ones(2, 2), "layers.0.self_attn.k_proj.scale": torch.ones(())}
    scaled = tensors | {"layers.0.self_attn.k_proj.scale": torch.tensor(2.0)}
    one, other = (fingerprint({n: t.clone for n, t in each.items()}, {}) for each in (tensors, scaled))
    assert one != other


def test_a_folder_without_a_known_layout_has_no_fingerprint(tiny: Path, tmp_path: Path) -> None:
    assert folder_fingerprint(tmp_path) is None
    (tmp_path / "config.json").write_bytes((tiny / "config.json").read_bytes())
    assert folder_fingerprint(tmp_path) is None
    save_file({"model.layers.0.mlp.up_proj.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    assert folder_fingerprint(tmp_path) is None
