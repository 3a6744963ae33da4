"""`model.autopar`: what a parallelized module knows of itself."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .clusters import cluster_of_run
from .errors import UserError
from .options import Options
from .plan import Plan
from .report import print_plan, print_timing
from .runtime import world
from .runtime.file_values import check_values, deferred_from_meta
from .runtime.materialise import realise
from .runtime.single import SingleProcess
from .runtime.state import shard_state, whole_state
from .session import Session


class Controller:
    """Runs a module's calls: over all ranks of the run, or in this one process.

    `plan` is the plan in use (None before the first call, and in a single process).
    """

    def __init__(self, module: nn.Module, original: type[nn.Module], options: Options) -> None:
        self._module = weakref.ref(module)
        self._original = original
        self.session: Session | None = None
        self.single: SingleProcess | None = None
        self._checked = False  # whether all parameters have values
        options = copy.copy(options)
        if world.world_size() == 1:
            realise(module)
            self.single = SingleProcess(options.backend or _default_backend(module))
            return
        deferred_from_meta(module)
        device = _device_of(module)
        world.start_world(device)
        options.cluster = cluster_of_run(device, options.cluster)
        if options.cluster.size != world.world_size():
            raise UserError(
                f"the cluster {options.cluster.name} has {options.cluster.size} devices, "
                f"and {world.world_size()} processes were started",
                fix=f"start {options.cluster.size} processes, or name a cluster of "
                f"{world.world_size()} devices",
            )
        if options.backend is None:
            options.backend = _default_backend(module)
        self.session = Session(module, original, options)
        module.register_state_dict_post_hook(_whole)  # type: ignore[no-untyped-call]
        module.register_load_state_dict_pre_hook(_shard)  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: dict[int, Any]) -> Controller | None:
        """The controller of a copy of the module, which runs under the same plan."""
        module = memo.get(id(self.module))
        if module is None:
            return None
        new = object.__new__(type(self))
        vars(new).update(vars(self))
        new._module = weakref.ref(module)
        new.single = SingleProcess(self.single.backend) if self.single is not None else None
        new.session = self.session.copied(module) if self.session is not None else None
        return new

    def __reduce__(self) -> tuple[Any, ...]:
        if self.session is not None:
            raise UserError(
                "a module that runs on several processes cannot be pickled",
                fix="save its state_dict(), which holds whole tensors",
            )
        return (_unattached, ())  # what is loaded finds its own processes in its first call

    @property
    def module(self) -> nn.Module:
        module = self._module()
        assert module is not None
        return module

    @property
    def plan(self) -> Plan | None:
        return self.session.plan if self.session is not None else None

    def call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What the undecorated forward returns."""
        if self.session is not None:
            return self.session.call(args, kwargs)
        assert self.single is not None
        if not self._checked:
            check_values(self.module)
            self._checked = True
        return self.single.call(self._original.forward, self.module, args, kwargs)

    def prepare(self, *args: Any, **kwargs: Any) -> None:
        """Capture and plan for a batch and shard the parameters, without running the module.

        The first call does the same; this only makes the plan known before it. All ranks must
        call it, with the same batch.
        """
        if self.session is not None:
            self.session.prepare(args, kwargs)

    @property
    def measured_step_s(self) -> float | None:
        """Median seconds from one training call to the next; None before the fifth."""
        times = self.session or self.single
        return times.clock.median_s() if times is not None else None

    def print_plan(self) -> None:
        """Print the plan as tables, on rank 0."""
        if self.session is None:
            print("autopar: one process, no plan")
        elif self.session.rank == 0 and self.plan is not None:
            print_plan(self.plan)

    def print_timing(self) -> None:
        """Print predicted and measured step time and memory side by side, on rank 0."""
        if self.session is None or self.session.rank == 0:
            on_cuda = self.session is not None and self.session.device_type == "cuda"
            peak = float(torch.cuda.max_memory_allocated()) if on_cuda else None
            print_timing(self.plan, self.measured_step_s, peak)


def _device_of(module: nn.Module) -> str:
    return next((p.device.type for p in module.parameters()), "cpu")


def _default_backend(module: nn.Module) -> str:
    return "inductor" if _device_of(module) == "cuda" else "eager"


def _unattached() -> None:
    return None


def _whole(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    del module, prefix, metadata
    whole_state(state)


def _shard(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    del rest
    shard_state(module, state, prefix)
