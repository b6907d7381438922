from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hata_rag.context import Turn, canonical, citations, messages
from hata_rag.store import Passage

PASSAGES = [Passage(f"{name}.md", start, start + 9, "digest", f"text {start}") for name in "ab" for start in (0, 9)]


def shared(left: str, right: str) -> str:
    return left[: next((i for i, (x, y) in enumerate(zip(left, right, strict=False)) if x != y), None)]


@given(st.permutations(PASSAGES))
def test_order_and_repetition_of_hits_do_not_matter(order: list[Passage]) -> None:
    assert canonical(order) == canonical([*order, random.choice(order)]) == tuple(sorted(PASSAGES))


@given(st.text(), st.text())
def test_prompts_over_the_same_documents_begin_alike(first: str, second: str) -> None:
    prompts = [messages(PASSAGES, (), question)[0]["content"] for question in (first, second)]
    prefix = shared(*prompts)
    assert all(passage.text in prefix for passage in PASSAGES)
    for prompt, question in zip(prompts, (first, second), strict=True):
        assert prompt.endswith(f"Question: {question}")


def test_a_conversation_extends_its_own_prompt() -> None:
    turns = (Turn("q1", "a1"), Turn("q2", "a2"))
    chats = [messages(PASSAGES, turns[:count], question) for count, question in enumerate(["q1", "q2", "q3"])]
    for earlier, later in pairwise(chats):
        assert later[: len(earlier)] == earlier
    assert [message["role"] for message in chats[-1]] == ["user", "assistant"] * 2 + ["user"]
    assert chats[-1][-1]["content"] == "Question: q3"


@given(st.lists(st.integers(0, 30)), st.integers(0, 20))
def test_citations_are_those_among_the_documents(numbers: list[int], documents: int) -> None:
    cited, unknown = citations(" so ".join(f"[{number}]" for number in numbers), documents)
    assert set(cited) | set(unknown) == set(numbers)
    assert all(1 <= number <= documents for number in cited)
    assert not any(1 <= number <= documents for number in unknown)
    assert len(cited + unknown) == len(set(numbers))


@pytest.mark.parametrize(
    ("answer", "cited"),
    [
        ("So [2], then [1][3] and [2].", [2, 1, 3]),
        ("Both [1, 3].", [1, 3]),
        ("As the loop ends[3], or never[1].", [3, 1]),
        ("Take `names[1]` or:\n```\nnames[2]\n```", []),
        ("A list [a], [] and [1", []),
    ],
)
def test_what_counts_as_a_citation(answer: str, cited: list[int]) -> None:
    assert citations(answer, 3) == (cited, [])
