"""Write a GGUF file as a Hugging Face folder: ``python -m hata_rag.convert GGUF FOLDER``.

transformers unpacks the weights. The tokenizer is built from the file's own fields instead, because
transformers' reading of them has the wrong end-of-sequence token, so that generation would never stop, and
leaves out the splitting of numbers into digits that the model was trained with.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

# Nothing here may be fetched: the file holds all there is.
os.environ["HF_HUB_OFFLINE"] = "1"

CONTROL_TOKEN = 3  # GGUF's token type of markers such as <|im_end|>


def convert(gguf: Path, folder: Path) -> None:
    """Convert ``gguf`` into ``folder``: bfloat16 safetensors, configuration, tokenizer and chat template."""
    import transformers

    # From transformers 5.19 on weights stay packed, and cannot be saved, unless asked for otherwise.
    packed = getattr(transformers, "GgufConfig", None)
    options = {"quantization_config": packed(dequantize=True)} if packed else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype="bfloat16", **options
    )
    model.save_pretrained(folder)
    _tokenizer(gguf).save_pretrained(folder)


def _tokenizer(gguf: Path) -> Any:
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fields = GGUFReader(gguf).fields

    def read(name: str) -> Any:
        return fields[name].contents()

    if (kind := (read("tokenizer.ggml.model"), read("tokenizer.ggml.pre"))) != ("gpt2", "smollm"):
        raise SystemExit(f"{gguf.name} has a tokenizer of the kind {kind}; only ('gpt2', 'smollm') is known")
    tokens = read("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in read("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = read("tokenizer.ggml.token_type")
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[read("tokenizer.ggml.bos_token_id")],
        eos_token=tokens[read("tokenizer.ggml.eos_token_id")],
        pad_token=tokens[read("tokenizer.ggml.padding_token_id")],
        unk_token=tokens[read("tokenizer.ggml.unknown_token_id")],
        model_max_length=read("llama.context_length"),
        clean_up_tokenization_spaces=False,
        chat_template=read("tokenizer.chat_template"),
    )


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
