"""What stages gather of what they receive, against the collectives of the ops beside."""

from __future__ import annotations

import pytest

from autopar.cost.cluster import make_mesh, parse_cluster
from autopar.ir.graph import Graph
from autopar.ir.parse import parse_sharding
from autopar.ir.sharding import Sharding
from autopar.passes.cut_points import Unit
from autopar.passes.options import Option
from autopar.passes.price import Pricer
from autopar.passes.received import crossing_sharding, received_by

from .helpers import graph_of

CHAIN = """
%x: f32[64, 128, 256] grad = aten.relu(%input)
%y: f32[64, 128, 256] grad = aten.relu(%x)
return %y
"""


def option(wants: Sharding, gives: Sharding) -> Option:
    return Option((), (wants,), (gives,), 0.0, 0.0)


def added(spec: str, given: str, wanted: str) -> tuple[str, float, float]:
    """How %x crosses from one stage to the other, and seconds that it adds: forward, backward."""
    graph: Graph = graph_of('%input: input f32[64, 128, 256] grad "input"' + CHAIN)
    x, y = graph.calls()
    cluster = parse_cluster(spec)
    pricer = Pricer(cluster, make_mesh(cluster, {"pp": 2, "tp": 4}))
    options = {
        x: option(parse_sharding("[-, -, -]"), parse_sharding(given)),
        y: option(parse_sharding(wanted), parse_sharding("[-, -, -]")),
    }
    units = [Unit((x,), ()), Unit((y,), (x,))]
    first, second = received_by(units, options, pricer)
    assert first is None
    crosses = str(crossing_sharding(x, options, pricer))
    if second is None:
        return crosses, 0.0, 0.0
    (part,) = second.parts
    assert (part.axis, part.level) == ("tp", 0)
    return crosses, part.forward_s, part.backward_s


def gather_s(spec: str) -> float:
    cluster = parse_cluster(spec)
    pricer = Pricer(cluster, make_mesh(cluster, {"pp": 2, "tp": 4}))
    graph = graph_of('%input: input f32[64, 128, 256] grad "input"' + CHAIN)
    x, _ = graph.calls()
    split, whole = parse_sharding("[-, tp, -]"), parse_sharding("[-, -, -]")
    return pricer.edge_forward_s(x, 0, split, whole)


def test_whole_values_are_gathered_both_ways() -> None:
    crosses, forward, backward = added("2x4xH100", "[-, -, -]", "[-, -, -]")
    assert crosses == "[-, tp, -]"
    assert forward == pytest.approx(gather_s("2x4xH100")) and forward > 0
    assert backward == pytest.approx(forward)


def test_a_sum_is_scattered_before_and_gathered_behind() -> None:
    """An all-reduce is both already: nothing is added but what one message more takes."""
    crosses, forward, _ = added("2x4xH100", "[-, -, -] +tp", "[-, -, -]")
    assert crosses == "[-, tp, -]"
    assert forward < 0.5 * gather_s("2x4xH100")


def test_nothing_is_added_where_parts_cross_anyway_or_links_are_alike() -> None:
    assert added("2x4xH100", "[-, -, tp]", "[-, -, tp]") == ("[-, -, tp]", 0.0, 0.0)
    assert added("8xH100", "[-, -, -]", "[-, -, -]") == ("[-, -, -]", 0.0, 0.0)
