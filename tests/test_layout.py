"""The shape of the distribution: what it ships, what shadows what, who imports whom."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE_ROOTS = ("kernels", "rag_demo", "weights")


def python(code: str) -> str:
    """What a fresh interpreter prints when started, as a user would, in the repository's root."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_wheel_holds_four_packages(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    sources = tmp_path / "sources"  # a copy, as a build leaves folders beside the sources and takes in old ones
    sources.mkdir()
    tracked = subprocess.check_output(["git", "-C", str(ROOT), "ls-files"], text=True).splitlines()
    for name in tracked:
        if (ROOT / name).is_file():
            (sources / name).parent.mkdir(parents=True, exist_ok=True)
            (sources / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([*build, str(sources)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.split("/")[0] for name in archive.namelist()}
        names = archive.namelist()
        entry_points = archive.read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
    assert {top for top in tops if not top.endswith(".dist-info")} == {
        "sglang_hata",
        "hata_kernels",
        "hata_weights",
        "hata_rag",
    }
    assert "[sglang.srt.plugins]\nhata = sglang_hata:register" in entry_points
    assert "sglang_hata/cpu/site/sgl_kernel/__init__.py" in names
    trained = [name.removeprefix("weights/") for name in tracked if name.startswith("weights/hata_weights/data/")]
    assert set(trained) <= set(names)


def test_kernels_is_the_module_that_sglang_needs() -> None:
    assert "site-packages" in python("import kernels; print(kernels.__file__)")


@pytest.mark.parametrize("root", [*SOURCE_ROOTS, "tests"])
def test_source_roots_are_not_packages(root: str) -> None:
    assert not (ROOT / root / "__init__.py").exists()


def test_the_entry_point_imports_neither_torch_nor_sglang() -> None:
    assert python("import sys, sglang_hata; print({'torch', 'sglang'} & set(sys.modules))") == "set()"


def test_the_command_lines_import_neither_torch_nor_sglang() -> None:
    code = """
import pkgutil, sys, importlib, hata_rag, sglang_hata.cpu.cli, sglang_hata.config
for module in pkgutil.iter_modules(hata_rag.__path__, "hata_rag."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
print({"torch", "sglang"} & set(sys.modules))
"""
    assert python(code) == "set()"


def test_kernels_and_weights_do_not_import_the_plugin() -> None:
    code = """
import sys, hata_kernels.reference, hata_kernels.decode, hata_weights.artifact, hata_weights.rotation
print({"sglang", "sglang_hata", "hata_rag"} & set(sys.modules))
"""
    assert python(code) == "set()"


def test_links_between_documents_lead_somewhere() -> None:
    tracked = subprocess.check_output(["git", "-C", str(ROOT), "ls-files", "*.md"], text=True).splitlines()
    links = [(name, link) for name in tracked for link in re.findall(r"\]\(([^)\s]+)\)", (ROOT / name).read_text())]
    relative = [(name, link.partition("#")[0]) for name, link in links if "://" not in link and link[0] != "#"]
    assert len(relative) > 20
    assert [(name, link) for name, link in relative if not (ROOT / name).parent.joinpath(link).exists()] == []
