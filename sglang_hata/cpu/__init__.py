"""SGLang on a machine without a GPU, for trying HATA and for tests. Never for serving, never where a GPU is.

Two things keep SGLang from starting there: it takes its CPU path only when told so by a variable, and its kernel
library needs a GPU driver to be imported. Its processes are spawned, so both have to come through the environment:
`environment` is the one place that says how, and `hata-cpu` the one command that uses it.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path

STAND_IN = Path(__file__).parent / "site"
DRIVER_FILES = (Path("/dev/nvidiactl"), Path("/dev/nvidia0"), Path("/dev/dxg"), Path("/dev/kfd"))

# What SGLang cannot do on a plain CPU, set to what it can; a flag that the user gives wins.
SERVER_ARGUMENTS = {
    "--device": "cpu",
    "--attention-backend": "torch_native",
    "--sampling-backend": "pytorch",
    "--grammar-backend": "none",
    "--disable-overlap-schedule": None,
    # The KV pool's default share of memory would take most of the machine.
    "--max-total-tokens": "32768",
}


def gpu_present() -> bool:
    """Whether this machine has a GPU driver; imports nothing and starts nothing on it."""
    return any(path.exists() for path in DRIVER_FILES)


def environment(base: Mapping[str, str], ranks: int = 1) -> dict[str, str]:
    """A copy of ``base`` in which SGLang takes its CPU path and finds the stand-in for its kernel library.

    Args:
        ranks: of tensor parallelism.
    """
    paths = [str(STAND_IN), *filter(None, [base.get("PYTHONPATH")])]
    # Idle OpenMP threads sleep: spinning ones make small operations a hundred times slower on a machine with few cores
    # and anything else to do.
    wanted = {"OMP_WAIT_POLICY": "passive"}
    if ranks > 1:
        # Where the library of NCCL can be loaded, ranks would meet by it, on GPUs; where it cannot, they do by gloo.
        wanted["SGLANG_NCCL_SO_PATH"] = "nowhere (there is no GPU)"
        # SGLang wants a NUMA node for each rank, or to be told which cores a rank may use.
        cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
        wanted["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join([cores] * ranks)
    return wanted | dict(base) | {"SGLANG_USE_CPU_ENGINE": "1", "PYTHONPATH": os.pathsep.join(paths)}


def ranks_of(given: list[str]) -> int:
    """The tensor parallelism that a server's arguments ask for."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--tp-size", "--tensor-parallel-size", type=int, default=1)
    return int(parser.parse_known_args(given)[0].tp_size)


def server_arguments(given: list[str]) -> list[str]:
    """``given`` preceded by what a plain CPU needs, less the flags that are given."""
    named = {argument.split("=", 1)[0] for argument in given}
    needed = [
        word
        for flag, value in SERVER_ARGUMENTS.items()
        if flag not in named
        for word in (flag, value)
        if word is not None
    ]
    return needed + given


def engine_arguments() -> dict[str, object]:
    """The same for `sgl.Engine`, under ``hata-cpu python``; nothing on a machine with a GPU."""
    if gpu_present():
        return {}
    named = {flag.removeprefix("--").replace("-", "_"): value for flag, value in SERVER_ARGUMENTS.items()}
    return {name: True if value is None else int(value) if value.isdigit() else value for name, value in named.items()}
