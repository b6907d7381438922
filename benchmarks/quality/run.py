"""Servers, prompts and cells: asks every question of a task at a context, cold and from the prefix cache."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from benchmarks.common import flush_cache, hata_state, running
from benchmarks.quality.report import ALL, interval
from benchmarks.quality.tasks import TASKS, Document, Question, Task, Text, sized
from sglang_hata.config import parse_budget
from sglang_hata.cpu import gpu_present

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARK = "<document goes here>"
Exchange = tuple[Question, str]  # a question and the model's answer


@dataclass(frozen=True)
class Method:
    """A row of the grid, such as "trained@1/64": its name, its budget and the flags of its server."""

    name: str
    budget: str
    flags: tuple[str, ...]

    @classmethod
    def parse(cls, text: str, weights: str) -> Method:
        name, _, budget = text.partition("@")
        kinds = {"trained": ["--hata-weights", weights]}
        kinds |= {"top": ["--hata-weights", weights, "--hata-selection", "top"]}
        for bits in (64, 128, 256):
            untrained = ["--hata-bits", str(bits), "--hata-weights", "none"]
            kinds[f"untrained{bits}"] = untrained
            kinds[f"sized{bits}"] = [*untrained, "--hata-key-sizes"]
            kinds[f"hamming{bits}"] = [*untrained, "--hata-scoring", "hamming"]
        if text == "dense":
            return cls(name, ALL, ())
        if text == "whole":
            name, budget = "trained" if weights != "none" else "untrained128", "1/1"
        try:
            whole, _, part = budget.partition("/")
            if part and int(whole) != 1:
                raise ValueError
            size = f"{100 / int(part):.4f}%" if part else str(int(budget))
            parse_budget(size)
            flags = ["--hata", "--hata-min-context", "0", "--hata-budget", size, *kinds[name]]
        except (KeyError, ValueError, ZeroDivisionError):
            raise SystemExit(
                f"{text} is not a method: give dense, whole, or trained, top, or untrained, sized or hamming with "
                "64, 128 or 256 bits, and a budget, such as trained@1/64, trained@2048 or untrained128@1/32."
            ) from None
        return cls("whole" if text == "whole" else name, ALL if text == "whole" else budget, tuple(flags))

    @property
    def label(self) -> str:
        return self.name if self.budget == ALL else f"{self.name}@{self.budget}"


@contextmanager
def serving(model: str, flags: Sequence[str]) -> Iterator[httpx.Client]:
    """A server of a model for the length of a with block; on a machine without a GPU, one of `hata-cpu`."""
    launcher = ["sglang.launch_server"] if gpu_present() else ["sglang_hata.cpu", "serve"]
    with running([*launcher, "--model-path", model, "--random-seed", "1", *flags]) as server:
        yield server


def budget_of(state: dict[str, Any]) -> str:
    """The budget of a running server as a fraction where it is one: "1/64", "2048", "all"."""
    if not state:
        return ALL
    tokens, ppm = parse_budget(state["budget"])
    if tokens:
        return str(tokens)
    part = round(1e6 / ppm)
    return ALL if ppm == 10**6 else f"1/{part}" if abs(1e6 / ppm / part - 1) < 1e-3 else state["budget"]


@dataclass(frozen=True)
class Prompts:
    """Prompts of a model in tokens: the document first, the question last, and the answer begun.

    Tokens, not text, as a server would turn a long document into tokens again with every question.
    """

    tokenizer: PreTrainedTokenizerBase

    def halves(self, exchanges: Sequence[Exchange], question: Question) -> tuple[str, str]:
        """What stands before the document, and what after it."""
        asked = [*exchanges, (question, None)]
        if self.tokenizer.chat_template is None:
            after = "\n\n".join(f"{q.text}\n{q.prefix}{answer or ''}" for q, answer in asked)
            return "", f"\n\n{after}"
        messages = []
        for i, (each, answer) in enumerate(asked):
            messages.append({"role": "user", "content": each.text if i else f"{MARK}\n\n{each.text}"})
            if answer is not None:
                messages.append({"role": "assistant", "content": each.prefix + answer})
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        before, after = (text + question.prefix).split(MARK)
        return before, after

    def encode(self, text: str, first: bool = False) -> list[int]:
        # A chat template has the special tokens already.
        return self.tokenizer.encode(text, add_special_tokens=first and self.tokenizer.chat_template is None)

    def document(self, document: Document) -> list[int]:
        """The part that all prompts begin with."""
        return self.encode(self.halves([], document.questions[0])[0] + document.text, first=True)

    def question(self, question: Question, exchanges: Sequence[Exchange] = ()) -> list[int]:
        return self.encode(self.halves(exchanges, question)[1])

    def tokens(self, task: Task, document: Document) -> int:
        """Tokens of the longest prompt and its answer."""
        questions = document.questions
        if task.turns:
            longest = len(self.question(questions[-1], [(question, "") for question in questions[:-1]]))
            longest += task.answer_tokens * (len(questions) - 1)
        else:
            longest = max(len(self.question(question, shown(document))) for question in questions)
        return len(self.document(document)) + longest + task.answer_tokens


@dataclass(frozen=True)
class Asker:
    """Puts documents and questions to one server."""

    server: httpx.Client
    prompts: Prompts
    model: str

    def complete(self, prompts: list[list[int]], task: Task) -> list[str]:
        """Greedy answers to prompts that are sent at once."""
        request = {"model": self.model, "prompt": prompts, "max_tokens": task.answer_tokens, "temperature": 0}
        response = self.server.post("/v1/completions", json=request | {"stop": list(task.stop)})
        if response.is_error:
            raise SystemExit(f"The server answered {response.status_code}: {response.text[:300]}")
        choices = sorted(response.json()["choices"], key=lambda choice: choice["index"])
        return [choice["text"] for choice in choices]

    def answers(self, task: Task, document: Document) -> list[str]:
        """The answers to a document's questions: the first alone, as it brings the document into the prefix cache."""
        head = self.prompts.document(document)
        if task.turns:
            exchanges: list[Exchange] = []
            for question in document.questions:
                prompt = head + self.prompts.question(question, exchanges)
                exchanges.append((question, self.complete([prompt], task)[0]))
            return [answer for _, answer in exchanges]
        first, *others = [head + self.prompts.question(each, shown(document)) for each in document.questions]
        return self.complete([first], task) + (self.complete(others, task) if others else [])


