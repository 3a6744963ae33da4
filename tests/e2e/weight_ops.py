"""Ops on parameters outside of forward: what they return or write must be one device's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

import autopar
from tests.e2e.weight_loops import adamw, small, steps

PARAMETERS = ("up.weight", "table.weight", "down.weight")  # of one, no dim divides by two


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def ids(*values: int) -> Tensor:
    return torch.tensor(values)


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.float64)


def beside(p: Tensor) -> Tensor:
    return drawn(*p.shape)


RETURNED: dict[str, Callable[[Any], Any]] = {
    "norms": lambda p: (p.norm(), p.norm(p=1, dim=0), p.norm(dim=1, keepdim=True)),
    "stacked scalars": lambda p: torch.stack([p.norm(), p.sum(), p.max()]),
    "joined parts": lambda p: torch.cat([p.norm()[None], p.mean()[None], p[0]]),
    "of sums": lambda p: (p.sum(0).relu(), p.sum(0) * p.sum(0), p.sum().abs(), 3 - p.norm()),
    "means": lambda p: (p.mean(), p.mean(0), p.std(), p.var(1), p - p.mean(0)),
    "orders": lambda p: (p.median(), p.sort(0), p.topk(3, 0), p.quantile(0.3, dim=0)),
    "extremes": lambda p: (p.max(1), p.argmax(), p.aminmax(), p.cummax(0)),
    "data-dependent": lambda p: (p[p > 0], (p > 0).nonzero(), p.sign().unique()),
    "losses": lambda p: (F.mse_loss(p, beside(p)), F.smooth_l1_loss(p, beside(p))),
    "cross-entropy": lambda p: F.cross_entropy(p, torch.zeros(len(p), dtype=torch.long)),
    "rows": lambda p: (p[ids(1, 3)], p[-1], p[torch.arange(len(p)) % 2 == 0], p[1:5:2]),
    "elements": lambda p: (p[ids(1, 3), ids(2, 0)], p.take(ids(1, 20))),
    "gathered": lambda p: (p.gather(0, ids(1, 2)[:, None]), p.gather(1, ids(1, 2)[:, None])),
    "embedded": lambda p: (F.embedding(ids(1, 3), p).sum(), F.embedding(ids(1, 3), p) + 1),
    "scattered": lambda p: p.scatter_add(0, p.argmin(0, keepdim=True), ones(1, p.shape[1])),
    "products": lambda p: (p @ p.t(), p @ drawn(p.shape[1], 3), torch.outer(p[0], p[:, 0])),
    "decompositions": lambda p: (torch.linalg.svdvals(p), torch.linalg.matrix_norm(p, 2)),
    "transforms": lambda p: (torch.fft.fft(p).abs(), torch.fft.rfft2(p).abs()),
    "convolved": lambda p: F.conv1d(p[:, None], drawn(2, 1, 3)),
    "shapes": lambda p: (p.t().reshape(-1), p.flip(0), p.roll(1, 0), p.unfold(0, 3, 2)),
    "strided": lambda p: (p.as_strided((3, 2), (1, 2)), p.diagonal(), p.tril()),
    "pieces": lambda p: (p.split(3), p.chunk(2, 1), p.unbind(0), [row * 2 for row in p]),
    "mixed": lambda p: (p * drawn(p.shape[1]), p.lerp(beside(p), 0.3), p == beside(p)),
    "histogram": lambda p: (p.histc(5), torch.histogram(p, 4)[0]),
    "to Python": lambda p: torch.tensor([*p.tolist()[0], p.numpy()[1, 1], float(p.sum())]),
}


def _diagonal(p: Tensor) -> Any:
    return p.fill_diagonal_(3.0)


def _each_row(p: Tensor) -> None:
    for i, row in enumerate(p):
        row.mul_(i)


WRITTEN: dict[str, Callable[[Any], Any]] = {
    "a row": lambda p: p[0].fill_(0.5).add_(drawn(p.shape[1])),
    "each row": _each_row,
    "a column": lambda p: p[:, 2].zero_(),
    "masked": lambda p: p.__setitem__(p.abs() < 0.5, 0),
    "masked otherwise": lambda p: p.__setitem__(beside(p) > 0, p[beside(p) > 0] * 2),
    "masked rows": lambda p: p.masked_fill_((torch.arange(len(p)) > 4)[:, None], 1.5),
    "listed rows": lambda p: p.__setitem__([0, 2], drawn(2, p.shape[1])),
    "listed elements": lambda p: p.__setitem__((ids(1, 3), ids(0, 2)), 0.1),
    "swapped rows": lambda p: p.__setitem__(ids(0, 1), p[ids(1, 0)]),
    "index_fill_": lambda p: p.index_fill_(0, ids(2, 4), 0.3),
    "index_copy_": lambda p: p.index_copy_(1, ids(1, 3), ones(len(p), 2)),
    "index_add_": lambda p: p.index_add_(0, ids(1, 3, 1), ones(3, p.shape[1])),
    "scatter_": lambda p: p.scatter_(0, p.argmin(0, keepdim=True), 9.0),
    "scatter_add_": lambda p: p.scatter_add_(0, p.argmin(0, keepdim=True), ones(1, p.shape[1])),
    "fill_diagonal_": _diagonal,
    "a view of a view": lambda p: p.view(len(p), 2, -1)[:, 1].zero_(),
    "across": lambda p: p.t()[3].add_(p.sum()),
    "normalised": lambda p: p.div_(p.norm(dim=1, keepdim=True)).sub_(p.mean(0)),
    "products": lambda p: p.addmm_(drawn(len(p), 2), drawn(2, p.shape[1])),
    "renorm_": lambda p: p.renorm_(2, 0, 1.0),
    "all": lambda p: p.copy_(drawn(p.shape[1])).mul_(beside(p)),
}


def differing(options: dict[str, Any]) -> list[str]:
    """Ops that give something else than on an ordinary tensor, as `parameter: op`."""
    model = small(lambda module: autopar.parallelize(module, **options))
    steps(model, adamw(model), 0, 1)
    found = []
    for name in PARAMETERS:
        parameter = model.get_parameter(name).detach()
        whole = parameter.full_tensor().clone()
        for op, make in RETURNED.items():
            if not _same(make(parameter), make(whole)):
                found.append(f"{name}: {op}")
        for op, change in WRITTEN.items():
            ours, plain = parameter.clone(), whole.clone()
            change(ours)
            change(plain)
            if not _same(ours, plain):
                found.append(f"{name}: {op}")
    return found


def _same(ours: Any, plain: Any) -> bool:
    pairs = list(zip(tree_leaves(ours), tree_leaves(plain), strict=True))
    return all(
        a.shape == b.shape and a.dtype == b.dtype and torch.allclose(_whole(a), b, 1e-9, 1e-9)
        for a, b in pairs
    )


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
