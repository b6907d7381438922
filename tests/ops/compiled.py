"""What the kernels are compiled into, for GPUs that need not be there; `test_kernels_compiled.py` runs this file.

Kernels are launched as always, but on CPU tensors and with a driver that only compiles: the launchers choose every
constant, and Triton's own ptxas makes machine code of it. So a version of Triton that does not take a kernel is found
on a CPU, and so is code that has lost what its speed rests on.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from hata_kernels import attend, encode, launch, plan, reference, score, topk, workspace
from hata_kernels.decode import hata_decode_step
from hata_kernels.plan import plan_step
from hata_kernels.reference import Budget
from hata_kernels.score import TOKENS
from hata_kernels.workspace import DecodeWorkspace

MULTIPROCESSORS = 132  # of an H100 or H200
# Bytes of shared memory that a Hopper multiprocessor has for programs, and that a launch gets unasked.
SHARED, UNASKED = 227 * 1024, 48 * 1024
FEW, MORE = 1, 8
# Of a multiprocessor, and of the score kernel's programs there: one of 16 warps, or two of 8.
REGISTERS, SCORE_THREADS = 65_536, 512


class Form(NamedTuple):
    """What a step is compiled for."""

    kv_heads: int = 8
    group: int = 4
    head_dim: int = 128
    bits: int = 128
    scoring: str = reference.HAMMING
    selection: str = reference.SAMPLED
    kv_dtype: torch.dtype = torch.bfloat16
    sized: bool = False


class Kernel(NamedTuple):
    """A kernel's machine code, and bytes of shared memory that Triton asks for."""

    cubin: bytes
    shared: int

    def dump(self, folder: Path, what: str) -> str:
        path = folder / "kernel.cubin"
        path.write_bytes(self.cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, what, str(path)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def usage(self, folder: Path) -> dict[str, int]:
        """Registers and bytes of stack and of static shared memory."""
        return {
            name: int(count)
            for name, count in re.findall(r"(REG|STACK|SHARED):(\d+)", self.dump(folder, "--dump-resource-usage"))
        }

    def loops(self, folder: Path) -> list[list[str]]:
        """The instructions of each loop, by their names: from a branch's target, before it, to the branch."""
        instruction = r"/\*([0-9a-f]{4,})\*/ +(?:@!?U?P\w+ +)?(\w[\w.]*)([^;]*);"  # address, name, operands
        found = re.findall(instruction, self.dump(folder, "--dump-sass"))
        at = {int(address, 16): i for i, (address, _, _) in enumerate(found)}
        loops = []
        for i, (_, name, operands) in enumerate(found):
            target = re.search(r"0x([0-9a-f]+)", operands) if name.startswith("BRA") else None
            if target and (start := at[int(target[1], 16)]) < i:
                loops.append([name for _, name, _ in found[start : i + 1]])
        return loops


class CompilingDriver:
    """What Triton asks a GPU for, between compiling a kernel and not launching it."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED, "multiprocessor_count": MULTIPROCESSORS}

    def map_python_to_cpp_type(self, name: str) -> str:
        return name

    def load_binary(self, *binary: Any) -> tuple[int, ...]:
        return 0, 0, 0, 0, 1024  # module, function, registers, spills, threads

    def unload_module(self, module: int) -> None:
        pass

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *arguments: None


KERNELS = {
    "hash": encode.hash_decode_step_kernel,
    "score": score.score_kernel,
    "compact": topk.compact_kernel,
    "attend": attend.attend_kernel,
    "plan": plan.plan_kernel,
    "hash rows": encode.hash_rows_kernel,
}


@pytest.fixture(autouse=True)
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver for the test's compute capability, 9.0 unless it has a parameter of that name."""
    assert not launch.INTERPRETED.value
    capability = (getattr(request.node, "callspec", None) and request.node.callspec.params.get("capability")) or 90
    monkeypatch.setattr(driver, "_active", CompilingDriver(capability))
    answers = {
        "multiprocessors": MULTIPROCESSORS,
        "overlaps_launches": capability >= 90,
        "spreads_early": capability in (90, 100),
    }
    for module in (attend, encode, launch, plan, score, topk, workspace):
        for name, answer in answers.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, lambda device, answer=answer: answer)


