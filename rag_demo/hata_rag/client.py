"""Talking to an SGLang server over HTTP.

The native ``/generate`` is used rather than the OpenAI endpoints because it reports cached tokens whatever
options the server was started with. The server itself renders the chat template and counts tokens
(``/v1/tokenize``), so hata-rag needs no file of the model and the server may be anywhere.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from hata_rag.context import Message
from hata_rag.errors import ServerError

TIMEOUT = httpx.Timeout(10, read=600)  # a long prompt on a CPU takes minutes before its first token
# Of a request's end, the server knows these beside the context length.
COUNTERS = ("tokens_attended", "tokens_seen", "keys_hashed")


@dataclass(frozen=True)
class ServerInfo:
    """What a server says about itself.

    Args:
        room: the most tokens of a prompt and its answer together.
        hata: settings and counters of HATA, summed over data-parallel workers; None on a dense server.
        incremental: whether its streams carry new text only, instead of all the text so far.
    """

    model: str
    version: str
    room: int
    hata: dict[str, Any] | None
    incremental: bool


@dataclass(frozen=True)
class Figures:
    """What an answer cost. Times are in seconds, seen from here."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    seconds_to_first_token: float
    tokens_per_second: float | None


class Generation:
    """An answer being streamed: iterate over its pieces, then read ``figures``."""

    figures: Figures

    def __init__(self, events: Iterator[dict[str, Any]], incremental: bool) -> None:
        self._events = events
        self._incremental = incremental

    def __iter__(self) -> Iterator[str]:
        begun = time.monotonic()
        first = last = None
        length = 0
        meta: dict[str, Any] = {}
        for event in self._events:
            meta = event["meta_info"]
            if (meta.get("finish_reason") or {}).get("type") == "abort":
                raise ServerError(f"The server gave up on the question: {meta['finish_reason'].get('message')}.")
            last = time.monotonic()
            first = first or last
            piece = event["text"] if self._incremental else event["text"][length:]
            length += len(piece)
            if piece:
                yield piece
        if first is None or last is None:
            raise ServerError("The server ended the answer before its first token; its log says why.")
        decoded = meta["completion_tokens"] - 1
        self.figures = Figures(
            prompt_tokens=meta["prompt_tokens"],
            cached_tokens=meta["cached_tokens"],
            completion_tokens=meta["completion_tokens"],
            seconds_to_first_token=first - begun,
            tokens_per_second=decoded / (last - first) if decoded > 0 and last > first else None,
        )


class Client:
    """An SGLang server at ``url``. Every failure is a ServerError of one sentence."""

    def __init__(self, url: str) -> None:
        self.url = (url if "://" in url else f"http://{url}").rstrip("/")
        self._http = httpx.Client(base_url=self.url, timeout=TIMEOUT)

    def close(self) -> None:
        self._http.close()

    def healthy(self) -> bool:
        """Whether the server can answer now."""
        try:
            return self._http.get("/health", timeout=30).status_code == 200
        except httpx.HTTPError:
            return False

    def info(self) -> ServerInfo:
        state = self._json("GET", "/server_info")
        try:
            workers = [worker["hata"] for worker in state["internal_states"] if worker.get("hata")]
            totals = {name: sum(worker.get(name, 0) for worker in workers) for name in COUNTERS}
            return ServerInfo(
                model=state["model_path"],
                version=state["version"],
                room=state["max_req_input_len"] - 1,
                hata=workers[0] | totals if workers else None,
                incremental=bool(state.get("incremental_streaming_output")),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ServerError(f"{self.url} answers, but not as SGLang does: {error} is missing.") from error

    def count(self, texts: Sequence[str]) -> list[int]:
        """The number of the model's tokens in each text."""
        body = {"prompt": list(texts), "add_special_tokens": False}
        counts: list[int] = self._json("POST", "/v1/tokenize", body)["count"]
        return counts

    def tokens(self, chat: Sequence[Message]) -> list[int]:
        """The prompt of a chat as the model reads it, up to where its answer begins."""
        # A model that can think aloud is asked not to: what it thinks is neither answer nor cited.
        body: dict[str, Any] = {"messages": list(chat), "chat_template_kwargs": {"enable_thinking": False}}
        response = self._request("POST", "/v1/tokenize", body)
        if response.status_code == 400:  # a base model, without a chat template
            body = {"prompt": "\n\n".join(message["content"] for message in chat) + "\n\nAnswer:"}
            response = self._request("POST", "/v1/tokenize", body)
        prompt: list[int] = self._checked(response)["tokens"]
        return prompt

    def generate(self, prompt: Sequence[int], max_new_tokens: int, temperature: float, incremental: bool) -> Generation:
        """Begin an answer; nothing is sent before it is iterated over."""
        body = {
            "input_ids": list(prompt),
            "stream": True,
            "sampling_params": {"max_new_tokens": max_new_tokens, "temperature": temperature},
        }
        return Generation(self._events(body), incremental)

    def _events(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        try:
            with self._http.stream("POST", "/generate", json=body) as response:
                if response.status_code != 200:
                    response.read()
                    self._checked(response)
                for line in response.iter_lines():
                    if not line.startswith("data:"):
                        continue
                    data = line.removeprefix("data:").strip()
                    if data == "[DONE]":
                        return
                    event = json.loads(data)
                    if "error" in event:
                        raise ServerError(f"The server refused the question: {event['error']['message']}")
                    yield event
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        except ValueError as error:
            raise ServerError(f"The server at {self.url} sent a broken answer: {error}.") from error
        raise ServerError(f"The server at {self.url} ended the answer in the middle; its log says why.")

    def _json(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        return self._checked(self._request(method, path, body))

    def _request(self, method: str, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
        try:
            return self._http.request(method, path, json=body)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise self._unreachable(error) from error

    def _checked(self, response: httpx.Response) -> Any:
        try:
            content = response.json()
        except ValueError:
            content = None
        if response.status_code == 200 and content is not None:
            return content
        where = f"{self.url}{response.request.url.path}"
        if isinstance(content, dict) and (error := content.get("error", content)):
            reason = error.get("message", content) if isinstance(error, dict) else error
        else:
            reason = f"status {response.status_code}; is this an SGLang server?"
        raise ServerError(f"{where} refused the request: {reason}")

    def _unreachable(self, error: Exception) -> ServerError:
        return ServerError(
            f"No server answers at {self.url} ({str(error) or type(error).__name__}): check --server or "
            "HATA_RAG_SERVER, or leave both out and hata-rag starts one itself."
        )
