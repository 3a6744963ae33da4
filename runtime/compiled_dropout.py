"""A `torch.compile` backend under which a module draws the masks that any parallel plan would draw.

Dynamo's graph of a forward has its random calls as nodes. They are numbered in order, as
`PartitionInvariantDropout` numbers them when it runs op by op, and replaced by calls that read
their keys from one more input of the graph: a table made of the seed for every run. So nothing is
compiled again when the seed changes, and the compiler sees arithmetic that it can fuse.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from autopar.capture.explain import source_of
from autopar.compat import (
    backward_at_once,
    compile_backend,
    dynamo_graph_copy,
    fake_like,
    synthetic_input,
)
from autopar.errors import UserError

from .eager_random import SDPA, PartitionInvariantDropout, multi_head_attention, warn_native
from .random_keys import key_table

Node = torch.fx.Node
Inner = Callable[..., Any]


class UncompiledError(UserError):
    """A forward whose masks cannot be numbered in a graph."""


@dataclass
class MaskedRun:
    """A run of compiled code: `calls` counts its random calls, `started` says if any of it ran."""

    seed: int
    calls: int = 0
    started: bool = False

    @contextmanager
    def current(self) -> Iterator[MaskedRun]:
        """Draw the masks of what runs inside by this seed."""
        token = _RUN.set(self)
        try:
            yield self
        finally:
            _RUN.reset(token)


_RUN: ContextVar[MaskedRun] = ContextVar("masked_run")


class CompiledDropout:
    """The backend, around another one; what it compiled runs inside of a `MaskedRun`.

    What is raised before the run has started is of the compilation, UncompiledError from here.
    """

    def __init__(self, backend: str) -> None:
        self.inner = compile_backend(backend)

    def __call__(self, module: torch.fx.GraphModule, inputs: Sequence[Any]) -> Inner:
        draws = random_calls(module)
        if not draws:
            return _noting(self._compile(module, inputs))
        count, device = len(draws), device_of(draws[0])
        example = fake_like(key_table(0, 0, count, device), inputs)
        compiled = self._compile(with_key_table(module, example), [*inputs, example])

        def drawing(*args: Any) -> Any:
            run = _RUN.get()
            table = key_table(run.seed, run.calls, count, device)
            run.calls += count
            return compiled(*args, table)

        return _noting(drawing)

    def _compile(self, module: torch.fx.GraphModule, inputs: Sequence[Any]) -> Inner:
        with backward_at_once():  # if it fails, while the forward can still run op by op
            return self.inner(module, list(inputs))


@cache
def compiled_dropout(backend: str) -> CompiledDropout:
    """The one of a backend in this process: code that has another is compiled anew."""
    return CompiledDropout(backend)


def _noting(compiled: Inner) -> Inner:
    def noted(*args: Any) -> Any:
        _RUN.get().started = True
        return compiled(*args)

    return noted


def draw_dropout(table: Tensor, call: int, *args: Any, **kwargs: Any) -> Tensor:
    """`F.dropout` with the mask of a row of the table."""
    return PartitionInvariantDropout(table, call).drop(*args, **kwargs)


def draw_torch_dropout(table: Tensor, call: int, input: Tensor, p: float, train: bool) -> Tensor:
    """`torch.dropout` with the mask of a row of the table."""
    return PartitionInvariantDropout(table, call).drop(input, p, train)


def draw_attention(table: Tensor, call: int, *args: Any, **kwargs: Any) -> Tensor:
    """`F.scaled_dot_product_attention` with the mask of a row of the table."""
    return PartitionInvariantDropout(table, call).attend(*args, **kwargs)


def draw_multi_head(table: Tensor, call: int, *args: Any, **kwargs: Any) -> Any:
    """`F.multi_head_attention_forward` with the mask of a row of the table."""
    mode = PartitionInvariantDropout(table, call)
    return multi_head_attention(mode, F.multi_head_attention_forward, *args, **kwargs)


def _plain_drops(input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> bool:
    return training and p > 0.0


def _torch_drops(input: Any, p: float, train: bool) -> bool:
    return train and p > 0.0


def _attention_drops(*args: Any, **kwargs: Any) -> bool:
    return float(SDPA.bind(*args, **kwargs).arguments.get("dropout_p", 0.0)) > 0.0


def _multi_head_drops(*args: Any, **kwargs: Any) -> bool:
    bound = inspect.signature(F.multi_head_attention_forward).bind(*args, **kwargs)
    bound.apply_defaults()
    return bool(bound.arguments["training"]) and bound.arguments["dropout_p"] > 0.0


# What draws, by what is called instead and whether a call drops anything.
_DRAWS: dict[Any, tuple[Callable[..., Any], Callable[..., bool]]] = {
    F.dropout: (draw_dropout, _plain_drops),
    torch.dropout: (draw_torch_dropout, _torch_drops),
    F.scaled_dot_product_attention: (draw_attention, _attention_drops),
    F.multi_head_attention_forward: (draw_multi_head, _multi_head_drops),
}


def _is_random(node: Node) -> bool:
    if node.op == "call_function" and node.target is torch.dropout_:
        raise _uncompiled(node, "it draws dropout masks in place", "call F.dropout(x) in its place")
    if node.op != "call_function" or node.target not in _DRAWS:
        return False
    draws = _DRAWS[node.target][1]
    try:
        return draws(*node.args, **node.kwargs)
    except TypeError as error:  # of a node among the numbers
        raise _uncompiled(
            node,
            "a dropout's probability is not known when it is compiled",
            "make it a Python number that stays the same, such as an attribute of the module",
        ) from error


def _uncompiled(node: Node, what: str, fix: str) -> UncompiledError:
    return UncompiledError(what, source_of(node.meta.get("stack_trace") or "") or None, fix)


def random_calls(module: torch.fx.GraphModule) -> list[Node]:
    """The random calls of a graph in order, those in its recomputed regions included.

    Raises UncompiledError if one is where its number would not be known.
    """
    found: list[Node] = []
    for node in module.graph.nodes:
        if node.op == "call_function":
            warn_native(node.target, node.args, node.kwargs)
        if _is_random(node):
            found.append(node)
        for body in _bodies(module, node).values():
            inside = random_calls(body)
            if inside and not _is_checkpoint(node):
                name = getattr(node.target, "__name__", str(node.target))
                raise _uncompiled(
                    inside[0],
                    f"it draws dropout masks inside {name}",
                    f"call dropout before or after {name}",
                )
            found += inside
    return found


def device_of(node: Node) -> torch.device:
    """Where a call of a graph of Dynamo's has its result."""
    results = tree_leaves(node.meta.get("example_value"))
    return next((x.device for x in results if isinstance(x, Tensor)), torch.device("cpu"))


