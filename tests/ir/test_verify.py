"""Every invariant: legal graphs pass, and an illegal one gets exactly the sentence quoted here."""

from __future__ import annotations

import pytest
import torch.fx

from autopar.errors import PassError
from autopar.ir.graph import Graph
from autopar.ir.mesh import Mesh
from autopar.ir.parse import parse_graph
from autopar.ir.registry import rule_for
from autopar.ir.rule import parse_rule
from autopar.ir.verify import INVARIANTS, verify

MESH = Mesh.of(dp=2, tp=2)

TENSOR_PARALLEL = """
%x: input f32[4, 8] @ [dp, -] "x"
%w1: param f32[16, 8] @ [tp, -] grad "w1"
%w2: param f32[8, 16] @ [-, tp] grad "w2"
%v1: f32[16, 8] @ [tp, -] ~dp = collective(pvary, "dp", %w1)
%v2: f32[8, 16] @ [-, tp] ~dp = collective(pvary, "dp", %w2)
%h: f32[4, 16] @ [dp, tp] = aten.linear(%x, %v1)
%r: f32[4, 16] @ [dp, tp] = aten.relu(%h)
%p: f32[4, 8] @ [dp, -] +tp = aten.linear(%r, %v2)
%y: f32[4, 8] @ [dp, -] = collective(psum, "tp", %p)
%s: f32[] @ [] +dp = aten.sum(%y)
%loss: f32[] @ [] = collective(psum, "dp", %s)
return %loss
"""

# ZeRO: weights gathered with a gradient that is still partial; buckets; a buffer that is updated.
SHARDED_DATA = """
%x: input f32[4, 8] @ [dp, -] "x"
%seen: buffer f32[8] @ [dp] "seen"
%w: param f32[8, 8] @ [dp, -] grad "w"
%b: param f32[8] @ [dp] grad "b"
%full: (f32[8, 8] @ [-, -] ~dp, f32[8] @ [-] ~dp) = bucket(gather_vary, "dp", [%w, %b])
%fw: f32[8, 8] @ [-, -] ~dp = getitem(%full, 0)
%fb: f32[8] @ [-] ~dp = getitem(%full, 1)
%h: f32[4, 8] @ [dp, -] = aten.linear(%x, %fw, %fb)
%t: f32[4, 8] @ [-, dp] = collective(swap, "dp", %h)
%n: f32[8] @ [dp] nograd = aten.amax(%t, [0])
%s: f32[] @ [] +dp = aten.sum(%t)
%loss: f32[] @ [] = collective(psum, "dp", %s)
return %loss; update %seen <- %n
"""

LEGAL = (TENSOR_PARALLEL, SHARDED_DATA)


def check(name: str, text: str, mesh: Mesh | None = MESH) -> str | None:
    return INVARIANTS[name](parse_graph(text), mesh)


@pytest.mark.parametrize("text", LEGAL)
@pytest.mark.parametrize("name", INVARIANTS)
def test_legal(name: str, text: str) -> None:
    assert check(name, text) is None


@pytest.mark.parametrize("name", INVARIANTS)
def test_unsharded_graphs_are_legal_without_a_mesh(name: str) -> None:
    text = """
    %x: input f32[b, 8] "x"
    %y: f32[b, 8] = aten.relu(%x)
    return %y
    """
    assert check(name, text, None) is None


def test_pass_error() -> None:
    text = """
    %x: input f32[4, 4] @ [-, -] "x"
    %h: f32[4, 4] @ [dp, dp] = aten.relu(%x)   # model.py:3
    return %h
    """
    with pytest.raises(PassError) as caught:
        verify(parse_graph(text), MESH, ["typed", "axis_used_once"], pass_name="propagate")
    assert str(caught.value) == (
        "after propagate: axis_used_once fails: %h @ [dp, dp] uses axis 'dp' twice\n"
        "  node: %h: f32[4, 4] @ [dp, dp] = aten.relu(%x)   # model.py:3"
    )
    verify(parse_graph(TENSOR_PARALLEL), MESH, INVARIANTS)
    with pytest.raises(ValueError, match="no invariant 'tidy'; there are typed, functional"):
        verify(parse_graph(text), MESH, ["tidy"])


