"""Hints on a graph: found by name, kept as metadata, and what they leave of a node's options."""

from __future__ import annotations

import difflib
import fnmatch
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import TypeVar

import torch
import torch.fx

import autopar.ops  # noqa: F401 (registers torch.ops.autopar)
from autopar.cost.families import op_name, short_name
from autopar.errors import UserError
from autopar.ir.graph import Graph, Value, values_of
from autopar.ir.hint import MARK, Hint, make_hint

from .columns import is_getitem
from .describe import pattern, type_of
from .families import THREE_AXES
from .options import Option

Node = torch.fx.Node
T = TypeVar("T")
AXES = tuple(dict.fromkeys(name for roles in THREE_AXES for name, _ in roles))


def with_hints(graph: Graph, hints: Sequence[Hint], strict: bool = True) -> Graph:
    """The graph with the hints that forward has and those given here as metadata.

    Raises UserError for names, dims and axes that are not there, and for hints that contradict each
    other; unless `strict`, hints without a node are left out instead.
    """
    new = graph.copy()
    found: dict[Node, dict[Hint, None]] = {n: dict.fromkeys(_written(n)) for n in new.calls()}
    params, ops = _names(new)
    for hint in hints:
        names = params if hint.kind == "param" else ops
        hits = _matching(names, hint.target)
        if not hits and strict:
            raise _unknown(names, hint)
        for node in hits:
            if strict or _fits(node, hint):
                found.setdefault(node, {}).setdefault(_of(node, hint))
    for node, given in found.items():
        if given or MARK in node.meta:
            node.meta[MARK] = tuple(given)
            _check_together(node, tuple(given))
    return new


def without_hints(graph: Graph, left_out: Iterable[Hint] | None = None) -> Graph:
    """The graph without some hints (all of them if none are given), forward's own included."""
    new = graph.copy()
    gone = None if left_out is None else set(left_out)
    for node in new.fx.nodes:
        given = hints_at(node)
        if given:
            node.meta[MARK] = () if gone is None else tuple(h for h in given if h not in gone)
    return new


def hints_at(node: Node) -> tuple[Hint, ...]:
    """The hints of a parameter or an op."""
    given = node.meta.get(MARK)
    return _written(node) if given is None else given


def hints_in(graph: Graph) -> list[Hint]:
    """The different hints of a graph, in the order of its nodes."""
    return list(dict.fromkeys(hint for node in graph.fx.nodes for hint in hints_at(node)))


def hinted_axes(graph: Graph) -> frozenset[str]:
    """The mesh axes over which some hint wants a dim split."""
    return frozenset(axis for h in hints_in(graph) for _, axis in h.split if axis)


def keep_hinted(node: Node, options: list[Option]) -> list[Option]:
    """The options that a node's hints allow; perhaps none."""
    for hint in hints_at(node):
        options = [o for o in options if hint.allows(o.gives[0])]
        if hint.gather is False:
            options = [o for o in options if not o.regather]
    return options


def role_sets_with(axes: frozenset[str]) -> list[tuple[tuple[str, str], ...]]:
    """The sets of axes, from those of three, in which all of some named axes are.

    Where there is none: the named ones.
    """
    found: dict[tuple[tuple[str, str], ...], None] = {}
    for n in (1, 2, 3):
        for roles in THREE_AXES:
            for chosen in combinations(roles, n):
                if axes <= {name for name, _ in chosen}:
                    found.setdefault(chosen)
    role = {name: role for roles in THREE_AXES for name, role in roles}
    return list(found) or [tuple((name, role[name]) for name in AXES if name in axes)]


def check_possible(node: Node, options: Sequence[Option], devices: int) -> None:
    """Raise UserError where a node has options, and one of its hints allows none of them."""
    for hint in hints_at(node):
        unnamed = replace(
            hint,
            split=tuple(dict.fromkeys((dim, "") for dim, _ in hint.split)),
            whole=tuple((dim, axis) for dim, axis in hint.whole if not axis),
        )
        if any(unnamed.allows(o.gives[0]) for o in options):
            continue
        dims = {d for o in options for d, split in enumerate(o.gives[0].splits) if split}
        can = f"dims {', '.join(map(str, sorted(dims)))} can be" if dims else "no dim can be"
        if len(dims) == 1:
            can = f"only dim {min(dims)} can be"
        raise UserError(
            f"the hint {hint} cannot be kept: of {_called(node)}, {type_of(values_of(node)[0])}, "
            f"{can} split on {devices} devices",
            where=node.meta.get("source") or None,
            fix="change the hint or leave it out",
        )


