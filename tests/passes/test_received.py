"""What stages exchange inside for values that cross in parts, against the collectives by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch.fx

from autopar.cost.cluster import make_mesh, parse_cluster
from autopar.cost.schedules import Schedule
from autopar.ir.graph import Graph
from autopar.ir.parse import parse_sharding
from autopar.ir.sharding import Sharding
from autopar.passes.blocks import find_blocks
from autopar.passes.cut_points import Unit
from autopar.passes.options import Option
from autopar.passes.price import Pricer
from autopar.passes.received import Received, crossing_sharding, received_by
from autopar.passes.stage_steps import Chain, chain_of

from .helpers import graph_of

WHOLE, PART = parse_sharding("[-, -, -]"), parse_sharding("[-, tp, -]")
SUM, OTHER = parse_sharding("[-, -, -] +tp"), parse_sharding("[-, -, tp]")
HOSTS, HOST = "2x4xH100", "8xH100"
NBYTES = 64 * 128 * 256 * 4

TWICE = """
%input: input f32[64, 128, 256] grad "input"
%x: f32[64, 128, 256] grad = aten.tanh(%input)
%y: f32[64, 128, 256] grad = aten.sin(%x)
%z: f32[64, 128, 256] grad = aten.mul(%x, %y)
return %z
"""
LATE = """
%input: input f32[64, 128, 256] grad "input"
%x: f32[64, 128, 256] grad = aten.tanh(%input)
%y: f32[64, 128, 256] grad = aten.sin(%input)
%z: f32[64, 128, 256] grad = aten.mul(%x, %y)
return %z
"""
Wants = tuple[Sharding, ...]


class Case:
    """Three ops, each a unit: what each wants of its inputs and gives, on stages of four devices."""

    def __init__(self, text: str, spec: str, *ops: tuple[Wants, Sharding]) -> None:
        self.graph: Graph = graph_of(text.strip())
        self.nodes: list[torch.fx.Node] = list(self.graph.calls())
        cluster = parse_cluster(spec)
        self.pricer = Pricer(cluster, make_mesh(cluster, {"pp": 2, "tp": 4}))
        self.option = {
            node: Option((), wants, (gives,), 0.0, 0.0)
            for node, (wants, gives) in zip(self.nodes, ops, strict=True)
        }
        x, y, z = self.nodes
        self.units = [Unit((x,), ()), Unit((y,), (x,)), Unit((z,), (x, y))]

    @property
    def received(self) -> Received:
        return received_by(self.units, self.option, self.pricer)

    def seconds(self, start: int, end: int) -> tuple[float, float]:
        made = self.received
        return float(made.forward_s[start, end]), float(made.backward_s[start, end])

    def gather_s(self) -> float:
        return self.pricer.edge_forward_s(self.nodes[0], 0, PART, WHOLE)

    def chain(self) -> Chain:
        nothing = {node: Option((), (), (WHOLE,), 0.0, 0.0) for node in self.graph.placeholders()}
        output = {self.graph.output_node: Option((), (WHOLE,), (), 0.0, 0.0)}
        option = {**nothing, **self.option, **output}
        return chain_of(self.graph, find_blocks(self.graph), self.units, option, self.pricer, 4)


def whole(text: str, spec: str) -> Case:
    return Case(text, spec, ((WHOLE,), WHOLE), ((WHOLE,), WHOLE), ((WHOLE, WHOLE), WHOLE))


def test_a_whole_value_is_gathered_where_it_is_read_and_its_gradient_where_it_is_made() -> None:
    case = whole(TWICE, HOSTS)
    assert str(crossing_sharding(case.nodes[0], case.option, case.pricer)) == "[-, tp, -]"
    gather = case.gather_s()
    assert gather > 0
    assert case.seconds(0, 1) == pytest.approx((0.0, gather))
    assert case.seconds(2, 3) == pytest.approx((2 * gather, 0.0))  # both x and y
    assert case.seconds(0, 3) == (0.0, 0.0)
    segment = case.received.segment(2, 3)
    assert segment is not None and case.received.segment(0, 3) is None
    (part,) = segment.parts
    assert (part.axis, part.level, part.forward_s) == ("tp", 0, pytest.approx(2 * gather))
    sent = part.sent_bytes + part.backward_sent_bytes
    assert sent == pytest.approx(2 * 3 / 4 * NBYTES)


def test_a_stage_that_a_value_passes_through_gathers_nothing_of_it() -> None:
    case = whole(LATE, HOSTS)
    forward, backward = case.seconds(1, 2)
    assert (forward, backward) == pytest.approx((0.0, case.gather_s()))  # the gradient of y alone


def test_a_sum_is_scattered_where_it_is_made_and_what_the_ops_pay_is_not_paid_twice() -> None:
    case = Case(TWICE, HOSTS, ((WHOLE,), SUM), ((PART,), PART), ((WHOLE, PART), WHOLE))
    pricer, x = case.pricer, case.nodes[0]
    scatter = pricer.edge_forward_s(x, 0, SUM, PART)
    assert case.seconds(0, 1)[0] == pytest.approx(scatter)
    # In the ops' own prices y scatters the sum, and z, that wants it whole, reduces it.
    assert case.seconds(1, 2)[0] == 0.0
    reduce = pricer.edge_forward_s(x, 0, SUM, WHOLE)
    paid = max(0.0, case.gather_s() - reduce)
    assert case.seconds(2, 3)[0] == pytest.approx(paid)


def test_nothing_is_added_where_parts_cross_anyway_or_links_are_alike() -> None:
    split = Case(TWICE, HOSTS, ((OTHER,), OTHER), ((OTHER,), OTHER), ((OTHER, OTHER), OTHER))
    for case in (split, whole(TWICE, HOST)):
        assert not case.received.seconds.any()


def test_memory_has_the_part_that_crosses_and_the_whole_that_is_gathered() -> None:
    """In whole values: x is kept by the backward of tanh, x and y by that of the product."""
    kept = {}
    for spec in (HOST, HOSTS):
        chain = whole(TWICE, spec).chain()
        kept[spec] = (chain.kept + chain.messages.kept(Schedule(2), chain.segments)) / NBYTES
    assert kept[HOST][0, 1] == pytest.approx(1) and kept[HOSTS][0, 1] == pytest.approx(1.25)
    assert kept[HOST][2, 3] == pytest.approx(2) and kept[HOSTS][2, 3] == pytest.approx(2.5)
    assert np.allclose(kept[HOST][0, 3], kept[HOSTS][0, 3])
