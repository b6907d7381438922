"""SGLang's HTTP protocol without SGLang: for what the client sends, and for answers no real server gives on cue."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FakeServer:
    """Answers with ``pieces``; a token is a character. ``prompts`` keeps what it was asked."""

    def __init__(self) -> None:
        self.pieces = ["The starter ferments ", "for twelve hours [1]."]
        self.delay = 0.0
        self.incremental = False
        self.room = 8_000
        self.hata: dict[str, Any] | None = {"tokens_attended": 10, "tokens_seen": 100, "keys_hashed": 5}
        self.info: dict[str, Any] | None = None
        self.events: list[str] | None = None
        self.chat_template = True
        self.prompts: list[str] = []
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                found = {"/health": "", "/server_info": fake.server_info()}.get(self.path)
                self.reply(found, 404 if found is None else 200)

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.path == "/v1/tokenize":
                    self.reply(*fake.tokenize(body))
                elif self.path == "/generate":
                    self.stream(body)
                else:
                    self.reply(None, 404)

            def reply(self, content: Any, status: int) -> None:
                data = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def stream(self, body: dict[str, Any]) -> None:
                self.send_response(200)
                self.end_headers()
                fake.prompts.append("".join(map(chr, body["input_ids"])))
                for line in fake.events if fake.events is not None else fake.answer(body):
                    time.sleep(fake.delay)
                    try:
                        self.wfile.write(f"data: {line}\n\n".encode())
                    except OSError:  # the client went away
                        return

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def server_info(self) -> dict[str, Any]:
        if self.info is not None:
            return self.info
        return {
            "model_path": "fake",
            "version": "0.5.23",
            "max_req_input_len": self.room + 1,
            "incremental_streaming_output": self.incremental,
            "internal_states": [{} if self.hata is None else {"hata": dict(self.hata)}],
        }

    def tokenize(self, body: dict[str, Any]) -> tuple[dict[str, Any], int]:
        if "messages" not in body:
            prompt = body["prompt"]
            count = len(prompt) if isinstance(prompt, str) else [len(text) for text in prompt]
            return {"count": count, "tokens": [ord(c) for c in prompt] if isinstance(prompt, str) else []}, 200
        if not self.chat_template:
            return {"message": "no chat template"}, 400
        chat = "".join(f"<{m['role']}>{m['content']}</>" for m in body["messages"]) + "<assistant>"
        return {"count": len(chat), "tokens": [ord(c) for c in chat]}, 200

    def answer(self, body: dict[str, Any]) -> list[str]:
        if self.hata:
            self.hata = {name: value * 2 for name, value in self.hata.items()}
        lines = []
        for number, piece in enumerate(self.pieces, start=1):
            text = piece if self.incremental else "".join(self.pieces[:number])
            counts = {"prompt_tokens": len(body["input_ids"]), "cached_tokens": 7, "completion_tokens": number}
            lines.append(json.dumps({"text": text, "meta_info": counts | {"finish_reason": None}}))
        return [*lines, "[DONE]"]
