"""These tests compile kernels for GPUs that are not here; Triton's interpreter rules that out."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile

import pytest

from autopar.runtime.kernels.support import interpreted

if interpreted():
    raise pytest.UsageError("run tests/kernels/ahead by itself, without TRITON_INTERPRET")

HAS_TRITON = importlib.util.find_spec("triton") is not None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not HAS_TRITON:
        for item in items:
            item.add_marker(pytest.mark.skip(reason="Triton is not installed"))


def pytest_configure(config: pytest.Config) -> None:
    """A cache of compiled kernels of its own, so that every run compiles them."""
    folder = tempfile.mkdtemp(prefix="autopar-triton-")
    os.environ["TRITON_CACHE_DIR"] = folder
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
