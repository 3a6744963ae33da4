"""Gathers, scatters and sorts: positions pass through, the dim that is indexed is whole.

Where whole slices are indexed (`index_select`, `index`, `index_put`, `index_add`, `index_copy`) one
axis may split both the positions and the indexed dim: the slices are then routed to or from their
owners. This is how tokens reach experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from autopar.ir.graph import Size, Value, values_of
from autopar.ir.rule import ShardingRule

from .common import (
    Handler,
    Spec,
    all_whole,
    arguments,
    broadcast,
    dim_index,
    hold,
    input_value,
    is_one,
    letters,
    named_inputs,
    output,
    routes,
    rule,
    same,
    take,
)


def tied(names: Spec, shape: Sequence[Size], other: Sequence[Size]) -> Spec:
    """`names`, whole where the two shapes differ."""
    return [f if same(a, b) else f"[{f}]" for f, a, b in zip(names, shape, other, strict=True)]


def index_select(node: torch.fx.Node) -> ShardingRule:
    """`a[v]b,n->anb; route(n>v)`."""
    x, index = input_value(node, "self"), input_value(node, "index")
    at = dim_index(arguments(node)["dim"], x.rank)
    names = letters()
    dims = take(names, x.rank)
    n = next(names)
    after = [*dims[:at], n, *dims[at + 1 :]] if x.rank else []
    held = hold(dims, [at])
    return rule(
        node,
        {"self": held, "index": [n] if index.rank else []},
        after,
        linear=["self"],
        clauses=routes([n], held[at]) if x.rank and index.rank else "",
    )


def gather(node: torch.fx.Node) -> ShardingRule:
    """`a[v],an->an`; a dim where the index is shorter than the input is whole."""
    x, index = input_value(node, "self"), input_value(node, "index")
    if not x.rank or not index.rank:
        return all_whole(node)
    at = dim_index(arguments(node)["dim"], x.rank)
    names = letters()
    dims = take(names, x.rank)
    n = next(names)
    after = tied(dims, index.shape, x.shape)
    after[at] = n
    spare = take(names, x.rank)
    before = [f"[{spare[i]}]" if i == at or after[i] != f else f for i, f in enumerate(dims)]
    return rule(node, {"self": before, "index": after}, after, linear=["self"])


def take_along_dim(node: torch.fx.Node) -> ShardingRule:
    """As `gather`, with broadcasting outside the dim."""
    dim = arguments(node)["dim"]
    if dim is None:
        return all_whole(node)
    x, index, out = input_value(node, "self"), input_value(node, "indices"), output(node)
    at = dim_index(dim, x.rank)
    names = letters()
    dims = take(names, out.rank)
    before = broadcast(dims, out.shape, x.shape)
    before[at] = f"[{next(names)}]"
    picked = broadcast(dims, out.shape, index.shape)
    picked[at] = dims[at]
    return rule(node, {"self": before, "indices": picked}, dims, linear=["self"])


def scatter(node: torch.fx.Node) -> ShardingRule:
    """`a[v],a[n],a[n]->a[v]`: only dims where index and input are equally long split."""
    x, index = input_value(node, "self"), input_value(node, "index")
    if not x.rank or not index.rank:
        return all_whole(node)
    args = arguments(node)
    at = dim_index(args["dim"], x.rank)
    names = letters()
    dims = hold(tied(take(names, x.rank), x.shape, index.shape), [at])
    spare = take(names, x.rank)
    picked = [f if not f.startswith("[") else f"[{s}]" for f, s in zip(dims, spare, strict=True)]
    inputs: dict[str, Spec] = {"self": dims, "index": picked}
    for name in ("src", "value"):
        source = args.get(name)
        if isinstance(source, torch.fx.Node):
            value = input_value(node, name)
            others = take(names, value.rank)  # src may be longer than index
            inputs[name] = [
                f if not f.startswith("[") and same(size, i) else f"[{s}]"
                for f, s, size, i in zip(picked, others, value.shape, index.shape, strict=False)
            ]
            for i, f in enumerate(inputs[name]):
                if value.rank and f != picked[i] and not picked[i].startswith("["):
                    dims[i] = picked[i] = f"[{spare[i]}]"
    return rule(node, inputs, dims)


def scatter_add(node: torch.fx.Node) -> ShardingRule:
    """`a[v],an,an->a[v]; once(0)`: positions along the dim are a sum reduction."""
    x, index = input_value(node, "self"), input_value(node, "index")
    source = input_value(node, "src")
    if not x.rank or not all(same(a, b) for a, b in zip(index.shape, source.shape, strict=True)):
        return all_whole(node)
    at = dim_index(arguments(node)["dim"], x.rank)
    names = letters()
    dims = hold(tied(take(names, x.rank), x.shape, index.shape), [at])
    spare = take(names, x.rank)
    picked = [s if f.startswith("[") else f for f, s in zip(dims, spare, strict=True)]
    inputs = {"self": dims, "index": picked, "src": picked}
    return rule(node, inputs, dims, linear=[("self", "src")], once=["self"])


def index_add(node: torch.fx.Node) -> ShardingRule:
    """`a[v]b,n,anb->a[v]b; linear(0,2) once(0) route(n>v)`."""
    x = input_value(node, "self")
    if not x.rank:
        return all_whole(node)
    at = dim_index(arguments(node)["dim"], x.rank)
    names = letters()
    dims = hold(take(names, x.rank), [at])
    n = next(names)
    index = [n] if input_value(node, "index").rank else []
    source = [*dims[:at], n, *dims[at + 1 :]]
    inputs = {"self": dims, "index": index, "source": source}
    clauses = routes([n], dims[at]) if index else ""
    return rule(node, inputs, dims, linear=[("self", "source")], once=["self"], clauses=clauses)


def index_copy(node: torch.fx.Node) -> ShardingRule:
    """`a[v]b,[n],a[n]b->a[v]b; route(n>v)` (also index_fill): order matters along the dim."""
    x = input_value(node, "self")
    if not x.rank:
        return all_whole(node)
    at = dim_index(arguments(node)["dim"], x.rank)
    names = letters()
    dims = hold(take(names, x.rank), [at])
    n = f"[{next(names)}]"
    inputs: dict[str, Spec] = {"self": dims, "value": []}
    inputs["index"] = [n] if input_value(node, "index").rank else []
    inputs["source"] = [*dims[:at], n, *dims[at + 1 :]]
    routed = inputs["index"] and "source" in arguments(node)
    clauses = routes([n[1]], dims[at]) if routed else ""
    return rule(node, inputs, dims, clauses=clauses)


def indexed(node: torch.fx.Node) -> tuple[Spec, list[Spec], Spec, Spec] | None:
    """Specs of x, of the index tensors, of `x[indices]`, and the index dims; None: not tractable.

    Index tensors broadcast against each other; their dims stand where the first of them stood if
    they are adjacent, else in front.
    """
    x = input_value(node, "self")
    slots = list(arguments(node)["indices"])
    values: list[Value] = [i.value for i in named_inputs(node) if i.name == "indices"]
    if any(v.dtype in (torch.bool, torch.uint8) for v in values) or not values:
        return None
    slots += [None] * (x.rank - len(slots))
    at = [i for i, slot in enumerate(slots) if slot is not None]
    names = letters()
    before = hold(take(names, x.rank), at)
    shape: list[Size] = []
    for value in values:
        for i, size in enumerate(reversed(value.shape)):
            if i == len(shape):
                shape.append(size)
            elif is_one(shape[i]):
                shape[i] = size
    shape.reverse()
    picked = take(names, len(shape))
    specs = [broadcast(picked, shape, value.shape) for value in values]
    adjacent = at == list(range(at[0], at[-1] + 1))
    first = at[0] if adjacent else 0
    rest = [f for i, f in enumerate(before) if i not in at]
    return before, specs, [*rest[:first], *picked, *rest[first:]], picked


def routed_dim(node: torch.fx.Node) -> int | None:
    """First of the adjacent dims that a call's index tensors index; None: they are not adjacent."""
    at = [i for i, slot in enumerate(arguments(node)["indices"]) if slot is not None]
    return at[0] if at == list(range(at[0], at[-1] + 1)) else None


