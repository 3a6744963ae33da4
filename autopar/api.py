"""`parallelize`: what a user calls."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any, TypeVar, overload

import torch
from torch import nn

from .compression import checked_compression
from .controller import Controller
from .cost.cluster import Cluster, parse_cluster
from .cost.memory import OPTIMIZER_STATES
from .errors import UserError
from .kernel_options import checked_kernels
from .launch import COMPRESS, KERNELS, MEMORY
from .options import Options
from .passes.families import FAMILIES
from .pipeline_options import pipelines_asked
from .plan import Plan, load_plan
from .runtime import world
from .runtime.checkpoint import load_checkpoint
from .runtime.deferred import deferred

M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")

BACKENDS = (None, "eager", "inductor")
_ORIGINAL = "_autopar_original"  # of a parallel class: the class as its user wrote it


@overload
def parallelize(
    module: None = None,
    *,
    strategy: str = ...,
    cluster: str | Cluster | None = ...,
    plan: str | os.PathLike[str] | Plan | None = ...,
    memory_limit: float | str | None = ...,
    optimizer: str | type[torch.optim.Optimizer] | None = ...,
    backend: str | None = ...,
    checkpoint: str | os.PathLike[str] | None = ...,
    micro_batch_statistics: bool = ...,
    stages: int | None = ...,
    schedule: str | None = ...,
    micro_batches: int | None = ...,
    compress: str | None = ...,
    kernels: str | None = ...,
) -> Callable[[Any], Any]: ...


@overload
def parallelize(
    module: M,
    *,
    strategy: str = ...,
    cluster: str | Cluster | None = ...,
    plan: str | os.PathLike[str] | Plan | None = ...,
    memory_limit: float | str | None = ...,
    optimizer: str | type[torch.optim.Optimizer] | None = ...,
    backend: str | None = ...,
    checkpoint: str | os.PathLike[str] | None = ...,
    micro_batch_statistics: bool = ...,
    stages: int | None = ...,
    schedule: str | None = ...,
    micro_batches: int | None = ...,
    compress: str | None = ...,
    kernels: str | None = ...,
) -> M: ...


def parallelize(
    module: Any = None,
    *,
    strategy: str = "auto",
    cluster: str | Cluster | None = None,
    plan: str | os.PathLike[str] | Plan | None = None,
    memory_limit: float | str | None = None,
    optimizer: str | type[torch.optim.Optimizer] | None = None,
    backend: str | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    micro_batch_statistics: bool = False,
    stages: int | None = None,
    schedule: str | None = None,
    micro_batches: int | None = None,
    compress: str | None = None,
    kernels: str | None = None,
) -> Any:
    """Make a module (or a module class, as a decorator) train on all devices of this run.

    The training loop does not change: every process gives the module the same *global* batch, as on
    one device, and `loss.backward()`, any `torch.optim` optimizer, `clip_grad_norm_`, schedulers,
    `state_dict()` (whole tensors) and `load_state_dict()` work as before. Call it before the
    optimizer is made. In a single process the module just runs.

    Args:
        module: an `nn.Module`, or a class of modules; None returns a decorator.
        strategy: "auto" (search), or a family: "data", "zero", "tensor", "data+tensor",
            "zero+tensor", "pipeline", "pipeline+data", "pipeline+tensor".
        cluster: what the planner plans for: a `Cluster`, a spec ("cpu:4", "8xH100", "2x8xH100") or
            the path of a profile; by default the shipped profile of this kind of device.
        plan: a plan, or the path of a plan file, to use in place of a search.
        memory_limit: bytes per device, or a text such as "6GiB"; by default `autopar run --memory`.
            The plan is predicted to need a tenth less, so that what is measured keeps to it.
        optimizer: what the memory and time of the update are priced as (a `torch.optim` class or
            its name; default AdamW).
        backend: "eager" (ATen calls) or "inductor"; default eager on CPU, inductor on CUDA.
        checkpoint: a safetensors file, an index or a folder with either, whose values the model
            starts with; every process reads its own slices. See `load_checkpoint`.
        micro_batch_statistics: whether batch normalisation in training may take the statistics of
            each micro-batch, where the plan has several, instead of the batch's; without it such
            models run in one micro-batch.
        stages: how many stages a pipeline has; the search chooses by default.
        schedule: "gpipe", "1f1b", "interleaved" or "zero_bubble"; the search chooses by default.
        micro_batches: how many a step has; the search chooses by default.
        compress: "int8" sums the gradients of parameters as int8 where they cross hosts (on one
            host along all axes), which changes numbers: see docs/compression.md. By default
            `autopar run --compress`, and without it nothing is rounded. One process sums none.
        kernels: where autopar's own Triton kernels run: "auto" where the plan predicts them faster
            (nowhere on CPU), "off" nowhere, "all" wherever there is one, "interpret" as "all" in
            Triton's interpreter, for tests (needs TRITON_INTERPRET=1). By default
            `autopar run --kernels`, else "auto". One process has no plan, and runs none.

    Raises:
        UserError: for anything above that cannot be done, and on the first call for models that
            cannot be captured or fit on no plan.
    """
    if backend not in BACKENDS:
        raise UserError(f"unknown backend {backend!r}", fix="use 'eager' or 'inductor'")
    if strategy not in FAMILIES:
        raise UserError(
            f"unknown strategy {strategy!r}", fix=f"use one of {', '.join(map(repr, FAMILIES))}"
        )
    if micro_batches is not None and micro_batches < 1:
        raise UserError(f"the number of micro-batches {micro_batches} is not positive")
    limit = memory_limit if memory_limit is not None else os.environ.get(MEMORY)
    options = Options(
        strategy=strategy,
        cluster=parse_cluster(cluster) if isinstance(cluster, str) else cluster,
        plan=plan if plan is None or isinstance(plan, Plan) else load_plan(plan),
        memory_limit=parse_bytes(limit) if limit is not None else None,
        optimizer=optimizer_name(optimizer),
        backend=backend,
        checkpoint=os.fspath(checkpoint) if checkpoint is not None else None,
        micro_batch_statistics=micro_batch_statistics,
        micro_batches=micro_batches,
        compress=checked_compression(compress or os.environ.get(COMPRESS) or None),
        kernels=checked_kernels(kernels or os.environ.get(KERNELS) or "auto"),
        pipelines=pipelines_asked(
            strategy,
            stages,
            schedule,
            None if micro_batches is None else (micro_batches,),
            micro_batch_statistics,
        ),
    )
    if module is None:
        return lambda target: _decorate(target, options)
    return _decorate(module, options)


def undecorated(target: T) -> T:
    """The class, or the module itself with all its submodules, as before `parallelize`.

    A module stops being parallel by this; for modules of a single process only.
    """
    if isinstance(target, type):
        original: T = target.__dict__.get(_ORIGINAL, target)
        return original
    if isinstance(target, nn.Module):
        for module in target.modules():
            plain = type(module).__dict__.get(_ORIGINAL)
            if plain is not None:
                module.__class__ = plain
                module.__dict__.pop("autopar", None)
    return target


def parse_bytes(size: float | str) -> float:
    """Bytes of a number, or of a text such as "6GiB", "512 MB", "80G".

    Raises UserError for anything else, and for sizes that are not positive.
    """
    units = {"": 1, "b": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
    units |= {f"{u}ib": n for u, n in units.items() if u not in ("", "b")}
    units |= {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
    text = str(size).strip().lower()
    digits = text.rstrip("abcdefghijklmnopqrstuvwxyz ")
    try:
        found = float(digits) * units[text[len(digits) :].strip()]
    except (ValueError, KeyError):
        raise UserError(
            f"cannot read the memory limit {size!r}", fix='write bytes, or for example "6GiB"'
        ) from None
    if not found > 0:
        raise UserError(f"the memory limit {size!r} is not positive")
    return found


def optimizer_name(optimizer: str | type[torch.optim.Optimizer] | None) -> str:
    """The name under which an optimizer is priced; raises UserError for an unknown name."""
    if optimizer is None:
        return "adamw"
    if not isinstance(optimizer, str):  # one that is not known is priced as adamw
        return optimizer.__name__.lower()
    if optimizer.lower() not in OPTIMIZER_STATES:
        raise UserError(
            f"unknown optimizer {optimizer!r}",
            fix=f"use a class, or one of {', '.join(map(repr, OPTIMIZER_STATES))}",
        )
    return optimizer.lower()


def _decorate(target: Any, options: Options) -> Any:
    if isinstance(target, type) and issubclass(target, nn.Module):
        return _parallel_class(target, options)
    if isinstance(target, nn.Module):
        if isinstance(getattr(target, "autopar", None), Controller):
            raise UserError("the module is parallelized already")
        if options.checkpoint is not None:
            load_checkpoint(target, options.checkpoint)
        original = type(target)
        target.__class__ = _with_forward(original, options)
        target.__class__.__reduce_ex__ = _reduce(original, options)  # type: ignore[method-assign]
        _attach(target, original, options)
        return target
    kind = f"the {target.__name__} class" if isinstance(target, type) else type(target).__name__
    raise UserError(
        f"autopar.parallelize takes a torch.nn.Module or a class of modules, not {kind}",
        fix="wrap the function in a module's forward, or decorate the model's class",
    )


def _parallel_class(original: type[nn.Module], options: Options) -> type[nn.Module]:
    parallel = _with_forward(original, options)

    def init(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        if type(self) is not parallel:  # of a subclass that was not decorated itself
            original.__init__(self, *args, **kwargs)
            return
        with deferred() if world.world_size() > 1 else contextlib.nullcontext():
            original.__init__(self, *args, **kwargs)
        if options.checkpoint is not None:
            load_checkpoint(self, options.checkpoint)
        _attach(self, original, options)

    parallel.__init__ = init  # type: ignore[method-assign]
    return parallel


def _reduce(original: type[nn.Module], options: Options) -> Callable[..., tuple[Any, ...]]:
    """Copying and pickling of an instance: its class cannot be found under its name."""

    def reduce_ex(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        made = original.__reduce_ex__(self, protocol)
        return (_new_parallel, (original, options), *made[2:])

    return reduce_ex


def _new_parallel(original: type[nn.Module], options: Options) -> nn.Module:
    """An empty module of the parallel class of `original`."""
    parallel = _with_forward(original, options)
    parallel.__reduce_ex__ = _reduce(original, options)  # type: ignore[method-assign]
    return parallel.__new__(parallel)


def _with_forward(original: type[nn.Module], options: Options) -> type[nn.Module]:
    """A subclass of the same name whose forward goes through the controller."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        controller = self.__dict__.get("autopar")
        if controller is None:
            if "autopar" not in self.__dict__:  # a subclass that was not decorated itself
                return original.forward(self, *args, **kwargs)
            _attach(self, original, options)  # it was pickled
            controller = self.__dict__["autopar"]
        return controller.call(args, kwargs)

    forward.__doc__ = original.forward.__doc__
    names = {
        "forward": forward,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        _ORIGINAL: original,
    }
    return type(original.__name__, (original,), names)


def _attach(module: nn.Module, original: type[nn.Module], options: Options) -> None:
    module.__dict__["autopar"] = Controller(module, original, options)
