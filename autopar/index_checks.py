"""Inputs that are indices, checked on every rank before a step: a wrong one would fail on one rank.

The others would wait for it in a collective, for ever if the user's loop catches the error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.fx
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .cost.families import op_name
from .ir.graph import Graph, value_of
from .ir.rules.common import arguments
from .token_ops import cross_entropy

# They give the values of their input in another order, and need not be run for a check of all.
_VIEWS = ("view", "reshape", "flatten", "contiguous", "transpose", "t", "permute", "unsqueeze")
# They give some of the values, or others: checks are of what they give.
_PARTS = (
    *("select", "slice", "narrow", "split", "split_with_sizes", "chunk", "unbind", "getitem"),
    *("squeeze", "expand", "to", "_to_copy", "clone", "detach", "alias", "lift_fresh_copy"),
)
_LOSSES = ("cross_entropy", "cross_entropy_loss", "nll_loss", "nll_loss_nd")


@dataclass(frozen=True)
class Indices:
    """An input by its number, that is used as indices from `lowest` on and below `bound`.

    `ignored` may be there, too. `what` says what uses it, `parts` what comes before that.
    """

    number: int
    bound: int
    ignored: int | None
    what: str
    lowest: int = 0
    parts: tuple[torch.fx.Node, ...] = ()

    def given_by(self, tensor: Tensor) -> Tensor:
        """The indices that an input has."""
        value: Any = tensor
        for node in self.parts:
            value = cast(Any, node.target)(value, *node.args[1:], **node.kwargs)
        found: Tensor = value
        return found


def indices_of(graph: Graph) -> tuple[Indices, ...]:
    """Inputs that are looked up in a table, or are classes, as they come, in part or as integers.

    Not followed are those that are computed with, and views and parts whose sizes are symbolic.
    """
    found: list[Indices] = []
    for number, node in enumerate(graph.placeholders("input")):
        for user, index, steps in _users(node, ()):
            made = _use(number, user, index)
            if made is None:
                continue
            made = replace(made, parts=_needed(steps))
            if made not in found and all(map(_is_fixed, made.parts)):
                found.append(made)
    return tuple(found)


def check_indices(indices: Sequence[Indices], inputs: Sequence[Tensor]) -> None:
    """Raise IndexError, on all ranks alike, for an index that is out of bounds.

    Inputs on accelerators are left to their kernels.
    """
    for use in indices:
        if inputs[use.number].device.type != "cpu":
            continue
        tensor = use.given_by(inputs[use.number])
        if tensor.device.type != "cpu" or not tensor.numel():
            continue
        low, high = (int(x) for x in tensor.aminmax())
        if low >= use.lowest and high < use.bound:
            continue
        wrong = (tensor < use.lowest) | (tensor >= use.bound)
        if use.ignored is not None:
            wrong &= tensor != use.ignored
        if bool(wrong.any()):
            value = int(tensor[wrong][0])
            raise IndexError(f"index {value} is out of bounds for {use.what} of size {use.bound}")


_Steps = tuple[torch.fx.Node, ...]


def _users(
    node: torch.fx.Node, steps: _Steps
) -> Iterator[tuple[torch.fx.Node, torch.fx.Node, _Steps]]:
    """What uses a value, the value as it is used, and the steps from the input to there."""
    for user in node.users:
        if user.op != "call_function":
            continue
        if op_name(user.target) in (*_VIEWS, *_PARTS):
            if user.args and user.args[0] is node:
                yield from _users(user, (*steps, user))
        else:
            yield user, node, steps


def _needed(steps: _Steps) -> _Steps:
    """The steps without views at the end."""
    while steps and op_name(steps[-1].target) in _VIEWS:
        steps = steps[:-1]
    return steps


def _is_fixed(step: torch.fx.Node) -> bool:
    """Whether the step reads nothing but its input."""
    return len(step.all_input_nodes) == 1 and not any(
        isinstance(a, torch.SymInt) for a in tree_leaves((step.args[1:], step.kwargs))
    )


def _use(number: int, user: torch.fx.Node, index: torch.fx.Node) -> Indices | None:
    name = op_name(user.target)
    if not isinstance(user.target, torch._ops.OpOverload) or _is_float(index):
        return None
    given = arguments(user)
    if name in ("embedding", "embedding_bag", "_embedding_bag"):
        if given["indices"] is not index:
            return None
        return _below(number, value_of(given["weight"]).shape[0], "a table")
    if name in ("gather", "index_select") and given["index"] is index:
        shape = value_of(given["self"]).shape
        return _below(number, shape[given["dim"]], "a dim") if shape else None
    if name == "index":
        return _indexed(number, given, index)
    if name in _LOSSES and given["target"] is index:
        scores = value_of(given["self"]).shape
        last = len(scores) == 1 or user.target is cross_entropy.default
        found = _below(number, scores[-1] if last else scores[1], "classes")
        return found and replace(found, ignored=int(given["ignore_index"]))
    return None


def _indexed(number: int, given: Mapping[str, Any], index: torch.fx.Node) -> Indices | None:
    """Of `tensor[index]`: negative indices count from the end."""
    places = [i for i, at in enumerate(given["indices"]) if at is index]
    masks = any(at is not None and not _is_index(at) for at in given["indices"])
    if not places or masks:
        return None
    shape = value_of(given["self"]).shape
    bounds = [_below(number, shape[place], "a dim") for place in places]
    known = [bound for bound in bounds if bound is not None]
    if not known:
        return None
    smallest = min(known, key=lambda use: use.bound)
    return replace(smallest, lowest=-smallest.bound)


def _below(number: int, bound: object, what: str) -> Indices | None:
    if not isinstance(bound, int) and not getattr(bound, "is_Integer", False):
        return None
    return Indices(number, int(cast(int, bound)), None, what)


def _is_float(node: torch.fx.Node) -> bool:
    return value_of(node).dtype.is_floating_point


def _is_index(node: torch.fx.Node) -> bool:
    return value_of(node).dtype in (torch.int64, torch.int32)
