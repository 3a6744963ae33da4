"""A likelihood of a log-softmax is a cross-entropy, to the last bit."""

from __future__ import annotations

import pytest
import torch

from autopar.ir.interpret import run_graph
from autopar.ir.registry import rule_for
from autopar.passes.join_log_softmax import join_log_softmax
from autopar.passes.unflatten_tokens import unflatten_tokens

from .helpers import graph_of, show

DIRECT = """
%x: input f64[6, 5] grad "x"
%t: input i64[6] "t"
%p: f64[6, 5] = aten.log_softmax.int(%x, -1)
%y: f64[] = aten.nll_loss_nd(%p, %t, None, {reduction}, 2)
return %y
"""
RESHAPED = """
%x: input f64[2, 3, 5] grad "x"
%t: input i64[2, 3] "t"
%p: f64[2, 3, 5] = aten.log_softmax.int(%x, 2)
%q: f64[6, 5] = aten.reshape(%p, [6, 5])
%ids: i64[6] = aten.reshape(%t, [6])
%y: f64[] = aten.nll_loss_nd(%q, %ids, None, {reduction}, 2)
return %y
"""


@pytest.mark.parametrize("reduction", [1, 2])
@pytest.mark.parametrize("text", [DIRECT, RESHAPED], ids=["direct", "reshaped"])
def test_joined(text: str, reduction: int) -> None:
    graph = graph_of(text.format(reduction=reduction))
    made = join_log_softmax(graph)
    assert "log_softmax" not in show(made)
    apart = unflatten_tokens(made)
    (loss,) = (n for n in apart.calls() if n.name == "y")
    rule = rule_for(loss)
    assert rule is not None
    assert not rule.whole
    generator = torch.Generator().manual_seed(0)
    shape = (2, 3) if text is RESHAPED else (6,)
    x = torch.randn(*shape, 5, generator=generator, dtype=torch.float64)
    ids = torch.randint(0, 5, shape, generator=generator)
    for other in (made, apart):
        assert torch.equal(run_graph(graph, [x, ids])[0], run_graph(other, [x, ids])[0])


@pytest.mark.parametrize("dim", ["0", "1"])
def test_other_dims_and_readers_are_left(dim: str) -> None:
    """Over tokens it is no cross-entropy; a reader of the log-softmax keeps it."""
    graph = graph_of(
        DIRECT.format(reduction=1).replace("-1)", f"{dim})").replace("return %y", "return %y, %p")
    )
    made = show(join_log_softmax(graph))
    assert "log_softmax" in made
    assert ("cross_entropy" in made) == (dim == "1")
