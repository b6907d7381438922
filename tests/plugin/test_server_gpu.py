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
    with serving(model, "--hata", "--hata-budget", "100%", "--hata-min-context", "0") as server:
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


def test_by_default_measured_costs_decide(model: Path, dense_answers: list[Any]) -> None:
    """A batch in which selecting would not save time is served dense, in the same graph."""
    with serving(model, "--hata", "--hata-budget", "256") as server:
        costs = server.hata()["costs_ps"]
        assert costs["attend"] > 0 and costs["fixed"] > 0
        for prompt, dense in zip(PROMPTS, dense_answers, strict=True):
            before, answer, after = server.hata(), server.generate(prompt, NEW_TOKENS), server.hata()
            seen, attended = (after[name] - before[name] for name in ("tokens_seen", "tokens_attended"))
            assert seen > 0
            longest = answer["meta_info"]["prompt_tokens"] + NEW_TOKENS
            if (longest - 256) * costs["attend"] <= costs["fixed"]:
                assert attended == seen
                assert_same_text(dense, answer)


def test_fp8_keys_and_values(model: Path) -> None:
    """The whole context as budget on an fp8 cache answers as dense attention on an fp8 cache does."""
    fp8 = ("--kv-cache-dtype", "fp8_e4m3")
    with serving(model, *fp8) as server:
        dense = [server.generate(prompt, NEW_TOKENS) for prompt in PROMPTS]
    with serving(model, *fp8, "--hata", "--hata-budget", "100%", "--hata-min-context", "0") as server:
        for prompt, answer in zip(PROMPTS, dense, strict=True):
            assert_same_text(answer, server.generate(prompt, NEW_TOKENS))
    with serving(model, *fp8, *SMALL) as server:
        for prompt in PROMPTS:
            server.generate(prompt, NEW_TOKENS)
        state = server.hata()
        assert 0 < state["tokens_attended"] < 0.5 * state["tokens_seen"]
