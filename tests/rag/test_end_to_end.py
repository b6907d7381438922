"""The whole of it: the default model, a real SGLang server, and two questions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from hata_rag.model import default_model
from rag.conftest import Run

pytestmark = pytest.mark.server


@pytest.fixture
def asking(run: Run) -> Iterator[Run]:
    yield run
    assert run("stop").exit_code == 0


def ask(run: Run, *arguments: str) -> dict[str, Any]:
    result = run("ask", "--json", "--max-new-tokens", "12", *arguments)
    assert result.exit_code == 0, result.stderr
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer


def test_the_second_question_finds_the_first_ones_documents(asking: Run, tmp_path: Path) -> None:
    for topic in ("bread", "rivers", "stars", "engines", "chess", "silk"):
        lines = (f"Fact {number} about {topic}: it is number {number * 7}." for number in range(60))
        (tmp_path / f"{topic}.md").write_text(f"# {topic}\n\n" + "\n\n".join(lines))
    assert asking("index", tmp_path).exit_code == 0

    first = ask(asking, "--tokens", "2000", "What is fact 12 about rivers?")
    second = ask(asking, "-c", "And fact 13?")
    third = ask(asking, "--tokens", "2000", "What is fact 12 about rivers, please?")

    assert first["answer"]
    documents = first["figures"]["prompt_tokens"]
    assert 1500 < documents < 2200
    assert first["figures"]["cached_tokens"] < 100
    for later in (second, third):
        assert later["reused_documents"]
        assert later["figures"]["cached_tokens"] > documents - 60
        assert later["figures"]["hata"]["keys_hashed"] < 120
    attended, seen = (first["figures"]["hata"][name] for name in ("tokens_attended", "tokens_seen"))
    assert 0 < attended < 0.6 * seen  # 512 of 2,000, except in the dense layers

    status = json.loads(asking("status", "--json").stdout)
    assert status["server"]["state"] == "ready"
    assert status["server"]["hata"]["budget"] == "512"


def test_the_default_model_is_whole() -> None:
    folder = default_model()
    config = json.loads((folder / "config.json").read_text())
    assert config["max_position_embeddings"] == 8192
    assert config["tie_word_embeddings"]
    assert config["dtype"] == "bfloat16"
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    assert tokenizer["eos_token"] == "<|im_end|>"
    vocabulary = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert vocabulary.token_to_id("<|im_end|>") == config["eos_token_id"] == 2
    assert len(vocabulary.encode("1234", add_special_tokens=False).ids) == 4  # digits stand alone
    text = "Grüße ▁ [1] , 12.5%\n\n\tcode  <|im_end|>"
    assert vocabulary.decode(vocabulary.encode(text).ids, skip_special_tokens=False) == text
    assert "<|im_start|>" in (folder / "chat_template.jinja").read_text()
