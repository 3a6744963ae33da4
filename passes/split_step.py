"""A step on micro-batches in three programs: before them, of one of them, and after them."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.fx

from autopar.errors import PassError, UserError
from autopar.ir.graph import Graph, Value, value_of, values_of
from autopar.ir.lowered import (
    COLLECTIVE,
    GATHER_INV,
    GATHER_VARY,
    KEEP_FIRST,
    MICRO_FIRST,
    MICRO_SLICE,
    PMAX,
    PMIN,
    PSUM,
    PVARY,
    SLICE_INV,
    SLICE_VARY,
)
from autopar.ir.mesh import MICRO_BATCH, Mesh
from autopar.ir.recomputed import MARK
from autopar.ir.step import Combine, StepGraphs
from autopar.ir.text import print_node

Node = torch.fx.Node

PROLOGUE, BODY, TAIL, GIVEN = "prologue", "body", "tail", "given"
LOSS_FIX = (
    "return the loss from forward, a sum or mean over the batch, or run without micro-batches"
)


def split_step(graph: Graph, mesh: Mesh, sends: bool = False) -> StepGraphs:
    """Split a graph of typed collectives, one axis of which is `mb`, where micro-batches begin.

    Before them is what reads no part of the batch. After them is what their partial results, added
    up, and their shares of the batch, put together, go into. Gathers of parameters that are dropped
    after use are done for every micro-batch. `sends` says that the graph is a piece before the
    last. Raises UserError where a micro-batch would need others, naming the op, and where gradients
    are wanted of something else than a sum over micro-batches.
    Ends: collectives on `mb`. Establishes: `no_micro_batch_axis`.
    """
    splitter = _Splitter(graph, mesh)
    splitter.classify(sends)
    return splitter.sending() if sends else splitter.split()


@dataclass
class _Splitter:
    graph: Graph
    mesh: Mesh
    part: dict[Node, str] = field(default_factory=dict)
    same: dict[Node, Node] = field(default_factory=dict)  # collectives on mb that do nothing
    reason: dict[Node, Node] = field(default_factory=dict)  # why a node is in the tail
    once: set[Node] = field(default_factory=set)  # parameters gathered once, though dropped
    carried: set[Node] = field(default_factory=set)  # buffers that micro-batches hand on
    index: Node | None = None

    # -- which part a node is in -------------------------------------------------------------------

    def classify(self, sends: bool) -> None:
        """Give every node its part; raises UserError where a body would read a tail."""
        self._parts()
        self._gather_once()
        # What reads a buffer that micro-batches write is of every one of them, too.
        while written := self._written() - self.carried:
            self.carried |= written
            for known in (self.part, self.same, self.reason):
                known.clear()
            self._parts()
        self._sink(sends)

    def _gather_once(self) -> None:
        """Gather once what alone decides a buffer's new value, which a step has only one of.

        The vectors of spectral normalisation follow from the weight: every micro-batch that
        gathered it again would take them a step further.
        """
        whole: set[Node] = set()
        for new in self._new_values().values():
            behind = _with_inputs(new) if self.part[new] == BODY else set()
            if not any(_on_mb(v) in "SP" for node in behind for v in values_of(node)):
                whole |= {n for n in behind if n.op == "placeholder" and n.meta.get("regather")}
        if whole:
            self.once |= whole
            for known in (self.part, self.same, self.reason):
                known.clear()
            self._parts()

    def _new_values(self) -> dict[str, Node]:
        """What buffers become, by their names."""
        entries: Any = self.graph.output_node.args[0]
        return dict(zip(self.graph.mutated, entries[self.graph.outputs :], strict=True))

    def _written(self) -> set[Node]:
        """The buffers whose new values a body makes."""
        new = self._new_values()
        return {
            node
            for node in self.graph.placeholders("buffer")
            if node.name in new and self.part[new[node.name]] == BODY
        }

    def _parts(self) -> None:
        for node in self.graph.fx.nodes:
            if node.op == "placeholder":
                self.part[node] = self._placeholder(node)
            elif node.op == "call_function":
                if node.target is COLLECTIVE and node.args[1] == MICRO_BATCH:
                    self._collective(node)
                else:
                    self._call(node)

    def _placeholder(self, node: Node) -> str:
        role = node.meta["role"]
        again = role == "param" and node.meta.get("regather") and node not in self.once
        if role == "received" or again:
            return BODY
        return PROLOGUE if role == "param" else GIVEN

    def _collective(self, node: Node) -> None:
        arguments: Any = node.args
        op, _, source = arguments
        if op is PVARY or self.mesh[MICRO_BATCH].size == 1:
            self.same[node] = source
            self.part[node] = BODY if source in self.carried else self.part[source]
            if source in self.reason:
                self.reason[node] = self.reason[source]
        elif op in (SLICE_INV, SLICE_VARY, KEEP_FIRST):
            self.part[node] = BODY
            if self.part[source] == TAIL:
                raise self._needs_others(self.reason[source])
        elif op in (PSUM, PMAX, PMIN, GATHER_INV, GATHER_VARY):
            self.same[node] = source
            self.part[node] = TAIL
            self.reason[node] = next(iter(node.users), node)
        else:
            raise self._needs_others(next(iter(node.users), node))

    def _call(self, node: Node) -> None:
        inputs = [n for n in node.all_input_nodes if values_of(n) or n.op == "call_function"]
        split = any(_on_mb(value) in "SP" for value in values_of(node))
        tails = [n for n in inputs if self.part[n] == TAIL]
        if tails:
            cut = next((n for n in inputs if any(_on_mb(v) in "SP" for v in values_of(n))), None)
            if split or cut is not None:
                raise self._needs_others(self.reason[tails[0]])
            self.part[node], self.reason[node] = TAIL, self.reason[tails[0]]
        elif split or any(n in self.carried or self.part[n] in self.before_body for n in inputs):
            self.part[node] = BODY
        else:
            self.part[node] = PROLOGUE

    @property
    def before_body(self) -> tuple[str, ...]:
        """Parts whose readers are in the body: also what is given, of a single micro-batch."""
        return (BODY, GIVEN) if self.mesh[MICRO_BATCH].size == 1 else (BODY,)

    def _sink(self, sends: bool) -> None:
        """Sums over devices that only the tail reads are taken once, of the sum of all."""
        entries: Any = self.graph.output_node.args[0]
        sent = set(entries[: self.graph.outputs]) if sends else set()  # in every micro-batch
        for node in reversed(self.graph.fx.nodes):
            if node.target is not COLLECTIVE or self.part[node] != BODY or node.args[0] is not PSUM:
                continue
            if node in sent:
                continue
            if _on_mb(value_of(node)) == "P" and all(
                user.op == "output" or self.part[user] == TAIL for user in node.users
            ):
                self.part[node] = TAIL

    def _needs_others(self, node: Node) -> UserError:
        while node.target in (COLLECTIVE, operator.getitem) and node.users:
            node = next(iter(node.users))
        return UserError(
            "the model cannot run in micro-batches: "
            f"{_name(node)} combines samples of the whole batch",
            where=node.meta.get("source") or None,
            fix="leave micro-batches out (micro_batches 1)",
        )

    # -- the three programs ------------------------------------------------------------------------

    def split(self) -> StepGraphs:
        """The programs of a model, or of its last piece."""
        results: list[Any] = list(self.graph.output_node.args[0])  # type: ignore[arg-type]
        user, new = results[: self.graph.outputs], results[self.graph.outputs :]
        objective, loss = self._objective(user)
        updates = dict(zip(self.graph.mutated, new, strict=True))
        in_body = {b: n for b, n in updates.items() if self.part[n] == BODY}
        in_tail = {b: n for b, n in updates.items() if b not in in_body}
        tail = self._tail([*user, *in_tail.values()], tuple(in_tail))
        combined = [n for n in tail.foreign if self.part[n] == BODY]
        more = [] if objective is None or objective in combined else [objective]
        wanted = [*combined, *more]
        body = self._body(wanted, in_body)
        prologue, prepared = self._prologue(body, tail)
        return StepGraphs(
            prologue,
            body.graph,
            tail.graph,
            prepared,
            tuple(_combine(value_of(n)) for n in combined),
            None if objective is None else wanted.index(objective),
            loss,
        )

    def sending(self) -> StepGraphs:
        """The programs of a piece that another one follows: its results are sent as they are.

        What new values of buffers are made of comes after them in each micro-batch's results.
        """
        results: list[Any] = list(self.graph.output_node.args[0])  # type: ignore[arg-type]
        sent, new = results[: self.graph.outputs], results[self.graph.outputs :]
        updates = dict(zip(self.graph.mutated, new, strict=True))
        in_body = {b: n for b, n in updates.items() if self.part[n] == BODY}
        in_tail = {b: n for b, n in updates.items() if b not in in_body}
        for node in sent:
            if self.part[node] == TAIL:
                raise self._needs_others(self.reason[node])
        tail = self._tail(list(in_tail.values()), tuple(in_tail))
        combined = [n for n in tail.foreign if self.part[n] == BODY]
        body = self._body([*sent, *combined], in_body)
        prologue, prepared = self._prologue(body, tail)
        how = tuple(_combine(value_of(n)) for n in combined)
        return StepGraphs(prologue, body.graph, tail.graph, prepared, how)

    def _objective(self, user: Sequence[Any]) -> tuple[Node | None, int | None]:
        """What of the body adds up to the loss, and which result of the user's code that is."""
        differentiable = [n for n in user if isinstance(n, Node) and value_of(n).requires_grad]
        if not differentiable:
            return None, None
        scalars = [n for n in differentiable if value_of(n).numel() == 1]
        sums = {node: found for node in scalars if (found := self._summed(node)) is not None}
        if sums:  # what is made of the others is the whole loss
            terms = set(sums.values())
            loss = max(sums, key=lambda node: len(_before(sums[node]) & terms))
            return sums[loss], user.index(loss)
        if not scalars:
            raise UserError(
                "the model cannot run in micro-batches: what it returns is no loss, so that the "
                "backward could only begin after all of them",
                where=differentiable[0].meta.get("source") or None,
                fix=LOSS_FIX,
            )
        culprit = self._nonlinear(scalars[0])
        raise UserError(
            "the model cannot run in micro-batches: the loss is not a sum of theirs, because of "
            f"{_name(culprit)}",
            where=culprit.meta.get("source") or None,
            fix=LOSS_FIX,
        )

    def _summed(self, node: Node) -> Node | None:
        """The body's node whose sum over micro-batches (and devices) a result is, if it is one."""
        while self.part[node] == TAIL and node.target is COLLECTIVE:
            arguments: Any = node.args
            if arguments[0] is not PSUM:
                return None
            node = arguments[2]
        if self.part[node] != BODY:
            return None
        return node if _on_mb(value_of(node)) == "P" or self.mesh[MICRO_BATCH].size == 1 else None

    def _nonlinear(self, node: Node) -> Node:
        """The first op of the tail that a result depends on."""
        needed, stack = {node}, [node]
        while stack:
            before = [n for n in stack.pop().all_input_nodes if self.part[n] == TAIL]
            stack += [n for n in before if n not in needed]
            needed.update(before)
        ops = (n for n in self.graph.fx.nodes if n in needed and n.target is not COLLECTIVE)
        return next(ops, node)

    def _seen(self, node: Any) -> Node:
        """The node behind collectives that do nothing."""
        while node in self.same:
            node = self.same[node]
        found: Node = node
        return found

    def _body(self, results: Sequence[Node], updates: Mapping[str, Node]) -> _Part:
        made = _Part(self, BODY)
        with_index = made.placeholder(MICRO_BATCH, {"value": None, "role": "micro_batch"})
        made.build([*results, *updates.values()], len(results), tuple(updates), with_index)
        return made

    def _tail(self, results: Sequence[Any], updates: tuple[str, ...]) -> _Part:
        made = _Part(self, TAIL)
        made.build(results, len(results) - len(updates), updates)
        return made

    def _prologue(self, *readers: _Part) -> tuple[Graph, tuple[str, ...]]:
        wanted = dict.fromkeys(
            n for reader in readers for n in reader.foreign if self.part[n] == PROLOGUE
        )
        made = _Part(self, PROLOGUE)
        made.build(list(wanted), len(wanted))
        return made.graph, tuple(node.name for node in wanted)