@dataclass(frozen=True)
class Plan:
    """What to ask: the same for every method."""

    documents: int
    questions: int
    seed: int
    text: Text
    cold_only: bool
    concurrency: int
    answers: Path | None

    def cell(self, asker: Asker, name: str, context: int, method: str, budget: str) -> list[dict[str, Any]]:
        """The rows of a task at a context: cold, then with every document from the prefix cache.

        A document's second pass follows its first, so it is still in a cache that has no room for all documents.
        """
        task, start = TASKS[name], time.perf_counter()
        documents = drawn(self, name, context, asker.prompts)
        if not documents:
            print(f"{name} at {context}: left out, as it does not fit.", file=sys.stderr)
            return []
        passes = (False,) if self.cold_only else (False, True)
        with suppress(httpx.HTTPStatusError):  # another server than SGLang
            flush_cache(asker.server)
        before = hata_state(asker.server)
        with ThreadPoolExecutor(self.concurrency) as pool:
            answers = list(pool.map(lambda document: [asker.answers(task, document) for _ in passes], documents))
        after = hata_state(asker.server)
        attended = 1.0
        if before and after and after["tokens_seen"] > before["tokens_seen"]:
            seen = after["tokens_seen"] - before["tokens_seen"]
            attended = (after["tokens_attended"] - before["tokens_attended"]) / seen
        rows = []
        for i, cached in enumerate(passes):
            texts = [per_pass[i] for per_pass in answers]
            scores = [scored(task, document, given) for document, given in zip(documents, texts, strict=True)]
            means = [round(100 * sum(each) / len(each), 4) for each in scores]
            low, high = interval([means])
            row = {"task": name, "context": context, "method": method, "budget": budget}
            row |= {"score": sum(means) / len(means), "low": low, "high": high, "n": sum(map(len, texts))}
            row |= {"cached": cached, "attended": attended, "documents": means}
            rows.append(row | {"answers": "".join(digest(text) for given in texts for text in given)})
            self.keep(row, documents, texts, scores)
        line = "{task} {context} {method}@{budget}: {score:.1f} ({low:.0f} to {high:.0f})".format_map(rows[0])
        if not self.cold_only:
            pairs = [(a, b) for cold, warm in answers for a, b in zip(cold, warm, strict=True)]
            line += f", {sum(a != b for a, b in pairs)} of {len(pairs)} answers differ when cached"
        print(f"{line}, reads {attended:.1%}, {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        return rows

    def keep(
        self, row: dict[str, Any], documents: list[Document], texts: list[list[str]], scores: list[list[float]]
    ) -> None:
        """Appends the answers themselves to a file, for whoever wants to read them."""
        if self.answers is None:
            return
        cell = {key: row[key] for key in ("task", "context", "method", "budget", "cached")}
        with self.answers.open("a") as file:
            for i, document in enumerate(documents):
                for question, text, score in zip(document.questions, texts[i], scores[i], strict=True):
                    line = {"document": i, "question": question.text, "expected": question.expected}
                    print(json.dumps(cell | line | {"answer": question.prefix + text, "score": score}), file=file)


@cache
def drawn(plan: Plan, name: str, context: int, prompts: Prompts) -> list[Document]:
    """The documents of a cell, the same for every method; none where the task does not fit."""

    def tokens(document: Document) -> int:
        return prompts.tokens(TASKS[name], document)

    def document(seed: int) -> Document | None:
        return sized(name, context, seed, plan.questions, plan.text, tokens)

    with ThreadPoolExecutor() as pool:  # tokenizers work beside each other
        made = list(pool.map(document, range(plan.seed, plan.seed + plan.documents)))
    return [each for each in made if each]


def shown(document: Document) -> list[Exchange]:
    """What comes before every question: the example, with its answer."""
    return [(document.example, document.example.rest)] if document.example else []


def scored(task: Task, document: Document, answers: list[str]) -> list[float]:
    pairs = zip(document.questions, answers, strict=True)
    return [task.score(question.prefix + answer, question.expected) for question, answer in pairs]


def digest(text: str) -> str:
    """Four characters that tell whether two methods gave the same answer."""
    return sha256(text.encode()).hexdigest()[:4]
