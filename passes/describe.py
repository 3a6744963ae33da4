"""Describe a chosen assignment for people: its activations and collectives, like ones together."""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch.fx

from autopar.cost.comm import wire_bytes, wire_factor
from autopar.cost.families import op_name
from autopar.ir.graph import Graph, Value, values_of
from autopar.ir.lowered import GATHER_VARY
from autopar.ir.reshard import reshard_steps
from autopar.ir.rule import Choice, Placed, ShardingRule
from autopar.ir.sharding import Sharding
from autopar.ir.text import print_value
from autopar.plan import Activation, Traffic

from .narrow_gathers import travelling_value
from .options import Option
from .price import Pricer
from .programme import Edge, edges_of
from .route_costs import route_messages

Node = torch.fx.Node

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a whole component of a dotted name


def collapse(names: Iterable[str]) -> str:
    """One name for names that differ in layer numbers: `layers.{0..5}.attn`."""
    known = list(dict.fromkeys(names))
    parts = _NUMBER.split(known[0])
    columns = zip(*(_NUMBER.findall(name) for name in known), strict=True)
    filled = [*map(_numbers, columns), ""]
    return "".join(part + number for part, number in zip(parts, filled, strict=True))


def pattern(name: str) -> str:
    """What names that `collapse` may join have in common."""
    return _NUMBER.sub("#", name)


def _numbers(texts: Iterable[str]) -> str:
    numbers = sorted({int(text) for text in texts})
    if len(numbers) == 1:
        return str(numbers[0])
    spans: list[str] = []
    for _, run in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        members = [number for _, number in run]
        ends = f"{members[0]}..{members[-1]}" if len(members) > 2 else ",".join(map(str, members))
        spans.append(ends)
    return "{" + ",".join(spans) + "}"


def type_of(value: Value) -> str:
    """`f32[8, 4]`."""
    return print_value(replace(value, sharding=None, requires_grad=False))


@dataclass(frozen=True)
class _Call:
    """An op of the assignment, as it is described; equal ones are one line."""

    op: str
    module: str
    source: str
    rule: str
    splits: str
    type: str
    sharding: str


def describe_activations(
    graph: Graph,
    rules: Mapping[str, ShardingRule],
    option: Mapping[Node, Option],
    pricer: Pricer,
    rename: Mapping[str, str],
) -> tuple[Activation, ...]:
    """One line per op of a repeated block: what every mesh axis splits, and what comes out."""
    modules: dict[_Call, list[str]] = defaultdict(list)
    size: dict[_Call, float] = {}
    # Copies of a block have one option: what it says is put together once.
    known: dict[tuple[int, str], tuple[ShardingRule, Value, _Call]] = {}
    patterns: dict[str, str] = {}
    for node in graph.calls():
        if node not in option or not values_of(node):
            continue
        chosen, value, rule = option[node], values_of(node)[0], rules[node.name]
        module, source = node.meta.get("module", ""), node.meta.get("source", "")
        if module not in patterns:
            patterns[module] = pattern(module)
        like = known.get((id(chosen), op_of(node)))
        if like is None or like[0] != rule or like[1] != value:
            splits = (f"{rename[axis]}:{_what_splits(rule, c)}" for axis, c in chosen.choices)
            made = _Call(
                op_of(node),
                patterns[module],
                source,
                str(rule),
                " ".join(splits),
                type_of(value),
                str(renamed(chosen.gives[0].without_varying(), rename)),
            )
            like = known[id(chosen), op_of(node)] = rule, value, made
        call = replace(like[2], module=patterns[module], source=source)
        modules[call].append(module)
        if call not in size:
            size[call] = pricer.local_bytes(value, chosen.gives[0])
    return tuple(
        Activation(
            c.op,
            collapse(names),
            c.source,
            len(names),
            c.rule,
            c.splits,
            c.type,
            c.sharding,
            int(size[c]),
        )
        for c, names in modules.items()
    )


def _what_splits(rule: ShardingRule, choice: Choice) -> str:
    """The dim of the output that a choice splits, or how the pieces are put together."""
    if choice.linear >= 0:
        return "partial"  # passed on as they come in
    for dim, factors in enumerate(rule.outputs[0]):
        if any(factor in factors for factor in rule.parts_of(choice.factor)):
            return f"{dim} routed" if choice.factor in rule.routes else str(dim)
    return "inside" if choice.factor in rule.comm else rule.reductions.get(choice.factor, "sum")


