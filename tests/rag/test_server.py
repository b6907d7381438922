"""The background server's bookkeeping, with small processes in the place of SGLang."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from hata_rag import server
from hata_rag.errors import BadRequestError, ServerError
from hata_rag.home import Home

# Serves /health, beside a child that has left its parent, as a crashed launcher's scheduler would.
HEALTHY = """
import http.server, subprocess, sys
subprocess.run(["sh", "-c", "sleep 600 & echo $! > " + sys.argv[2]])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
DYING = "import sys; print('loading'); print('RuntimeError: out of memory', file=sys.stderr); print('bye'); sys.exit(3)"


@pytest.fixture
def child(tmp_path: Path) -> Path:
    return tmp_path / "child"


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch, home: Home, child: Path) -> Iterator[list[str]]:
    """Replaces SGLang by a script; the list holds the models it was launched with."""
    launched: list[str] = []

    def command(model: str, port: int, options: Sequence[str]) -> list[str]:
        launched.append(model)
        return [sys.executable, "-c", DYING if model == "dying" else HEALTHY, str(port), str(child)]

    monkeypatch.setattr(server, "command", command)
    yield launched
    server.stop(home)


def ensure(home: Home, model: str = "some/model", options: Sequence[str] = ()) -> server.Record:
    return server.ensure(home, model, options, lambda line: None)


def test_started_once_and_stopped_with_every_process(home: Home, launch: list[str], child: Path) -> None:
    record = ensure(home)
    assert ensure(home) == record == server.running(home)
    assert launch == ["some/model"]
    orphan = psutil.Process(int(child.read_text()))
    assert server.stop(home) == record
    assert not record.alive
    assert not orphan.is_running() or orphan.status() == psutil.STATUS_ZOMBIE
    assert server.running(home) is None
    assert server.stop(home) is None


def test_two_starters_start_one_server(home: Home, launch: list[str]) -> None:
    records: list[server.Record] = []
    threads = [threading.Thread(target=lambda: records.append(ensure(home))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(records) == 3
    assert len(set(records)) == len(launch) == 1


def test_a_server_that_dies_is_reported_with_its_last_error(home: Home, launch: list[str]) -> None:
    with pytest.raises(ServerError, match=r"RuntimeError: out of memory \(whole log: .*server\.log\)"):
        ensure(home, "dying")
    assert server.running(home) is None


def test_another_model_or_other_arguments_are_refused(home: Home, launch: list[str]) -> None:
    ensure(home, options=["--tp", "1"])
    with pytest.raises(BadRequestError, match="some/model --tp 1"):
        ensure(home, "other/model")
    with pytest.raises(BadRequestError, match="hata-rag stop"):
        ensure(home, options=["--tp", "2"])
    assert ensure(home).options == ("--tp", "1")


def test_a_process_that_only_has_the_same_number_is_not_ours(home: Home) -> None:
    record = server.Record(psutil.Process().pid, time.time() - 10_000, "http://127.0.0.1:1", "m", (), "log")
    home.create().server.write_text(json.dumps(vars(record)))
    assert server.running(home) is None
    assert server.stop(home) is None


@pytest.mark.parametrize("content", ["", "{}", "[]", "{half"])
def test_a_broken_record_is_no_server(home: Home, content: str) -> None:
    home.create().server.write_text(content)
    assert server.running(home) is None


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ("a\nValueError: no weights\n  at x\n", "ValueError: no weights"),
        ("a\nlast\n\n", "last"),
        ("", "no output"),
        (
            "usage: serve\nserve: error: unrecognized arguments: --hata\n",
            "serve: error: unrecognized arguments: --hata",
        ),
    ],
)
def test_last_words(tmp_path: Path, log: str, words: str) -> None:
    file = tmp_path / "log"
    assert server.last_words(file) == "no output"
    file.write_text(log)
    assert server.last_words(file) == words


@pytest.mark.parametrize(("gpu", "launcher"), [(True, ["sglang.launch_server"]), (False, ["sglang_hata.cpu", "serve"])])
def test_the_launcher_fits_the_machine(monkeypatch: pytest.MonkeyPatch, gpu: bool, launcher: list[str]) -> None:
    monkeypatch.setattr("sglang_hata.cpu.gpu_present", lambda: gpu)
    command = server.command("folder", 8000, ["--tp", "1"])
    assert command[:2] == [sys.executable, "-m"]
    assert command[2 : 2 + len(launcher)] == launcher
    assert command[2 + len(launcher) :] == [
        *["--model-path", "folder", "--host", "127.0.0.1", "--port", "8000", "--hata", "--tp", "1"]
    ]
