"""HTML to text: the words and headings of a page, without its navigation, scripts and styles."""

from __future__ import annotations

import re
from typing import Any

from selectolax.lexbor import LexborHTMLParser

DROPPED = ["head", "script", "style", "nav", "noscript", "template", "svg", "iframe", "button", "select"]
HEADINGS = {f"h{level}": level for level in range(1, 7)}
LINES = {"br", "tr", "dt", "li", "option"}
BLOCKS = re.compile(
    "address|article|aside|blockquote|body|center|dd|details|div|dl|fieldset|figcaption|figure|footer|form|"
    "h[1-6]|header|hr|main|ol|p|pre|section|summary|table|ul"
)
# Markers that Sphinx and others put behind a heading, as a link to it.
PERMALINKS = "¶#§"


def html_to_text(html: str) -> tuple[str, list[tuple[int, int, int, str]]]:
    """The text of a page, and its headings as (start, end, level, title)."""
    tree = LexborHTMLParser(html)
    tree.strip_tags(DROPPED)
    writer = _Writer()
    if tree.body is not None:
        # A stack of our own: pages nest deeper than Python's.
        stack: list[tuple[Any, bool]] = [(tree.body, True)]  # (node, whether it opens)
        while stack:
            node, opening = stack.pop()
            if node.tag == "-text":
                writer.write(node.text_content or "")
            elif opening:
                writer.open(node.tag)
                stack.append((node, False))
                stack.extend((child, True) for child in reversed(list(node.iter(include_text=True))))
            else:
                writer.close(node.tag)
    return "".join(writer.parts), writer.headings


class _Writer:
    """Collects text; white space collapses as a browser would show it, except in ``pre``."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.length = 0
        self.headings: list[tuple[int, int, int, str]] = []
        self._preformatted = 0
        self._gap = ""  # white space owed before the next word: nothing, a space, a line or a blank line
        self._heading: int | None = None

    def open(self, tag: str) -> None:
        if BLOCKS.fullmatch(tag):
            self._separate("\n\n")
        elif tag in LINES:
            self._separate("\n")
        if tag in HEADINGS:
            self._heading = len(self.parts)
        self._preformatted += tag == "pre"

    def close(self, tag: str) -> None:
        self._preformatted -= tag == "pre"
        if tag in HEADINGS and self._heading is not None:
            words = self.parts[self._heading :]
            if title := "".join(words).strip().rstrip(PERMALINKS).rstrip():
                start = self.length - len("".join(words).lstrip())
                self.headings.append((start, self.length, HEADINGS[tag], title))
            self._heading = None
        if BLOCKS.fullmatch(tag):
            self._separate("\n\n")
        elif tag in ("td", "th"):
            self._separate(" ")

    def write(self, text: str) -> None:
        if self._preformatted:
            self._append(text)
            return
        words = re.split(r"\s+", text)
        for position, word in enumerate(words):
            if position:
                self._separate(" ")
            if word:
                self._append(word)

    def _separate(self, gap: str) -> None:
        self._gap = max(self._gap, gap, key=len)

    def _append(self, text: str) -> None:
        if text:
            piece = (self._gap if self.parts else "") + text
            self.parts.append(piece)
            self.length += len(piece)
            self._gap = ""
