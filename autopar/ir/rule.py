"""Sharding rules in factor notation, and what they allow on a mesh.

A rule names, for every dim of every tensor input and output of an op, the *factors* that the dim is
made of: `"bsk,nk,n->bsn"`. Splitting one factor over a mesh axis says how each input must be split
and how each output then is. Algorithms see factors, never op names.

Notation::

    bsk,nk,n->bsn      one letter per dim; inputs before the arrow, outputs after, comma-separated
    (ab)c->abc         a compound dim: a is the major factor
    bs[d],[d]->bs[d]   a whole factor: may not be split
    b1->bn             1: a dim of size one that is broadcast (or any dim that carries no factor)
    k (inputs only)    a reduction factor: the output is partial (sum) on the axes that split it
    n (outputs only)   a factor that the op can make in pieces (a fill, an expand)

and, after a semicolon, clauses separated by spaces::

    max(k)             reduction kind of k other than sum
    linear(0)          if input 0 is partial (sum), so is the output; linear(0,1): both must be
    once(2)            an addend: must be partial (sum) wherever the output becomes so
    comm(v)            the op communicates by itself over the axes that split v: outputs that lack
                       v are replicated on them
    route(b>v)         one axis may split b and v at once, which are dims of different tensors: the
                       op sends the elements of b to the devices that own their place in v, or
                       fetches them from there, by all-to-all (v may be whole otherwise)

A tensor of rank 0 is written `.`, and an op without tensor inputs has nothing before the arrow.
Tensor inputs count in argument order, lists flattened (`graph.tensor_inputs`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .mesh import Mesh
from .sharding import REDUCTIONS, Sharding, Split

Dim = tuple[str, ...]
Dims = tuple[Dim, ...]


@dataclass(frozen=True)
class ShardingRule:
    """Factors of one call of an op. Build with `parse_rule`; prints as the same notation."""

    inputs: tuple[Dims, ...]
    outputs: tuple[Dims, ...]
    whole: frozenset[str] = frozenset()
    reductions: Mapping[str, str] = field(default_factory=dict)
    linear: tuple[tuple[int, ...], ...] = ()
    once: tuple[int, ...] = ()
    comm: frozenset[str] = frozenset()
    routes: tuple[str, ...] = ()

    def __hash__(self) -> int:
        return hash(str(self))

    @property
    def factors(self) -> tuple[str, ...]:
        """Every factor, in order of first appearance."""
        seen = dict.fromkeys(
            f for dims in (*self.inputs, *self.outputs) for dim in dims for f in dim
        )
        return tuple(seen)

    def splittable(self) -> tuple[str, ...]:
        return tuple(f for f in self.factors if f not in self.whole)

    def parts_of(self, factor: str) -> tuple[str, ...]:
        """The factors that choosing `factor` splits: itself, or the two of a route `b>v`."""
        return tuple(factor.split(">")) if factor in self.routes else (factor,)

    def communicates_over(self, factor: str) -> bool:
        """Whether the op itself communicates over an axis that splits `factor`."""
        return factor in self.comm or factor in self.routes

    def is_reduction(self, factor: str) -> bool:
        """Whether some output lacks the factor, so that splitting it leaves a partial value."""
        return factor not in self.comm and any(
            all(factor not in dim for dim in dims) for dims in self.outputs
        )

    def __str__(self) -> str:
        def dim_text(dim: Dim) -> str:
            parts = [f"[{f}]" if f in self.whole else f for f in dim]
            return "1" if not parts else parts[0] if len(parts) == 1 else f"({''.join(parts)})"

        def tensor_text(dims: Dims) -> str:
            return "".join(map(dim_text, dims)) or "."

        text = ",".join(map(tensor_text, self.inputs))
        text += "->" + ",".join(map(tensor_text, self.outputs))
        clauses = [f"{kind}({f})" for f, kind in sorted(self.reductions.items())]
        clauses += [f"linear({','.join(map(str, group))})" for group in self.linear]
        if self.once:
            clauses.append(f"once({','.join(map(str, self.once))})")
        clauses += [f"comm({f})" for f in sorted(self.comm)]
        if self.routes:
            clauses.append(f"route({','.join(self.routes)})")
        return text + (f"; {' '.join(clauses)}" if clauses else "")


_DIM = re.compile(r"\(([^)]*)\)|\[(\w)\]|(\w)")
_FACTOR = re.compile(r"\[(\w)\]|(\w)")


def parse_rule(text: str) -> ShardingRule:
    """Parse factor notation; raises ValueError with the offending text."""
    body, _, tail = text.partition(";")
    left, arrow, right = body.partition("->")
    if not arrow:
        raise ValueError(f"rule has no '->': {text!r}")
    whole: set[str] = set()

    def tensor(spec: str) -> Dims:
        dims: list[Dim] = []
        spec, at = spec.strip().removesuffix("."), 0
        while at < len(spec):
            match = _DIM.match(spec, at)
            if match is None:
                raise ValueError(f"cannot read {spec[at:]!r} in rule {text!r}")
            at = match.end()
            group = match.group(0)
            factors: list[str] = []
            for inner in _FACTOR.finditer(group):
                factor = inner.group(1) or inner.group(2)
                if inner.group(1):
                    whole.add(factor)
                if factor != "1":
                    factors.append(factor)
            dims.append(tuple(factors))
        return tuple(dims)

    inputs = tuple(tensor(spec) for spec in left.split(",")) if left.strip() else ()
    outputs = tuple(tensor(spec) for spec in right.split(","))
    reductions: dict[str, str] = {}
    linear: list[tuple[int, ...]] = []
    once: tuple[int, ...] = ()
    comm: set[str] = set()
    routes: tuple[str, ...] = ()
    for clause in re.findall(r"\w+\([^)]*\)", tail):
        name, _, arguments = clause[:-1].partition("(")
        items = [item.strip() for item in arguments.split(",") if item.strip()]
        if name == "linear":
            linear.append(tuple(int(i) for i in items))
        elif name == "once":
            once = tuple(int(i) for i in items)
        elif name == "comm":
            comm.update(items)
        elif name == "route":
            routes = tuple(items)
        elif name in REDUCTIONS:
            reductions.update(dict.fromkeys(items, name))
        else:
            raise ValueError(f"unknown clause {clause!r} in rule {text!r}")
    return ShardingRule(
        inputs, outputs, frozenset(whole), reductions, tuple(linear), once, frozenset(comm), routes
    )


@dataclass(frozen=True)
class Choice:
    """What an op does on one mesh axis: split a factor, pass partials on, or run replicated."""

    factor: str = ""
    linear: int = -1

    @property
    def is_replicate(self) -> bool:
        return not self.factor and self.linear < 0

    def __str__(self) -> str:
        return self.factor or (f"linear{self.linear}" if self.linear >= 0 else "-")

    @staticmethod
    def parse(text: str) -> Choice:
        """The inverse of `str`."""
        if text == "-":
            return Choice()
        if text.startswith("linear") and text[6:].isdigit():
            return Choice(linear=int(text[6:]))
        return Choice(factor=text)


REPLICATE = Choice()


@dataclass(frozen=True)
class Placed:
    """Shardings that a set of choices demands of the inputs and gives to the outputs."""

    inputs: tuple[Sharding, ...]
    outputs: tuple[Sharding, ...]


def factor_sizes(rule: ShardingRule, shapes: Sequence[Sequence[int]]) -> dict[str, int]:
    """Size of every factor, from the shapes of all inputs and then all outputs.

    A compound dim's last unknown factor is what remains of the dim.
    """
    sizes: dict[str, int] = {}
    dims = [
        (dim, int(size))
        for tensor, shape in zip((*rule.inputs, *rule.outputs), shapes, strict=True)
        for dim, size in zip(tensor, shape, strict=True)
    ]
    for dim, size in dims:
        if len(dim) == 1:
            sizes.setdefault(dim[0], size)
    left = [(dim, size) for dim, size in dims if len(dim) > 1]
    while left:
        waiting = []
        for dim, size in left:
            unknown = [f for f in dim if f not in sizes]
            if len(unknown) == 1:
                known = math.prod(sizes[f] for f in dim if f in sizes)
                sizes[unknown[0]] = size // known if known else 0
            elif unknown:
                waiting.append((dim, size))
        if len(waiting) == len(left):
            break
        left = waiting
    return sizes


def choices(rule: ShardingRule) -> list[Choice]:
    """Everything the op may do on one axis."""
    found = [REPLICATE, *(Choice(factor=f) for f in (*rule.splittable(), *rule.routes))]
    return found + [Choice(linear=i) for i in range(len(rule.linear))]


def place(
    rule: ShardingRule,
    sizes: Mapping[str, int],
    mesh: Mesh,
    chosen: Mapping[str, Choice],
    *,
    uneven: bool = False,
) -> Placed | None:
    """Shardings under `chosen` (axis name -> choice); None where the combination is not legal.

    Illegal: a factor with fewer units than devices along its axes (unless `uneven`), two different
    factors of one compound dim split at once, or an input that would have to be both split and
    partial with a non-sum reduction.
    """
    axes_of: dict[str, tuple[str, ...]] = {}
    for axis in mesh.names:
        chosen_factor = chosen.get(axis, REPLICATE).factor
        for factor in rule.parts_of(chosen_factor) if chosen_factor else ():
            axes_of[factor] = (*axes_of.get(factor, ()), axis)
    for factor, axes in axes_of.items():
        if not uneven and sizes[factor] < math.prod(mesh[a].size for a in axes):
            return None

    def shard(dims: Dims) -> Sharding | None:
        splits: list[Split] = []
        for dim in dims:
            split = [i for i, f in enumerate(dim) if f in axes_of]
            if len(split) > 1:
                return None
            if not split:
                splits.append(Split())
                continue
            at = split[0]
            outer = math.prod(sizes[f] for f in dim[:at])
            block = math.prod(sizes[f] for f in dim[at + 1 :])
            total = outer * sizes[dim[at]] * block
            made = Split(axes_of[dim[at]], outer, block)
            splits.append(normalised(made, total, mesh))
        return Sharding(tuple(splits))

    placed_in = [shard(dims) for dims in rule.inputs]
    placed_out = [shard(dims) for dims in rule.outputs]
    inputs = [s for s in placed_in if s is not None]
    outputs = [s for s in placed_out if s is not None]
    if len(inputs) != len(placed_in) or len(outputs) != len(placed_out):
        return None
    for axis in mesh.names:
        choice = chosen.get(axis, REPLICATE)
        if choice.factor:
            reduction = rule.reductions.get(choice.factor, "sum")
            for i, dims in enumerate(rule.outputs):
                if rule.communicates_over(choice.factor) or any(choice.factor in d for d in dims):
                    continue
                outputs[i] = outputs[i].with_partial(axis, reduction)
                for once in rule.once:
                    inputs[once] = inputs[once].with_partial(axis, "sum")
        elif choice.linear >= 0:
            for i in {*rule.linear[choice.linear], *rule.once}:
                inputs[i] = inputs[i].with_partial(axis, "sum")
            outputs = [s.with_partial(axis, "sum") for s in outputs]
    return Placed(tuple(inputs), tuple(outputs))


def normalised(split: Split, size: int, mesh: Mesh) -> Split:
    """Drop a block that changes nothing: even division of contiguous units."""
    if not split.axes:
        return Split()
    if split.outer == 1 and split.block > 1:
        plain = Split(split.axes)
        if split.is_even(size, mesh):
            return plain
    return split
