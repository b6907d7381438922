"""A generation by SGLang from random weights; prints lengths of prompts and the server's counters."""

import json
import random
import sys

import sglang as sgl

from sglang_hata.cpu import engine_arguments, gpu_present

if __name__ == "__main__":
    folder, vocabulary, new_tokens = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    options = {"load_format": "dummy", "skip_tokenizer_init": True, "random_seed": 1, "max_total_tokens": 2048}
    options |= {"hata_budget": 128, "hata_min_context": 0, "hata_verify": True}
    if gpu_present():
        options["disable_cuda_graph"] = True
    engine = sgl.Engine(model_path=folder, hata=True, **engine_arguments() | options)
    words = random.Random(1)
    prompts = [[words.randrange(vocabulary) for _ in range(length)] for length in (430, 270)]
    engine.generate(input_ids=prompts, sampling_params={"max_new_tokens": new_tokens, "ignore_eos": True})
    state = engine.get_server_info()["internal_states"][0]["hata"]
    engine.shutdown()
    print(json.dumps({"prompts": [len(prompt) for prompt in prompts], "hata": state}))
