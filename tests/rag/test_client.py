from __future__ import annotations

import json
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from hata_rag.client import Client
from hata_rag.errors import ServerError
from rag.fake_server import FakeServer


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    server = FakeServer()
    yield server
    server.close()


@pytest.fixture
def client(fake: FakeServer) -> Iterator[Client]:
    client = Client(fake.url + "/")
    yield client
    client.close()


@pytest.mark.parametrize("incremental", [False, True])
def test_streams_new_text_and_figures(
    fake: FakeServer, client: Client, incremental: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.incremental = incremental
    clock = iter([10.0, 10.5, 10.75])  # the question, the first token, the second
    monkeypatch.setattr("hata_rag.client.time", SimpleNamespace(monotonic=clock.__next__))
    generation = client.generate([65, 66], 5, 0.0, client.info().incremental)
    assert list(generation) == fake.pieces
    assert fake.prompts == ["AB"]
    assert generation.figures.prompt_tokens == 2
    assert generation.figures.cached_tokens == 7
    assert generation.figures.completion_tokens == 2
    assert generation.figures.seconds_to_first_token == 0.5
    assert generation.figures.tokens_per_second == 4


def test_counters_are_summed_over_workers(fake: FakeServer, client: Client) -> None:
    worker = {"hata": {"budget": "512", "tokens_attended": 1, "tokens_seen": 4, "keys_hashed": 2}}
    fake.info = fake.server_info() | {"internal_states": [worker, worker]}
    assert client.info().hata == {"budget": "512", "tokens_attended": 2, "tokens_seen": 8, "keys_hashed": 4}


def test_a_dense_server_has_no_counters(fake: FakeServer, client: Client) -> None:
    fake.hata = None
    assert client.info().hata is None


def test_a_model_without_a_chat_template_gets_plain_text(fake: FakeServer, client: Client) -> None:
    fake.chat_template = False
    tokens = client.tokens([{"role": "user", "content": "Question: why?"}])
    assert "".join(map(chr, tokens)) == "Question: why?\n\nAnswer:"


def event(**meta: object) -> str:
    return json.dumps({"text": "x", "meta_info": meta})


@pytest.mark.parametrize(
    ("events", "message"),
    [
        pytest.param([], "ended the answer in the middle", id="cut"),
        pytest.param(["[DONE]"], "before its first token", id="empty"),
        pytest.param(["{half"], "broken answer", id="not-json"),
        pytest.param(['{"error": {"message": "too long"}}'], "too long", id="refused"),
        pytest.param([event(finish_reason={"type": "abort", "message": "no memory"})], "no memory", id="abort"),
    ],
)
def test_failures_in_the_stream(fake: FakeServer, client: Client, events: list[str], message: str) -> None:
    fake.events = events
    with pytest.raises(ServerError, match=message):
        list(client.generate([1], 5, 0.0, False))


def test_no_server() -> None:
    client = Client("http://127.0.0.1:1")
    assert not client.healthy()
    with pytest.raises(ServerError, match=r"No server answers at http://127.0.0.1:1"):
        client.info()


@pytest.mark.parametrize("url", ["nonsense", "http://", "ftp://host"])
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(ServerError, match="No server answers"):
        Client(url).info()


@pytest.mark.parametrize("info", [{"unexpected": 1}, [], "text"])
def test_a_server_that_is_not_sglang(fake: FakeServer, client: Client, info: object) -> None:
    fake.info = info  # type: ignore[assignment]
    with pytest.raises(ServerError, match="not as SGLang does"):
        client.info()