def index(node: torch.fx.Node) -> ShardingRule:
    """`x[i, :, j]`: indexed dims of x are whole, its other dims and the index's pass through.

    `x[i]` and `x[i, j]` may be routed along the first dim that is indexed.
    """
    specs = indexed(node)
    if specs is None:
        return all_whole(node)
    before, indices, after, picked = specs
    first = routed_dim(node)
    clauses = "" if first is None else routes(picked, before[first])
    return rule(node, {"self": before, "indices": indices}, after, linear=["self"], clauses=clauses)


def index_put(node: torch.fx.Node) -> ShardingRule:
    """`x[i] = v`, index dims whole; or `x[i] += v`, where they are a sum reduction.

    Both may be routed along the first dim that is indexed.
    """
    specs = indexed(node)
    if specs is None:
        return all_whole(node)
    before, indices, target, picked = specs
    values = input_value(node, "values")
    first = routed_dim(node)
    clauses = "" if first is None else routes(picked, before[first])
    if not arguments(node)["accumulate"]:
        held = {f: f"[{f}]" for f in picked}
        target = [held.get(f, f) for f in target]
        indices = [[held.get(f, f) for f in spec] for spec in indices]
    sizes: dict[str, Size] = {}
    inputs = [(before, input_value(node, "self").shape)]
    inputs += zip(
        indices, [i.value.shape for i in named_inputs(node) if i.name == "indices"], strict=True
    )
    for spec, shape in inputs:
        for f, size in zip(spec, shape, strict=True):
            if not is_one(size) or f not in sizes:
                sizes[f] = size
    full = [sizes[f] for f in target]
    source = broadcast(target, full, values.shape)
    where: dict[str, Spec | list[Spec]] = {
        "self": before,
        "indices": indices,
        "values": source,
    }
    if not arguments(node)["accumulate"]:
        return rule(node, where, before, clauses=clauses)
    return rule(node, where, before, linear=[("self", "values")], once=["self"], clauses=clauses)


