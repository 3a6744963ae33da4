"""The programs of captured graphs under one plan: lowered, loaded, ready to be called."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .capture import Capture
from .errors import ShardingWarning, UserError
from .ir.rule import Choice
from .kernel_use import NOWHERE, Places
from .passes.follow_micro_batches import Followed, batch_size, largest_count
from .passes.lower_step import lower_part, micro_batched
from .passes.mark_recompute import matching_recompute
from .passes.pipeline import Stage, lowering, run_passes
from .passes.rank_program import storage_of
from .passes.rules_of import rules_of
from .passes.specialise import specialise
from .pipelines import another_schedule, load_pipelined_step
from .plan import Plan, Recompute
from .runtime import agree, world
from .runtime.group import Group
from .runtime.program import Program, load_program
from .runtime.step import LocalEngine, Step, load_part

Choices = Mapping[str, Mapping[str, Choice]]
Given = Mapping[tuple[str, str], Any]
SEED = ("seed", "rng_seed")


class Runnable(Protocol):
    """What one call of the module runs: one program, or a step of several."""

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters that it reads."""

    @property
    def is_random(self) -> bool:
        """Whether it uses its seed."""

    @property
    def schedule(self) -> str:
        """Digest of its collectives."""

    def run(
        self, parameters: Mapping[str, Tensor], given: Given
    ) -> tuple[tuple[Any, ...], Mapping[str, Tensor]]:
        """What the user's code returns, and new values of buffers by name.

        `parameters` are local tensors by name; `given` has inputs, buffers and the seed by role and
        name.
        """


@dataclass(frozen=True)
class OneProgram:
    """A program that runs the whole batch at once, differentiated by autograd."""

    program: Program

    @property
    def parameters(self) -> tuple[str, ...]:
        return tuple(names[0] for role, names in self.program.placeholders if role == "param")

    @property
    def is_random(self) -> bool:
        return self.program.is_random

    @property
    def schedule(self) -> str:
        return self.program.schedule

    def run(
        self, parameters: Mapping[str, Tensor], given: Given
    ) -> tuple[tuple[Any, ...], Mapping[str, Tensor]]:
        """See `Runnable.run`."""
        program = self.program
        arguments = []
        for role, names in program.placeholders:
            if role == "param":
                arguments.append(parameters[names[0]])
            elif role == "constant":
                arguments.append(program.constants[names[0]])
            else:
                arguments.append(given[role, names[0]])
        made = program.run(*arguments)
        updates = zip(program.mutated, made[program.outputs :], strict=True)
        return made[: program.outputs], dict(updates)


@dataclass
class Loader:
    """Lowers and loads captures under a plan, for this rank of a live mesh.

    `parameters` are the module's by all their names. `groups` are shared by all programs, `stages`
    what every pass left when the last one was lowered. `statistics` says whether batch
    normalisation may take those of a micro-batch. `kernels` are where autopar's own kernels run.
    """

    plan: Plan
    rank: int
    live: DeviceMesh
    groups: dict[tuple[str, ...], Group]
    device: torch.device
    backend: str | None
    statistics: bool = False
    kernels: Places = NOWHERE
    parameters: Mapping[str, Tensor] = field(default_factory=dict)
    stages: list[Stage] = field(default_factory=list)

    def load(self, made: Capture, sizes: Mapping[Any, int], choices: Choices) -> Runnable:
        """The program of a capture for a batch of `sizes`; collective. Raises UserError."""
        count = largest_count(self.plan.micro_batches, batch_size(sizes))
        found: Runnable | None = None
        while count > 1 and found is None:
            try:
                found = self._several(made, sizes, choices, count)
            except UserError as error:
                if self._is_promised(made, sizes):
                    raise
                self._tell(sizes, count, error)
                count = largest_count(count - 1, batch_size(sizes))
        if self.plan.pipeline is not None:  # agreed on stage by stage
            return found or self._pipelined(made, sizes, choices, 1)
        found = found or self._whole(made, sizes, choices)
        agree.check_same(
            "the program's schedule of collectives",
            found.schedule,
            "this is a bug in autopar: please report it with the model",
        )
        return found

    def _is_promised(self, made: Capture, sizes: Mapping[Any, int]) -> bool:
        """Whether the plan is for this very step, so that it must run as it was planned."""
        hints = {str(symbol): size for symbol, size in sizes.items()}
        return made.fingerprint == self.plan.fingerprint and hints == self.plan.hints

    def _tell(self, sizes: Mapping[Any, int], count: int, error: UserError) -> None:
        if torch.is_grad_enabled() and self.rank == 0:
            less = f"a batch of {batch_size(sizes)} runs in fewer than {count} micro-batches"
            warnings.warn(f"{less}: {error.what}", ShardingWarning, stacklevel=2)

    def _whole(self, made: Capture, sizes: Mapping[Any, int], choices: Choices) -> Runnable:
        graph, plan = made.graph, self.plan
        storage, regather = storage_of(graph, plan)
        passes = lowering(
            plan.mesh,
            self.rank,
            sizes,
            rules_of,
            choices,
            storage,
            regather,
            self._recompute(made, sizes),
            ahead=self._ahead,
            kernels=self.kernels,
        )
        self.stages = run_passes(graph, passes, plan.mesh)
        lowered = self.stages[-1].graph
        self._start_groups(lowered)
        return OneProgram(load_program(lowered, self.groups, self.backend, self.device))

    def _several(
        self, made: Capture, sizes: Mapping[Any, int], choices: Choices, count: int
    ) -> Runnable:
        if self.plan.pipeline is not None:
            return self._pipelined(made, sizes, choices, count)
        return self._step(made, sizes, choices, count)

    def _pipelined(
        self, made: Capture, sizes: Mapping[Any, int], choices: Choices, count: int
    ) -> Runnable:
        step, self.stages = load_pipelined_step(
            made.graph,
            self._followed(made, sizes, choices, count),
            self.plan,
            count,
            self.parameters,
            self.live,
            self.groups,
            self.device,
            self.backend,
            self.kernels,
        )
        if step.is_trained and self.rank == 0:
            note = another_schedule(self.plan, count)
            if note:
                warnings.warn(note, ShardingWarning, stacklevel=2)
        return step

    def _followed(
        self, made: Capture, sizes: Mapping[Any, int], choices: Choices, count: int
    ) -> Followed:
        storage, regather = storage_of(made.graph, self.plan)
        return micro_batched(
            made.graph,
            self.plan.stage_mesh,
            count,
            sizes,
            rules_of,
            choices,
            storage,
            regather,
            self._recompute(made, sizes),
            # Of one micro-batch, they are those of the batch.
            self.statistics or count == 1,
        )

    def _step(
        self, made: Capture, sizes: Mapping[Any, int], choices: Choices, count: int
    ) -> Runnable:
        storage, regather = storage_of(made.graph, self.plan)
        followed = self._followed(made, sizes, choices, count)
        found = lower_part(
            followed,
            followed.graph,
            self.rank,
            storage,
            regather,
            self._ahead,
            kernels=self.kernels,
        )
        self.stages = list(found.stages)
        self._start_groups(found.graphs.prologue, found.graphs.body, found.graphs.tail)
        part = load_part(found.graphs, self.groups, self.backend, self.device)
        return Step([part], LocalEngine(), count)

    @property
    def _ahead(self) -> bool:
        return self.device.type != "cpu"  # gloo's collectives do not run beside compute

    def _start_groups(self, *graphs: Any) -> None:
        compiled = self.backend not in (None, "eager")
        world.groups_of(graphs, self.live, self.groups, traceable=compiled)

    def _recompute(self, made: Capture, sizes: Mapping[Any, int]) -> tuple[Recompute, ...]:
        """What of a capture the backward computes again: the plan names blocks of its own.

        Other sizes may make ops alike that were not, and blocks begin elsewhere.
        """
        plan = self.plan
        if not plan.recompute or (self._is_promised(made, sizes) and plan.micro_batches == 1):
            return plan.recompute
        return matching_recompute(specialise(made.graph, sizes), plan.recompute)
