"""Plans with pipelines: what the search chooses and prints, limits, and what cannot be."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, nn

from autopar.capture import Capture
from autopar.cost.cluster import make_mesh, parse_cluster
from autopar.errors import UserError
from autopar.ir.graph import Graph
from autopar.passes.accounts import overlap_of
from autopar.passes.blocks import find_blocks
from autopar.passes.cut_points import units_of
from autopar.passes.edits import illegal_edits, reprice
from autopar.passes.pipelined import Wanted, micro_batch_counts, stage_counts
from autopar.passes.prepare import prepare
from autopar.passes.search import search
from autopar.passes.specialise import specialise
from autopar.plan import Plan, plan_from_json
from autopar.planning import capture_training
from tests.simulate import cpu


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, 4 * dim)
        self.down = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    """Six blocks between an embedding and a head, which may share their weight."""

    def __init__(self, tied: bool = False, dim: int = 256) -> None:
        super().__init__()
        self.embed = nn.Embedding(512, dim)
        self.blocks = nn.ModuleList(Block(dim) for _ in range(6))
        self.head = nn.Linear(dim, 512, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor, target: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), target.flatten())


class Outside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(*(nn.Linear(32, 32) for _ in range(4)))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


def captured(model: nn.Module, *inputs: Tensor) -> tuple[Capture, Graph]:
    made = capture_training(model, inputs, {}, fold=True)
    return made, prepare(made.graph)


@pytest.fixture(scope="module")
def net() -> tuple[Capture, Graph]:
    ids = torch.zeros(8, 32, dtype=torch.int64)
    return captured(Net(), ids, ids)


def planned(of: tuple[Capture, Graph], strategy: str = "auto", **how: Any) -> Plan:
    capture, graph = of
    wanted = {n: how.pop(n) for n in ("stages", "schedules", "micro_batches") if n in how}
    how.setdefault("recompute", ("none", "full"))
    made = search(
        graph,
        capture.fingerprint,
        capture.symbols,
        how.pop("cluster", cpu(4)),
        strategy=strategy,
        pipelines=Wanted(**wanted),
        **how,
    )
    assert plan_from_json(made.to_json()) == made
    return made


def shown(plan: Plan) -> str:
    assert plan.pipeline is not None and plan.timeline is not None
    lines = [f"{plan.mesh}, {plan.micro_batches} micro-batches: {plan.pipeline}"]
    lines += [use.what for use in plan.timeline.stages]
    return "\n".join(lines)


def test_a_chain_is_cut_at_blocks_where_there_are_enough(net: tuple[Capture, Graph]) -> None:
    graph = specialise(net[1], net[0].symbols)
    blocks = find_blocks(graph)
    fine, coarse = units_of(graph, blocks), units_of(graph, blocks, 2)
    assert_expected_inline(
        ", ".join(unit.name for unit in coarse),
        """embedding, layer_norm, layer_norm_1, layer_norm_2, layer_norm_3, layer_norm_4, \
layer_norm_5, linear_12""",
    )
    assert {unit.name for unit in coarse} <= {unit.name for unit in fine}
    assert all(len(unit.crossing) == 1 for unit in fine[1:])
    assert sum(len(unit.nodes) for unit in fine) == sum(len(unit.nodes) for unit in coarse)


def test_nothing_of_a_stage_inside_a_cpu_host_overlaps() -> None:
    """Gathers of parameters beside compute would be free, and every stage would do with ZeRO."""
    hosts, gpus = parse_cluster("2xcpu:4"), parse_cluster("2x4xH100")
    whole, staged = {"dp": 2, "tp": 4}, {"pp": 2, "dp": 4}
    assert overlap_of(hosts, make_mesh(hosts, whole)) > 0
    assert overlap_of(hosts, make_mesh(hosts, staged)) == 0
    assert overlap_of(gpus, make_mesh(gpus, staged)) > 0
    assert overlap_of(cpu(4), make_mesh(cpu(4), {"dp": 4})) == 0


@pytest.mark.parametrize("length", [32, 128])
def test_stages_on_two_hosts_are_as_fast_as_forced_ones(length: int) -> None:
    """Of one with 128 tokens per row, messages that are whole on every device take too long."""
    ids = torch.zeros(16, length, dtype=torch.int64)
    large, hosts = captured(Net(dim=512), ids, ids), parse_cluster("2xcpu:4")
    plan, data = (
        planned(large, strategy, cluster=hosts, stages=(2,), recompute=("none",))
        for strategy in ("auto", "pipeline+data")
    )
    assert plan.predicted.time_s <= 1.001 * data.predicted.time_s


def test_devices_of_a_stage_send_parts_to_another_host_and_gather_there() -> None:
    ids = torch.zeros(8, 32, dtype=torch.int64)
    made = captured(Net(), ids, ids)
    how: dict[str, Any] = {"stages": (2,), "schedules": ("1f1b",), "micro_batches": (4,)}
    one, two = (
        planned(made, "pipeline+tensor", cluster=parse_cluster(spec), **how)
        for spec in ("cpu:8", "2xcpu:4")
    )
    assert two.choices == one.choices
    assert 4 * two.predicted.comm_bytes["send"] == one.predicted.comm_bytes["send"]


def test_a_pipeline_of_one_device_per_stage(net: tuple[Capture, Graph]) -> None:
    plan = planned(net, "pipeline", schedules=("1f1b",), micro_batches=(8,))
    assert_expected_inline(
        shown(plan),
        """\
