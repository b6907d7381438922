"""What changes answers: the choice of tokens, its budget, or a layer. No server, no kernels: the specification chooses.

    python -m benchmarks.blame MODEL --weights DIR                      # kinds of choices, side by side
    python -m benchmarks.blame MODEL --weights DIR --alone all          # and each layer alone, all others dense
    python -m benchmarks.blame MODEL --weights DIR --alone 0,1          # or only these
    python -m benchmarks.blame MODEL --weights DIR --budgets 64,32,16,8 # and at several budgets

A server that errs in one token goes on from there, so its answers say that something went wrong, but hardly what. Here
a document and a question are prefilled densely, and the tokens of the right answer are read, each attending as a decode
step would. Reported is how far the next token's distribution is from dense's (Kullback-Leibler divergence, nats), how
many of the most likely next tokens are others, and in how many answers none is. The kinds of choices:

    sampled     by trained codes, most of the budget to the best tokens, some to a sample of the rest: the default
    top         by trained codes, the best tokens alone
    exact       the best tokens by q.k itself, summed over the query heads of a group, as codes estimate it
    best        the tokens that hold most of the group's mean attention: no choice of so many tokens holds more

Runs on transformers, on a GPU if there is one. Rows go to benchmarks/results/blame-MODEL.json.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import RESULTS, header, write_rows
from benchmarks.quality.run import Plan, Prompts, drawn, shown
from benchmarks.quality.tasks import TASKS, Document, prose
from hata_kernels import reference
from hata_kernels.reference import KEYS, QUERIES, SAMPLED, TOP, Budget
from hata_weights import artifact
from hata_weights.biases import untrained_projections
from sglang_hata.config import HataConfig

ATTENTION = "hata_blame"
SINK, RECENT, DENSE_LAYERS = HataConfig.sink, HataConfig.recent, HataConfig.dense_layers
KINDS = ("sampled", "top", "exact", "best")
Chosen = tuple[Tensor, Tensor | None]  # positions [H, k], and how often each is doubled


@dataclass
class Model:
    """A causal language model whose attention can be told to choose."""

    folder: str
    weights: Path
    kind: str = "dense"
    layers: Container[int] = ()
    budget: Budget = field(default_factory=Budget)

    def __post_init__(self) -> None:
        from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer
        from transformers.masking_utils import AttentionMaskInterface

        AttentionInterface.register(ATTENTION, self.attend)
        AttentionMaskInterface.register(ATTENTION, lambda *_, **__: None)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        net = AutoModelForCausalLM.from_pretrained(self.folder, dtype=dtype, attn_implementation=ATTENTION)
        self.net = net.to(self.device).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder, model_max_length=10**9)
        self.identity, self.projections = artifact.load(self.weights)
        # As a server does: layers that the weights leave out have untrained codes.
        of, missing = self.identity, range(DENSE_LAYERS, self.identity.dense_layers)
        self.projections |= untrained_projections(Path(self.folder), missing, range(of.kv_heads), of.head_dim, of.bits)

    @cached_property
    def prompts(self) -> Prompts:
        return Prompts(self.tokenizer)

    @contextmanager
    def choosing(self, kind: str, layers: Container[int], budget: Budget) -> Iterator[None]:
        """Attend by choice in some layers, for the length of a with block."""
        self.kind, self.layers, self.budget = kind, layers, budget
        try:
            yield
        finally:
            self.kind = "dense"

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        """transformers' attention function: [1, heads, tokens, D] each, the queries the last of all tokens."""
        scale = options.get("scaling") or query.shape[-1] ** -0.5
        N, L = query.shape[2], key.shape[2]
        if self.kind == "dense" or module.layer_idx not in self.layers:
            seen = torch.ones(N, L, dtype=torch.bool, device=query.device).tril(L - N)
            causal = {"is_causal": True} if N == L else {"attn_mask": seen}
            attention = torch.nn.functional.scaled_dot_product_attention
            return attention(query, key, value, scale=scale, enable_gqa=True, **causal).transpose(1, 2), None
        head = torch.arange(key.shape[1], device=key.device).unsqueeze(1)
        choose = self.chooser(module.layer_idx, key[0], scale)
        outputs = []
        for n, q in enumerate(query[0].unbind(1)):
            positions, doublings = choose(q, L - N + 1 + n)
            keys, values = key[0][head, positions], value[0][head, positions]
            outputs.append(reference.attend(q, keys, values, scale, doublings))
        return torch.stack(outputs).unsqueeze(0), None

    def chooser(self, layer: int, keys: Tensor, scale: float) -> Callable[[Tensor, int], Chosen]:
        """What a layer chooses for a query [Hq, D] among the first tokens of its keys [H, L, D]."""
        H = keys.shape[0]
        if self.kind in (SAMPLED, TOP):
            projection, scoring = self.projections[layer].to(keys.device), self.identity.scoring
            codes = reference.hash_codes(keys.transpose(0, 1).contiguous(), projection[KEYS])

        def by_codes(query: Tensor, length: int) -> Chosen:
            weights = reference.query_weights(query.unsqueeze(0), projection[QUERIES], scoring)[0]
            G, octave = query.shape[0] // H, reference.octaves(weights)
            planes = reference.query_planes(weights, reference.magnitudes(G, scoring))
            distances = reference.distances(planes, codes[:length])
            bins = reference.bins_of(G, weights.shape[-1], scoring)
            ranks = reference.rank(distances, SINK, RECENT, bins, weights.abs().sum(-1, dtype=torch.int32))
            luck = reference.luck(length, layer, keys.device) * (self.kind == SAMPLED)
            ranks = reference.draw(ranks, luck, octave)
            positions = reference.select_positions(ranks, self.budget.of(length))
            return positions, reference.doublings(ranks, luck, octave, positions)

        def by_attention(query: Tensor, length: int) -> Chosen:
            logits = query.view(H, -1, query.shape[-1]).float() @ keys[:, :length].float().transpose(1, 2) * scale
            score = logits.sum(1) if self.kind == "exact" else logits.softmax(-1).mean(1)
            order = score.argsort(dim=-1, descending=True)
            ranks = torch.empty_like(order).scatter_(
                1, order, torch.arange(length, device=keys.device).expand_as(order)
            )
            ranks = reference.rank(ranks.int(), SINK, RECENT, length + 3)
            return reference.select_positions(ranks, self.budget.of(length)), None

        return by_codes if self.kind in (SAMPLED, TOP) else by_attention


