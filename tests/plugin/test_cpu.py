"""SGLang on a plain CPU: what the environment holds, and that it is never used beside a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from sglang_hata import cpu
from sglang_hata.cpu import cli


def test_a_function_of_the_stand_in_says_which_it_is() -> None:
    code = "import sgl_kernel; print(sgl_kernel.__file__); sgl_kernel.verify_tree_greedy_cpu(1)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=cpu.environment(os.environ), capture_output=True, text=True, check=False
    )
    assert Path(done.stdout.strip()).is_relative_to(cpu.STAND_IN)
    assert "sgl_kernel.verify_tree_greedy_cpu was called on a machine without a GPU" in done.stderr.splitlines()[-1]


def test_without_the_environment_the_stand_in_is_not_found() -> None:
    code = "import importlib.util; print(importlib.util.find_spec('sgl_kernel').origin)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not Path(found.strip()).is_relative_to(cpu.STAND_IN)


def test_flags_of_the_user_win() -> None:
    arguments = cpu.server_arguments(["--model-path", "m", "--max-total-tokens=100", "--attention-backend", "triton"])
    assert arguments.count("--attention-backend") == 1 and "torch_native" not in arguments
    assert "32768" not in arguments and arguments[-4:] == [
        "m",
        "--max-total-tokens=100",
        "--attention-backend",
        "triton",
    ]
    assert {"--device", "cpu", "--disable-overlap-schedule"} <= set(arguments)


def test_the_environment_keeps_what_it_was_given() -> None:
    changed = cpu.environment({"PYTHONPATH": "mine", "OMP_WAIT_POLICY": "active", "HOME": "/home/me"})
    assert changed["PYTHONPATH"] == f"{cpu.STAND_IN}{os.pathsep}mine"
    assert changed["OMP_WAIT_POLICY"] == "active" and changed["HOME"] == "/home/me"


@pytest.mark.parametrize("flags", [["--tp", "3"], ["--tp-size=3"], ["--tensor-parallel-size", "3", "--hata"]])
def test_tensor_parallel_ranks_share_the_cores(flags: list[str]) -> None:
    assert cpu.ranks_of(["--model-path", "m", *flags]) == 3
    ranks = cpu.environment({}, 3)["SGLANG_CPU_OMP_THREADS_BIND"].split("|")
    assert len(ranks) == 3 and {int(core) for core in ranks[2].split(",")} == os.sched_getaffinity(0)
    mine = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1|2"}
    assert cpu.environment(mine, 3).items() > mine.items()


def test_one_rank_is_left_to_sglang() -> None:
    assert cpu.ranks_of(["--model-path", "m", "--trust-remote-code"]) == 1
    assert "SGLANG_CPU_OMP_THREADS_BIND" not in cpu.environment({})


@pytest.mark.parametrize("command", [["serve", "--model-path", "m"], ["python", "-c", "pass"]])
def test_refused_beside_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: list[str]) -> None:
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(cpu, "DRIVER_FILES", (tmp_path / "nvidia0",))
    monkeypatch.setattr(os, "execve", lambda *_: pytest.fail("it ran all the same"))
    refused = CliRunner().invoke(cli.main, command)
    assert refused.exit_code == 2
    assert "This machine has a GPU, and hata-cpu is for machines without one" in refused.output


def test_says_loudly_that_it_is_for_trying(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr(cpu, "DRIVER_FILES", ())
    monkeypatch.setattr(os, "execve", lambda _path, arguments, _environment: ran.append(arguments))
    result = CliRunner().invoke(cli.main, ["python", "program.py", "--help"])
    assert ran == [[sys.executable, "program.py", "--help"]]
    assert "for trying and testing only" in result.stderr