class _Part:
    """One of the three programs while it is built; `foreign` are other parts' nodes it reads."""

    def __init__(self, splitter: _Splitter, name: str) -> None:
        self.splitter, self.name = splitter, name
        self.fx = torch.fx.Graph()
        self.env: dict[Node, Node] = {}
        self.foreign: dict[Node, None] = {}
        self.graph = Graph(self.fx, 0)

    def placeholder(self, name: str, meta: Mapping[str, Any]) -> Node:
        node = self.fx.placeholder(name)
        node.meta = {"fqns": (name,), **meta}
        return node

    def build(
        self,
        results: Sequence[Any],
        outputs: int,
        mutated: tuple[str, ...] = (),
        index: Node | None = None,
    ) -> None:
        """Copy what the results need: nodes of this part, placeholders for all others."""
        mine, foreign = self._needed(results)
        buffers = [n for n in self.splitter.graph.placeholders("buffer") if n.name in mutated]
        for node in dict.fromkeys((*foreign, *buffers)):
            self._placeholder_for(node)
        for node in mine:
            if node.op == "placeholder":
                self._placeholder_for(node)
        for node in mine:
            if node.op != "placeholder":
                self._copy(node, index)
        self.fx.output(tuple(self._at(r) for r in results))
        self.graph = Graph(self.fx, outputs, mutated)

    def _needed(self, results: Sequence[Any]) -> tuple[list[Node], list[Node]]:
        part, same = self.splitter.part, self.splitter.same
        needed: set[Node] = set()
        stack = [n for n in results if isinstance(n, Node)]
        while stack:
            node = stack.pop()
            if node in needed:
                continue
            needed.add(node)
            if node in same:
                stack.append(same[node])
            elif part[node] == self.name:
                stack.extend(node.all_input_nodes)
        order = [n for n in self.splitter.graph.fx.nodes if n in needed and n not in same]
        mine = [n for n in order if part[n] == self.name]
        return mine, [n for n in order if part[n] != self.name]

    def _placeholder_for(self, node: Node) -> None:
        part, meta = self.splitter.part[node], dict(node.meta)
        if part not in (GIVEN, self.name) and not (part == PROLOGUE == self.name):
            self.foreign[node] = None
            role = "combined" if part == BODY else "prepared"
            meta |= {"role": role, "fqns": (node.name,), MARK: None}  # not made again, but given
            meta.pop("regather", None)
        self.env[node] = self.placeholder(node.name, meta)
        self.env[node].meta["value"] = self._typed(node.meta["value"])

    def _copy(self, node: Node, index: Node | None) -> None:
        new = self.fx.node_copy(node, self._at)
        new.meta = {**node.meta, "value": self._typed(node.meta.get("value"))}
        if self.name != BODY:
            new.meta[MARK] = None
        arguments: Any = node.args
        if node.target is COLLECTIVE and arguments[1] == MICRO_BATCH:
            assert index is not None
            new.target = MICRO_FIRST if arguments[0] is KEEP_FIRST else MICRO_SLICE
            new.args = (self._at(arguments[2]), index)
        self.env[node] = new

    def _at(self, node: Any) -> Any:
        if not isinstance(node, Node):
            return node
        return self.env[self.splitter._seen(node)]

    def _typed(self, value: Any) -> Any:
        """Outside of the body there is no axis `mb`."""
        if isinstance(value, tuple):
            return tuple(self._typed(v) for v in value)
        if self.name == BODY or not isinstance(value, Value) or value.sharding is None:
            return value
        sharding = value.sharding.without_axis(MICRO_BATCH)
        return value.with_sharding(
            replace(sharding, varying=tuple(a for a in sharding.varying if a != MICRO_BATCH))
        )