@dataclass
class Tally:
    """What one kind of choice has changed so far."""

    answers: int = 0
    same: int = 0
    tokens: int = 0
    changed: int = 0
    divergence: float = 0.0

    def add(self, dense: Tensor, found: Tensor) -> None:
        """Log-probabilities [tokens, vocabulary]."""
        changed = int((dense.argmax(-1) != found.argmax(-1)).sum())
        self.answers, self.tokens = self.answers + 1, self.tokens + len(dense)
        self.same, self.changed = self.same + (changed == 0), self.changed + changed
        self.divergence += float((dense.exp() * (dense - found)).sum())

    def row(self) -> dict[str, Any]:
        shares = {"changed": self.changed / self.tokens, "same": self.same / self.answers}
        return {"answers": self.answers, "tokens": self.tokens, "divergence": self.divergence / self.tokens} | shares


def read(
    model: Model,
    task: str,
    document: Document,
    choices: dict[Any, tuple[str, Container[int], Budget]],
    tallies: dict[Any, Tally],
) -> None:
    """Reads the right answers to a document's questions, densely and by every choice."""
    from transformers import DynamicCache

    prompts, cache = model.prompts, DynamicCache()

    def forward(tokens: list[int], after: int) -> Tensor:
        for layer in cache.layers:
            if layer.keys is not None:
                layer.keys, layer.values = layer.keys[:, :, :after], layer.values[:, :, :after]
        ids = torch.tensor([tokens], device=model.device)
        return model.net.model(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state[0]

    def answer(tokens: list[int], after: int) -> Tensor:
        return model.net.lm_head(forward(tokens, after)).float().log_softmax(-1)

    head = prompts.document(document)
    forward(head, 0)
    for number, question in enumerate(document.questions):
        earlier = document.questions[:number] if TASKS[task].turns else ()
        exchanges = [(each, each.rest) for each in earlier] or shown(document)
        asked, tokens = prompts.question(question, exchanges), prompts.encode(question.rest)
        forward(asked, len(head))
        start = len(head) + len(asked)
        dense = answer(tokens, start)
        for name, choice in choices.items():
            with model.choosing(*choice):
                tallies[name].add(dense, answer(tokens, start))


def key(row: dict[str, Any]) -> tuple[str, ...]:
    return *(str(row[name]) for name in ("task", "context", "budget", "choice")), str(row["layer"]).zfill(3)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.blame", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="Hugging Face folder")
    parser.add_argument("--weights", type=Path, required=True, help="folder of trained hash weights")
    parser.add_argument("--tasks", default="needle_uuid,frequent_words", help=f"of {', '.join(TASKS)}")
    parser.add_argument("--context", type=int, default=4096, help="tokens (default: 4096)")
    parser.add_argument("--budgets", default="32", metavar="N,...", help="one token in N (default: 32)")
    parser.add_argument("--documents", type=int, default=2, help="documents a task (default: 2)")
    parser.add_argument("--questions", type=int, default=4, help="questions a document (default: 4)")
    parser.add_argument("--alone", metavar="N,...", help="also sample in one layer at a time: in these, or all")
    args = parser.parse_args()
    report = header("blame")
    model = Model(args.model, args.weights)
    layers = range(DENSE_LAYERS, model.net.config.num_hidden_layers)
    alone = layers if args.alone == "all" else [int(layer) for layer in (args.alone or "").split(",") if layer]
    if not set(alone) <= set(layers):
        raise SystemExit(f"--alone {args.alone}: HATA serves layers {layers[0]} to {layers[-1]} of this model.")
    choices: dict[Any, tuple[str, Container[int], Budget]] = {}
    for part in map(int, args.budgets.split(",")):
        budget = Budget(share_ppm=1_000_000 // part, floor=SINK + RECENT)
        choices |= {(part, kind, "all"): (kind, layers, budget) for kind in KINDS}
        choices |= {(part, "sampled", layer): ("sampled", (layer,), budget) for layer in alone}
    plan = Plan(args.documents, args.questions, 0, prose(), True, 1, None)
    path = RESULTS / f"blame-{Path(args.model).resolve().name.lower()}.json"
    print("task                budget  choice     layer  divergence  other tokens  same answers")
    for task in args.tasks.split(","):
        tallies = {name: Tally() for name in choices}
        for number, document in enumerate(drawn(plan, task, args.context, model.prompts)):
            with torch.inference_mode():
                read(model, task, document, choices, tallies)
            print(f"{task}: document {number + 1} of {args.documents}", file=sys.stderr, flush=True)
        rows = []
        for (part, kind, layer), tally in tallies.items():
            row, about = tally.row(), {"task": task, "context": args.context, "budget": f"1/{part}"}
            rows.append(about | {"choice": kind, "layer": layer} | row)
            figures = f"{row['divergence']:10.4f}  {row['changed']:12.1%}  {row['same']:12.1%}"
            print(f"{task:18}  {about['budget']:>6}  {kind:9}  {layer!s:>5}  {figures}")
        write_rows(
            path, report | {"model": Path(args.model).resolve().name, "weights": args.weights.name, "rows": rows}, key
        )
    print(path)


if __name__ == "__main__":
    main()