# Structure ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "body", "sentence"),
    [
        ("typed", "%y: ? = aten.relu(%x)", "%y has no value"),
        (
            "typed",
            "%y: f32[4, 8] @ [dp] = aten.relu(%x)",
            "%y has 2 dims but sharding [dp] has 1",
        ),
        (
            "typed",
            "%m: (f32[4], i64[4]) = aten.max.dim(%x, 1)\n%y: f32[5] = getitem(%m, 0)",
            "%y is not typed as item 0 of %m",
        ),
        (
            "typed",
            "%m: (f32[4], i64[4]) = aten.max.dim(%x, 1)\n%y: f32[4] = getitem(%m, 2)",
            "%y is item 2 of %m, of 2 items",
        ),
        (
            "functional",
            "%y: f32[4, 8] = aten.relu_(%x)",
            "%y = aten.relu_.default writes to an input",
        ),
        (
            "no_dead_code",
            "%dead: f32[4, 8] = aten.neg(%x)\n%y: f32[4, 8] = aten.relu(%x)",
            "%dead is never used",
        ),
        (
            "no_dead_code",
            "%mask: f32[4, 8] = aten.dropout(%x, 0.5, True)\n%y: f32[4, 8] = aten.relu(%x)",
            "%mask is never used",
        ),
        (
            "axis_used_once",
            "%y: f32[4, 8] @ [dp, -] +dp = aten.relu(%x)",
            "%y @ [dp, -] +dp uses axis 'dp' twice",
        ),
        (
            "axis_used_once",
            "%y: f32[4, 8] @ [dp, -] ~dp = aten.relu(%x)",
            "%y @ [dp, -] ~dp uses axis 'dp' twice",
        ),
        (
            "axes_exist",
            "%y: f32[4, 8] @ [ep, -] = aten.relu(%x)",
            "%y @ [ep, -] names axis 'ep', which mesh dp=2 x tp=2 lacks",
        ),
        (
            "axes_exist",
            '%y: f32[4, 8] @ [-, -] = collective(pvary, "ep", %x)',
            "%y = pvary names axis 'ep', which mesh dp=2 x tp=2 lacks",
        ),
        (
            "axes_exist",
            "%y: f32[4, 8] = open(psum, (), <dp&ep>, %x)",
            "%y names axis 'ep' in group <dp&ep>, which mesh dp=2 x tp=2 lacks",
        ),
    ],
)
def test_illegal_structure(name: str, body: str, sentence: str) -> None:
    assert check(name, f'%x: input f32[4, 8] "x"\n{body}\nreturn %y') == sentence


def chain() -> Graph:
    return parse_graph(
        """
        %x: input f32[4] "x"
        %y: f32[4] = aten.relu(%x)
        %z: f32[4] = aten.neg(%y)
        return %z
        """
    )


def test_topological() -> None:
    late = chain()
    _, y, z, _ = late.fx.nodes
    z.append(y)
    assert INVARIANTS["topological"](late, None) == "%z uses %y, which comes later"

    foreign = chain()
    list(foreign.fx.nodes)[2].args = (y,)
    assert INVARIANTS["topological"](foreign, None) == "%z uses %y, which is not in the graph"

    twice = chain()
    twice.fx.output((next(iter(twice.fx.nodes)),))
    assert INVARIANTS["topological"](twice, None) == (
        "the graph has 2 output nodes, where one at the end is legal"
    )

    short = Graph(chain().fx, 2)
    assert INVARIANTS["topological"](short, None) == (
        "the output has 1 entries, where 2 are declared"
    )

    update = parse_graph(
        '%x: input f32[4] "x"\n%y: f32[4] = aten.relu(%x)\nreturn; update %y <- %x'
    )
    assert INVARIANTS["topological"](update, None) == "%y is updated but is not a placeholder"


