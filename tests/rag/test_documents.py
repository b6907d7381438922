from __future__ import annotations

from pathlib import Path

import pytest

from hata_rag.documents import UnreadableError, find_files, find_headings, python_reference, read_document

HTML = b"""<!doctype html><html><head><title>T</title><style>p{}</style></head><body>
<nav>Home | About</nav><script>alert("no")</script>
<h1>Coffee <a href="#c">\xc2\xb6</a></h1><p>Grind   it
fine.</p><h2>Water</h2><ul><li>soft</li><li>hot</li></ul>
<pre>a  b
  c</pre><table><tr><td>x</td><td>y</td></tr></table></body></html>"""


def pdf(*pages: str) -> bytes:
    """A PDF with one line of text on each page, written by hand so that no writer is needed."""
    count = len(pages)
    kids = " ".join(f"{4 + 2 * number} 0 R" for number in range(count))
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {count} >>",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for number, text in enumerate(pages):
        stream = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET"
        objects.append(
            "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Resources << /Font << /F1 3 0 R >> >> "
            f"/Contents {5 + 2 * number} 0 R >>"
        )
        objects.append(f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream")
    body = "%PDF-1.4\n"
    places = []
    for number, content in enumerate(objects, start=1):
        places.append(len(body))
        body += f"{number} 0 obj\n{content}\nendobj\n"
    table = "".join(f"{place:010d} 00000 n \n" for place in places)
    start = len(body)
    body += f"xref\n0 {len(places) + 1}\n0000000000 65535 f \n{table}"
    body += f"trailer << /Size {len(places) + 1} /Root 1 0 R >>\nstartxref\n{start}\n%%EOF\n"
    return body.encode()


def titles(text: str) -> list[tuple[int, str]]:
    return [(heading.level, heading.title) for heading in find_headings(text)]


def test_html_keeps_words_and_headings_and_drops_the_rest() -> None:
    document = read_document("page.html", HTML)
    assert document.text == "Coffee ¶\n\nGrind it fine.\n\nWater\n\nsoft\nhot\n\na  b\n  c\n\nx y"
    assert [(h.level, h.title) for h in document.headings] == [(1, "Coffee"), (2, "Water")]
    for heading in document.headings:
        assert document.text[heading.start : heading.end].startswith(heading.title)


def test_html_deeper_than_the_stack_of_python() -> None:
    assert read_document("deep.html", b"<div>" * 5_000 + b"bottom").text == "bottom"


def test_pdf_has_pages() -> None:
    document = read_document("paper.PDF", pdf("First page", "Second page"))
    assert [document.text[start:].split()[0] for start in document.pages] == ["First", "Second"]


def test_markdown_headings() -> None:
    text = "# One #\n\ntext\n\n### Three\n\n```\n# a comment\n```\n\nSetext\n---\n\n---\n"
    assert titles(text) == [(1, "One"), (3, "Three"), (1, "Setext")]


def test_restructured_text_headings_take_their_level_from_their_order() -> None:
    assert titles("Top\n***\n\nSub\n===\n\nSubsub\n---\n\nNext\n===\n") == [
        (1, "Top"),
        (2, "Sub"),
        (3, "Subsub"),
        (2, "Next"),
    ]


def test_comments_of_source_code_are_no_headings() -> None:
    assert read_document("tool.py", b"# comment\nx = 1\n").headings == ()


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        pytest.param("photo.txt", b"\x89PNG\0\0", "binary", id="binary"),
        pytest.param("old.txt", "Grüße".encode("latin-1"), "not UTF-8", id="latin-1"),
        pytest.param("empty.md", b" \n", "no text", id="empty"),
        pytest.param("broken.pdf", b"%PDF-1.4 nothing", "PDF cannot be read", id="broken-pdf"),
    ],
)
def test_files_that_hold_no_text_say_why(name: str, data: bytes, reason: str) -> None:
    with pytest.raises(UnreadableError, match=reason):
        read_document(name, data)


def test_utf16_and_byte_order_marks() -> None:
    assert read_document("a.txt", "Grüße".encode("utf-16")).text == "Grüße"
    assert read_document("a.txt", "Grüße".encode("utf-8-sig")).text == "Grüße"


def test_characters_that_cannot_be_stored_are_replaced_one_for_one() -> None:
    assert read_document("a.txt", "a\0b".encode("utf-16")).text == "a\N{REPLACEMENT CHARACTER}b"


def test_folders_are_walked_in_order_without_what_is_hidden(tmp_path: Path) -> None:
    for name in ("b.md", "a/c.md", ".git/config", "node_modules/x.js", ".hidden"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "loop").symlink_to(tmp_path)
    assert [str(file.relative_to(tmp_path)) for file in find_files(tmp_path)] == ["a/c.md", "b.md"]
    assert list(find_files(tmp_path / ".hidden")) == [tmp_path / ".hidden"]


def test_python_reference_is_structured_text() -> None:
    reference = python_reference()
    assert reference["lambda"].headings[0].title == "Lambdas"
    assert "*attributeref*" not in reference["assignment"].text
    assert '"*" target' in reference["assignment"].text  # grammar is no emphasis
