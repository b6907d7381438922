from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hata_rag.chunks import MAX_CHARACTERS, MAX_WORDPIECES, cut
from hata_rag.documents import Document, python_reference, read_document
from hata_rag.embed import Embedder

WORDPIECES = Embedder().wordpieces
WORDS = st.sampled_from(["lambda", "a", "unbelievably", "x" * 130, "é", "日本語", "!!", "[1]", "0123456789"])
GAPS = st.sampled_from(["", "\n", "\n\n", "\n \n", "\n\n# Title\n\n", "\n\nTitle\n=====\n", "\n\n## Sub\n"])
# Words repeated with and without spaces between them, and then a gap.
RUNS = st.builds(
    lambda word, space, count, gap: (word + space) * count + gap,
    WORDS,
    st.sampled_from(["", " ", "  "]),
    st.integers(1, 300),
    GAPS,
)
TEXTS = st.lists(RUNS, max_size=8).map("".join) | st.text(st.characters(codec="latin-1"))


def read(text: str) -> Document:
    return read_document("a.md", text.encode())


@settings(max_examples=200, deadline=None)
@given(TEXTS.filter(lambda text: text.strip() and "\0" not in text))
def test_chunks_cover_the_document_and_fit(text: str) -> None:
    document = read(text)
    chunks = cut(document, WORDPIECES)
    assert "".join(document.text[chunk.start : chunk.end] for chunk in chunks) == text
    assert [chunk.end for chunk in chunks[:-1]] == [chunk.start for chunk in chunks[1:]]
    for chunk in chunks:
        assert chunk.start < chunk.end <= chunk.start + MAX_CHARACTERS
        assert len(WORDPIECES([document.text[chunk.start : chunk.end]])[0]) <= MAX_WORDPIECES


def test_chunks_of_the_python_reference_are_full_and_fit() -> None:
    document = python_reference()["specialnames"]
    sizes = [len(WORDPIECES([document.text[chunk.start : chunk.end]])[0]) for chunk in cut(document, WORDPIECES)]
    assert max(sizes) <= MAX_WORDPIECES
    assert sum(sizes) / len(sizes) > MAX_WORDPIECES / 2


def test_a_chunk_knows_the_headings_it_stands_under() -> None:
    document = read("intro\n\n# A\n\n## B\n\ntext\n\n## C\n\nmore\n\n# D\nlast\n")
    found = [(document.text[c.start : c.end].split()[-1], c.headings) for c in cut(document, WORDPIECES)]
    assert found == [("intro", ()), ("text", ("A", "B")), ("more", ("A", "C")), ("last", ("D",))]


def test_a_heading_with_text_right_below_it_is_not_joined_to_the_next() -> None:
    document = read("# A\ntext\n# B\nmore\n")
    assert [chunk.headings for chunk in cut(document, WORDPIECES)] == [("A",), ("B",)]


@pytest.mark.parametrize("empty_page_first", [False, True])
def test_a_chunk_knows_the_page_of_its_first_word(empty_page_first: bool) -> None:
    pages = ["\f"] * empty_page_first + ["one\f", "two\f"]
    starts = tuple(sum(map(len, pages[:number])) for number in range(len(pages)))
    found = [chunk.page for chunk in cut(Document("".join(pages), pages=starts), WORDPIECES)]
    assert found == ([2, 3] if empty_page_first else [1, 2])
