"""The program of all ranks becomes the program of one."""

from __future__ import annotations

import expecttest
import pytest
import torch

from autopar.ir.localise import nothing
from autopar.passes.localise_shapes import localise_shapes

from .helpers import dedent, lowered, program, show
from .test_lower_collectives import TIED
from .test_propagate import COLUMN_ROW, MLP, STORED


class TestLocaliseShapes(expecttest.TestCase):
    def test_column_then_row(self) -> None:
        mesh, graph = lowered(MLP, COLUMN_ROW, STORED)
        self.assertExpectedInline(
            show(localise_shapes(graph, mesh, 3)),
            """\
%w1: param f32[8, 8] @ [tp, -] grad "w1"
%b1: param f32[8] @ [tp] grad "b1"
%w2: param f32[8, 8] @ [-, tp] grad "w2"
%b2: param f32[8] @ [-] grad "b2"
%x: input f32[4, 8] @ [-, -] "x"
%collective: f32[2, 8] @ [dp, -] = exchange(slice_inv, [ShardSpec(0, (2, 2))], <dp>, %x)
%collective_1: f32[8, 8] @ [tp, -] ~dp = exchange(pvary, [None], <dp>, %w1)
%collective_2: f32[8] @ [tp] ~dp = exchange(pvary, [None], <dp>, %b1)
%h: f32[2, 8] @ [dp, tp] = aten.linear(%collective, %collective_1, %collective_2)
%r: f32[2, 8] @ [dp, tp] = aten.relu(%h)
%collective_3: f32[8, 8] @ [-, tp] ~dp = exchange(pvary, [None], <dp>, %w2)
%collective_4: f32[8] @ [-] ~dp = exchange(pvary, [None], <dp>, %b2)
%collective_5: f32[8] @ [-] +tp ~dp = exchange(keep_first, [None], <tp>, %collective_4)
%y: f32[2, 8] @ [dp, -] +tp = aten.linear(%r, %collective_3, %collective_5)
%collective_6: f32[2, 8] @ [dp, -] = exchange(psum, [None], <tp>, %y)
%loss: f32[] @ [] +dp = aten.sum(%collective_6)
%collective_7: f32[] @ [] = exchange(psum, [None], <dp>, %loss)
return %collective_7""",
        )

    def test_seven_rows_over_four(self) -> None:
        """Two rows each, the last rank one; its mean counts as much as its rows."""
        mesh, graph = lowered(
            """
            mesh dp=4
            %x: input f32[7, 5, 8] "x"
            %y: f32[35, 8] = aten.reshape(%x, [35, 8])
            %m: f32[8] = aten.mean.dim(%y, [0])
            return %m
            """,
            {"y": {"dp": "a"}, "m": {"dp": "a"}},
        )
        self.assertExpectedInline(
            show(localise_shapes(graph, mesh, 0)),
            """\
%x: input f32[7, 5, 8] @ [-, -, -] "x"
%collective: f32[2, 5, 8] @ [dp, -, -] = exchange(slice_inv, [ShardSpec(0, (2, 2, 2, 1))], <dp>, %x)
%y: f32[10, 8] @ [dp*5, -] = aten.reshape(%collective, [10, 8])
%collective_1: f32[35, 8] @ [-, -] = exchange(gather_inv, [ShardSpec(0, (2, 2, 2, 1), block=5)], <dp>, %y)
%collective_2: f32[9, 8] @ [dp, -] = exchange(slice_inv, [ShardSpec(0, (9, 9, 9, 8))], <dp>, %collective_1)
%m: f32[8] @ [-] +dp = py:autopar.ir.localise.scaled(0.2571428571428571, "aten.mean.dim", %collective_2, [0])
%collective_3: f32[8] @ [-] = exchange(psum, [None], <dp>, %m)
return %collective_3""",
        )
        self.assertExpectedInline(
            show(localise_shapes(graph, mesh, 3)),
            """\
%x: input f32[7, 5, 8] @ [-, -, -] "x"
%collective: f32[1, 5, 8] @ [dp, -, -] = exchange(slice_inv, [ShardSpec(0, (2, 2, 2, 1))], <dp>, %x)
%y: f32[5, 8] @ [dp*5, -] = aten.reshape(%collective, [5, 8])
%collective_1: f32[35, 8] @ [-, -] = exchange(gather_inv, [ShardSpec(0, (2, 2, 2, 1), block=5)], <dp>, %y)
%collective_2: f32[8, 8] @ [dp, -] = exchange(slice_inv, [ShardSpec(0, (9, 9, 9, 8))], <dp>, %collective_1)
%m: f32[8] @ [-] +dp = py:autopar.ir.localise.scaled(0.22857142857142856, "aten.mean.dim", %collective_2, [0])
%collective_3: f32[8] @ [-] = exchange(psum, [None], <dp>, %m)
return %collective_3""",
        )

    def test_a_rank_without_rows(self) -> None:
        """Three rows over two axes of two: the last rank has none, and takes part all the same."""
        mesh, graph = lowered(
            """
            mesh dp=4
            %w: param f32[2, 8] grad "w"
            %x: input f32[3, 8] "x"
            %h: f32[3, 2] = aten.linear(%x, %w)
            %y: f32[3] = aten.amax(%h, [1])
            %s: f32[] = aten.sum(%y)
            return %s
            """,
            {"h": {"dp": "b"}, "y": {"dp": "a"}, "s": {"dp": "a"}},
        )
        self.assertExpectedInline(
            show(localise_shapes(graph, mesh, 3)),
            """\
%w: param f32[2, 8] @ [-, -] grad "w"
%x: input f32[3, 8] @ [-, -] "x"
%collective: f32[0, 8] @ [dp, -] = exchange(slice_inv, [ShardSpec(0, (1, 1, 1, 0))], <dp>, %x)
%collective_1: f32[2, 8] @ [-, -] ~dp = exchange(pvary, [None], <dp>, %w)
%h: f32[0, 2] @ [dp, -] = aten.linear(%collective, %collective_1)
%y: f32[0] @ [dp] = py:autopar.ir.localise.nothing([[0]], [f32], %h)
%s: f32[] @ [] +dp = aten.sum(%y)
%collective_2: f32[] @ [] = exchange(psum, [None], <dp>, %s)
return %collective_2""",
        )

    def test_nothing_is_no_function_of_what_has_no_derivative(self) -> None:
        """Else the rank without rows would run a collective more than the others in the backward."""
        mesh, graph = lowered(
            """
            mesh dp=4
            %x: input f32[3, 8] grad "x"
            %z: input f64[3, 8] grad "z"
            %y: f64[3, 8] = aten.type_as(%x, %z)
            %s: f64[] = aten.sum(%y)
            return %s
            """,
            {"y": {"dp": "a"}, "s": {"dp": "a"}},
        )
        text = show(localise_shapes(graph, mesh, 3))
        (line,) = (line for line in text.splitlines() if line.startswith("%y"))
        assert "localise.nothing_of_some([[0, 8]], [f64], [1], " in line, text

    def test_vocabulary_parallel(self) -> None:
        """Seven rows of the table over two: the embedding and the loss know where they start."""
        mesh, graph = lowered(
            TIED,
            {
                "x": {"dp": "c", "tp": "a"},
                "y": {"dp": "b", "tp": "c"},
                "loss": {"dp": "b", "tp": "a"},
            },
            {"w": "[tp, -]"},
        )
        self.assertExpectedInline(
            show(localise_shapes(graph, mesh, 1)),
            """\
%w: param f32[3, 4] @ [tp, -] grad "wte.weight", "head.weight"
%ids: input i64[6] @ [-] "ids"
%collective: f32[3, 4] @ [tp, -] ~dp = exchange(pvary, [None], <dp>, %w)
%collective_1: i64[3] @ [dp] = exchange(slice_inv, [ShardSpec(0, (3, 3))], <dp>, %ids)
%x: f32[3, 4] @ [dp, -] +tp = masked_embedding(%collective, %collective_1, 4, -1)
%collective_2: f32[3, 4] @ [dp, -] = exchange(psum, [None], <tp>, %x)
%collective_3: f32[3, 4] @ [dp, -] ~tp = exchange(pvary, [None], <tp>, %collective_2)
%y: f32[3, 3] @ [dp, tp] = aten.linear(%collective_3, %collective)
%loss: f32[] @ [] +dp = cross_entropy(%y, %collective_1, None, "mean", -100, 0.0, 4, 7, <tp>, <dp>)
%collective_4: f32[] @ [] = exchange(psum, [None], <dp>, %loss)
return %collective_4""",
        )

    def test_batch_norm(self) -> None:
        """Statistics are of the global batch; the new running mean is the same everywhere."""
        mesh, graph = lowered(
            """
            mesh dp=2
            %w: param f32[3] grad "w"
            %mean: buffer f32[3] "mean"
            %var: buffer f32[3] "var"
            %x: input f32[5, 3, 2, 2] "x"
            %n: (f32[5, 3, 2, 2], f32[3] nograd, f32[3] nograd) = autopar.batch_norm(%x, %w, None, %mean, %var, True, 0.1, 1e-05)
            %y: f32[5, 3, 2, 2] = getitem(%n, 0)
            %new_mean: f32[3] = getitem(%n, 1)
            %new_var: f32[3] = getitem(%n, 2)
            return %y; update %mean <- %new_mean, %var <- %new_var
            """,
            {"n": {"dp": "a"}},
        )
        self.assertExpectedInline(
            show(localise_shapes(graph, mesh, 1)),
            """\
%w: param f32[3] @ [-] grad "w"
%mean: buffer f32[3] @ [-] "mean"
%var: buffer f32[3] @ [-] "var"
%x: input f32[5, 3, 2, 2] @ [-, -, -, -] "x"
%collective: f32[2, 3, 2, 2] @ [dp, -, -, -] = exchange(slice_inv, [ShardSpec(0, (3, 2))], <dp>, %x)
%collective_1: f32[3] @ [-] ~dp = exchange(pvary, [None], <dp>, %w)
%n: (f32[2, 3, 2, 2] @ [dp, -, -, -], f32[3] @ [-] nograd, f32[3] @ [-] nograd) = batch_norm(%collective, %collective_1, None, %mean, %var, True, 0.1, 1e-05, <dp>)
%y: f32[2, 3, 2, 2] @ [dp, -, -, -] = getitem(%n, 0)
%new_mean: f32[3] @ [-] = getitem(%n, 1)
%new_var: f32[3] @ [-] = getitem(%n, 2)
%collective_2: f32[5, 3, 2, 2] @ [-, -, -, -] = exchange(gather_inv, [ShardSpec(0, (3, 2))], <dp>, %y)
return %collective_2; update %mean <- %new_mean, %var <- %new_var""",
        )

    def test_dropout(self) -> None:
        """A mask by global position: calls are numbered, and one that drops nothing is left out."""
        mesh, graph = lowered(
            """
            mesh dp=2 x tp=2
            %x: input f32[5, 8] "x"
            %a: f32[5, 8] = aten.dropout(%x, 0.5, True)
            %b: f32[5, 8] = aten.dropout(%a, 0.5, False)
            %c: f32[5, 8] = aten.dropout(%b, 0.1, True)
            return %c
            """,
            {"a": {"dp": "a", "tp": "b"}, "b": {"dp": "a"}, "c": {"dp": "a"}},
        )
        self.assertExpectedInline(
            show(localise_shapes(graph, mesh, 2)),
            """\
%rng_seed: seed "rng_seed"
%x: input f32[5, 8] @ [-, -] "x"
%collective: f32[2, 8] @ [dp, -] = exchange(slice_inv, [ShardSpec(0, (3, 2))], <dp>, %x)
%collective_1: f32[2, 4] @ [dp, tp] = exchange(slice_inv, [ShardSpec(1, (4, 4))], <tp>, %collective)
%a: f32[2, 4] @ [dp, tp] = dropout(%collective_1, 0.5, %rng_seed, 0, Region((5, 8), (((3, 5),), ((0, 4),))))
%collective_2: f32[2, 8] @ [dp, -] = exchange(gather_inv, [ShardSpec(1, (4, 4))], <tp>, %a)
%b: f32[2, 8] @ [dp, -] = aten.alias(%collective_2)
%c: f32[2, 8] @ [dp, -] = dropout(%b, 0.1, %rng_seed, 1, Region((5, 8), (((3, 5),), ((0, 8),))))
%collective_3: f32[5, 8] @ [-, -] = exchange(gather_inv, [ShardSpec(0, (3, 2))], <dp>, %c)
return %collective_3""",
        )

    def test_strided_dropout_region(self) -> None:
        """A rank that has a third of each part has three runs of the mask."""
        mesh, graph = program(
            """
            mesh tp=2
            %x: input f32[2, 12] @ [-, 3:tp] "x"
            %y: f32[2, 12] @ [-, 3:tp] = aten.dropout(%x, 0.5, True)
            return %y
            """
        )
        self.assertExpectedInline(
            show(localise_shapes(graph, mesh, 1)),
            """\
%rng_seed: seed "rng_seed"
%x: input f32[2, 6] @ [-, 3:tp] "x"
%y: f32[2, 6] @ [-, 3:tp] = dropout(%x, 0.5, %rng_seed, 0, Region((2, 12), (((0, 2),), ((2, 4), (6, 8), (10, 12)))))
return %y""",
        )

    def test_specs_of_collectives(self) -> None:
        """Strided and uneven shards; a swap has two."""
        mesh, graph = program(
            """
            mesh dp=2 x tp=3
            %w: param f32[24, 8] @ [3:dp, -] grad "w"
            %a: f32[24, 8] @ [-, -] ~dp = collective(gather_vary, "dp", %w)
            %x: input f32[7, 10] @ [tp, dp] "x"
            %b: f32[7, 10] @ [-, dp&tp] = collective(swap, "tp", %x)
            %t: input f32[14] @ [tp*2] "t"
            %c: f32[14] @ [-] = collective(gather_inv, "tp", %t)
            return
            """
        )
        self.assertExpectedInline(
            show(localise_shapes(graph, mesh, 5)),
            """\
%w: param f32[12, 8] @ [3:dp, -] grad "w"
%a: f32[24, 8] @ [-, -] ~dp = exchange(gather_vary, [ShardSpec(0, (4, 4), outer=3)], <dp>, %w)
%x: input f32[1, 5] @ [tp, dp] "x"
%b: f32[7, 1] @ [-, dp&tp] = exchange(swap, [SwapSpec(ShardSpec(0, (3, 3, 1)), ShardSpec(1, (2, 2, 1)))], <tp>, %x)
%t: input f32[2] @ [tp*2] "t"
%c: f32[14] @ [-] = exchange(gather_inv, [ShardSpec(0, (3, 3, 1), block=2)], <tp>, %t)
return""",
        )


