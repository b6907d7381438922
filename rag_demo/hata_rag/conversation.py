"""What the last ``ask`` showed the model, kept so that the next one can share its prefix."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from hata_rag.context import Turn
from hata_rag.store import Passage, Store


@dataclass(frozen=True)
class Conversation:
    """The documents of the last question, in order, and the turns asked over them.

    Args:
        model: the model that read them; another one has another prefix.
        tokens: the budget of documents they were chosen under.
    """

    model: str
    tokens: int
    passages: tuple[Passage, ...]
    turns: tuple[Turn, ...] = ()

    def covers(self, hits: Sequence[Passage]) -> bool:
        return set(hits) <= set(self.passages)

    def save(self, file: Path) -> None:
        places = [[p.path, p.digest, p.start, p.end] for p in self.passages]
        state = asdict(self) | {"passages": places}
        partial = file.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps(state, indent=1), encoding="utf-8")
        partial.replace(file)


def load(file: Path, store: Store) -> Conversation | None:
    """The last conversation; None if there is none, or if a document of it has changed or is gone."""
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        found = [store.find(*place) for place in state["passages"]]
        turns = tuple(Turn(**turn) for turn in state["turns"])
        passages = tuple(passage for passage in found if passage is not None)
        return Conversation(state["model"], state["tokens"], passages, turns) if all(found) else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # never asked, or written by another version
        return None
