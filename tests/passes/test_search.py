"""The search returns the cheapest plan that fits, and says why others lost."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import nn

from autopar.errors import PassError, UserError
from autopar.ir.parse import parse_sharding
from autopar.ir.rule import Choice
from autopar.passes import programme, search
from autopar.passes.blocks import find_blocks
from autopar.plan import Plan
from tests.simulate import (
    Decisions,
    Subject,
    assert_equivalent,
    concrete,
    cpu,
    decisions_of,
    module_of,
    plan_of,
    simulate,
    single_device,
    subject_of,
    zoo_loss,
    zoo_subject,
)
from tests.zoo import ZOO
from tests.zoo.language import GPT

D, H, B, N = 64, 256, 8, 4
F64 = 8


class TwoLayers(nn.Module):
    """A column-parallel matrix and a row-parallel one, without biases."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(D, H, bias=False)
        self.down = nn.Linear(H, D, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).relu()).square().mean()


@pytest.fixture(scope="module")
def two_layers() -> Subject:
    torch.manual_seed(0)
    return subject_of(TwoLayers().double(), (torch.randn(B, D, dtype=torch.float64),), {})


def test_bytes_of_data_parallelism(two_layers: Subject) -> None:
    """A ring sends 2 (n - 1) / n of every gradient, and of one scalar loss."""
    made = plan_of(two_layers, N, "data")
    ring = 2 * (N - 1) / N
    gradients = 2 * D * H * F64
    assert made.predicted.comm_bytes == {"all_reduce": int(ring * gradients + ring * F64)}


def test_bytes_of_tensor_parallelism(two_layers: Subject) -> None:
    """Column then row: one sum of the output in the forward; the input needs no gradient."""
    made = plan_of(two_layers, N, "tensor")
    assert parse_sharding(made.params["up.weight"].sharding).dim_of("tp") == 0
    assert parse_sharding(made.params["down.weight"].sharding).dim_of("tp") == 1
    ring = (N - 1) / N
    output = B * D * F64
    sent = made.predicted.comm_bytes
    as_all_reduce = {"all_reduce": int(2 * ring * output)}
    # Or the sum is scattered, and the loss's scalar summed: half as much, gathered in the backward.
    as_scatter = {
        "all_gather": int(ring * output),
        "all_reduce": int(2 * ring * F64),
        "reduce_scatter": int(ring * output),
    }
    assert sent in (as_all_reduce, as_scatter)


def test_bytes_of_zero(two_layers: Subject) -> None:
    """Weights are gathered in the forward and in the backward, gradients reduced and scattered."""
    made = plan_of(two_layers, N, "zero")
    one_way = (N - 1) / N * 2 * D * H * F64
    sent = made.predicted.comm_bytes
    assert sent["all_gather"] == int(2 * one_way)
    assert sent["reduce_scatter"] == int(one_way)


# Memory -------------------------------------------------------------------------------------------


def test_the_memory_limit_is_kept() -> None:
    subject = zoo_subject("resnet")
    free = plan_of(subject, 4)
    last = free
    for share in (0.9, 0.7):
        limit = free.predicted.memory_bytes * share
        try:
            made = plan_of(subject, 4, memory_limit=limit)
        except UserError:
            break
        assert made.predicted.memory_bytes <= limit * (1 + 1e-6)
        assert made.predicted.time_s >= last.predicted.time_s * (1 - 1e-4)
        last = made
    assert last is not free


def test_nothing_fits() -> None:
    """The message says what the leanest plan needs, and how much is short."""
    with pytest.raises(UserError) as caught:
        plan_of(zoo_subject("gpt_outside"), 4, memory_limit=100_000.0)
    text = str(caught.value)
    assert re.search(
        r"fits on no plan: the leanest found \(.*\) needs [\d.]+ \w+ per device", text
    ), text
    assert re.search(r"the limit is [\d.]+ \w+: [\d.]+ \w+ short", text), text
    assert "use more devices, a smaller batch, or a higher memory_limit" in text


def test_the_leanest_plan_fits_in_what_it_needs() -> None:
    subject = zoo_subject("mlp")
    with pytest.raises(UserError) as caught:
        plan_of(subject, 4, memory_limit=1000.0)
    found = re.search(r"needs ([\d.]+) (\w+) per device", str(caught.value))
    assert found is not None
    unit = {"B": 1.0, "KiB": 2.0**10, "MiB": 2.0**20}[found[2]]
    need = float(found[1]) * unit
    assert plan_of(subject, 4, memory_limit=need * 1.06).predicted.memory_bytes <= need * 1.06
    with pytest.raises(UserError, match="short"):
        plan_of(subject, 4, memory_limit=need * 0.9)


# Depth --------------------------------------------------------------------------------------------


def gpt(layers: int) -> Subject:
    torch.manual_seed(0)
    model = GPT(vocab=101, layers=layers).double()
    args, kwargs = ZOO["gpt_outside"].inputs(0, torch.float64)
    return subject_of(model, args, kwargs)


