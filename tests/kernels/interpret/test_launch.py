"""On which device a kernel is launched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from autopar.runtime.kernels import launch as launching
from autopar.runtime.kernels.emit import Kernel


class OnGpu(torch.Tensor):
    """A tensor that says it is on the second GPU."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", 1)


@pytest.mark.parametrize("on_gpu", [True, False])
def test_the_gpu_of_the_tensors_is_current(on_gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    current, seen = [torch.device("cuda", 0)], []

    @contextmanager
    def device(wanted: torch.device) -> Iterator[None]:
        current.append(wanted)
        yield
        current.pop()

    class Function:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *_, **__: seen.append(current[-1].index)

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(launching, "load", lambda kernel: Function())
    plain = torch.ones(2)
    tensor = plain.as_subclass(OnGpu) if on_gpu else plain
    launching.launch(Kernel("k", ""), (1,), 3, tensor, plain)
    assert seen == [1 if on_gpu else 0]
    assert [d.index for d in current] == [0]
