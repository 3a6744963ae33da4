"""Collectives are issued early and waited for late."""

from __future__ import annotations

import expecttest
import torch.fx

from autopar.ir.graph import Graph
from autopar.ir.lowered import CLOSE, EXCHANGE, GATHER_VARY, OPEN
from autopar.ir.mesh import Mesh
from autopar.ir.verify import verify
from autopar.passes.bucket_collectives import bucket_collectives
from autopar.passes.localise_shapes import localise_shapes
from autopar.passes.overlap_collectives import overlap_collectives

from .helpers import dedent, graph_of, lowered, show
from .test_propagate import MLP

DATA = {"h": {"dp": "b"}, "r": {"dp": "a"}, "y": {"dp": "b"}, "loss": {"dp": "a"}}


def localised(regather: str = "", bucket: bool = False) -> tuple[Mesh, Graph]:
    """The MLP under ZeRO on rank 0 of two."""
    mesh, graph = lowered(
        dedent(MLP).replace("dp=2 x tp=2", "dp=2"),
        DATA,
        {"w1": "[dp, -]", "b1": "[-]", "w2": "[-, dp]", "b2": "[-]"},
        regather,
    )
    graph = bucket_collectives(graph, mesh) if bucket else graph
    return mesh, localise_shapes(graph, mesh, 0)


class TestOverlapCollectives(expecttest.TestCase):
    def test_the_second_weight_arrives_during_the_first_layer(self) -> None:
        mesh, graph = localised()
        made = overlap_collectives(graph)
        verify(made, mesh, ("topological", "no_dead_code"))
        self.assertExpectedInline(
            show(made),
            """\
%w1: param f32[8, 8] @ [dp, -] grad "w1"
%b1: param f32[16] @ [-] grad "b1"
%w2: param f32[8, 8] @ [-, dp] grad "w2"
%b2: param f32[8] @ [-] grad "b2"
%x: input f32[4, 8] @ [-, -] "x"
%open_1: (f32[4, 8] @ [-, -], None) = open(slice_inv, [ShardSpec(0, (2, 2))], <dp>, %x)
%open_2: (f32[8, 8] @ [dp, -], None) = open(gather_vary, [ShardSpec(0, (8, 8))], <dp>, %w1)
%open_3: (f32[16] @ [-], None) = open(pvary, [None], <dp>, %b1)
%open_4: (f32[8, 8] @ [-, dp], None) = open(gather_vary, [ShardSpec(1, (8, 8))], <dp>, %w2)
%open_5: (f32[8] @ [-], None) = open(pvary, [None], <dp>, %b2)
%getitem: f32[4, 8] @ [-, -] = getitem(%open_1, 0)
%getitem_1 = getitem(%open_1, 1)
%getitem_2: f32[8, 8] @ [dp, -] = getitem(%open_2, 0)
%getitem_3 = getitem(%open_2, 1)
%getitem_4: f32[16] @ [-] = getitem(%open_3, 0)
%getitem_5 = getitem(%open_3, 1)
%close: f32[2, 8] @ [dp, -] = close(slice_inv, [ShardSpec(0, (2, 2))], <dp>, %getitem_1, %getitem)
%close_1: f32[16, 8] @ [-, -] ~dp = close(gather_vary, [ShardSpec(0, (8, 8))], <dp>, %getitem_3, %getitem_2)
%close_2: f32[16] @ [-] ~dp = close(pvary, [None], <dp>, %getitem_5, %getitem_4)
%h: f32[2, 16] @ [dp, -] = aten.linear(%close, %close_1, %close_2)
%r: f32[2, 16] @ [dp, -] = aten.relu(%h)
%getitem_6: f32[8, 8] @ [-, dp] = getitem(%open_4, 0)
%getitem_7 = getitem(%open_4, 1)
%getitem_8: f32[8] @ [-] = getitem(%open_5, 0)
%getitem_9 = getitem(%open_5, 1)
%close_3: f32[8, 16] @ [-, -] ~dp = close(gather_vary, [ShardSpec(1, (8, 8))], <dp>, %getitem_7, %getitem_6)
%close_4: f32[8] @ [-] ~dp = close(pvary, [None], <dp>, %getitem_9, %getitem_8)
%y: f32[2, 8] @ [dp, -] = aten.linear(%r, %close_3, %close_4)
%loss: f32[] @ [] +dp = aten.sum(%y)
%collective_5: f32[] @ [] = exchange(psum, [None], <dp>, %loss)
return %collective_5""",
        )

    def test_a_chain_of_two(self) -> None:
        """The second collective of a value can only start when the first is there."""
        graph = graph_of(
            """
            %x: input f32[4] "x"
            %a: f32[8] = exchange(gather_inv, [ShardSpec(0, (4, 4))], <dp>, %x)
            %b: f32[4] = exchange(slice_inv, [ShardSpec(0, (4, 4))], <tp>, %a)
            %y: f32[4] = aten.neg(%x)
            %z: f32[4] = aten.exp(%y)
            %s: f32[4] = aten.add.Tensor(%z, %b)
            return %s
            """
        )
        self.assertExpectedInline(
            show(overlap_collectives(graph)),
            """\
%x: input f32[4] "x"
%a: f32[8] = exchange(gather_inv, [ShardSpec(0, (4, 4))], <dp>, %x)
%open_1: (f32[8], None) = open(slice_inv, [ShardSpec(0, (4, 4))], <tp>, %a)
%getitem: f32[8] = getitem(%open_1, 0)
%getitem_1 = getitem(%open_1, 1)
%y: f32[4] = aten.neg(%x)
%z: f32[4] = aten.exp(%y)
%close: f32[4] = close(slice_inv, [ShardSpec(0, (4, 4))], <tp>, %getitem_1, %getitem)
%s: f32[4] = aten.add.Tensor(%z, %close)
return %s""",
        )


