"""Micro-batches as a mesh axis: what every op does on it follows from the batch.

Micro-batch `k` of `m` is what data parallelism over an outermost axis `mb` of size `m` would give
to its device `k`. So a value is split, partial or replicated on `mb` as on any other axis, means
are divided by what the whole batch has, and the place of an element in it is known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import sympy
import torch
import torch.fx

from autopar.errors import UserError
from autopar.ir.graph import Graph, Value, tensor_inputs, value_of, values_of
from autopar.ir.mesh import MICRO_BATCH, Axis, Mesh
from autopar.ir.rule import REPLICATE, Choice, Placed, ShardingRule, choices
from autopar.ir.rules.common import arguments
from autopar.ir.sharding import Sharding

from .edges import is_getitem, producer_of
from .free_factories import erase_unread
from .options import place_call
from .spell_out_means import FOLLOWS

Node = torch.fx.Node
Choices = Mapping[str, Mapping[str, Choice]]
Rules = Mapping[str, ShardingRule]

GATHERED, REDUCED, COPIED = 100.0, 10.0, 1.0  # what an op is charged for an input it cannot use
BATCH = "b"  # the name of the captured graph's symbol


@dataclass(frozen=True)
class Followed:
    """A graph whose ops have choices on `mb`, too.

    `given` is the sharding of every value, by node name and port: what propagation will find.
    """

    graph: Graph
    mesh: Mesh
    rules: Rules
    choices: Choices
    given: Mapping[tuple[str, int], Sharding]


def with_micro_batches(mesh: Mesh, micro_batches: int) -> Mesh:
    """The mesh with the axis `mb` in front."""
    return Mesh((Axis(MICRO_BATCH, micro_batches), *mesh.axes))


def batch_dims(symbolic: Graph) -> dict[str, frozenset[int]]:
    """The dims of every user input whose size is the batch, or a multiple of it, by node name."""
    found = {}
    for node in symbolic.placeholders("input"):
        for value in values_of(node)[:1]:
            dims = [d for d, size in enumerate(value.shape) if _is_batch(size)]
            found[node.name] = frozenset(dims[:1])
    return found


def _is_batch(size: object) -> bool:
    """Whether a size is `n * b`."""
    if not isinstance(size, sympy.Expr):
        return False
    batch = next((s for s in size.free_symbols if str(s) == BATCH), None)
    return batch is not None and batch not in (size / batch).free_symbols


def follow_micro_batches(
    graph: Graph,
    mesh: Mesh,
    rules: Rules,
    chosen: Choices,
    storage: Mapping[str, Sharding],
    symbolic: Graph,
    statistics: bool = False,
) -> Followed:
    """Give every op a choice on the axis `mb` of `mesh`, and ops that follow one on all axes.

    `graph` has integer sizes, `symbolic` is the captured one, whose batch is a symbol. What depends
    on inputs alone is computed for the whole batch where somebody wants it whole (the count of a
    loss's targets), beside what is computed for a micro-batch. With `statistics`, batch
    normalisation in training takes those of a micro-batch. Raises UserError for batch
    normalisation without it; ops that need the whole batch otherwise run replicated.
    """
    new = graph.copy()
    follower = _Follower(new, mesh, dict(rules), chosen, statistics)
    follower.sizes = {n.name: n.meta.get("value") for n in symbolic.fx.nodes}
    # One micro-batch is the batch: nothing is split.
    dims = batch_dims(symbolic) if mesh[MICRO_BATCH].size > 1 else {}
    for node in list(new.fx.nodes):
        if node.op == "placeholder":
            follower.start(node, dims.get(node.name, frozenset()), storage.get(node.name))
        elif is_getitem(node):
            follower.free[node] = follower.free[producer_of(node)[0]]
        elif node.op == "call_function":
            follower.choose(node)
    follower.compute_whole()
    return Followed(new, mesh, follower.rules, follower.choices, follower.given)


@dataclass
class _Follower:
    graph: Graph
    mesh: Mesh
    rules: dict[str, ShardingRule]
    chosen: Choices
    statistics: bool
    choices: dict[str, dict[str, Choice]] = field(default_factory=dict)
    given: dict[tuple[str, int], Sharding] = field(default_factory=dict)
    free: dict[Node, bool] = field(default_factory=dict)  # depends on no parameter
    sizes: Mapping[str, object] = field(default_factory=dict)
    wanted_whole: list[tuple[Node, int]] = field(default_factory=list)

    def start(self, node: Node, dims: frozenset[int], stored: Sharding | None) -> None:
        """A placeholder: an input counts as split, since a part of it can be taken for nothing."""
        self.free[node] = node.meta["role"] not in ("param", "received")
        for value in values_of(node)[:1]:
            sharding = stored or Sharding.replicated(value.rank)
            for dim in dims:
                sharding = sharding.with_split(dim, (MICRO_BATCH,))
            self.given[node.name, 0] = sharding

    def choose(self, node: Node) -> None:
        """Choose for one op, from what its inputs are."""
        sources = tensor_inputs(node)
        self.free[node] = all(self.free[s] for s in sources)
        chosen = dict(self.chosen.get(node.name, {}))
        follows = [*self.mesh.names[1:]] if node.meta.get(FOLLOWS) else []
        placed = self._placed(node, chosen)
        several = (MICRO_BATCH,) if self.mesh[MICRO_BATCH].size > 1 else ()
        for axis in (*several, *follows):
            candidates = self._candidates(node, axis)
            scored: list[tuple[float, int, Choice, Placed]] = []
            for i, choice in enumerate(candidates):
                found = self._placed(node, {**chosen, axis: choice})
                if found is not None and (axis != MICRO_BATCH or self._is_even(node, found)):
                    scored.append((self._charge(node, axis, found, choice), i, choice, found))
            if scored:
                _, _, choice, placed = min(scored, key=lambda s: s[:2])
                chosen[axis] = choice
        self.choices[node.name] = {a: c for a, c in chosen.items() if c != REPLICATE}
        assert placed is not None
        for port, sharding in enumerate(placed.outputs):
            self.given[node.name, port] = sharding
        for slot, (source, want) in enumerate(zip(sources, placed.inputs, strict=True)):
            have = self._given(source)
            if self.free[source] and _on(have, MICRO_BATCH) not in (_on(want, MICRO_BATCH), "R"):
                self.wanted_whole.append((node, slot))
        self._check_statistics(node, placed)

    def _given(self, source: Node) -> Sharding:
        producer, port = producer_of(source)
        return self.given[producer.name, port]

    def _placed(self, node: Node, chosen: Mapping[str, Choice]) -> Placed | None:
        active = {axis: choice for axis, choice in chosen.items() if choice != REPLICATE}
        return place_call(node, self.rules[node.name], self.mesh, active, uneven=True)

    def _is_even(self, node: Node, placed: Placed) -> bool:
        """Whether every micro-batch has as much of what an op reads and makes."""
        values = [value_of(s) for s in tensor_inputs(node)] + list(values_of(node))
        for value, sharding in zip(values, (*placed.inputs, *placed.outputs), strict=True):
            dim = sharding.dim_of(MICRO_BATCH)
            if dim is None:
                continue
            split = sharding.splits[dim]
            units = value.int_shape()[dim] // (split.outer * split.block)
            if units % self.mesh[MICRO_BATCH].size:
                return False
        return True

    def _candidates(self, node: Node, axis: str) -> list[Choice]:
        """What may be done on an axis without communication: the batch, partial sums, nothing."""
        rule = self.rules[node.name]
        factors: dict[str, None] = {}
        for i, source in enumerate(tensor_inputs(node)):
            dim = self._given(source).dim_of(axis)
            if dim is not None:
                factors.update(dict.fromkeys(rule.inputs[i][dim]))
        if axis == MICRO_BATCH:
            factors.update(dict.fromkeys(self._made_of_batch(node, rule)))
        legal = {c for c in choices(rule) if not c.factor or self._is_quiet(node, rule, c.factor)}
        found = [Choice(factor=f) for f in factors if Choice(factor=f) in legal]
        if any(_on(self._given(s), axis)[:1] == "P" for s in tensor_inputs(node)):
            found += [c for c in choices(rule) if c.linear >= 0]
        return [*found, REPLICATE]

    def _made_of_batch(self, node: Node, rule: ShardingRule) -> list[str]:
        """Factors that the op makes (an expansion's), where they are the batch."""
        made = {f for dims in rule.outputs for dim in dims for f in dim}
        read = {f for dims in rule.inputs for dim in dims for f in dim}
        value = self.sizes.get(node.name)
        if made <= read or not isinstance(value, Value):
            return []
        dims = rule.outputs[0]
        return [
            dim[0]
            for dim, size in zip(dims, value.shape, strict=False)
            if dim and dim[0] not in read and _is_batch(size)
        ]

    def _is_quiet(self, node: Node, rule: ShardingRule, factor: str) -> bool:
        if not rule.communicates_over(factor):
            return True
        return _is_batch_norm(node) and (self.statistics or not _takes_statistics(node))

    def _charge(self, node: Node, axis: str, placed: Placed, choice: Choice) -> float:
        """What an op's inputs lack under a choice; less than nothing where it makes the batch."""
        total = 0.0
        split = False
        for source, want in zip(tensor_inputs(node), placed.inputs, strict=True):
            have = self._given(source)
            split = split or _on(have, axis)[:1] == "S"
            if _on(have, axis) in (_on(want, axis), "R"):
                continue
            if self.free[source] and axis == MICRO_BATCH and _on(want, axis) == "R":
                total += COPIED
            else:
                total += GATHERED if _on(have, axis)[:1] == "S" else REDUCED
        if choice.factor and not split:
            total -= COPIED / 2
        return total

    def _check_statistics(self, node: Node, placed: Placed) -> None:
        if not _is_batch_norm(node) or not _takes_statistics(node) or self.statistics:
            return
        if self._given(tensor_inputs(node)[0]).dim_of(MICRO_BATCH) is not None:
            raise UserError(
                "the model cannot run in micro-batches: batch normalisation in training takes its "
                "mean and variance over the whole batch unless micro_batch_statistics=True",
                where=node.meta.get("source") or None,
                fix="leave micro-batches out, or allow statistics of each micro-batch with "
                "parallelize(..., micro_batch_statistics=True)",
            )

    # -- what is wanted whole ---------------------------------------------------------------------

    def compute_whole(self) -> None:
        """Compute again, for the whole batch, what depends on inputs alone and is wanted whole."""
        made: dict[Node, Node] = {}
        for node, slot in self.wanted_whole:
            source = tensor_inputs(node)[slot]
            whole = self._whole(source, made)
            if whole is not source:
                _replace_input(node, slot, whole)
                erase_unread(self.graph, source)

    def _whole(self, node: Node, made: dict[Node, Node]) -> Node:
        """The node itself where it is whole on `mb`, or reads a user input; else a copy that is."""
        producer, _ = producer_of(node)
        ports = range(len(values_of(producer)))
        split = any(_on(self.given[producer.name, p], MICRO_BATCH) != "R" for p in ports)
        if node.op == "placeholder" or not split:
            return node
        if node not in made:
            with self.graph.fx.inserting_after(node):
                copy = self.graph.fx.node_copy(node, lambda n: self._whole(n, made))
            copy.meta = dict(node.meta)
            self.free[copy] = True
            made[node] = copy
            if not is_getitem(node):
                self.rules[copy.name] = self.rules[node.name]
                chosen = {a: c for a, c in self.choices[node.name].items() if a != MICRO_BATCH}
                self.choices[copy.name] = chosen
                placed = self._placed(copy, chosen)
                assert placed is not None
                for port, sharding in enumerate(placed.outputs):
                    self.given[copy.name, port] = sharding
        return made[node]


def _on(sharding: Sharding, axis: str) -> str:
    """What a sharding says of one axis, layout included: `S0`, `S1:2*4`, `Psum` or `R`."""
    dim = sharding.dim_of(axis)
    if dim is not None:
        split = sharding.splits[dim]
        layout = f":{split.outer}*{split.block}" if split.outer != 1 or split.block != 1 else ""
        return f"S{dim}{layout}"
    reduction = dict(sharding.partial).get(axis)
    return "R" if reduction is None else f"P{reduction}"


def _replace_input(node: Node, slot: int, new: Node) -> None:
    """Replace the tensor input of a node at one place in the order of its arguments."""
    count = iter(range(1 << 30))
    tensors = set(tensor_inputs(node))

    def visit(arg: Node) -> Node:
        return new if arg in tensors and next(count) == slot else arg

    args = torch.fx.map_arg(node.args, visit)
    node.kwargs, node.args = torch.fx.map_arg(node.kwargs, visit), args


def _is_batch_norm(node: Node) -> bool:
    return node.target is torch.ops.autopar.batch_norm.default


def _takes_statistics(node: Node) -> bool:
    return bool(arguments(node)["training"])


def largest_count(micro_batches: int, batch: int | None) -> int:
    """The most micro-batches up to `micro_batches` that divide a batch (1 for a fixed one)."""
    if batch is None:
        return 1
    return max(k for k in range(1, micro_batches + 1) if batch % k == 0)


def batch_size(sizes: Mapping[sympy.Symbol, int]) -> int | None:
    """The size of the batch among the sizes of a capture's symbols; None where it is fixed."""
    return next((n for symbol, n in sizes.items() if symbol.name == BATCH), None)
