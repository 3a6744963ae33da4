"""Parameters of one stage that others read, on real ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist

from autopar.runtime.tied_parameters import Tied, TiedParameters
from tests.e2e.pool import RankPool

TIED = (
    Tied("head", 0, (1, 2), (3, 2), torch.float64),
    Tied("back", 2, (0,), (2,), torch.float32),
    Tied("nothing", 1, (2,), (0, 5), torch.float32),
)


def value(name: str, stage: int) -> torch.Tensor:
    tied = next(t for t in TIED if t.name == name)
    count = torch.Size(tied.shape).numel()
    return torch.arange(count, dtype=tied.dtype).view(tied.shape) * (stage + 1) + stage


def borrow_and_give_back() -> None:
    group = dist.group.WORLD
    assert group is not None
    stage = dist.get_rank()
    ties = TiedParameters(group, TIED, torch.device("cpu"))
    stored = {t.name: value(t.name, stage) for t in TIED if t.owner == stage}
    borrowed = ties.borrow(stored)
    assert set(borrowed) == {t.name for t in TIED if stage in t.users}
    for tied in TIED:
        if stage in tied.users:
            assert torch.equal(borrowed[tied.name], value(tied.name, tied.owner))
    # Stage 1 has no gradient of the head: it counts as zeros.
    given = {} if stage == 1 else {name: value(name, stage) for name in borrowed}
    added = ties.give_back(given)
    assert set(added) == set(stored)
    if stage == 0:
        assert torch.equal(added["head"], value("head", 2))
    if stage == 2:
        assert torch.equal(added["back"], value("back", 0))


def test_stages_borrow_parameters_and_give_gradients_back() -> None:
    with RankPool(3) as pool:
        pool.run(borrow_and_give_back)
