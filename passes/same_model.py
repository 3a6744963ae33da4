"""What a plan remembers of its model, and how another model differs from it."""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch.fx
from torch.fx.node import map_aggregate

from autopar.capture.fingerprint import without_sizes
from autopar.cost.families import op_name
from autopar.errors import UserError
from autopar.ir.graph import Graph, value_of, values_of
from autopar.plan import ModelPart, Plan

from .columns import is_getitem
from .describe import collapse, pattern, type_of

Node = torch.fx.Node
MOST_SHOWN = 8  # differences
TAKEN = "inputs and buffers"

_BLOCK = re.compile(r"(?:.*?\.)?\d+(?=\.|$)")  # up to the first layer number
_ANY = re.compile(r"\{[^}]*\}|(?<![^.])\d+(?![^.])")


def parts_of(graph: Graph) -> tuple[ModelPart, ...]:
    """The ops of a prepared graph by repeated block; blocks that do the same are one part.

    The first part is what forward takes beside parameters.
    """
    taken = tuple(
        f"{n.meta['role']} {n.meta['fqns'][0]} ({value_of(n).rank} dims of {value_of(n).dtype})"
        for n in graph.placeholders()
        if n.meta["role"] in ("input", "buffer") and values_of(n)
    )
    blocks: dict[str, list[str]] = defaultdict(list)
    for node in graph.calls():
        if not is_getitem(node):
            found = _BLOCK.match(node.meta.get("module", ""))
            blocks[found[0] if found else ""].append(_op_text(node))
    alike: dict[tuple[str, tuple[str, ...]], list[str]] = defaultdict(list)
    for name, ops in blocks.items():
        alike[pattern(name), tuple(ops)].append(name)
    parts = [ModelPart(collapse(names), len(names), ops) for (_, ops), names in alike.items()]
    return (ModelPart(TAKEN, 1, taken), *parts)


def check_model(plan: Plan, graph: Graph, fingerprint: str, world_size: int | None = None) -> None:
    """Raise UserError if a plan is for another model, with what differs, or other devices.

    `graph` is the prepared captured graph.
    """
    if plan.fingerprint != fingerprint:
        found = changes(plan, graph)
        more = [f"and {len(found) - MOST_SHOWN} more"] if len(found) > MOST_SHOWN else []
        listed = "".join(f"\n  - {line}" for line in (*found[:MOST_SHOWN], *more))
        raise UserError(
            f"the plan was made for another model (or for another version of this one):{listed}",
            fix="make a new plan with `autopar plan`, or load the model the plan was made for",
        )
    plan.check(fingerprint, world_size)


def changes(plan: Plan, graph: Graph) -> list[str]:
    """How the captured model differs from the one the plan was made for, a sentence each."""
    mine = {n.meta["fqns"][0]: type_of(value_of(n)) for n in graph.placeholders("param")}
    planned = {name: stored.type for name, stored in plan.params.items()}
    found = list(_parameters(mine, planned))
    found += _ops(parts_of(graph), plan.model)
    return found or [
        "its parameters, inputs and ops are the same, and they are connected otherwise, or "
        "constants differ"
    ]


def _parameters(mine: Mapping[str, str], planned: Mapping[str, str]) -> Iterator[str]:
    counted: set[str] = set()
    blocks, others = _blocks(mine), _blocks(planned)
    for name in sorted(blocks.keys() & others.keys()):
        if len(blocks[name]) != len(others[name]):
            counted.add(name)
            stars = name.replace("#", "*")
            yield f"the model has {len(blocks[name])} {stars} blocks, the plan {len(others[name])}"
    differ = [n for n in mine if n in planned and mine[n] != planned[n]]
    for names in _together(differ, lambda n: (mine[n], planned[n])):
        one = names[0]
        yield f"parameter {collapse(names)} is {mine[one]}, the plan has {planned[one]}"
    new = [n for n in mine if n not in planned and _block_of(n) not in counted]
    for names in _together(new, lambda n: mine[n]):
        yield f"the plan knows no parameter {collapse(names)} ({mine[names[0]]})"
    gone = [n for n in planned if n not in mine and _block_of(n) not in counted]
    for names in _together(gone, lambda n: planned[n]):
        yield f"the model has no parameter {collapse(names)}, which the plan stores"


def _blocks(names: Iterable[str]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = defaultdict(set)
    for name in names:
        match = _BLOCK.match(name)
        if match:
            found[pattern(match[0])].add(match[0])
    return found


def _block_of(name: str) -> str:
    match = _BLOCK.match(name)
    return pattern(match[0]) if match else ""


def _together(names: Sequence[str], same: Any) -> list[list[str]]:
    groups: dict[Any, list[str]] = defaultdict(list)
    for name in names:
        groups[pattern(name), same(name)].append(name)
    return list(groups.values())


def _ops(mine: Sequence[ModelPart], planned: Sequence[ModelPart]) -> Iterator[str]:
    ours, theirs = _by_pattern(mine), _by_pattern(planned)
    for name in dict.fromkeys((*ours, *theirs)):
        here, there = ours.get(name, []), theirs.get(name, [])
        if not here or not there:
            some = (here or there)[0]
            who, other = ("model", "plan") if here else ("plan", "model")
            yield f"the {who} has ops in {some.module or 'the model itself'}, the {other} none"
            continue
        for i in range(max(len(here), len(there))):
            a, b = here[min(i, len(here) - 1)], there[min(i, len(there) - 1)]
            yield from _sequences(a, b)


def _by_pattern(parts: Sequence[ModelPart]) -> dict[str, list[ModelPart]]:
    found: dict[str, list[ModelPart]] = defaultdict(list)
    for part in parts:
        found[_ANY.sub("#", part.module)].append(part)
    return found


def _sequences(mine: ModelPart, planned: ModelPart) -> Iterator[str]:
    a = [_without_line(op) for op in mine.ops]
    b = [_without_line(op) for op in planned.ops]
    inside = f" in {mine.module}" if mine.module and mine.module != TAKEN else ""
    op = "" if mine.module == TAKEN else "op "
    for kind, i, j, k, m in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        if kind == "equal":
            continue
        both = min(j - i, m - k)
        for x in range(both):
            yield f"{op}{_at(mine.ops[i + x])}{inside} is {_at(planned.ops[k + x])} in the plan"
        for new in mine.ops[i + both : j]:
            yield f"{op}{_at(new)}{inside} is not in the plan"
        for gone in planned.ops[k + both : m]:
            yield f"{op}{_at(gone)}{inside} of the plan is not in the model"


def _op_text(node: Node) -> str:
    def text(item: Any) -> Any:
        return _Text("%") if isinstance(item, Node) else item

    args = map_aggregate(without_sizes(node), text)
    given = [str(a) if a is not None else "_" for a in args]
    while given and given[-1] == "_":
        given.pop()
    given += [f"{name}={text(value)}" for name, value in node.kwargs.items()]
    line = node.meta.get("source", "")
    return f"{op_name(node.target)}({', '.join(given)})" + (f"  {line}" if line else "")


class _Text(str):
    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _without_line(op: str) -> str:
    return op.partition("  ")[0]


def _at(op: str) -> str:
    text, _, line = op.partition("  ")
    return f"{text} at {line}" if line else text