# resharded ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        "%x: input f32[4, 8] @ [dp, tp] grad\n%y: f32[4, 8] @ [dp, tp] = aten.relu(%x)",
        "%x: input f32[4, 8] @ [-, -] ~dp grad\n%y: f32[4, 8] @ [-, -] = aten.relu(%x)",
        "%x: input f32[4, 8] @ [dp&tp, -]\n%y: f32[8] @ [-] +dp +tp = aten.sum.dim_IntList(%x, [0])",
        "%x: input f32[4, 8] @ [-, -] +dp\n%y: f32[8] @ [-] +dp = aten.sum.dim_IntList(%x, [0])",
        # A block that changes nothing, and one that does.
        "%x: input f32[4, 8] @ [dp, -]\n%y: f32[32] @ [dp*8] = aten.view(%x, [32])",
        "%x: input f32[4, 8] @ [dp, -]\n%y: f32[32] @ [dp] = aten.view(%x, [32])",
        "%x: input f32[4, 8] @ [-, dp]\n%y: f32[32] @ [4:dp] = aten.view(%x, [32])",
        "%x: input f32[3, 8] @ [dp, -]\n%y: f32[24] @ [dp*8] = aten.view(%x, [24])",
        "%x: input f32[4, 8] @ [-, -]\n%y: f32[4, 8] @ [dp, -] = reshard(%x, @ [dp, -])",
        "%x: input f32[4, 4] @ [-, -]\n%y: f32[] @ [] = aten.det(%x)",
        # Fewer units than devices.
        "%x: input f32[3, 8] @ [dp&tp, -]\n%y: f32[3, 8] @ [dp&tp, -] = aten.relu(%x)",
    ],
)
def test_resharded_legal(body: str) -> None:
    assert check("resharded", f"{body}\nreturn %y") is None


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (
            "%x: input f32[4, 8] @ [dp, -]\n%y: f32[4, 8] @ [-, -] = aten.relu(%x)",
            "%y takes [dp, -] to [-, -], which rule ab->ab does not allow",
        ),
        (
            "%x: input f32[4, 8] @ [-, -] +dp\n%y: f32[4, 8] @ [-, -] +dp = aten.relu(%x)",
            "%y takes [-, -] +dp to [-, -] +dp, which rule ab->ab does not allow",
        ),
        (
            "%x: input f32[8, 8] @ [dp&tp, -]\n%y: f32[8, 8] @ [tp&dp, -] = aten.relu(%x)",
            "%y takes [dp&tp, -] to [tp&dp, -], which rule ab->ab does not allow",
        ),
        (
            "%x: input f32[3, 8] @ [dp, -]\n%y: f32[24] @ [dp] = aten.view(%x, [24])",
            "%y takes [dp, -] to [dp], which rule ab->(ab); linear(0) does not allow",
        ),
        (
            "%x: input f32[4, 8]\n%y: f32[4, 8] @ [-, -] = aten.relu(%x)",
            "%x has no sharding",
        ),
        (
            "%x: input f32[b, 8] @ [-, -]\n%y: f32[b, 8] @ [-, -] = aten.relu(%x)",
            "%x has symbolic sizes",
        ),
        (
            "%x: input f32[4, 4] @ [dp, -]\n%y: f32[] @ [] = aten.det(%x)",
            "%y takes [dp, -] to [], which an op without a rule does not allow",
        ),
        (
            "%x: input f32[4, 8] @ [-, -]\n%y: f32[4, 8] @ [-, dp] = reshard(%x, @ [dp, -])",
            "%y @ [-, dp] was to be resharded to [dp, -]",
        ),
    ],
)
def test_resharded_illegal(body: str, sentence: str) -> None:
    assert check("resharded", f"{body}\nreturn %y") == sentence


def test_resharded_takes_discovered_rules() -> None:
    text = "%x: input f32[4, 4, 4] @ [dp, -, -]\n%y: f32[4] @ [dp] = aten.det(%x)\nreturn %y"
    graph = parse_graph(text)
    node = next(graph.calls())
    if rule_for(node) is None:
        assert INVARIANTS["resharded"](graph, MESH) is not None
    node.meta["rule"] = parse_rule("b[m][n]->b")
    assert INVARIANTS["resharded"](graph, MESH) is None


# types_follow -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        # V says nothing of a value without gradient.
        '%x: input i64[4] @ [-] "x"\n%y: i64[4] @ [-] ~dp = aten.neg(%x)',
        '%i: input i64[4] @ [-] ~dp "x"\n%y: i64[4] @ [-] = collective(pvary, "dp", %i)',
        # No output requires grad, so no gradient can be partial.
        "%x: input i64[4] @ [dp]\n%w: param f32[4] @ [-] grad\n"
        "%c: bool[4] @ [dp] = aten.ne.Tensor(%x, %w)\n"
        '%y: bool[4] @ [-] = collective(gather_inv, "dp", %c)',
        # A factory may be made in shards; an op that communicates may leave a replicated value.
        '%z: f32[4] @ [dp] = aten.zeros([4])\n%y: f32[4] @ [-] = collective(gather_inv, "dp", %z)',
        "%x: param f32[4, 8] @ [-, tp] grad\n%t: input i64[4] @ [-]\n"
        "%y: f32[] @ [] = aten.cross_entropy_loss(%x, %t)",
        # An addend of a partial sum counts on one rank only.
        "%x: input f32[4, 8] @ [-, tp]\n%w: param f32[8, 8] @ [-, tp] grad\n"
        '%b: param f32[8] @ [-] grad\n%once: f32[8] @ [-] +tp = collective(keep_first, "tp", %b)\n'
        "%p: f32[4, 8] @ [-, -] +tp = aten.linear(%x, %w, %once)\n"
        '%y: f32[4, 8] @ [-, -] = collective(psum, "tp", %p)',
    ],
)
def test_types_follow_legal(body: str) -> None:
    assert check("types_follow", f"{body}\nreturn %y") is None


