"""The module's parameters as DTensors, and whole state dicts from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from autopar.errors import UserError
from autopar.ir.mesh import Mesh
from autopar.ir.sharding import Sharding

from .placements import shard


def replicate_parameters(module: nn.Module, live: DeviceMesh) -> None:
    """Make every parameter a DTensor that all ranks hold whole, with rank 0's values.

    Called before the user makes the optimizer: a parameter's identity never changes after this,
    only (once, in `shard_parameters`) what it holds. Buffers get rank 0's values, too.
    """
    _same_on_all_ranks(module)
    placements = [Replicate()] * live.ndim
    made: dict[int, nn.Parameter] = {}
    for owner, name, parameter in _slots(module):
        if isinstance(parameter, DTensor):
            continue
        if id(parameter) not in made:
            whole = DTensor.from_local(parameter.detach(), live, placements, run_check=False)
            made[id(parameter)] = nn.Parameter(whole, requires_grad=parameter.requires_grad)
        owner._parameters[name] = made[id(parameter)]


def shard_parameters(
    module: nn.Module, storage: Mapping[str, Sharding], mesh: Mesh, live: DeviceMesh
) -> None:
    """Keep of every parameter only this rank's piece, in place: optimizers see the same objects.

    `storage` is keyed by any of the parameter's names. Raises UserError if a parameter is tied up
    in an unfinished backward.
    """
    rank = dist.get_rank()
    done: set[int] = set()
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if id(parameter) in done or not isinstance(parameter, DTensor):
            continue
        whole = parameter.to_local().detach()
        sharding = storage.get(name, Sharding.replicated(whole.dim()))
        new = nn.Parameter(
            shard(whole, sharding, mesh, live, rank), requires_grad=parameter.requires_grad
        )
        if parameter.grad is not None:
            grad = parameter.grad
            assert isinstance(grad, DTensor)
            new.grad = shard(grad.to_local(), sharding, mesh, live, rank)
        try:
            torch.utils.swap_tensors(parameter, new)
        except RuntimeError as error:
            raise UserError(
                f"the parameter {name} cannot be sharded: {error}",
                fix="call the model once before keeping its parameters in other graphs",
            ) from None
        done.add(id(parameter))


def _slots(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                yield owner, name, parameter


def _same_on_all_ranks(module: nn.Module) -> None:
    """Give every rank rank 0's parameters and buffers, if they differ at all."""
    tensors = [*module.parameters(), *module.buffers()]
    sums = [t.detach().double().sum().cpu() if t.numel() else torch.zeros(()) for t in tensors]
    mine = torch.stack([s.double() for s in sums]) if sums else torch.zeros(0).double()
    mine = torch.nan_to_num(mine)
    low, high = mine.clone(), mine.clone()
    dist.all_reduce(low, dist.ReduceOp.MIN)
    dist.all_reduce(high, dist.ReduceOp.MAX)
    if not torch.equal(low, high):
        for tensor in tensors:
            dist.broadcast(tensor.detach(), src=0)


def whole_state(state: dict[str, Any]) -> None:
    """Replace the DTensors of a state dict by whole tensors, in place; collective."""
    seen: dict[int, Tensor] = {}
    for name, value in list(state.items()):
        if isinstance(value, DTensor):
            if id(value) not in seen:
                seen[id(value)] = value.detach().full_tensor()
            state[name] = seen[id(value)]


def shard_state(module: nn.Module, state: dict[str, Any], prefix: str) -> None:
    """Replace whole tensors of a state dict by DTensors like the module's parameters, in place."""
    for name, parameter in module.named_parameters(remove_duplicate=False):
        value = state.get(prefix + name)
        if not isinstance(parameter, DTensor) or not isinstance(value, Tensor):
            continue
        if isinstance(value, DTensor) or value.shape != parameter.shape:
            continue
        state[prefix + name] = like(value, parameter)


def like(whole: Tensor, parameter: DTensor) -> DTensor:
    """A whole tensor that every rank holds, as a DTensor placed like `parameter`."""
    replicated = DTensor.from_local(
        whole.to(parameter.device),
        parameter.device_mesh,
        [Replicate()] * parameter.device_mesh.ndim,
        run_check=False,
    )
    return replicated.redistribute(parameter.device_mesh, parameter.placements)
