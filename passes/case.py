"""A plan at one setting: what its nodes do and cost for some sizes on some cluster; its formulas.

One captured graph serves every setting: `make_case` specialises it anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import sympy
import torch.fx
from numpy.typing import ArrayLike, NDArray

from autopar.cost.cluster import Cluster
from autopar.cost.evaluate import Array, Compiled, Settings, compiled
from autopar.errors import UserError
from autopar.ir.graph import Graph
from autopar.ir.mesh import Axis, Mesh
from autopar.ir.rule import ShardingRule
from autopar.plan import Plan

from .accounts import FULL, NONE, SELECTIVE, Accounts, Paid, Regions, bill, overlap_of, regions_of
from .assignment_of import assignment_of
from .blocks import Blocks, find_blocks
from .bucket_collectives import BUCKET_BYTES
from .formulas import Formulas
from .given import given_bytes
from .narrow_gathers import wear_casts
from .options import Option
from .price import Pricer
from .rules_of import rules_of
from .specialise import specialise
from .step_formula import BATCH, MICRO_BATCHES, StepFormula, Terms, step_formula

Node = torch.fx.Node


@dataclass(frozen=True)
class Case:
    """A plan's assignment at one setting.

    `symbolic` is the captured graph and `concrete` the same at the sizes of one micro-batch;
    `hints` are the sizes of the whole batch. `option` is what every node does. `layers` are the
    repeated blocks as found; in `blocks` only nodes that do the same stand for each other.
    """

    plan: Plan
    symbolic: Graph
    concrete: Graph
    rules: Mapping[str, ShardingRule]
    layers: Blocks
    blocks: Blocks
    option: Mapping[Node, Option]
    accounts: Accounts
    hints: Mapping[sympy.Symbol, int]
    optimizer: str

    @property
    def pricer(self) -> Pricer:
        """Prices of one micro-batch on the plan's mesh."""
        return self.accounts.pricer

    @property
    def cluster(self) -> Cluster:
        """Where it runs."""
        return self.accounts.pricer.cluster

    @cached_property
    def paid(self) -> Paid:
        """What a step costs."""
        return bill(self.concrete, self.blocks, self.option, self.accounts)

    @property
    def time_s(self) -> float:
        """Predicted seconds of a step."""
        return self.paid.time_s(self.accounts.overlap)

    @property
    def memory_bytes(self) -> float:
        """Predicted bytes per device."""
        return self.paid.memory_bytes + self.given_bytes

    @cached_property
    def given_bytes(self) -> float:
        """Bytes of the whole batch and of all buffers, which every device has."""
        return given_bytes(self.symbolic, self.hints)

    @cached_property
    def formulas(self) -> Formulas:
        """Formulas of single ops and edges, in the sizes of one micro-batch."""
        hints = {symbol: size for symbol, size in self.hints.items() if symbol != BATCH}
        if BATCH in self.hints:
            hints[BATCH] = self.hints[BATCH] // self.accounts.micro_batches
        return Formulas(
            self.symbolic,
            self.concrete,
            self.rules,
            hints,
            self.pricer.mesh,
            self.pricer.device,
            self.optimizer,
            self.layers,
        )

    @cached_property
    def step(self) -> StepFormula:
        """The formula of the step."""
        accounts = self.accounts
        terms = Terms(accounts.micro_batches, accounts.modes, accounts.overlap, accounts.regions)
        return step_formula(self.formulas, self.blocks, self.option, terms)

    @cached_property
    def _compiled(self) -> Compiled:
        formulas = [self.step.seconds, self.step.memory, *self.step.room]
        return compiled(formulas, self.cluster, BUCKET_BYTES)

    def settings(
        self,
        sizes: Mapping[str, ArrayLike] | None = None,
        bandwidth: Mapping[str, ArrayLike] | None = None,
    ) -> Settings:
        """The case's own setting with some sizes or bandwidths replaced by others."""
        own: dict[str, ArrayLike] = {symbol.name: size for symbol, size in self.hints.items()}
        own[MICRO_BATCHES.name] = self.accounts.micro_batches
        axes = {axis.name: axis.size for axis in self.pricer.mesh}
        return Settings({**own, **(sizes or {})}, axes, dict(bandwidth or {}))

    def evaluate(self, settings: Settings) -> tuple[Array, Array, NDArray[np.bool_]]:
        """Seconds and bytes at every setting, from the formulas, and whether each is legal."""
        values = self._compiled(settings)
        return values[0], values[1], np.all(values[2:] >= 1, axis=0)


