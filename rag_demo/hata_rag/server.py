"""The server that hata-rag starts itself: one in the background, used by every later call, until ``stop``."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shlex
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from hata_rag import model
from hata_rag.client import Client
from hata_rag.errors import BadRequestError, ServerError
from hata_rag.home import Home

START_SECONDS = 900  # loading a large model from a slow disk, and compiling its kernels
STOP_SECONDS = 15
POLL_SECONDS = 0.5
# For the default model, whose context is 8,192 tokens: small enough that most of a prompt is left unread.
DEFAULT_MODEL_OPTIONS = ("--hata-budget", "512", "--hata-min-context", "1024")
FAILURE = re.compile(r"\b\w*(Error|Exception)\b:|\berror:|\bKilled\b")

# Shows that something takes time, while the block runs.
Spinner = Callable[[str], AbstractContextManager[object]]


@dataclass(frozen=True)
class Record:
    """A server that hata-rag started. Its process leads a session of its own, with all its children."""

    pid: int
    started: float  # the process's creation time; a pid alone may belong to another process by now
    url: str
    model: str
    options: tuple[str, ...]
    log: str

    @property
    def alive(self) -> bool:
        try:
            process = psutil.Process(self.pid)
            return abs(process.create_time() - self.started) < 1 and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


def running(home: Home) -> Record | None:
    """The server of this home, if its process lives."""
    try:
        state = json.loads(home.server.read_text(encoding="utf-8"))
        record = Record(**state | {"options": tuple(state["options"])})
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None
    return record if record.alive else None


def ensure(
    home: Home,
    wanted_model: str | None,
    options: Sequence[str],
    say: Callable[[str], None],
    spinner: Spinner = lambda text: nullcontext(),
) -> Record:
    """The running server, started if there is none, and answering when this returns.

    Args:
        wanted_model: a folder or a Hugging Face id; None for the default model, or whatever is running.
        options: further arguments of SGLang; when given, a running server must have been started with them.
    """
    with _locked(home.create().server_lock):
        record = running(home)
        if record is None:
            record = _start(home, wanted_model, tuple(options), say)
        elif (wanted_model and _same_model(wanted_model) != record.model) or (
            options and tuple(options) != record.options
        ):
            raise BadRequestError(
                f"The server at {record.url} runs {shlex.join([record.model, *record.options])}: "
                "end it with `hata-rag stop` to start another, or leave out --model and --server-args."
            )
    _wait(record, say, spinner)
    return record


def stop(home: Home) -> Record | None:
    """End the server and every process it started; None if there was none."""
    with _locked(home.create().server_lock):
        record = running(home)
        if record is not None:
            _signal(record.pid, signal.SIGTERM)
            deadline = time.monotonic() + STOP_SECONDS
            while (members := _session(record.pid)) and time.monotonic() < deadline:
                psutil.wait_procs(members, timeout=POLL_SECONDS)
            _signal(record.pid, signal.SIGKILL)
            psutil.wait_procs(_session(record.pid), timeout=STOP_SECONDS)
        home.server.unlink(missing_ok=True)
    return record


def command(model_path: str, port: int, options: Sequence[str]) -> list[str]:
    """The command line of a server with HATA: SGLang's own, or its CPU form where there is no NVIDIA GPU."""
    from sglang_hata.cpu import gpu_present

    launcher = ["sglang.launch_server"] if gpu_present() else ["sglang_hata.cpu", "serve"]
    where = ["--model-path", model_path, "--host", "127.0.0.1", "--port", str(port), "--hata"]
    return [sys.executable, "-m", *launcher, *where, *options]


def last_words(log: Path) -> str:
    """The line of a log that says why its server died: its last error, otherwise its last line."""
    try:
        lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    except FileNotFoundError:
        lines = []
    lines = [line for line in lines if line]
    return next((line for line in reversed(lines) if FAILURE.search(line)), lines[-1] if lines else "no output")


def _start(home: Home, wanted_model: str | None, options: tuple[str, ...], say: Callable[[str], None]) -> Record:
    path = _same_model(wanted_model) if wanted_model else str(model.default_model(say))
    ours = () if wanted_model else DEFAULT_MODEL_OPTIONS
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # The user's options come last: argparse lets the last one win.
    arguments = command(path, port, (*ours, *options))
    log = str(home.server_log)
    # Not subprocess: it wants its children waited for, and this one outlives us.
    pid = os.posix_spawn(
        arguments[0],
        arguments,
        os.environ,
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
        setsid=True,
    )
    started = psutil.Process(pid).create_time()
    record = Record(pid, started, f"http://127.0.0.1:{port}", path, options, log)
    home.server.write_text(json.dumps(asdict(record), indent=1), encoding="utf-8")
    say(f"Starting a server for {Path(path).name} in the background (log: {log})")
    return record


def _wait(record: Record, say: Callable[[str], None], spinner: Spinner) -> None:
    client = Client(record.url)
    try:
        if client.healthy():
            return
        with spinner(f"Waiting for the server at {record.url} (log: {record.log})"):
            deadline = time.monotonic() + START_SECONDS
            while time.monotonic() < deadline:
                if not record.alive:
                    raise ServerError(
                        f"The server ended before it could answer: {last_words(Path(record.log))} "
                        f"(whole log: {record.log})"
                    )
                if client.healthy():
                    return
                time.sleep(POLL_SECONDS)
    finally:
        client.close()
    raise ServerError(
        f"The server at {record.url} does not answer after {START_SECONDS} s: read its log {record.log}, "
        "and end it with `hata-rag stop`."
    )


def _same_model(name: str) -> str:
    """A folder by its absolute path, so that it is the same model from every directory; an id as it is."""
    folder = Path(name).expanduser()
    return str(folder.resolve()) if folder.is_dir() else name


def _session(leader: int) -> list[psutil.Process]:
    """The living processes of a session. A child that outlived its parent is still one of them."""
    members = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                members.append(process)
        except (ProcessLookupError, PermissionError, psutil.Error):
            continue
    return members


def _signal(leader: int, number: signal.Signals) -> None:
    for process in _session(leader):
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            continue


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Hold ``file``'s lock, so that two calls at once start one server; the system frees it if we die."""
    with file.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
