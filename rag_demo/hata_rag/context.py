"""The prompt: documents first, in an order that does not depend on the question, the question last.

SGLang keeps the keys and values of a prompt's prefix, and HATA its hash codes. The next question finds them
again only if its prompt begins with the same bytes, so everything before the question is a function of the
*set* of documents alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hata_rag.store import Passage

INSTRUCTIONS = (
    "Answer the question from the numbered documents below, in a few sentences. After each statement name "
    "the document it comes from by its number, like [1] or [2]. If the documents do not answer the question, "
    "say so."
)
CITATION = re.compile(r"\[(\d+(?:\s*,\s*\d+)*)\]")
# In an answer about code, names[1] between backticks is no citation.
CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`", re.DOTALL)

Message = dict[str, str]


@dataclass(frozen=True)
class Turn:
    """A question and its answer, earlier in the conversation."""

    question: str
    answer: str


def canonical(passages: Iterable[Passage]) -> tuple[Passage, ...]:
    """The passages without repetition, by path and place: the order in which they are numbered from 1."""
    return tuple(sorted(set(passages)))


def numbered(number: int, passage: Passage) -> str:
    """A passage as the prompt shows it."""
    return f"[{number}] {passage.title}\n{passage.text.strip()}\n\n"


def messages(passages: Sequence[Passage], turns: Sequence[Turn], question: str) -> list[Message]:
    """The chat that asks ``question``: documents and first question, then the turns that followed it."""
    documents = "".join(numbered(number, passage) for number, passage in enumerate(passages, start=1))
    opening = f"{INSTRUCTIONS}\n\nDocuments:\n\n{documents}"
    chat = []
    for turn in turns:
        chat.append({"role": "user", "content": f"{opening}Question: {turn.question}"})
        chat.append({"role": "assistant", "content": turn.answer})
        opening = ""
    return [*chat, {"role": "user", "content": f"{opening}Question: {question}"}]


def citations(answer: str, documents: int) -> tuple[list[int], list[int]]:
    """The numbers that ``answer`` cites, by first appearance: those among ``documents``, and the others."""
    found = [int(number) for group in CITATION.findall(CODE.sub("", answer)) for number in group.split(",")]
    unique = list(dict.fromkeys(found))
    return (
        [number for number in unique if 1 <= number <= documents],
        [number for number in unique if not 1 <= number <= documents],
    )
