"""Where kernels run, and that each reason why one does not is told once, with its name."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator

import pytest
import torch

from autopar.errors import KernelWarning
from autopar.runtime.kernels import support
from autopar.runtime.kernels.support import imported_to_compile, interpreted, unsupported, usable


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    """What was told and found out before counts for nothing, and is not kept either."""
    remembering = (support.fall_back, support._no_place)
    for each in remembering:
        each.cache_clear()
    yield
    for each in remembering:
        each.cache_clear()


X = torch.zeros(8)


def test_this_process_interprets() -> None:
    assert interpreted() and not imported_to_compile()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert usable("k", X, X.bfloat16(), X.half(), X.double(), X.long())


@pytest.mark.parametrize(
    ("x", "limits", "why"),
    [
        (X.to(torch.float8_e5m2), {}, "it has no form for float8_e5m2"),
        (X.half(), {"dtypes": {torch.float32}}, "it has no form for float16"),
        (X.double(), {"float64": False}, "it has no form for float64"),
        (X, {"largest": 7}, "8 elements are more than the 7 that its offsets reach"),
        (X.to("meta"), {}, "it has no form for meta devices"),
        (torch.empty(1).expand(1 << 31), {}, "2147483648 elements are more than the 2147483647"),
    ],
)
def test_one_warning_with_kernel_and_reason(
    x: torch.Tensor, limits: dict[str, object], why: str
) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert not usable("k", x, **limits) and not usable("k", x, **limits)
    (warning,) = told
    assert warning.category is KernelWarning
    assert str(warning.message).startswith(f"kernel k: {why}")
    assert str(warning.message).endswith("; its torch reference runs instead")
    with pytest.warns(KernelWarning, match=f"kernel another: {why}"):
        assert not usable("another", x, **limits)


def test_the_second_tensor_counts_too() -> None:
    assert unsupported(X, X.to(torch.float8_e5m2)) == "it has no form for float8_e5m2"


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(4, dtype=torch.complex64).conj(),
        torch.zeros(4, dtype=torch.complex64).conj().imag,
    ],
)
def test_what_memory_does_not_hold(x: torch.Tensor) -> None:
    """A kernel reads addresses, behind which the values have the other sign."""
    why = "a tensor is a view that negates or conjugates what is in memory"
    assert unsupported(X, x) == why
    assert unsupported(X, x.resolve_conj().resolve_neg()) is None


@pytest.mark.parametrize("text", ["1", "true", "True", "on", "yes", "Y", "0", "off", ""])
def test_the_interpreter_is_asked_for_as_triton_reads_it(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    knobs = pytest.importorskip("triton.knobs")
    monkeypatch.setenv("TRITON_INTERPRET", text)
    assert interpreted() == knobs.runtime.interpret


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.warns(KernelWarning, match="kernel k: Triton is not installed; its torch"):
        assert not usable("k", X)


def test_on_cpu_without_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    assert unsupported(X) == "it runs on GPUs (or under TRITON_INTERPRET=1)"


def test_on_an_old_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    why = support._no_place(torch.device("cuda", 0))
    assert why == "Tesla V100 is older than compute capability 8.0"
