"""A user's `autograd.Function` as one callable op."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from autopar import compat


class AutogradFunctionOp:
    """Runs the forward of a user's `torch.autograd.Function`, and its backward in the backward.

    Called with the tensors it was captured with, by position; returns a tuple of tensors. Sizes
    other than the captured batch size are constants inside.
    """

    def __init__(
        self,
        name: str,
        forward: torch.fx.GraphModule,
        backward: torch.fx.GraphModule,
        options: dict[str, Any],
    ) -> None:
        self.__name__ = name
        self.__qualname__ = name
        self.__module__ = __name__
        self.forward = forward
        self.backward = backward
        self.options = options

    def renamed(self, name: str) -> AutogradFunctionOp:
        """The same function under another name."""
        if name == self.__name__:
            return self
        return AutogradFunctionOp(name, self.forward, self.backward, self.options)

    @property
    def non_differentiable(self) -> tuple[int, ...]:
        return tuple(self.options.get("non_differentiable_idx") or ())

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        result = compat.autograd_function_apply(
            self.forward, self.backward, *tensors, **self.options
        )
        return tuple(result) if isinstance(result, (tuple, list)) else (result,)

    def text(self) -> str:
        """The code of both directions, for fingerprints."""
        return f"{_text(self.forward)}\n{_text(self.backward)}\n{sorted(self.options.items())}"

    def __repr__(self) -> str:
        return self.__name__


def _text(module: torch.fx.GraphModule) -> str:
    """The code of a graph, whose variables are named after the caller's, with names of its own."""
    graph = torch.fx.Graph()
    env: dict[torch.fx.Node, torch.fx.Node] = {}
    for number, node in enumerate(module.graph.nodes):
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), env.__getitem__)
        target = f"v{number}" if node.op == "placeholder" else node.target
        env[node] = graph.create_node(node.op, target, args, kwargs, f"v{number}")
    parts = [_text(m) for m in module.children() if isinstance(m, torch.fx.GraphModule)]
    return "\n".join([str(graph), *parts])


class TracedFunctions:
    """Lets `AutogradFunctionOp`s appear in a trace as single ops.

    Each is registered as a temporary custom op, because that is what every tracing mode of torch
    understands; `of` gives the op object back for the trace's node target.
    """

    def __init__(self) -> None:
        self._library = compat.new_registrations("autopar_traced")
        self._functions: dict[Any, AutogradFunctionOp] = {}

    def trace(self, function: AutogradFunctionOp, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        name = f"function_{next(_counter)}"
        self._library.define(f"{name}(Tensor[] tensors) -> Tensor[]")

        def fake(tensors: list[Tensor]) -> list[Tensor]:
            outputs, _ = torch.fx.Interpreter(function.forward).run(*tensors)
            inputs = {id(tensor) for tensor in tensors}
            return [torch.empty_like(out) if id(out) in inputs else out for out in outputs]

        self._library.impl(name, fake, "CompositeExplicitAutograd")
        torch.library.register_fake(f"autopar_traced::{name}", fake, lib=self._library)
        op = getattr(torch.ops.autopar_traced, name).default
        self._functions[op] = function
        return tuple(op(list(tensors)))

    def __len__(self) -> int:
        return len(self._functions)

    def of(self, target: object) -> AutogradFunctionOp | None:
        return self._functions.get(target)


_counter = itertools.count()
