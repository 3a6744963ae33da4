"""A training step on the stages of a pipeline: the step of one device with its pieces elsewhere.

Every rank returns what the model returns: the last stage's results are sent to all stages, and so
are new values of buffers. A parameter that several stages read is lent by the one that stores it,
which adds up the gradients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .messages import empty_messages, pack, unpack
from .step import FIRST_SCALE, Key, PartProgram, Step
from .step_parts import Crossing, Engine
from .tied_parameters import TiedParameters


@dataclass(frozen=True)
class Results:
    """What all stages get of a step.

    `outputs` are what the model returns: types of tensors, all else as it is. `updates` are the
    new values of buffers: name, the stage that makes it, type.
    """

    outputs: tuple[Crossing | object, ...]
    updates: tuple[tuple[str, int, Crossing], ...] = ()


class PipelinedStep(Step):
    """The step of one rank of a pipeline.

    `line` holds the ranks with this rank's place in every stage. `owners` are the stages that store
    the parameters, by name; what is not in it, all stages store. `parameters` are those that some
    stage reads.
    """

    def __init__(
        self,
        parts: Sequence[PartProgram],
        engine: Engine,
        micro_batches: int,
        line: dist.ProcessGroup,
        results: Results,
        owners: Mapping[str, int],
        tied: TiedParameters,
        parameters: Sequence[str],
    ) -> None:
        super().__init__(parts, engine, micro_batches)
        self._parameters = tuple(parameters)
        self.line, self.results, self.owners, self.tied = line, results, owners, tied
        self.stage, self.stages = dist.get_rank(line), dist.get_world_size(line)
        mine = {
            "loss": self.loss,
            "differentiable": self.differentiable,
            "half": self.half,
            "random": any(p.is_random for p in self.parts),
        }
        told = self._told(mine)
        self.loss, self.differentiable = told[-1]["loss"], told[-1]["differentiable"]
        self._is_random = any(t["random"] for t in told)
        self.half = any(t["half"] for t in told)
        self.parts = tuple(replace(part, half=self.half) for part in self.parts)
        self.scale = FIRST_SCALE if self.half else 1.0
        self._takers: tuple[str, ...] | None = None

    def _told(self, mine: Any) -> list[Any]:
        """What every stage says."""
        told: list[Any] = [None] * self.stages
        dist.all_gather_object(told, mine, group=self.line)
        return told

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters that some stage reads."""
        return self._parameters

    @property
    def is_trained(self) -> bool:
        """Whether there is a loss that gradients are wanted of."""
        return self.loss is not None

    @property
    def is_random(self) -> bool:
        return self._is_random

    def _forward(
        self, parameters: Mapping[str, Tensor], given: Mapping[Key, Any], training: bool
    ) -> tuple[tuple[Any, ...], dict[str, Tensor], dict[str, Tensor]]:
        borrowed = self.tied.borrow(parameters)
        for name, piece in borrowed.items():
            piece.requires_grad_(parameters[name].requires_grad)
        outputs, updates, gradients = super()._forward({**parameters, **borrowed}, given, training)
        outputs, updates = self._share(outputs, updates)
        if training:
            self._settle(gradients, parameters, borrowed)
        return outputs, updates, gradients

    def _share(
        self, outputs: tuple[Any, ...], updates: Mapping[str, Tensor]
    ) -> tuple[tuple[Any, ...], dict[str, Tensor]]:
        """The outputs of the last stage, and the new buffers of all."""
        types = self.results.outputs
        places = [i for i, t in enumerate(types) if isinstance(t, Crossing)]
        made: list[Any] = list(outputs or types)
        wanted = [t for t in types if isinstance(t, Crossing)]
        sent = self._from(self.stages - 1, wanted, [made[i] for i in places])
        for i, tensor in zip(places, sent, strict=True):
            made[i] = tensor
        new: dict[str, Tensor] = {}
        for stage in range(self.stages):
            of_it = [(name, t) for name, by, t in self.results.updates if by == stage]
            mine = [updates[name] for name, _ in of_it] if stage == self.stage else []
            tensors = self._from(stage, [t for _, t in of_it], mine)
            new.update(zip((name for name, _ in of_it), tensors, strict=True))
        return tuple(made), new

    def _from(
        self, stage: int, types: Sequence[Crossing], mine: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        """Tensors of one stage on all of them; collective on the line."""
        here = stage == self.stage
        messages = pack(mine) if here else empty_messages(types, self.device)
        for message in messages:
            dist.broadcast(message, group=self.line, group_src=stage)
        return mine if here else unpack(messages, types)

    @property
    def device(self) -> torch.device:
        return self.tied.device

    def _settle(
        self,
        gradients: dict[str, Tensor],
        parameters: Mapping[str, Tensor],
        borrowed: Mapping[str, Tensor],
    ) -> None:
        """Bring gradients to where their parameters are; empty ones to all other stages."""
        returned = {name: gradients.pop(name, None) for name in borrowed}
        for name, more in self.tied.give_back(returned).items():
            if parameters[name].requires_grad:
                gradients[name] = gradients[name] + more if name in gradients else more
        if self._takers is None:
            told = self._told(sorted(gradients))
            self._takers = tuple(sorted({name for names in told for name in names}))
        for name in self._takers:
            if name in self.owners:
                if self.owners[name] != self.stage:
                    gradients[name] = torch.empty_like(parameters[name])
            else:  # on all stages: of no dims
                total = gradients.get(name)
                total = torch.zeros_like(parameters[name]) if total is None else total.clone()
                dist.all_reduce(total, group=self.line)
                gradients[name] = total
