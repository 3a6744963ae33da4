"""One piece of the model in a step: its three programs, and what they hold while it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from autopar.ir.graph import Graph, value_of, values_of
from autopar.ir.step import Combine, StepGraphs

from .group import Group
from .micro_batches import combined
from .program import Program, load_program
from .step_parts import BodyPart, Crossing
from .wide_sums import WideSums, needs_wide_sum

Node = torch.fx.Node
Groups = Mapping[tuple[str, ...], Group]
Key = tuple[str, str]  # role and name of a placeholder


@dataclass(frozen=True)
class PartProgram:
    """The loaded programs of one piece of the model, number `index` of the chain."""

    index: int
    prologue: Program
    body: Program
    tail: Program
    prepared: tuple[str, ...]
    combine: tuple[Combine, ...]
    objective: int | None
    loss: int | None
    differentiable: tuple[bool, ...]  # of the user's results
    half: bool
    receives: tuple[Crossing, ...] = ()
    sends: tuple[Crossing, ...] = ()

    @property
    def schedule(self) -> str:
        """Digest of the collectives of all three programs."""
        return f"{self.prologue.schedule} {self.body.schedule} {self.tail.schedule}"

    @property
    def is_random(self) -> bool:
        return self.prologue.is_random or self.body.is_random or self.tail.is_random


def load_part(
    graphs: StepGraphs,
    groups: Groups,
    backend: str | None = None,
    device: torch.device | None = None,
    index: int = 0,
    sends: bool = False,
) -> PartProgram:
    """Bind the three programs of a piece to live groups (as `load_program` does one).

    `sends` says that the piece is not the last: what its body gives goes to the next one.
    """
    prologue, body, tail = (
        load_program(graph, groups, backend, device)
        for graph in (graphs.prologue, graphs.body, graphs.tail)
    )
    given, returned = _results(graphs.body), _results(graphs.tail)
    sent = given[: len(given) - len(graphs.combine)] if sends else ()
    wide = (v.dtype for node in graphs.body.fx.nodes for v in values_of(node))
    return PartProgram(
        index=index,
        prologue=prologue,
        body=body,
        tail=tail,
        prepared=graphs.prepared,
        combine=graphs.combine,
        objective=graphs.objective,
        loss=graphs.loss,
        differentiable=tuple(isinstance(n, Node) and value_of(n).requires_grad for n in returned),
        half=torch.float16 in wide,
        receives=tuple(map(_crossing, graphs.body.placeholders("received"))),
        sends=tuple(map(_crossing, sent)),
    )


def _results(graph: Graph) -> tuple[Any, ...]:
    """What a graph returns, without new values of buffers."""
    entries: Any = graph.output_node.args[0]
    return tuple(entries[: graph.outputs])


def _crossing(node: Node) -> Crossing:
    value = value_of(node)
    return Crossing(value.int_shape(), value.dtype, value.requires_grad)


@dataclass
class PartRun:
    """One piece in one step: what was prepared, what every micro-batch gave, what is updated.

    `given` are the values of placeholders by role and name: the user's inputs, buffers, and this
    rank's parameters, detached. Buffers that a body gives new values pass from one micro-batch to
    the next. Gradients in 16 bits of several micro-batches are added up in float32.
    """

    program: PartProgram
    given: Mapping[Key, Any]
    micro_batches: int
    scale: float = 1.0
    training: bool = False
    leaves: dict[Key, Tensor] = field(default_factory=dict)
    buffers: dict[Key, Any] = field(default_factory=dict)
    results: list[tuple[Tensor, ...]] = field(default_factory=list)
    _parameters: dict[Key, Tensor] = field(default_factory=dict)
    _sums: WideSums = field(default_factory=WideSums)
    _outputs: tuple[Tensor, ...] = ()

    def prepare(self) -> None:
        """Run the prologue and make leaves of what it gives, and of regathered parameters."""
        self._parameters = {
            key: value.detach().requires_grad_(self.training and value.requires_grad)
            for key, value in self.given.items()
            if key[0] == "param"
        }
        with torch.set_grad_enabled(self.training):
            made = self._run(self.program.prologue, self._parameters)
        self._outputs = made[: self.program.prologue.outputs]
        for name, value in zip(self.program.prepared, self._outputs, strict=True):
            self.leaves["prepared", name] = self._leaf(value)
        for role, names in self.program.body.placeholders:
            if role == "param":
                self.leaves[role, names[0]] = self._leaf(self._parameters[role, names[0]])
        self.results = [()] * self.micro_batches

    def _leaf(self, value: Tensor) -> Tensor:
        if not (self.training and value.requires_grad):
            return value.detach()
        leaf = nn.Parameter(value.detach())
        if self.micro_batches > 1 and needs_wide_sum(leaf.dtype):
            self._sums.watch(leaf)
        return leaf

    def _run(self, program: Program, *values: Mapping[Key, Any]) -> tuple[Any, ...]:
        arguments = []
        for role, names in program.placeholders:
            key = (role, names[0])
            found = next((known for known in (*values, self.given) if key in known), None)
            if role == "constant":
                arguments.append(program.constants[names[0]])
            elif found is None:
                raise KeyError(f"nothing is given for the {role} {names[0]}")
            else:
                arguments.append(found[key])
        return program.run(*arguments)

    def body(self) -> BodyPart:
        """The piece as engines see it."""
        leaves = tuple(x for x in self.leaves.values() if isinstance(x, nn.Parameter))
        own = self.program
        add = self._sums.add
        return BodyPart(own.index, leaves, self.micro_batch, own.receives, own.sends, add)

    def micro_batch(self, k: int, received: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The forward of one micro-batch; see `BodyPart.run`."""
        own = self.program
        arrived = [("received", n[0]) for role, n in own.body.placeholders if role == "received"]
        values = {**dict(zip(arrived, received, strict=True)), ("micro_batch", "mb"): k}
        made = self._run(own.body, values, self.leaves, self.buffers)
        results = made[: own.body.outputs]
        for name, value in zip(own.body.mutated, made[own.body.outputs :], strict=True):
            self.buffers["buffer", name] = value.detach()
        sent = len(own.sends)
        self.results[k] = tuple(x.detach() for x in results[sent : sent + len(own.combine)])
        if own.sends:
            return results[:sent]
        if own.objective is None or not self.training:
            return ()
        objective = results[own.objective]
        return (objective.float() * self.scale if own.half else objective,)

    def finish(self) -> tuple[tuple[Any, ...], dict[str, Tensor]]:
        """What the user's code returns, and new values of buffers by name."""
        own = self.program
        values = {}
        names = [n[0] for role, n in own.tail.placeholders if role == "combined"]
        for i, (name, how) in enumerate(zip(names, own.combine, strict=True)):
            parts = [result[i] for result in self.results]
            values["combined", name] = combined(how.kind, how.dim, how.outer, parts)
        self.results = []
        with torch.no_grad():
            detached = {key: leaf.detach() for key, leaf in self.leaves.items()}
            made = self._run(own.tail, values, detached)
        updates = dict(zip(own.tail.mutated, made[own.tail.outputs :], strict=True))
        updates |= {name: value for (_, name), value in self.buffers.items()}
        return made[: own.tail.outputs], updates

    def gradients(self) -> dict[str, Tensor]:
        """The gradient of every parameter that has one, by name: the backward of the prologue."""
        for leaf in self.leaves.values():
            self._sums.settle(leaf)
        found = {
            name: leaf.grad
            for (role, name), leaf in self.leaves.items()
            if role == "param" and leaf.grad is not None
        }
        pairs = [
            (output, leaf.grad)
            for output, (key, leaf) in zip(self._outputs, self.leaves.items(), strict=False)
            if key[0] == "prepared" and leaf.grad is not None
        ]
        self.leaves = {}
        wanted = {k[1]: p for k, p in self._parameters.items() if p.requires_grad}
        if pairs and wanted:
            outputs, gradients = zip(*pairs, strict=True)
            made = torch.autograd.grad(outputs, list(wanted.values()), gradients, allow_unused=True)
            for name, gradient in zip(wanted, made, strict=True):
                if gradient is not None:
                    found[name] = found[name] + gradient if name in found else gradient
        self._outputs = ()
        return found
