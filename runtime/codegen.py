"""Turn one rank's graph into a Python function: one statement per op, dead values freed."""

from __future__ import annotations

import linecache
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx

from autopar.ir.graph import Graph
from autopar.ir.lowered import GroupRef, LoweredOp

from .group import Group

Node = torch.fx.Node


@dataclass(frozen=True)
class Compiled:
    """The function of a graph (placeholders in, flat tuple of outputs out) and its source text."""

    run: Callable[..., tuple[Any, ...]]
    source: str


def compile_graph(
    graph: Graph,
    bind: Callable[[LoweredOp], Callable[..., Any]],
    groups: Mapping[tuple[str, ...], Group],
    name: str = "forward",
) -> Compiled:
    """Generate and compile the function of a lowered graph.

    `bind` gives the implementation of a lowered op and `groups` the live group of a `GroupRef`.
    """
    writer = _Writer(bind, groups)
    names = {node: f"v_{node.name}" for node in graph.fx.nodes}
    last = _last_uses(graph)
    parameters = ", ".join(names[n] for n in graph.placeholders())
    lines = [f"def {name}({parameters}):"]
    for node in graph.fx.nodes:
        if node.op == "call_function":
            lines.append(f"    {names[node]} = {writer.call(node, names)}{_comment(node)}")
            dead = [names[n] for n in last.get(node, ()) if n.op != "output"]
            if dead:
                lines.append(f"    del {', '.join(dead)}")
        elif node.op == "output":
            lines.append(f"    return {writer.text(tuple(node.args[0]), names)}")
    source = "\n".join(lines) + "\n"
    filename = f"<autopar {name} {id(writer):x}>"
    namespace = dict(writer.globals)
    exec(compile(source, filename, "exec"), namespace)
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    return Compiled(namespace[name], source)


def _last_uses(graph: Graph) -> dict[Node, list[Node]]:
    """Which values are used for the last time by each node; never used ones die at birth."""
    last: dict[Node, Node] = {}
    for node in graph.fx.nodes:
        if node.op == "call_function":
            last[node] = node
        for source in node.all_input_nodes:
            last[source] = node
    found: dict[Node, list[Node]] = {}
    for value, user in last.items():
        found.setdefault(user, []).append(value)
    return found


def _comment(node: Node) -> str:
    source = node.meta.get("source")
    return f"  # {source}" if source else ""


class _Writer:
    """Writes arguments as Python text; what has no literal becomes a global constant."""

    def __init__(
        self,
        bind: Callable[[LoweredOp], Callable[..., Any]],
        groups: Mapping[tuple[str, ...], Group],
    ) -> None:
        self.bind = bind
        self.groups = groups
        self.globals: dict[str, Any] = {}

    def call(self, node: Node, names: Mapping[Node, str]) -> str:
        if node.target is operator.getitem:
            return f"{self.text(node.args[0], names)}[{self.text(node.args[1], names)}]"
        target: Any = node.target
        if isinstance(target, LoweredOp):
            function: Any = self.bind(target)
            label = target.name
        else:
            function = target
            label = str(getattr(target, "name", lambda: getattr(target, "__name__", "op"))())
        spot = self.constant(function, re.sub(r"\W+", "_", label.replace("aten::", "")))
        arguments = [self.text(arg, names) for arg in node.args]
        arguments += [f"{key}={self.text(value, names)}" for key, value in node.kwargs.items()]
        return f"{spot}({', '.join(arguments)})"

    def constant(self, value: Any, label: str) -> str:
        name = f"{label}"
        index = 0
        while name in self.globals and self.globals[name] is not value:
            index += 1
            name = f"{label}_{index}"
        self.globals[name] = value
        return name

    def text(self, item: Any, names: Mapping[Node, str]) -> str:
        if isinstance(item, torch.fx.Node):
            return names[item]
        if isinstance(item, GroupRef):
            return self.constant(self.groups[item.axes], f"group_{'_'.join(item.axes)}")
        if isinstance(item, tuple):
            inner = ", ".join(self.text(i, names) for i in item)
            return f"({inner},)" if len(item) == 1 else f"({inner})"
        if isinstance(item, list):
            return f"[{', '.join(self.text(i, names) for i in item)}]"
        if item is None or isinstance(item, (bool, int, str)):
            return repr(item)
        if isinstance(item, float) and item == item and abs(item) != float("inf"):
            return repr(item)
        return self.constant(item, f"{type(item).__name__.lower()}_{len(self.globals)}")