def op_names(node: Node) -> list[str]:
    """Everything an op can be called by: its name, module, both, the op, its source line."""
    module, op = node.meta.get("module", ""), op_name(node.target)
    names = [node.name, module, pattern(module), f"{module}.{op}".lstrip("."), op, short_name(op)]
    return list(dict.fromkeys(n for n in (*names, node.meta.get("source", "")) if n))


def nearest(name: str, known: Iterable[str]) -> str | None:
    """What to say of the names that are most like one that is not known."""
    near = difflib.get_close_matches(name, list(known), n=5, cutoff=0.4)
    return f"nearest: {', '.join(near)}" if near else None


def _written(node: Node) -> tuple[Hint, ...]:
    """The hint that a call of `autopar.hint` in forward is."""
    if node.target is not torch.ops.autopar.hint.default:
        return ()
    said = json.loads(str(node.args[1]))
    line = node.meta.get("source", "")
    module = pattern(node.meta.get("module", ""))
    target = " ".join(part for part in (module, f"at {line}" if line else "") if part)
    return (_of(node, make_hint("op", target or node.name, **said)),)


def _names(graph: Graph) -> tuple[dict[str, list[Node]], dict[str, list[Node]]]:
    params: dict[str, list[Node]] = {}
    ops: dict[str, list[Node]] = {}
    for node in graph.placeholders("param"):
        for fqn in node.meta["fqns"]:
            params.setdefault(fqn, []).append(node)
    for node in graph.calls():
        if not is_getitem(node) and values_of(node):
            for name in op_names(node):
                ops.setdefault(name, []).append(node)
    return params, ops


def _matching(names: Mapping[str, list[Node]], wanted: str) -> list[Node]:
    hits = [wanted] if wanted in names else [n for n in names if fnmatch.fnmatchcase(n, wanted)]
    return list(dict.fromkeys(node for name in hits for node in names[name]))


def _unknown(names: Mapping[str, list[Node]], hint: Hint) -> UserError:
    what = "a parameter" if hint.kind == "param" else "an op"
    return UserError(
        f"the hint {hint} is for {what} that the model does not have",
        fix=nearest(hint.target, names) or "see `autopar plan` for the names",
    )


def _fits(node: Node, hint: Hint) -> bool:
    rank = values_of(node)[0].rank
    return all(-rank <= dim < rank for dim in hint.dims) and set(hint.axes) <= set(AXES)


def _of(node: Node, hint: Hint) -> Hint:
    """The hint with its dims counted from the front; raises UserError if there is no such dim."""
    value: Value = values_of(node)[0]
    where = node.meta.get("source") or None
    for dim in hint.dims:
        if not -value.rank <= dim < value.rank:
            raise UserError(
                f"the hint {hint} names dim {dim}, and {_called(node)} is {type_of(value)}",
                where=where,
                fix=f"use a dim from 0 to {value.rank - 1}" if value.rank else None,
            )
    for axis in hint.axes:
        if axis not in AXES:
            raise UserError(
                f"the hint {hint} names the mesh axis {axis!r}",
                where=where,
                fix=f"use one of {', '.join(AXES)}, or no axis",
            )

    def front(pairs: tuple[tuple[int, str], ...]) -> tuple[tuple[int, str], ...]:
        return tuple((dim % value.rank, axis) for dim, axis in pairs)

    made = replace(hint, split=front(hint.split), whole=front(hint.whole))
    if made != hint:
        make_hint(hint.kind, hint.target, **made.words())  # dims -1 and 1 may be one
    return made


def _check_together(node: Node, hints: Sequence[Hint]) -> None:
    for a in hints:
        for b in hints:
            whole = {d for d, axis in b.whole if not axis} | {
                d for d, axis in b.whole if (d, axis) in a.split
            }
            unsplit = b.replicated or b.sharded is False
            clash = any(unsplit or dim in whole for dim, _ in a.split)
            if clash or (a.sharded and unsplit):
                raise UserError(
                    f"the hints {a} and {b} contradict each other: both are for {_called(node)}",
                    where=node.meta.get("source") or None,
                    fix="leave one of them out",
                )


def _called(node: Node) -> str:
    return str(node.meta["fqns"][0]) if node.op == "placeholder" else node.name
