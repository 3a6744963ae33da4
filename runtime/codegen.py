"""Turn one rank's graph into a Python function: one statement per op, dead values freed."""

from __future__ import annotations

import linecache
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx

from autopar.ir.graph import Graph
from autopar.ir.lowered import GroupRef, LoweredOp
from autopar.ir.recomputed import SELECTIVE

from .group import Group
from .recompute import run_region
from .regions import Region, Step, kept_by, steps_of

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
    run: Callable[..., tuple[Any, ...]] = run_region,
) -> Compiled:
    """Generate and compile the function of a lowered graph.

    `bind` gives the implementation of a lowered op and `groups` the live group of a `GroupRef`.
    Regions that the backward recomputes become functions of their own, which `run` calls.
    """
    writer = _Writer(bind, groups)
    names = {node: f"v_{node.name}" for node in graph.fx.nodes}
    steps = steps_of(graph)
    parameters = ", ".join(names[n] for n in graph.placeholders())
    functions: list[str] = []
    lines = [f"def {name}({parameters}):"]
    for step, dead in zip(steps, _dead_after(steps), strict=True):
        if isinstance(step, Region):
            functions += _region_function(step, writer, names)
            lines.append(f"    {_region_call(step, writer, names, run)}")
        elif step.op == "call_function":
            lines.append(f"    {names[step]} = {writer.call(step, names)}{_comment(step)}")
        elif step.op == "output":
            results: Any = step.args[0]
            lines.append(f"    return {writer.text(tuple(results), names)}")
        lines += _deletion(dead, names)
    source = "\n".join([*functions, *lines]) + "\n"
    filename = f"<autopar {name} {id(writer):x}>"
    namespace = dict(writer.globals)
    exec(compile(source, filename, "exec"), namespace)
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    return Compiled(namespace[name], source)


def _region_function(region: Region, writer: _Writer, names: Mapping[Node, str]) -> list[str]:
    """The lines of a region's function; a selective one takes what keeps values first."""
    kept = kept_by(region)
    parameters = ["kept"] if region.mark.mode == SELECTIVE else []
    parameters += [names[n] for n in region.inputs]
    lines = [f"def {region.mark.region}({', '.join(parameters)}):"]
    for node, dead in zip(region.nodes, _dead_after(region.nodes, region.outputs), strict=True):
        call = writer.call(node, names, f"kept.{kept[node]}" if node in kept else "")
        lines.append(f"    {names[node]} = {call}{_comment(node)}")
        lines += _deletion([n for n in dead if n not in region.inputs], names)
    return [*lines, f"    return {writer.text(region.outputs, names)}", ""]


def _region_call(
    region: Region, writer: _Writer, names: Mapping[Node, str], run: Callable[..., Any]
) -> str:
    mark = region.mark
    flags = (mark.mode == SELECTIVE, mark.to_the_end, region.is_random)
    arguments = [mark.region, *map(str, flags), *(names[n] for n in region.inputs)]
    call = f"{writer.constant(run, 'run_region')}({', '.join(arguments)})"
    return f"{writer.text(region.outputs, names)} = {call}" if region.outputs else call


def _dead_after(steps: Sequence[Step], kept: Sequence[Node] = ()) -> list[list[Node]]:
    """Which values no later step needs, by step; those that nothing needs die at birth."""
    last: dict[Node, int] = {}
    for i, step in enumerate(steps):
        if isinstance(step, Region):
            last.update(dict.fromkeys((*step.outputs, *step.inputs), i))
        elif step.op == "call_function":
            last.update(dict.fromkeys((step, *step.all_input_nodes), i))
    found: list[list[Node]] = [[] for _ in steps]
    returned = {
        n
        for step in steps
        if isinstance(step, torch.fx.Node) and step.op == "output"
        for n in step.all_input_nodes
    }
    for value, i in last.items():
        if value not in kept and value not in returned:
            found[i].append(value)
    return found


def _deletion(dead: Sequence[Node], names: Mapping[Node, str]) -> list[str]:
    return [f"    del {', '.join(names[n] for n in dead)}"] if dead else []


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

    def call(self, node: Node, names: Mapping[Node, str], through: str = "") -> str:
        """The node's call; `through` is a function that takes what is called first."""
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
        if through:
            spot, arguments = through, [spot, *arguments]
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
