"""A tiny decoder, made in code: three layers, four query heads over two KV heads, random weights, bytes as tokens."""

from __future__ import annotations

from pathlib import Path

import torch

LAYERS, QUERY_HEADS, KV_HEADS, HEAD_DIM = 3, 4, 2, 32


def make_model(folder: Path, seed: int, kv_heads: int = KV_HEADS, bias: float = 0.0) -> Path:
    """Writes it as a Hugging Face folder, which is returned; with biases of keys of that deviation, if any."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=QUERY_HEADS,
        num_key_value_heads=kv_heads,
        head_dim=HEAD_DIM,
        max_position_embeddings=1024,
        initializer_range=0.3,  # attention that prefers some tokens
        attention_bias=bias > 0,
    )
    model = LlamaForCausalLM(config)
    for layer in model.model.layers if bias else ():
        torch.nn.init.normal_(layer.self_attn.k_proj.bias, std=bias)
    model.to(torch.bfloat16).save_pretrained(folder)
    letters = {letter: n for n, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder
