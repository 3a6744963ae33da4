"""Ops on a parameter of which a rank's piece is several runs of a dim, against the whole tensor."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from .on_stage_cases import net

_SHAPE = (12, 6)
_ROW = torch.arange(6.0, dtype=torch.float64)
_OTHER = torch.arange(72.0, dtype=torch.float64).view(_SHAPE)

READ: dict[str, Callable[[Tensor], Tensor]] = {
    "norm": lambda p: p.norm(),
    "norm of columns": lambda p: p.norm(dim=0),
    "norm of rows": lambda p: p.norm(dim=1),
    "largest": lambda p: p.norm(float("inf")),
    "norms of a list": lambda p: torch._foreach_norm([p])[0],
    "products of a list": lambda p: torch._foreach_mul([p], [_OTHER])[0],
    "sum of columns": lambda p: p.sum(0),
    "mean of rows": lambda p: p.mean(1),
    "row": lambda p: p[0],
    "rows": lambda p: p[2:7],
    "columns": lambda p: p[:, 1:4],
    "rows by index": lambda p: p[torch.tensor([1, 3])],
    "embedding": lambda p: torch.nn.functional.embedding(torch.tensor([1, 4, 4, 11]), p),
    "transpose": lambda p: p.t(),
    "chunk": lambda p: p.chunk(3)[1],
    "split": lambda p: p.split(5)[1],
    "view": lambda p: p.view(3, 4, 6),
    "flatten": lambda p: p.flatten(),
    "expand": lambda p: p.expand(2, *_SHAPE),
    "matrix": lambda p: p @ p.t(),
    "vector": lambda p: p @ _ROW,
    "add": lambda p: p + _OTHER,
    "broadcast": lambda p: p + torch.ones(2, 1, 6, dtype=torch.float64),
    "softmax": lambda p: p.softmax(0),
    "sort": lambda p: p.sort(0)[0],
    "roll": lambda p: p.roll(1, 0),
    "flip": lambda p: p.flip(0),
    "cat": lambda p: torch.cat([p, p]),
    "cumsum": lambda p: p.cumsum(0),
    "triangle": lambda p: p.tril(),
}
WRITTEN: dict[str, Callable[[Tensor], Tensor]] = {
    "row": lambda p: p[0].zero_(),
    "copy": lambda p: p.copy_(_OTHER),
    "add": lambda p: p.add_(_ROW),
    "flat": lambda p: p.view(-1)[5:9].mul_(3),
    "column": lambda p: p.t()[1].fill_(2.0),
    "chunk": lambda p: p.chunk(3)[1].zero_(),
    "rows by index": lambda p: p.index_fill_(0, torch.tensor([1, 4]), 2.0),
    "mask": lambda p: p.masked_fill_(p > 0, 1.0),
}


def differing_ops(mesh: str) -> list[str]:
    """The ops that gave or wrote something else than on a whole tensor."""
    found = []
    parameter = net(mesh).qkv.detach()
    assert isinstance(parameter, DTensor) and parameter.shape == _SHAPE
    whole = parameter.full_tensor()
    for name, op in READ.items():
        value, wanted = op(parameter), op(whole)
        if isinstance(value, DTensor):
            value = value.full_tensor()
        if value.shape != wanted.shape or not torch.allclose(value, wanted):
            found.append(f"read: {name}")
    for name, op in WRITTEN.items():
        parameter = net(mesh).qkv.detach()
        whole = parameter.full_tensor().clone()
        op(parameter)
        op(whole)
        if not torch.equal(parameter.full_tensor(), whole):
            found.append(f"write: {name}")
    return found
