"""Vocabulary that the rule files share: arguments by name, factor letters, broadcasting, `rule`.

A *spec* is the notation of one tensor, a string per dim: `["b", "[d]", "(hk)", "1"]`.
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
import torch.fx

from autopar.ir.graph import Size, Value, values_of
from autopar.ir.rule import ShardingRule, parse_rule

Spec = list[str]
Handler = Callable[[torch.fx.Node], ShardingRule | str | None]


def arguments(node: torch.fx.Node) -> dict[str, Any]:
    """Every argument of an ATen-style call by its schema name, defaults filled in."""
    schema = schema_of(node)
    found = {a.name: a.default_value for a in schema.arguments}
    positional = [a.name for a in schema.arguments if not a.kwarg_only]
    found.update(zip(positional, node.args, strict=False))
    found.update(node.kwargs)
    return found


def schema_of(node: torch.fx.Node) -> torch.FunctionSchema:
    """Schema of an op call; raises TypeError for a target that is not an `OpOverload`."""
    if not isinstance(node.target, torch._ops.OpOverload):
        raise TypeError(f"%{node.name} does not call a torch op: {node.target!r}")
    return node.target._schema


@dataclass(frozen=True)
class Input:
    """One tensor input: the argument it belongs to and, inside a list, its place among tensors."""

    name: str
    at: int | None
    value: Value


def named_inputs(node: torch.fx.Node) -> list[Input]:
    """The node's tensor inputs in `graph.tensor_inputs` order, with their argument names."""
    positional = [a.name for a in schema_of(node).arguments if not a.kwarg_only]
    pairs = [*zip(positional, node.args, strict=False), *node.kwargs.items()]
    found: list[Input] = []
    for name, arg in pairs:
        if isinstance(arg, torch.fx.Node):
            found += [Input(name, None, value) for value in values_of(arg)]
        elif isinstance(arg, (list, tuple)):
            nodes = [item for item in arg if isinstance(item, torch.fx.Node) and values_of(item)]
            found += [Input(name, i, values_of(item)[0]) for i, item in enumerate(nodes)]
    return found


def input_value(node: torch.fx.Node, name: str) -> Value:
    """Value of the tensor argument `name`; raises KeyError if it is absent or not a tensor."""
    for found in named_inputs(node):
        if found.name == name and found.at is None:
            return found.value
    raise KeyError(f"%{node.name} has no tensor argument {name!r}")


def output(node: torch.fx.Node) -> Value:
    """First tensor output."""
    return values_of(node)[0]


def words(text: str) -> list[str]:
    """The op names in a block of text."""
    return text.split()


def letters() -> Iterator[str]:
    """Fresh factor letters: Latin, Greek, Cyrillic, then whatever Unicode has left."""
    greek = (chr(c) for c in range(0x3B1, 0x3CA))
    beyond = (c for c in map(chr, range(0x430, 0x20000)) if c.isalpha())
    return itertools.chain(string.ascii_letters, greek, beyond)


def take(names: Iterator[str], n: int) -> Spec:
    """The next `n` letters, one dim each."""
    return list(itertools.islice(names, n))


def whole(spec: Iterable[str]) -> Spec:
    """The same dims, none of which may be split."""
    return [f"[{f}]" if len(f) == 1 and f != "1" else f for f in spec]


def hold(spec: Spec, dims: Iterable[int]) -> Spec:
    """`spec` with the given dims whole."""
    held = set(dims)
    return [f"[{f}]" if i in held and len(f) == 1 else f for i, f in enumerate(spec)]


def same(a: Size, b: Size) -> bool:
    """Whether two sizes are equal for every value of their symbols."""
    return bool(a == b) or (
        isinstance(a, sympy.Expr | int)
        and not (isinstance(a, int) and isinstance(b, int))
        and bool(sympy.expand(sympy.sympify(a) - b) == 0)
    )


def is_one(size: Size) -> bool:
    """Whether a size is one; a symbol counts as larger."""
    return bool(size == 1)


def dim_index(dim: int, rank: int) -> int:
    """A dim counted from the front."""
    return dim % rank if rank else 0


