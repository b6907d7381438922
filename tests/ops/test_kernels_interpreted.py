"""Runs `interpreted.py` in processes of their own: Triton chooses compiler or interpreter when imported."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
# The interpreter uses one core.
HALVES = ("specification and sampled", "not (specification and sampled)")


def test_kernels_under_the_interpreter() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "interpreted.py"), "-k"]
    options = {"env": environment, "cwd": HERE.parents[1], "text": True}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    halves = [subprocess.Popen([*command, half], **options, **streams) for half in HALVES]
    printed = [half.communicate()[0] for half in halves]
    assert [half.returncode for half in halves] == [0, 0], "\n".join(printed)