def step(form: Form, batch: int, context: int = 131_072) -> dict[str, Kernel]:
    """All kernels of a step, compiled."""
    for kernel in KERNELS.values():
        kernel.device_caches.clear()
    kept = max(1024, context // 64)
    H, D, B = form.kv_heads, form.head_dim, batch
    room = DecodeWorkspace.allocate(
        max_batch=B,
        q_heads=H * form.group,
        kv_heads=H,
        head_dim=D,
        bits=form.bits,
        max_context=context,
        max_kept=kept,
        device=torch.device("cpu"),
        scoring=form.scoring,
        selection=form.selection,
    )
    q, k, v = (torch.zeros(B, heads, D, dtype=torch.bfloat16) for heads in (H * form.group, H, H))
    pools = [torch.zeros(64, H, D).to(form.kv_dtype) for _ in range(2)]
    codes = torch.zeros(64, H, form.bits // 32, dtype=torch.int32)
    sizes = torch.zeros(64, H, dtype=torch.int16) if form.sized else None
    projection = torch.zeros(2, H, D, form.bits, dtype=torch.int8)
    # Rows as SGLang has them: the longest context and four more.
    table, row = torch.zeros(B, context + 4, dtype=torch.int32), torch.zeros(B, dtype=torch.int64)
    plan_step(torch.full((B,), context), row, room, Budget(tokens=kept))
    encode.hash_rows(k, projection[reference.KEYS], codes, row, sizes)
    quantised = form.kv_dtype != torch.bfloat16
    tensors = q, k, v, *pools, codes, projection, table, row
    hata_decode_step(*tensors, room, sink=4, recent=16, scale=D**-0.5, size_cache=sizes, store_kv=not quantised)
    found = {}
    for name, kernel in KERNELS.items():
        (cache,) = (entry[0] for entry in kernel.device_caches.values())
        (compiled,) = cache.values()
        found[name] = Kernel(compiled.asm["cubin"], compiled.metadata.shared)
    return found


FORMS = {
    "Llama-3.1-8B": Form(),
    "the same, fp8": Form(kv_dtype=torch.float8_e4m3fn),
    "Llama-2-7B": Form(kv_heads=32, group=1),
    "Qwen2.5-0.5B": Form(kv_heads=2, group=7, head_dim=64),
    "the same, 256 bits": Form(kv_heads=2, group=7, head_dim=64, bits=256),
    "sixteen queries, 64 bits": Form(kv_heads=2, group=16, bits=64),
    "five KV heads": Form(kv_heads=5, group=3, head_dim=96),
    "head_dim 256": Form(kv_heads=1, group=2, head_dim=256),
    "one-sided": Form(scoring=reference.ONE_SIDED),
    "one-sided, with sizes": Form(scoring=reference.ONE_SIDED, sized=True),
    "with sizes": Form(sized=True),
    "the best tokens alone": Form(selection=reference.TOP),
}


ALONE = ["Llama-3.1-8B", "Llama-2-7B", "five KV heads", "one-sided", "one-sided, with sizes", "the best tokens alone"]


@pytest.mark.parametrize("batch", [FEW, MORE])
@pytest.mark.parametrize("name", FORMS)
def test_every_form_compiles_within_a_threads_registers(name: str, batch: int, tmp_path: Path) -> None:
    # Up to 3 requests, codes of 256 bits do not fit; what that costs was not measured.
    most = 256 if FORMS[name].bits == 256 and batch == FEW else 8
    for what, kernel in step(FORMS[name], batch).items():
        used = kernel.usage(tmp_path)
        assert used["STACK"] <= most, f"{what} puts {used['STACK']} bytes a thread into memory: {used}"
        if what == "score" and FORMS[name].bits == 128:
            assert used["REG"] * SCORE_THREADS <= REGISTERS, f"a multiprocessor has no room for all programs: {used}"


@pytest.mark.parametrize("capability", [80, 89, 100, 120])
def test_other_gpus(capability: int) -> None:
    """Ampere, Ada and both of Blackwell."""
    for batch in FEW, MORE:
        assert all(kernel.cubin for kernel in step(Form(), batch).values())


@pytest.mark.parametrize("batch", [FEW, MORE])
@pytest.mark.parametrize("name", ALONE)
def test_threads_of_the_score_kernel_keep_to_themselves(name: str, batch: int, tmp_path: Path) -> None:
    """No value of a tile goes from thread to thread, and no thread waits for another (kernels/README.md)."""
    scoring = [loop for loop in step(FORMS[name], batch)["score"].loops(tmp_path) if "POPC" in loop]
    assert scoring, "no loop counts bits"
    for loop in scoring:
        exchanges = [name for name in loop if re.match("BAR|SHFL|LDS|STS", name)]
        assert not exchanges, f"{exchanges} among {len(loop)} instructions"
        # Codes of a thread's tokens are loaded at once; and up to 3 requests, the slots of all of them, twice with
        # sizes, as Triton has two layouts for them.
        slots = (1 + FORMS[name].sized) * (batch == FEW)
        assert sum(name.startswith("LDG.E.128") for name in loop) == TOKENS + slots


def test_the_score_kernel_gets_its_shared_memory_unasked(tmp_path: Path) -> None:
    """Triton asks for what it takes itself, and knows nothing of the array that is declared in PTX."""
    for name, form in FORMS.items():
        for batch in FEW, MORE:
            kernel = step(form, batch)["score"]
            declared = kernel.usage(tmp_path)["SHARED"]
            assert declared > 4 * 256, "the array is gone"
            assert declared + kernel.shared <= UNASKED, f"{name}: {declared} and {kernel.shared} bytes"


def test_early_programs_of_attention_have_a_multiprocessor_each() -> None:
    """Else they crowd on those that are free first (`launch.spreads_early`)."""
    assert step(Form(), FEW)["attend"].shared > SHARED // 2
