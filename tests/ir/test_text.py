"""Printed graphs are read by people and parsed by tests: goldens, and round trips of random ones."""

from __future__ import annotations

import math
import operator
import textwrap
from typing import Any

import expecttest
import pytest
import sympy
import torch
import torch.fx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autopar.ir import lowered
from autopar.ir.graph import Graph, Value
from autopar.ir.lowered import GroupRef, Region, ShardSpec, SwapSpec
from autopar.ir.mesh import Axis, Mesh
from autopar.ir.parse import (
    ROLES,
    parse_argument,
    parse_graph,
    parse_mesh,
    parse_program,
    parse_sharding,
)
from autopar.ir.sharding import WHOLE, Sharding, Split
from autopar.ir.text import print_argument, print_graph

aten = torch.ops.aten
B = sympy.Symbol("b", positive=True, integer=True)
U = sympy.Symbol("u0", integer=True)

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


def facts(graph: Graph) -> list[Any]:
    """All that the text of a graph says, as plain comparable data."""

    def plain(arg: Any) -> Any:
        if isinstance(arg, torch.fx.Node):
            return ("node", arg.name)
        if isinstance(arg, (list, tuple)):
            return (isinstance(arg, list), *map(plain, arg))
        if isinstance(arg, dict):
            return {key: plain(value) for key, value in arg.items()}
        if isinstance(arg, slice):
            return ("slice", plain(arg.start), plain(arg.stop), plain(arg.step))
        return ("sympy", arg) if isinstance(arg, sympy.Basic) else repr(arg)

    rows: list[Any] = [graph.outputs, graph.mutated]
    for node in graph.fx.nodes:
        keys = ("value", "role", "fqns", "source", "region")
        meta = {} if node.op == "output" else {key: node.meta.get(key) for key in keys}
        target = node.target if node.op == "call_function" else None
        rows.append((node.op, node.name, target, plain(node.args), plain(node.kwargs), meta))
    return rows


# Strategies ---------------------------------------------------------------------------------------

AXES = ("dp", "tp", "cp", "pp")
shardings_of_split = st.builds(
    Split,
    st.lists(st.sampled_from(AXES), min_size=1, max_size=2, unique=True).map(tuple),
    st.sampled_from([1, 1, 3]),
    st.sampled_from([1, 1, 64]),
)
splits = st.one_of(st.just(WHOLE), shardings_of_split)


@st.composite
def shardings(draw: st.DrawFn, rank: int) -> Sharding:
    kinds = draw(st.dictionaries(st.sampled_from(AXES), st.sampled_from(["sum", "max", "min"])))
    varying = draw(st.sets(st.sampled_from(AXES)))
    made = tuple(draw(splits) for _ in range(rank))
    return Sharding(made, tuple(sorted(kinds.items())), tuple(sorted(varying)))


sizes = st.one_of(
    st.integers(0, 4096), st.sampled_from([B, 16 * B, B + 1, B**2, B * U, U // 2, (B + 3) // 4])
)


@st.composite
def values(draw: st.DrawFn) -> Value:
    shape = tuple(draw(st.lists(sizes, max_size=3)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]))
    sharding = draw(st.one_of(st.none(), shardings(len(shape))))
    return Value(shape, dtype, sharding, draw(st.booleans()))


specs = st.builds(
    ShardSpec,
    st.integers(0, 3),
    st.lists(st.integers(0, 9), min_size=1, max_size=3).map(tuple),
    st.sampled_from([1, 3]),
    st.sampled_from([1, 64]),
)
atoms = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.complex_numbers(allow_nan=False, allow_infinity=False),
    st.text(max_size=8),
    st.sampled_from(
        (
            torch.float32,
            torch.float8_e4m3fn,
            torch.uint8,
            torch.quint8,
            torch.strided,
            B,
            2 * B,
            ...,
        )
    ),
    st.sampled_from((torch.channels_last, torch.device("cuda:1"), torch.device("meta"), U - 1)),
    st.sampled_from(list(lowered.COLLECTIVES.values())),
    st.lists(st.sampled_from(AXES), max_size=2).map(lambda axes: GroupRef(tuple(axes))),
    specs,
    st.builds(SwapSpec, specs, specs),
    st.just(Region((4, 8), (((0, 2),), ((0, 4), (6, 8))))),
    shardings_of_split,
    shardings(2),
)

