"""Reading files: text with its headings and pages, whatever the format.

A document's ``text`` is what is stored, chunked, shown to the model and cited, so every offset that hata-rag
prints is an offset into that text. For text, Markdown and source code it is the file's own, character by
character; HTML and PDF are reduced to text first.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from hata_rag.html import html_to_text

HTML = {".html", ".htm", ".xhtml"}
MARKUP = {".md", ".markdown", ".mdx", ".rst", ".txt", ".text", ""}
# Folders that hold copies or machinery, never a person's documents; hidden ones are skipped as well.
SKIPPED_FOLDERS = {"__pycache__", "node_modules"}

UNDERLINES = "=*-~^\"'+#"
HEADING = re.compile(
    rf"^(?P<hashes>\#{{1,6}})[ \t]+(?P<title>\S.*?)[ \t#]*$"
    rf"|^(?P<over>\S.*)\n(?P<line>(?P<mark>[{re.escape(UNDERLINES)}])(?P=mark){{2,}})[ \t]*$",
    re.MULTILINE,
)
FENCE = re.compile(r"^[ \t]*(```|~~~).*?(^[ \t]*\1|\Z)", re.MULTILINE | re.DOTALL)
EMPHASIS = re.compile(r"(?<![\w*])(\*\*?)(?=\S)([^*\n]+?)(?<=\S)\1(?![\w*])")
PAGE_BREAK = "\f"
# Characters that SQLite or UTF-8 cannot hold; broken files contain them.
UNSTORABLE = re.compile("[\0\ud800-\udfff]")


class UnreadableError(Exception):
    """A file that holds no text for us; the message says why, in a few words."""


@dataclass(frozen=True)
class Heading:
    """A title, at ``[start, end)`` of the text with its marks; level 1 is the outermost."""

    start: int
    end: int
    level: int
    title: str


@dataclass(frozen=True)
class Document:
    """A text and its structure: headings, and where each page begins (empty when there are no pages)."""

    text: str
    headings: tuple[Heading, ...] = ()
    pages: tuple[int, ...] = ()


def find_files(root: Path) -> Iterator[Path]:
    """The files under ``root`` in a fixed order; ``root`` itself when it is a file, even a hidden one."""
    if not root.is_dir():
        yield root
        return
    for entry in sorted(root.iterdir()):
        if entry.name.startswith(".") or entry.name in SKIPPED_FOLDERS:
            continue
        if entry.is_file():
            yield entry
        elif entry.is_dir() and not entry.is_symlink():  # a linked folder could lead back here
            yield from find_files(entry)


def read_document(name: str, data: bytes) -> Document:
    """The document that a file named ``name`` with these bytes holds; raises UnreadableError."""
    suffix = Path(name).suffix.lower()
    if suffix == ".pdf":
        document = _read_pdf(data)
    elif suffix in HTML:
        text, headings = html_to_text(_decode(data))
        document = Document(text, tuple(Heading(*heading) for heading in headings))
    else:
        text = _decode(data)
        document = Document(text, find_headings(text) if suffix in MARKUP else ())
    document = replace(document, text=UNSTORABLE.sub("\N{REPLACEMENT CHARACTER}", document.text))
    if not document.text.strip():
        raise UnreadableError("it holds no text")
    return document


def find_headings(text: str) -> tuple[Heading, ...]:
    """Headings of Markdown and reStructuredText: ``# Title``, or a title underlined with three marks."""
    fenced = [match.span() for match in FENCE.finditer(text)]
    marks: list[str] = []
    headings = []
    for match in HEADING.finditer(text):
        if any(start <= match.start() < end for start, end in fenced):
            continue
        if match["hashes"]:
            headings.append(Heading(*match.span(), len(match["hashes"]), match["title"]))
        elif set(match["over"]) != set(match["mark"]):  # two rules, one under the other, are not a heading
            # The order in which a text first uses its marks is their order of depth.
            if match["mark"] not in marks:
                marks.append(match["mark"])
            headings.append(Heading(*match.span(), marks.index(match["mark"]) + 1, match["over"].strip()))
    return tuple(headings)


def python_reference() -> dict[str, Document]:
    """The Python language reference that every CPython carries for ``help()``: topic -> document."""
    from pydoc_data.topics import topics

    documents = {}
    for topic, text in topics.items():
        plain = EMPHASIS.sub(r"\2", text)
        documents[topic] = Document(plain, find_headings(plain))
    return documents


def _decode(data: bytes) -> str:
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    elif b"\0" in data:
        raise UnreadableError("it is binary")
    else:
        encoding = "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise UnreadableError(f"it is not {encoding.removesuffix('-sig').upper()} text") from error


def _read_pdf(data: bytes) -> Document:
    import pypdfium2

    texts, starts, length = [], [], 0
    try:
        with pypdfium2.PdfDocument(data) as pdf:
            for page in pdf:
                content = page.get_textpage()
                text = content.get_text_bounded().replace("\r\n", "\n") + PAGE_BREAK
                content.close()
                page.close()
                starts.append(length)
                texts.append(text)
                length += len(text)
    except pypdfium2.PdfiumError as error:
        raise UnreadableError(f"the PDF cannot be read: {error}") from error
    return Document("".join(texts), pages=tuple(starts))