pp=4, 8 micro-batches: 1f1b, 4 pieces from layer_norm_1, layer_norm_3, layer_norm_5
embed, blocks.0
blocks.{1,2}
blocks.{3,4}
blocks.5, head""",
    )
    assert plan.params["embed.weight"].stages == (0,)
    assert plan.params["head.weight"].stages == (3,)
    assert not plan.choices


@pytest.mark.parametrize("strategy", ["pipeline+data", "pipeline+tensor"])
def test_a_pipeline_of_several_devices_per_stage(net: tuple[Capture, Graph], strategy: str) -> None:
    plan = planned(net, strategy)
    axis = {"pipeline+data": "dp", "pipeline+tensor": "tp"}[strategy]
    assert plan.mesh.names == ("pp", axis)
    assert plan.stages == plan.stage_mesh.size == 2
    assert all(set(chosen) == {axis} for chosen in plan.choices.values())
    again = reprice(plan, net[1], net[0].symbols, cpu(4))
    assert again.predicted == plan.predicted
    assert again.timeline == plan.timeline


def test_tied_weights_are_on_the_stages_that_use_them() -> None:
    ids = torch.zeros(8, 32, dtype=torch.int64)
    plan = planned(captured(Net(tied=True), ids, ids), "pipeline", micro_batches=(4,))
    assert plan.params["embed.weight"].stages == (0, 3)


def test_less_memory_is_slower_and_kept_to() -> None:
    ids = torch.zeros(8, 512, dtype=torch.int64)
    long = captured(Net(), ids, ids)
    how: dict[str, Any] = {"micro_batches": (4,), "schedules": ("1f1b",)}
    free = planned(long, "pipeline+data", **how)
    most, times = float(free.predicted.memory_bytes), [free.predicted.time_s]
    for share in (0.9, 0.75):
        limit = share * most
        plan = planned(long, "pipeline+data", memory_limit=limit, **how)
        assert plan.predicted.memory_bytes <= limit
        times.append(plan.predicted.time_s)
    assert times == sorted(times)


@pytest.mark.parametrize(
    ("strategy", "how", "says"),
    [
        ("auto", {"stages": (3,)}, "3 stages do not divide 4 devices"),
        ("pipeline", {"stages": (2,)}, "has one device per stage: 4 stages"),
        ("pipeline+data", {"stages": (4,)}, "leave one device each"),
        ("auto", {"stages": (4,), "micro_batches": (16,)}, "the batch of 8 is smaller than 16"),
        ("auto", {"stages": (2,), "micro_batches": (3,)}, "3 micro-batches do not divide"),
        (
            "auto",
            {"stages": (4,), "micro_batches": (2,), "schedules": ("1f1b",)},
            "1f1b of 4 stages needs 4 micro-batches or more",
        ),
        ("pipeline", {"memory_limit": 2e6}, "no pipeline fits: on pp=4, stage"),
    ],
)
def test_what_cannot_be_is_said(
    net: tuple[Capture, Graph], strategy: str, how: dict[str, Any], says: str
) -> None:
    with pytest.raises(UserError, match=says.replace("(", r"\(")):
        planned(net, strategy, **how)


def test_unknown_schedules_and_single_stages_are_refused() -> None:
    with pytest.raises(UserError, match="unknown pipeline schedule 'chimera'"):
        Wanted(schedules=("chimera",))
    with pytest.raises(UserError, match="a pipeline of 1 stage"):
        Wanted(stages=(1,))


def test_a_model_with_its_loss_outside_is_left_out_and_told_why() -> None:
    of = captured(Outside(), torch.zeros(8, 32))
    plan = planned(of)
    assert plan.pipeline is None
    (refused,) = (a for a in plan.alternatives if a.name == "pipeline")
    assert "need the loss inside" in refused.why and "return loss_fn" in refused.why
    with pytest.raises(UserError, match="need the loss inside"):
        planned(of, stages=(2,))


def test_more_stages_than_pieces_are_refused() -> None:
    ids = torch.zeros(8, 32, dtype=torch.int64)
    model = Net()
    model.blocks = model.blocks[:1]
    capture, graph = captured(model, ids, ids)
    with pytest.raises(UserError, match="cannot be cut into 8 stages: it has"):
        search(graph, capture.fingerprint, capture.symbols, cpu(8), pipelines=Wanted(stages=(8,)))


def test_illegal_cuts_of_an_edited_plan_are_named(net: tuple[Capture, Graph]) -> None:
    plan = planned(net, "pipeline+data", schedules=("1f1b",), micro_batches=(4,))
    assert plan.pipeline is not None
    assert not illegal_edits(plan, net[1], net[0].symbols, cpu(4))

    def edited(cut: str) -> list[str]:
        pipeline = dataclasses.replace(plan.pipeline, cuts=(cut,))  # type: ignore[type-var]
        changed = dataclasses.replace(plan, pipeline=pipeline)
        return illegal_edits(changed, net[1], net[0].symbols, cpu(4))

    assert edited("layer_norm_9")[0].startswith("pipeline: the model has no op 'layer_norm_9'")
    assert any("and the cuts use it on" in line for line in edited("layer_norm_1"))


def test_numbers_of_stages_and_micro_batches() -> None:
    assert stage_counts(12, 6, None) == [2, 3, 4, 6]
    assert stage_counts(12, 6, [4, 12]) == [4]
    assert micro_batch_counts(64, 4, 2) == [4, 8, 16, 32]
    assert micro_batch_counts(8, 4, 8) == [4]  # fewer rows than devices: at least one per stage
    assert micro_batch_counts(512, 4, 1) == [4, 8, 16, 32, 64, 128, 256, 512]  # rows: tokens
    assert micro_batch_counts(512, 2, 2) == [2, 4, 8, 16, 32, 64, 128, 256]
    assert micro_batch_counts(12, 2, 1, [4, 5]) == [4]
