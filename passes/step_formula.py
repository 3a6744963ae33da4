"""The formula of a whole step (or of one block): the planner's accounts, kept in symbols.

`accounts` adds up prices with nothing but arithmetic: given formulas in place of prices, it adds up
formulas.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import sympy
import torch.fx
from sympy.core.function import AppliedUndef

from autopar.cost.families import op_family, op_name
from autopar.cost.formula import BUCKETED, ceil, maximum, with_integers
from autopar.cost.step import GIVEN
from autopar.ir.graph import Value, values_of
from autopar.ir.sharding import Sharding

from .accounts import Accounts, Regions, read_flows, regions_of
from .blocks import Blocks
from .columns import passes_on
from .formulas import Formulas
from .given import given_size
from .options import Option
from .price import Pricer

Node = torch.fx.Node

COMPUTE, OPTIMIZER = "compute", "optimizer"
COMMUNICATION, PARAMETERS = "communication", "parameter communication"
INSIDE = "communication inside ops"
STATE, SAVED = "state", "saved"
SUMS = "sums of gradients"
BATCH = sympy.Symbol("b", integer=True, positive=True)
MICRO_BATCHES = sympy.Symbol("k", integer=True, positive=True)


@dataclass(frozen=True)
class Term:
    """A part of a step that is added to others: seconds, or bytes for `state` and `saved`."""

    category: str
    label: str
    formula: sympy.Expr


@dataclass(frozen=True)
class StepFormula:
    """A step (or a part of it) on one device as a sum of terms.

    Communication of parameters counts with what `overlap` times the compute does not hide. With
    several micro-batches `k` is their number, and `b` the batch of the step.
    """

    terms: tuple[Term, ...]
    overlap: float

    def total(self, *categories: str) -> sympy.Expr:
        """The sum of the terms of some categories."""
        return sympy.Add(*(t.formula for t in self.terms if t.category in categories))

    @property
    def seconds(self) -> sympy.Expr:
        """Seconds per step."""
        hidden = self.total(PARAMETERS)
        compute = self.total(COMPUTE, INSIDE)
        if self.overlap and hidden != 0:
            hidden = maximum(0, hidden - self.overlap * compute)
        return compute + self.total(COMMUNICATION, OPTIMIZER) + hidden

    @property
    def memory(self) -> sympy.Expr:
        """Bytes per device."""
        return self.total(STATE, SAVED)

    @property
    def room(self) -> tuple[sympy.Expr, ...]:
        """Units per device of everything that is split: at least 1 each where the step is legal."""
        found = set().union(*(t.formula.atoms(AppliedUndef) for t in self.terms), set())
        return tuple(sorted((f.args[0] for f in found if f.func == ceil), key=str))


@dataclass(frozen=True)
class Terms:
    """How a plan runs its assignment: what `Accounts` has beside the prices."""

    micro_batches: int = 1
    modes: Mapping[int, str] | None = None
    overlap: float = 0.0
    regions: Regions | None = None


class _Priced:
    """Looks like a `Pricer` to `Accounts`; every price is a formula."""

    def __init__(self, formulas: Formulas) -> None:
        self._formulas = formulas
        nodes = formulas.concrete.fx.nodes
        self._place = {id(v): (n, port) for n in nodes for port, v in enumerate(values_of(n))}

    def edge_time_s(
        self, producer: Node, port: int, source: Sharding, want: Sharding, regather: bool = False
    ) -> Any:
        return self._formulas.edge(producer, port, source, want, regather).seconds

    def edge_forward_s(self, producer: Node, port: int, source: Sharding, want: Sharding) -> Any:
        return self._formulas.edge(producer, port, source, want).forward_seconds

    def saved_input_bytes(
        self, producer: Node, port: int, source: Sharding, want: Sharding, regather: bool = False
    ) -> Any:
        return self._formulas.edge(producer, port, source, want, regather).kept

    def sum_s(self, producer: Node, port: int, sharding: Sharding, regather: bool = False) -> Any:
        return self._formulas.sum_seconds(producer, port, sharding, regather)

    def saves_input(self, node: Node, slot: int) -> bool:
        return self._formulas.keeps_input(node, slot)

    def local_bytes(self, value: Value, sharding: Sharding) -> Any:
        return self._formulas.gives_bytes(*self._place[id(value)], sharding)


def symbolic_accounts(formulas: Formulas, regions: Regions, terms: Terms) -> Accounts:
    """Accounts whose prices are formulas; the number of micro-batches is `k` where it is not 1."""
    k: Any = MICRO_BATCHES if terms.micro_batches != 1 else 1
    priced = cast(Pricer, _Priced(formulas))
    return Accounts(priced, regions, k, dict(terms.modes or {}), terms.overlap)


def symbolic_option(formulas: Formulas, node: Node, option: Option) -> Option:
    """The same option with formulas in place of its prices."""
    time: Any = sympy.Integer(0)
    memory, forward = time, time
    if node.op == "call_function":
        op = formulas.op(node, option.choices)
        time, memory, forward = op.seconds, op.saved, op.forward_seconds
    elif node.op == "placeholder" and node.meta.get("role") == "param":
        stored = formulas.stored(node, option.gives[0])
        time, memory = stored.seconds, stored.stored
    return replace(option, time_s=time, memory_bytes=memory, forward_s=forward)


def step_formula(
    formulas: Formulas,
    blocks: Blocks,
    option: Mapping[Node, Option],
    terms: Terms | None = None,
    only: Callable[[Node], bool] = lambda _: True,
) -> StepFormula:
    """The step of an assignment, or the part of it that `only` some representatives pay for.

    A reshard belongs to its readers. Equal terms are counted, not repeated.
    """
    terms = terms or Terms()
    regions = terms.regions or regions_of(formulas.concrete, blocks)
    accounts = symbolic_accounts(formulas, regions, terms)
    priced = {node: symbolic_option(formulas, node, o) for node, o in option.items()}
    found: dict[tuple[str, str], dict[sympy.Expr, int]] = defaultdict(lambda: defaultdict(int))

    def add(category: str, label: str, formula: Any, times: Any = 1) -> None:
        if formula != 0:
            found[category, label][formula] += times

    def add_seconds(category: str, label: str, seconds: Any, times: int) -> None:
        for part in sympy.Add.make_args(sympy.expand_mul(sympy.sympify(seconds), deep=False)):
            sent = _collective_of(part)
            add(
                *((INSIDE if category == COMPUTE else category), sent)
                if sent
                else (category, label),
                part,
                times,
            )

    count: dict[Node, int] = defaultdict(int)
    for node in option:
        count[blocks.representative[node]] += 1
    for node, n in count.items():
        if not only(node) or passes_on(node):
            continue
        stored = node.op == "placeholder"
        label = formulas.optimizer if stored else op_family(op_name(node.target))
        seconds = accounts.option_time_s(node, priced[node])
        add_seconds(OPTIMIZER if stored else COMPUTE, label, seconds, n)
        add(
            STATE if stored else SAVED,
            "parameters, gradients, optimizer state" if stored else "activations",
            accounts.option_memory(node, priced[node], n),
        )
    for flow, n in read_flows(formulas.concrete, blocks, option, accounts).items():
        if not any(only(edge.consumer) for edge in flow.readers):
            continue
        late = accounts.overlaps(flow)
        add_seconds(OPTIMIZER, SUMS, accounts.sums_s(flow), n)
        add_seconds(PARAMETERS if late else COMMUNICATION, "", accounts.flow_time_s(flow), n)
        label = "gathered parameters" if flow.producer.op == "placeholder" else "activations"
        add(SAVED, label, accounts.flow_memory(flow, n))
    concrete = {node.name: node for node in formulas.concrete.placeholders()}
    for node in formulas.symbolic.placeholders():
        if only(concrete[node.name]):
            nbytes = given_size(node)
            add(STATE, GIVEN, nbytes * (accounts.micro_batches if nbytes.has(BATCH) else 1))
    return StepFormula(tuple(_terms(found, terms.micro_batches)), terms.overlap)


def _terms(
    found: Mapping[tuple[str, str], Mapping[sympy.Expr, Any]], micro_batches: int
) -> Iterable[Term]:
    smaller = {BATCH: BATCH / MICRO_BATCHES} if micro_batches != 1 else {}
    for (category, label), parts in found.items():
        whole = sympy.Add(*(times * formula for formula, times in parts.items()))
        yield Term(category, label, with_integers(whole).xreplace(smaller))


def _collective_of(part: sympy.Expr) -> str:
    """`all_gather over tp` for a multiple of the seconds of one collective, "" for all else."""
    functions = [f for f in sympy.Mul.make_args(part) if isinstance(f, AppliedUndef)]
    if len(functions) != 1 or len(functions[0].args) != 2 or not functions[0].args[1].is_Symbol:
        return ""
    kind, axis = functions[0].func.__name__.removesuffix(BUCKETED), functions[0].args[1]
    return "" if kind in ("max", "min") else f"{kind} over {axis}"