def one_hot(node: torch.fx.Node) -> ShardingRule:
    """`bs->bs[v]`."""
    names = letters()
    ids = take(names, output(node).rank - 1)
    return rule(node, {"self": ids}, [*ids, f"[{next(names)}]"])


def sort(node: torch.fx.Node) -> ShardingRule:
    """`topk`, `sort`: the sorted dim is whole; two outputs, values and indices."""
    x = input_value(node, "self")
    if not x.rank:
        return all_whole(node)
    at = dim_index(arguments(node)["dim"], x.rank)
    names = letters()
    dims = hold(take(names, x.rank), [at])
    after = list(dims)
    if not same(x.shape[at], output(node).shape[at]):
        after[at] = f"[{next(names)}]"
    return rule(node, {"self": dims}, *([after] * len(values_of(node))))


def search(node: torch.fx.Node) -> ShardingRule:
    """`bucketize(x, edges)`: `ab,[n]->ab`."""
    names = letters()
    dims = take(names, output(node).rank)
    edges = f"[{next(names)}]"
    return rule(node, {"self": dims, "boundaries": [edges]}, dims)


RULES: dict[str, Handler] = {
    "aten.index_select": index_select,
    "aten.gather": gather,
    "aten.take_along_dim": take_along_dim,
    "aten.scatter": scatter,
    "aten.scatter_reduce": all_whole,
    "aten.scatter_add": scatter_add,
    "aten.index_add": index_add,
    "aten.index_copy": index_copy,
    "aten.index_fill": index_copy,
    "aten.index": index,
    "aten.index_put": index_put,
    "aten._unsafe_index": index,
    "aten.one_hot": one_hot,
    "aten.topk": sort,
    "aten.sort": sort,
    "aten.argsort": sort,
    "aten.msort": all_whole,
    "aten.bucketize": search,
    "aten.masked_scatter": all_whole,
    "aten.masked_select": all_whole,
    "aten.nonzero": all_whole,
}