@pytest.mark.parametrize("rank", [0, 1])
def test_nothing_to_do(rank: int) -> None:
    text = dedent(
        """
        %w: param f32[8, 4] @ [-, -] grad "w"
        %x: input f32[2, 4] @ [-, -] "x"
        %y: f32[2, 8] @ [-, -] = aten.linear(%x, %w)
        %n: f32[2, 8] @ [-, -] = aten.embedding(%w, %x)
        return %y
        """
    )
    mesh, graph = program("mesh dp=2\n" + text)
    assert show(localise_shapes(graph, mesh, rank)) == text


def test_ranks_differ_only_in_sizes() -> None:
    """All ranks make the same calls of collectives in the same order."""
    mesh, graph = lowered(MLP, COLUMN_ROW, STORED)
    programs = [localise_shapes(graph, mesh, rank) for rank in range(4)]
    for made in programs:
        assert [n.target for n in made.fx.nodes if n.op == "call_function"] == [
            n.target for n in programs[0].fx.nodes if n.op == "call_function"
        ]


@pytest.mark.parametrize(("source", "result"), [("c128", "f64"), ("f64", "c128"), ("c64", "c128")])
def test_nothing_stays_a_function_of_complex_numbers(source: str, result: str) -> None:
    dtypes = {"f64": torch.float64, "c64": torch.complex64, "c128": torch.complex128}
    x = torch.zeros(0, 3, dtype=dtypes[source], requires_grad=True)
    y = nothing([[2, 0]], [dtypes[result]], x)
    assert isinstance(y, torch.Tensor) and (y.shape, y.dtype) == ((2, 0), dtypes[result])
    y.abs().sum().backward()
    assert x.grad is not None and x.grad.dtype == x.dtype


def test_groups_of_a_convolution_are_split_where_there_are_no_rows() -> None:
    """One row over two devices: those without it run the op on nothing, with the weight they have.

    What autograd saves must be the same everywhere, so that it is not left out.
    """
    text = """
        mesh dp=2 x tp=2
        %w: param f32[6, 3, 3, 3] grad "w"
        %x: input f32[1, 6, 5, 5] "x"
        %y: f32[1, 6, 3, 3] = aten.conv2d(%x, %w, None, [1, 1], [0, 0], [1, 1], 2)
        %loss: f32[] = aten.sum(%y)
        return %loss
        """
    mesh, graph = lowered(
        text, {"y": {"dp": "a", "tp": "b"}, "loss": {"dp": "a", "tp": "b"}}, {"w": "[tp, -, -, -]"}
    )
    for rank in range(4):
        local = show(localise_shapes(graph, mesh, rank))
        assert f"f32[{1 - rank // 2}, 3, 3, 3] @ [dp, tp" in local
        assert "[1, 1], [0, 0], [1, 1], 1)" in local