TARGETS: tuple[Any, ...] = (
    aten.mm.default,
    aten.add.Tensor,
    aten.sum.dim_IntList,
    aten.cat.default,
    aten.convolution.default,
    operator.getitem,
    operator.floordiv,
    torch.sym_max,
    *lowered.LOWERED_OPS.values(),
)


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    fx = torch.fx.Graph()
    nodes: list[torch.fx.Node] = []
    for i in range(draw(st.integers(1, 3))):
        node = fx.placeholder(f"p{i}")
        role = draw(st.sampled_from(["param", "buffer", "input", "constant"]))
        names = tuple(draw(st.lists(st.text(max_size=8), max_size=2)))
        node.meta.update(value=draw(st.one_of(st.none(), values())), role=role, fqns=names)
        node.meta.update(source="", region=None)
        nodes.append(node)
    arguments = st.recursive(
        st.one_of(st.integers(0, len(nodes) - 1).map(lambda i: nodes[i]), atoms),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.lists(inner, max_size=3).map(tuple),
            st.builds(slice, inner, inner),
            st.dictionaries(st.text(max_size=3), inner, max_size=2),
        ),
        max_leaves=4,
    )
    for _ in range(draw(st.integers(0, 4))):
        args = tuple(draw(st.lists(arguments, max_size=3)))
        kwargs = draw(st.dictionaries(st.sampled_from(["dim", "dtype"]), arguments, max_size=2))
        if draw(st.booleans()):
            args = (nodes[-1], *args)
        node = fx.call_function(draw(st.sampled_from(TARGETS)), args or (nodes[-1],), kwargs)
        several = st.lists(st.one_of(st.none(), values()), max_size=3).map(tuple)
        node.meta.update(
            value=draw(st.one_of(st.none(), values(), several)),
            source=draw(st.sampled_from(["", "model.py:31", "my model.py:7"])),
            region=draw(st.sampled_from([None, 0, "block.0"])),
        )
        nodes.append(node)
    outputs = draw(st.integers(0, 2))
    mutated = draw(st.sampled_from([(), ("p0",)]))
    fx.output(tuple(draw(st.sampled_from(nodes)) for _ in range(outputs + len(mutated))))
    return Graph(fx, outputs, mutated)


meshes = st.lists(st.sampled_from(AXES), unique=True).flatmap(
    lambda names: st.tuples(
        *(st.builds(Axis, st.just(name), st.integers(1, 64), st.integers(0, 2)) for name in names)
    ).map(Mesh)
)


# Round trips --------------------------------------------------------------------------------------


@QUICK
@given(graphs(), st.one_of(st.none(), meshes))
def test_graphs_round_trip(graph: Graph, mesh: Mesh | None) -> None:
    text = print_graph(graph, mesh)
    parsed_mesh, parsed = parse_program(text)
    assert parsed_mesh == mesh
    assert facts(parsed) == facts(graph)
    assert print_graph(parsed, mesh) == text
    assert text.count("\n") + 1 == len(graph.fx.nodes) + (mesh is not None)


@QUICK
@given(st.integers(0, 4).flatmap(shardings))
def test_shardings_round_trip(sharding: Sharding) -> None:
    assert parse_sharding(str(sharding)) == sharding


@pytest.mark.parametrize("value", [1.0, -0.0, 1e-5, 1e300, math.inf, -math.inf, 0.1, 5e-324])
def test_floats_are_exact(value: float) -> None:
    parsed = parse_argument(print_argument(value), {})
    assert type(parsed) is float
    assert repr(parsed) == repr(value)


@pytest.mark.parametrize("value", [1, True, 1.0, "1", None, (1,), [1], (), [], (((),),)])
def test_types_are_kept(value: object) -> None:
    parsed = parse_argument(print_argument(value), {})
    assert parsed == value
    assert type(parsed) is type(value)


def test_torch_sizes_round_trip() -> None:
    from torch.utils._sympy import functions as f

    pairs = [
        (f.FloorDiv(B, 2), "(b//2)"),
        (f.Mod(B, 2), "Mod(b, 2)"),
        (f.PythonMod(U, 2), "PythonMod(u0, 2)"),
        (parse_argument("Max(3, b)", {}), "Max(3, b)"),
        (f.FloorDiv(B, 2) * (U - 1), "(u0 - 1)*((b//2))"),
        (B / 2, "b/2"),
    ]
    for size, text in pairs:
        assert print_argument(size) == text
        assert parse_argument(text, {}) == size
        assert parse_argument(f"({text},)", {}) == (size,)


# Goldens ------------------------------------------------------------------------------------------


def dedent(text: str) -> str:
    return textwrap.dedent(text).strip()


