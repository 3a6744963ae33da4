"""What else one op or one parameter could do under a plan, and what each would cost.

Everything else stays as planned: an alternative pays its own cost and the reshards that it makes
necessary to and from its neighbours, in every copy of the block.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch.fx

from autopar.ir.sharding import Sharding

from .accounts import bill, read_flows
from .case import Case
from .columns import edges_of
from .options import Option, call_options, param_options

Node = torch.fx.Node


@dataclass(frozen=True)
class OptionCost:
    """One option at a point, against the plan: seconds per step and bytes per device.

    `own_s` is what the op itself takes (all copies and micro-batches), `delta_s` by how much the
    whole step would be slower, of which `own_delta_s` by the op and `reshard_delta_s` by reshards
    around it (the rest overlaps); `delta_bytes` by how much more memory it would need.
    """

    option: Option
    chosen: bool
    own_s: float
    own_delta_s: float
    reshard_delta_s: float
    delta_s: float
    delta_bytes: float


def op_alternatives(case: Case, node: Node) -> list[OptionCost]:
    """Every legal option of an op, the fastest step first."""
    return _costs(case, node, _with(_options(case, node), case.option[node]))


def storage_alternatives(case: Case, node: Node) -> list[OptionCost]:
    """Every way to store a parameter, the fastest step first."""
    mine = case.option[node]
    wanted: dict[Sharding, None] = {}
    for edge in edges_of(case.concrete):
        if edge.producer is node:
            for option in _options(case, edge.consumer):
                wanted.setdefault(option.wants[edge.slot])
    found = param_options(node, wanted, case.pricer.mesh, case.pricer)
    return _costs(case, node, _with(found, mine))


def _options(case: Case, node: Node) -> list[Option]:
    if node.op == "output":
        return [case.option[node]]
    rule, pricer = case.rules[node.name], case.pricer
    return call_options(node, rule, pricer.mesh, pricer, lambda *_: True)


def _with(found: Sequence[Option], mine: Option) -> list[Option]:
    """The options with the chosen one among them (a plan can be edited by hand)."""
    same = [o for o in found if _does(o) == _does(mine)]
    return list(found) if same else [*found, mine]


def _does(option: Option) -> tuple[object, ...]:
    return option.wants, option.gives, option.regather


def _costs(case: Case, node: Node, options: Iterable[Option]) -> list[OptionCost]:
    stands_for = case.blocks.representative
    copies = [n for n in case.option if stands_for[n] is stands_for[node]]
    mine = case.option[node]
    before = case.paid
    flows_before = _reshards(case, case.option)
    found = []
    for option in options:
        changed = {**case.option, **dict.fromkeys(copies, option)}
        after = bill(case.concrete, case.blocks, changed, case.accounts)
        price = case.accounts.option_time_s
        own, was = (len(copies) * price(node, o) for o in (option, mine))
        found.append(
            OptionCost(
                option,
                _does(option) == _does(mine),
                own,
                own - was,
                _reshards(case, changed) - flows_before,
                after.time_s(case.accounts.overlap) - before.time_s(case.accounts.overlap),
                after.memory_bytes - before.memory_bytes,
            )
        )
    return sorted(found, key=lambda c: (c.delta_s, not c.chosen, c.delta_bytes))


def _reshards(case: Case, option: Mapping[Node, Option]) -> float:
    flows = read_flows(case.concrete, case.blocks, option, case.accounts)
    return sum(times * case.accounts.flow_time_s(flow) for flow, times in flows.items())


def why_chosen(costs: Sequence[OptionCost], room_bytes: float) -> str:
    """One line: why the chosen option, against the best of the others.

    `room_bytes` is the memory that the plan leaves free under its limit.
    """
    others = [c for c in costs if not c.chosen]
    if not others:
        return "nothing else is legal here"
    best = others[0]
    if best.delta_s > 1e-9:
        parts = {
            "resharding around it": best.reshard_delta_s,
            "its own time": best.own_delta_s,
        }
        cause = max(parts, key=parts.__getitem__)
        return (
            f"the next best makes the step {best.delta_s * 1e3:.3g} ms slower "
            f"({cause}: {parts[cause] * 1e3:+.3g} ms)"
        )
    if best.delta_s >= -1e-9:
        return "another option takes equally long"
    gain = -best.delta_s * 1e3
    if best.delta_bytes > room_bytes:
        return (
            f"the fastest option would save {gain:.3g} ms but needs "
            f"{best.delta_bytes / 2**20:.3g} MiB more, which do not fit"
        )
    return (
        f"changed alone, another option would make the step {gain:.3g} ms faster; the plan was "
        "made at other prices, edited, or within the solver's gap"
    )
