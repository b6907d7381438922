"""What hata-rag tells people and scripts about an answer, an index and a server."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from hata_rag.answer import Answer, Prompt
from hata_rag.client import ServerInfo
from hata_rag.indexing import Summary
from hata_rag.server import Record
from hata_rag.store import Passage

LISTED = 10  # retrieved documents shown when an answer cites none


def source(number: int, passage: Passage) -> dict[str, Any]:
    """A numbered document for scripts; ``start`` and ``end`` are characters of the stored text."""
    fields = asdict(passage)
    del fields["text"], fields["digest"]
    return {"number": number} | fields


def answer_object(question: str, prompt: Prompt, answer: Answer, info: ServerInfo, url: str) -> dict[str, Any]:
    """The one JSON object of ``ask --json``."""
    retrieved = [source(number, passage) for number, passage in enumerate(prompt.passages, start=1)]
    return {
        "question": question,
        "answer": answer.text,
        "cited": [retrieved[number - 1] for number in answer.cited],
        "unknown_citations": answer.unknown,
        "retrieved": retrieved,
        "reused_documents": prompt.reused,
        "figures": asdict(answer.figures) | {"hata": answer.hata},
        "server": {"url": url, "model": info.model, "sglang": info.version},
    }


def source_lines(prompt: Prompt, answer: Answer) -> list[str]:
    """The documents an answer cites; if it cites none, those it was given."""
    numbers = answer.cited or range(1, len(prompt.passages) + 1)
    lines = ["Sources:" if answer.cited else "The answer cites no document; it was given:"]
    for number in list(numbers)[: len(numbers) if answer.cited else LISTED]:
        passage = prompt.passages[number - 1]
        lines.append(f"  [{number}] {passage.place}, characters {passage.start:,}-{passage.end:,}")
    if len(numbers) > LISTED and not answer.cited:
        lines.append(f"  and {len(numbers) - LISTED} more (all with --json)")
    if answer.unknown:
        unknown = ", ".join(f"[{number}]" for number in answer.unknown)
        lines.append(f"It also cites {unknown}, which it was not given: distrust that.")
    return lines


def figure_line(answer: Answer) -> str:
    """What an answer cost, in one line."""
    figures = answer.figures
    parts = [
        f"{figures.prompt_tokens:,} prompt tokens",
        f"{figures.cached_tokens:,} of them cached",
        f"first token after {figures.seconds_to_first_token:.2f} s",
    ]
    if figures.tokens_per_second is not None:
        parts.append(f"{figures.tokens_per_second:.1f} tokens/s")
    if answer.hata is None:
        parts.append("dense server")
    else:
        if seen := answer.hata["tokens_seen"]:
            share = 100 * answer.hata["tokens_attended"] / seen
            parts.append(f"attended {share:.1f}% of the tokens seen")
        parts.append(f"{answer.hata['keys_hashed']:,} keys hashed")
    return ", ".join(parts)


def summary_line(summary: Summary, seconds: float) -> str:
    """What a run of indexing did."""
    return (
        f"Documents: {summary.added:,} added, {summary.changed:,} changed, {summary.unchanged:,} unchanged, "
        f"{summary.deleted:,} deleted, {len(summary.skipped):,} skipped; "
        f"chunks embedded: {summary.embedded:,}; {seconds:.1f} s"
    )


def status_object(
    record: Record | None, url: str | None, info: ServerInfo | None, index: dict[str, Any]
) -> dict[str, Any]:
    """The one JSON object of ``status --json``; ``server`` is null when none runs."""
    server: dict[str, Any] | None = None
    if url is not None:
        server = {
            "url": url,
            "state": "ready" if info else "starting",
            "model": info.model if info else record.model if record else None,
            "sglang": info.version if info else None,
            "room": info.room if info else None,
            "hata": info.hata if info else None,
            "pid": record.pid if record else None,
            "uptime_seconds": time.time() - record.started if record else None,
            "log": record.log if record else None,
        }
    return {"server": server, "index": index}


def status_lines(status: dict[str, Any]) -> list[str]:
    """``status`` for people."""
    server, index = status["server"], status["index"]
    lines = []
    if server is None:
        lines.append("Server: none runs; `hata-rag ask` starts one")
    else:
        lines.append(f"Server: {server['url']}, {server['state']}")
        lines.append(f"  model: {server['model']}" + (f", SGLang {server['sglang']}" if server["sglang"] else ""))
        if server["pid"]:
            minutes = server["uptime_seconds"] / 60
            lines.append(f"  process: {server['pid']}, up {minutes:,.1f} min, log {server['log']}")
        if server["room"]:
            lines.append(f"  room: {server['room']:,} tokens for a prompt and its answer")
            hata = server["hata"]
            lines.append("  HATA: " + (_hata(hata) if hata else "off, a dense server"))
    lines.append(f"Index: {index['documents']:,} documents, {index['characters']:,} characters")
    if index["chunks"]:
        embedded = f"{index['embedded']:,} of {index['chunks']:,} chunks embedded"
        lines.append(f"  {embedded} with {index['embedder']}")
    lines.append(f"  on disk: {index['bytes'] / 1e6:.1f} MB in {index['folder']}")
    return lines


def _hata(hata: dict[str, Any]) -> str:
    settings = (
        "budget",
        "min_budget",
        "bits",
        "dense_layers",
        "min_context",
        "sink",
        "recent",
        "weights",
        "bytes_per_token",
    )
    shown = [f"{name.replace('_', ' ')} {hata[name]}" for name in settings if name in hata]
    if seen := hata.get("tokens_seen"):
        shown.append(f"attended {100 * hata['tokens_attended'] / seen:.1f}% of {seen:,} tokens seen")
    shown.append(f"{hata.get('keys_hashed', 0):,} keys hashed")
    return ", ".join(shown)
