"""What a user would write by hand: DDP, FSDP2 and tensor parallelism, each on its whole world.

Every trainer uses fused AdamW and the same initial parameters. A fused optimizer refuses a group
that mixes plain tensors and DTensors, so these are put in two groups.
"""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    loss_parallel,
    parallelize_module,
)
from torch.distributed.tensor.parallel.style import ParallelStyle
from torch.nn.parallel import DistributedDataParallel

from .models import GPT, MODELS, Recommender, WideMLP


@dataclass(frozen=True)
class Trainer:
    """One rank's model and optimizer; `local_batch`: it takes its slice of the global batch."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    local_batch: bool = False
    context: Callable[[], AbstractContextManager[None]] = nullcontext

    def step(self, batch: tuple[Tensor, ...]) -> float:
        """Forward, backward, optimizer step, zero_grad; returns the loss this rank saw."""
        with self.context():
            loss: Tensor = self.model(*batch)
            loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad()
        if isinstance(loss, DTensor):
            loss = loss.full_tensor()
        return float(loss.detach())

    def slice_of(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if not self.local_batch:
            return batch
        return tuple(x.chunk(dist.get_world_size())[dist.get_rank()].contiguous() for x in batch)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        [p for p in parameters if isinstance(p, DTensor)],
        [p for p in parameters if not isinstance(p, DTensor)],
    ]
    return torch.optim.AdamW([{"params": g} for g in groups if g], lr=1e-4, fused=True)


def single(model: nn.Module) -> Trainer:
    return Trainer(model, adamw(model))


def ddp(model: nn.Module) -> Trainer:
    # Every process has made the same initial values: no need to send them.
    replica = DistributedDataParallel(model, gradient_as_bucket_view=True, init_sync=False)
    return Trainer(replica, adamw(replica), local_batch=True)


def fsdp2(model: nn.Module) -> Trainer:
    return _fully_sharded(model, init_device_mesh("cpu", (dist.get_world_size(),)))


def fsdp2_hybrid(model: nn.Module) -> Trainer:
    """Sharded inside a host, replicated over the hosts."""
    inside = int(os.environ["LOCAL_WORLD_SIZE"])
    sizes = (dist.get_world_size() // inside, inside)
    return _fully_sharded(
        model, init_device_mesh("cpu", sizes, mesh_dim_names=("replicate", "shard"))
    )


def _fully_sharded(model: nn.Module, mesh: DeviceMesh) -> Trainer:
    blocks = getattr(model, "blocks", ())
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return Trainer(model, adamw(model), local_batch=True)


def tensor_parallel(model: nn.Module) -> Trainer:
    """The usual Megatron plan, or a table sharded by columns."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    context: Callable[[], AbstractContextManager[None]] = nullcontext
    if isinstance(model, GPT):
        _shard_gpt(model, mesh)
        context = loss_parallel
    elif isinstance(model, WideMLP):
        for block in model.blocks:
            _apply(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    elif isinstance(model, Recommender):
        _apply(model, mesh, {"items": ColwiseParallel(output_layouts=Replicate())})
    else:
        raise ValueError(f"no tensor-parallel plan for {type(model).__name__}")
    return Trainer(model, adamw(model), context=context)


def _shard_gpt(model: GPT, mesh: DeviceMesh) -> None:
    for block in model.blocks:
        _apply(
            block,
            mesh,
            {
                "attention": PrepareModuleInput(
                    input_layouts=(Replicate(),), desired_input_layouts=(Replicate(),)
                ),
                "attention.wq": ColwiseParallel(),
                "attention.wk": ColwiseParallel(),
                "attention.wv": ColwiseParallel(),
                "attention.wo": RowwiseParallel(),
                "up": ColwiseParallel(),
                "down": RowwiseParallel(),
            },
        )
    _apply(
        model,
        mesh,
        {
            "tokens": RowwiseParallel(input_layouts=Replicate()),
            "head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False),
        },
    )


def _apply(module: nn.Module, mesh: DeviceMesh, plan: dict[str, ParallelStyle]) -> None:
    parallelize_module(module, mesh, plan)


def autopar_auto(model: nn.Module) -> Trainer:
    import autopar

    parallel = autopar.parallelize(model, strategy=os.environ.get("STRATEGY", "auto"))
    return Trainer(parallel, adamw(parallel))


CONTENDERS: dict[str, Callable[[nn.Module], Trainer]] = {
    "one process": single,
    "DDP": ddp,
    "FSDP2": fsdp2,
    "hand TP": tensor_parallel,
    "autopar": autopar_auto,
}
SEVERAL_HOSTS: dict[str, Callable[[nn.Module], Trainer]] = {
    "one process": single,  # on one host
    "FSDP2 hybrid": fsdp2_hybrid,  # sends least, so it runs before the others
    "DDP": ddp,
    "FSDP2": fsdp2,
    "autopar": autopar_auto,
}


def contenders_of(model: str) -> tuple[str, ...]:
    assert model in MODELS, model
    return tuple(name for name in CONTENDERS if (model, name) != ("resnet", "hand TP"))
