"""What all tests share: reproducible property tests, the default model, and which tests need a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

from sglang_hata.cpu import gpu_present

# Shared machines stall now and then; a failing example is printed with what reproduces it.
settings.register_profile("hata", deadline=None, print_blob=True)
settings.load_profile("hata")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not gpu_present():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU: make test-gpu"))


@pytest.fixture(scope="session")
def model() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder; downloaded and converted once a machine."""
    from hata_rag.model import default_model

    return default_model(print)
