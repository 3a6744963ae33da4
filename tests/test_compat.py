"""What we rely on in private torch, tried on the torch that is installed (2.11 to 2.13)."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from autopar import compat


@pytest.fixture
def four_fake_ranks() -> Iterator[None]:
    with compat.fake_process_group(world_size=4, rank=1):
        yield


def test_every_name_is_there() -> None:
    assert all(hasattr(compat, name) for name in compat.__all__)


def test_torch_version_is_supported() -> None:
    assert (2, 11) <= compat.TORCH_VERSION < (2, 14)


def test_capture_is_one_graph_and_rebuilds_the_result() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(4, 2)

        def forward(self, x: torch.Tensor, scale: float = 1.0) -> dict[str, torch.Tensor]:
            return {"y": torch.relu(self.linear(x)) * scale}

    model, x = Model(), torch.randn(3, 4)
    graph = compat.dynamo_graph_capture_for_export(model)(x, scale=2.0)
    assert isinstance(graph, torch.fx.GraphModule)
    inputs = graph._dynamo_bytecode_flatten(x, 2.0)
    outputs = torch.fx.Interpreter(graph).run(*inputs, enable_io_processing=False)
    result = graph._dynamo_bytecode_unflatten(outputs, (x, 2.0))
    assert torch.equal(result["y"], model(x, scale=2.0)["y"])
    assert torch.equal(graph(x, scale=2.0)["y"], result["y"])


def test_capture_ignores_the_calls_it_is_told_to() -> None:
    log = logging.getLogger("test_compat")

    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            log.warning("shape %s", x.shape)
            return x + 1

    with compat.dynamo_ignores([log.warning]):
        graph = compat.dynamo_graph_capture_for_export(Model())(torch.zeros(2))
    assert [node.op for node in graph.graph.nodes].count("call_function") == 1


def test_strided_shard_keeps_its_split_factor() -> None:
    placement = compat.StridedShard(0, split_factor=2)
    assert (placement.dim, placement.split_factor) == (0, 2)


def test_symbolic_shapes_are_sympy() -> None:
    shape_env = compat.ShapeEnv()
    mode = compat.FakeTensorMode(shape_env=shape_env)
    x = torch.zeros(3, 4)
    torch._dynamo.mark_dynamic(x, 0)
    graph = compat.make_fx(lambda t: t + 1, tracing_mode="symbolic")(x)
    (placeholder,) = (n for n in graph.graph.nodes if n.op == "placeholder")
    fake = placeholder.meta["val"]
    assert isinstance(fake, compat.FakeTensor)
    assert compat.free_symbols(fake.shape)
    assert isinstance(mode.from_tensor(x), compat.FakeTensor)


def test_swap_tensors_swaps() -> None:
    a, b = torch.zeros(1), torch.ones(1)
    compat.swap_tensors(a, b)
    assert (a.item(), b.item()) == (1, 0)


@pytest.mark.usefixtures("four_fake_ranks")
def test_functional_collectives_have_shapes_on_fake_tensors() -> None:
    assert (dist.get_world_size(), dist.get_rank()) == (4, 1)
    group = dist.group.WORLD.group_name
    ops = compat.c10d_functional()
    with compat.FakeTensorMode():
        x = torch.empty(8, 3)
        gathered = ops.wait_tensor(ops.all_gather_into_tensor(x, 4, group))
        scattered = ops.wait_tensor(ops.reduce_scatter_tensor(x, "sum", 4, group))
        reduced = ops.wait_tensor(ops.all_reduce(x, "sum", group))
    assert [tuple(t.shape) for t in (gathered, scattered, reduced)] == [(32, 3), (2, 3), (8, 3)]


def test_fake_process_group_is_taken_down() -> None:
    with compat.fake_process_group(world_size=64):
        assert dist.get_world_size() == 64
    assert not dist.is_initialized()


@pytest.mark.usefixtures("four_fake_ranks")
def test_local_tensor_mode_computes_every_rank() -> None:
    ops, group = compat.c10d_functional(), dist.group.WORLD.group_name
    with compat.local_tensor_mode(4):
        x = compat.rank_map(lambda rank: torch.full((2,), float(rank)))
        total = ops.wait_tensor(ops.all_reduce(x + 1, "sum", group))
        assert total.reconcile().tolist() == [10.0, 10.0]


def test_rank_map_needs_the_mode() -> None:
    with pytest.raises(RuntimeError, match="needs `with local_tensor_mode"):
        compat.rank_map(lambda rank: torch.zeros(1))