def test_depth_changes_only_multiplicity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four layers or six: as many columns, the same storage in every layer."""
    counts: list[list[int]] = []
    model = programme._model

    def counting(columns: Any, *args: Any, **kwargs: Any) -> Any:
        counts[-1].append(len(columns.cost))
        return model(columns, *args, **kwargs)

    monkeypatch.setattr(programme, "_model", counting)
    plans: list[Plan] = []
    for layers in (4, 6):
        counts.append([])
        plans.append(plan_of(gpt(layers), 4, "tensor"))
    assert counts[0][0] == counts[1][0]
    inner = [
        {
            name.split(".", 2)[2]: s.sharding
            for name, s in made.params.items()
            if name.startswith(f"blocks.{at}.")
        }
        for made, layers in zip(plans, (4, 6), strict=True)
        for at in range(1, layers - 1)
    ]
    assert all(shardings == inner[0] for shardings in inner)


def test_copies_of_a_layer_do_the_same() -> None:
    subject = gpt(5)
    made = plan_of(subject, 4, "data+tensor")
    graph = concrete(subject)
    by_name = {node.name: node for node in graph.fx.nodes}
    stands_for = find_blocks(graph).representative
    for name, chosen in made.choices.items():
        assert made.choices.get(stands_for[by_name[name]].name, {}) == chosen


# The plan -----------------------------------------------------------------------------------------


def test_the_prediction_is_the_sum_of_its_parts() -> None:
    for name in ("gpt_outside", "resnet"):
        p = plan_of(zoo_subject(name), 4).predicted
        assert p.time_s == pytest.approx(p.compute_s + p.comm_s + p.optimizer_s)
        assert p.memory_bytes == pytest.approx(sum(p.memory_parts.values()), abs=8)


def test_alternatives_say_why_they_lost() -> None:
    made = plan_of(zoo_subject("gpt_outside"), 4)
    names = {a.name for a in made.alternatives}
    assert {"data", "zero", "tensor", "one process, all threads"} <= names
    assert all(a.why for a in made.alternatives)
    for alternative in made.alternatives:
        if alternative.time_s is not None and alternative.name != "one process, all threads":
            assert alternative.time_s >= made.predicted.time_s * (1 - 1e-4)


def test_a_wrong_evaluation_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan whose cost from scratch is not the solver's objective is never returned."""
    right = programme.evaluate
    monkeypatch.setattr(programme, "evaluate", lambda *a: (right(*a)[0] * 1.01, right(*a)[1]))
    with pytest.raises(PassError, match="after solve: objective_is_cost fails"):
        plan_of(zoo_subject("mlp"), 4)


def test_axes_lie_on_the_levels_of_the_cluster() -> None:
    from autopar.cost.cluster import parse_cluster
    from autopar.passes.propose import meshes_of

    cluster = parse_cluster("2x4xH100")
    meshes = list(meshes_of((("dp", "any"), ("tp", "any")), cluster))
    assert [str(m) for m in meshes] == ["dp=2 x tp=4", "dp=4 x tp=2"]
    assert [[a.level for a in m.axes] for m in meshes] == [[1, 0], [1, 0]]


# Evaluation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("devices", [1, 4])
def test_a_module_of_views_alone(devices: int) -> None:
    """Nothing costs anything: no ratio has a meaning, and there is a plan."""
    made = plan_of(subject_of(nn.Flatten(), (torch.randn(4, 3, 2),), {}), devices)
    assert made.predicted.time_s == pytest.approx(0.0, abs=1e-3)


@pytest.mark.parametrize("strategy", ["auto", "zero", "tensor"])
def test_evaluation_keeps_the_storage(strategy: str) -> None:
    """A capture in eval mode gets choices of its own; parameters stay where training has them."""
    entry = ZOO["gpt_attention_dropout"]
    training = zoo_subject("gpt_attention_dropout")
    made = plan_of(training, 4, strategy)
    model = module_of(entry).eval()
    args, kwargs = entry.inputs(0, torch.float64)
    evaluation = subject_of(model, args, kwargs)
    assert evaluation.capture.fingerprint != training.capture.fingerprint
    texts = search.choose_for(evaluation.graph, evaluation.capture.symbols, cpu(4), made)
    kept = decisions_of(evaluation, made)
    names = {node.name for node in evaluation.graph.fx.nodes}
    assert set(texts) <= names
    choices = {n: {a: Choice.parse(t) for a, t in chosen.items()} for n, chosen in texts.items()}
    decisions = Decisions(made.mesh, choices, kept.storage, kept.regather)
    loss = zoo_loss(entry)
    expected = single_device(model, args, kwargs, loss)
    assert_equivalent(simulate(evaluation, args, kwargs, loss, decisions), expected)


def test_a_mesh_of_one() -> None:
    made = plan_of(zoo_subject("mlp"), 1)
    assert made.mesh.size == 1
    assert made.predicted.comm_s == 0
    assert math.isfinite(made.predicted.time_s)