def describe_traffic(
    graph: Graph,
    rules: Mapping[str, ShardingRule],
    option: Mapping[Node, Option],
    pricer: Pricer,
    rename: Mapping[str, str],
    micro_batches: int = 1,
) -> tuple[Traffic, ...]:
    """Collectives by kind, axis and purpose, with what one device sends; the most bytes first.

    Of a step: `graph` has the sizes of one micro-batch, and what is sent once per step counts once.
    """
    count: dict[tuple[str, str, str, str], int] = defaultdict(int)
    sent: dict[tuple[str, str, str, str], float] = defaultdict(float)
    places: dict[tuple[str, str, str, str], list[str]] = defaultdict(list)
    paid: set[object] = set()
    for edge in edges_of(graph):
        producer = option[edge.producer]
        source, want = producer.gives[edge.port], option[edge.consumer].wants[edge.slot]
        if (edge.producer, edge.port, want) in paid or source == want:
            continue
        paid.add((edge.producer, edge.port, want))
        value = travelling_value(edge.producer, edge.port)
        is_param = edge.producer.meta.get("role") == "param"
        often = 1 if is_param and not producer.regather else micro_batches
        for kind, axis, backward, nbytes in _messages(
            value, source, want, producer.regather, pricer
        ):
            purpose, place = _purpose(edge, kind, backward)
            key = (kind, rename[axis], purpose, pattern(place))
            count[key] += often
            sent[key] += often * float(wire_bytes(kind, nbytes, pricer.mesh[axis].size))
            places[key].append(place)
    for node, kind, axis, purpose, nbytes in _of_routes(graph, rules, option, pricer):
        place = node.meta.get("module", "")
        key = (kind, rename[axis], purpose, pattern(place))
        count[key] += micro_batches
        sent[key] += micro_batches * nbytes
        places[key].append(place)
    made = [
        Traffic(
            kind, axis, f"{purpose} {collapse(places[key])}".strip(), count[key], int(sent[key])
        )
        for key in count
        for kind, axis, purpose, _ in (key,)
    ]
    return tuple(sorted(made, key=lambda t: -t.sent_bytes))


def _of_routes(
    graph: Graph,
    rules: Mapping[str, ShardingRule],
    option: Mapping[Node, Option],
    pricer: Pricer,
) -> Iterator[tuple[Node, str, str, str, float]]:
    """What routed ops send themselves: (op, collective, axis, purpose, bytes of one device)."""
    for node in graph.calls():
        rule = rules.get(node.name) if node in option else None
        if rule is None or not rule.routes:
            continue
        chosen = option[node]
        placed = Placed(chosen.wants, chosen.gives)
        for axis, choice in chosen.choices:
            size = pricer.mesh[axis].size
            for m in route_messages(node, rule, placed, choice.factor, axis, pricer.mesh):
                way = "gradients" if m.backward else "activations"
                sent = wire_factor(m.kind, size) * m.nbytes
                yield node, m.kind, axis, f"{way} routed by {op_of(node)}", sent


def _messages(
    value: Value, source: Sharding, want: Sharding, regather: bool, pricer: Pricer
) -> list[tuple[str, str, bool, float]]:
    """(collective, axis, whether it is in the backward, bytes of the whole value) of a reshard."""
    found = []
    current = source
    for step in reshard_steps(source, want, pricer.mesh):
        split = current if step.op.before == "S" else step.after
        nbytes = pricer.local_bytes(value, split.without_axis(step.axis))
        kinds = [(step.op.forward, False)]
        if value.requires_grad:
            kinds.append((step.op.backward, True))
            if regather and step.op is GATHER_VARY:
                kinds.append((step.op.forward, True))
        found += [(kind, step.axis, back, nbytes) for kind, back in kinds if kind is not None]
        current = step.after
    return found


def _purpose(edge: Edge, kind: str, backward: bool) -> tuple[str, str]:
    """What a collective is for, and where: gradients of parameters, or an op's activations."""
    role = edge.producer.meta.get("role")
    if role == "param":
        return ("parameters" if kind == "all_gather" else "gradients of parameters"), ""
    if role is not None:
        return f"{role} of the step", ""
    way = "gradients at" if backward else "activations at"
    name = "the outputs" if edge.consumer.op == "output" else op_of(edge.consumer)
    return f"{way} {name}", edge.consumer.meta.get("module", "")


def op_of(node: Node) -> str:
    """`linear`, `mul`: the op's name without namespace and overload."""
    return op_name(node.target)


def renamed(sharding: Sharding, rename: Mapping[str, str]) -> Sharding:
    """The same sharding with the mesh axes called otherwise."""
    return replace(
        sharding,
        splits=tuple(replace(s, axes=tuple(rename[a] for a in s.axes)) for s in sharding.splits),
        partial=tuple((rename[a], kind) for a, kind in sharding.partial),
        varying=tuple(rename[a] for a in sharding.varying),
    )
