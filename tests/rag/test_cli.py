from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hata_rag import conversation
from hata_rag.cli import main
from hata_rag.home import Home
from hata_rag.store import Store
from rag.conftest import Run
from rag.fake_server import FakeServer

CLI = [sys.executable, "-m", "hata_rag.cli"]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    server = FakeServer()
    monkeypatch.setenv("HATA_RAG_SERVER", server.url)
    yield server
    server.close()


@pytest.fixture
def indexed(run: Run, notes: Path) -> Path:
    assert run("index", notes).exit_code == 0
    return notes


def ask(run: Run, *arguments: object) -> dict[str, Any]:
    result = run("ask", "--json", *arguments)
    assert result.exit_code == 0, result.stderr
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer


def test_every_command_teaches_by_example(run: Run) -> None:
    for name in ("", *main.commands):
        result = run(*filter(None, [name]), "--help")
        assert result.exit_code == 0
        assert f"  hata-rag {name}".rstrip() in result.stdout


def test_the_help_lists_the_exit_codes(run: Run) -> None:
    text = run("--help").stdout
    assert all(f"    {code} " in text for code in (0, 2, 3, 4, 5, 130))


def test_index_reports_and_skips(run: Run, notes: Path) -> None:
    (notes / "photo.jpg").write_bytes(b"\0")
    result = run("index", notes)
    assert result.exit_code == 0
    assert result.stdout.startswith(
        "Documents: 3 added, 0 changed, 0 unchanged, 0 deleted, 1 skipped; chunks embedded: 3;"
    )
    assert result.stderr == f"Skipped {notes}/photo.jpg: it is binary\n"


