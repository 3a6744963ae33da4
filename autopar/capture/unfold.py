"""Insert into a shortened model's graph the layers that it was captured without."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch

from autopar.ir.graph import Graph
from autopar.ir.text import print_graph

from .autograd_function import AutogradFunctionOp
from .fingerprint import base_name, renumbered
from .repeats import Place, Places, Run
from .tandem import ITEM, CannotFoldError, Item, Ref, lengthen_all, reference

_REGION = "region"  # tag of references to the first operation of a checkpointing region
_WRITES = "writes"


def unfold(graph: Graph, runs: Sequence[Run], assigned: int) -> Graph:
    """The graph of the whole model, from that of the model with `KEPT` units of each run.

    The first `assigned` of the written buffers are those that forward assigns to. Operations are
    numbered in order, as by `renumbered`.
    The placeholders of `graph` are already those of the whole model. Raises `CannotFoldError`.
    """
    places = Places(runs)
    items = _items(graph, places)
    longer = lengthen_all(items, [run.units for run in runs])
    if longer is None:
        raise CannotFoldError(f"the captured operations of {runs[0]} differ from layer to layer")
    # Numbers given in the order of tracing must be numbers in the order of the graph.
    order = _WriteOrder.of(graph, places, assigned)
    if print_graph(_build(items, graph, places, order)) != print_graph(renumbered(graph)):
        raise CannotFoldError("the captured graph is numbered in an order of its own")
    return _build(longer, graph, places, order)


# Graphs as sequences of items


def _items(graph: Graph, places: Places) -> list[Item]:
    """One item per call, and the output; an item also refers to its module, region and writes."""
    numbers: dict[torch.fx.Node, int] = {}
    opened: dict[Any, int] = {}
    written: dict[torch.fx.Node, list[str]] = {}
    results: Any = graph.output_node.args[0]
    targets = {node.name: node for node in graph.placeholders()}
    for name, node in zip(graph.mutated, results[graph.outputs :], strict=True):
        written.setdefault(node, []).append(targets[name].meta["fqns"][0])
    items: list[Item] = []
    for node in graph.fx.nodes:
        if node.op == "placeholder":
            continue
        arguments = results[: graph.outputs] if node.op == "output" else (node.args, node.kwargs)
        refs: list[Ref] = []
        skeleton = _skeleton(arguments, numbers, places, refs)
        if node.op == "call_function":
            numbers[node] = len(items)
            refs.append(reference(node.meta["module"], places, "module"))
            region = node.meta["region"]
            if region is not None:
                opened.setdefault(region, len(items))
                refs.append(Ref(ITEM, _REGION, opened[region]))
            refs += (reference(name, places, _WRITES) for name in written.pop(node, ()))
        items.append(Item(_key(node, skeleton), tuple(refs), node))
    if written:
        raise CannotFoldError("forward updates a buffer with a tensor that it does not compute")
    if list(opened) != list(range(len(opened))):
        raise CannotFoldError("a checkpointed part of forward computes nothing")
    return items


def _key(node: torch.fx.Node, skeleton: Any) -> Any:
    if node.op == "output":
        return ("output", skeleton)
    meta, target = node.meta, node.target
    if isinstance(target, AutogradFunctionOp):
        target = re.sub(r"_\d+$", "", target.__name__) + target.text()
    value = meta["value"]
    return (base_name(node), target, skeleton, value, meta["source"], meta["stack"])


def _skeleton(
    argument: Any, numbers: Mapping[torch.fx.Node, int], places: Places, refs: list[Ref]
) -> Any:
    """An argument without its nodes, which go to `refs`; numbers keep their type."""
    if isinstance(argument, torch.fx.Node):
        if argument.op != "placeholder":
            refs.append(Ref(ITEM, "", numbers[argument]))
        elif argument.meta["role"] == "constant":
            refs.append(Ref(None, ("constant", argument.name)))
        else:
            refs.append(reference(argument.meta["fqns"][0], places))
        return torch.fx.Node
    if isinstance(argument, (list, tuple)):
        return (list, *(_skeleton(part, numbers, places, refs) for part in argument))
    if isinstance(argument, dict):
        return (dict, *((k, _skeleton(v, numbers, places, refs)) for k, v in argument.items()))
    if isinstance(argument, slice):
        parts = (argument.start, argument.stop, argument.step)
        return (slice, *(_skeleton(part, numbers, places, refs) for part in parts))
    return (type(argument), argument)


@dataclasses.dataclass(frozen=True)
class _WriteOrder:
    """The order of a capture's written buffers: those that forward assigns to, in the order of the
    module's buffers, then those written in place, in the order in which forward first reads them.
    """

    assigned: frozenset[tuple[Hashable, Hashable]]
    buffers: Mapping[str, int]

    @staticmethod
    def of(graph: Graph, places: Places, assigned: int) -> _WriteOrder:
        buffers = graph.placeholders("buffer")
        names = {node.name: node.meta["fqns"][0] for node in buffers}
        first = [reference(names[name], places) for name in graph.mutated[:assigned]]
        numbers = {node.meta["fqns"][0]: i for i, node in enumerate(buffers)}
        return _WriteOrder(frozenset((ref.kind, ref.tag) for ref in first), numbers)

    def writes(self, items: Sequence[Item], places: Places) -> list[tuple[Ref, int]]:
        """The buffers that are written, and by which item."""
        first: dict[Ref, tuple[int, int]] = {}
        writes: list[tuple[Ref, int]] = []
        for position, item in enumerate(items):
            for number, ref in enumerate(item.refs):
                tag: Any = ref.tag
                if isinstance(tag, tuple) and tag[0] == _WRITES:
                    writes.append((ref._replace(tag=("", *tag[1:])), position))
                elif ref.kind != ITEM:
                    first.setdefault(ref, (position, number))

        def rank(write: tuple[Ref, int]) -> tuple[int, ...]:
            ref, position = write
            if (ref.kind, ref.tag) in self.assigned:
                return (0, self.buffers[_name(ref, places)])
            return (1, *first.get(ref, (position, 0)))

        return sorted(writes, key=rank)


def _build(items: Sequence[Item], graph: Graph, places: Places, order: _WriteOrder) -> Graph:
    """A graph of items, with the placeholders of `graph`."""
    new = torch.fx.Graph()
    placeholders: dict[Any, torch.fx.Node] = {}
    for node in graph.placeholders():
        copied = new.node_copy(node)
        copied.meta = dict(node.meta)
        placeholders[node] = copied
        placeholders.update(dict.fromkeys(node.meta["fqns"], copied))
    nodes: list[torch.fx.Node] = []
    regions: dict[int, int] = {}
    functions = itertools.count()

    def resolve(argument: torch.fx.Node, ref: Ref) -> torch.fx.Node:
        if ref.kind == ITEM:
            return nodes[ref.number]
        constant = argument.op == "placeholder" and argument.meta["role"] == "constant"
        return placeholders[argument if constant else _name(ref, places)]

    for item in items[:-1]:
        node, refs = item.origin, iter(item.refs)
        args, kwargs = _filled((node.args, node.kwargs), refs, resolve)
        target = node.target
        if isinstance(target, AutogradFunctionOp):
            target = target.renamed(f"autograd_function_{next(functions)}")
        made = new.create_node("call_function", target, args, kwargs, base_name(node))
        made.meta = dict(node.meta, module=_name(next(refs), places))
        for ref in refs:
            if ref.tag == _REGION:
                made.meta["region"] = regions.setdefault(ref.number, len(regions))
        nodes.append(made)
    output = graph.output_node
    arguments: Any = output.args[0]
    results = _filled(arguments[: graph.outputs], iter(items[-1].refs), resolve)
    writes = order.writes(items, places)
    values = (nodes[position] for _, position in writes)
    new.output((*results, *values)).meta = dict(output.meta)
    mutated = tuple(placeholders[_name(ref, places)].name for ref, _ in writes)
    return dataclasses.replace(graph, fx=new, mutated=mutated)


def _name(ref: Ref, places: Places) -> str:
    tag: Any = ref.tag
    if not isinstance(ref.kind, int):
        return str(tag[1])
    return places.name(Place(ref.kind, tag[1], tag[2], ref.number))


def _filled(argument: Any, refs: Iterator[Ref], resolve: Callable[..., Any]) -> Any:
    """An argument with each node replaced by what the next reference resolves to."""
    if isinstance(argument, torch.fx.Node):
        return resolve(argument, next(refs))
    if isinstance(argument, (list, tuple)):
        return type(argument)([_filled(part, refs, resolve) for part in argument])
    if isinstance(argument, dict):
        return {k: _filled(v, refs, resolve) for k, v in argument.items()}
    if isinstance(argument, slice):
        parts = (argument.start, argument.stop, argument.step)
        return slice(*(_filled(part, refs, resolve) for part in parts))
    return argument