def test_nothing_between() -> None:
    """What is read at once waits at once."""
    text = dedent(
        """
        %x: input f32[4] "x"
        %y: f32[4] = aten.neg(%x)
        %a: f32[8] = exchange(gather_inv, [ShardSpec(0, (4, 4))], <dp>, %y)
        %z: f32[8] = aten.exp(%a)
        return %z
        """
    )
    assert show(overlap_collectives(graph_of(text))) == text


def test_nothing_to_do() -> None:
    text = '%x: input f32[4] "x"\n%y: f32[4] = aten.neg(%x)\nreturn %y'
    assert show(overlap_collectives(graph_of(text))) == text


def test_every_open_is_closed_once_and_before_its_readers() -> None:
    for bucket in (False, True):
        _, graph = localised(bucket=bucket)
        made = list(overlap_collectives(graph).fx.nodes)
        opens = [n for n in made if n.target is OPEN]
        closes = [n for n in made if n.target is CLOSE]
        exchanges = [n for n in graph.fx.nodes if n.target is EXCHANGE]
        whole = [n for n in made if n.target is EXCHANGE]
        assert opens
        assert len(opens) == len(closes) == len(exchanges) - len(whole)
        for close in closes:
            pending = close.args[3]
            assert pending.args[0] in opens
            assert made.index(pending.args[0]) < made.index(close)


def test_dropped_parameters_are_gathered_one_ahead() -> None:
    """A weight is asked for once the one before it is there; without `ahead` at its use."""
    layers = 4
    lines = [f'%w{i}: param f32[8, 8] grad "w{i}"' for i in range(layers)]
    lines += ['%y0: input f32[4, 8] "x"']
    lines += [
        f"%y{i + 1}: f32[4, 8] grad = aten.linear(%y{i}, %w{i})   # m.py:{i}" for i in range(layers)
    ]
    text = "\n".join(["mesh dp=2", *lines, f"return %y{layers}"])
    names = [f"w{i}" for i in range(layers)]
    rows = {f"y{i + 1}": {"dp": "b"} for i in range(layers)}
    for regather in ("", " ".join(names)):
        mesh, graph = lowered(text, rows, dict.fromkeys(names, "[dp, -]"), regather)
        made = overlap_collectives(localise_shapes(graph, mesh, 0))
        verify(made, mesh, ("topological", "no_dead_code"))
        order = [
            f"{node.target.name} {source}"
            for node in made.calls()
            if node.target in (OPEN, CLOSE)
            for source in [_gathered(node)]
            if source in names
        ]
        waits = [order.index(f"open w{i + 1}") > order.index(f"close w{i}") for i in range(3)]
        assert waits == [bool(regather)] * 3, order
        late = overlap_collectives(localise_shapes(graph, mesh, 0), ahead=False)
        gathers = [n.target.name for n in late.calls() if n.args[:1] == (GATHER_VARY,)]
        assert (set(gathers) == {"exchange"}) == bool(regather)


def _gathered(node: torch.fx.Node) -> str:
    """The parameter that an open or a close is about."""
    while node.op != "placeholder":
        node = node.all_input_nodes[0]
    return node.name