def test_index_without_a_path_reads_the_python_reference(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from pydoc_data.topics import topics

    monkeypatch.setattr("pydoc_data.topics.topics", {"lambda": topics["lambda"]})
    assert run("index").stdout.startswith("Documents: 1 added")
    assert run("index", "--forget", "python:").stdout == "Documents: 1 dropped\n"
    assert run("index", "--forget", "python:").exit_code == 3


def test_the_answer_alone_is_on_stdout(run: Run, indexed: Path, fake: FakeServer) -> None:
    result = run("ask", "How long does the starter ferment?")
    assert result.exit_code == 0
    assert result.stdout == "The starter ferments for twelve hours [1].\n"
    assert result.stderr.splitlines()[1:] == [
        "Sources:",
        f"  [1] {indexed}/bread.md > Bread > Sourdough, characters 0-62",
        result.stderr.splitlines()[-1],
    ]
    assert "7 of them cached" in result.stderr
    assert "attended 10.0% of the tokens seen, 5 keys hashed" in result.stderr


def test_json_holds_all_there_is_to_know(run: Run, indexed: Path, fake: FakeServer) -> None:
    fake.pieces = ["Ganymede [2], not [9]."]
    answer = ask(run, "Which moon of Jupiter is the largest?")
    assert answer["answer"] == "Ganymede [2], not [9]."
    assert [(s["number"], Path(s["path"]).name) for s in answer["cited"]] == [(2, "moons.txt")]
    assert answer["unknown_citations"] == [9]
    assert [Path(s["path"]).name for s in answer["retrieved"]] == ["bread.md", "moons.txt", "sort.py"]
    for item in answer["retrieved"]:
        text = Path(item["path"]).read_text()[item["start"] : item["end"]]
        assert text.strip() in fake.prompts[0]
    assert answer["figures"]["hata"] == {"tokens_attended": 10, "tokens_seen": 100, "keys_hashed": 5}
    assert answer["server"] == {"url": fake.url, "model": "fake", "sglang": "0.5.23"}


def test_a_dense_server_is_called_one(run: Run, indexed: Path, fake: FakeServer) -> None:
    fake.hata = None
    assert run("ask", "How long does sourdough ferment?").stderr.rstrip().endswith("dense server")


def test_an_answer_without_citations_shows_what_it_was_given(run: Run, indexed: Path, fake: FakeServer) -> None:
    fake.pieces = ["Twelve hours, says [7]."]
    errors = run("ask", "How long does sourdough ferment?").stderr
    assert "The answer cites no document; it was given:" in errors
    assert "It also cites [7], which it was not given: distrust that." in errors


def documents(prompt: str) -> str:
    return prompt[: prompt.index("Question: ")]


def test_questions_over_the_same_documents_share_their_prefix(run: Run, indexed: Path, fake: FakeServer) -> None:
    first = ask(run, "How long does sourdough ferment?")
    second = ask(run, "Which moon of Jupiter is the largest?")
    fresh = ask(run, "--fresh", "Which moon of Jupiter is the largest?")
    assert [a["reused_documents"] for a in (first, second, fresh)] == [False, True, False]
    assert documents(fake.prompts[0]) == documents(fake.prompts[1]) == documents(fake.prompts[2])
    (indexed / "extra.md").write_text("Europa is a moon of Jupiter under ice.\n")
    run("index", indexed)
    assert not ask(run, "Which moon of Jupiter is under ice?")["reused_documents"]


def test_a_follow_up_extends_the_conversation(run: Run, indexed: Path, fake: FakeServer) -> None:
    ask(run, "How long does sourdough ferment?")
    ask(run, "-c", "And how warm?")
    ask(run, "--continue", "And why?")
    for earlier, later in zip(fake.prompts, fake.prompts[1:], strict=False):
        assert later.startswith(earlier)
    assert fake.prompts[2].endswith("<user>Question: And why?</><assistant>")


def test_a_follow_up_needs_the_same_documents(run: Run, indexed: Path, fake: FakeServer) -> None:
    assert run("ask", "-c", "And why?").exit_code == 2
    ask(run, "How long does sourdough ferment?")
    (indexed / "bread.md").write_text("Changed.\n")
    run("index", indexed)
    assert run("ask", "-c", "And why?").exit_code == 2


def test_the_prompt_never_exceeds_the_room(run: Run, indexed: Path, fake: FakeServer) -> None:
    for fake.room in range(600, 900, 50):
        result = run("ask", "--fresh", "--max-new-tokens", "100", "How long does sourdough ferment?")
        assert result.exit_code in (0, 2)
        if result.exit_code == 0:
            assert len(fake.prompts[-1]) + 100 <= fake.room
    assert fake.prompts
    fake.room = 700
    for _ in range(5):  # the oldest turns make way
        assert run("ask", "-c", "--max-new-tokens", "100", "And what else is there?").exit_code == 0
        assert len(fake.prompts[-1]) + 100 <= fake.room


def test_the_budget_of_documents_is_kept(run: Run, indexed: Path, fake: FakeServer) -> None:
    answer = ask(run, "--tokens", "120", "How long does sourdough ferment?")
    assert [Path(source["path"]).name for source in answer["retrieved"]] == ["bread.md"]


def test_two_copies_of_a_text_are_read_once(run: Run, indexed: Path, fake: FakeServer) -> None:
    (indexed / "copy.md").write_text((indexed / "bread.md").read_text())
    run("index", indexed)
    assert len(ask(run, "How long does sourdough ferment?")["retrieved"]) == 3


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        pytest.param(["index", "/nowhere/at/all"], 2, "/nowhere/at/all is not there", id="no-path"),
        pytest.param(["index", "--forget"], 2, "--forget needs the PATHs", id="forget-nothing"),
        pytest.param(["ask"], 2, "Missing argument", id="no-question"),
        pytest.param(["ask", " "], 2, "The question is empty", id="empty-question"),
        pytest.param(["ask", "-c", "--fresh", "why"], 2, "use one or the other", id="follow-fresh"),
        pytest.param(["ask", "--server", "x", "--model", "y", "why"], 2, "--server names one", id="server-model"),
        pytest.param(["ask", "--tokens", "0", "why"], 2, "0 is not in the range", id="no-tokens"),
        pytest.param(["ask", "--server-args", "'", "why"], 2, "cannot be split", id="quotes"),
        pytest.param(["ask", "--server", "http://127.0.0.1:1", "why"], 4, "No server answers", id="no-server"),
        pytest.param(["status", "--server", "http://127.0.0.1:1"], 4, "No server answers", id="status"),
    ],
)
def test_mistakes_cost_one_sentence(run: Run, indexed: Path, arguments: list[str], code: int, message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == code
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_nothing_readable(run: Run, tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"\0")
    result = run("index", tmp_path / "photo.jpg")
    assert result.exit_code == 3
    assert "No document could be read" in result.stderr


def test_ask_finishes_an_interrupted_index(run: Run, indexed: Path, fake: FakeServer, store: Store) -> None:
    store.use_embedder("another 1.0")
    result = run("ask", "How long does the starter ferment?")
    assert result.exit_code == 0
    assert "The index is not complete" in result.stderr


def test_nothing_to_answer_from(run: Run, indexed: Path, fake: FakeServer) -> None:
    result = run("ask", "Who won the world cup of 1998?")
    assert result.exit_code == 5
    assert "Nothing in the index is about this question" in result.stderr
    assert not fake.prompts


def test_status_and_stop_without_a_server(run: Run, indexed: Path) -> None:
    status = json.loads(run("status", "--json").stdout)
    assert status["server"] is None
    assert {name: status["index"][name] for name in ("documents", "chunks", "embedded")} == {
        "documents": 3,
        "chunks": 3,
        "embedded": 3,
    }
    assert "Server: none runs" in run("status").stdout
    assert run("stop").stdout == "No server runs\n"


def test_status_of_a_named_server(run: Run, fake: FakeServer) -> None:
    assert json.loads(run("status", "--json").stdout)["server"]["model"] == "fake"
    assert "attended 10.0% of 100 tokens seen, 5 keys hashed" in run("status").stdout


def test_home_option_wins_over_the_environment(run: Run, notes: Path, tmp_path: Path) -> None:
    run("index", notes, "--home", tmp_path / "elsewhere")
    assert json.loads(run("status", "--json").stdout)["index"]["documents"] == 0
    assert json.loads(run("status", "--json", "--home", tmp_path / "elsewhere").stdout)["index"]["documents"] == 3


def test_ctrl_c_ends_quietly(run: Run, indexed: Path, fake: FakeServer, home: Home, store: Store) -> None:
    ask(run, "How long does sourdough ferment?")
    before = conversation.load(home.conversation, store)
    fake.delay = 60
    with subprocess.Popen(
        [*CLI, "ask", "-c", "And why?"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A background job of a shell ignores Ctrl-C, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        deadline = time.monotonic() + 600  # a busy machine takes its time to load the embedder
        while len(fake.prompts) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=200)
    assert process.returncode == 130
    assert (output, errors.strip()) == (b"", b"")
    assert conversation.load(home.conversation, store) == before
    fake.delay = 0


def test_a_closed_pipe_ends_quietly() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.run([*CLI, "status"], stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert process.returncode == 141
    assert process.stderr == b""


def test_modules_are_light() -> None:
    code = (
        "import importlib, pkgutil, sys, hata_rag\n"
        "for module in pkgutil.iter_modules(hata_rag.__path__):\n"
        "    importlib.import_module(f'hata_rag.{module.name}')\n"
        "assert not {'torch', 'sglang', 'transformers', 'faiss'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
