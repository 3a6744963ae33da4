"""One rank of a plan by itself: its program does the lowered shapes, for 8 and 64 ranks."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pytest
import sympy
import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.node import map_aggregate

from autopar.compat import TorchDispatchMode
from autopar.cost.cluster import parse_cluster
from autopar.errors import UserError
from autopar.ir.graph import Graph, value_of, values_of
from autopar.ir.lowered import OPEN, GroupRef, LoweredOp
from autopar.passes.case import Case, make_case
from autopar.passes.compute_of import compute_of
from autopar.passes.prepare import prepare
from autopar.passes.rank_program import busiest_rank, rank_program
from autopar.passes.search import search
from autopar.passes.timeline_of import timeline_of
from autopar.plan import Plan
from autopar.planning import capture_training
from autopar.runtime.alone import alone_groups
from autopar.runtime.bindings import BINDINGS
from autopar.runtime.family_times import kernel_group
from autopar.runtime.measure_rank import PHASES, RankAlone, check_fits, make_optimizer
from autopar.runtime.phase_clock import PhaseClock
from autopar.runtime.random_values import index_bounds

CPU = torch.device("cpu")
STRATEGIES = ["data", "zero", "tensor", "data+tensor"]


class Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).split(d, dim=2)
        q, k, v = (y.view(b, t, self.heads, d // self.heads).transpose(1, 2) for y in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dropout(self.proj(y.transpose(1, 2).reshape(b, t, d)))
        out: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return out


class GPT(nn.Module):
    def __init__(self, dim: int = 64, layers: int = 2) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(96, dim), nn.Embedding(16, dim)
        self.blocks = nn.ModuleList(Block(dim, 8) for _ in range(layers))
        self.head = nn.Linear(dim, 96)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), targets.flatten())


class Mixture(nn.Module):
    """Experts in slots: rows go to the ranks that have their expert, and come back."""

    def __init__(self, dim: int = 16, experts: int = 8) -> None:
        super().__init__()
        self.experts = experts
        self.tokens, self.head = nn.Embedding(64, dim), nn.Linear(dim, 64)
        self.router = nn.Linear(dim, experts, bias=False)
        self.weight = nn.Parameter(torch.randn(experts, dim, dim))

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.tokens(ids).flatten(0, 1)
        gate, expert = torch.topk(F.softmax(self.router(x), dim=-1), 1, dim=-1)
        capacity = 2 * x.shape[0] // self.experts
        choice = F.one_hot(expert.flatten(), self.experts)
        place = ((choice.cumsum(0) * choice).sum(-1) - 1).clamp(max=capacity - 1)
        slot = expert.flatten() * capacity + place
        slots = x.new_zeros(self.experts * capacity, x.shape[1]).index_add(0, slot, x)
        done = torch.bmm(slots.view(self.experts, capacity, -1), self.weight).flatten(0, 1)
        return F.cross_entropy(self.head(done[slot] * gate), targets.flatten())


class Subject(NamedTuple):
    graph: Graph
    fingerprint: str
    sizes: Mapping[sympy.Symbol, int]

    def plan(self, cluster: str, strategy: str) -> Plan:
        where = parse_cluster(cluster)
        return search(self.graph, self.fingerprint, self.sizes, where, strategy=strategy)

    def case(self, plan: Plan, cluster: str) -> Case:
        return make_case(self.graph, self.sizes, plan, parse_cluster(cluster))


def captured_of(make: Callable[[], nn.Module]) -> Subject:
    with torch.device("meta"):
        ids, module = torch.zeros(128, 16, dtype=torch.long), make()
    captured = capture_training(module, (ids, torch.zeros_like(ids)), {})
    return Subject(prepare(captured.graph), captured.fingerprint, captured.symbols)


@pytest.fixture(scope="module")
def subject() -> Subject:
    return captured_of(GPT)


def alone(case: Case, lowered: Graph, rank: int, micro_batches: int = 1) -> RankAlone:
    bounds = index_bounds(case.concrete)
    mesh = case.plan.mesh
    return RankAlone(lowered, mesh, rank, CPU, given={}, bounds=bounds, micro_batches=micro_batches)


def check_every_op(lowered: Graph, runner: RankAlone, case: Case, rank: int) -> int:
    """Run the graph op by op on the runner's arguments and compare shapes; how many ops it has."""
    groups = alone_groups(lowered, case.plan.mesh, rank, PhaseClock(CPU))
    env: dict[Any, Any] = dict(zip(lowered.placeholders(), runner.arguments, strict=True))
    count = 0

    def load(item: Any) -> Any:
        if isinstance(item, GroupRef):
            return groups[item.axes]
        return env[item] if isinstance(item, torch.fx.Node) else item

    for node in lowered.calls():
        args, kwargs = map_aggregate((node.args, node.kwargs), load)
        target: Any = node.target
        out = (BINDINGS[target] if isinstance(target, LoweredOp) else target)(*args, **kwargs)
        env[node] = out
        made = list(out) if isinstance(out, (tuple, list)) else [out]
        source = node.args[0] if target is operator.getitem else node
        if not values_of(node) or (isinstance(source, torch.fx.Node) and source.target is OPEN):
            continue  # edges between the phases of a collective are empty
        for x, value in zip(made, values_of(node), strict=True):
            assert (tuple(x.shape), x.dtype) == (value.shape, value.dtype), node
        count += 1
    return count


class Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The shapes of the products that run, by how often."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name in ("aten::mm", "aten::addmm", "aten::bmm"):
            a = args[1] if name == "aten::addmm" else args[0]
            self.flops += 2 * out.numel() * a.shape[-1]
        return out


def linear_flops(lowered: Graph) -> int:
    """Flops of the linear layers of a lowered graph, by its local shapes."""
    total = 0
    for node in lowered.calls():
        if node.target is torch.ops.aten.linear.default:
            weight: Any = node.args[1]
            total += 2 * int(value_of(node).numel()) * int(value_of(weight).shape[1])
    return total


@pytest.mark.parametrize("ranks", [8, 64])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_program_does_the_local_shapes(subject: Subject, strategy: str, ranks: int) -> None:
    plan = subject.plan(f"cpu:{ranks}", strategy)
    case = subject.case(plan, f"cpu:{ranks}")
    for rank in (busiest_rank(case), ranks - 1):
        lowered = rank_program(subject.graph, subject.sizes, plan, rank)
        runner = alone(case, lowered, rank)
        stored = [tuple(p.shape) for p in runner.parameters]
        assert stored == [value_of(n).shape for n in lowered.placeholders("param")]
        assert check_every_op(lowered, runner, case, rank) > 40
        with Products() as seen:
            runner.step()
        # Forward, and two products as large in the backward.
        assert seen.flops == 3 * linear_flops(lowered)
        whole = sum(int(value_of(n).numel()) for n in subject.graph.placeholders("param"))
        held = sum(p.numel() for p in runner.parameters)
        assert held < whole if strategy != "data" else held == whole


def test_rows_that_are_routed_stay_in_range() -> None:
    subject = captured_of(Mixture)
    for ranks in (4, 8):
        plan = subject.plan(f"cpu:{ranks}", "tensor")
        case = subject.case(plan, f"cpu:{ranks}")
        for rank in (0, ranks - 1):
            lowered = rank_program(subject.graph, subject.sizes, plan, rank)
            runner = alone(case, lowered, rank)
            assert check_every_op(lowered, runner, case, rank) > 20
            runner.step()
            assert all(p.grad is None for p in runner.parameters)


def test_figures(subject: Subject) -> None:
    plan = subject.plan("cpu:8", "data")
    case = subject.case(plan, "cpu:8")
    runner = alone(case, rank_program(subject.graph, subject.sizes, plan, 0), 0)
    found = runner.measure(3, 1)
    assert found.steps == 3
    assert min(found.forward_s, found.backward_s, found.optimizer_s, found.stand_ins_s) > 0
    assert found.step_s >= max(found.forward_s, found.backward_s)
    assert found.families["matmul"] > 0
    assert found.families["optimizer"] > 0
    # Parameters, moments and gradients are there at the end of the backward.
    held = 4 * 4 * sum(p.numel() for p in runner.parameters)
    assert held < found.memory_bytes < 4 * held
    assert found.memory_bytes == pytest.approx(timeline_of(case).peak_bytes, rel=0.4)


def test_predicted_compute_is_the_timelines(subject: Subject) -> None:
    for strategy in STRATEGIES:
        plan = subject.plan("8xH100", strategy)
        case = subject.case(plan, "8xH100")
        compute, timeline = compute_of(case), timeline_of(case)
        rest = timeline.compute_s - timeline.slowdown_s
        assert compute.forward_s + compute.backward_s == pytest.approx(rest)
        assert compute.optimizer_s == pytest.approx(timeline.optimizer_s)
        assert sum(compute.families.values()) == pytest.approx(rest)


def test_micro_batches_run_one_after_the_other(subject: Subject) -> None:
    plan = subject.plan("cpu:8", "data")
    case = subject.case(plan, "cpu:8")
    lowered = rank_program(subject.graph, subject.sizes, plan, 0)
    runner = alone(case, lowered, 0, micro_batches=3)
    with Products() as seen:
        runner.step()
    assert seen.flops == 3 * 3 * linear_flops(lowered)
    assert all(p.grad is None for p in runner.parameters)
    assert set(runner.clock.take()) >= set(PHASES)


def test_optimizers() -> None:
    for kind in ("adamw", "adam", "sgd", "sgd_momentum", "adagrad", "rmsprop"):
        parameter = nn.Parameter(torch.ones(3))
        optimizer = make_optimizer(kind, [parameter], CPU)
        assert optimizer is not None
        parameter.grad = torch.ones(3)
        optimizer.step()
        assert not torch.equal(parameter.detach(), torch.ones(3))
    assert make_optimizer("none", [nn.Parameter(torch.ones(3))], CPU) is None


def test_what_does_not_fit() -> None:
    with pytest.raises(UserError, match=r"rank 3 needs about 1e\+03 TiB|rank 3 needs about"):
        check_fits(1e15, 3, CPU)
    check_fits(1e6, 3, CPU)


def test_kernels_have_the_group_of_their_op() -> None:
    groups = {
        "aten::mm": "matmul",
        "aten::addmm": "matmul",
        "aten::convolution_backward": "matmul",
        "aten::_scaled_dot_product_flash_attention_backward": "attention",
        "autopar::causal_rows": "attention",
        "aten::native_layer_norm": "memory-bound",
        "aten::add_": "memory-bound",
        "aten::_fused_adamw_": "optimizer",
    }
    assert {name: kernel_group(name) for name in groups} == groups
