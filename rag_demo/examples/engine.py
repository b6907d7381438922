"""HATA in a program of one's own, with no server: `sgl.Engine(hata=True, ...)`.

    python rag_demo/examples/engine.py MODEL                        (without a GPU: hata-cpu python ...)

Asks two questions about one document and prints, as JSON, the answers and how much of the second one's prompt came
from the cache.
"""

from __future__ import annotations

import argparse
import json
from pydoc_data.topics import topics

import sglang as sgl

from sglang_hata.cpu import engine_arguments

QUESTIONS = ("What is an assignment?", "What is a target list?")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or id of a Hugging Face model")
    model = parser.parse_args().model
    engine = sgl.Engine(model_path=model, hata=True, hata_budget=256, hata_min_context=512, **engine_arguments())
    try:
        document = topics["assignment"][:4_000]
        for question in QUESTIONS:
            answer = engine.generate(
                f"{document}\n\nQuestion: {question}\nAnswer:", {"temperature": 0, "max_new_tokens": 24}
            )
            meta = answer["meta_info"]
            shown = {"answer": answer["text"], "prompt": meta["prompt_tokens"], "cached": meta["cached_tokens"]}
            print(json.dumps(shown))
        print(json.dumps(engine.get_server_info()["internal_states"][0]["hata"]))
    finally:
        engine.shutdown()


if __name__ == "__main__":
    main()
