"""An SGLang frontend program: two questions about one document, which is computed and hashed once.

    python -m sglang.launch_server --model-path MODEL --hata        (without a GPU: hata-cpu serve ...)
    python rag_demo/examples/frontend.py --server http://127.0.0.1:30000

Nothing in it knows of HATA: programs, prefix sharing and forks work as they do on any SGLang server.
"""

from __future__ import annotations

import argparse
from pydoc_data.topics import topics
from typing import Any

import sglang as sgl

QUESTIONS = ("What does the del statement do?", "What happens to a name that is deleted?")


@sgl.function  # type: ignore[untyped-decorator]
def ask(s: Any, document: str, question: str) -> None:
    s += f"{document}\n\nQuestion: {question}\nAnswer:"
    s += sgl.gen("answer", max_tokens=32, temperature=0, stop="\n\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", default="http://127.0.0.1:30000", help="URL of a running SGLang server")
    sgl.set_default_backend(sgl.RuntimeEndpoint(parser.parse_args().server))
    document = topics["del"]
    for question in QUESTIONS:
        state = ask.run(document=document, question=question)
        print(f"Q: {question}\nA: {state['answer'].strip()}\n")


if __name__ == "__main__":
    main()