def make_case(
    symbolic: Graph,
    hints: Mapping[sympy.Symbol, int],
    plan: Plan,
    cluster: Cluster,
    optimizer: str = "adamw",
) -> Case:
    """A plan for other sizes or on another cluster; its mesh must fit there.

    `symbolic` is the prepared captured graph. Raises UserError where the plan asks for something
    that an op cannot do at these sizes.
    """
    micro_batches = plan.micro_batches
    sizes = dict(hints)
    if micro_batches > 1 and BATCH in sizes:
        if sizes[BATCH] % micro_batches:
            raise UserError(
                f"the plan runs {micro_batches} micro-batches, and a batch of {sizes[BATCH]} does "
                "not divide into them",
                fix="choose a batch that divides, or another number of micro-batches",
            )
        sizes[BATCH] //= micro_batches
    concrete = wear_casts(specialise(symbolic, sizes))
    rules = rules_of(concrete)
    layers = find_blocks(concrete)
    pricer = Pricer(cluster, plan.mesh, optimizer, micro_batches=micro_batches)
    option = assignment_of(concrete, rules, plan, pricer, layers)
    regions, modes = _recomputed(plan, regions_of(concrete, layers), layers)
    blocks = _told_apart(layers, option, regions)
    regions = replace(regions_of(concrete, blocks), of=regions.of, copies=regions.copies)
    accounts = Accounts(pricer, regions, micro_batches, modes, overlap_of(cluster, plan.mesh))
    return Case(
        plan, symbolic, concrete, rules, layers, blocks, option, accounts, dict(hints), optimizer
    )


def _recomputed(plan: Plan, regions: Regions, blocks: Blocks) -> tuple[Regions, dict[int, str]]:
    """Repeated blocks and what each recomputes: copies that recompute otherwise are one of its own.

    Block `i` of mode number `m` has the index `3 i + m`.
    """
    wanted = {r.block: r for r in plan.recompute}
    kinds = (NONE, FULL, SELECTIVE)

    def kind(block: int, copy: int) -> int:
        asked = wanted.get(blocks.regions[block][0].name)
        if asked is None or copy >= asked.full + asked.selective:
            return 0
        return 1 if copy < asked.full else 2

    of = {n: (3 * block + kind(block, copy), copy) for n, (block, copy) in regions.of.items()}
    copies = [0] * (3 * len(regions.copies))
    for block, n in enumerate(regions.copies):
        for copy in range(n):
            copies[3 * block + kind(block, copy)] += 1
    modes = {i: kinds[i % 3] for i, n in enumerate(copies) if n and i % 3}
    return Regions(of, tuple(copies), regions.leaving), modes


def _told_apart(blocks: Blocks, option: Mapping[Node, Option], regions: Regions) -> Blocks:
    """Blocks in which only nodes that do the same stand for each other (a plan can be edited)."""
    first: dict[object, Node] = {}
    stands_for = {}
    for node, known in blocks.representative.items():
        o = option.get(node)
        does = None if o is None else (o.choices, o.wants, o.gives, o.regather)
        stands_for[node] = first.setdefault((known, does, regions.block(node)), node)
    return Blocks(stands_for, blocks.regions)


def scaled_mesh(mesh: Mesh, devices: int) -> Mesh | None:
    """The mesh on another number of devices: its data axis takes the factor, else its first axis.

    None where the number does not divide.
    """
    names = mesh.names
    axis = "dp" if "dp" in names else names[0]
    rest = mesh.size // mesh[axis].size
    if devices % rest:
        return None
    return Mesh(tuple(Axis(a.name, devices // rest if a.name == axis else a.size) for a in mesh))
