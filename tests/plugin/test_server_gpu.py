"""The served path on a GPU, under CUDA graphs and overlapped scheduling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from serving import NEW_TOKENS, assert_same_text, serving
from texts import PROMPTS

pytestmark = [pytest.mark.gpu, pytest.mark.server]

SMALL = ("--hata", "--hata-budget", "256", "--hata-min-context", "512")


def test_with_the_whole_context_as_budget_the_text_is_dense_under_graphs(model: Path, dense_answers: list[Any]) -> None:
    with serving(model, "--hata", "--hata-budget", "8192", "--hata-min-context", "0") as server:
        for prompt, dense in zip(PROMPTS, dense_answers, strict=True):
            assert_same_text(dense, server.generate(prompt, NEW_TOKENS))
        state = server.hata()
        assert state["tokens_attended"] == state["tokens_seen"] > 0
        # A ragged batch, padded to a captured size, its documents from the prefix cache.
        for answer, dense in zip(server.generate_at_once(PROMPTS, NEW_TOKENS), dense_answers, strict=True):
            assert_same_text(dense, answer)
            meta = answer["meta_info"]
            assert meta["cached_tokens"] > 0.95 * meta["prompt_tokens"]


def test_graphs_and_eager_steps_choose_alike(model: Path) -> None:
    with serving(model, *SMALL, "--disable-cuda-graph") as server:
        eager = [server.generate(prompt, NEW_TOKENS) for prompt in PROMPTS]
    with serving(model, *SMALL) as server:
        for prompt, answer in zip(PROMPTS, eager, strict=True):
            assert_same_text(answer, server.generate(prompt, NEW_TOKENS))
        for answer, other in zip(server.generate_at_once(PROMPTS, NEW_TOKENS), eager, strict=True):
            assert_same_text(other, answer)
        state = server.hata()
        assert 0 < state["tokens_attended"] < 0.5 * state["tokens_seen"]