HEAD = """
%x: input f32[4, 8] @ [dp, -] "x"
%w: param f32[8, 8] @ [-, -] grad "w"
"""


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (
            "%y: f32[4, 8] @ [dp, -] = aten.linear(%x, %w)",
            "%y gives %w, R on 'dp', a partial gradient: %x is S",
        ),
        (
            '%v: f32[8, 8] @ [-, -] ~dp = collective(pvary, "dp", %w)\n'
            "%y: f32[8, 8] @ [-, -] ~dp = aten.add.Tensor(%v, %w)",
            "%y gives %w, R on 'dp', a partial gradient: %v is V",
        ),
        (
            "%y: f32[2, 8, 8] @ [dp, -, -] = aten.expand(%w, [2, 8, 8])",
            "%y gives %w, R on 'dp', a partial gradient: %y is S",
        ),
        (
            '%v: f32[8, 8] @ [-, -] ~dp = collective(pvary, "dp", %w)\n'
            "%y: f32[8, 8] @ [-, -] = aten.relu(%v)",
            "%y is R on 'dp', but %v is V",
        ),
        (
            "%y: f32[8, 8] @ [-, -] ~tp = aten.relu(%w)",
            "%y is V on 'tp', but every input is R",
        ),
        (
            "%n: f32[4, 8] @ [-, -] = aten.relu(%x)\n%y: f32[8, 8] @ [-, -] = aten.relu(%w)",
            "%n is R on 'dp', but %x is S",
        ),
        (
            "%y: f32[4, 8] @ [dp, -] +tp = aten.relu(%x)",
            "%y is P on 'tp', but no input is S or P",
        ),
        (
            "%z: f32[4] @ [-] +tp = aten.zeros([4])\n%y: f32[8, 8] @ [-, -] = aten.relu(%w)",
            "%z has no inputs, but is P on 'tp'",
        ),
        (
            '%y: f32[4, 8] @ [-, -] = collective(psum, "dp", %x)',
            "%y = psum on 'dp' takes P, but %x is S",
        ),
        (
            '%y: f32[8, 8] @ [-, -] = collective(pvary, "dp", %w)',
            "%y = pvary on 'dp' makes V, but is typed R",
        ),
        (
            '%y: f32[4, 8] @ [-, -] +tp = collective(gather_inv, "dp", %x)',
            "%y = gather_inv on 'dp' takes %x @ [dp, -] to [-, -] +tp, which differ on other axes",
        ),
        (
            '%y: f32[4, 8] @ [dp, -] = collective(swap, "dp", %x)',
            "%y = swap on 'dp' moves no split: %x @ [dp, -] becomes [dp, -]",
        ),
        (
            '%y: f32[4, 9] @ [-, -] = collective(gather_inv, "dp", %x)',
            "%y = gather_inv on 'dp' changes the shape or dtype of %x",
        ),
        (
            '%y: f32[8, 8] @ [-, -] nograd = collective(pvary, "dp", %w)',
            "%y = pvary on 'dp' changes whether %w requires grad",
        ),
        (
            '%y: f32[4, 8] @ [-, -] = collective(gather_inv, "ep", %x)',
            "%y = gather_inv names axis 'ep', which mesh dp=2 x tp=2 lacks",
        ),
        (
            '%y: f32[4, 8] @ [-, -] = collective("psum", "dp", %x)',
            '%y = collective("psum", ...) names no collective',
        ),
        (
            "%m: f32[8] @ [-] max(dp) = aten.amax(%x, [0])\n"
            '%y: f32[8] @ [-] = collective(psum, "dp", %m)',
            "%y = psum on 'dp' reduces by sum, but %m @ [-] max(dp) does not",
        ),
        (
            "%n: f32[4, 8] @ [-, -] = reshard(%x, @ [-, -])\n%y: f32[8] @ [-] = aten.amax(%n, [0])",
            "%n = reshard is not a typed collective",
        ),
        ("%y: f32[4, 8] @ [dp, -] = aten.relu(%x)", "%y is S on 'dp', but is returned"),
        ("%y: f32[4, 8] = aten.relu(%x)", "%y has no sharding"),
    ],
)
def test_types_follow_illegal(body: str, sentence: str) -> None:
    assert check("types_follow", f"{HEAD}{body}\nreturn %y") == sentence


def test_updates_are_sharded_as_their_buffer() -> None:
    text = SHARDED_DATA.replace('%seen: buffer f32[8] @ [dp] "seen"', "%seen: buffer f32[8] @ [-]")
    assert check("types_follow", text) == "%n @ [dp] updates %seen @ [-]"


def test_invariants_leave_the_graph_alone() -> None:
    graph = parse_graph(TENSOR_PARALLEL)
    before = [(node.name, dict(node.meta)) for node in graph.fx.nodes]
    verify(graph, MESH, INVARIANTS)
    assert [(node.name, dict(node.meta)) for node in graph.fx.nodes] == before
    assert isinstance(graph.fx, torch.fx.Graph)