class TestGoldens(expecttest.TestCase):
    def test_printed_as_it_is_written(self) -> None:
        text = dedent(
            """
            mesh dp=2 x tp=2@1
            %w1: param f32[512, 256] @ [tp, -] grad "fc1.weight", "head.weight"
            %steps: buffer i64[] @ [] "steps"
            %input: input f32[b, 256] @ [dp, -] "x"
            %n = aten.sym_size.int(%input, 0)
            %h: f32[b, 512] @ [dp, tp] = aten.linear(%input, %w1)   # model.py:31
            %p: f32[b, 256] @ [dp, -] +tp = aten.mm(%h, %w1)   # model.py:32
            %y: f32[b, 256] @ [dp, -] = collective(psum, "tp", %p)
            %v: f32[n, b, 256] @ [-, dp, -] ~tp nograd = aten.view(%y, [%n, b, 256])
            %top: (f32[b] @ [dp], i64[b] @ [dp]) = aten.max.dim(%y, 1) region=2   # model.py:33
            %best: f32[b] @ [dp] = getitem(%top, 0)
            %r: f32[b] @ [] = reshard(%best, @ [-] +tp)
            %next: i64[] @ [] = aten.add.Tensor(%steps, 1, alpha=1)
            return %r, %v; update %steps <- %next
            """
        )
        mesh, graph = parse_program(text)
        assert print_graph(graph, mesh) == text
        names = {node.name: node for node in graph.fx.nodes}
        assert names["w1"].meta["fqns"] == ("fc1.weight", "head.weight")
        assert names["h"].meta["value"].requires_grad
        assert not names["v"].meta["value"].requires_grad
        assert [value.requires_grad for value in names["top"].meta["value"]] == [True, False]
        assert graph.mutated == ("steps",)

    def test_arguments(self) -> None:
        spec = ShardSpec(0, (2, 1), block=4)
        arguments: list[object] = [
            torch.bfloat16,
            torch.channels_last,
            torch.device("cuda:0"),
            16 * B,
            GroupRef(("dp", "tp")),
            lowered.SWAP,
            SwapSpec(spec, ShardSpec(1, (3,))),
            Sharding.on(2, dp=0).with_partial("tp", "max"),
            Region((4,), (((0, 2),),)),
            slice(0, None, 2),
            {"a": [1, -math.inf]},
            object(),
        ]
        self.assertExpectedInline(
            "\n".join(map(print_argument, arguments)),
            """\
bf16
channels_last
device("cuda:0")
16*b
<dp&tp>
swap
SwapSpec(ShardSpec(0, (2, 1), block=4), ShardSpec(1, (3,)))
@ [dp, -] max(tp)
Region((4,), (((0, 2),),))
slice(0, None, 2)
{"a": [1, -inf]}
opaque("object")""",
        )

    def test_rules_are_comments(self) -> None:
        graph = parse_graph(
            """
            %a: input f32[4, 8] "a"
            %b: input f32[8, 2] "b"
            %y: f32[4, 2] = aten.mm(%a, %b)   # model.py:31
            return %y
            """
        )
        line = print_graph(graph, rules=True).splitlines()[2]
        head, _, comment = line.partition("   # ")
        assert head == "%y: f32[4, 2] = aten.mm(%a, %b)"
        assert "->" in comment
        assert comment.endswith("  model.py:31")
        assert facts(parse_graph(print_graph(graph, rules=True))) == facts(graph)

    def test_python_callables_print_but_do_not_parse(self) -> None:
        fx = torch.fx.Graph()
        x = fx.placeholder("x")
        x.meta.update(role="input", fqns=(), value=None)
        y = fx.call_function(textwrap.dedent, (x,))
        fx.output((y,))
        text = print_graph(Graph(fx, 1))
        self.assertExpectedInline(
            text,
            """\
%x: input
%dedent: ? = py:textwrap.dedent(%x)
return %dedent""",
        )
        with pytest.raises(ValueError, match=r"line 2: 'textwrap\.dedent' is a Python callable"):
            parse_graph(text)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("%y: f32[4] = aten.nothing(%x)", "unknown op 'aten.nothing'"),
        ("%y: f32[4] = aten.neg(%z)", "%z is not defined above"),
        ("%x: f32[4] = aten.neg(%x)", "%x is defined twice"),
        ("%y: f33[4] = aten.neg(%x)", "unknown dtype 'f33'"),
        ("%y: f32[4 = aten.neg(%x)", "'[' is never closed in '[4'"),
        ("%y: f32[4] @ [dp = aten.neg(%x)", "cannot read sharding '[dp'"),
        ("%y: f32[4] @ [dp] tp = aten.neg(%x)", "cannot read 'tp' in sharding '[dp] tp'"),
        ("%y: f32[import os] = aten.neg(%x)", "cannot read 'import os'"),
        ("%y: f32[4] = aten.neg(%x", "'(' is never closed in '(%x'"),
        ("%y: f32[4] = aten.neg(exit(0))", "cannot read 'exit(0)' in the expression 'exit(0)'"),
        ('%y: f32[4] = aten.neg(opaque("T"))', '"T" is an object that text cannot say'),
        (
            "%y: f32[4]",
            f"%y is neither a placeholder ({', '.join(ROLES)}) nor a call",
        ),
        ("y = 3", "a line is `%name: type = target(...)`, `return ...` or `mesh ...`"),
        ("mesh dp", "cannot read mesh axis 'dp'"),
    ],
)
def test_errors_name_the_line(line: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_graph(f'%x: input f32[4] "x"\n{line}\nreturn %x')
    assert str(caught.value) == f"line 2: {message}\n    {line}"


def test_text_must_return() -> None:
    with pytest.raises(ValueError, match="the text has no `return` line"):
        parse_graph('%x: input f32[4] "x"')
    with pytest.raises(ValueError, match="line 2: nothing may follow the return"):
        parse_graph("return\nreturn")


def test_comments_and_blank_lines_are_skipped() -> None:
    mesh, graph = parse_program('\n# after capture\n%x: input f32[] "x"\n\nreturn %x\n')
    assert mesh is None
    assert len(graph.fx.nodes) == 2


def test_single_device_mesh() -> None:
    assert parse_mesh("mesh single") == Mesh(())
