"""Live bytes on CPU: what ops make until it is freed."""

from __future__ import annotations

import torch

from autopar.runtime.live_memory import LiveBytes, free_bytes, peak_bytes

CPU = torch.device("cpu")
MB = 1 << 20


def test_peak_of_a_chain() -> None:
    x = torch.ones(MB // 4, requires_grad=True)

    def step() -> None:
        y = x.detach()
        for _ in range(5):
            y = y * 2  # two at once: the old and the new

    assert peak_bytes(step, CPU, [x]) == 3 * MB


def test_views_are_one_storage_and_saved_tensors_live() -> None:
    x = torch.ones(MB // 4, requires_grad=True)
    live = LiveBytes([x, x.view(2, -1)])
    with live:
        assert live.now == MB
        y = x.exp().view(2, -1)
        assert live.now == 2 * MB
        z = y.sum()
        del y
        assert live.now == 2 * MB + 4  # exp keeps its output
        z.backward()
        del z
        assert live.now == 2 * MB  # x and its gradient
    live.close()


def test_free_bytes() -> None:
    assert free_bytes(CPU) > 16 * MB
