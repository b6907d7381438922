"""Answering a question: choose documents, build the prompt, stream the answer, check its citations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hata_rag import conversation
from hata_rag.client import Client, Figures, ServerInfo
from hata_rag.context import Turn, canonical, citations, messages, numbered
from hata_rag.conversation import Conversation
from hata_rag.embed import Embedder
from hata_rag.errors import BadRequestError, NotGroundedError
from hata_rag.home import Home
from hata_rag.store import Passage, Store

DEFAULT_TOKENS = 32_768  # of documents, unless half the server's context is less
# The best hits must be in the last context for it to be used again: those most likely to hold the answer.
REUSE_HITS = 5
# Over the Python reference, MiniLM gives questions about anything else at most 0.25, and its own over 0.5.
MIN_COSINE = 0.25
COUNTED_AT_ONCE = 64


@dataclass(frozen=True)
class Options:
    """How to answer.

    Args:
        tokens: budget of documents; None for half the server's context, at most DEFAULT_TOKENS.
        follow: continue the last conversation, over the same documents.
        fresh: choose documents anew even if the last ones would do.
    """

    tokens: int | None = None
    max_new_tokens: int = 256
    temperature: float = 0.0
    follow: bool = False
    fresh: bool = False


@dataclass(frozen=True)
class Prompt:
    """What the model is asked, as tokens, and the documents in it, numbered from 1 in this order."""

    tokens: list[int]
    conversation: Conversation
    reused: bool

    @property
    def passages(self) -> tuple[Passage, ...]:
        return self.conversation.passages


@dataclass(frozen=True)
class Answer:
    """An answer, the numbers of the documents it cites, numbers it made up, and what it cost.

    Args:
        hata: HATA's counters over this answer; None on a dense server.
    """

    text: str
    cited: list[int]
    unknown: list[int]
    figures: Figures
    hata: dict[str, int] | None


def prepare(
    question: str,
    options: Options,
    home: Home,
    store: Store,
    embedder: Embedder,
    client: Client,
    info: ServerInfo,
    say: Callable[[str], None],
) -> Prompt:
    """Choose the documents for a question and build its prompt, which leaves room for the answer."""
    room = info.room - options.max_new_tokens
    budget = options.tokens or min(info.room // 2, DEFAULT_TOKENS)
    last = conversation.load(home.conversation, store)
    if last is not None and last.model != info.model:
        last = None
    if options.follow:
        if last is None:
            raise BadRequestError(
                "There is no conversation to continue, or its documents have changed: ask without -c."
            )
        return _follow(question, last, client, room, say)

    hits = _search(question, budget, store, embedder)
    best = [passage for passage, _ in hits[:REUSE_HITS]]
    if last is not None and not options.fresh and last.tokens == budget and last.covers(best):
        tokens = client.tokens(messages(last.passages, (), question))
        if len(tokens) <= room:
            say(f"The last {len(last.passages)} documents hold the {len(best)} best hits: used again")
            return Prompt(tokens, replace(last, turns=()), reused=True)
    chosen, tokens = _fit([passage for passage, _ in hits], question, client, min(budget, room), room)
    return Prompt(tokens, Conversation(info.model, budget, chosen), reused=False)


def answer(
    question: str,
    prompt: Prompt,
    options: Options,
    home: Home,
    client: Client,
    info: ServerInfo,
    write: Callable[[str], None],
) -> Answer:
    """Stream the answer to ``write``, and remember the conversation."""
    # Before the answer: if it is interrupted, the server has read the documents all the same.
    prompt.conversation.save(home.conversation)
    generation = client.generate(prompt.tokens, options.max_new_tokens, options.temperature, info.incremental)
    pieces = []
    for piece in generation:
        pieces.append(piece)
        write(piece)
    text = "".join(pieces).strip()
    turns = (*prompt.conversation.turns, Turn(question, text))
    replace(prompt.conversation, turns=turns).save(home.conversation)
    cited, unknown = citations(text, len(prompt.passages))
    return Answer(text, cited, unknown, generation.figures, _spent(info.hata, client.info().hata))


def _search(question: str, budget: int, store: Store, embedder: Embedder) -> list[tuple[Passage, float]]:
    # A chunk is seldom under 20 tokens with its heading, so this is more than the budget holds.
    hits = store.search(embedder.embed([question])[0], max(REUSE_HITS, budget // 20))
    if not hits or hits[0][1] < MIN_COSINE:
        nearest = f" (the nearest is {hits[0][0].place}, cosine {hits[0][1]:.2f})" if hits else ""
        raise NotGroundedError(f"Nothing in the index is about this question{nearest}: ask otherwise, or index more.")
    # The same text may be indexed twice, as a copy or a quotation: reading it once is enough.
    first: dict[str, tuple[Passage, float]] = {}
    for passage, score in hits:
        first.setdefault(passage.text.strip(), (passage, score))
    return list(first.values())


def _fit(
    ranked: Sequence[Passage], question: str, client: Client, budget: int, room: int
) -> tuple[tuple[Passage, ...], list[int]]:
    """The best passages that fit the budget, in canonical order, and the tokens of their prompt."""
    frame = len(client.tokens(messages((), (), question)))
    left = min(budget, room - frame)
    chosen: list[Passage] = []
    for start in range(0, len(ranked), COUNTED_AT_ONCE):
        some = ranked[start : start + COUNTED_AT_ONCE]
        for passage, size in zip(some, client.count([numbered(len(ranked), p) for p in some]), strict=True):
            left -= size
            if left < 0:
                break
            chosen.append(passage)
        if left < 0:
            break
    while chosen:
        # Texts side by side can have a few tokens more than each alone: the whole prompt decides.
        tokens = client.tokens(messages(canonical(chosen), (), question))
        if len(tokens) <= room:
            return canonical(chosen), tokens
        chosen.pop()
    raise BadRequestError(
        f"No document fits: the question takes {frame:,} tokens, the server has room for {room:,} beside the "
        f"answer, and --tokens allows {budget:,}; raise --tokens or lower --max-new-tokens."
    )


def _follow(question: str, last: Conversation, client: Client, room: int, say: Callable[[str], None]) -> Prompt:
    turns = last.turns
    while True:
        tokens = client.tokens(messages(last.passages, turns, question))
        if len(tokens) <= room:
            return Prompt(tokens, replace(last, turns=turns), reused=True)
        if not turns:
            raise BadRequestError(
                f"The documents and the question take {len(tokens):,} tokens, and the server has room for "
                f"{room:,} beside the answer: ask without -c, or lower --max-new-tokens."
            )
        say("The conversation is too long for the server: its oldest turn is left out")
        turns = turns[1:]


def _spent(before: dict[str, Any] | None, after: dict[str, Any] | None) -> dict[str, int] | None:
    if before is None or after is None:
        return None
    return {name: after[name] - before[name] for name in ("tokens_attended", "tokens_seen", "keys_hashed")}
