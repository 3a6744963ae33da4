"""Keep batch and sequence apart where the user's code flattens them into tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.fx

from autopar import token_ops
from autopar.ir.graph import Graph, Size, Value, value_of, values_of
from autopar.ir.registry import op_name
from autopar.ir.rules import pointwise, views
from autopar.ir.rules.common import arguments, dim_index, dim_indices, same

from .free_factories import erase_unread

aten = torch.ops.aten
Node = torch.fx.Node
Lead = tuple[Size, ...]

_RESHAPES = frozenset(f"aten.{name}" for name in (*views.RESHAPES, "view"))
# Without those that draw by position, mean a dim by its place, or look at another tensor's shape.
_POINTWISE = frozenset(pointwise.RULES) - {
    *("aten.dropout", "aten.rrelu_with_noise", "aten.prelu", "aten.type_as", "aten.copy"),
    "autopar.hint",
}
_OF_EVERYTHING = (aten.sum.default, aten.mean.default)
_LOSS = aten.cross_entropy_loss.default


def unflatten_tokens(graph: Graph) -> Graph:
    """Run chains of ops on flattened tokens, `bsd->(bs)d`, on the dims that were merged.

    A chain begins where leading dims are merged, goes through ops that treat every row alike
    (pointwise, linear, norms, softmax of features), and ends where the dims come apart again, in a
    cross-entropy, or in a sum or mean of everything. Only what leads to such an end is rewritten; a
    reader outside gets the flat tensor. Nodes keep their names, and what the user's source says of
    them; `cross_entropy_loss` and `addmm` become the ops of `autopar.token_ops`.
    """
    new = graph.copy()
    chains = _Chains()
    for node in new.calls():
        chains.add(node)
    writer = _Writer(new, chains, chains.leading_to_ends())
    for node in list(new.fx.nodes):
        writer.rewrite(node)
    for node, source in writer.unchanged.items():
        node.replace_all_uses_with(source)
    for node in reversed(list(new.fx.nodes)):
        if node in chains.merges or node in writer.unchanged:
            erase_unread(new, node)
    return new


@dataclass(frozen=True)
class _Chains:
    """What of a graph could keep its tokens apart, and the dims that they would have.

    `merges` are the reshapes that begin chains, `rows` the ops in them whose results are rows of
    tokens, `ends` the ops that end them. A loss of every token is both an end and rows.
    """

    merges: dict[Node, Lead] = field(default_factory=dict)
    rows: dict[Node, Lead] = field(default_factory=dict)
    ends: dict[Node, Lead] = field(default_factory=dict)

    def lead(self, node: Any) -> Lead | None:
        """The dims that a value could have in place of its first one."""
        return self.merges.get(node) or self.rows.get(node) if isinstance(node, Node) else None

    def add(self, node: Node) -> None:
        """Note what a node is, given those before it."""
        if not isinstance(node.target, torch._ops.OpOverload):
            return
        if not isinstance(node.meta.get("value"), Value):
            return
        leads = {lead for n in node.all_input_nodes if (lead := self.lead(n))}
        if len(leads) == 1 and all(values_of(n) for n in node.all_input_nodes):
            (lead,) = leads
            if self._is_end(node, lead):
                self.ends[node] = lead
            if self._is_rows(node, lead):
                self.rows[node] = lead
        merged = _merged(node)
        if merged and node not in self.ends and node not in self.rows:
            self.merges[node] = merged

    def _is_end(self, node: Node, lead: Lead) -> bool:
        a = arguments(node)
        if node.target is _LOSS:
            return (
                value_of(a["self"]).rank == 2
                and self.lead(a["self"]) == self.lead(a["target"]) == lead
            )
        shape = value_of(node).shape
        comes_apart = len(shape) >= len(lead) and all(map(same, shape, lead))
        return node.target in _OF_EVERYTHING or (_is_reshape(node) and comes_apart)

    def _is_rows(self, node: Node, lead: Lead) -> bool:
        """Whether row i of the result is made of rows i of the flat inputs."""
        if not value_of(node).rank or node in self.ends:
            return node in self.ends and node.target is _LOSS and value_of(node).rank == 1
        flat = [n for n in node.all_input_nodes if self.lead(n)]
        if _is_reshape(node):
            return same(value_of(node).shape[0], value_of(flat[0]).shape[0])
        name = op_name(node).rpartition(".")[0]
        if name in _POINTWISE:
            return all(_aligns(node, n, n in flat) for n in node.all_input_nodes)
        check = _ROW_WISE.get(name)
        return check is not None and check(arguments(node), value_of(flat[0]).rank, flat)

    def leading_to_ends(self) -> set[Node]:
        """The ends, and the ops from whose results one can be reached inside the chains."""
        wanted: set[Node] = set()
        stack = list(self.ends)
        while stack:
            node = stack.pop()
            if node not in wanted:
                wanted.add(node)
                stack += [n for n in node.all_input_nodes if n in self.rows]
        return wanted


def _aligns(node: Node, source: Node, is_flat: bool) -> bool:
    """Whether an input of a pointwise op has rows of tokens, or is the same for all tokens."""
    rank, shape = value_of(node).rank, value_of(source).shape
    if is_flat:
        return len(shape) == rank
    return len(shape) < rank or (len(shape) == rank and same(shape[0], 1))


def _product(a: dict[str, Any], rank: int, flat: list[Node]) -> bool:
    left, right = (a[n] for n in (("self", "other") if "other" in a else ("self", "mat2")))
    return flat == [left] and rank == 2 and value_of(right).rank == 2


def _addmm(a: dict[str, Any], rank: int, flat: list[Node]) -> bool:
    plain = a["beta"] == 1 and a["alpha"] == 1
    return flat == [a["mat1"]] and plain and value_of(a["self"]).rank == 1


_ROW_WISE: Mapping[str, Callable[[dict[str, Any], int, list[Node]], bool]] = {
    "aten.linear": lambda a, rank, flat: flat == [a["input"]] and value_of(a["weight"]).rank == 2,
    "aten.matmul": _product,
    "aten.mm": _product,
    "aten.addmm": _addmm,
    "aten.layer_norm": lambda a, rank, flat: (
        flat == [a["input"]] and len(a["normalized_shape"]) < rank
    ),
    "aten.rms_norm": lambda a, rank, flat: (
        flat == [a["input"]] and len(a["normalized_shape"]) < rank
    ),
    **{
        f"aten.{name}": lambda a, rank, flat: dim_index(a["dim"], rank) > 0
        for name in ("softmax", "log_softmax", "_safe_softmax")
    },
    **{
        f"aten.{name}": lambda a, rank, flat: 0 not in dim_indices(a["dim"], rank)
        for name in ("mean", "sum")
    },
}


def _is_reshape(node: Node) -> bool:
    """Whether a call changes nothing but the shape of its only input."""
    return (
        op_name(node).rpartition(".")[0] in _RESHAPES
        and "dtype" not in arguments(node)
        and len(node.all_input_nodes) == 1
    )


def _merged(node: Node) -> Lead | None:
    """The leading dims that a reshape makes one, whatever it does with the dims behind them."""
    if not _is_reshape(node):
        return None
    before, after = value_of(node.all_input_nodes[0]).shape, value_of(node).shape
    if not after:
        return None
    whole = len(before) - len(after) + 1  # where the dims behind stay as they are
    counts = range(2, len(before)) if len(after) > 1 else ()
    for count in dict.fromkeys((whole, *counts)):
        if count < 2 or not same(_product_of(before[:count]), after[0]):
            continue
        if count != whole or all(map(same, before[count:], after[1:])):
            return before[:count]
    return None


def _product_of(sizes: Lead) -> Size:
    found: Size = 1
    for size in sizes:
        found = found * size
    return found


@dataclass(frozen=True)
class _Writer:
    """Rewrites wanted nodes in place, in order; `unchanged` are reshapes that do nothing now."""

    graph: Graph
    chains: _Chains
    wanted: set[Node]
    unchanged: dict[Node, Node] = field(default_factory=dict)
    apart: dict[Node, Node] = field(default_factory=dict)
    flattened: dict[Node, Node] = field(default_factory=dict)

    def rewrite(self, node: Node) -> None:
        """Rewrite a node, whose inputs have been."""
        lead = self.chains.ends.get(node) or self.chains.rows.get(node)
        if node not in self.wanted or lead is None:
            for source in node.all_input_nodes:
                if source in self.wanted and source in self.chains.rows:
                    node.replace_input_with(source, self._flat(source))
            return
        shape = value_of(node).shape
        if node in self.chains.rows:
            shape = (*lead, *shape[1:])
        if _is_reshape(node):
            self._reshape(node, shape)
            return
        node.args, node.kwargs = self._arguments(node)
        node.target = _FOR_TOKENS.get(node.target, node.target)
        node.meta["value"] = replace(value_of(node), shape=shape)

    def _reshape(self, node: Node, shape: tuple[Size, ...]) -> None:
        source = self._apart(node.all_input_nodes[0])
        before = value_of(source).shape
        if len(before) == len(shape) and all(map(same, before, shape)):
            self.unchanged[node] = source
        node.target, node.args, node.kwargs = aten.reshape.default, (source, list(shape)), {}
        node.meta["value"] = replace(value_of(node), shape=shape)

    def _arguments(self, node: Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments with the tokens of inputs apart, and dims counted from the end."""
        rank = max(self._flat_rank(n) for n in node.all_input_nodes)
        found = {
            name: self._apart(x) if self.chains.lead(x) else x
            for name, x in arguments(node).items()
        }
        dim = found.get("dim")
        if isinstance(dim, int):
            found["dim"] = dim_index(dim, rank) - rank
        elif isinstance(dim, (list, tuple)):
            found["dim"] = [dim_index(d, rank) - rank for d in dim]
        if node.target is aten.addmm.default:
            return (found["self"], found["mat1"], found["mat2"]), {}
        schema = node.target._schema.arguments  # type: ignore[union-attr]
        given = schema[: len(node.args)]
        return (
            tuple(found[s.name] for s in given),
            {name: found[name] for name in node.kwargs},
        )

    def _flat_rank(self, node: Node) -> int:
        """Dims that a value had before any was taken apart."""
        rank = value_of(node).rank
        changed = node in self.wanted and node in self.chains.rows
        return rank - len(self.chains.rows[node]) + 1 if changed else rank

    def _apart(self, node: Node) -> Node:
        """A flat value with its tokens apart."""
        if node not in self.chains.merges:
            return node
        if node not in self.apart:
            source = node.all_input_nodes[0]
            shape = (*self.chains.merges[node], *value_of(node).shape[1:])
            before = value_of(source).shape
            if len(before) != len(shape) or not all(map(same, before, shape)):
                source = self._reshaped(source, shape, node)
            self.apart[node] = source
        return self.apart[node]

    def _flat(self, node: Node) -> Node:
        """A value with its tokens apart, flattened for a reader outside the chains."""
        if node not in self.flattened:
            count = len(self.chains.rows[node])
            shape = value_of(node).shape
            flat = (_product_of(shape[:count]), *shape[count:])
            self.flattened[node] = self._reshaped(node, flat, node)
        return self.flattened[node]

    def _reshaped(self, source: Node, shape: tuple[Size, ...], like: Node) -> Node:
        """A reshape of a value, behind `like`, whose place in the source it has."""
        with self.graph.fx.inserting_after(like):
            made = self.graph.fx.call_function(aten.reshape.default, (source, list(shape)))
        made.meta = {**like.meta, "value": replace(value_of(like), shape=shape)}
        return made


_FOR_TOKENS: Mapping[Any, Any] = {
    _LOSS: token_ops.cross_entropy.default,
    aten.addmm.default: token_ops.addmm.default,
    aten.mm.default: aten.matmul.default,
}
