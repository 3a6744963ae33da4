"""Which axes' gradients travel compressed, and what the plan says of it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from autopar.compression import compressed_axes, with_compression, with_note
from autopar.cost.cluster import parse_cluster
from autopar.first_plan import with_kernels
from autopar.ir.mesh import Axis, Mesh
from autopar.kernel_use import KernelUse, Places
from autopar.options import Options
from autopar.passes.prepare import prepare
from autopar.plan import Plan, Prediction
from autopar.planning import capture_training, make_plan

INSIDE = Mesh.of(dp=2, tp=2)
HOSTS = Mesh((Axis("dp", 2, 1), Axis("fsdp", 4), Axis("tp", 2)))
STAGES = Mesh((Axis("pp", 2, 1), Axis("dp", 4)))


def plan(mesh: Mesh, *notes: str) -> Plan:
    predicted = Prediction(1.0, 1.0, 0.0, 0.0, 1)
    return Plan("f", mesh, "cluster", "data", {}, {}, predicted, notes=notes)


def test_axes() -> None:
    assert compressed_axes(INSIDE) == ("dp", "tp")
    assert compressed_axes(HOSTS) == ("dp",)
    assert compressed_axes(STAGES) == ()
    assert compressed_axes(Mesh(())) == ()


def test_places_are_the_users_choice_alone() -> None:
    everywhere = Places({"int8": None, "pack": None})
    assert not with_compression(everywhere, HOSTS, None).has("int8", "dp")
    places = with_compression(everywhere, HOSTS, "int8")
    assert places.has("int8", "dp") and not places.has("int8", "fsdp")
    assert places.has("pack", "fsdp")


def test_notes() -> None:
    (note,) = with_note(plan(HOSTS), "int8").notes
    assert note.startswith("compress: gradients along dp travel as int8")
    (note,) = with_note(plan(STAGES), "int8").notes
    assert note.startswith("compress: no gradients are summed between hosts")
    priced = replace(plan(HOSTS), kernels=(KernelUse("int8", ("dp",), "", 2, 0.5e-3, 2e-3),))
    (note,) = with_note(priced, "int8").notes
    assert note.endswith(": predicted 500 us per step in place of 2 ms"), note
    counted = (replace(priced.kernels[0], step_s=-1e-3),)
    (note,) = with_note(replace(priced, kernels=counted), "int8").notes
    assert note.endswith("in place of 2 ms; the predicted step counts -1 ms for it"), note
    before = with_note(plan(INSIDE, "something else"), "int8")
    assert len(before.notes) == 2 and with_note(before, "int8").notes == before.notes
    assert with_note(before, None).notes == ("something else",)


def test_a_plan_that_is_given_keeps_its_kernels_but_compresses_as_the_run_is_asked_to() -> None:
    cluster = parse_cluster("cpu:2")
    model, inputs = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2)), (torch.ones(4, 64),)
    captured = capture_training(model, inputs, {})
    captured = replace(captured, graph=prepare(captured.graph))
    made = make_plan(model, inputs, {}, cluster, strategy="data")
    own, stale = KernelUse("adamw", ("optimizer",)), KernelUse("int8", ("dp",), time_s=7.0)
    given = replace(made, kernels=(own, stale))
    options = Options(cluster=cluster)
    assert with_kernels(given, captured, options, given).kernels == (own,)
    options = replace(options, compress="int8")
    kept, priced = with_kernels(given, captured, options, given).kernels
    assert kept == own and (priced.kernel, priced.where) == ("int8", ("dp",))
    assert 0 < priced.time_s < 7.0 and priced.unfused_s > 0
