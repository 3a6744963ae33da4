"""The module's parameters as DTensors, and whole state dicts from them."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Container, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from autopar.compat import swap_tensors, take_hooks
from autopar.errors import UserError
from autopar.ir.mesh import Mesh
from autopar.ir.sharding import Sharding

from .deferred import DeferredTensor, real_value
from .flat_weights import refresh_flat_weights
from .foreign_values import digest_of, forget, mark
from .on_stage import placed_like
from .placements import shard
from .scalars import read_whole_scalars
from .whole_tensor import whole_tensor


def replicate_parameters(module: nn.Module, live: DeviceMesh) -> list[weakref.ref[nn.Parameter]]:
    """Make every parameter a DTensor that all ranks hold whole, with rank 0's values.

    A parameter's identity never changes after this, only (once, in `shard_parameters`) what it
    holds. Buffers get rank 0's values, too. Optimizers that were made before get the new
    parameters; the result are those that were replaced, which nothing should hold any more.
    """
    read_whole_scalars()
    take_rank_zeros(module)
    made: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    parameter = None
    for owner, name, parameter in _slots(module):
        if isinstance(parameter, (DTensor, DeferredTensor)):
            continue
        if id(parameter) not in made:
            whole = whole_tensor(parameter.detach(), live)
            new = nn.Parameter(whole, requires_grad=parameter.requires_grad)
            if parameter.grad is not None:
                new.grad = whole_tensor(parameter.grad, live)
            take_hooks(new, parameter)
            made[id(parameter)] = (parameter, new)
        owner._parameters[name] = made[id(parameter)][1]
    refresh_flat_weights(module)
    news = {key: new for key, (_, new) in made.items()}
    replaced = [weakref.ref(old) for old, _ in made.values()]
    del parameter, made  # the last references that are ours
    if any(ref() is not None for ref in replaced):
        give_to_optimizers(news)
    return replaced


def _slots(module: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    return [
        (owner, name, parameter)
        for owner in module.modules()
        for name, parameter in owner._parameters.items()
        if parameter is not None
    ]


def give_to_optimizers(news: Mapping[int, nn.Parameter]) -> None:
    """Put new parameters in the place of old ones (by `id`) in every optimizer there is."""
    for found in gc.get_objects():
        if not issubclass(type(found), Optimizer):
            continue
        for group in found.param_groups:
            group["params"] = [news.get(id(p), p) for p in group["params"]]
        for old in [p for p in found.state if id(p) in news]:
            found.state[news[id(old)]] = found.state.pop(old)


def check_replaced(replaced: Sequence[weakref.ref[nn.Parameter]]) -> None:
    """Raise UserError if someone still holds parameters that are no longer the module's.

    One of them may be the variable of a finished loop.
    """
    if sum(ref() is not None for ref in replaced) < 2:
        return
    gc.collect()
    held = sum(ref() is not None for ref in replaced)
    if held >= 2:
        raise UserError(
            f"{held} parameters were replaced by distributed ones when the model was parallelized, "
            "and something still holds the old ones, which do not train",
            fix="call autopar.parallelize before model.parameters() is kept anywhere",
        )


def check_planned(module: nn.Module, planned: Container[str]) -> None:
    """Raise UserError for parameters that came into the module after its plan was made."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for name, parameter in module.named_parameters():
        known = any(other in planned for other in names[id(parameter)])
        if not known or not isinstance(parameter, DTensor):
            raise UserError(
                f"the parameter {name} came into the model after its plan was made",
                fix="change the model before its first call, or copy its state_dict() into a new "
                "model and parallelize that",
            )


def shard_parameters(
    module: nn.Module,
    storage: Mapping[str, Sharding],
    mesh: Mesh,
    live: DeviceMesh,
    stages: Mapping[str, Sequence[int]] | None = None,
) -> None:
    """Keep of every parameter only this rank's piece, in place: optimizers see the same objects.

    `storage` is keyed by any of the parameter's names, and so are the pipeline `stages` that use
    it, of which the first owns it; one that no stage uses is on all. Raises UserError if a
    parameter is tied up in an unfinished backward.
    """
    refresh_flat_weights(module)  # the module may have been moved since
    forget(module.parameters())  # they are rank 0's
    rank = dist.get_rank()
    done: set[int] = set()
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if id(parameter) in done or not isinstance(parameter, DTensor):
            continue
        whole = parameter.to_local().detach()
        sharding = storage.get(name, Sharding.replicated(whole.dim()))
        used_by = (stages or {}).get(name, ())
        keep = functools.partial(
            shard,
            sharding=sharding,
            mesh=mesh,
            live=live,
            rank=rank,
            stage=used_by[0] if used_by else None,
        )
        new = nn.Parameter(keep(whole), requires_grad=parameter.requires_grad)
        if parameter.grad is not None:
            grad = parameter.grad
            assert isinstance(grad, DTensor)
            new.grad = keep(grad.to_local())
        become(name, parameter, new)
        done.add(id(parameter))


def become(name: str, parameter: nn.Parameter, new: nn.Parameter) -> None:
    """Make `parameter` what `new` is, for everybody who holds it."""
    try:
        swap_tensors(parameter, new)  # type: ignore[no-untyped-call]
        take_hooks(parameter, parameter)  # autograd's part of them went with what it was
    except RuntimeError as error:
        raise UserError(
            f"the parameter {name} cannot be distributed while something else holds on to it: "
            f"{str(error).splitlines()[0]}",
            fix="do not use the model's parameters in another computation before its first call",
        ) from None


def take_rank_zeros(module: nn.Module) -> None:
    """Give every rank rank 0's parameters and buffers, if they differ at all; collective.

    The parameters have to be plain, or DTensors that every rank holds whole; those without memory
    are left alone.
    """
    parameters = [p for p in module.parameters() if not isinstance(p, DeferredTensor)]
    tensors = [
        t.to_local() if isinstance(t, DTensor) else t
        for t in (*(p.detach() for p in parameters), *module.buffers())
    ]
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
    """Replace the DTensors of a state dict by whole tensors, in place; collective.

    So are tensors that have no memory yet.
    """
    seen: dict[int, Tensor] = {}
    for name, value in list(state.items()):
        if isinstance(value, DeferredTensor):
            state[name] = real_value(value)
        if isinstance(value, DTensor):
            if id(value) not in seen:
                detached = value.detach()
                assert isinstance(detached, DTensor)
                seen[id(value)] = detached.full_tensor()
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
    made = placed_like(replicated, parameter)
    mark(made, digest_of(whole))
    return made


@functools.cache
def place_optimizer_states() -> None:
    """From now on, optimizers hold states as their parameters are, wherever they come from.

    What a checkpoint gives are whole tensors, or pieces under another plan.
    """
    register_optimizer_step_pre_hook(_place_states)


def _place_states(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    del args, kwargs
    for parameter, state in optimizer.state.items():
        if not isinstance(parameter, DTensor):
            continue
        for name, value in state.items():
            if not isinstance(value, Tensor) or value.shape != parameter.shape or name == "step":
                continue
            if not isinstance(value, DTensor):
                state[name] = like(value, parameter)
            elif _place_of(value) != _place_of(parameter):
                state[name] = like(value.full_tensor(), parameter)


def _place_of(value: DTensor) -> tuple[Any, ...]:
    return value.device_mesh, value.placements
