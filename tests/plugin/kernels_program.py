"""A generation by SGLang with HATA's kernels under Triton's interpreter; prints the server's counters."""

import json
import sys

import sglang as sgl

from sglang_hata.cpu import engine_arguments

if __name__ == "__main__":
    model, prompt, tokens = sys.argv[1], sys.argv[2], int(sys.argv[3])
    options = {"hata_budget": 128, "hata_min_context": 256, "hata_sink": 4, "hata_recent": 16, "hata_verify": True}
    options |= {"hata_weights": "none", "hata_key_sizes": True}
    arguments = engine_arguments() | {"max_total_tokens": 2048} | options
    engine = sgl.Engine(model_path=model, hata=True, **arguments)
    answer = engine.generate(prompt, {"temperature": 0, "max_new_tokens": tokens})
    state = engine.get_server_info()["internal_states"][0]["hata"]
    engine.shutdown()
    print(json.dumps({"prompt_tokens": answer["meta_info"]["prompt_tokens"], "hata": state}))
