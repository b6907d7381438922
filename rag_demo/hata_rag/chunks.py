"""Cutting a document into chunks that the embedder reads whole.

A chunk is a span of the document's text. The spans follow each other without a gap, so together they are the
document, and ``text[chunk.start:chunk.end]`` is what is embedded, shown to the model and cited.
"""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass

from hata_rag.documents import Document

# MiniLM reads 256 wordpieces and was trained on 128; 200 leaves room for the heading put before them.
MAX_WORDPIECES = 200
# A word of over 100 letters is one wordpiece to BERT, and spaces are none, so letters are bounded as well.
MAX_CHARACTERS = 2_000

BLANK_LINES = re.compile(r"\n[ \t]*\n\s*")
WORD = re.compile(r"\S+")

# The offsets at which the wordpieces of each text begin.
Wordpieces = Callable[[list[str]], list[list[int]]]


@dataclass(frozen=True)
class Chunk:
    """``text[start:end]`` of a document, the headings it stands under and its page, counted from 1."""

    start: int
    end: int
    headings: tuple[str, ...] = ()
    page: int | None = None


def cut(document: Document, wordpieces: Wordpieces) -> list[Chunk]:
    """Cut at headings, pages and blank lines, and pack the paragraphs between them up to a chunk's size."""
    text = document.text
    firm = {heading.start for heading in document.headings} | set(document.pages)
    soft = {match.end() for match in BLANK_LINES.finditer(text)}
    edges = sorted(firm | soft | {0, len(text)})
    paragraphs = list(itertools.pairwise(edges))
    starts = wordpieces([text[start:end] for start, end in paragraphs])

    spans: list[tuple[int, int]] = []
    room_words = room_characters = -1
    for (start, end), offsets in zip(paragraphs, starts, strict=True):
        # A heading or page opens a chunk, unless the chunk before it holds no more than the heading above it.
        opens = start in firm and not (spans and _is_bare(document, *spans[-1]))
        if opens or len(offsets) > room_words or end - start > room_characters:
            spans.extend(_split(text, start, end, offsets))
            room_words = MAX_WORDPIECES - sum(start + offset >= spans[-1][0] for offset in offsets)
            room_characters = MAX_CHARACTERS - (end - spans[-1][0])
        else:
            spans[-1] = (spans[-1][0], end)
            room_words -= len(offsets)
            room_characters -= end - start
    paths = _heading_paths(document)
    return [_describe(document, paths, start, end) for start, end in spans]


def _split(text: str, start: int, end: int, offsets: list[int]) -> list[tuple[int, int]]:
    """``[start, end)`` in spans that fit; each ends after a line, or else after a word."""
    spans: list[tuple[int, int]] = []
    begin = start
    while True:
        beyond = bisect.bisect_left(offsets, begin - start) + MAX_WORDPIECES
        limit = min(end, begin + MAX_CHARACTERS, start + offsets[beyond] if beyond < len(offsets) else end)
        if limit == end:
            return [*spans, (begin, end)]
        after = text.rfind("\n", begin, limit) + 1 or text.rfind(" ", begin, limit) + 1
        if not after:
            # No line or word ends here. A word's part has other wordpieces than the word: count letters.
            word = WORD.match(text, begin, end)
            after = min(begin + MAX_WORDPIECES, word.end() if word else begin + 1)
        spans.append((begin, after))
        begin = after


def _is_bare(document: Document, start: int, end: int) -> bool:
    """Whether a span holds nothing but white space below its last heading."""
    below = bisect.bisect_left(document.headings, end, key=lambda heading: heading.start)
    if below and document.headings[below - 1].start >= start:
        start = document.headings[below - 1].end
    return not document.text[start:end].strip()


def _heading_paths(document: Document) -> list[tuple[str, ...]]:
    """For each heading, the titles from the outermost to itself."""
    paths = []
    open_titles: dict[int, str] = {}
    for heading in document.headings:
        open_titles = {level: title for level, title in open_titles.items() if level < heading.level}
        open_titles[heading.level] = heading.title
        paths.append(tuple(open_titles.values()))
    return paths


def _describe(document: Document, paths: list[tuple[str, ...]], start: int, end: int) -> Chunk:
    above = bisect.bisect_left(document.headings, end, key=lambda heading: heading.start)
    words = WORD.search(document.text, start, end)
    page = bisect.bisect_right(document.pages, words.start() if words else start) or None
    return Chunk(start, end, paths[above - 1] if above else (), page)