def with_key_table(module: torch.fx.GraphModule, example: Tensor) -> torch.fx.GraphModule:
    """A copy of the graph with a last input, the table of keys, which its random calls read."""
    return _numbered(module, example, 0)[0]


def _numbered(
    module: torch.fx.GraphModule, example: Tensor, first: int
) -> tuple[torch.fx.GraphModule, int]:
    """The copy, whose first random call has number `first`, and the number after its last."""
    new, call = dynamo_graph_copy(module), first
    table = synthetic_input(new.graph, "autopar_keys", example)
    for node in list(new.graph.nodes):
        if _is_random(node):
            node.args = (table, call, *node.args)
            node.target = _DRAWS[node.target][0]
            call += 1
        for name, body in _bodies(new, node).items():
            if random_calls(body):
                replaced, call = _numbered(body, example, call)
                setattr(new, name, replaced)
                node.args = (*node.args, table)
    new.graph.lint()
    new.recompile()
    return new, call


def _bodies(module: torch.fx.GraphModule, node: Node) -> dict[str, torch.fx.GraphModule]:
    """The graphs that an op gets, and a called submodule, by name."""
    names = [str(node.target)] if node.op == "call_module" else []
    if node.op == "call_function":
        names = [str(n.target) for n in node.all_input_nodes if n.op == "get_attr"]
    found = {name: getattr(module, name, None) for name in names}
    return {n: body for n, body in found.items() if isinstance(body, torch.fx.GraphModule)}


def _is_checkpoint(node: Node) -> bool:
    return getattr(node.target, "__name__", "") == "tag_activation_checkpoint"
