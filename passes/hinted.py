"""Search with the user's hints, and what each of them costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import sympy

from autopar.cost.cluster import Cluster
from autopar.errors import UserError
from autopar.ir.graph import Graph
from autopar.ir.hint import Hint, hint_from_json
from autopar.ir.parse import parse_sharding
from autopar.plan import HintPrice, Plan
from autopar.units import bytes_text, seconds_text

from .hints import hints_in, with_hints, without_hints
from .search import search

MOST_PRICED = 8  # hints that are priced one by one; of more, only all together


def search_hinted(
    graph: Graph,
    fingerprint: str,
    symbols: Mapping[sympy.Symbol, int],
    cluster: Cluster,
    hints: Sequence[Hint] = (),
    *,
    each: bool = True,
    **options: Any,
) -> Plan:
    """The best plan that keeps the hints, with the price of all of them and of `each`.

    `options` are those of `search`. The price is the difference to the best plan without. Raises
    UserError as `search` and `with_hints` do, and for hints that no plan can keep.
    """
    hinted = with_hints(graph, hints)
    given = hints_in(hinted)

    def best(of: Graph) -> Plan:
        return search(of, fingerprint, symbols, cluster, **options)

    plan = best(hinted)
    staged = plan.pipeline is not None
    if cluster.size > 1 and not plan.choices and not _stored_split(plan) and not staged:
        whole = (
            f"nothing is split: each of the {cluster.size} devices does the whole step (no dim is "
            "large enough, or it would take longer)"
        )
        plan = replace(plan, notes=(*plan.notes, whole))
    if not given:
        return plan
    prices = []
    if each and 1 < len(given) <= MOST_PRICED:
        prices = [_price(hint.to_json(), best, without_hints(hinted, [hint])) for hint in given]
    else:
        prices = [HintPrice(hint.to_json()) for hint in given]
    together = _price({}, best, without_hints(hinted))
    if len(given) == 1:
        prices = [replace(together, hint=given[0].to_json())]
    else:
        prices.append(together)
    return replace(plan, hinted=tuple(prices))


def _stored_split(plan: Plan) -> bool:
    return any(any(parse_sharding(s.sharding).splits) for s in plan.params.values())


def _price(hint: Mapping[str, Any], best: Any, graph: Graph) -> HintPrice:
    try:
        plan: Plan = best(graph)
    except UserError:  # without it nothing fits, or the named strategy does not apply
        return HintPrice(hint)
    return HintPrice(hint, plan.predicted.time_s, plan.predicted.memory_bytes)


def hints_of_plan(plan: Plan) -> list[Hint]:
    """The hints that a plan was made with."""
    return [hint_from_json(dict(price.hint)) for price in plan.hinted if price.hint]


def price_text(plan: Plan, price: HintPrice) -> str:
    """`hint wte.weight split=0 costs +3.1 % (12.4 ms instead of 12 ms), memory −1.2 GiB`."""
    name = f"hint {hint_from_json(dict(price.hint))}" if price.hint else "all hints together:"
    if price.time_s is None or price.memory_bytes is None:
        return f"{name} (not priced alone)" if price.hint else f"{name} no plan without them"
    mine, bytes_ = plan.predicted.time_s, plan.predicted.memory_bytes
    percent = 100 * (mine / price.time_s - 1) if price.time_s else 0.0
    difference = bytes_ - price.memory_bytes
    sign = "+" if difference >= 0 else "-"
    if abs(percent) < 0.05 and abs(difference) < 1e-3 * max(bytes_, 1):
        return f"{name} costs nothing"
    return (
        f"{name} costs {percent:+.1f} % ({seconds_text(mine)} instead of "
        f"{seconds_text(price.time_s)}), memory {sign}{bytes_text(abs(difference))}"
    )
