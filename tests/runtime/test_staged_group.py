"""Messages through the host: what the inner group gives, on the tensor's own device."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from autopar.runtime import staged_group
from autopar.runtime.group import Group
from autopar.runtime.staged_group import HostStagedGroup, ranks_share_devices
from autopar.runtime.thread_world import ThreadWorld, run_threads

RANKS = 3
CALLS: dict[str, Callable[[Group, Tensor], Tensor]] = {
    "all_reduce": lambda group, x: group.all_reduce(x).wait(),
    "largest": lambda group, x: group.all_reduce(x, "max").wait(),
    "all_gather": lambda group, x: group.all_gather(x[: group.rank + 1], [1, 2, 3]).wait(),
    "reduce_scatter": lambda group, x: group.reduce_scatter(x, [1, 2, 3]).wait(),
    "all_to_all": lambda group, x: group.all_to_all(x, [2] * RANKS, [2] * RANKS).wait(),
    "broadcast": lambda group, x: group.broadcast(x, 1).wait(),
}


@pytest.mark.parametrize("name", CALLS)
def test_same_as_the_inner_group(name: str) -> None:
    world = ThreadWorld(RANKS)

    def run(rank: int) -> tuple[Tensor, Tensor, bool]:
        x = torch.arange(12.0).view(6, 2) * (rank + 1)
        before = x.clone()
        inner = world.group(rank)
        staged = CALLS[name](HostStagedGroup(inner), x)
        return staged, CALLS[name](inner, x), torch.equal(x, before)

    for staged, plain, untouched in run_threads(world, run):
        assert torch.equal(staged, plain)
        assert untouched


def test_in_place_writes_to_what_was_given() -> None:
    world = ThreadWorld(RANKS)

    def run(rank: int) -> tuple[Tensor, Tensor]:
        x = torch.full((4,), float(rank))
        out = HostStagedGroup(world.group(rank)).all_reduce(x, in_place=True).wait()
        return x, out

    for x, out in run_threads(world, run):
        assert x.data_ptr() == out.data_ptr()
        assert torch.equal(x, torch.full((4,), 3.0))


def test_gpus_are_shared_when_there_are_more_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert not ranks_share_devices()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    staged_group._tell.cache_clear()
    with pytest.warns(UserWarning, match="4 ranks of this host see 2 GPUs: they share"):
        assert ranks_share_devices()
    with warnings.catch_warnings():  # once
        warnings.simplefilter("error")
        assert ranks_share_devices()