def dim_indices(dims: int | Sequence[int] | None, rank: int) -> list[int]:
    """Dims counted from the front; None or an empty list means all of them."""
    if dims is None:
        return list(range(rank))
    found = [dims] if isinstance(dims, int) else list(dims)
    return [dim_index(d, rank) for d in found] or list(range(rank))


def broadcast(names: Spec, out: Sequence[Size], shape: Sequence[Size]) -> Spec:
    """Spec of an input of `shape` that broadcasts to `out`, whose dims are `names`."""
    skipped = len(out) - len(shape)
    return [
        "1" if is_one(size) and not is_one(out[skipped + i]) else names[skipped + i]
        for i, size in enumerate(shape)
    ]


def resembling(names: Spec, out: Sequence[Size], shape: Sequence[Size]) -> Spec:
    """Spec of an input whose values do not matter: dims follow the output where sizes allow."""
    free = list(range(len(out)))
    spec: Spec = []
    for i, size in enumerate(shape):
        order = sorted(free, key=lambda j: j != i)
        match = next((j for j in order if same(out[j], size)), None)
        if match is not None:
            free.remove(match)
        spec.append("1" if match is None else names[match])
    return spec


def rule(
    node: torch.fx.Node,
    inputs: Mapping[str, Spec | Sequence[Spec]],
    *outputs: Spec,
    linear: Sequence[Sequence[str] | str] = (),
    once: Sequence[str] = (),
    clauses: str = "",
) -> ShardingRule:
    """Assemble a rule from specs per argument name, in the order that the node's inputs have.

    `linear` and `once` name arguments, and count only where the call has them: a group of `linear`
    with an argument that is no tensor, or whose dtypes do not add up, is dropped. A list argument
    stands for all its tensors.
    """
    found = named_inputs(node)
    specs: list[Spec] = []
    for item in found:
        spec: Any = inputs[item.name] if item.at is None else inputs[item.name][item.at]
        specs.append(spec)
    at: dict[str, list[str]] = {}
    for i, item in enumerate(found):
        at.setdefault(item.name, []).append(str(i))
    parts = [clauses] if clauses else []
    for group in linear:
        names = [group] if isinstance(group, str) else list(group)
        if all(name in at for name in names) and adds_up(node, names):
            parts.append(f"linear({','.join(i for name in names for i in at[name])})")
    indices = [i for name in once for i in at.get(name, [])]
    if indices:
        parts.append(f"once({','.join(indices)})")
    return parse_rule(notation(specs, outputs) + "; " + " ".join(parts))


def routes(elements: Iterable[str], owned: str) -> str:
    """The clause that lets one axis split a dim of `elements` and the dim `owned`, whole or not."""
    made = [f"{f}>{owned.strip('[]')}" for f in elements if len(f) == 1 and f != "1"]
    return f"route({','.join(made)})" if made else ""


def notation(inputs: Sequence[Spec], outputs: Sequence[Spec]) -> str:
    """Rule text, without clauses, of specs."""
    return "->".join(",".join("".join(s) or "." for s in side) for side in (inputs, outputs))


def all_whole(node: torch.fx.Node) -> ShardingRule:
    """The rule of an op that can only run replicated."""
    names = letters()
    found = named_inputs(node)
    specs = [whole(take(names, item.value.rank)) for item in found]
    outputs = [whole(take(names, value.rank)) for value in values_of(node)]
    return parse_rule(notation(specs, outputs))


def adds_up(node: torch.fx.Node, group: str | Sequence[str]) -> bool:
    """Whether the dtypes let partial values of the arguments in `group` pass.

    Bools do not add up, and rounding to integers is not linear.
    """
    names = [group] if isinstance(group, str) else group
    ins = [item.value.dtype for item in named_inputs(node) if item.name in names]
    outs = [value.dtype for value in values_of(node)]
    if torch.bool in (*ins, *outs):
        return False
    exact = all(d.is_floating_point or d.is_complex for d in outs)
    return exact or not any(d.is_floating_point or d.is_complex for d in ins)
