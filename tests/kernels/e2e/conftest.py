"""These tests train with kernels in Triton's interpreter, which every process must choose at once."""

import importlib.util
import os
import sys

import pytest

if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError("triton is imported already: run tests/kernels/e2e by itself")
os.environ["TRITON_INTERPRET"] = "1"

HAS_TRITON = importlib.util.find_spec("triton") is not None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not HAS_TRITON:
        for item in items:
            item.add_marker(pytest.mark.skip(reason="Triton is not installed"))
