"""Inputs that are indices, checked on every rank before a step: a wrong one would fail on one rank.

The others would wait for it in a collective, for ever if the user's loop catches the error.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.fx
from torch import Tensor

from .cost.families import op_name
from .ir.graph import Graph, value_of
from .ir.rules.common import arguments
from .token_ops import cross_entropy

_VIEWS = ("view", "reshape", "flatten", "contiguous", "transpose", "t", "permute", "unsqueeze")


@dataclass(frozen=True)
class Indices:
    """An input by its number, that is used as indices below `bound`; `ignored` may be there, too.

    `what` says what uses it.
    """

    number: int
    bound: int
    ignored: int | None
    what: str


def indices_of(graph: Graph) -> tuple[Indices, ...]:
    """Inputs that are looked up in a table, or are classes, as they come or viewed otherwise."""
    found: list[Indices] = []
    for number, node in enumerate(graph.placeholders("input")):
        for user in _users(node):
            made = _use(number, user[0], user[1])
            if made is not None and made not in found:
                found.append(made)
    return tuple(found)


def check_indices(indices: Sequence[Indices], inputs: Sequence[Tensor]) -> None:
    """Raise IndexError, on all ranks alike, for an index that is out of bounds.

    Inputs on accelerators are left to their kernels.
    """
    for use in indices:
        tensor = inputs[use.number]
        if tensor.device.type != "cpu" or not tensor.numel():
            continue
        low, high = (int(x) for x in tensor.aminmax())
        if low >= 0 and high < use.bound:
            continue
        wrong = (tensor < 0) | (tensor >= use.bound)
        if use.ignored is not None:
            wrong &= tensor != use.ignored
        if bool(wrong.any()):
            value = int(tensor[wrong][0])
            raise IndexError(f"index {value} is out of bounds for {use.what} of size {use.bound}")


def _users(node: torch.fx.Node) -> Iterator[tuple[torch.fx.Node, torch.fx.Node]]:
    for user in node.users:
        if user.op != "call_function":
            continue
        if op_name(user.target) in _VIEWS:
            yield from _users(user)
        else:
            yield user, node


def _use(number: int, user: torch.fx.Node, index: torch.fx.Node) -> Indices | None:
    name = op_name(user.target)
    if name not in ("embedding", "cross_entropy", "cross_entropy_loss", "nll_loss"):
        return None
    given = arguments(user)
    if name == "embedding":
        rows = value_of(given["weight"]).shape[0]
        if given["indices"] is not index or not _is_number(rows):
            return None
        return Indices(number, int(rows), None, "a table")
    scores = value_of(given["self"]).shape
    last = len(scores) == 1 or user.target is cross_entropy.default
    classes = scores[-1] if last else scores[1]
    if given.get("target") is not index or not _is_number(classes):
        return None
    if value_of(index).dtype.is_floating_point:  # probabilities of classes
        return None
    ignored = given.get("ignore_index", -100)
    return Indices(number, int(classes), int(ignored), "classes")


def _is_number(size: object) -> bool:
    return isinstance(size, int) or getattr(size, "is_Integer", False)
