"""What all tests share: reproducible property tests, the default model, and which tests need a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

from sglang_hata.cpu import gpu_present

# Shared machines stall now and then; a failing example is printed with what reproduces it.
settings.register_profile("hata", deadline=None, print_blob=True)
settings.load_profile("hata")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-families", action="store_true", help="serve every family of models that has a test")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    skipped = {} if gpu_present() else {"gpu": "needs an NVIDIA GPU: make test-gpu"}
    if not config.getoption("--all-families"):
        skipped["more"] = "one of many: make test-families"
    for item in items:
        for marker, reason in skipped.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def model() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder; downloaded and converted once a machine."""
    from hata_rag.model import default_model

    return default_model(print)
