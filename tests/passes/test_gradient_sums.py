"""Adding gradients of parameters over micro-batches is paid by the ops that make them."""

from __future__ import annotations

import pytest

from autopar.cost.cluster import make_mesh
from autopar.cost.compute import accumulate_time
from autopar.ir.graph import tensor_inputs, value_of
from autopar.ir.rule import Placed
from autopar.ir.sharding import Sharding
from autopar.passes.gradient_sums import parameter_slots
from autopar.passes.price import Pricer
from tests.passes.helpers import graph_of
from tests.simulate import cpu

TEXT = """
%w: param f32[30, 20] grad "w"
%frozen: param bf16[30] "frozen"
%x: input f32[8, 20] "x"
%half: bf16[30, 20] grad = aten._to_copy(%w, dtype=bf16)
%turned: bf16[20, 30] grad = aten.t(%half)
%low: bf16[8, 20] = aten._to_copy(%x, dtype=bf16)
%y: bf16[8, 30] grad = aten.mm(%low, %turned)
%z: bf16[8, 30] grad = aten.add(%y, %frozen)
return %z
"""


def test_only_ops_that_make_gradients_of_parameters() -> None:
    """Through views and casts; neither inputs nor frozen parameters nor the views themselves."""
    found = {node.name: parameter_slots(node) for node in graph_of(TEXT).calls()}
    assert found == {"half": (), "turned": (), "low": (), "y": (1,), "z": ()}


@pytest.mark.parametrize("micro_batches", [1, 2, 8])
def test_all_micro_batches_but_the_first_add(micro_batches: int) -> None:
    """Per micro-batch `(k - 1) / k` of a sum, of what one device has of the parameter."""
    node = next(n for n in graph_of(TEXT).calls() if n.name == "y")
    cluster = cpu(2)
    mesh = make_mesh(cluster, {"tp": 2})
    wants = [Sharding.replicated(2), Sharding.replicated(2).with_split(1, ("tp",))]
    placed = Placed(tuple(wants), (wants[1],))
    once, several = (Pricer(cluster, mesh, micro_batches=k) for k in (1, micro_batches))
    turned = tensor_inputs(node)[1]
    nbytes = once.local_bytes(value_of(turned), wants[1])
    assert nbytes == 20 * 15 * 2
    passed = 20 * 15 * (2 + 4 + 4)  # a gradient in 16 bits, its sum in float32, read and written
    added = (micro_batches - 1) / micro_batches * float(accumulate_time(once.device, passed / 3))
    forward, backward = once.compute_times_s(node, placed)
    assert several.compute_times_s(node, placed) == pytest.approx((forward, backward + added))