def _before(node: Node) -> set[Node]:
    """The nodes that a node is made of, itself among them."""
    found, stack = {node}, [node]
    while stack:
        more = [n for n in stack.pop().all_input_nodes if n not in found]
        found.update(more)
        stack += more
    return found


def _with_inputs(node: Node) -> set[Node]:
    """A node and all that it is made of."""
    found: set[Node] = set()
    stack = [node]
    while stack:
        if (one := stack.pop()) not in found:
            found.add(one)
            stack += one.all_input_nodes
    return found


def _on_mb(value: Value) -> str:
    assert value.sharding is not None
    return value.sharding.kind(MICRO_BATCH)


def _combine(value: Value) -> Combine:
    assert value.sharding is not None
    dim = value.sharding.dim_of(MICRO_BATCH)
    if dim is not None:
        return Combine("cat", dim, value.sharding.splits[dim].outer)
    return Combine(dict(value.sharding.partial).get(MICRO_BATCH, "last"))


def _name(node: Node) -> str:
    target: Any = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return node.name
    return str(target).split(".")[1]


def check_even(graph: Graph, mesh: Mesh) -> None:
    """Raise PassError where micro-batches would have different shapes."""
    size = mesh[MICRO_BATCH].size
    for node in graph.fx.nodes:
        for value in values_of(node):
            dim = value.sharding.dim_of(MICRO_BATCH) if value.sharding is not None else None
            if dim is None or value.sharding is None:
                continue
            split = value.sharding.splits[dim]
            units = value.int_shape()[dim] // (split.outer * split.block)
            if split.axes[0] != MICRO_BATCH or units % size:
                what = f"%{node.name} has {units} units for {size} micro-batches"
                raise PassError("split_step", "micro_batches_are_even", what, print_node(node))
